"""Class reweighting: what it writes where, what it remembers, what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback import ClassReweighting, Feedback
from losses import LogitAdjustedLoss, WeightedCrossEntropyLoss

CLASSES = ("negative", "positive")
GROUPS = ("Amazon", "Tweets")
BY_CLASS = torch.tensor([[[90, 10], [50, 50]]])
BY_GROUP = torch.tensor([[[95, 5], [14, 16]], [[25, 5], [8, 92]]])


class Module(nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.criterion = criterion


def module(**arguments):
    return Module(WeightedCrossEntropyLoss(2, **arguments))


def report(counts=BY_CLASS, **arguments):
    if len(counts) > 1:
        arguments.setdefault("group_names", GROUPS[: len(counts)])
    return BiasReport(0, 0, counts, CLASSES, **arguments)


def bound(target, *arguments, **keywords):
    feedback = ClassReweighting(*arguments, **keywords)
    feedback.bind(target)
    return feedback


def saved(feedback):
    """What comes back from a checkpoint, which Lightning reads with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save({"callbacks": {"BiasMonitor": feedback.state_dict()}}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["callbacks"]["BiasMonitor"]


def noisy(seed, groups=1):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 200, (groups, 2, 2), generator=generator)
    return report(counts, train_counts=torch.randint(1, 50, (groups, 2), generator=generator))


def test_weights_follow_the_recalls():
    target = module()
    sentences = bound(target).apply(report())
    torch.testing.assert_close(target.criterion.class_weight, torch.tensor([0.6200510, 1.3799490]))
    assert sentences == (
        "negative: weight 1.00 -> 0.62 (recall 0.90)",
        "positive: weight 1.00 -> 1.38 (recall 0.50)",
    )


def test_sentences_name_the_average_that_the_weights_follow():
    target = module()
    feedback = bound(target)
    feedback.apply(report())
    # averages 0.7 * 0.9 + 0.3 * 0.6 = 0.81 and 0.7 * 0.5 + 0.3 * 0.8 = 0.59: positive rises above the better recall
    negative, positive = feedback.apply(report(torch.tensor([[[60, 40], [20, 80]]])))
    assert negative.endswith("(recall 0.60, average 0.81)")
    assert positive.endswith("(recall 0.80, average 0.59)")
    assert math.exp(0.62) / math.cosh(0.62) == pytest.approx(1.55, abs=0.005)  # 0.4 of the first step, 0.22 of this one
    assert positive.startswith("positive: weight 1.38 -> 1.55 ")


def test_sentences_say_when_a_recall_was_not_measured():
    target = Module(WeightedCrossEntropyLoss(3))
    feedback = bound(target, smoothing=0.0)
    names = ("a", "b", "c")
    feedback.apply(BiasReport(0, 0, torch.tensor([[[90, 10, 0], [50, 50, 0], [30, 0, 70]]]), names))
    told = feedback.apply(BiasReport(0, 0, torch.tensor([[[900, 100, 0], [50, 50, 0], [0, 0, 0]]]), names))
    assert next(line for line in told if line.startswith("c:")).endswith("(recall not measured, average 0.70)")
    assert next(line for line in told if line.startswith("b:")).endswith("(recall 0.50)")


def test_weights_follow_the_cells():
    target = module(num_groups=2)
    sentences = bound(target, by="group", dead_band=0.0, smoothing=0.0).apply(report(BY_GROUP))
    recall = torch.tensor([[0.95, 16 / 30], [25 / 30, 0.92]], dtype=torch.float64)
    prior = torch.tensor([[100, 30], [30, 100]]) / 260
    raw = (2 * (recall.mean() - recall)).exp()
    raw[1, 0] = 1.0  # 0.02 from the mean of 0.81, standard error 0.07
    torch.testing.assert_close(target.criterion.class_weight, (raw / (prior * raw).sum()).float())
    assert sentences[0] == f"Amazon, positive: weight 1.00 -> {target.criterion.class_weight[0, 1]:.2f} (recall 0.53)"


def test_prior_is_what_training_was_fed():
    target, fed = module(), torch.tensor([[900, 100]])
    bound(target).apply(report(train_counts=fed))
    weight = target.criterion.class_weight.double()
    assert float((fed[0] / 1000 * weight).sum()) == pytest.approx(1, abs=1e-6)
    assert float(weight[1] / weight[0]) == pytest.approx(math.exp(0.8), rel=1e-6)


@pytest.mark.parametrize("fed", [None, torch.zeros(1, 2, dtype=torch.int64)])
def test_prior_is_that_of_validation_before_training(fed):
    target = module()
    bound(target).apply(report(torch.tensor([[[270, 30], [50, 50]]]), train_counts=fed))
    weight = target.criterion.class_weight.double()
    assert float(0.75 * weight[0] + 0.25 * weight[1]) == pytest.approx(1, abs=1e-6)


def test_classes_are_counted_over_all_groups():
    target, other = module(), module()
    bound(target).apply(report(BY_GROUP, train_counts=torch.tensor([[90, 5], [5, 20]])))
    bound(other).apply(report(BY_GROUP.sum(0, keepdim=True), train_counts=torch.tensor([[95, 25]])))
    assert torch.equal(target.criterion.class_weight, other.criterion.class_weight)


def test_cells_without_support_keep_one():
    target = module(num_groups=3)
    counts = torch.cat([BY_GROUP, torch.zeros(1, 2, 2, dtype=torch.int64)])
    bound(target, by="group").apply(report(counts, group_names=(*GROUPS, "nowhere")))
    assert target.criterion.class_weight[2].tolist() == [1.0, 1.0]
    assert target.criterion.class_weight[0].tolist() != [1.0, 1.0]


def test_groups_that_validation_has_not_shown_keep_one():
    target, small = module(num_groups=3), module(num_groups=2)
    bound(target, by="group").apply(report(BY_GROUP))
    bound(small, by="group").apply(report(BY_GROUP))
    assert torch.equal(target.criterion.class_weight[:2], small.criterion.class_weight)
    assert target.criterion.class_weight[2].tolist() == [1.0, 1.0]


def test_buffer_is_written_in_place():
    target = module()
    before, pointer = target.criterion.class_weight, target.criterion.class_weight.data_ptr()
    feedback = bound(target)
    feedback.apply(report())
    feedback.load_state_dict(feedback.state_dict())
    assert target.criterion.class_weight is before
    assert before.data_ptr() == pointer
    assert before.tolist() != [1.0, 1.0]


def test_moved_loss_is_still_found():
    target = module()
    feedback = bound(target)
    target.double()  # like a move to another device: nn.Module replaces its buffers
    feedback.apply(report())
    assert target.criterion.class_weight.tolist() == pytest.approx([0.6200510, 1.3799490], abs=1e-7)


def test_training_goes_on_after_weights_changed_in_inference_mode():
    """Lightning calls validation hooks in inference mode; the next step differentiates through the buffer."""
    target = module()
    feedback = bound(target)
    with torch.inference_mode():
        feedback.apply(report(BY_CLASS.clone()))
        state = feedback.state_dict()
    assert not target.criterion.class_weight.is_inference()
    target.criterion(target.layer(torch.ones(4, 3)), torch.tensor([0, 1, 1, 0])).backward()
    assert target.layer.weight.grad.abs().sum() > 0
    other = module()
    twin = bound(other)
    twin.load_state_dict(state)
    assert torch.equal(other.criterion.class_weight, target.criterion.class_weight)


def test_compiled_step_sees_new_weights_without_compiling_again():
    from torch._dynamo.testing import CompileCounter

    target, counter = module(), CompileCounter()
    compiled = torch.compile(lambda x, y: target.criterion(x, y), backend=counter)
    logits, labels = torch.zeros(2, 2), torch.tensor([1, 1])
    first = compiled(logits, labels)
    bound(target).apply(report())
    second = compiled(logits, labels)
    assert counter.frame_count == 1
    assert float(second / first) == pytest.approx(1.3799490)


@pytest.mark.parametrize(("by", "groups"), [("class", 1), ("group", 2)])
@pytest.mark.parametrize("bind_first", [True, False])
def test_resumed_run_equals_an_unbroken_one_bitwise(by, groups, bind_first):
    sizes = {"num_groups": groups} if by == "group" else {}
    straight = module(**sizes)
    whole = bound(straight, by=by, warm_up=1)
    told = [whole.apply(noisy(seed, groups)) for seed in range(8)]

    broken = module(**sizes)
    first = bound(broken, by=by, warm_up=1)
    for seed in range(4):
        first.apply(noisy(seed, groups))

    resumed = module(**sizes)
    second = ClassReweighting(by=by, warm_up=1)
    for action in (second.bind, None) if bind_first else (None, second.bind):
        second.load_state_dict(saved(first)) if action is None else action(resumed)
    assert torch.equal(resumed.criterion.class_weight, broken.criterion.class_weight)
    assert [second.apply(noisy(seed, groups)) for seed in range(4, 8)] == told[4:]
    assert torch.equal(resumed.criterion.class_weight, straight.criterion.class_weight)
    assert {name: str(value) for name, value in second.state_dict().items()} == {
        name: str(value) for name, value in whole.state_dict().items()
    }


def test_loading_twice_changes_nothing_more():
    target = module()
    feedback = bound(target)
    feedback.apply(report())
    state, other = saved(feedback), module()
    twin = bound(other)
    twin.load_state_dict(state)
    twin.load_state_dict(state)
    assert twin.apply(noisy(1)) == feedback.apply(noisy(1))


def test_state_of_the_unbound_loads_again():
    feedback = ClassReweighting()
    feedback.load_state_dict(saved(feedback))
    feedback.load_state_dict({})
    target = module()
    feedback.bind(target)
    assert feedback.apply(report())


def test_state_is_complete_and_plain():
    target = module(num_groups=2)
    feedback = bound(target, by="group")
    feedback.apply(report(BY_GROUP))
    state = saved(feedback)
    assert state["updates"] == 1
    assert state["log_weight"].dtype == state["average"].dtype == torch.float64
    assert state["log_weight"].shape == state["average"].shape == (2, 2)
    torch.testing.assert_close(state["average"], report(BY_GROUP).cell_recall)


def test_same_module_keeps_its_weights_and_another_starts_anew():
    target, other = module(), module()
    feedback = bound(target)
    feedback.apply(report())
    weight = target.criterion.class_weight.clone()
    feedback.bind(target)
    assert torch.equal(target.criterion.class_weight, weight)
    feedback.bind(other)
    assert other.criterion.class_weight.tolist() == [1.0, 1.0]
    assert feedback.state_dict()["updates"] == 0


def test_module_is_let_go_after_its_run_and_the_next_starts_anew():
    target, other = module(), module()
    feedback, reference = bound(target), weakref.ref(target)
    feedback.apply(report())
    del target
    gc.collect()
    assert reference() is None
    assert feedback.state_dict()["log_weight"].tolist() != [0.0, 0.0]  # what was learned can still be saved
    with pytest.raises(ValueError, match=r"no loss to change. Call `bind\(module\)` first and keep the module"):
        feedback.apply(report())
    feedback.bind(other)
    assert other.criterion.class_weight.tolist() == [1.0, 1.0]
    assert feedback.state_dict()["updates"] == 0


def test_state_loaded_for_another_module_wins_over_the_last_run():
    first, second = module(), module()
    feedback, source = bound(first), bound(second)
    source.apply(report())
    expected, resumed = second.criterion.class_weight.clone(), module()
    feedback.apply(noisy(3))
    feedback.bind(resumed)
    feedback.load_state_dict(saved(source))
    assert torch.equal(resumed.criterion.class_weight, expected)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda feedback: pickle.loads(pickle.dumps(feedback))])
def test_copy_lets_go_of_the_module_and_keeps_the_state(twin):
    target, other = module(), module()
    feedback = bound(target)
    feedback.apply(report())
    copied = twin(feedback)
    copied.bind(other)
    assert torch.equal(other.criterion.class_weight, target.criterion.class_weight)
    copied.apply(noisy(3))
    assert not torch.equal(other.criterion.class_weight, target.criterion.class_weight)


def test_warm_up_waits_and_then_moves():
    target = module()
    feedback = bound(target, warm_up=2)
    assert feedback.apply(report()) == ()
    assert feedback.apply(report()) == ()
    assert target.criterion.class_weight.tolist() == [1.0, 1.0]
    assert len(feedback.apply(report())) == 2


def test_nothing_is_said_when_nothing_changes():
    target = module()
    feedback = bound(target)
    assert feedback.apply(report(torch.tensor([[[80, 20], [20, 80]]]))) == ()
    assert feedback.apply(report(torch.zeros(1, 2, 2, dtype=torch.int64))) == ()


def test_empty_validation_leaves_the_weights_alone():
    target = module()
    feedback = bound(target)
    feedback.apply(report())
    weight = target.criterion.class_weight.clone()
    assert feedback.apply(report(torch.zeros(1, 2, 2, dtype=torch.int64))) == ()
    assert torch.equal(target.criterion.class_weight, weight)


def test_starts_from_the_weights_of_the_loss():
    target = module(weight=[1.0, 3.0])
    feedback = bound(target)
    assert target.criterion.class_weight.tolist() == [1.0, 3.0]
    feedback.apply(report(torch.tensor([[[80, 20], [20, 80]]])))
    assert target.criterion.class_weight.tolist() == [0.5, 1.5]  # the expected weight becomes 1, the ratio stays


def test_many_changes_are_cut_to_the_largest():
    target = Module(WeightedCrossEntropyLoss(20))
    counts = torch.diag(torch.arange(5, 105, 5)).unsqueeze(0)
    counts[0, :, 0] += 105 - torch.arange(5, 105, 5)
    sentences = bound(target).apply(BiasReport(0, 0, counts, tuple(f"c{i}" for i in range(20))))
    assert len(sentences) == 13
    assert sentences[0].startswith(("c0:", "c1:", "c19:"))
    assert sentences[-1].endswith("other weights changed less")


def test_finds_a_loss_inside_another_and_a_compiled_one():
    nested = Module(nn.ModuleDict({"main": WeightedCrossEntropyLoss(2), "extra": nn.MSELoss()}))
    for target in (nested, Module(torch.compile(WeightedCrossEntropyLoss(2), backend="eager"))):
        bound(target).apply(report())
        (table,) = (buffer for name, buffer in target.named_buffers() if name.endswith("class_weight"))
        assert table.tolist() == pytest.approx([0.6200510, 1.3799490])
    outer = nn.Module()
    outer.model = module()
    bound(outer, "model.criterion").apply(report())
    assert outer.model.criterion.class_weight.tolist() == pytest.approx([0.6200510, 1.3799490])


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (nn.Module(), {}, r"at `criterion` of Module, got no such attribute. Create one in `__init__`"),
        (module(), {"criterion": "loss"}, r"got no such attribute. Pass `criterion=` one of .*: 'criterion'"),
        (module(), {"criterion": "criterion.reduction"}, "got a str"),
        (Module(nn.CrossEntropyLoss()), {}, "got CrossEntropyLoss without one. Create one"),
        (
            Module(nn.ModuleList([WeightedCrossEntropyLoss(2), WeightedCrossEntropyLoss(2)])),
            {},
            "Expected one loss .* got 2: pass one of 'criterion.0', 'criterion.1'",
        ),
        (module(), {"by": "group"}, r"by='group' needs .* of shape \(groups, classes\), got \(2,\): build the loss"),
        (module(num_groups=2), {"by": "class"}, r"by='class' needs .* \(classes,\), got \(2, 2\): pass by='group'"),
        (module(weight=[0.0, 1.0]), {}, r"must be positive and finite to start from, got \[0.0, 1.0\]"),
    ],
)
def test_bind_refuses_what_it_cannot_change(target, arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassReweighting(**arguments).bind(target)


def test_apply_refuses_a_report_that_does_not_fit():
    plain, one, two = module(), module(num_groups=1), module(num_groups=2)
    with pytest.raises(ValueError, match=r"has shape \(2,\), but the report counts \(3,\)"):
        bound(plain).apply(BiasReport(0, 0, torch.ones(1, 3, 3), ("a", "b", "c")))
    with pytest.raises(ValueError, match="by='group' needs groups in the report, got none"):
        bound(two, by="group").apply(report())
    with pytest.raises(ValueError, match=r"has shape \(1, 2\), but the report counts \(2, 2\)"):
        bound(one, by="group").apply(report(BY_GROUP))
    with pytest.raises(ValueError, match="Call `bind"):
        ClassReweighting().apply(report())


@pytest.mark.parametrize("bind_first", [True, False])
def test_state_of_another_shape_is_refused(bind_first):
    state = bound(module(num_groups=2), by="group").state_dict()
    feedback, target = ClassReweighting(), module()
    with pytest.raises(ValueError, match=r"saved weights have shape \(2, 2\), but .* has \(2,\). Resume with"):  # noqa: PT012
        if bind_first:
            feedback.bind(target)
        feedback.load_state_dict(state)
        feedback.bind(target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "sample"}, "`by` must be one of 'class', 'group', got 'sample'"),
        ({"warm_up": -1}, "`warm_up` must be at least 0, got -1"),
        ({"limit": 0.5}, "`limit` must be above 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassReweighting(**arguments)


@pytest.mark.parametrize("name", ["step_size", "smoothing", "limit", "dead_band"])
def test_arguments_that_are_no_number_are_refused(name):
    with pytest.raises(TypeError, match=f"`{name}` must be a number, got 'a'"):
        ClassReweighting(**{name: "a"})


def test_answers_and_repr():
    assert ClassReweighting().answers == {"class"}
    assert ClassReweighting(by="group").answers == {"class", "group"}
    feedback = ClassReweighting("model.loss", "group", step_size=4.0, warm_up=1)
    assert repr(eval(repr(feedback))) == repr(feedback)
    assert isinstance(feedback, Feedback)


def test_feedback_needs_apply():
    with pytest.raises(TypeError, match="abstract"):
        Feedback()


def test_steered_weights_leave_the_state_dict_and_all_else_stays():
    steered, fresh = Module(LogitAdjustedLoss([90, 10])), Module(LogitAdjustedLoss([50, 50]))
    bound(steered)
    assert "criterion.class_weight" not in steered.state_dict()
    with pytest.warns(UserWarning, match=r"lacks state of LogitAdjustedLoss \(criterion.class_weight\)"):
        fresh.load_state_dict(steered.state_dict(), strict=True)
    torch.testing.assert_close(fresh.criterion.adjustment, steered.criterion.adjustment)


class Own(nn.Module):
    """A loss that is not ours: it is told by its buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("class_weight", torch.ones(2))


@pytest.mark.parametrize("criterion", [lambda: WeightedCrossEntropyLoss(2), Own])
def test_state_from_before_it_was_bound_still_loads(criterion):
    target = Module(criterion())
    before = copy.deepcopy(target.state_dict())
    bound(target)
    target.load_state_dict(before, strict=True)


def test_a_loss_that_knows_nothing_of_it_keeps_its_weights_in_the_state_dict():
    steered, fresh = Module(Own()), Module(Own())
    bound(steered)
    fresh.load_state_dict(steered.state_dict(), strict=True)

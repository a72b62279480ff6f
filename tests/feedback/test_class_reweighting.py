"""Class reweighting: what it writes where, what it remembers, what it refuses."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback import ClassReweighting, Feedback
from attn_callbacks.feedback._f1 import f1_rates
from attn_callbacks.feedback.automatic import automatic_feedback
from attn_callbacks.feedback.controller import ControllerState, f1_step
from losses import LogitAdjustedLoss, WeightedCrossEntropyLoss, effective_number_weights
from tests.feedback.checkpoint import saved

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


def texts(actions):
    return tuple(map(str, actions))


@functools.cache
def noisy(seed, groups=1):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 200, (groups, 2, 2), generator=generator)
    return report(counts, train_counts=torch.randint(1, 50, (groups, 2), generator=generator))


def test_weights_follow_the_recalls():
    target = module()
    actions = bound(target).apply(report())
    torch.testing.assert_close(target.criterion.class_weight, torch.tensor([0.6200510, 1.3799490]))
    assert texts(actions) == (
        "negative: weight 1.00 -> 0.62 (recall 0.90)",
        "positive: weight 1.00 -> 1.38 (recall 0.50)",
    )
    assert [action.old for action in actions] == [1.0, 1.0]
    assert [action.new for action in actions] == pytest.approx([0.6200510, 1.3799490])


def test_action_names_the_finding_that_it_answers():
    target, other = module(), module()
    lower, raised = bound(target).apply(report())
    assert report().findings[0].key == ("class", "positive")
    assert (lower.finding, raised.finding) == (None, ("class", "positive"))
    few = report(torch.tensor([[[36, 4], [26, 14]]]), min_support=50)
    assert not few.findings
    assert [action.finding for action in bound(other).apply(few)] == [None, None]


def test_action_on_a_cell_names_the_finding_of_the_cell_or_of_its_group():
    single = torch.tensor([[[90, 10], [0, 0]], [[0, 0], [50, 50]]])  # of one class each: the cell is the group
    for counts, where, key in (
        (BY_GROUP, "Amazon, positive", ("group", "Amazon, positive")),
        (single, "Tweets, positive", ("group", "Tweets")),
    ):
        target, told = module(num_groups=2), report(counts)
        assert key in {finding.key for finding in told.findings}
        named = {str(action).split(":")[0]: action.finding for action in bound(target, by="group").apply(told)}
        assert named.pop(where) == key
        assert set(named.values()) <= {None, ("class", "positive")}


def test_sentences_name_the_average_that_the_weights_follow():
    target = module()
    feedback = bound(target)
    feedback.apply(report())
    # averages 0.9 - 0.15 / 0.85 * 0.5 and 0.5 + 0.15 / 0.85 * 0.85: deviations of 0.09, now of 0.065
    later = report(torch.tensor([[[85, 15], [28, 72]]]))
    actions = feedback.apply(later)
    negative, positive = texts(actions)
    assert [action.finding for action in actions] == [None, ("class", "positive")]
    assert negative.endswith("(recall 0.85, average 0.87)")
    assert positive.endswith("(recall 0.72, average 0.63)")
    assert math.exp(0.53) / math.cosh(0.53) == pytest.approx(1.49, abs=0.005)  # 0.4 of the first step, 0.13 of this one
    assert positive.startswith("positive: weight 1.38 -> 1.49 ")


def test_a_weight_does_not_follow_its_average_against_the_last_recall():
    target = module()
    feedback = bound(target)
    feedback.apply(report(torch.tensor([[[100, 0], [100, 0]]])))
    before = target.criterion.class_weight.clone()
    assert feedback.apply(report(torch.tensor([[[90, 10], [8, 92]]]))) == ()
    torch.testing.assert_close(target.criterion.class_weight, before)


@pytest.mark.parametrize("policy", ["recall", "f1"])
def test_how_far_averages_have_settled_is_saved(policy):
    target, other = module(), module()
    feedback, resumed = bound(target, policy=policy), ClassReweighting(policy=policy)
    feedback.apply(report())
    resumed.load_state_dict(saved(feedback.state_dict()))
    resumed.bind(other)
    for later in (report(torch.tensor([[[80, 20], [40, 60]]])), report(torch.tensor([[[70, 30], [45, 55]]]))):
        assert texts(feedback.apply(later)) == texts(resumed.apply(later))
        assert torch.equal(target.criterion.class_weight, other.criterion.class_weight)
    assert feedback.state_dict()["settled"].tolist() == pytest.approx([1 - 0.7**3] * 2)


def test_sentences_say_when_a_recall_was_not_measured():
    target = Module(WeightedCrossEntropyLoss(3))
    feedback = bound(target, smoothing=0.0)
    names = ("a", "b", "c")
    feedback.apply(BiasReport(0, 0, torch.tensor([[[90, 10, 0], [50, 50, 0], [30, 0, 70]]]), names))
    told = texts(feedback.apply(BiasReport(0, 0, torch.tensor([[[900, 100, 0], [50, 50, 0], [0, 0, 0]]]), names)))
    assert next(line for line in told if line.startswith("c:")).endswith("(recall not measured, average 0.70)")
    assert next(line for line in told if line.startswith("b:")).endswith("(recall 0.50)")


def test_weights_follow_the_cells():
    target = module(num_groups=2)
    sentences = texts(bound(target, by="group", dead_band=0.0, smoothing=0.0).apply(report(BY_GROUP)))
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
        second.load_state_dict(saved(first.state_dict())) if action is None else action(resumed)
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
    state, other = saved(feedback.state_dict()), module()
    twin = bound(other)
    twin.load_state_dict(state)
    twin.load_state_dict(state)
    assert twin.apply(noisy(1)) == feedback.apply(noisy(1))


def test_state_of_the_unbound_loads_again():
    feedback = ClassReweighting()
    feedback.load_state_dict(saved(feedback.state_dict()))
    feedback.load_state_dict({})
    target = module()
    feedback.bind(target)
    assert feedback.apply(report())


def test_state_is_complete_and_plain():
    target = module(num_groups=2)
    feedback = bound(target, by="group")
    feedback.apply(report(BY_GROUP))
    state = saved(feedback.state_dict())
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
    fresh, feed = module(), report(torch.tensor([[[60, 40], [20, 80]]]))
    expected = bound(fresh).apply(feed)
    assert feedback.apply(feed) == expected  # nothing is left of the averages


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
    fresh, feed = module(), report(torch.tensor([[[60, 40], [20, 80]]]))
    expected = bound(fresh).apply(feed)
    assert feedback.apply(feed) == expected  # nothing is left of the averages


def test_state_loaded_for_another_module_wins_over_the_last_run():
    first, second = module(), module()
    feedback, source = bound(first), bound(second)
    source.apply(report())
    expected, resumed = second.criterion.class_weight.clone(), module()
    feedback.apply(noisy(3))
    feedback.bind(resumed)
    feedback.load_state_dict(saved(source.state_dict()))
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
    sentences = texts(bound(target).apply(BiasReport(0, 0, counts, tuple(f"c{i}" for i in range(20)))))
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


@pytest.mark.parametrize(
    ("act", "buffer"), [("auto", "adjustment"), ("margin", "adjustment"), ("weight", "class_weight")]
)
def test_steered_table_leaves_the_state_dict_and_all_else_stays(act, buffer):
    steered, fresh = Module(LogitAdjustedLoss([90, 10])), Module(LogitAdjustedLoss([50, 50]))
    bound(steered, act=act)
    (other,) = {"adjustment", "class_weight"} - {buffer}
    assert f"criterion.{buffer}" not in steered.state_dict()
    with pytest.warns(UserWarning, match=rf"lacks state of LogitAdjustedLoss \(criterion.{buffer}\)"):
        fresh.load_state_dict(steered.state_dict(), strict=True)
    torch.testing.assert_close(getattr(fresh.criterion, other), getattr(steered.criterion, other))


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


# --- as margin ---------------------------------------------------------------------------------------------------


def margins(counts=(90, 10), **arguments):
    return Module(LogitAdjustedLoss(list(counts), **arguments))


def test_margin_is_subtracted_from_the_shift_of_the_loss():
    target = margins()
    start = target.criterion.adjustment.clone()
    lower, raised = bound(target).apply(report())
    # the weights would be 0.62 and 1.38
    expected = start - torch.tensor([0.6200510, 1.3799490]).log()
    torch.testing.assert_close(target.criterion.adjustment, expected)
    assert target.criterion.class_weight.tolist() == [1.0, 1.0]
    assert expected[1] < start[1]  # the class that is missed is made harder in training
    assert {str(lower), str(raised)} == {
        f"negative: shift -0.11 -> {expected[0]:.2f} (recall 0.90)",
        f"positive: shift -2.30 -> {expected[1]:.2f} (recall 0.50)",
    }
    named = {action.text.split(":")[0]: action.finding for action in (lower, raised)}
    assert named == {"negative": None, "positive": ("class", "positive")}


def test_margins_do_not_add_up_over_reports():
    target, weights = margins(tau=0.0), module()
    feedback, twin = bound(target), bound(weights)
    for seed in range(5):
        feedback.apply(noisy(seed))
        twin.apply(noisy(seed))
    torch.testing.assert_close(target.criterion.adjustment, -weights.criterion.class_weight.log())
    assert torch.equal(feedback.weights.float(), weights.criterion.class_weight)


def test_act_chooses_the_table():
    for act, moved, kept in (("auto", "adjustment", "class_weight"), ("weight", "class_weight", "adjustment")):
        target = margins()
        before = copy.deepcopy(target.criterion)
        bound(target, act=act).apply(report())
        assert torch.equal(getattr(target.criterion, kept), getattr(before, kept))
        assert not torch.equal(getattr(target.criterion, moved), getattr(before, moved))
    with pytest.raises(ValueError, match=r"Expected a loss with a buffer `adjustment` at .*LogitAdjustedLoss\("):
        ClassReweighting(act="margin").bind(module())
    grouped = Module(nn.ModuleDict({"a": WeightedCrossEntropyLoss(2, num_groups=2), "b": nn.Module()}))
    grouped.criterion["b"].register_buffer("adjustment", torch.zeros(2))
    bound(grouped, by="group").apply(report(BY_GROUP))
    assert grouped.criterion["a"].class_weight.std() > 0


def test_a_shift_that_is_not_finite_is_refused():
    target = margins()
    target.criterion.adjustment[1] = -math.inf
    with pytest.raises(ValueError, match=r"`criterion\.adjustment` must be finite to start from, got"):
        ClassReweighting().bind(target)


@pytest.mark.parametrize("bind_first", [True, False])
def test_state_of_the_other_table_is_refused(bind_first):
    state = bound(margins(), act="margin").state_dict()
    feedback, target = ClassReweighting(act="weight"), margins()
    with pytest.raises(ValueError, match="state is of `adjustment`, but `class_weight` is steered now"):  # noqa: PT012
        if bind_first:
            feedback.bind(target)
        feedback.load_state_dict(state)
        feedback.bind(target)


# --- as margin by group ------------------------------------------------------------------------------------------


def tables(**arguments):
    return Module(LogitAdjustedLoss([[100, 30], [30, 100], [0, 0]], **arguments))


@pytest.mark.parametrize("act", ["auto", "margin"])
def test_margins_of_cells_are_subtracted_from_the_shifts_and_centred_in_each_group(act):
    target = tables()
    start = target.criterion.adjustment.clone()
    actions = bound(target, by="group", act=act, dead_band=0.0, smoothing=0.0).apply(report(BY_GROUP))
    recall = torch.tensor([[0.95, 16 / 30], [25 / 30, 0.92]], dtype=torch.float64)
    raw = 2 * (recall.mean() - recall)
    raw[1, 0] = 0.0  # 0.02 from the mean of 0.81, standard error 0.07
    expected = start.double()
    raw -= raw.mean(dim=1, keepdim=True)
    now = 2 * (
        recall.mean(dim=1, keepdim=True) - recall
    )  # of Tweets the smaller: there is more to it than the one cell
    expected[:2] -= torch.minimum(raw.abs(), now.abs()) * raw.sign()
    torch.testing.assert_close(target.criterion.adjustment, expected.float())
    assert torch.equal(target.criterion.adjustment[2], start[2])  # validation has not shown it
    assert target.criterion.class_weight.tolist() == [1.0, 1.0]
    assert str(actions[0]).startswith("Amazon, ")
    named = {str(action).split(":")[0]: action.finding for action in actions}
    assert named["Amazon, positive"] == ("group", "Amazon, positive")
    logits = torch.zeros(2, 2, requires_grad=True)
    target.criterion(logits, torch.tensor([1, 0]), group=torch.tensor([0, 2])).backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("policy", ["difficulty", "effective_number"])
def test_published_rules_by_group_are_those_of_each_group(policy):
    target, fed = tables(tau=0.0), torch.tensor([[9000, 3000], [8, 24]])  # far apart: a bound on all would cut
    bound(target, by="group", policy=policy, beta=1.0, smoothing=0.0, limit=4.0).apply(
        report(BY_GROUP, train_counts=fed)
    )
    recall = torch.tensor([[0.95, 16 / 30], [25 / 30, 0.92]])
    raw = (1 - recall).log() if policy == "difficulty" else -fed.float().log()
    torch.testing.assert_close(target.criterion.adjustment[:2], raw.mean(dim=1, keepdim=True) - raw)
    assert target.criterion.adjustment[2].tolist() == [0.0, 0.0]


def test_margins_by_group_resume_bitwise():
    straight, broken, resumed = tables(), tables(), tables()
    whole, first, second = (bound(target, by="group") for target in (straight, broken, resumed))
    told = [whole.apply(noisy(seed, 2)) for seed in range(6)]
    for seed in range(3):
        first.apply(noisy(seed, 2))
    second.load_state_dict(saved(first.state_dict()))
    assert [second.apply(noisy(seed, 2)) for seed in range(3, 6)] == told[3:]
    assert torch.equal(resumed.criterion.adjustment, straight.criterion.adjustment)
    start = tables().criterion.adjustment
    assert not torch.equal(straight.criterion.adjustment, start)
    whole.withdraw()
    assert torch.equal(straight.criterion.adjustment, start)


def test_axes_of_the_shift_have_to_fit():
    with pytest.raises(ValueError, match=r"by='class' needs `criterion.adjustment` of shape \(classes,\), got \(3"):
        ClassReweighting().bind(tables())
    for act in ("auto", "margin"):
        with pytest.raises(ValueError, match=r"by='group' needs `criterion.adjustment` of shape \(groups, classes"):
            ClassReweighting(by="group", act=act).bind(margins())
    with pytest.raises(ValueError, match=r"by='group' needs `criterion.class_weight` of shape \(groups, classes\)"):
        ClassReweighting(by="group", act="weight").bind(tables())


def test_automatic_feedback_takes_the_axes_of_the_table():
    found = nn.ModuleDict({"a": tables(), "b": margins(), "c": module(num_groups=2), "d": module()})
    chosen = [part for part in automatic_feedback(found) if isinstance(part, ClassReweighting)]
    assert [(part.criterion, part.by, part.act) for part in chosen] == [
        ("a.criterion", "group", "margin"),
        ("b.criterion", "class", "margin"),
        ("c.criterion", "group", "auto"),
        ("d.criterion", "class", "auto"),
    ]
    for part in chosen:
        part.bind(found)


# --- by F1 -------------------------------------------------------------------------------------------------------


def test_f1_follows_the_mixture_that_training_was_fed():
    target, state = margins(tau=0.0), ControllerState((0.0, 0.0), (math.nan, math.nan))
    feedback = bound(target, policy="f1")
    counts = torch.tensor([[[60, 2], [30, 8]], [[39, 1], [30, 32]]])  # by group: together 99, 3 and 60, 40
    for fed in ([900, 100], [800, 200]):
        share = [number / 1000 for number in fed]
        told = feedback.apply(report(counts, train_counts=torch.tensor([fed, [0, 0]])))
        state = f1_step(state, f1_rates([[99, 3], [60, 40]], share), [102, 100], share, feedback.settings)
        torch.testing.assert_close(feedback.weights, torch.tensor(state.weight, dtype=torch.float64))
    torch.testing.assert_close(target.criterion.adjustment, -feedback.weights.log().float())
    assert feedback.weights[1] > 1
    assert any(str(action).startswith("positive: shift ") and "(F1 0.5" in str(action) for action in told)
    assert all(", recall 0." in str(action) and ", precision 0." in str(action) for action in told)


def test_f1_without_training_counts_is_that_of_the_report():
    target = margins(tau=0.0)
    feedback, told = bound(target, policy="f1"), report(torch.tensor([[[90, 10], [50, 50]]]))
    feedback.apply(told)
    torch.testing.assert_close(feedback.state_dict()["average"], told.f1)


def test_f1_resumes_bitwise_and_takes_no_averages_of_recall():
    straight, broken, resumed, others, last = (margins() for _ in range(5))
    whole, second = bound(straight, policy="f1"), ClassReweighting(policy="f1")
    told = [whole.apply(noisy(seed)) for seed in range(9)]
    first = bound(broken, policy="f1")
    for seed in range(6):
        first.apply(noisy(seed))
    second.load_state_dict(saved(first.state_dict()))
    second.bind(resumed)
    assert [second.apply(noisy(seed)) for seed in range(6, 9)] == told[6:]
    assert any(told[6:])
    assert torch.equal(resumed.criterion.adjustment, straight.criterion.adjustment)
    other = bound(others)
    other.load_state_dict(saved(first.state_dict()))
    assert torch.equal(other.weights, first.weights)
    assert "average" not in other.state_dict()
    other.apply(report())
    torch.testing.assert_close(other.state_dict()["average"], report().recall)
    back = bound(last, policy="f1")
    back.load_state_dict(saved(other.state_dict()))
    assert "average" not in back.state_dict()
    whole.bind(margins())
    assert "excess" not in whole.state_dict()


def test_f1_is_of_classes():
    with pytest.raises(ValueError, match="policy='f1' needs by='class': F1 is that of a class over all groups"):
        ClassReweighting(by="group", policy="f1")


def imbalanced(seed):
    """Rare class against a frequent one, in more dimensions than there are rare samples: a net fits all of it."""
    generator = torch.Generator().manual_seed(seed)

    def draw(frequent, rare):
        target = torch.cat([torch.zeros(frequent), torch.ones(rare)]).long()
        inputs = torch.randn(frequent + rare, 20, generator=generator)
        inputs[:, 0] += 2.0 * target
        return inputs, target

    return draw(200, 10), draw(300, 300), draw(2000, 2000)


def confusion(layer, data):
    with torch.no_grad():
        predicted = layer(data[0]).argmax(dim=1)  # plain logits
    return torch.zeros(1, 2, 2, dtype=torch.int64).index_put_(
        (torch.zeros_like(predicted), data[1], predicted), torch.tensor(1), accumulate=True
    )


def recall_of_the_worst(seed, **arguments):
    torch.manual_seed(seed)
    train, monitor, test = imbalanced(seed)
    target = nn.Module()
    target.layer, target.criterion = nn.Linear(20, 2), LogitAdjustedLoss([200, 10], tau=0.0)
    feedback = bound(target, **arguments) if arguments else None
    optimizer = torch.optim.AdamW(target.layer.parameters(), 0.05)
    for epoch in range(8):
        for _ in range(10):
            optimizer.zero_grad()
            target.criterion(target.layer(train[0]), train[1]).backward()
            optimizer.step()
        if feedback is not None:
            fed = torch.tensor([[200, 10]]) * (epoch + 1)
            feedback.apply(BiasReport(epoch, 0, confusion(target.layer, monitor), CLASSES, train_counts=fed))
    counts = confusion(target.layer, test)[0]
    return float((counts.diagonal() / counts.sum(dim=1)).min())


@pytest.mark.parametrize("seed", [0, 1])
def test_margins_raise_the_worst_recall_above_weights_and_above_none(seed):
    plain = recall_of_the_worst(seed)
    weights, margin = (recall_of_the_worst(seed, act=act) for act in ("weight", "margin"))
    assert weights > plain + 0.1
    assert margin > weights + 0.02


# --- held, withdrawn ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: module(weight=[0.7, 1.9]), margins])
@pytest.mark.parametrize("stop", [lambda feedback: feedback.hold(True), lambda feedback: feedback.withdraw()])
def test_what_stops_gives_back_what_the_loss_had_and_goes_on_deciding(make, stop):
    target, other = make(), make()
    feedback, twin = bound(target), bound(other)
    name = "adjustment" if hasattr(target.criterion, "adjustment") else "class_weight"
    start = getattr(target.criterion, name).clone()
    told = [twin.apply(noisy(seed)) for seed in range(3)]
    feedback.apply(noisy(0))
    assert not torch.equal(getattr(target.criterion, name), start)
    stop(feedback)
    assert torch.equal(getattr(target.criterion, name), start)
    assert [feedback.apply(noisy(seed)) for seed in (1, 2)] == told[1:]  # what it would have done
    assert torch.equal(getattr(target.criterion, name), start)
    assert torch.equal(feedback.weights, twin.weights)
    feedback.hold(False)
    expected = start if feedback.withdrawn else getattr(other.criterion, name)
    assert torch.equal(getattr(target.criterion, name), expected)


def test_dry_run_leaves_loss_and_checkpoint_to_others():
    target = module()
    feedback = ClassReweighting()
    feedback.hold(True)
    feedback.bind(target)
    assert "criterion.class_weight" in target.state_dict()
    target.criterion.set_class_weight([0.5, 2.0])  # a schedule of the user's own
    assert len(feedback.apply(report())) == 2
    feedback.bind(target)
    feedback.load_state_dict(saved(feedback.state_dict()))
    assert target.criterion.class_weight.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("bind_first", [True, False])
@pytest.mark.parametrize("criterion", [lambda: WeightedCrossEntropyLoss(2), lambda: LogitAdjustedLoss([9, 1]), Own])
def test_a_resumed_run_knows_what_was_withdrawn(bind_first, criterion):
    target, resumed = Module(criterion()), Module(criterion())
    start = copy.deepcopy(target.criterion.state_dict())
    feedback, second = bound(target), ClassReweighting()
    feedback.apply(report())
    feedback.withdraw()
    if bind_first:
        second.bind(resumed)
    second.load_state_dict(saved(feedback.state_dict()))
    second.bind(resumed)
    assert second.withdrawn
    second.apply(noisy(1))
    for name, value in start.items():
        assert torch.equal(resumed.criterion.get_buffer(name), value)


@pytest.mark.parametrize("bind_first", [True, False])
def test_run_resumed_as_a_dry_run_gets_back_what_the_loss_had(bind_first):
    """A loss that is not ours keeps the steered table in the checkpoint of the module."""
    target, resumed = Module(Own()), Module(Own())
    feedback = bound(target)
    feedback.apply(report())
    second = ClassReweighting()
    second.hold(True)
    if bind_first:
        second.bind(resumed)
    resumed.load_state_dict(target.state_dict())
    assert resumed.criterion.class_weight.tolist() != [1.0, 1.0]
    second.load_state_dict(saved(feedback.state_dict()))
    second.bind(resumed)
    assert resumed.criterion.class_weight.tolist() == [1.0, 1.0]


def test_resumed_run_keeps_the_start_of_the_first_run():
    target, resumed = module(weight=[1.0, 3.0]), module(weight=[1.0, 3.0])
    feedback, second = bound(target), ClassReweighting()
    feedback.apply(report())
    second.load_state_dict(saved(feedback.state_dict()))
    second.bind(resumed)
    second.withdraw()
    assert resumed.criterion.class_weight.tolist() == [1.0, 3.0]


def test_table_is_left_alone_once_it_was_given_back():
    target = module()
    feedback = bound(target)
    feedback.apply(report())
    feedback.withdraw()
    target.criterion.set_class_weight([0.5, 2.0])  # a schedule of the user's own
    assert len(feedback.apply(noisy(1))) == 2
    assert target.criterion.class_weight.tolist() == [0.5, 2.0]


def test_another_module_gets_back_what_it_had_itself():
    target, other = module(), module(weight=[1.0, 3.0])
    feedback = bound(target)
    feedback.apply(report())
    feedback.bind(other)
    feedback.apply(report())
    feedback.withdraw()
    assert other.criterion.class_weight.tolist() == [1.0, 3.0]


def test_saved_start_wins_over_a_table_that_was_restored_steered():
    target, resumed = Module(Own()), Module(Own())
    feedback = bound(target)
    feedback.apply(report())
    resumed.load_state_dict(target.state_dict())
    second = bound(resumed)
    second.load_state_dict(saved(feedback.state_dict()))
    second.withdraw()
    assert resumed.criterion.class_weight.tolist() == [1.0, 1.0]


# --- policies ----------------------------------------------------------------------------------------------------


def test_difficulty_follows_the_averaged_recalls():
    target = module()
    feedback = bound(target, policy="difficulty", smoothing=0.5)
    feedback.apply(report())
    torch.testing.assert_close(target.criterion.class_weight, torch.tensor([0.1, 0.5]) / 0.3)
    feedback.apply(report(torch.tensor([[[60, 40], [50, 50]]])))  # averages 0.9 - 0.3 * 2 / 3 and 0.5
    torch.testing.assert_close(target.criterion.class_weight, torch.tensor([0.3, 0.5]) / 0.4)


def test_difficulty_has_no_memory_but_the_average():
    target, other = module(), module()
    first, second = (bound(each, policy="difficulty", smoothing=0.0, tau=2.0) for each in (target, other))
    first.apply(report())
    for feedback in (first, second):
        feedback.apply(noisy(1))
    torch.testing.assert_close(target.criterion.class_weight, other.criterion.class_weight)
    recall = noisy(1).recall
    assert float(feedback.weights[0] / feedback.weights[1]) == pytest.approx(
        float(((1 - recall[0]) / (1 - recall[1])) ** 2)
    )


def test_effective_number_counts_the_samples_of_one_epoch():
    target = module()
    feedback = bound(target, policy="effective_number", beta=0.99)
    for epoch in range(3):
        fed = torch.tensor([[900, 100]]) * (epoch + 1)
        actions = feedback.apply(BiasReport(epoch, 0, BY_CLASS, CLASSES, train_counts=fed))
        assert len(actions) == (2 if epoch == 0 else 0)
        expected = effective_number_weights([900, 100], 0.99)
        expected = expected / (expected * torch.tensor([0.9, 0.1])).sum()
        torch.testing.assert_close(target.criterion.class_weight, expected)


def test_effective_number_knows_nothing_without_training():
    target = module()
    feedback = bound(target, policy="effective_number")
    assert feedback.apply(report()) == ()
    assert target.criterion.class_weight.tolist() == [1.0, 1.0]
    (frequent, _) = feedback.apply(report(train_counts=torch.tensor([[9, 1]])))[::-1]
    assert str(frequent).endswith("samples an epoch)")


@pytest.mark.parametrize("policy", ["difficulty", "effective_number"])
def test_a_class_of_which_a_policy_knows_nothing_rests(policy):
    target = module(weight=[1.0, 3.0])
    feedback = bound(target, policy=policy)
    feedback.apply(report(torch.tensor([[[90, 10], [0, 0]]]), train_counts=torch.tensor([[9, 0]])))
    assert target.criterion.class_weight.tolist() == [1.0, 3.0]


def test_deferred_waits_for_its_reports():
    target, fed = module(), torch.tensor([[90, 10]])
    feedback = bound(target, policy="deferred", warm_up=2, beta=1.0)
    for _ in range(2):
        assert feedback.apply(report(train_counts=fed)) == ()
        assert target.criterion.class_weight.tolist() == [1.0, 1.0]
    feedback.apply(report(train_counts=fed))
    torch.testing.assert_close(target.criterion.class_weight, torch.tensor([0.5 / 0.9, 5.0]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"policy": "difficulty", "warm_up": 1},
        {"policy": "effective_number"},
        {"policy": "deferred", "warm_up": 5},
        {"act": "margin"},
    ],
)
@pytest.mark.parametrize("bind_first", [True, False])
def test_every_policy_resumes_bitwise(arguments, bind_first):
    straight, broken, resumed = margins(), margins(), margins()
    whole, first = bound(straight, **arguments), bound(broken, **arguments)
    told = [whole.apply(noisy(seed)) for seed in range(8)]
    for seed in range(4):
        first.apply(noisy(seed))
    second = ClassReweighting(**arguments)
    if bind_first:
        second.bind(resumed)
    second.load_state_dict(saved(first.state_dict()))
    second.bind(resumed)
    assert [second.apply(noisy(seed)) for seed in range(4, 8)] == told[4:]
    for name, value in straight.criterion.named_buffers():
        assert torch.equal(resumed.criterion.get_buffer(name), value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "recal"}, "`policy` must be one of 'recall', 'f1', 'difficulty', 'effective_number', 'deferred'"),
        ({"act": "both"}, "`act` must be one of 'auto', 'weight', 'margin'"),
        ({"policy": "deferred"}, "with warm_up=0: pass policy='effective_number'"),
        ({"policy": "effective_number", "warm_up": 1}, "or policy='deferred'"),
        ({"tau": -1.0}, "`tau` must lie between 0 and 10"),
        ({"beta": 1.5}, "`beta` must lie between 0 and 1"),
    ],
)
def test_policies_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassReweighting(**arguments)

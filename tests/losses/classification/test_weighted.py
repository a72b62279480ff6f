"""Weighted cross entropy against plain numpy, its edge cases, and its life inside a training loop."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from losses import WeightedCrossEntropyLoss, weighted_cross_entropy

GENERATOR = torch.Generator().manual_seed(7)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def reference(logits, target, table=None, sample_weight=None, ignore_index=-100):
    """One sample, one position at a time: the list of losses that count."""
    losses = []
    for n in range(logits.shape[0]):
        for position in np.ndindex(*logits.shape[2:]):
            label = int(target[(n, *position)])
            if label == ignore_index:
                continue
            scores = logits[(n, slice(None), *position)].astype(np.float64)
            probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            loss = -np.log(probabilities[label])
            loss *= 1.0 if table is None else table[n][label]
            losses.append(loss * (1.0 if sample_weight is None else sample_weight[n]))
    return losses


@pytest.mark.parametrize("positions", [(), (5,), (2, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_weights_it_is_cross_entropy(positions, reduction):
    logits, target = randn(6, 4, *positions), labels(4, 6, *positions)
    target[0] = -100
    expected = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(weighted_cross_entropy(logits, target, reduction=reduction), expected)


@pytest.mark.parametrize("positions", [(), (3,)])
def test_class_group_and_sample_weights_against_loops(positions):
    logits, target = randn(8, 4, *positions), labels(4, 8, *positions)
    target[1] = -100
    table, group, sample_weight = torch.rand(3, 4), labels(3, 8), torch.rand(8)
    expected = reference(logits.numpy(), target.numpy(), table[group].numpy(), sample_weight.numpy())
    arguments = {"class_weight": table, "group": group, "sample_weight": sample_weight}
    mean = weighted_cross_entropy(logits, target, **arguments)
    assert mean.item() == pytest.approx(np.mean(expected), rel=1e-5)
    total = weighted_cross_entropy(logits, target, reduction="sum", **arguments)
    assert total.item() == pytest.approx(np.sum(expected), rel=1e-5)


def test_class_weights_match_cross_entropy_without_its_mean():
    logits, target, weight = randn(5, 3), labels(3, 5), torch.tensor([0.2, 1.0, 4.0])
    expected = F.cross_entropy(logits, target, weight=weight, reduction="none")
    torch.testing.assert_close(weighted_cross_entropy(logits, target, class_weight=weight, reduction="none"), expected)
    torch.testing.assert_close(weighted_cross_entropy(logits, target, class_weight=weight), expected.mean())


@pytest.mark.parametrize("positions", [(), (3,)])
def test_soft_targets(positions):
    logits, target, weight = randn(5, 4, *positions), randn(5, 4, *positions).softmax(1), torch.rand(4)
    expected = F.cross_entropy(logits, target, weight=weight, reduction="none")
    given = weighted_cross_entropy(logits, target, class_weight=weight, reduction="none")
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(weighted_cross_entropy(logits, target, class_weight=weight), expected.mean())


def test_soft_targets_with_group_weights_equal_hard_ones():
    logits, target, table, group = randn(6, 3, 2), labels(3, 6, 2), torch.rand(2, 3), labels(2, 6)
    soft = F.one_hot(target, 3).movedim(-1, 1).float()
    hard_loss = weighted_cross_entropy(logits, target, class_weight=table, group=group)
    torch.testing.assert_close(weighted_cross_entropy(logits, soft, class_weight=table, group=group), hard_loss)


def test_soft_target_of_zero_on_a_ruled_out_class_is_finite():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.tensor([[1.0, 0.0, 0.0]]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_a_batch_of_one_keeps_its_weight():
    logits, target = randn(1, 2), torch.tensor([1])
    plain = weighted_cross_entropy(logits, target)
    weighted = weighted_cross_entropy(logits, target, class_weight=torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(weighted, 5 * plain)


def test_accumulated_gradients_equal_those_of_the_full_batch():
    data, target, group, table = randn(8, 5), labels(3, 8), labels(2, 8), torch.rand(2, 3) * 4
    full, parts = (nn.Linear(5, 3) for _ in range(2))
    parts.load_state_dict(full.state_dict())
    weighted_cross_entropy(full(data), target, class_weight=table, group=group).backward()
    for piece in torch.arange(8).split(2):
        loss = weighted_cross_entropy(parts(data[piece]), target[piece], class_weight=table, group=group[piece])
        (loss / 4).backward()
    torch.testing.assert_close(parts.weight.grad, full.weight.grad)


@pytest.mark.parametrize("samples", [0, 3])
def test_nothing_counted_is_a_finite_zero_with_a_gradient(samples):
    logits = randn(samples, 4).requires_grad_()
    target = torch.full((samples,), -100)
    loss = weighted_cross_entropy(logits, target, class_weight=torch.rand(4))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.eq(0).all()


def test_a_class_index_can_be_ignored():
    logits, target = randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = F.cross_entropy(logits, target, ignore_index=1)
    torch.testing.assert_close(WeightedCrossEntropyLoss(3, ignore_index=1)(logits, target), expected)


def test_gradcheck():
    logits = randn(4, 3, 2).double().requires_grad_()
    target, group, table = labels(3, 4, 2), labels(2, 4), torch.rand(2, 3).double()
    target[0, 0] = -100
    assert torch.autograd.gradcheck(
        lambda z: weighted_cross_entropy(z, target, class_weight=table, group=group), (logits,)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    logits, target = (randn(4096, 3) * 3).to(dtype), labels(3, 4096)
    loss = weighted_cross_entropy(logits, target, class_weight=torch.rand(3).to(dtype), reduction="sum")
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)  # about 6000 nats: a float16 sum of larger batches would overflow
    mean = weighted_cross_entropy(logits, target)
    torch.testing.assert_close(mean, F.cross_entropy(logits.float(), target))


def test_autocast():
    layer, data, target = nn.Linear(8, 3), randn(16, 8), labels(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(data)
        loss = WeightedCrossEntropyLoss(3)(logits, target)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target))


def test_compiles_once_while_the_weights_change():
    counter = CompileCounter()
    criterion = WeightedCrossEntropyLoss(3, num_groups=2)
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    logits, target, group = randn(6, 3), labels(3, 6), labels(2, 6)
    for scale in (1.0, 2.0, 3.0):
        criterion.set_class_weight(torch.full((2, 3), scale))
        expected = scale * F.cross_entropy(logits, target)
        torch.testing.assert_close(compiled(logits, target, group=group), expected)
    assert counter.frame_count == 1


def test_weights_may_be_set_between_forward_and_backward():
    criterion, logits = WeightedCrossEntropyLoss(3), randn(4, 3).requires_grad_()
    loss = criterion(logits, labels(3, 4))
    with torch.inference_mode():  # where a validation hook runs
        criterion.set_class_weight(torch.tensor([1.0, 2.0, 3.0]))
    loss.backward()
    assert criterion.class_weight.tolist() == [1.0, 2.0, 3.0]


def test_setting_weights_keeps_the_buffer():
    criterion = WeightedCrossEntropyLoss(2, num_groups=3)
    address = criterion.class_weight.data_ptr()
    criterion.set_class_weight([1.0, 4.0])
    assert criterion.class_weight.tolist() == [[1.0, 4.0]] * 3
    criterion.set_class_weight(np.arange(6.0).reshape(3, 2).tolist())
    assert criterion.class_weight.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert criterion.class_weight.data_ptr() == address


def test_state_dict_keeps_the_weights():
    ours, other = WeightedCrossEntropyLoss(2, weight=[1.0, 3.0]), WeightedCrossEntropyLoss(2)
    other.load_state_dict(ours.state_dict(), strict=True)
    assert other.class_weight.tolist() == [1.0, 3.0]


def test_a_checkpoint_of_plain_cross_entropy_still_loads():
    class Model(nn.Module):
        def __init__(self, criterion):
            super().__init__()
            self.layer, self.criterion = nn.Linear(2, 2), criterion

    plain, ours = Model(nn.CrossEntropyLoss()), Model(WeightedCrossEntropyLoss(2, weight=[1.0, 3.0]))
    saved = plain.state_dict()
    with pytest.warns(UserWarning, match=r"lacks state of WeightedCrossEntropyLoss \(criterion.class_weight\)"):
        ours.load_state_dict(saved, strict=True)
    assert torch.equal(ours.layer.weight, plain.layer.weight)
    assert ours.criterion.class_weight.tolist() == [1.0, 3.0]
    assert "criterion.class_weight" not in saved


@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_label_smoothing_is_that_of_cross_entropy(positions, reduction):
    logits, target, weight = randn(6, 4, *positions), labels(4, 6, *positions), torch.rand(4)
    target[1] = -100
    expected = F.cross_entropy(logits, target, weight=weight, label_smoothing=0.2, reduction=reduction)
    given = weighted_cross_entropy(logits, target, class_weight=weight, label_smoothing=0.2, reduction=reduction)
    torch.testing.assert_close(given, expected)
    soft = randn(6, 4, *positions).softmax(1)
    expected = F.cross_entropy(logits, soft, weight=weight, label_smoothing=0.2, reduction=reduction)
    module = WeightedCrossEntropyLoss(4, weight, label_smoothing=0.2, reduction=reduction)
    torch.testing.assert_close(module(logits, soft), expected)


def test_copies_and_pickles_keep_the_weights():
    criterion = WeightedCrossEntropyLoss(2, weight=[1.0, 3.0])
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        other.set_class_weight([5.0, 5.0])
        assert criterion.class_weight.tolist() == [1.0, 3.0]
    assert repr(criterion) == "WeightedCrossEntropyLoss(2, label_smoothing=0.0, reduction='mean', ignore_index=-100)"
    assert "num_groups=4" in repr(WeightedCrossEntropyLoss(2, num_groups=4))


def test_an_explicit_class_weight_replaces_the_buffer():
    criterion, logits, target = WeightedCrossEntropyLoss(3, weight=[9.0, 9.0, 9.0]), randn(4, 3), labels(3, 4)
    torch.testing.assert_close(criterion(logits, target, class_weight=torch.ones(3)), F.cross_entropy(logits, target))


def test_group_is_accepted_where_the_weights_have_none():
    logits, target = randn(4, 3), labels(3, 4)
    loss = WeightedCrossEntropyLoss(3)(logits, target, group=torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, r"`num_classes` must be at least 1, got 0"),
        ({"num_classes": 2, "num_groups": 0}, r"`num_groups` must be at least 1, got 0"),
        (
            {"num_classes": 2, "reduction": "average"},
            r"`reduction` must be one of 'none', 'mean', 'sum', got",
        ),
        (
            {"num_classes": 2, "label_smoothing": 2},
            r"`label_smoothing` must be a finite number, between 0 and 1, got 2",
        ),
        ({"num_classes": 2, "weight": [1.0, 1.0, 1.0]}, r"`weight` must have shape \(2,\), got \(3,\)"),
        ({"num_classes": 2, "weight": [1.0, -1.0]}, r"`weight` must be finite and not negative, got -1.0"),
        ({"num_classes": 2, "weight": [float("nan"), 1.0]}, r"`weight` must be finite and not negative, got nan"),
        ({"num_classes": 2, "weight": [1.0, float("inf")]}, r"`weight` must be finite and not negative, got inf"),
        ({"num_classes": 2, "num_groups": 2, "weight": [[1.0, 1.0]]}, r"must have shape \(2, 2\), got \(1, 2\)"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightedCrossEntropyLoss(**arguments)


def test_refused_weights_leave_the_old_ones():
    criterion = WeightedCrossEntropyLoss(2, weight=[1.0, 3.0])
    with pytest.raises(ValueError, match="finite"):
        criterion.set_class_weight([2.0, float("nan")])
    assert criterion.class_weight.tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": torch.tensor([0, 3])}, r"`target` must lie between 0 and 2, got 3"),
        ({"target": torch.tensor([0, -1])}, r"`target` must lie between 0 and 2, got -1"),
        (
            {"target": torch.tensor([0, 1, 2])},
            r"`target` must have shape \(samples, positions...\) = \(2,\)",
        ),
        ({"target": torch.ones(2)}, r"`target` must have shape of `logits` = \(2, 3\), got \(2,\)"),
        (
            {"logits": torch.zeros(3)},
            r"`logits` must be a tensor of shape \(samples, classes, positions...\), got \(3,\)",
        ),
        ({"class_weight": torch.ones(2)}, r"`class_weight` must have shape \(classes,\) = \(3,\), got \(2,\)"),
        ({"class_weight": torch.ones(2, 2)}, r"`class_weight` must have shape \(groups, classes\) = \(2, 3\)"),
        ({"class_weight": torch.ones(4, 3)}, r"one row for each of 4 groups, but `group` is missing: pass `group=`"),
        ({"class_weight": torch.tensor(1.0)}, r"`class_weight` must have shape \(classes,\) = \(3,\), got \(\)"),
        ({"class_weight": torch.ones(2, 3), "group": torch.tensor([0, 2])}, r"`group` must lie between 0 and 1, got 2"),
        ({"class_weight": torch.ones(2, 3), "group": torch.tensor([0, -1])}, r"between 0 and 1, got -1"),
        ({"group": torch.tensor([0])}, r"`group` must have shape \(samples,\) = \(2,\), got \(1,\)"),
        ({"sample_weight": torch.ones(3)}, r"`sample_weight` must have shape"),
        ({"sample_weight": torch.ones(2, 1)}, r"`sample_weight` must have shape \(samples,\) = \(2,\), got \(2, 1\)"),
        ({"reduction": "max"}, r"`reduction` must be one of"),
    ],
)
def test_call_checks(arguments, message):
    arguments = {"logits": torch.zeros(2, 3), "target": torch.tensor([0, 1]), **arguments}
    with pytest.raises(ValueError, match=message):
        weighted_cross_entropy(arguments.pop("logits"), arguments.pop("target"), **arguments)


def test_wrong_dtypes():
    with pytest.raises(TypeError, match=r"`target` must hold integer class indices, got torch.bool"):
        weighted_cross_entropy(torch.zeros(2, 2), torch.tensor([True, False]))
    with pytest.raises(TypeError, match=r"`group` must hold integer group indices, got torch.float32"):
        weighted_cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1]), group=torch.zeros(2))
    with pytest.raises(TypeError, match=r"`group` must be a tensor of shape \(samples,\) = \(2,\), got list"):
        weighted_cross_entropy(torch.zeros(2, 2), torch.tensor([0, 1]), group=[0, 1])


def test_sample_weights_by_position():
    logits, target, weight = randn(2, 3, 4), labels(3, 2, 4), torch.rand(2, 4)
    expected = F.cross_entropy(logits, target, reduction="none") * weight
    given = weighted_cross_entropy(logits, target, sample_weight=weight, reduction="none")
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["class_weight", "sample_weight"])
def test_bad_weights_are_refused_at_every_call(name, bad):
    arguments = {name: torch.tensor([1.0, bad, 1.0])}
    with pytest.raises(ValueError, match=rf"`{name}` must be at least 0, got {bad}. Weights are finite"):
        weighted_cross_entropy(randn(3, 3), torch.tensor([0, 1, 2]), **arguments)


@pytest.mark.parametrize("name", ["class_weight", "sample_weight"])
def test_bad_whole_weights_and_lists_are_refused(name):
    logits, target = randn(3, 3), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=rf"`{name}` must be at least 0, got -1"):
        weighted_cross_entropy(logits, target, **{name: torch.tensor([1, -1, 1])})
    with pytest.raises(TypeError, match=rf"`{name}` must be a tensor, got list. Pass `torch.tensor"):
        weighted_cross_entropy(logits, target, **{name: [1.0, 1.0, 1.0]})


@pytest.mark.parametrize("bad", [-0.5, 1.5, float("nan")])
def test_soft_targets_are_probabilities(bad):
    with pytest.raises(ValueError, match=rf"`target` must lie between 0 and 1, got {bad}. Floating targets"):
        weighted_cross_entropy(randn(1, 2), torch.tensor([[1.0, bad]]))


def test_soft_targets_may_be_rounded():
    average = sum(0.1 * torch.tensor([[1.0, 0.0, 0.0]]) for _ in range(10))
    assert average.max() > 1
    assert weighted_cross_entropy(randn(1, 3), average).isfinite()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_groups_of_any_whole_dtype(dtype):
    logits, target, table = randn(4, 3), labels(3, 4), torch.rand(2, 3)
    expected = weighted_cross_entropy(logits, target, class_weight=table, group=torch.tensor([0, 1, 1, 0]))
    given = weighted_cross_entropy(logits, target, class_weight=table, group=torch.tensor([0, 1, 1, 0], dtype=dtype))
    torch.testing.assert_close(given, expected)


def test_scores_must_be_floating_and_targets_tensors():
    with pytest.raises(TypeError, match=r"`logits` must be floating scores before the softmax, got torch.int64"):
        weighted_cross_entropy(labels(3, 4, 3), labels(3, 4))
    with pytest.raises(TypeError, match="`target` must be a tensor, got list"):
        weighted_cross_entropy(randn(2, 3), [0, 1])

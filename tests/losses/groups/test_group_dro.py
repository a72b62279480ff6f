"""Group DRO against the paper's algorithm in plain numpy, and against what published code gets wrong."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from losses.groups import GroupDROLoss, group_dro_loss
from tests.losses.groups.reference import group_means, sample_losses


def follow(q, means, step_size, adjustment=None):
    """Multiply the weights of the groups that are here; share their old mass among them."""
    here = [g for g, mean in enumerate(means) if mean is not None]
    extra = [0.0] * len(q) if adjustment is None else adjustment
    raised = {g: q[g] * np.exp(step_size * (means[g] + extra[g])) for g in here}
    mass, total = sum(q[g] for g in here), sum(raised.values())
    return np.array([mass * raised[g] / total if g in raised else q[g] for g in range(len(q))])


def robust(q, means):
    return sum(weight * mean for weight, mean in zip(q, means, strict=True) if mean is not None)


def batch(samples=8, classes=4, groups=3, positions=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, *positions, generator=generator).double().requires_grad_()
    target = torch.randint(classes, (samples, *positions), generator=generator)
    return logits, target, torch.randint(groups, (samples,), generator=generator)


def separated(*losses):
    """Return logits and targets of two classes whose cross entropies are the ones given."""
    wanted = torch.tensor(losses, dtype=torch.float64)
    other = torch.log(torch.expm1(wanted))
    return torch.stack([torch.zeros_like(other), other], dim=1).requires_grad_(), torch.zeros(
        len(losses), dtype=torch.long
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 7),
    groups=st.integers(1, 4),
    positions=st.sampled_from([(), (3,), (2, 2)]),
    ignored=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_three_steps_against_loops(samples, groups, positions, ignored, seed):
    criterion = GroupDROLoss(groups, step_size=0.7).double()
    q = np.full(groups, 1 / groups)
    for step in range(3):
        logits, target, group = batch(samples, 4, groups, positions, seed + 100 * step)
        target.view(-1)[:ignored] = -100
        weight, table = torch.rand(samples).double(), torch.rand(groups, 4).double()
        options = {"sample_weight": weight, "class_weight": table, "group": group}
        means = group_means(sample_losses(logits, target, **options), group, groups)
        q = follow(q, means, 0.7)
        loss = criterion(logits, target, **options)
        assert loss.item() == pytest.approx(robust(q, means), rel=1e-6)
        np.testing.assert_allclose(criterion.group_weight, q, rtol=1e-6)
        assert group_dro_loss(logits, target, group_weight=torch.tensor(q), **options).item() == pytest.approx(
            loss.item(), rel=1e-9
        )


def test_soft_targets():
    logits, _, group = batch(6, 4, 2, (3,))
    target = torch.randn(6, 4, 3).double().softmax(1)
    means = group_means(sample_losses(logits, target), group, 2)
    loss = group_dro_loss(logits, target, group=group, group_weight=torch.tensor([0.2, 0.8]).double())
    assert loss.item() == pytest.approx(0.2 * means[0] + 0.8 * means[1])


@pytest.mark.parametrize("positions", [(), (3,)])
def test_one_group_is_cross_entropy(positions):
    logits, target, _ = batch(positions=positions)
    criterion = GroupDROLoss(1, step_size=1.0)
    group = torch.zeros(8, dtype=torch.int32)
    torch.testing.assert_close(criterion(logits, target, group=group), F.cross_entropy(logits, target))
    assert criterion.group_weight.tolist() == [1.0]


def test_step_size_zero_keeps_uniform_weights():
    logits, target, group = batch()
    criterion = GroupDROLoss(3, step_size=0)
    loss = criterion(logits, target, group=group)
    torch.testing.assert_close(criterion.group_weight, torch.full((3,), 1 / 3))
    assert loss.item() == pytest.approx(np.mean(group_means(sample_losses(logits, target), group, 3)))


def test_weights_find_the_worst_group():
    logits, target = separated(0.1, 0.5, 2.0)
    criterion = GroupDROLoss(3, step_size=0.5)
    for _ in range(30):
        loss = criterion(logits, target, group=torch.tensor([0, 1, 2]))
    assert criterion.group_weight[2] > 0.999
    assert loss.item() == pytest.approx(2.0, rel=1e-3)


def test_absent_groups_keep_their_weight_exactly():
    """Published code takes the loss of an absent group for zero: its weight went from 1/3 to 1e-9 in 200 batches."""
    logits, target = separated(1.0, 1.0)
    criterion = GroupDROLoss(3, step_size=0.1)
    for _ in range(200):
        criterion(logits, target, group=torch.tensor([0, 1]))
    assert criterion.group_weight[2].item() == torch.tensor(1 / 3).item()
    torch.testing.assert_close(criterion.group_weight, torch.full((3,), 1 / 3))


def test_present_groups_share_their_old_mass():
    logits, target = separated(0.2, 3.0)
    criterion = GroupDROLoss(4, step_size=1.0)
    criterion.group_weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    before = criterion.group_weight.clone()
    criterion(logits, target, group=torch.tensor([1, 3]))
    assert torch.equal(criterion.group_weight[[0, 2]], before[[0, 2]])
    assert criterion.group_weight[3] > before[3]
    assert criterion.group_weight[[1, 3]].sum().item() == pytest.approx(0.6)


def test_weights_sum_to_one_after_many_steps():
    criterion, generator = GroupDROLoss(5, step_size=0.3), torch.Generator().manual_seed(0)
    for _ in range(500):
        group = torch.randint(5, (3,), generator=generator)
        criterion(torch.randn(3, 2, generator=generator) * 3, torch.zeros(3, dtype=torch.long), group=group)
    assert criterion.group_weight.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_the_adjustment_moves_the_weights_only():
    """In published code ``adjusted_loss += C / sqrt(n)`` writes through an alias into the loss and its log."""
    logits, target, group = batch()
    counts, step_size = [100, 25, 4], 0.5
    criterion = GroupDROLoss(3, step_size, group_counts=counts, adjustment=2.0)
    means = group_means(sample_losses(logits, target), group, 3)
    loss = criterion(logits, target, group=group)
    q = follow(np.full(3, 1 / 3), means, step_size, [0.2, 0.4, 1.0])
    np.testing.assert_allclose(criterion.group_weight, q, rtol=1e-6)
    assert loss.item() == pytest.approx(robust(q, means), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    fixed = group_dro_loss(logits, target, group=group, group_weight=torch.tensor(q))
    torch.testing.assert_close(gradient, torch.autograd.grad(fixed, logits)[0], rtol=1e-6, atol=1e-8)


def test_an_empty_training_group_does_not_make_the_adjustment_infinite():
    criterion = GroupDROLoss(2, group_counts=[10, 0], adjustment=1.0)
    assert criterion.group_adjustment.isfinite().all()


def test_weights_survive_a_checkpoint():
    """In published code the group weights are plain attributes, lost on resume."""
    logits, target, group = batch()
    used, fresh = GroupDROLoss(3, 0.5), GroupDROLoss(3, 0.5)
    used(logits, target, group=group)
    assert list(used.state_dict()) == ["group_weight"]
    fresh.load_state_dict(used.state_dict())
    assert torch.equal(used(logits, target, group=group), fresh(logits, target, group=group))
    assert torch.equal(used.group_weight, fresh.group_weight)


def test_evaluation_uses_the_weights_and_leaves_them():
    logits, target, group = batch()
    criterion = GroupDROLoss(3, 0.5)
    criterion(logits, target, group=group)
    before, address = criterion.group_weight.clone(), criterion.group_weight.data_ptr()
    loss = criterion.eval()(logits, target, group=group)
    assert torch.equal(criterion.group_weight, before)
    torch.testing.assert_close(loss, group_dro_loss(logits, target, group=group, group_weight=before))
    criterion.train()(logits, target, group=group)
    assert not torch.equal(criterion.group_weight, before)
    assert criterion.group_weight.data_ptr() == address


def test_two_forwards_before_one_backward():
    layer, criterion = nn.Linear(5, 4), GroupDROLoss(3, 0.5)
    data, (_, target, group) = torch.randn(8, 5), batch()
    first = criterion(layer(data), target, group=group)
    weights = [criterion.group_weight.clone()]
    second = criterion(layer(data), target, group=group)
    weights.append(criterion.group_weight.clone())
    (first + second).backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    for weight in weights:
        group_dro_loss(layer(data), target, group=group, group_weight=weight).backward()
    torch.testing.assert_close(gradient, layer.weight.grad)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights(bad):
    criterion = GroupDROLoss(3, 0.5)
    logits, target, group = batch()
    criterion(logits, target, group=group)
    before = criterion.group_weight.clone()
    broken = logits.detach().clone()
    broken[0, target[0]] = bad
    assert not criterion(broken, target, group=group).isfinite()
    assert torch.equal(criterion.group_weight, before)
    assert criterion(logits, target, group=group).isfinite()
    assert criterion.group_weight.isfinite().all()


def test_large_losses_do_not_overflow():
    logits = torch.tensor([[0.0, 1e4], [0.0, 2e4]])
    criterion = GroupDROLoss(2, step_size=1.0)
    loss = criterion(logits, torch.tensor([0, 0]), group=torch.tensor([0, 1]))
    torch.testing.assert_close(criterion.group_weight, torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx(2e4)


def test_a_group_whose_weight_vanished_can_return():
    criterion = GroupDROLoss(2, step_size=1.0)
    target, group = torch.tensor([0, 0]), torch.tensor([0, 1])
    for _ in range(3):
        criterion(torch.tensor([[0.0, 1e4], [0.0, 2e4]]), target, group=group)
    assert criterion.group_weight[0] < 1e-30
    criterion(torch.tensor([[0.0, 2e4], [0.0, 1e4]]), target, group=group)
    assert criterion.group_weight[0] > 0.999


def test_the_mean_is_that_of_the_values():
    logits, target, group = batch(positions=(2,))
    target[2] = -100
    weight = torch.tensor([0.2, 0.5, 0.3])
    losses = {
        reduction: group_dro_loss(logits, target, group=group, group_weight=weight, reduction=reduction)
        for reduction in ("none", "mean", "sum")
    }
    assert losses["none"].shape == (8,)
    assert losses["none"][2] == 0
    torch.testing.assert_close(losses["none"].sum() / 7, losses["mean"])
    torch.testing.assert_close(losses["none"].sum(), losses["sum"])


def test_sample_weights_do_not_change_the_count():
    logits, target = separated(1.0, 1.0, 1.0)
    loss = group_dro_loss(
        logits,
        target,
        group=torch.tensor([0, 0, 1]),
        group_weight=torch.tensor([1.0, 0.0]),
        sample_weight=torch.tensor([3.0, 1.0, 1.0]),
    )
    assert loss.item() == pytest.approx(2.0)


def test_gradcheck():
    logits, target, group = batch(5, 3, 3, (2,))
    target[0, 0] = -100
    weight = torch.tensor([0.2, 0.5, 0.3]).double()
    assert torch.autograd.gradcheck(lambda z: group_dro_loss(z, target, group=group, group_weight=weight), (logits,))


def test_a_bfloat16_module_does_not_lose_small_steps():
    """Between 1/2 and 1, bfloat16 knows no number closer than 0.4 %."""
    logits, target = separated(0.1, 1.1)
    criterion = GroupDROLoss(2, step_size=1e-3).bfloat16()
    for _ in range(100):
        criterion(logits.bfloat16(), target, group=torch.tensor([0, 1]))
    expected = torch.tensor([0.0, 0.1]).softmax(dim=0)  # a hundred steps of 1e-3 times the difference
    torch.testing.assert_close(criterion.group_weight, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("samples", [0, 3])
def test_nothing_counted_keeps_the_weights(samples):
    logits = torch.randn(samples, 4, requires_grad=True)
    criterion = GroupDROLoss(2, 0.5)
    before = copy.deepcopy(criterion.group_weight)
    loss = criterion(logits, torch.full((samples,), -100), group=torch.zeros(samples, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.eq(0).all()
    assert torch.equal(criterion.group_weight, before)


def test_class_weights_can_be_set():
    logits, target, group = batch()
    criterion = GroupDROLoss(3, 0, class_weight=[1.0, 2.0, 3.0, 4.0])
    assert criterion.class_weight.shape == (3, 4)
    criterion.set_class_weight([2.0] * 4)
    torch.testing.assert_close(
        criterion(logits, target, group=group), 2 * GroupDROLoss(3, 0)(logits, target, group=group)
    )


def test_repr_builds_it_again():
    criterion = GroupDROLoss(2, 0.1, group_counts=torch.tensor([5, 6]), adjustment=1.5, reduction="sum")
    again = eval(repr(criterion))
    assert repr(again) == repr(criterion)
    assert again.group_counts == [5, 6]
    assert repr(GroupDROLoss(2)) == (
        "GroupDROLoss(step_size=0.01, adjustment=0.0, num_groups=2, reduction='mean', ignore_index=-100)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 0}, r"`num_groups` must be at least 1, got 0"),
        ({"num_groups": 2, "step_size": -1.0}, r"`step_size` must be a finite number, at least 0, got -1.0"),
        ({"num_groups": 2, "adjustment": -1.0, "group_counts": [1, 1]}, r"`adjustment` must be a finite number"),
        ({"num_groups": 2, "adjustment": 1.0}, r"`adjustment` needs `group_counts`: pass the number"),
        ({"num_groups": 2, "group_counts": [1, 2, 3]}, r"`group_counts` must have shape \(num_groups,\) = \(2,\)"),
        ({"num_groups": 2, "group_counts": [1, -2]}, r"`group_counts` must be finite and not negative, got -2"),
        ({"num_groups": 2, "class_weight": 1.0}, r"`class_weight` must have shape \(classes,\) or \(groups, classes\)"),
        ({"num_groups": 2, "reduction": "max"}, r"`reduction` must be one of"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupDROLoss(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": None}, r"`group` is missing: pass `group=`, one group index per sample"),
        ({"group": torch.tensor([0, 2])}, r"`group` must lie between 0 and 1, got 2"),
        ({"group": torch.tensor([-1, 0])}, r"`group` must lie between 0 and 1, got -1"),
        ({"group": torch.tensor([0])}, r"`group` must have shape \(samples,\) = \(2,\), got \(1,\)"),
        ({"group_weight": torch.ones(1, 2)}, r"`group_weight` must have shape \(groups,\)"),
        ({"group_weight": torch.tensor([0.5, -0.5])}, r"`group_weight` must be at least 0, got -0.5"),
        ({"group_weight": torch.tensor([0.5, torch.inf])}, r"`group_weight` must be at least 0, got inf"),
        ({"reduction": "max"}, r"`reduction` must be one of"),
    ],
)
def test_call_checks(arguments, message):
    options = {"group": torch.tensor([0, 1]), "group_weight": torch.full((2,), 0.5), **arguments}
    with pytest.raises(ValueError, match=message):
        group_dro_loss(torch.zeros(2, 3), torch.tensor([0, 1]), **options)


def test_weights_that_are_no_tensor():
    with pytest.raises(TypeError, match=r"`group_weight` must be a tensor, got list"):
        group_dro_loss(torch.zeros(2, 3), torch.tensor([0, 1]), group=torch.tensor([0, 1]), group_weight=[0.5, 0.5])


def test_the_module_needs_groups_and_a_refused_call_leaves_the_weights():
    criterion = GroupDROLoss(2, 0.5)
    with pytest.raises(ValueError, match="`group` is missing"):
        criterion(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="`group` must lie between 0 and 1, got 2"):
        criterion(torch.randn(2, 3), torch.tensor([0, 1]), group=torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="`group` must hold integer group indices"):
        criterion(torch.randn(2, 3), torch.tensor([0, 1]), group=torch.tensor([0.0, 1.0]))
    assert criterion.group_weight.tolist() == [0.5, 0.5]

"""Group reweighting: when it acts, what it writes, what it leaves alone, what it remembers."""

from __future__ import annotations

import functools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from attn_callbacks.bias import BiasReport
from attn_callbacks.bias.calibration import Calibration
from attn_callbacks.feedback.group_reweighting import GroupReweighting
from losses import WeightedCrossEntropyLoss
from tests.feedback.checkpoint import saved

CLASSES, GROUPS = ("negative", "positive"), ("Amazon", "Tweets", "News")
UNFAIR = torch.tensor([[[45, 5], [5, 45]], [[25, 25], [20, 30]], [[40, 10], [10, 40]]])
FAIR = torch.tensor([[[40, 10], [10, 40]]] * 3)
FED = torch.tensor([[35, 35], [5, 5], [10, 10]])
CLASS_BIAS = torch.tensor([[[50, 0], [30, 20]]] * 3)


def module(groups=3, **arguments):
    target = nn.Module()
    target.criterion = WeightedCrossEntropyLoss(2, num_groups=groups, **arguments)
    return target


def report(counts=UNFAIR, fed=FED, **arguments):
    return BiasReport(0, 0, counts, CLASSES, GROUPS[: len(counts)], train_counts=fed, **arguments)


def bound(target, by="group", **keywords):
    feedback = GroupReweighting(by=by, **keywords)
    feedback.bind(target)
    return feedback


@functools.cache
def noisy(seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 60, (3, 2, 2), generator=generator)
    counts[seed % 3] *= seed % 2  # absent now and then
    return report(counts, torch.randint(1, 50, (3, 2), generator=generator))


def losses_of(counts, loss):
    """A report whose groups have the given mean losses."""
    support = counts.sum(dim=2)
    bins = torch.zeros(*support.shape, 1, 3)
    bins[..., 0, 0] = support
    sums = torch.stack([support * torch.tensor(loss), torch.zeros(support.shape)], dim=-1)
    return report(counts, calibration=Calibration(bins, sums))


def reference(shares, loss, prior, step_size=1.0):
    """Group DRO of present groups, and the weights that give the groups those shares."""
    shares = np.array(shares) * np.exp(step_size * np.array(loss))
    shares /= shares.sum()
    return shares, shares / np.array(prior)


def test_first_finding_gives_even_shares_and_a_step():
    target = module()
    actions = bound(target).apply(report())
    shares, weights = reference([1 / 3] * 3, [0.1, 0.45, 0.2], [0.7, 0.1, 0.2])
    assert target.criterion.class_weight.numpy() == pytest.approx(np.repeat(weights, 2).reshape(3, 2), rel=1e-5)
    assert shares[1] > 1 / 3
    assert str(actions[0]) == f"Tweets: weight 1.00 -> {weights[1]:.2f} (error 0.45)"
    assert actions[0].finding == ("group", "Tweets")
    assert (actions[0].old, actions[0].new) == (1.0, pytest.approx(weights[1]))
    lowered = next(action for action in actions if str(action).startswith("Amazon"))
    assert lowered.finding is None


def test_shares_are_multiplied_report_by_report_with_averaged_losses():
    target = module()
    feedback = bound(target, step_size=2.0, smoothing=0.5)
    feedback.apply(report())
    feedback.apply(report(FAIR))
    first, _ = reference([1 / 3] * 3, [0.1, 0.45, 0.2], [0.7, 0.1, 0.2], 2.0)
    second, weights = reference(first, [0.15, 0.325, 0.2], [0.7, 0.1, 0.2], 2.0)
    assert feedback.shares == pytest.approx(second)
    assert target.criterion.class_weight[:, 0].numpy() == pytest.approx(weights, rel=1e-5)


def test_mean_loss_counts_where_it_was_measured():
    target = module()
    told = losses_of(UNFAIR, [[0.2, 0.4], [1.5, 0.5], [0.6, 0.6]])
    actions = bound(target).apply(told)
    _, weights = reference([1 / 3] * 3, [0.3, 1.0, 0.6], [0.7, 0.1, 0.2])
    assert target.criterion.class_weight[:, 1].numpy() == pytest.approx(weights, rel=1e-5)
    assert str(actions[0]).endswith("(loss 1.00)")


def test_cells_have_weights_of_their_own():
    target = module()
    told = losses_of(UNFAIR, [[0.2, 0.4], [1.5, 0.5], [0.6, 0.6]])
    bound(target, by="cell").apply(told)
    prior = (FED.double() / 100).flatten().numpy()
    _, weights = reference([1 / 6] * 6, [0.2, 0.4, 1.5, 0.5, 0.6, 0.6], prior)
    assert target.criterion.class_weight.flatten().numpy() == pytest.approx(weights, rel=1e-5)


def test_expected_weight_stays_one():
    target = module()
    feedback = bound(target)
    for seed in range(6):
        told = noisy(seed)
        feedback.apply(told)
        fed = told.train_counts.double()
        assert float((fed * target.criterion.class_weight).sum() / fed.sum()) == pytest.approx(1, rel=1e-6)
    assert feedback.shares is not None


@pytest.mark.parametrize("counts", [FAIR, CLASS_BIAS])
def test_it_waits_for_a_finding_of_group_bias(counts):
    target = module()
    feedback = bound(target)
    assert bool(report(counts).findings) == (counts is CLASS_BIAS)
    assert feedback.apply(report(counts)) == ()
    assert feedback.shares is None
    assert target.criterion.class_weight.tolist() == [[1.0, 1.0]] * 3
    feedback.apply(report())
    assert feedback.shares is not None
    feedback.apply(report(counts))  # once it has begun it goes on
    assert feedback.answers == {"group"}


def test_losses_before_the_finding_are_averaged():
    target = module()
    feedback = bound(target, smoothing=0.5)
    feedback.apply(report(FAIR))
    feedback.apply(report())
    shares, _ = reference([1 / 3] * 3, [0.15, 0.325, 0.2], [0.7, 0.1, 0.2])
    assert feedback.shares == pytest.approx(shares)


def test_absent_and_few_keep_their_share_exactly_for_any_time():
    """Where an absent group counts as a loss of 0, its share falls from 1/3 to 1e-9."""
    target = module()
    feedback = bound(target, step_size=0.1, floor=1e-9, limit=1e9)
    few, absent = UNFAIR.clone(), UNFAIR.clone()
    few[2], absent[2] = torch.tensor([[9, 0], [0, 10]]), 0  # 19 samples: one too few
    for told in (report(few), report(absent)):
        for _ in range(100):
            feedback.apply(told)
    assert feedback.shares[2] == 1 / 3
    assert math.fsum(feedback.shares) == pytest.approx(1, abs=1e-12)
    assert float(target.criterion.class_weight[2, 0]) == pytest.approx(1 / 3 / 0.2, rel=1e-5)
    feedback.apply(report())
    assert feedback.shares[2] != 1 / 3


def test_group_that_training_lacks_takes_nothing():
    target = module()
    feedback = bound(target)
    feedback.apply(report(UNFAIR, torch.tensor([[40, 40], [0, 0], [10, 10]])))
    assert feedback.shares[1] == 1 / 3
    assert target.criterion.class_weight[1].tolist() == [1.0, 1.0]
    weight = target.criterion.class_weight[:, 0].double()
    assert float(0.8 * weight[0] + 0.2 * weight[2]) == pytest.approx(1, rel=1e-6)
    assert float(weight[2] / weight[0]) == pytest.approx(4 * math.exp(0.1), rel=1e-5)


def test_groups_that_validation_has_not_shown_rest():
    target = module(groups=4)
    feedback = bound(target)
    feedback.apply(report())
    assert feedback.shares[3] == 0.25
    assert target.criterion.class_weight[3].tolist() == [1.0, 1.0]


def test_without_counts_of_training_those_of_validation_serve():
    target = module()
    bound(target).apply(report(fed=None))
    _, weights = reference([1 / 3] * 3, [0.1, 0.45, 0.2], [1 / 3] * 3)
    assert target.criterion.class_weight[:, 0].numpy() == pytest.approx(weights, rel=1e-5)


def test_limit_bounds_the_weights_of_small_groups():
    target = module()
    bound(target, limit=2.0).apply(report(fed=torch.tensor([[4900, 4900], [1, 1], [99, 99]])))
    weight = target.criterion.class_weight[:, 0]
    assert float(weight.max() / weight.min()) == pytest.approx(4, rel=1e-5)


def test_held_or_withdrawn_the_loss_is_as_it_was_and_decisions_go_on():
    start = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    target, other = module(weight=start), module(weight=start)
    feedback, twin = bound(target), bound(other)
    feedback.hold(True)
    for seed in range(4):
        assert feedback.apply(noisy(seed)) == twin.apply(noisy(seed))
    assert target.criterion.class_weight.tolist() == start
    feedback.hold(False)
    assert torch.equal(target.criterion.class_weight, other.criterion.class_weight)
    feedback.withdraw()
    assert target.criterion.class_weight.tolist() == start
    assert feedback.apply(noisy(4)) == twin.apply(noisy(4))
    assert target.criterion.class_weight.tolist() == start


@pytest.mark.parametrize("by", ["group", "cell"])
@pytest.mark.parametrize("bind_first", [True, False])
@pytest.mark.parametrize("reports", [0, 1, 4])
def test_resumed_run_equals_an_unbroken_one_bitwise(by, bind_first, reports):
    straight, broken, resumed = module(), module(), module()
    whole, first, second = bound(straight, by=by), bound(broken, by=by), GroupReweighting(by=by)
    told = [whole.apply(each) for each in map(noisy, range(8))]
    for seed in range(reports):
        first.apply(noisy(seed))
    if bind_first:
        second.bind(resumed)
    second.load_state_dict(saved(first.state_dict()))
    second.bind(resumed)
    assert torch.equal(resumed.criterion.class_weight, broken.criterion.class_weight)
    assert [second.apply(noisy(seed)) for seed in range(reports, 8)] == told[reports:]
    assert torch.equal(resumed.criterion.class_weight, straight.criterion.class_weight)
    assert str(saved(second.state_dict())) == str(saved(whole.state_dict()))


def test_another_module_starts_anew():
    target, other = module(), module()
    feedback = bound(target)
    feedback.apply(report())
    feedback.bind(other)
    assert feedback.shares is None
    assert other.criterion.class_weight.tolist() == [[1.0, 1.0]] * 3
    assert feedback.apply(report(FAIR)) == ()


def test_table_leaves_the_state_dict():
    target = module()
    bound(target)
    assert target.state_dict() == {}


def test_cells_are_the_default():
    """Weights of whole groups cannot tell samples that follow a shortcut from those of the same group that do not."""
    assert GroupReweighting().by == "cell"


def test_repr_and_pickle():
    feedback = bound(module(), by="cell", step_size=0.5, limit=5.0)
    feedback.load_state_dict({"share": [0.5, 0.5]})
    assert repr(eval(repr(feedback))) == repr(feedback)
    assert pickle.loads(pickle.dumps(feedback)).shares == (0.5, 0.5)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"by": "class"}, "`by` must be one of 'group', 'cell', got 'class'"),
        (ValueError, {"step_size": 0.0}, "`step_size` must lie between 0 and inf, both excluded, got 0.0"),
        (TypeError, {"step_size": "a"}, "`step_size` must be a number"),
        (ValueError, {"smoothing": 1.0}, r"`smoothing` must lie in \[0, 1\)"),
        (ValueError, {"floor": 0.0}, "`floor` must lie between 0 and 1"),
        (ValueError, {"limit": 1.0}, "`limit` must lie between 1 and inf"),
        (ValueError, {"min_support": 0}, "`min_support` must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        GroupReweighting(**arguments)


def test_bind_and_apply_refuse_what_does_not_fit():
    plain, small = module(), module(groups=2)
    plain.criterion = WeightedCrossEntropyLoss(2)
    with pytest.raises(ValueError, match=r"by='group' needs `criterion.class_weight` of shape \(groups, classes\)"):
        GroupReweighting(by="group").bind(plain)
    with pytest.raises(ValueError, match=r"has shape \(2, 2\), but the report counts \(3, 2\)"):
        bound(small).apply(report())
    with pytest.raises(ValueError, match="by='group' needs groups in the report, got none"):
        bound(small).apply(BiasReport(0, 0, UNFAIR[:1], CLASSES))
    with pytest.raises(ValueError, match="`GroupReweighting` has no loss to change"):
        GroupReweighting().apply(report())

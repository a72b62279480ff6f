"""The control that draws weights at random: what is drawn, and that a resumed run and every process draw the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback.random_loss_weights import RandomLossWeights
from losses import LogitAdjustedLoss, WeightedCrossEntropyLoss
from tests.feedback.checkpoint import saved

NAMES = ("negative", "positive")
GROUPS = ("Amazon", "Tweets")


def module(criterion=None):
    target = nn.Module()
    target.criterion = WeightedCrossEntropyLoss(2) if criterion is None else criterion
    return target


def report(counts=((90, 10), (50, 50)), fed=((80, 20),)):
    return BiasReport(0, 0, torch.tensor([counts]), NAMES, train_counts=torch.tensor(fed))


def bound(target, *arguments, **keywords):
    feedback = RandomLossWeights("criterion", *arguments, **keywords)
    feedback.bind(target)
    return feedback


def drawn(number, *arguments, **keywords):
    target = module()
    feedback, tables = bound(target, *arguments, **keywords), []
    for _ in range(number):
        feedback.apply(report())
        tables.append(target.criterion.class_weight.clone())
    return torch.stack(tables)


def test_every_report_draws_anew_from_a_softmax_of_normals():
    tables = drawn(300)
    assert len(tables.unique(dim=0)) == 300
    torch.testing.assert_close((tables * torch.tensor([0.8, 0.2])).sum(dim=1), torch.ones(300))
    ratio = (tables[:, 1] / tables[:, 0]).log()  # difference of two standard normals
    assert abs(float(ratio.mean())) < 3 * math.sqrt(2 / 300)
    assert float(ratio.std()) == pytest.approx(math.sqrt(2), rel=0.15)


def test_draws_know_nothing_of_the_recalls():
    target, other = module(), module()
    first, second = bound(target), bound(other)
    first.apply(report())
    second.apply(report(((10, 90), (0, 100))))
    assert torch.equal(target.criterion.class_weight, other.criterion.class_weight)


def test_seed_and_number_of_reports_alone_decide():
    assert torch.equal(drawn(3, 7), drawn(3, 7))
    assert not torch.equal(drawn(3, 7), drawn(3, 8))
    assert not torch.equal(drawn(2, 0)[1], drawn(1, 1)[0])  # the next report is not the next seed
    state = torch.get_rng_state()
    torch.manual_seed(1)
    first = drawn(1)
    before = torch.get_rng_state()
    assert torch.equal(drawn(1), first)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


@pytest.mark.parametrize("bind_first", [True, False])
@pytest.mark.parametrize("criterion", [lambda: WeightedCrossEntropyLoss(2), lambda: LogitAdjustedLoss([4, 1])])
def test_resumed_run_draws_what_the_unbroken_one_draws(bind_first, criterion):
    straight, broken, resumed = (module(criterion()) for _ in range(3))
    whole, first, second = bound(straight), bound(broken), RandomLossWeights()
    told = [whole.apply(report()) for _ in range(6)]
    for _ in range(3):
        first.apply(report())
    if bind_first:
        second.bind(resumed)
    second.load_state_dict(saved(first.state_dict()))
    second.bind(resumed)
    for name, value in broken.criterion.named_buffers():
        assert torch.equal(resumed.criterion.get_buffer(name), value)
    assert [second.apply(report()) for _ in range(3)] == told[3:]
    for name, value in straight.criterion.named_buffers():
        assert torch.equal(resumed.criterion.get_buffer(name), value)


def test_as_margin_it_is_minus_the_log():
    target = module(LogitAdjustedLoss([4, 1]))
    start = target.criterion.adjustment.clone()
    (action,) = bound(target, 3).apply(report())
    torch.testing.assert_close(target.criterion.adjustment, start - drawn(1, 3)[0].log())
    assert str(action).startswith("random shifts drawn, from ")
    assert action.finding is None
    assert target.criterion.class_weight.tolist() == [1.0, 1.0]


def test_cells_each_have_a_draw():
    target = module(WeightedCrossEntropyLoss(2, num_groups=2))
    counts = torch.tensor([[[9, 1], [5, 5]]] * 2)
    told = BiasReport(0, 0, counts, NAMES, GROUPS, train_counts=torch.tensor([[40, 10], [30, 20]]))
    bound(target).apply(told)
    weight = target.criterion.class_weight
    assert len(weight.unique()) == 4
    assert float((weight * torch.tensor([[0.4, 0.1], [0.3, 0.2]])).sum()) == pytest.approx(1, rel=1e-6)


def test_held_or_withdrawn_the_loss_is_as_it_was():
    target, other = module(), module()
    feedback, twin = bound(target), bound(other)
    feedback.hold(True)
    assert feedback.apply(report()) == twin.apply(report())
    assert target.criterion.class_weight.tolist() == [1.0, 1.0]
    feedback.hold(False)
    assert torch.equal(target.criterion.class_weight, other.criterion.class_weight)
    feedback.withdraw()
    assert target.criterion.class_weight.tolist() == [1.0, 1.0]


def test_answers_repr_and_refusals():
    assert RandomLossWeights().answers == frozenset()
    assert repr(eval(repr(RandomLossWeights("loss", 3, act="margin")))) == "RandomLossWeights('loss', 3, act='margin')"
    with pytest.raises(ValueError, match="`seed` must be at least 0, got -1"):
        RandomLossWeights(seed=-1)
    with pytest.raises(TypeError, match="`seed` must be an integer"):
        RandomLossWeights(seed=0.5)

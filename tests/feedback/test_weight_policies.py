"""How weights follow from counts, recalls and losses: by hand, against plain loops, and what must always hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_callbacks.feedback._f1 import f1_rates
from attn_callbacks.feedback.weight_policies import (
    blend,
    centre_rows,
    difficulty_weights,
    effective_number_weights,
    group_dro_step,
    inverse_frequency_weights,
    preserve_prior,
    share_weights,
)
from losses import effective_number_weights as published

NAN = math.nan


def plain(log_weight):
    return [math.exp(value) for value in log_weight]


def test_blend():
    assert blend([0.2, NAN, 0.4, NAN], [0.6, 0.6, NAN, NAN], 0.75)[:3] == pytest.approx((0.3, 0.6, 0.4))
    assert math.isnan(blend([NAN], [NAN], 0.5)[0])
    assert blend([0.2], [0.6], 0.0) == (0.6,)


def test_prior_is_preserved_over_the_steered_alone():
    log_weight = preserve_prior([math.log(2), math.log(6), math.log(9)], [0.5, 0.25, 0.25], [True, True, False])
    # (0.5 * 2 + 0.25 * 6) / 0.75 = 10 / 3
    assert plain(log_weight) == pytest.approx([0.6, 1.8, 9.0])
    assert preserve_prior([1.0, NAN], [0.0, 1.0])[0] == 1.0
    assert preserve_prior([1.0, NAN], [0.5, 0.5])[0] == 0.0


def test_difficulty_by_hand():
    assert plain(difficulty_weights([0.9, 0.6], [0.5, 0.5], tau=1.0, limit=10.0)) == pytest.approx([0.4, 1.6])
    # squared: 0.01 to 0.16
    weights = plain(difficulty_weights([0.9, 0.6], [0.75, 0.25], tau=2.0, limit=10.0))
    assert weights == pytest.approx([0.01 / 0.0475, 0.16 / 0.0475])
    assert plain(difficulty_weights([0.9, 0.6], [0.5, 0.5], tau=0.0, limit=10.0)) == pytest.approx([1.0, 1.0])
    assert plain(difficulty_weights([1.0, 0.6], [0.5, 0.5], tau=0.0, limit=10.0)) == pytest.approx([1.0, 1.0])


def test_class_that_is_always_right_keeps_the_least_weight():
    # 0.5 alone is the mean: e^0 against 1 / 4
    assert plain(difficulty_weights([1.0, 0.5], [0.5, 0.5], tau=1.0, limit=4.0)) == pytest.approx([0.4, 1.6])
    assert plain(difficulty_weights([1.0, 1.0], [0.5, 0.5], tau=1.0, limit=4.0)) == [1.0, 1.0]


def test_class_that_was_not_measured_is_left_out():
    first, missing, last = difficulty_weights([0.9, NAN, 0.6], [0.4, 0.2, 0.4], tau=1.0, limit=10.0)
    assert math.isnan(missing)
    assert plain([first, last]) == pytest.approx([0.4, 1.6])
    assert all(map(math.isnan, difficulty_weights([NAN, NAN], [0.5, 0.5], tau=1.0, limit=10.0)))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999, 1.0])
def test_effective_number_is_the_published_one(beta):
    counts = [1000.0, 100.0, 10.0, 1.0]
    prior = [count / sum(counts) for count in counts]
    ours = np.array(plain(effective_number_weights(counts, prior, beta=beta, limit=1e6)))
    theirs = published(counts, beta).double().numpy()
    assert ours == pytest.approx(theirs / np.dot(theirs, prior), rel=1e-5)


def test_limit_holds_around_the_geometric_mean():
    # frequencies 100 to 1: a tenth and ten times the mean, or half and twice
    counts, prior = [100.0, 1.0], [0.5, 0.5]
    wide, narrow = (plain(effective_number_weights(counts, prior, beta=1.0, limit=limit)) for limit in (20, 2))
    assert wide[1] / wide[0] == pytest.approx(100)
    assert narrow[1] / narrow[0] == pytest.approx(4)


def test_inverse_frequency_balances_what_is_fed():
    counts = [900.0, 90.0, 10.0, 0.0]
    prior = [count / 1000 for count in counts]
    weights = plain(inverse_frequency_weights(counts, prior))
    assert [share * weight for share, weight in zip(prior, weights, strict=True)][:3] == pytest.approx([1 / 3] * 3)
    assert math.isnan(weights[3])


def test_shares_become_weights():
    weights = plain(share_weights([0.5, 0.3, 0.2], [0.8, 0.2, 0.0], limit=1e3))
    # of what training is fed the shares are 0.5 and 0.3 of 0.8
    assert weights[:2] == pytest.approx([0.625 / 0.8, 0.375 / 0.2])
    assert math.isnan(weights[2])


def test_group_dro_step_by_hand():
    new = group_dro_step([0.5, 0.3, 0.2], [1.0, 0.0, NAN], step_size=0.5, floor=0.01)
    raw = 0.5 * math.exp(0.5), 0.3
    assert new[:2] == pytest.approx([0.8 * value / sum(raw) for value in raw])
    assert new[2] == 0.2


def test_absent_groups_keep_their_share_exactly():
    """As public code counts it, an absent group has loss 0 and fades: 1/3 becomes 1e-9 in 200 steps."""
    share = faded = (1 / 3, 1 / 3, 1 / 3)
    for number in range(200):
        loss = (0.9 + 0.2 * (number % 2), 1.1 - 0.2 * (number % 2), NAN)
        share = group_dro_step(share, loss, step_size=0.1, floor=1e-12)
        faded = group_dro_step(faded, (*loss[:2], 0.0), step_size=0.1, floor=1e-12)
    assert share[2] == 1 / 3
    assert math.fsum(share) == pytest.approx(1, abs=1e-12)
    assert faded[2] < 1e-8


def test_absent_groups_may_come_back():
    share = (0.5, 0.25, 0.25)
    share = group_dro_step(share, (1.0, NAN, 0.0), step_size=1.0, floor=0.1)
    assert share[1] == 0.25
    assert group_dro_step(share, (0.0, 1.0, 0.0), step_size=1.0, floor=0.1)[1] > 0.25


@pytest.mark.parametrize("loss", [(NAN, NAN), (1.0, NAN), (math.inf, 1.0)])
def test_a_group_alone_has_nobody_to_take_from(loss):
    assert group_dro_step((0.7, 0.3), loss, step_size=1.0, floor=0.1) == (0.7, 0.3)


def test_no_share_falls_below_the_floor_and_the_sum_stays():
    share = (0.25, 0.25, 0.25, 0.25)
    for _ in range(50):
        share = group_dro_step(share, (5.0, 0.0, 0.1, NAN), step_size=2.0, floor=0.2)
    # of the 0.75 of those present, an even share is 0.25
    assert share == pytest.approx((0.65, 0.05, 0.05, 0.25))
    assert group_dro_step(share, (0.0, 5.0, 0.0, NAN), step_size=2.0, floor=0.2)[1] > 0.05


def test_huge_losses_stay_finite():
    assert group_dro_step((0.5, 0.5), (1e5, 0.0), step_size=10.0, floor=0.1) == pytest.approx((0.95, 0.05))


@st.composite
def cells(draw):
    number = draw(st.integers(1, 7))
    prior = [draw(st.floats(0.01, 1)) for _ in range(number)]
    known = st.one_of(st.just(NAN), st.floats(0, 1))
    return [share / math.fsum(prior) for share in prior], [draw(known) for _ in range(number)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cells(), st.floats(1.1, 50), st.floats(0, 3))
def test_every_policy_preserves_the_prior_and_keeps_the_bounds(situation, limit, strength):
    prior, values = situation
    counts = [0.0 if math.isnan(value) else math.ceil(1000 * value) for value in values]
    for log_weight in (
        difficulty_weights(values, prior, tau=strength, limit=limit),
        effective_number_weights(counts, prior, beta=min(strength, 1.0), limit=limit),
        share_weights([0.1 + 0.0 * share for share in prior], prior, limit=limit),
    ):
        known = [(share, math.exp(value)) for share, value in zip(prior, log_weight, strict=True) if value == value]
        assert math.fsum(share * weight for share, weight in known) == pytest.approx(math.fsum(s for s, _ in known))
        weights = [weight for _, weight in known]
        assert not weights or max(weights) / min(weights) <= limit**2 * (1 + 1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cells(), st.floats(0.01, 20), st.floats(0.01, 0.9))
def test_group_dro_keeps_the_sum_the_order_and_the_absent(situation, step_size, floor):
    share, loss = situation
    new = group_dro_step(share, loss, step_size=step_size, floor=floor)
    assert math.fsum(new) == pytest.approx(1, abs=1e-12)
    assert all(value > 0 for value in new)
    for before, after, value in zip(share, new, loss, strict=True):
        assert not math.isnan(value) or after == before


def test_rows_are_centred_over_the_steered_alone():
    rows = centre_rows([1.0, 2.0, 6.0, 5.0, 1.0, 3.0], 3, [True, True, True, True, False, True])
    assert rows == pytest.approx((-2.0, -1.0, 3.0, 1.0, 1.0, -1.0))
    assert centre_rows([2.0, 5.0], 2, [False, False]) == (2.0, 5.0)


def test_f1_of_another_mixture_against_samples():
    """Repeat each counted sample until the classes have the shares asked for, and count again."""
    confusion, prior = [[8, 1, 1], [2, 6, 2], [1, 3, 1]], [0.6, 0.3, 0.1]
    repeats = [600, 300, 200]  # ten, ten and five samples become 6000, 3000 and 1000
    samples = [
        (label, guess)
        for label, row in enumerate(confusion)
        for guess, count in enumerate(row)
        for _ in range(count * repeats[label])
    ]
    target, guess = np.array(samples).T
    rates = f1_rates(confusion, prior)
    for label in range(3):
        hits = np.sum((target == label) & (guess == label))
        recall, precision = hits / np.sum(target == label), hits / np.sum(guess == label)
        assert rates.recall[label] == pytest.approx(recall)
        assert rates.precision[label] == pytest.approx(precision)
        assert rates.f1[label] == pytest.approx(2 * recall * precision / (recall + precision))
        assert np.sign(rates.excess[label]) == np.sign(recall - precision)
    assert min(rates.excess) < 0 < max(rates.excess)


def test_f1_of_classes_that_are_missed_missing_or_not_fed():
    never = f1_rates([[10, 0, 0], [10, 0, 0], [0, 0, 0]], [0.5, 0.4, 0.1])
    assert (never.f1[1], never.excess[1]) == (0.0, -1.0)
    assert math.isnan(never.precision[1])
    assert math.isnan(never.f1[2])
    wrong = f1_rates([[5, 5], [10, 0]], [0.2, 0.8])
    assert wrong.f1[1] == 0.0
    assert wrong.excess[1] == pytest.approx((0.1 - 0.8) / 0.9)  # no hit: its recall is 0, and still too rare
    unfed = f1_rates([[5, 5], [0, 10]], [1.0, 0.0])
    assert math.isnan(unfed.f1[1])
    assert unfed.f1[0] == pytest.approx(2 / 3)


def test_error_of_f1_is_that_of_repeated_draws():
    generator, prior = np.random.default_rng(0), [0.8, 0.15, 0.05]
    shares, sizes = np.array([[0.9, 0.07, 0.03], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]]), [200, 150, 100]
    draws = [
        f1_rates([generator.multinomial(size, row).tolist() for size, row in zip(sizes, shares, strict=True)], prior).f1
        for _ in range(2000)
    ]
    expected = f1_rates((shares * np.array(sizes)[:, None]).tolist(), prior).f1_error
    assert expected == pytest.approx(np.std(draws, axis=0), rel=0.1)

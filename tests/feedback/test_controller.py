"""One step of the controller: by hand, and what must hold whatever the numbers."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_callbacks.feedback._f1 import F1Rates, f1_rates
from attn_callbacks.feedback.controller import ControllerSettings, ControllerState, control_step, f1_step

NAN = math.nan
PLAIN = ControllerSettings()


def fresh(cells):
    return ControllerState((0.0,) * cells, (NAN,) * cells)


def step(recall, support=None, prior=None, state=None, act=True, **changes):
    support = [1000] * len(recall) if support is None else support
    prior = [1 / len(recall)] * len(recall) if prior is None else prior
    state = fresh(len(recall)) if state is None else state
    return control_step(state, recall, support, prior, replace(PLAIN, **changes), act=act)


def test_first_step_by_hand():
    state = step([0.5, 0.9], [100, 100])
    # mean 0.7, deviations +0.2 and -0.2, log weights +0.4 and -0.4, divided by (e^0.4 + e^-0.4) / 2 = 1.0811
    assert state.average == (0.5, 0.9)
    assert state.weight == pytest.approx((1.4918247 / 1.0810724, 0.6703200 / 1.0810724))
    assert state.weight == pytest.approx((1.3799490, 0.6200510))


def test_second_step_by_hand():
    state = step([0.67, 0.9], state=step([0.5, 0.9]))
    # averages 0.5 + 0.17 * 0.3 / 0.51 = 0.6 and 0.9: deviations +-0.15, but now +-0.115, so +-0.4 and +-0.23
    assert state.average == pytest.approx((0.6, 0.9))
    assert state.settled == pytest.approx((0.51, 0.51))
    assert state.weight == pytest.approx((math.exp(0.63) / math.cosh(0.63), math.exp(-0.63) / math.cosh(0.63)))


def test_average_is_followed_no_further_than_the_last_recalls_go():
    state = step([0.5, 0.7, 0.9], state=step([0.2, 0.7, 0.9]))
    # averages 0.376, 0.7, 0.9, mean 0.659; now 0.5, 0.7, 0.9, mean 0.7: 0.2 of 0.282; none of -0.041; -0.2 of -0.241
    moved = np.array([0.8 + 0.4, -0.2, -0.6 - 0.4])  # 0.4, -0.1 and -0.3 in the first step
    assert state.weight == pytest.approx(np.exp(moved) / np.exp(moved).mean())


@pytest.mark.parametrize("now", [0.92, 0.9])
def test_no_weight_moves_against_or_without_a_present_deviation(now):
    """The average of the first still lies far below, its last recall does not."""
    before = step([0.0, 0.9])
    after = step([now, 0.9], state=before)
    assert after.average[0] < 0.6
    assert after.log_weight == pytest.approx(before.log_weight)


def test_first_report_weighs_no_more_than_the_second():
    state = fresh(1)
    for count, recall in enumerate((0.0, 0.9, 0.8), start=1):
        state = step([recall], state=state)
        weights = 0.7 ** np.arange(count)[::-1]
        assert state.average[0] == pytest.approx(weights @ np.array([0.0, 0.9, 0.8])[:count] / weights.sum())


def test_a_saved_average_without_its_count_has_settled():
    assert step([0.9, 0.9], state=ControllerState((0.0, 0.0), (0.5, NAN))).average == pytest.approx((0.62, 0.9))


@pytest.mark.parametrize(
    ("lag", "epochs", "highest", "gap"), [(0.3, 12, 1.8, 0.02), (0.5, 12, 2.4, 0.06), (0.7, 25, 3.3, 0.02)]
)
def test_a_collapsed_start_does_not_overshoot(lag, epochs, highest, gap):
    """Recalls of two classes respond by a logistic curve, each epoch with some of its lag; 1.5 is balance."""
    ratios, gaps = [], []
    for seed in range(10):
        generator, state, strength, passed = np.random.default_rng(seed), fresh(2), -6.0, []
        for _ in range(epochs):
            passed.append(state.log_weight[1] - state.log_weight[0])
            strength = lag * strength + (1 - lag) * (passed[-1] - 1.5)
            recall = 1 / (1 + np.exp(np.array([strength, -strength]) - 3))
            state = step((generator.binomial(100, recall) / 100).tolist(), [100] * 2, [0.95, 0.05], state)
        ratios.append(max(passed))
        gaps.append(recall[1] - recall[0])
    assert 1.4 < np.mean(ratios) < highest
    assert abs(np.mean(gaps)) < gap  # that of one measurement has a standard error of 0.03


def test_a_class_that_recovers_by_itself_is_left_alone():
    """The recall that was 0 in the first epochs is 0.92 from then on: nothing is left to be corrected."""
    state, ratios = fresh(2), []
    for epoch in range(30):
        state = step([0.0 if epoch < 2 else 0.92, 0.9], [50, 50], state=state)
        ratios.append(state.weight[0] / state.weight[1])
    assert max(ratios) == pytest.approx(ratios[1])
    assert ratios[-1] < 40  # two steps of 0.9; without the second condition the average goes on to 100


def test_three_classes_with_a_skewed_prior_by_hand():
    state = step([0.9, 0.6, 0.3], prior=[0.8, 0.15, 0.05], step_size=1.0)
    # deviations -0.3, 0, +0.3
    scale = 0.8 * math.exp(-0.3) + 0.15 + 0.05 * math.exp(0.3)
    assert state.weight == pytest.approx((math.exp(-0.3) / scale, 1 / scale, math.exp(0.3) / scale))


def test_without_smoothing_the_last_recall_counts():
    assert step([0.8, 0.9], state=step([0.1, 0.9]), smoothing=0.0).average == (0.8, 0.9)


def test_dead_band():
    assert step([0.50, 0.53], [10**6, 10**6]).log_weight == (0.0, 0.0)  # 0.015 from the mean
    assert step([0.50, 0.55], [10**6, 10**6]).log_weight != (0.0, 0.0)
    assert step([0.50, 0.55], [10**6, 10**6], dead_band=0.03).log_weight == (0.0, 0.0)


def test_standard_error_widens_the_dead_band():
    # 0.075 from the mean; standard error of 0.5 on 20 samples 0.107, on 200 samples 0.035
    assert step([0.50, 0.65], [20, 20]).log_weight == (0.0, 0.0)
    assert step([0.50, 0.65], [200, 200]).log_weight[0] > 0


def test_each_cell_has_its_own_dead_band():
    state = step([0.5, 0.65], [10_000, 20], prior=[0.5, 0.5])
    scale = (math.exp(0.15) + 1) / 2
    assert state.weight == pytest.approx((math.exp(0.15) / scale, 1 / scale))


def test_perfect_recall_of_few_samples_is_not_certain():
    # without the added hit and miss the standard error of 1.0 would be 0
    assert step([1.0, 0.95], [20, 20]).log_weight == (0.0, 0.0)


@pytest.mark.parametrize(("recall", "support"), [(NAN, 1000), (0.1, 19), (NAN, 0)])
def test_unmeasured_cell_rests_and_stays_out_of_the_mean(recall, support):
    state = step([0.5, recall, 0.9], [1000, support, 1000], prior=[0.4, 0.2, 0.4])
    alone = step([0.5, 0.9])
    assert state.weight[1] == 1.0
    assert math.isnan(state.average[1])
    assert (state.weight[0], state.weight[2]) == pytest.approx(alone.weight)


def test_cell_that_lost_its_support_keeps_its_average_and_its_place():
    before = step([0.3, 0.9, 0.6])
    after = step([0.6, NAN, 0.6], [1000, 0, 1000], state=before, smoothing=0.0)
    assert after.average[1] == 0.9
    assert after.weight == pytest.approx(before.weight)


def test_warm_up_averages_and_does_not_act():
    state = step([0.2, 0.9], act=False)
    assert state.log_weight == (0.0, 0.0)
    assert step([0.4, 0.9], state=state, act=False).average == pytest.approx((0.2 + 0.2 / 1.7, 0.9))


def test_bounds_before_normalisation():
    state = step([0.0, 1.0], prior=[0.5, 0.5], step_size=100.0)
    assert state.weight == pytest.approx((10 / 5.05, 0.1 / 5.05))
    assert step([0.0, 1.0], step_size=100.0, limit=2.0).weight == pytest.approx((2 / 1.25, 0.5 / 1.25))


def test_one_measured_cell_has_nobody_to_differ_from():
    assert step([0.1, NAN]).log_weight == (0.0, 0.0)


def test_nothing_measured_changes_nothing():
    before = step([0.2, 0.9])
    assert step([NAN, NAN], state=before).weight == pytest.approx(before.weight)


def test_training_without_the_steered_cells_is_not_divided_by_zero():
    assert step([0.5, 0.9, NAN], prior=[0.0, 0.0, 1.0]).weight == pytest.approx((math.exp(0.4), math.exp(-0.4), 1.0))


def test_steady_bias_settles_at_the_bounds():
    state = fresh(2)
    for _ in range(200):
        state = step([0.2, 0.9], prior=[0.05, 0.95], state=state)
    scale = 0.05 * 10 + 0.95 * 0.1
    assert state.weight == pytest.approx((10 / scale, 0.1 / scale))


CELLS = st.integers(1, 7)


@st.composite
def situations(draw):
    """A state reached in some steps of any recalls, and the next step from it."""
    cells = draw(CELLS)
    prior = [draw(st.floats(0.01, 1)) for _ in range(cells)]
    prior = [share / math.fsum(prior) for share in prior]
    recall = st.one_of(st.just(NAN), st.floats(0, 1))
    steps = [
        ([draw(recall) for _ in range(cells)], [draw(st.integers(0, 500)) for _ in range(cells)])
        for _ in range(draw(st.integers(1, 4)))
    ]
    return prior, steps, draw(st.floats(0.1, 20)), draw(st.floats(1.5, 50))


def walk(situation, order=None):
    prior, steps, step_size, limit = situation
    chosen = ControllerSettings(step_size=step_size, limit=limit)
    order = range(len(prior)) if order is None else order
    states = [fresh(len(prior))]
    for recall, support in steps:
        moved = ([values[i] for i in order] for values in (recall, support, prior))
        states.append(control_step(states[-1], *moved, chosen))
    return states


@settings(max_examples=60, deadline=None, derandomize=True)
@given(situations())
def test_expected_weight_stays_one(situation):
    for state in walk(situation):
        total = math.fsum(share * weight for share, weight in zip(situation[0], state.weight, strict=True))
        assert total == pytest.approx(1, abs=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(situations())
def test_ratio_of_steered_weights_stays_within_the_bounds(situation):
    """Normalisation divides all by one number, so it is their ratio that the bounds before it show in."""
    for state in walk(situation):
        weights = [w for w, average in zip(state.weight, state.average, strict=True) if not math.isnan(average)]
        assert all(math.isfinite(weight) and weight > 0 for weight in state.weight)
        assert not weights or max(weights) / min(weights) <= situation[3] ** 2 * (1 + 1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(situations())
def test_never_measured_cells_are_never_touched(situation):
    _, steps, _, _ = situation
    for cell, weight in enumerate(walk(situation)[-1].weight):
        if all(math.isnan(recall[cell]) or support[cell] < 20 for recall, support in steps):
            assert weight == 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(situations(), st.randoms(use_true_random=False))
def test_order_of_the_cells_does_not_matter_to_the_last_bit(situation, random):
    order = list(range(len(situation[0])))
    random.shuffle(order)
    straight, shuffled = walk(situation)[-1], walk(situation, order)[-1]
    assert shuffled.log_weight == tuple(straight.log_weight[i] for i in order)
    assert str(shuffled.average) == str(tuple(straight.average[i] for i in order))  # NaN differs from itself


@settings(max_examples=60, deadline=None, derandomize=True)
@given(situations())
def test_lower_recall_never_gets_the_lower_push(situation):
    state = walk(situation)[-1]
    cells = len(state.average)
    recall = [0.5 if math.isnan(average) else average for average in state.average]
    pushed = control_step(fresh(cells), recall, [10**6] * cells, situation[0], PLAIN)
    ranked = sorted(range(cells), key=lambda cell: recall[cell])
    for low, high in pairwise(ranked):
        assert pushed.log_weight[low] >= pushed.log_weight[high] - 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_size": 0}, "`step_size` must be above 0 and finite, got 0"),
        ({"step_size": NAN}, "`step_size` must be above 0"),
        ({"smoothing": 1.0}, r"`smoothing` must lie in \[0, 1\), got 1.0"),
        ({"smoothing": -0.1}, "`smoothing`"),
        ({"limit": 1.0}, "`limit` must be above 1 and finite, got 1.0"),
        ({"limit": math.inf}, "`limit` must be above 1"),
        ({"min_support": 0}, "`min_support` must be at least 1, got 0"),
        ({"dead_band": -0.1}, "`dead_band` must lie between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ControllerSettings(**changes)


@pytest.mark.parametrize("name", ["step_size", "smoothing", "limit", "dead_band"])
@pytest.mark.parametrize("value", ["a", None, True, [0.5]])
def test_settings_that_are_no_number_are_refused(name, value):
    with pytest.raises(TypeError, match=rf"`{name}` must be a number, got {re.escape(repr(value))}\."):
        ControllerSettings(**{name: value})


def test_numbers_of_numpy_are_numbers():
    assert ControllerSettings(step_size=np.float32(2.0), smoothing=0, limit=np.int64(10)) == replace(PLAIN, smoothing=0)


# --- margins within groups ---------------------------------------------------------------------------------------


def test_rows_by_hand():
    state = control_step(fresh(4), [0.9, 0.5, 0.8, 0.6], [1000] * 4, [0.25] * 4, PLAIN, width=2)
    # deviations from 0.7 of -0.2, 0.2, -0.1, 0.1, twice
    assert state.log_weight == pytest.approx((-0.4, 0.4, -0.2, 0.2))


def test_a_row_that_is_worse_as_a_whole_stays_and_never_saturates():
    """Uncentred, all its cells would rise to the bound, and their differences be gone."""
    state = fresh(4)
    for _ in range(50):
        state = control_step(state, [0.95, 0.95, 0.3, 0.3], [1000] * 4, [0.25] * 4, PLAIN, width=2)
    assert state.log_weight == pytest.approx((0.0,) * 4, abs=1e-12)
    state = control_step(state, [0.95, 0.95, 0.5, 0.3], [1000] * 4, [0.25] * 4, replace(PLAIN, smoothing=0.0), width=2)
    assert state.log_weight == pytest.approx((0.0, 0.0, -0.2, 0.2))


def test_rows_against_arrays():
    generator = np.random.default_rng(0)
    state, log_weight, weighed = fresh(6), np.zeros((2, 3)), np.zeros((2, 3))
    for count in range(1, 13):
        recall = generator.uniform(size=(2, 3))
        state = control_step(state, recall.ravel().tolist(), [10**7] * 6, [1 / 6] * 6, PLAIN, width=3)
        weighed = 0.7 * weighed + 0.3 * recall
        error = (weighed.mean() - weighed) / (1 - 0.7**count)
        error = np.where(np.abs(error) > 0.02, error, 0)
        error -= error.mean(axis=1, keepdims=True)
        now = recall.mean(axis=1, keepdims=True) - recall
        move = np.sign(error) * np.minimum(np.abs(error), np.abs(now))
        log_weight = log_weight + 2 * np.where(error * now > 0, move, 0)
        log_weight = (log_weight - log_weight.mean(axis=1, keepdims=True)).clip(-np.log(10), np.log(10))
        log_weight -= log_weight.mean(axis=1, keepdims=True)
        assert state.log_weight == pytest.approx(log_weight.ravel())
    assert np.abs(log_weight).max() > 1


def test_rows_are_compared_with_the_present_within_themselves():
    """Both cells of the first row are below the mean of all, but the one with the lower average is now the better."""
    before = control_step(fresh(4), [0.1, 0.5, 0.9, 0.9], [1000] * 4, [0.25] * 4, PLAIN, width=2)
    after = control_step(before, [0.6, 0.5, 0.9, 0.9], [1000] * 4, [0.25] * 4, PLAIN, width=2)
    assert after.average[0] < after.average[1]
    assert after.log_weight == pytest.approx(before.log_weight)


def test_cells_of_a_row_that_were_never_measured_rest():
    state = control_step(fresh(6), [0.9, NAN, 0.5, 0.9, NAN, NAN], [1000] * 6, [1 / 6] * 6, PLAIN, width=3)
    assert state.log_weight[1] == 0.0
    assert state.log_weight[0] == -state.log_weight[2] < 0
    assert state.log_weight[3:] == (0.0, 0.0, 0.0)  # one cell alone has none to differ from


@settings(max_examples=40, deadline=None, derandomize=True)
@given(situations(), situations())
def test_rows_are_centred_and_bounded(first, second):
    cells = min(len(first[0]), len(second[0]))
    chosen, state = ControllerSettings(step_size=first[2], limit=first[3]), fresh(2 * cells)
    for (upper, some), (lower, others) in zip(first[1], second[1], strict=False):
        recall, support = upper[:cells] + lower[:cells], some[:cells] + others[:cells]
        state = control_step(state, recall, support, [1 / (2 * cells)] * (2 * cells), chosen, width=cells)
        for row in (slice(cells), slice(cells, 2 * cells)):
            assert math.fsum(state.log_weight[row]) == pytest.approx(0, abs=1e-9)
            assert max(state.log_weight[row]) - min(state.log_weight[row]) <= 2 * math.log(first[3]) + 1e-9


# --- F1 ----------------------------------------------------------------------------------------------------------


def rates(f1, excess, error=0.0):
    return F1Rates(tuple(f1), (error,) * len(f1), tuple(f1), tuple(f1), tuple(excess))


def f1_moves(f1, excess, support=None, state=None, error=0.0, **changes):
    cells = len(f1)
    state = fresh(cells) if state is None else state
    chosen = replace(PLAIN, **changes)
    return f1_step(state, rates(f1, excess, error), support or [1000] * cells, [1 / cells] * cells, chosen)


def test_f1_by_hand():
    state = f1_moves([0.9, 0.5, 0.4], [0.0, -0.3, 0.5], step_size=1.0)
    # mean 0.6: the best stays, 0.1 more for what is predicted too rarely, 0.2 less for what is too often
    scale = (1 + math.exp(0.1) + math.exp(-0.2)) / 3
    assert state.weight == pytest.approx((1 / scale, math.exp(0.1) / scale, math.exp(-0.2) / scale))
    assert state.average == (0.9, 0.5, 0.4)
    assert state.excess == (0.0, -0.3, 0.5)


def test_the_direction_is_averaged_too():
    state = f1_moves([0.9, 0.5], [0.0, -0.6], smoothing=0.5)
    after = f1_moves([0.9, 0.5], [0.0, -0.3], smoothing=0.5, state=state)
    assert after.excess == pytest.approx((0.0, -0.4))
    assert after.weight[1] > state.weight[1]
    assert f1_moves([0.9, 0.5], [0.0, 0.4], smoothing=0.0, state=state).weight[1] < state.weight[1]


@pytest.mark.parametrize(("f1", "over"), [([0.9, 0.5], 0.2), ([0.9, 0.95], -0.3), ([0.9, 0.5], 0.0)])
def test_f1_moves_nothing_against_the_last_report(f1, over):
    """On average it lies below the mean, predicted too rarely; the last report alone would not raise it."""
    state = f1_moves([0.9, 0.3], [0.0, -0.6])
    after = f1_moves(f1, [0.0, over], state=state)
    assert after.average[1] < after.average[0] - 0.1
    assert after.excess[1] < -0.1
    assert after.log_weight == pytest.approx(state.log_weight)


def test_f1_rests():
    moving = {"f1": [0.9, 0.5], "excess": [0.0, -0.3]}
    assert f1_moves(**moving).log_weight[1] > 0
    for changes in ({"error": 0.21}, {"dead_band": 0.21}, {"support": [1000, 19]}):
        assert f1_moves(**{**moving, **changes}).log_weight == (0.0, 0.0)
    assert f1_moves([0.9, 0.5], [0.0, 0.02]).log_weight == (0.0, 0.0)  # recall and precision are balanced
    assert f1_moves([0.9, NAN, 0.5], [0.0, NAN, -0.3]).log_weight[1] == 0.0
    idle = f1_step(fresh(2), rates(**moving), [1000] * 2, [0.5] * 2, PLAIN, act=False)
    assert idle.log_weight == (0.0, 0.0)
    assert (idle.average, idle.excess) == ((0.9, 0.5), (0.0, -0.3))


def test_f1_keeps_bounds_and_expected_weight():
    state, prior = fresh(3), [0.9, 0.07, 0.03]
    for _ in range(60):
        state = f1_step(state, rates([0.9, 0.2, 0.3], [0.0, -0.9, 0.9]), [1000] * 3, prior, PLAIN)
        assert math.fsum(np.multiply(prior, state.weight)) == pytest.approx(1)
    assert state.weight[1] / state.weight[2] == pytest.approx(100)


LONG_TAIL = np.array([0.70, 0.20, 0.07, 0.03])


def softmax_confusion(log_weight):
    """Shares of predictions by class of a softmax that fits four overlapping bells, and then has its logits shifted."""
    inputs = np.linspace(-4, 10, 701)
    bells = np.exp(-0.5 * (inputs - 1.5 * np.arange(4)[:, None]) ** 2)
    bells /= bells.sum(axis=1, keepdims=True)
    predicted = (np.log(bells) + np.log(LONG_TAIL)[:, None] + np.array(log_weight)[:, None]).argmax(axis=0)
    return np.stack([bells[:, predicted == label].sum(axis=1) for label in range(4)], axis=1)


def macro_f1(shares):
    mixed = shares * LONG_TAIL[:, None]
    return float(np.mean(2 * np.diag(mixed) / (mixed.sum(axis=0) + mixed.sum(axis=1))))


def drawn(generator, size, shares):
    return np.array([generator.multinomial(size, row / row.sum()) for row in shares])


@pytest.mark.parametrize("size", [25, 200])
def test_under_a_long_tail_macro_f1_rises_where_equal_recalls_lower_it(size):
    """The monitor has as many of each class; training and test have not."""
    prior, start = LONG_TAIL.tolist(), macro_f1(softmax_confusion([0.0] * 4))
    scores = []
    for seed in range(8):
        generator, by_recall, by_f1 = np.random.default_rng(seed), fresh(4), fresh(4)
        for epoch in range(30):
            counts = drawn(generator, size, softmax_confusion(by_recall.log_weight))
            by_recall = control_step(by_recall, (np.diag(counts) / size).tolist(), [size] * 4, prior, PLAIN)
            seen = f1_rates(drawn(generator, size, softmax_confusion(by_f1.log_weight)).tolist(), prior)
            by_f1 = f1_step(by_f1, seen, [size] * 4, prior, PLAIN)
            if epoch >= 20:
                scores.append([macro_f1(softmax_confusion(state.log_weight)) for state in (by_recall, by_f1)])
    equal, better = np.mean(scores, axis=0)
    assert start == pytest.approx(0.614, abs=0.001)
    assert equal < start - 0.015
    assert better > start + (-0.002 if size == 25 else 0.01)  # so few samples show what to avoid, and hardly more

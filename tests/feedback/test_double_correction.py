"""Double correction: the effective prior, and when it is too much."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_callbacks.feedback.double_correction import double_correction, effective_prior
from losses import LogitAdjustedLoss

RARE = torch.tensor([[900, 100]])
EQUAL = torch.tensor([[0.5, 0.5]])
INVERSE = torch.tensor([0.2, 1.8])
LOG_PRIOR = torch.tensor([0.9, 0.1]).log()
CLASSES = ("ham", "spam")


def said(natural, fed, weights=None, adjustment=None, classes=CLASSES, **arguments):
    return double_correction(natural, fed, weights, adjustment, classes=classes, **arguments)


@settings(max_examples=40, deadline=None)
@given(
    *(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.sampled_from([None, "class", "group"])),
    st.integers(0, 10**6),
)
def test_effective_prior_against_loops(groups, classes, by_group, adjusted, seed):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 50, (groups, classes))
    counts[0, 0] = 1
    weights = random.uniform(0.1, 5, (groups, classes) if by_group else (classes,))
    adjustment = random.normal(0, 2, (groups, classes) if adjusted == "group" else (classes,))
    margins = np.broadcast_to(adjustment, (groups, classes))
    expected = np.zeros((groups, classes))
    for group, label in itertools.product(range(groups), range(classes)):
        weight = weights[group, label] if by_group else weights[label]
        expected[group, label] = counts[group, label] * weight * (math.exp(-margins[group, label]) if adjusted else 1)
    got = effective_prior(torch.tensor(counts), torch.tensor(weights), torch.tensor(adjustment) if adjusted else None)
    np.testing.assert_allclose(got.numpy(), expected / expected.sum(), atol=1e-12)


def test_effective_prior_of_a_class_that_is_not_fed():
    adjustment = torch.tensor([0.5, 0.5, 0.0]).log()
    assert effective_prior(torch.tensor([[5, 5, 0]]), adjustment=adjustment).tolist() == [[0.5, 0.5, 0.0]]
    large = effective_prior(torch.tensor([[5.0, 5.0, 0.0]]), adjustment=torch.tensor([900.0, 900.0, -900.0]))
    assert large.tolist() == [[0.5, 0.5, 0.0]]


def test_logit_adjustment_alone_is_balance():
    adjusted = LogitAdjustedLoss([900, 100])
    torch.testing.assert_close(effective_prior(RARE, adjustment=adjusted.adjustment), EQUAL.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fed", "weights", "adjustment"),
    [
        (RARE, None, None),
        (EQUAL, None, None),
        (RARE, INVERSE, None),
        (RARE, None, LOG_PRIOR),
        (EQUAL, torch.full((2,), 0.2), torch.full((2,), 3.0)),
    ],
)
def test_one_means_is_no_double_correction(fed, weights, adjustment):
    assert said(RARE, fed, weights, adjustment) is None


def test_more_than_balance_by_one_means_is_no_double_correction():
    assert said(RARE, RARE, torch.tensor([0.001, 1.0])) is None


def test_sampling_and_weights():
    assert said(RARE, EQUAL, INVERSE) == (
        "Class spam is corrected more than once: its share is multiplied by sampling (5.0) and class weights (1.8), "
        "as if 0.90 of the data were of it, where 0.50 is balance. Keep one of them."
    )


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_the_scale_of_weights_and_the_offset_of_margins_mean_nothing(scale):
    assert said(RARE, EQUAL, scale * INVERSE) == said(RARE, EQUAL, INVERSE)
    assert said(RARE, EQUAL, None, LOG_PRIOR + scale) == said(RARE, EQUAL, None, LOG_PRIOR)
    assert said(RARE, 1000 * EQUAL, INVERSE) == said(RARE, EQUAL, INVERSE)


def test_sampling_and_margins():
    text = said(RARE, EQUAL, None, LOG_PRIOR)
    # the margins divide by the prior: 0.5 / 0.9 against 0.5 / 0.1
    assert "multiplied by sampling (5.0) and the logit adjustment (1.8), as if 0.90 of" in text


def test_sampling_and_margins_by_group():
    natural = torch.tensor([[450, 50], [250, 250]])
    criterion = LogitAdjustedLoss(natural)
    fed = torch.tensor([[0.25, 0.25], [0.25, 0.25]])
    assert said(natural, natural, adjustment=criterion.adjustment, groups=("web", "mail")) is None
    text = said(natural, fed, adjustment=criterion.adjustment, groups=("web", "mail"))
    assert text.startswith(
        "Group web, class spam is corrected more than once: its share is multiplied by sampling (5.0)"
    )


def test_weights_and_margins_without_a_sampler():
    text = said(RARE, RARE, torch.tensor([1.0, 9.0]), LOG_PRIOR)
    assert "class weights (5.0) and the logit adjustment (5.0), as if 0.90 of the data" in text


def test_all_three():
    text = said(RARE, EQUAL, INVERSE, LOG_PRIOR)
    assert "sampling (5.0) and class weights (1.8) and the logit adjustment (1.8), as if 0.99" in text


def test_weights_that_take_the_sampling_back():
    assert said(RARE, EQUAL, torch.tensor([1.8, 0.2])) is None


def test_the_factor_is_one_of_odds():
    weights = torch.tensor([1.0, 2.9])  # odds of balance: 1 to 1
    assert said(RARE, EQUAL, weights, factor=3.0) is None
    assert said(RARE, EQUAL, weights, factor=2.8) is not None
    assert said(RARE, EQUAL, torch.tensor([1.0, 1.05]), factor=1.0) is None  # hardly a lift


def test_only_a_cell_that_is_rare_and_there_is_named():
    natural = torch.tensor([[48, 2], [0, 50]])
    fed = torch.tensor([[1 / 3, 1 / 3], [0.0, 1 / 3]])
    text = said(natural, fed, torch.tensor([[1.0, 9.0], [50.0, 1.0]]), groups=("Amazon", "Tweets"))
    assert text.startswith("Group Amazon, class spam is corrected more than once: ")
    assert "by sampling (16.7) and class weights (" in text
    assert "0.82 of the data were of it, where 0.33 is balance" in text
    # the loss lifts a cell that sampling lowers: no double correction
    assert said(natural, fed, torch.tensor([[9.0, 1.0], [1.0, 1.0]]), groups=("Amazon", "Tweets")) is None
    # both lift a cell that was common before
    common = torch.tensor([[60, 40]])
    assert said(common, torch.tensor([[0.8, 0.2]]), torch.tensor([9.0, 1.0])) is None


def test_a_cell_that_is_not_there_is_left_out():
    natural, fed, weights = torch.tensor([[9, 9, 0]]), torch.ones(1, 3), torch.tensor([0.1, 0.1, 5.0])
    assert said(natural, fed, weights, classes=("a", "b", "c")) is None
    assert said(torch.tensor([[9, 9, 1]]), fed, weights, classes=("a", "b", "c")) is not None
    assert said(torch.tensor([[9, 0]]), torch.tensor([[9, 0]]), INVERSE, LOG_PRIOR) is None


def test_the_cell_furthest_beyond_is_named():
    natural, fed = torch.tensor([[80, 10, 10]]), torch.tensor([[1, 1, 1]])
    text = said(natural, fed, torch.tensor([1.0, 10.0, 20.0]), classes=("a", "b", "c"))
    assert text.startswith("Class c ")


def test_training_is_not_touched():
    weights = INVERSE.clone().requires_grad_()
    prior = effective_prior(EQUAL, weights)
    assert (prior.requires_grad, prior.dtype, prior.device.type) == (False, torch.float64, "cpu")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: effective_prior(torch.tensor([1.0, 2.0])), "`counts` must have 2 axes, got shape (2,)"),
        (lambda: effective_prior(torch.zeros(1, 2)), "`counts` must have a cell above 0"),
        (lambda: effective_prior(RARE, torch.ones(3)), "`weights` must have shape (2,) or (1, 2), got (3,)"),
        (
            lambda: effective_prior(RARE, adjustment=torch.ones(3)),
            "`adjustment` must have shape (2,) or (1, 2), got (3,)",
        ),
        (lambda: said(RARE, torch.ones(2, 2)), "`natural` and `fed` must have shape (groups, classes)"),
        (lambda: said(RARE, EQUAL, groups=("a", "b")), "got (1, 2) and (1, 2) for 2 `classes` and 2 `groups`"),
        (lambda: said(RARE, torch.zeros(1, 2)), "`fed` must have a cell above 0"),
    ],
)
def test_wrong_arguments(call, text):
    with pytest.raises(ValueError, match="must have") as raised:
        call()
    assert text in str(raised.value)

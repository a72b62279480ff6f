"""Smoothed labels against cross entropy's own smoothing, in every shape, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from losses.classification import LabelSmoothing, smooth_labels


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.floats(0, 1), st.integers(0, 999))
def test_every_column_is_a_distribution_that_peaks_at_the_label(classes, shape, smoothing, seed):
    target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    soft = smooth_labels(target, classes, smoothing)
    assert soft.shape == (shape[0], classes, *shape[1:])
    torch.testing.assert_close(soft.sum(1), torch.ones(shape))
    even = F.one_hot(target, classes).movedim(-1, 1) * (1 - smoothing) + smoothing / classes
    torch.testing.assert_close(soft, even.float())


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
def test_cross_entropy_of_them_is_cross_entropy_with_smoothing(positions):
    logits, target = torch.randn(4, 5, *positions), torch.randint(5, (4, *positions))
    expected = F.cross_entropy(logits, target, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(F.cross_entropy(logits, LabelSmoothing(5, 0.3)(target), reduction="none"), expected)


def test_no_smoothing_is_one_hot():
    target = torch.tensor([2, 0], dtype=torch.int32)
    assert torch.equal(smooth_labels(target, 3, 0.0), F.one_hot(target.long(), 3).float())


def test_repr_builds_it_again():
    assert repr(LabelSmoothing(3)) == "LabelSmoothing(3, smoothing=0.1)"


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_labels_that_are_no_class_are_refused(label):
    with pytest.raises(ValueError, match=rf"`target` must lie between 0 and 2, got {label}"):
        LabelSmoothing(3)(torch.tensor([0, label]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, r"`num_classes` must be at least 1, got 0"),
        ({"num_classes": 2, "smoothing": 1.5}, r"`smoothing` must be a finite number, between 0 and 1, got 1.5"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        LabelSmoothing(**arguments)
    with pytest.raises(ValueError, match=message):
        smooth_labels(torch.tensor([0]), **arguments)


def test_wrong_targets():
    with pytest.raises(TypeError, match=r"`target` must hold integer class indices, got torch.float32"):
        smooth_labels(torch.zeros(2), 3)
    with pytest.raises(TypeError, match=r"`target` must hold integer class indices, got torch.bool"):
        smooth_labels(torch.tensor([True]), 2)
    with pytest.raises(ValueError, match=r"`target` must have shape \(samples, positions...\), got \(\)"):
        smooth_labels(torch.tensor(1), 2)

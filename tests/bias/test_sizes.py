"""The size of a bias, finding or not."""

from __future__ import annotations

import pytest
import torch

from attn_callbacks.bias import AttentionShare, BiasReport, Reliance
from attn_callbacks.bias.sizes import measure, size_of

COUNTS = torch.tensor([[[90, 10], [40, 60]], [[80, 20], [10, 90]], [[3, 1], [1, 3]]])  # the last is too small


def report(scale: int = 1, counts: torch.Tensor = COUNTS) -> BiasReport:
    share = AttentionShare(torch.tensor([0.5, 0.05]), torch.tensor([5.0, 0.5]), torch.tensor([200, 200]))
    few = AttentionShare(torch.tensor([0.5, 0.5]), torch.tensor([5.0, 5.0]), torch.tensor([3, 3]))
    return BiasReport(
        *(0, 0, counts * scale, ("no", "yes"), ("left", "right", "small")),
        attention={"spurious": share, "relevance": share, "odd": few},
        reliance={"spurious": Reliance(torch.tensor([[[10, 0], [30, 60]], [[20, 5], [5, 70]]]))},
    )


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (("class", "yes"), 173 / 204 - 153 / 204),
        (("class", "no"), 153 / 204 - 173 / 204),
        (("group", "left"), 170 / 200 - 150 / 200),
        (("group", "left, yes"), 0.9 - 0.6),
        (("group", "right, no"), 0.9 - 0.8),
        (("feature", "spurious"), 40 / 200),
        (("attention", "spurious, no"), 0.5 - 0.1),
        (("attention", "relevance, yes"), 0.1 - 0.05),
    ],
)
def test_size_is_what_is_missing(key: tuple[str, str], expected: float) -> None:
    assert size_of(report(), key) == pytest.approx(expected)


@pytest.mark.parametrize(
    "key",
    [
        *(("group", "small"), ("group", "small, yes"), ("group", "nowhere"), ("class", "maybe"), ("other", "yes")),
        *(("feature", "odd"), ("attention", "odd, no"), ("attention", "spurious")),
    ],
)
def test_what_was_not_measured_has_no_size(key: tuple[str, str]) -> None:
    assert size_of(report(), key) is None


def test_every_finding_has_its_size_and_error() -> None:
    found = report(10).findings
    assert {finding.kind for finding in found} == {"class", "group", "feature", "attention"}
    for finding in found:
        assert measure(report(10), finding.key) == pytest.approx((finding.size, finding.standard_error))

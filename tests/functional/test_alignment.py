"""Links and their scores against a hand-computed case and loops, with padding, empty rows and causal decoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_callbacks.functional.alignment import alignment_counts, alignment_links, alignment_scores
from attn_callbacks.functional.alignment_shape import (
    ALIGNMENT_QUANTITIES,
    alignment_coverage,
    alignment_monotonicity,
    alignment_ratios,
    coverage_deviation,
)
from tests.functional import alignment_reference as reference

BATCH, HEADS, QUERIES, KEYS = 5, 3, 7, 6


def marked(*places: tuple[int, int], shape: tuple[int, int] = (3, 2)) -> Tensor:
    found = torch.zeros(shape, dtype=torch.bool)
    for place in places:
        found[place] = True
    return found


def sample(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, sure and possible links, real rows and columns; the last sample is nothing but padding."""
    source = torch.Generator().manual_seed(seed)
    weights = torch.rand(BATCH, HEADS, QUERIES, KEYS, generator=source).mul(4).exp()
    rows = torch.arange(QUERIES) < torch.tensor([7, 5, 1, 4, 0])[:, None]
    columns = torch.arange(KEYS) >= torch.tensor([0, 1, 2, 5, 3])[:, None]  # padding at the left
    weights = weights * columns[:, None, None]
    weights[0, 0, 3] = 0  # a row without any weight
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    sure, possible = (torch.rand(BATCH, QUERIES, KEYS, generator=source) < share for share in (0.2, 0.3))
    sure[1] = possible[1] = False  # nobody annotated it
    return weights, sure, possible, rows, columns


def test_hand_computed_error_rate() -> None:
    links, sure = marked((0, 0), (1, 0), (2, 1)), marked((0, 0), (1, 1))
    counts = alignment_counts(links[None, None], sure[None], marked((0, 0), (1, 1), (2, 1))[None])
    assert counts.tolist() == [[[3, 2, 1, 2]]]
    scores = alignment_scores(counts[0, 0])
    assert scores.error_rate.item() == pytest.approx(0.4)
    assert (scores.precision.item(), scores.recall.item()) == pytest.approx((2 / 3, 1 / 2))
    only = alignment_counts(links[None, None], sure[None], marked((2, 1))[None])  # the sure ones are possible, too
    assert torch.equal(only, counts)


def test_all_sure_is_one_minus_f1() -> None:
    weights, sure, _, rows, columns = sample()
    links = alignment_links(weights, query_valid=rows, key_valid=columns)
    scores = alignment_scores(alignment_counts(links, sure, query_valid=rows, key_valid=columns).sum(dim=0))
    f1 = 2 * scores.precision * scores.recall / (scores.precision + scores.recall)
    torch.testing.assert_close(scores.error_rate, 1 - f1)


@pytest.mark.parametrize("method", ["argmax", "mutual"])
def test_links_match_loops(method: str) -> None:
    weights, _, _, rows, columns = sample()
    found = alignment_links(weights, method=method, query_valid=rows, key_valid=columns)
    for number in range(BATCH):
        for head in range(HEADS):
            one = weights[number, head].numpy(), rows[number].numpy(), columns[number].numpy()
            expected = reference.links(*one, mutual=method == "mutual")
            assert {tuple(place) for place in found[number, head].nonzero().tolist()} == expected
    assert found.any()
    assert not found[0, 0, 3].any()  # an empty row
    assert not found[4].any()


@pytest.mark.parametrize("method", ["argmax", "mutual"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_quantity_matches_loops(method: str, seed: int) -> None:
    weights, sure, possible, rows, columns = sample(seed)
    found = alignment_ratios(weights, sure, possible, method=method, query_valid=rows, key_valid=columns)
    for number in range(BATCH):
        for head in range(HEADS):
            gold = sure[number].numpy(), possible[number].numpy()
            real = rows[number].numpy(), columns[number].numpy()
            expected = reference.ratios(weights[number, head].double().numpy(), *gold, *real, method == "mutual")
            assert tuple(expected) == ALIGNMENT_QUANTITIES
            np.testing.assert_allclose(found[number, head], list(expected.values()), rtol=1e-5, atol=1e-6)
    assert (found[1, :, :3] == 0).all()  # without gold links there is no error rate
    assert (found[1, :, 3:, 1] > 0).all()


def test_public_functions_divide_the_ratios() -> None:
    weights, *_, columns = sample()
    links = alignment_links(weights, key_valid=columns)
    x, y = alignment_ratios(weights, key_valid=columns).unbind(dim=-1)
    expected = dict(zip(ALIGNMENT_QUANTITIES, (x / y).unbind(dim=-1), strict=True))
    assert_close(alignment_monotonicity(links), expected["monotonicity"])
    assert_close(alignment_coverage(links, columns), expected["coverage"])
    assert_close(coverage_deviation(weights, key_valid=columns), expected["coverage_deviation"])


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_padding_changes_nothing() -> None:
    weights, sure, possible, *_ = sample()
    cut = alignment_ratios(weights[:, :, :4, 2:], sure[:, :4, 2:], possible[:, :4, 2:])
    masks = {"query_valid": torch.arange(QUERIES) < 4, "key_valid": torch.arange(KEYS) >= 2}
    masks = {name: mask.expand(BATCH, -1) for name, mask in masks.items()}
    torch.testing.assert_close(alignment_ratios(weights, sure, possible, **masks), cut)


def test_causal_self_attention_over_source_and_target() -> None:
    weights = torch.rand(1, 2, 5, 5).tril()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    source = torch.tensor([[True, True, False, False, False]])  # two source tokens, then the target
    links = alignment_links(weights, query_valid=~source, key_valid=source)
    assert not links[:, :, :2].any()
    assert not links[..., 2:].any()
    assert torch.equal(links[:, :, 2:, :2].long().argmax(dim=-1), weights[:, :, 2:, :2].argmax(dim=-1))


def test_links_to_padding_cover_nothing() -> None:
    links = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    assert alignment_coverage(links, torch.tensor([[True, True, False]])).item() == 1
    assert alignment_coverage(links, torch.tensor([[False] * 3])).isnan().all()


def test_monotonicity_passes_over_rows_without_a_link() -> None:
    links = marked((0, 1), (2, 0), (3, 0), (5, 2), shape=(6, 3))
    assert alignment_monotonicity(links[None, None]).item() == pytest.approx(2 / 3)  # 1 -> 0 back, 0 -> 0, 0 -> 2
    assert alignment_monotonicity(marked((1, 0), shape=(6, 3))[None, None]).isnan().all()


def test_several_links_stand_at_their_mean() -> None:
    links = marked((0, 0), (0, 3), (1, 1), shape=(2, 4))  # 1.5, then 1
    assert alignment_monotonicity(links[None, None]).item() == 0


def test_broken_weights_are_zero() -> None:
    weights = torch.tensor([[[[torch.nan, 0.1], [torch.nan, 0.0], [0.25, 0.75]]]])
    assert alignment_links(weights)[0, 0].nonzero().tolist() == [[0, 1], [2, 1]]
    assert alignment_ratios(weights).isfinite().all()


def test_shapes_of_size_zero() -> None:
    assert alignment_ratios(torch.zeros(0, 2, 3, 4), torch.zeros(0, 3, 4).bool()).shape == (0, 2, 7, 2)
    assert (alignment_ratios(torch.zeros(1, 2, 0, 4)) == 0).all()


def test_caller_keeps_his_tensors() -> None:
    weights, sure, possible, rows, columns = sample()
    before = [tensor.clone() for tensor in (weights, sure, possible, rows, columns)]
    alignment_ratios(weights, sure, possible, query_valid=rows, key_valid=columns)
    assert all(map(torch.equal, before, (weights, sure, possible, rows, columns)))


def test_refusals() -> None:
    weights, sure, *_ = sample()
    with pytest.raises(ValueError, match="`method` must be one of 'argmax', 'mutual'"):
        alignment_links(weights, method="max")
    with pytest.raises(ValueError, match="`weights` must have 4 axes"):
        alignment_links(weights[0])
    with pytest.raises(ValueError, match=r"`key_valid` must have shape \(batch, keys\) = \(5, 6\), got \(5, 7\)"):
        alignment_links(weights, key_valid=torch.ones(5, 7))
    with pytest.raises(ValueError, match=r"`query_valid` must have shape \(batch, queries\) = \(5, 7\)"):
        alignment_ratios(weights, query_valid=torch.ones(5, 6))
    with pytest.raises(ValueError, match=r"`sure` must have shape \(batch, queries, keys\) = \(5, 7, 6\)"):
        alignment_ratios(weights, sure.mT)
    with pytest.raises(ValueError, match="`possible` needs `sure`"):
        alignment_ratios(weights, possible=sure)
    with pytest.raises(ValueError, match=r"`counts` must have shape \(..., 4\)"):
        alignment_scores(torch.zeros(3))

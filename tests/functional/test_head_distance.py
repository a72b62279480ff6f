"""Distances between heads against scipy row by row, hand-computed rows, and what must not matter."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from attn_callbacks.functional.divergence import jensen_shannon
from attn_callbacks.functional.head_distance import head_distance, head_drift

scipy_distance = pytest.importorskip("scipy.spatial.distance")
module = importlib.import_module("attn_callbacks.functional.head_distance")  # the package has a function of that name


def maps(batch: int, heads: int, queries: int, keys: int, seed: int = 0, sharpness: float = 3.0) -> torch.Tensor:
    logits = torch.randn(batch, heads, queries, keys, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(sharpness * logits, dim=-1)


def causal(weights: torch.Tensor) -> torch.Tensor:
    masked = weights.tril()
    return masked / masked.sum(dim=-1, keepdim=True)


def reference(weights: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """Root of the mean squared distance by scipy over the rows ``(batch, queries)``, one pair and row at a time."""
    values = weights.double().numpy()
    batch, heads = values.shape[:2]
    found = np.full((batch, heads, heads), np.nan)
    for sample, one, other in np.ndindex(batch, heads, heads):
        squares = [
            scipy_distance.jensenshannon(values[sample, one, row], values[sample, other, row], base=2) ** 2
            for row in np.flatnonzero(rows[sample])
        ]
        if squares:
            found[sample, one, other] = np.sqrt(np.nan_to_num(squares).mean())
    return found


def assert_near(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.double().numpy() ** 2, expected**2, atol=3e-7)


def test_the_rows_of_the_fixture() -> None:
    """Causal [[1, 0], [1/4, 3/4]] against uniform: rows are 0 and 0.0338 nats apart, and row 0 has one key only."""
    weights = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]]])
    mask = torch.ones(2, 2, dtype=torch.bool).tril()
    assert head_distance(weights, allowed=mask)[0, 0, 1].item() == pytest.approx(
        (0.033822 / np.log(2)) ** 0.5, rel=1e-4
    )
    assert head_distance(weights)[0, 0, 1].item() == pytest.approx((0.033822 / 2 / np.log(2)) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("keys", [2, 5, 33])
def test_one_hot_against_uniform_has_a_closed_form(keys: int) -> None:
    weights = torch.stack([torch.eye(keys), torch.full((keys, keys), 1 / keys)])[None]
    divergence = np.log(2) - (np.log(1 + 1 / keys) + np.log(keys + 1) / keys) / 2
    assert head_distance(weights)[0, 0, 1].item() == pytest.approx((divergence / np.log(2)) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (3, 2, 4, 7), (1, 4, 1, 3)])
def test_it_is_scipy_row_by_row(shape: tuple[int, int, int, int]) -> None:
    weights = maps(*shape)
    assert_near(head_distance(weights), reference(weights, np.ones((shape[0], shape[2]), bool)))


def test_padded_and_single_key_rows_leave() -> None:
    weights = causal(maps(3, 3, 6, 6))
    lengths = torch.tensor([6, 4, 1])
    valid = torch.arange(6) < lengths[:, None]
    weights[~valid[:, None].expand(3, 3, 6)] = torch.nan
    expected = reference(weights.nan_to_num(), (valid & (torch.arange(6) > 0)).numpy())
    found = head_distance(weights, allowed=torch.ones(6, 6, dtype=torch.bool).tril(), valid=valid, key_valid=valid)
    assert_near(found[:2], expected[:2])
    assert found[2].isnan().tolist() == [[False, True, True], [True, False, True], [True, True, False]]


def test_weight_on_padded_keys_is_removed() -> None:
    weights = maps(2, 3, 6, 6)
    valid = torch.tensor([[True] * 4 + [False] * 2] * 2)
    cut = weights[:, :, :4, :4]
    expected = head_distance(cut / cut.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(head_distance(weights, valid=valid, key_valid=valid), expected, rtol=1e-5, atol=1e-6)


def test_a_row_without_weight_in_one_head_leaves_its_pairs_only() -> None:
    weights = maps(1, 3, 4, 4)
    weights[0, 0, 1] = 0.0
    found = head_distance(weights)
    rows = np.ones((1, 4), bool)
    assert_near(found[:, 1, 2], reference(weights, rows)[:, 1, 2])
    rows[0, 1] = False
    assert_near(found[:, 0], reference(weights, rows)[:, 0])


def test_heads_of_several_layers_are_numbered_through() -> None:
    layers = [maps(2, 2, 4, 4, seed=1), maps(2, 3, 4, 4, seed=2)]
    assert torch.equal(head_distance(layers), head_distance(torch.cat(layers, dim=1)))


def test_equal_heads_are_at_zero_and_disjoint_ones_at_one() -> None:
    weights = maps(1, 1, 4, 8).repeat(1, 3, 1, 1)
    weights[:, :, :, 4:] = 0
    weights = weights / weights.sum(dim=-1, keepdim=True)
    weights[:, 2] = weights[:, 2].flip(-1)
    found = head_distance(weights)
    assert found[0, 0, 1] == 0
    torch.testing.assert_close(found[0, 2, :2], torch.ones(2))


def test_it_is_a_metric_that_keeps_the_order_of_heads() -> None:
    weights = maps(2, 6, 5, 5)
    found = head_distance(weights)
    assert torch.equal(found, found.mT)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(head_distance(weights[:, order]), found[:, order][:, :, order], rtol=0, atol=1e-6)
    detours = found[:, :, :, None] + found[:, None]  # (batch, from, by, to)
    assert (found[:, :, None] <= detours + 1e-5).all()


@pytest.mark.parametrize("block", [1, 40, 200])
def test_blocks_do_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = maps(3, 4, 5, 5)
    whole, drift = head_distance(weights), head_drift(weights, weights.flip(0))
    monkeypatch.setitem(module._BLOCK, "cpu", block)
    torch.testing.assert_close(head_distance(weights), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head_drift(weights, weights.flip(0)), drift, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_divided_by_its_sum(dtype: torch.dtype) -> None:
    weights = maps(2, 3, 16, 16).to(dtype)
    rows = np.ones((2, 16), bool)
    assert_near(head_distance(weights), reference(weights, rows))  # scipy divides as well


def test_no_gradient_is_kept_and_weights_are_left_alone() -> None:
    weights = maps(1, 2, 3, 3).requires_grad_()
    before = weights.detach().clone()
    found = head_distance(weights, allowed=torch.ones(3, 3, dtype=torch.bool).tril())
    assert not found.requires_grad
    assert torch.equal(weights, before)


def test_drift_is_scipy_and_exact_where_it_is_tiny() -> None:
    before = maps(2, 3, 6, 6).double()
    tilt = torch.linspace(-1, 1, 6, dtype=torch.float64)
    for size in (1.0, 1e-2, 1e-4):
        after = before * (1 + size * tilt)
        after = after / after.sum(dim=-1, keepdim=True)
        found = head_drift(before.float(), after.float()).double().numpy()
        both = torch.stack([before, after], dim=2).flatten(0, 1)  # a sample a head, with its two states
        expected = reference(both, np.ones((6, 6), bool))[:, 0, 1].reshape(2, 3)
        np.testing.assert_allclose(found, expected, rtol=5e-3 if size < 1e-3 else 1e-4)


def test_drift_is_the_distance_of_two_heads() -> None:
    weights = causal(maps(2, 4, 5, 5))
    arguments = {
        "allowed": torch.ones(5, 5, dtype=torch.bool).tril(),
        "valid": torch.arange(5)[None] < torch.tensor([[5], [3]]),
    }
    pairs = head_distance(weights, **arguments)
    found = head_drift(weights[:, :2], weights[:, 2:], **arguments)
    torch.testing.assert_close(found, torch.stack([pairs[:, 0, 2], pairs[:, 1, 3]], dim=1), rtol=1e-4, atol=1e-5)
    assert head_drift(weights, weights).tolist() == [[0.0] * 4] * 2


def test_drift_between_heads_that_share_no_key_is_one() -> None:
    before = torch.stack([torch.eye(6)[:2], torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]]).expand(2, 6)])[None]
    assert head_drift(before, before.roll(2, dims=-1)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("sharpness", [0.5, 3.0, 30.0])
def test_the_three_ways_to_the_divergence_agree(sharpness: float) -> None:
    """In float64, of pairs by entropies, and of two states in float32: each is as exact as its purpose needs."""
    weights = maps(2, 4, 5, 7, sharpness=sharpness)
    own, other = weights[:, :2], weights[:, 2:]
    expected = jensen_shannon(own, other).square().mean(dim=-1)
    pairs = head_distance(weights)
    torch.testing.assert_close(head_drift(own, other).double().square(), expected, rtol=1e-6, atol=1e-9)
    found = torch.stack([pairs[:, 0, 2], pairs[:, 1, 3]], dim=1).double().square()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=3e-7)


def test_drift_without_a_row_is_undefined() -> None:
    weights = maps(2, 2, 3, 3)
    found = head_drift(weights, weights, valid=torch.tensor([[True] * 3, [False] * 3]))
    assert found.isnan().tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 5, 4), (1, 3, 4, 4)])
def test_layers_that_see_something_else_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"same queries and keys, but layer 0 .* layer 1 .* Measure such layers apart"):
        head_distance([maps(2, 3, 4, 4), maps(*shape)])


def test_layers_under_other_masks_are_refused() -> None:
    layers, full = [maps(1, 2, 4, 4), maps(1, 2, 4, 4)], torch.ones(4, 4, dtype=torch.bool)
    assert head_distance(layers, allowed=[full, full[None, None]]).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="the masks of layers 0 and 1 differ"):
        head_distance(layers, allowed=[full, full.tril()])
    with pytest.raises(ValueError, match=r"one a layer \(2\), got 3"):
        head_distance(layers, allowed=[full] * 3)


def test_a_mask_a_head_must_be_the_same_for_all() -> None:
    weights, mask = maps(1, 2, 4, 4), torch.ones(1, 2, 4, 4, dtype=torch.bool).tril()
    assert torch.equal(head_distance(weights, allowed=mask), head_distance(weights, allowed=mask[:, :1]))
    assert torch.equal(head_distance([weights] * 2, allowed=mask), head_distance([weights] * 2, allowed=mask[0, 0]))
    mask[0, 1, 3, 0] = False
    for other in (mask, mask[0]):
        with pytest.raises(ValueError, match="the masks of the heads of layer 0 differ"):
            head_distance(weights, allowed=other)
        with pytest.raises(ValueError, match="the masks of the heads of layer 0 differ"):
            head_drift(weights, weights, allowed=other)
    with pytest.raises(ValueError, match="broadcastable to `weights`"):
        head_distance(weights, allowed=mask[..., :3])


def test_an_expanded_mask_is_not_read() -> None:
    weights = torch.ones(2, 3, 4, 4, device="meta")
    mask = torch.ones(4, 4, dtype=torch.bool, device="meta")
    assert head_distance(weights, allowed=mask.expand(2, 3, 4, 4)).shape == (2, 3, 3)


def test_what_is_no_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="`weights` must have 4 axes"):
        head_distance(torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="at least one layer"):
        head_distance([])
    with pytest.raises(ValueError, match="`valid` must have shape"):
        head_distance(maps(2, 2, 3, 3), valid=torch.ones(2, 4, dtype=torch.bool))
    a_head = torch.ones(2, 2, 3, dtype=torch.bool)
    for measure in (head_distance, lambda weights, valid: head_drift(weights, weights, valid=valid)):
        with pytest.raises(
            ValueError, match=r"`valid` must have .* = \(2, 3\), the same for all heads, got \(2, 2, 3\)"
        ):
            measure(maps(2, 2, 3, 3), valid=a_head)
    with pytest.raises(ValueError, match="`before` and `after` must have one shape"):
        head_drift(maps(2, 2, 3, 3), maps(2, 2, 3, 4))


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 3)])
def test_nothing_in_gives_nothing(shape: tuple[int, ...]) -> None:
    assert head_distance(torch.zeros(shape)).shape == (shape[0], 2, 2)

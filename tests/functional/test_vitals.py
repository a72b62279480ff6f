"""Vitals of heads against loops over rows, padding, half precision and numbers that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.functional.vitals import VITALS, head_vitals, pooled_vitals

ROWS, ENTROPY, CONFIDENCE, KEY_MASS, MAX_LOGIT = range(len(VITALS))


def scores(batch: int = 3, heads: int = 2, queries: int = 5, keys: int = 5, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(batch, heads, queries, keys, generator=torch.Generator().manual_seed(seed))


def masked(logits: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cut = logits.masked_fill(~allowed, -torch.inf)
    return cut.softmax(dim=-1).nan_to_num(), cut


def reference(weights: np.ndarray, logits: np.ndarray, allowed: np.ndarray, valid: np.ndarray) -> np.ndarray:
    batch, heads, queries, _ = weights.shape
    found = np.full((batch, heads, len(VITALS)), np.nan)
    for sample, head in np.ndindex(batch, heads):
        rows = [q for q in range(queries) if valid[sample, q] and allowed[sample, q].sum() > 1]
        entropy, confidence, received, top = [], [], np.zeros(weights.shape[-1]), -np.inf
        for row in rows:
            own = weights[sample, head, row]
            entropy.append(-sum(w * np.log(w) for w in own if w > 0) / np.log(allowed[sample, row].sum()))
            confidence.append(own.max())
            received += own / len(rows)
            top = max(top, logits[sample, head, row][allowed[sample, row]].max())
        if rows:
            found[sample, head] = len(rows), np.mean(entropy), np.mean(confidence), received.max(), top
        else:
            found[sample, head, [ROWS, MAX_LOGIT]] = 0, -np.inf
    return found


def test_the_fixture() -> None:
    weights = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]]])
    found = head_vitals(weights, weights.log(), allowed=torch.ones(2, 2, dtype=torch.bool).tril())
    expected = [[1, 0.8113, 0.75, 0.75, np.log(0.75)], [1, 1, 0.5, 0.5, np.log(0.5)]]
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_they_are_means_over_rows_that_count() -> None:
    lengths = torch.tensor([5, 3, 1])
    valid = torch.arange(5) < lengths[:, None]
    allowed = torch.ones(5, 5, dtype=torch.bool).tril() & valid[:, None]
    logits = scores()
    logits[1, :, 4, 0] = 99.0  # of a padded query
    weights, cut = masked(logits, allowed[:, None])
    found = head_vitals(weights, logits, allowed=allowed[:, None], valid=valid)
    np.testing.assert_allclose(found, reference(*(t.numpy() for t in (weights, cut, allowed, valid))), atol=1e-5)


def test_uniform_and_one_hot_heads() -> None:
    weights = torch.stack([torch.full((4, 4), 0.25), torch.eye(4), torch.eye(4)[[2, 2, 2, 2]]])[None]
    found = head_vitals(weights)[0]
    np.testing.assert_allclose(found[:, ENTROPY], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[:, CONFIDENCE], [0.25, 1, 1])
    np.testing.assert_allclose(found[:, KEY_MASS], [0.25, 0.25, 1])
    assert found[:, MAX_LOGIT].tolist() == [-np.inf] * 3


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_pooling_parts_is_pooling_all(parts: int) -> None:
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    valid = torch.arange(5) < torch.tensor([5, 3, 1, 2])[:, None]
    weights, logits = masked(scores(4), allowed)
    vitals = head_vitals(weights, logits, allowed=allowed, valid=valid)
    whole = pooled_vitals(vitals)
    shares = torch.stack([pooled_vitals(part) for part in vitals.chunk(parts)])
    torch.testing.assert_close(pooled_vitals(shares), whole)
    assert not whole.isnan().any()
    rows = vitals[..., ROWS]
    expected = (vitals[..., ENTROPY].nan_to_num() * rows).sum(0) / rows.sum(0)
    torch.testing.assert_close(whole[:, ENTROPY], expected)
    torch.testing.assert_close(whole[:, KEY_MASS], vitals[[0, 1, 3], :, KEY_MASS].amin(dim=0))
    torch.testing.assert_close(whole[:, MAX_LOGIT], vitals[..., MAX_LOGIT].amax(dim=0))


def test_nothing_to_look_at_is_nan() -> None:
    vitals = head_vitals(torch.ones(2, 2, 3, 1))  # one key: no choice
    assert vitals[..., ROWS].eq(0).all()
    assert pooled_vitals(vitals)[:, 1:].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    logits = scores()
    logits[1, 0, 2, 3] = bad
    pooled = pooled_vitals(head_vitals(logits.softmax(dim=-1), logits))
    assert not pooled[0, [ENTROPY, MAX_LOGIT]].isfinite().any()
    assert pooled[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    logits = scores()
    exact, found = (head_vitals(each.softmax(dim=-1), each) for each in (logits, logits.to(dtype)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.03, rtol=0.01)


def test_no_value_is_read() -> None:
    logits = torch.ones(3, 2, 4, 5, device="meta")
    vitals = head_vitals(logits, logits, allowed=torch.ones(4, 5, dtype=torch.bool, device="meta"))
    assert pooled_vitals(vitals).shape == (2, len(VITALS))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="`weights` must have 4 axes"):
        head_vitals(torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="`logits` must have the shape of `weights`"):
        head_vitals(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4))
    with pytest.raises(ValueError, match="`vitals` must have 3 axes"):
        pooled_vitals(torch.ones(2, 5))

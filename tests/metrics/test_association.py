"""Attention on every token, apart for wrong and right predictions, against a loop."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from attn_callbacks.metrics.association import TokenAssociation, token_attention
from tests.metrics.merging import reduced
from tests.metrics.test_no_wait import assert_updated_in_place, layout

TOKENS, CLASSES = 7, 3


def random_batch(seed: int, samples: int = 25, keys: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    received = torch.rand(samples, keys, generator=generator) ** 3
    tokens = torch.randint(TOKENS, (samples, keys), generator=generator)
    valid = torch.rand(samples, keys, generator=generator) < 0.8
    tokens[~valid] = -5  # what is padded may carry any number
    received[0, 0], valid[0, 0] = torch.nan, False
    received[1, 0], valid[1, 0], tokens[1, 0] = torch.nan, True, 0
    valid[2] = False
    received[3] = 0.0
    right = torch.rand(samples, generator=generator) < 0.6
    target = torch.randint(CLASSES, (samples,), generator=generator)
    target[4] = -100
    return {"received": received, "tokens": tokens, "valid": valid, "right": right, "target": target}


def loop(batches: list[dict[str, torch.Tensor]], strata: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    sums, samples = np.zeros((strata, 2, TOKENS, 3)), np.zeros((strata, 2), dtype=int)
    for batch in batches:
        parts = [batch[name].tolist() for name in ("received", "tokens", "valid", "right", "target")]
        for k, (received, tokens, valid, right, target) in enumerate(zip(*parts, strict=True)):
            if k in (1, 2, 3, 4):
                continue
            length, mass = sum(valid), defaultdict(list)
            for weight, token, real in zip(received, tokens, valid, strict=True):
                if real:
                    mass[token].append(weight)
            total = sum(map(sum, mass.values()))
            samples[target % strata, int(right)] += 1
            for token, weights in mass.items():
                relative = sum(weights) / total / (len(weights) / length)
                attention = relative / (1 + relative)
                sums[target % strata, int(right), token] += 1, attention, attention**2
    return sums, samples


def test_sums_match_a_loop():
    metric, batches = TokenAssociation(TOKENS, CLASSES), [random_batch(seed) for seed in range(3)]
    for batch in batches:
        metric.update(**batch)
    sums, samples = loop(batches)
    result = metric.compute()
    assert (result.sums.dtype, result.samples.dtype) == (torch.float64, torch.int64)
    np.testing.assert_allclose(result.sums, sums, rtol=1e-12)
    assert result.samples.tolist() == samples.tolist()


@pytest.mark.parametrize(("cells", "strata"), [(TOKENS * 3, 3), (TOKENS * 3 - 1, 2), (TOKENS * 2 - 1, 1), (1, 1)])
def test_classes_share_strata_where_cells_are_few(cells, strata):
    metric, batch = TokenAssociation(TOKENS, CLASSES, max_cells=cells), random_batch(0)
    metric.update(**batch)
    assert metric.num_strata == strata
    np.testing.assert_allclose(metric.compute().sums, loop([batch], strata)[0], rtol=1e-12)


def test_uniform_attention_is_one_half_however_often_a_token_comes():
    token, attention = token_attention(
        torch.full((1, 5), 0.25).double(), torch.tensor([[3, 3, 3, 1, 2]]), torch.ones(1, 5).bool()
    )
    assert token.tolist() == [[1, 2, 3, -1, -1]]
    torch.testing.assert_close(attention, torch.tensor([[0.5, 0.5, 0.5, 0.0, 0.0]]).double())


def test_scale_order_and_padding_change_nothing():
    batch = random_batch(0)
    plain, other = TokenAssociation(TOKENS, CLASSES), TokenAssociation(TOKENS, CLASSES)
    plain.update(**batch)
    order = torch.randperm(9)
    for name in ("received", "tokens", "valid"):
        padding = torch.full((25, 3), 2.0).to(batch[name].dtype)
        batch[name] = torch.cat([batch[name][:, order], padding if name != "valid" else padding.bool() & False], dim=1)
    batch["received"] = 8 * batch["received"]
    other.update(**batch)
    torch.testing.assert_close(tuple(plain.compute()), tuple(other.compute()), rtol=1e-12, atol=0)


def test_two_processes_equal_one_on_the_union():
    halves = TokenAssociation(TOKENS, CLASSES), TokenAssociation(TOKENS, CLASSES)
    union = TokenAssociation(TOKENS, CLASSES)
    for k in range(4):
        halves[k % 2].update(**random_batch(k))
        union.update(**random_batch(k))
    torch.testing.assert_close(tuple(reduced(*halves).compute()), tuple(union.compute()), rtol=1e-13, atol=0)


@pytest.mark.parametrize("cells", [1000, TOKENS * 8, TOKENS * 3, TOKENS * 2])
def test_grown_metric_is_one_that_was_large_from_the_start(cells):
    """Also where the strata become fewer on the way: from all 8 to 4, from 2 to 1."""
    grown, large = TokenAssociation(TOKENS, 8, cells), TokenAssociation(10, 8, cells)
    batches = [random_batch(seed) for seed in range(2)]
    for batch in batches:
        batch["target"] = batch["target"] * 2 + 1  # classes 1, 3 and 5
        large.update(**batch)
    with torch.inference_mode():
        grown.update(**batches[0])
        grown.compute()
    grown.grow(TOKENS + 1)
    assert grown.compute().sums.shape[2] == TOKENS + 1
    grown.update(**batches[1])
    grown.grow(10)
    torch.testing.assert_close(tuple(grown.compute()), tuple(large.compute()), rtol=1e-13, atol=0)
    torch.testing.assert_close(grown.packed(), large.packed(), rtol=1e-13, atol=0)
    grown.reset()
    assert grown.sums.shape == large.sums.shape
    assert grown.sums.sum() == 0


def test_update_reads_no_value_off_the_cpu():
    metric = TokenAssociation(TOKENS, CLASSES).to("meta")
    received, labels = torch.ones(4, 5, device="meta").bfloat16(), torch.ones(4, device="meta", dtype=torch.long)
    assert_updated_in_place(metric, received, received.long(), received.bool(), labels.bool(), labels)
    assert layout(metric)["sums"] == ("meta", torch.float64, (CLASSES, 2, TOKENS, 3))


def test_token_out_of_range_counts_nowhere_and_raises_in_compute(monkeypatch):
    metric, batch = TokenAssociation(TOKENS, CLASSES), random_batch(0)
    batch["tokens"][5, batch["valid"][5].nonzero()[0]] = TOKENS
    with monkeypatch.context() as patch:
        patch.setattr(TokenAssociation, "check_labels", lambda self: None)  # as on an accelerator, until compute
        metric.update(**batch)
        kept = batch["valid"][5] & (batch["tokens"][5] < TOKENS)
        row = metric.sums[batch["target"][5], int(batch["right"][5])]
        assert kept.any()
        assert row.isfinite().all()
    with pytest.raises(ValueError, match="`tokens` must lie between 0 and 6, got 7"):
        metric.compute()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"received": torch.ones(2)}, ValueError, "`received` must have 2 axes"),
        ({"tokens": torch.ones(2, 3)}, TypeError, "`tokens` must hold whole-number labels"),
        ({"tokens": torch.ones(3, 2).long()}, ValueError, r"`tokens` must have shape \(batch, keys\) = \(2, 3\)"),
        ({"tokens": torch.full((2, 3), 4)}, ValueError, "`tokens` must lie between 0 and 3, got 4"),
        ({"tokens": torch.full((2, 3), -1)}, ValueError, "`tokens` must lie between 0 and 3, got -1"),
        ({"valid": torch.ones(2, 2).bool()}, ValueError, r"`valid` must have shape \(batch, keys\) = \(2, 3\)"),
        ({"right": torch.ones(3).bool()}, ValueError, r"`right` must have shape \(batch,\) = \(2,\), got \(3,\)"),
        ({"target": torch.tensor([0, 2])}, ValueError, "`target` must lie between 0 and 1, got 2"),
    ],
)
def test_wrong_update_raises(arguments, error, message):
    batch = {"received": torch.ones(2, 3), "tokens": torch.ones(2, 3).long(), "valid": None}
    batch |= {"right": torch.ones(2).bool(), "target": torch.tensor([0, 1]), **arguments}
    with pytest.raises(error, match=message):
        TokenAssociation(4, 2).update(**batch)


def test_wrong_sizes_raise():
    for sizes, name in (((0, 2), "num_tokens"), ((3, 1), "num_classes"), ((3, 2, 0), "max_cells")):
        with pytest.raises(ValueError, match=f"`{name}` must be at least"):
            TokenAssociation(*sizes)
    with pytest.raises(ValueError, match="`num_tokens` must be at least 5, got 4"):
        TokenAssociation(5, 2).grow(4)

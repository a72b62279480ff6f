"""Mean attention by class and relative position, and the distance between classes beyond what chance adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.metrics.class_attention import (
    ClassAttention,
    ClassAttentionResult,
    class_divergence,
    position_bins,
)
from tests.metrics.merging import reduced
from tests.metrics.test_no_wait import assert_updated_in_place, layout


def random_batch(seed: int, samples: int = 20, keys: int = 11, classes: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    received = torch.rand(samples, keys, generator=generator) ** 3
    valid = torch.rand(samples, keys, generator=generator) < 0.7
    valid[0] = False
    received[1, 2], valid[1, 2] = torch.nan, True
    received[2, 3], valid[2, 3] = torch.nan, False  # never looked at
    received[3] = 0.0
    target = torch.randint(classes - 1, (samples,), generator=generator)  # the last class never comes
    target[4] = -1
    return received, valid, target


def spread(received: np.ndarray, valid: np.ndarray, bins: int) -> np.ndarray:
    """Give every valid key its stretch of the way, and every bin its part of the stretch."""
    shares = received[valid].astype(float)
    result, length = np.zeros(bins), len(shares)
    for k, share in enumerate(shares):
        for b in range(bins):
            overlap = min((k + 1) / length, (b + 1) / bins) - max(k / length, b / bins)
            result[b] += share * length * max(0.0, overlap)
    return result / shares.sum()


@pytest.mark.parametrize("bins", [2, 5, 11, 32])
def test_bins_match_a_loop_over_overlaps(bins):
    received, valid, _ = random_batch(0)
    received, valid = received[4:], valid[4:]
    result = position_bins(received, valid, bins)
    assert result.dtype == torch.float64
    for found, shares, taken in zip(result, received.numpy(), valid.numpy(), strict=True):
        np.testing.assert_allclose(found, spread(shares, taken, bins), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(result.sum(dim=1), torch.ones(len(result), dtype=torch.float64))


def test_as_many_bins_as_keys_are_the_keys():
    received = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    assert position_bins(received, None, 4).tolist() == received.tolist()


def test_padding_on_either_side_changes_nothing():
    received, pad = torch.rand(3, 6), torch.rand(3, 4)
    alone = position_bins(received, None, 5)
    valid = torch.cat([torch.ones(3, 6), torch.zeros(3, 4)], dim=1).bool()
    assert torch.equal(position_bins(torch.cat([received, pad], dim=1), valid, 5), alone)
    assert torch.equal(position_bins(torch.cat([pad, received], dim=1), valid.flip(1), 5), alone)


def test_nothing_valid_or_defined_is_nan_and_an_empty_batch_is_empty():
    received, valid, _ = random_batch(0)
    assert position_bins(received, valid, 4).isnan().all(dim=1).nonzero().flatten().tolist() == [0, 1, 3]
    assert position_bins(torch.zeros(0, 5), None, 4).shape == (0, 4)
    assert position_bins(torch.zeros(2, 0), None, 4).isnan().all()


def test_means_and_errors_match_a_loop():
    metric, rows = ClassAttention(3, bins=4), [[], [], []]
    for seed in range(2):
        batch = random_batch(seed)
        metric.update(*batch)
        for k, (received, valid, target) in enumerate(zip(*(part.numpy() for part in batch), strict=True)):
            if k not in (0, 1, 3, 4):
                rows[target].append(spread(received, valid, 4))
    result = metric.compute()
    assert result.support.tolist() == [len(row) for row in rows]
    for label in range(2):
        np.testing.assert_allclose(result.distribution[label], np.mean(rows[label], axis=0))
        error = np.std(rows[label], axis=0, ddof=1) / np.sqrt(len(rows[label]))
        np.testing.assert_allclose(result.error[label], error)
    assert result.distribution[2].isnan().all()


def test_two_processes_equal_one_on_the_union():
    halves, union = (ClassAttention(3), ClassAttention(3)), ClassAttention(3)
    for k in range(4):
        halves[k % 2].update(*random_batch(k))
        union.update(*random_batch(k))
    torch.testing.assert_close(
        tuple(reduced(*halves).compute()), tuple(union.compute()), rtol=1e-11, atol=1e-15, equal_nan=True
    )


def test_update_reads_no_value_off_the_cpu():
    metric = ClassAttention(3, 8).to("meta")
    received = torch.ones(4, 5, device="meta", dtype=torch.bfloat16)
    labels = torch.ones(4, device="meta", dtype=torch.long)
    assert_updated_in_place(metric, received, received.bool(), labels)
    assert layout(metric)["sums"] == ("meta", torch.float64, (3, 8, 2))


def drawn(concentrations: np.ndarray, samples: int, generator: np.random.Generator) -> ClassAttentionResult:
    """One class a row of concentrations, attention of every sample drawn from a Dirichlet distribution."""
    metric = ClassAttention(len(concentrations), concentrations.shape[1])
    for label, row in enumerate(concentrations):
        received = torch.tensor(generator.dirichlet(row, size=samples))
        metric.update(received, None, torch.full((samples,), label))
    return metric.compute()


def test_classes_that_attend_alike_show_no_distance_on_average():
    """Without the correction 30 samples a class and 32 bins show one, all by chance."""
    generator = np.random.default_rng(0)
    result = drawn(np.tile(generator.gamma(1.0, size=32) / 8, (24, 1)), 30, generator)
    pairs = torch.triu_indices(24, 24, 1)
    plain, corrected = (class_divergence(result, corrected=flag)[pairs[0], pairs[1]] for flag in (False, True))
    assert plain.min() > 0.12
    # half of the squared distances are negative before they are cut off: the expected one is zero
    assert 0.3 < (corrected == 0).double().mean() < 0.7
    assert corrected.square().mean() < 0.2 * plain.square().mean()


def test_corrected_distance_of_few_samples_is_that_of_many():
    generator = np.random.default_rng(0)
    first, other = generator.gamma(1.0, size=(2, 16)) / 4
    concentrations = np.repeat([first, 0.7 * first + 0.3 * other], 20, axis=0)
    true = class_divergence(drawn(concentrations[[0, 20]], 20_000, generator))[0, 1]
    result = drawn(concentrations, 25, generator)
    plain, found = (class_divergence(result, corrected=flag)[:20, 20:] for flag in (False, True))
    assert found.square().mean().sqrt().item() == pytest.approx(true.item(), rel=0.1)  # cut off at zero, a little more
    assert plain.square().mean().sqrt() > 1.25 * true


def test_class_below_support_has_no_distance():
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [torch.nan, torch.nan]]).double()
    result = ClassAttentionResult(shares, torch.zeros_like(shares), torch.tensor([20, 20, 19, 0]))
    distance = class_divergence(result)
    assert distance[:2, :2].tolist() == [[0, 1], [1, 0]]
    assert distance[2:].isnan().all()
    assert distance[:, 2:].isnan().all()
    assert not class_divergence(result, min_support=19)[:3, :3].isnan().any()


def test_single_sample_has_a_distance_but_no_correction():
    metric = ClassAttention(2, 2)
    metric.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), None, torch.tensor([0, 1]))
    assert class_divergence(metric.compute(), min_support=1).isnan().all()
    assert class_divergence(metric.compute(), min_support=1, corrected=False).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"received": torch.ones(2)}, "`received` must have 2 axes"),
        ({"valid": torch.ones(2, 4).bool()}, r"`valid` must have shape \(batch, keys\) = \(2, 3\), got \(2, 4\)"),
        ({"target": torch.tensor([0])}, r"`target` must have shape \(samples,\) = \(2,\)"),
        ({"target": torch.tensor([0, 2])}, "`target` must lie between 0 and 1, got 2"),
    ],
)
def test_wrong_update_raises(arguments, message):
    batch = {"received": torch.ones(2, 3), "valid": None, "target": torch.tensor([0, 1]), **arguments}
    with pytest.raises(ValueError, match=message):
        ClassAttention(2).update(**batch)


def test_wrong_sizes_raise():
    with pytest.raises(ValueError, match="`bins` must be at least 2, got 1"):
        ClassAttention(2, 1)
    with pytest.raises(ValueError, match="`min_support` must be at least 1, got 0"):
        class_divergence(ClassAttentionResult(*torch.zeros(3, 2, 2)), min_support=0)

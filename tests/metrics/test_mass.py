"""Attention mass by class against a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attn_callbacks.functional import attention_mass, target_share
from attn_callbacks.metrics.mass import ClassMass, ClassMassResult
from tests.metrics.merging import reduced
from tests.metrics.test_no_wait import assert_updated_in_place, layout


def random_batch(seed: int, samples: int = 30, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(samples, 2, generator=generator)
    share = torch.rand(samples, generator=generator)
    target = torch.randint(classes - 1, (samples,), generator=generator)  # the last class never comes
    mass[0] = torch.nan
    mass[1, 0] = torch.nan
    share[2], share[3] = 0.0, torch.nan
    target[4] = -1
    return mass, share, target


def test_masses_match_a_loop():
    metric = ClassMass(3)
    sums = np.zeros((3, 3))
    for seed in range(2):
        batch = random_batch(seed)
        metric.update(*batch)
        for mass, share, target in zip(*(part.tolist() for part in batch), strict=True):
            heads = [value for value in mass if not math.isnan(value)]
            if heads and share > 0 and target >= 0:
                sums[target] += sum(heads) / len(heads), share, 1
    result = metric.compute()
    assert result.support.tolist() == sums[:, 2].tolist()
    assert sums[2, 2] == 0
    np.testing.assert_allclose(result.mass[:2], sums[:2, 0] / sums[:2, 2])
    np.testing.assert_allclose(result.lift[:2], sums[:2, 0] / sums[:2, 1])
    np.testing.assert_allclose(result.share[:2], sums[:2, 1] / sums[:2, 2])
    assert result.mass[2].isnan()
    assert result.lift[2].isnan()
    assert result.share[2].isnan()


def with_outcome(seed: int) -> tuple[torch.Tensor, ...]:
    mass, share, target = random_batch(seed)
    right = torch.rand(len(mass), generator=torch.Generator().manual_seed(100 + seed)) < 0.6
    return mass, share, target, right


def counted(batches: list[tuple[torch.Tensor, ...]]) -> list[tuple[float, float, int, bool]]:
    """Mass, share, target and outcome of every sample that counts."""
    samples = []
    for batch in batches:
        for mass, share, target, right in zip(*(part.tolist() for part in batch), strict=True):
            heads = [value for value in mass if not math.isnan(value)]
            if heads and share > 0 and target >= 0:
                samples.append((sum(heads) / len(heads), share, target, right))
    return samples


def test_errors_and_outcomes_match_a_loop():
    metric, batches = ClassMass(3), [with_outcome(seed) for seed in range(3)]
    for batch in batches:
        metric.update(*batch)
    result, samples = metric.compute(), counted(batches)
    for label in range(2):
        masses = np.array([mass for mass, _, target, _ in samples if target == label])
        assert result.error[label].item() == pytest.approx(masses.std(ddof=1) / np.sqrt(len(masses)))
        for outcome in (False, True):
            masses = np.array([mass for mass, _, *own in samples if own == [label, outcome]])
            place = label, int(outcome)
            assert result.outcome_support[place] == len(masses) > 2
            assert result.outcome_mass[place].item() == pytest.approx(masses.mean())
            assert result.outcome_error[place].item() == pytest.approx(masses.std(ddof=1) / np.sqrt(len(masses)))
    assert result.outcome_support.sum(dim=1).tolist() == result.support.tolist()
    assert result.outcome_mass[2].isnan().all()


def test_batches_without_outcome_count_for_their_class_alone():
    metric, batch = ClassMass(3), with_outcome(0)
    metric.update(*batch[:3])
    assert metric.compute().outcome_support.sum() == 0
    assert metric.compute().outcome_mass.isnan().all()
    metric.update(*batch)
    result = metric.compute()
    assert (result.support == 2 * result.outcome_support.sum(dim=1)).all()


def test_fields_are_those_of_an_attention_share():
    shared = ("mass", "lift", "support", "error", "outcome_mass", "outcome_support", "outcome_error", "share")
    assert ClassMassResult._fields == shared


def test_set_without_attention_keeps_its_share():
    metric = ClassMass(2)
    metric.update(torch.zeros(30), torch.full((30,), 0.2), torch.zeros(30, dtype=torch.long))
    result = metric.compute()
    assert (result.mass[0].item(), result.lift[0].item()) == (0.0, 0.0)
    assert result.share[0].item() == pytest.approx(0.2)


def test_update_with_outcome_reads_no_value_off_the_cpu():
    labels, share = torch.ones(4, dtype=torch.long, device="meta"), torch.ones(4, device="meta")
    metric = ClassMass(2).to("meta")
    assert_updated_in_place(metric, share[:, None], share, labels, labels.bool())
    assert layout(metric)["outcome_sums"] == ("meta", torch.float64, (2, 2, 2))


def test_uniform_attention_has_lift_one():
    target_mask = torch.tensor([[True, False, False, False], [True, True, True, False]])
    metric = ClassMass(2)
    mass = attention_mass(torch.full((2, 3, 4, 4), 0.25), target_mask)
    metric.update(mass, target_share(target_mask), torch.tensor([1, 1]))
    assert metric.compute().lift[1].item() == pytest.approx(1.0)
    assert metric.compute().mass[1].item() == pytest.approx(0.5)


def test_two_processes_equal_one_on_the_union():
    halves, union = (ClassMass(3), ClassMass(3)), ClassMass(3)
    for k in range(4):
        halves[k % 2].update(*with_outcome(k))
        union.update(*with_outcome(k))
    torch.testing.assert_close(
        tuple(reduced(*halves).compute()), tuple(union.compute()), rtol=1e-13, atol=0, equal_nan=True
    )


def test_half_precision_and_inference_mode():
    metric = ClassMass(2)
    with torch.inference_mode():
        metric.update(torch.tensor([0.5]).bfloat16(), torch.tensor([0.25]).half(), torch.tensor([0]))
    metric.update(torch.tensor([0.25]), torch.tensor([0.25]), torch.tensor([0]))
    assert metric.compute().mass[0].item() == 0.375
    assert metric.compute().lift[0].item() == 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mass": torch.ones(2, 1, 1)}, r"`mass` must have shape \(batch,\) or \(batch, heads\), got \(2, 1, 1\)"),
        ({"share": torch.ones(3)}, r"`share` must have shape \(batch,\) = \(2,\), got \(3,\)"),
        ({"right": torch.ones(3, dtype=torch.bool)}, r"`right` must have shape \(batch,\) = \(2,\), got \(3,\)"),
        ({"target": torch.ones(3, dtype=torch.long)}, r"`target` must have shape \(samples,\) = \(2,\), got \(3,\)"),
        ({"target": torch.tensor([0, 4])}, "`target` must lie between 0 and 1, got 4"),
    ],
)
def test_wrong_update_raises(arguments, message):
    batch = {"mass": torch.ones(2), "share": torch.ones(2), "target": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        ClassMass(2).update(**{**batch, **arguments})

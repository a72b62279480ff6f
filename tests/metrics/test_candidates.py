"""Which tokens are tied to the error: scores against peers, and nothing found where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.metrics.association import TokenAssociation, TokenSums
from attn_callbacks.metrics.candidates import Associations, associations

stats = pytest.importorskip("scipy.stats")


def sums_of(attention: np.ndarray, wrong: np.ndarray, label: np.ndarray, classes: int) -> TokenSums:
    """State for one token: attention of every sample, NaN where it is absent."""
    sums, samples = torch.zeros(classes, 2, 1, 3).double(), torch.zeros(classes, 2, dtype=torch.int64)
    for value, error, c in zip(attention, wrong, label, strict=True):
        samples[c, int(not error)] += 1
        if not np.isnan(value):
            sums[c, int(not error), 0] += torch.tensor([1.0, value, value**2])
    return TokenSums(sums, samples)


def one(found: Associations) -> dict[str, float]:
    return {name: value.item() for name, value in found._asdict().items() if name != "support"}


def test_one_class_is_the_test_of_welch():
    generator = np.random.default_rng(0)
    for shift, errors in ((0.0, 12), (0.05, 40), (0.15, 60), (0.3, 20)):
        attention = np.concatenate([generator.beta(2, 3, errors) + shift, generator.beta(3, 3, 200)])
        wrong = np.arange(errors + 200) < errors
        found = one(associations(sums_of(attention, wrong, np.zeros(errors + 200, dtype=int), 1)))
        expected = stats.ttest_ind(attention[wrong], attention[~wrong], equal_var=False)
        assert found["p_value"] == pytest.approx(expected.pvalue, rel=0.02)
        assert np.sign(found["z"]) == np.sign(expected.statistic)
        means = attention[wrong].mean(), attention[~wrong].mean()
        assert found["wrong"] == pytest.approx(means[0] / (1 - means[0]))
        assert found["right"] == pytest.approx(means[1] / (1 - means[1]))
        assert found["lift"] == pytest.approx(found["wrong"] / found["right"])


def test_several_classes_are_a_regression_with_a_mean_for_each():
    generator = np.random.default_rng(1)
    label = generator.integers(4, size=400)
    wrong = generator.random(400) < np.array([0.1, 0.4, 0.8, 0.0])[label]
    attention = np.clip(0.2 + 0.15 * label + 0.05 * wrong + 0.1 * generator.normal(size=400), 0.01, 0.9)
    attention = np.where(label == 3, generator.random(400), attention)  # without errors: tells nothing
    found = one(associations(sums_of(attention, wrong, label, 4)))
    design = np.column_stack([wrong, *(label == c for c in range(4))]).astype(float)
    slope = np.linalg.lstsq(design, attention, rcond=None)[0][0]
    wrong_mean, right_mean = (found[name] / (1 + found[name]) for name in ("wrong", "right"))
    assert wrong_mean - right_mean == pytest.approx(slope)
    variance = 0.0
    total = sum(wrong[label == c].sum() * (~wrong)[label == c].sum() / (label == c).sum() for c in range(3))
    for outcome in (wrong, ~wrong):
        spread = sum(((attention[own] - attention[own].mean()) ** 2).sum() for own in own_samples(outcome, label))
        spread /= sum(len(attention[own]) - 1 for own in own_samples(outcome, label))
        for c, own in enumerate(own_samples(outcome, label)):
            weight = wrong[label == c].sum() * (~wrong)[label == c].sum() / (label == c).sum() / total
            variance += weight**2 * spread / own.sum()
    # with hundreds of samples a t is its own standard score, nearly
    assert found["z"] == pytest.approx(slope / np.sqrt(variance), rel=0.02)


def own_samples(outcome: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
    return [outcome & (label == c) for c in range(3)]


def test_token_of_a_hard_class_is_not_found_for_that():
    """It comes in class 1, which is mostly wrong, and draws attention there; within the class nothing depends on it."""
    generator = np.random.default_rng(2)
    label = generator.integers(2, size=3000)
    wrong = generator.random(3000) < np.array([0.05, 0.5])[label]
    present = generator.random(3000) < np.array([0.3, 0.7])[label]
    attention = np.where(present, generator.beta(2, 4 - 2 * label), np.nan)
    within = one(associations(sums_of(attention, wrong, label, 2)))
    assert abs(within["z"]) < 3
    assert abs(within["presence_z"]) < 3
    together = one(associations(sums_of(attention, wrong, np.zeros_like(label), 1)))
    assert together["z"] > 5
    assert together["presence_z"] > 10


def test_odds_ratio_and_presence_match_a_loop_over_tables():
    """Small classes, one of them without errors; mean, variance and skewness of every table from scipy."""
    generator = np.random.default_rng(3)
    label = generator.integers(4, size=160)
    present = generator.random(160) < np.array([0.2, 0.3, 0.5, 0.4])[label]
    wrong = generator.random(160) < np.array([0.15, 0.2, 0.3, 0.0])[label] * np.where(present, 3.0, 1.0)
    found = one(associations(sums_of(np.where(present, 0.5, np.nan), wrong, label, 4)))
    above = below = excess = variance = third = 0.0
    for c in range(4):
        own = label == c
        a, b = (present & wrong & own).sum(), (present & ~wrong & own).sum()
        c_, d = (~present & wrong & own).sum(), (~present & ~wrong & own).sum()
        above, below = above + a * d / own.sum(), below + b * c_ / own.sum()
        if a + c_:
            table = stats.hypergeom(own.sum(), (own & wrong).sum(), (own & present).sum())
            excess, variance = excess + a - table.mean(), variance + table.var()
            third += table.stats(moments="s") * table.var() ** 1.5
    assert found["odds_ratio"] == pytest.approx(above / below)
    x, skewness = (excess - 0.5) / np.sqrt(variance), third / variance**1.5
    assert x > 2
    expected = 6 / skewness * (np.cbrt(skewness * x / 2 + 1) - 1) + skewness / 6
    assert found["presence_z"] == pytest.approx(expected)
    assert found["presence_z"] == pytest.approx(stats.norm.isf(stats.pearson3(skewness).sf(x)), rel=0.01)


@pytest.mark.parametrize(
    ("total", "errors", "present"), [(1000, 50, 60), (1000, 500, 40), (400, 340, 100), (5000, 60, 50)]
)
def test_presence_is_as_improbable_as_the_exact_tail(total, errors, present):
    """Few errors are expected, so that a plain score is wrong by orders of magnitude far out."""
    table = stats.hypergeom(total, errors, present)
    low, high = max(0, present + errors - total), min(present, errors)
    held = np.arange(low, high + 1)
    sums = torch.zeros(1, 2, len(held), 3).double()
    sums[0, 0, :, 0], sums[0, 1, :, 0] = torch.tensor(held), torch.tensor(present - held)
    found = associations(TokenSums(sums, torch.tensor([[errors, total - errors]])))
    upper, lower = table.sf(held - 1), table.cdf(held)
    exact, side = np.minimum(2 * np.minimum(upper, lower), 1.0), np.where(upper < lower, 1, -1)
    judged = (exact < 0.2) & (exact > 1e-8)
    ratio = found.presence_p_value.numpy()[judged] / exact[judged]
    assert judged.sum() > 4
    assert (np.sign(found.presence_z.numpy()[judged]) == side[judged]).all()
    assert ratio.min() > 0.99
    assert ratio[exact[judged] > 1e-4].max() < 3
    assert ratio.max() < 60  # beyond, on the safe side
    plain = 2 * stats.norm.sf(np.abs(held - table.mean()) / table.std())[judged]
    assert (plain / exact[judged]).min() < 0.1 or errors == total / 2


def test_nothing_is_found_where_errors_fall_at_random():
    """800 tokens, rare and frequent, attention with a heavy tail: what chance finds at 1 in 100 is about 1 in 100."""
    generator = torch.Generator().manual_seed(0)
    tokens, metric = 800, TokenAssociation(800, 2)
    chances = 1.0 / torch.arange(20, tokens + 20)
    for _ in range(40):
        ids = torch.multinomial(chances, 64 * 24, replacement=True, generator=generator).view(64, 24)
        received = (1.2 * torch.randn(64, 24, generator=generator)).exp()
        target = torch.randint(2, (64,), generator=generator)
        right = torch.rand(64, generator=generator) > torch.tensor([0.1, 0.3])[target]
        metric.update(received, ids, None, right, target)
    found = associations(metric.compute())
    for p_values, least in ((found.p_value, 200), (found.presence_p_value, 700)):
        known = p_values[~p_values.isnan()]
        assert len(known) > least
        assert (known < 0.01).double().mean() < 0.025
        assert 0.3 < (known < 0.5).double().mean() < 0.6  # counts of a few errors are coarse
        assert known.min() > 0.05 / len(known)


def test_what_is_tied_to_the_error_is_found_and_told_apart():
    """Token 0 draws attention in wrong samples, token 1 comes in wrong samples, token 2 does neither."""
    generator = torch.Generator().manual_seed(0)
    metric = TokenAssociation(20, 2)
    for _ in range(10):
        tokens = torch.randint(3, 20, (64, 12), generator=generator)
        received = torch.rand(64, 12, generator=generator) + 0.2
        right = torch.rand(64, generator=generator) < 0.7
        tokens[:, 0] = 0
        tokens[torch.rand(64, generator=generator) < torch.where(right, 0.1, 0.4), 1] = 1
        tokens[torch.rand(64, generator=generator) < 0.3, 2] = 2
        received[:, 0] = torch.where(right, received[:, 0], 3 * received[:, 0])
        metric.update(received, tokens, None, right, torch.randint(2, (64,), generator=generator))
    found = associations(metric.compute())
    assert found.z[0] > 8
    assert found.lift[0] > 1.8
    assert found.presence_z[0].isnan()  # it is in every sample
    assert found.presence_z[1] > 6
    assert found.odds_ratio[1] > 3
    assert found.presence_z[2:].abs().max() < 4
    # tokens beside one that draws more are left with less
    assert found.z[1:].max() < 3


def test_support_decides_what_is_told():
    sums = torch.zeros(2, 2, 5, 3).double()
    counts = torch.tensor([[30.0, 9.0, 30.0, 0.0, 45.0], [30.0, 30.0, 9.0, 9.0, 46.0]])  # wrong and right, by token
    sums[0, ..., 0], sums[0, ..., 1], sums[0, ..., 2] = counts, 0.5 * counts, 0.3 * counts
    found = associations(TokenSums(sums, torch.tensor([[50, 50], [0, 0]])))
    assert found.support.tolist() == [[30, 30], [9, 30], [30, 9], [0, 9], [45, 46]]
    for name in ("wrong", "right", "lift", "z", "p_value"):
        assert getattr(found, name).isnan().tolist() == [False, True, True, True, False]
    for name in ("odds_ratio", "presence_z", "presence_p_value"):
        assert getattr(found, name).isnan().tolist() == [False, False, False, True, True]
    assert not associations(TokenSums(sums, torch.tensor([[50, 50], [0, 0]])), min_support=9).z[:3].isnan().any()
    with pytest.raises(ValueError, match="`min_support` must be at least 2, got 1"):
        associations(TokenSums(sums, torch.tensor([[50, 50], [0, 0]])), min_support=1)


def test_equal_attention_is_no_finding_for_its_lack_of_spread():
    """Uniform attention differs in its last digits only: no spread, and nothing that a spread of zero would reveal."""
    wrong = np.arange(128) < 64
    found = one(associations(sums_of(0.5 + wrong * 2.0**-30, wrong, np.zeros(128, dtype=int), 1)))
    assert abs(found["z"]) < 1

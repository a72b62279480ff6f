"""Findings: what is one, what is chance, and that no bias is made up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attn_callbacks.bias import AttentionShare, BiasReport
from attn_callbacks.bias.rates import shortfall

CLASSES = ("cat", "dog", "eel")


def report(counts, **arguments):
    counts = torch.as_tensor(counts)
    groups = {"group_names": ("indoors", "outdoors", "under water")[: len(counts)]} if len(counts) > 1 else {}
    return BiasReport(0, 0, counts, CLASSES[: counts.shape[1]], **{**groups, **arguments})


def smoothed_error(hits, size):
    rate = (hits + 1) / (size + 2)
    return math.sqrt(rate * (1 - rate) / (size + 2))


def test_class_finding_by_hand():
    (finding,) = report([[[80, 10, 10], [10, 90, 0], [40, 10, 50]]]).findings
    assert (finding.kind, finding.where, finding.support) == ("class", "eel", 100)
    assert finding.size == pytest.approx(0.85 - 0.5)
    peers = (smoothed_error(80, 100) ** 2 + smoothed_error(90, 100) ** 2) / 4
    assert finding.standard_error == pytest.approx(math.sqrt(smoothed_error(50, 100) ** 2 + peers))
    assert "eel: recall 0.50 on 100 samples, 0.35 (95 % interval 0.24 to 0.45) below the mean" in finding.text
    assert finding.key == ("class", "eel")


def test_group_finding_by_hand():
    found = [f for f in report([[[45, 5], [5, 45]], [[30, 20], [20, 30]]]).findings if f.where == "outdoors"]
    assert [(f.kind, f.support) for f in found] == [("group", 100)]
    assert found[0].size == pytest.approx(0.3)
    assert "accuracy 0.60 on 100 samples" in found[0].text


def test_cell_finding_shows_what_group_accuracy_hides():
    """Groups correlated with classes: both are 95 % right, and each is blind to its rare class."""
    found = report([[[950, 0], [40, 10]], [[10, 40], [0, 950]]]).findings
    assert {(f.kind, f.where) for f in found} == {("group", "indoors, dog"), ("group", "outdoors, cat")}
    assert found[0].size == pytest.approx(0.8)
    assert "class dog: recall 0.20 on 50 samples" in next(f.text for f in found if f.where == "indoors, dog")


def test_group_of_one_class_is_not_found_twice():
    found = report([[[90, 10], [0, 0]], [[50, 50], [0, 0]], [[0, 0], [10, 90]]]).findings
    assert [(f.kind, f.where) for f in found if f.kind == "group"] == [("group", "outdoors")]


def test_dead_band_holds_however_many_samples():
    assert report([[[500_000, 500_000], [515_000, 485_000]]]).findings == ()
    assert len(report([[[500_000, 500_000], [530_000, 470_000]]]).findings) == 1


def test_difference_within_chance_is_none():
    assert report([[[15, 5], [11, 9]]]).findings == ()  # 0.20, standard error 0.14 with both recalls uncertain
    assert len(report([[[150, 50], [110, 90]]]).findings) == 1


def test_two_classes_are_two_comparisons():
    (finding,) = report([[[32, 8], [18, 22]]]).findings
    pooled = 0.25 / math.sqrt(54 / 80 * 26 / 80 * 2 / 40)
    assert finding.p_value == pytest.approx(2 * stats.norm.sf(pooled), rel=0.05)


@pytest.mark.parametrize(("classes", "found"), [(5, 1), (100, 0)])
def test_many_comparisons_need_more(classes, found):
    """0.2 below all others: beyond chance among five classes, not among a hundred."""
    counts = torch.diag(torch.full((classes,), 32))
    counts[torch.arange(classes), (torch.arange(classes) + 1) % classes] = 8
    counts[0, 0], counts[0, 1] = 24, 16
    names = tuple(f"class {i}" for i in range(classes))
    assert len(BiasReport(0, 0, counts[None], names).findings) == found


def test_little_support_is_no_finding():
    assert report([[[19, 0], [0, 19]]]).findings == ()
    assert report([[[100, 0], [19, 0]]]).findings == ()
    assert len(report([[[100, 0], [20, 0]]]).findings) == 1
    assert len(report([[[100, 0], [19, 0]]], min_support=19).findings) == 1


def test_largest_first():
    sizes = [f.size for f in report([[[95, 5], [40, 60]], [[20, 80], [10, 90]]]).findings]
    assert len(sizes) > 1
    assert sizes == sorted(sizes, reverse=True)


def attention(**masses):
    """``name=(mass, chance, support)`` for both of two classes."""
    return {
        name: AttentionShare(torch.tensor(mass), torch.tensor(mass) / torch.tensor(chance), torch.tensor(support))
        for name, (mass, chance, support) in masses.items()
    }


FAIR = [[[50, 50], [50, 50]]]


def test_attention_on_spurious_tokens_above_chance():
    share = attention(spurious=([0.4, 0.1], [0.1, 0.1], [200, 200]))
    (finding,) = report(FAIR, attention=share).findings
    assert (finding.kind, finding.where, finding.support) == ("attention", "spurious, cat", 200)
    assert finding.size == pytest.approx(0.3)
    assert finding.standard_error == pytest.approx(smoothed_error(80, 200))
    assert "0.40 of the attention falls on spurious tokens" in finding.text
    assert "above chance" in finding.text


def test_attention_past_relevant_tokens_below_chance():
    share = attention(relevance=([0.4, 0.1], [0.1, 0.4], [200, 200]))
    (finding,) = report(FAIR, attention=share).findings
    assert (finding.kind, finding.where) == ("attention", "relevance, dog")
    assert finding.size == pytest.approx(0.3)
    assert "below chance" in finding.text


def test_relevant_tokens_without_any_attention_are_found():
    zero, support = torch.zeros(2), torch.tensor([200, 200])
    share = AttentionShare(zero, zero, support, error=zero, share=torch.tensor([0.3, 0.01]))
    (finding,) = report(FAIR, attention={"relevance": share}).findings
    assert (finding.where, finding.size) == ("relevance, cat", pytest.approx(0.3))
    assert finding.standard_error > 0
    assert finding.interval[0] < finding.size < finding.interval[1]


def test_names_that_say_what_they_are_of_are_not_doubled():
    names = {"group_names": ("group 1", "indoors"), "train_counts": None}
    counts = torch.tensor([[[20, 80], [10, 90]], [[95, 5], [40, 60]]])
    share = AttentionShare(torch.tensor([0.5, 0.5]), torch.tensor([5.0, 5.0]), torch.tensor([200, 200]))
    seen = BiasReport(0, 0, counts, ("class 0", "classic"), attention={"spurious": share}, **names)
    texts = {finding.key: finding.text for finding in seen.findings}
    assert texts["group", "group 1"].startswith("group 1: accuracy")
    assert texts["group", "group 1, class 0"].startswith("group 1, class 0: recall")
    assert texts["group", "indoors, classic"].startswith("Group indoors, class classic: recall")
    assert texts["class", "class 0"].startswith("class 0: recall")
    assert texts["attention", "spurious, classic"].startswith("Class classic: 0.50 of the attention")


@pytest.mark.parametrize(
    "share",
    [
        attention(spurious=([0.1, 0.05], [0.1, 0.1], [200, 200])),
        attention(relevance=([0.1, 0.5], [0.1, 0.1], [200, 200])),
        attention(spurious=([0.9, 0.9], [0.1, 0.1], [19, 0])),
        attention(spurious=([0.11, 0.11], [0.1, 0.1], [10**6, 10**6])),
        attention(spurious=([0.25, 0.25], [0.1, 0.1], [20, 20])),
        attention(spurious=([math.nan, math.nan], [0.1, 0.1], [0, 0])),
        attention(something=([0.9, 0.9], [0.1, 0.1], [200, 200])),
        {"relevance": AttentionShare(torch.zeros(2), torch.zeros(2), torch.tensor([200, 200]))},
    ],
)
def test_no_attention_finding(share):
    assert report(FAIR, attention=share).findings == ()


def test_shortfall_against_numpy():
    generator = np.random.default_rng(0)
    rates, errors, estimable = generator.random((5, 3)), generator.random((5, 3)), generator.random((5, 3)) < 0.7
    estimable[:, 2] = [True, False, False, False, False]
    size, error = shortfall(*map(torch.from_numpy, (rates, errors, estimable)))
    for column in range(3):
        for row in range(5):
            peers = [other for other in range(5) if other != row and estimable[other, column]]
            if not estimable[row, column] or not peers:
                assert math.isnan(size[row, column])
                continue
            assert float(size[row, column]) == pytest.approx(rates[peers, column].mean() - rates[row, column])
            variance = errors[row, column] ** 2 + (errors[peers, column] ** 2).sum() / len(peers) ** 2
            assert float(error[row, column]) == pytest.approx(math.sqrt(variance))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 60), min_size=4, max_size=4), min_size=1, max_size=3))
def test_findings_are_always_sound(cells):
    seen = report(torch.tensor(cells).reshape(-1, 2, 2))
    for finding in seen.findings:
        assert 0.02 < finding.size <= 1
        assert finding.p_value < 0.05
        assert 0 < finding.interval[0] < finding.size <= finding.interval[1] <= 1
        assert finding.standard_error > 0
        assert finding.support >= 20
        assert finding.text.endswith(".")
        assert finding.where in finding.text.replace(", class", ",")


def test_fair_model_yields_few_findings():
    """Ten classes of equal recall: at most about one report in twenty has a finding."""
    generator = np.random.default_rng(0)
    names, found, reports = tuple(f"class {i}" for i in range(10)), 0, 60
    for _ in range(reports):
        hits = generator.binomial(60, 0.85, size=10)
        counts = np.diag(hits)
        counts[np.arange(10), (np.arange(10) + 1) % 10] = 60 - hits
        found += bool(BiasReport(0, 0, torch.from_numpy(counts)[None], names).findings)
    assert found < reports * 0.1

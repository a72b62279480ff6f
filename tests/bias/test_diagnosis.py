"""Which kind a finding is of, what it says, what answers it, and what is no finding."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from attn_callbacks.bias import AttentionShare, BiasReport, Reliance

CLASSES = ("cat", "dog", "eel")
FAIR = [[[50, 50], [50, 50]]]


def report(counts=FAIR, **arguments):
    counts = torch.as_tensor(counts)
    groups = {"group_names": ("indoors", "outdoors")[: len(counts)]} if len(counts) > 1 else {}
    return BiasReport(0, 0, counts, CLASSES[: counts.shape[1]], **{**groups, **arguments})


def only(found, kind):
    (finding,) = [finding for finding in found if finding.kind == kind]
    return finding


def reliance(lost, gained, size=200, classes=2):
    """So many lost and gained in the first class, none in the others."""
    counts = torch.zeros(classes, 2, 2, dtype=torch.int64)
    counts[:, 1, 1] = size
    counts[0] = torch.tensor([[0, gained], [lost, size - lost - gained]])
    return Reliance(counts)


def share(masses, chance=0.1, support=400, **arguments):
    mass = torch.tensor(masses)
    return AttentionShare(mass, mass / chance, torch.full((len(masses),), support), **arguments)


# What answers which kind


def test_class_finding_is_answered_by_weights_first():
    finding = only(report([[[90, 10], [40, 60]]]).findings, "class")
    assert finding.answers == ("ClassReweighting", "Resampling")


def test_group_finding_is_never_answered_by_class_weights_alone():
    found = report([[[45, 5], [5, 45]], [[30, 20], [20, 30]]]).findings
    assert found
    for finding in found:
        assert finding.kind == "group"
        assert finding.answers[:2] == ("Resampling", "GroupReweighting")
        assert "ClassReweighting" not in finding.answers


def test_feature_finding_is_answered_by_functional_means_first():
    finding = only(report(reliance={"spurious": reliance(60, 5)}).findings, "feature")
    assert finding.where == "spurious"
    assert finding.answers == (
        *("MaskRandomization", "InputGradientPenalty", "AdversarialTraining"),
        *("AttentionGuidance", "FeatureRegularization", "EnsembleFeedback"),
    )


def test_attention_finding_is_answered_by_guidance_first():
    finding = only(report(attention={"spurious": share([0.4, 0.1])}).findings, "attention")
    assert finding.answers == ("AttentionGuidance",)


# Features: what accuracy loses, never what attention shows


def test_feature_finding_by_hand():
    measured = reliance(60, 5)
    finding = only(report(reliance={"hashtags": measured}).findings, "feature")
    assert (finding.where, finding.support) == ("hashtags", 400)
    assert finding.size == pytest.approx(65 / 400)
    assert finding.interval == pytest.approx(stats.binomtest(65, 400).proportion_ci(method="wilson"))
    assert finding.p_value == pytest.approx(2 * stats.binomtest(60, 65).pvalue)  # one of two ways to be found
    assert "accuracy goes from 0.99 to 0.85" in finding.text
    assert finding.evidence == ("Recall falls most for cat by 0.28.",)


def test_feature_findings_are_corrected_for_the_sets():
    alone = report(reliance={"spurious": reliance(22, 6)}).findings
    several = report(reliance={"spurious": reliance(22, 6), **{f"set {i}": reliance(9, 9) for i in range(4)}}).findings
    chance = 2 * stats.binomtest(22, 28).pvalue
    assert only(alone, "feature").p_value == pytest.approx(chance)
    assert only(several, "feature").p_value == pytest.approx(5 * chance)
    assert report(reliance={f"set {i}": reliance(22, 6) for i in range(7)}).findings == ()  # 7 x 0.0075


def test_reliance_shows_where_validation_is_balanced_over_the_shortcut():
    finding = only(report(reliance={"spurious": reliance(50, 50)}).findings, "feature")  # accuracy is as before
    assert finding.size == 0.25
    assert finding.p_value == pytest.approx(2 * stats.binomtest(100, 400, 0.1, alternative="greater").pvalue)


def test_set_without_support_is_no_comparison():
    few = Reliance(torch.tensor([[[0, 0], [0, 9]], [[0, 0], [0, 10]]]))
    finding = only(report(reliance={"spurious": reliance(20, 6), "names": few}).findings, "feature")
    assert finding.p_value == pytest.approx(2 * stats.binomtest(20, 26).pvalue)


@pytest.mark.parametrize(
    "sets",
    [
        {"relevance": reliance(100, 0)},  # it is there to be relied on
        {"spurious": reliance(0, 12)},  # accuracy rises, and few outcomes change
        {"spurious": reliance(8, 8)},
        {"spurious": reliance(6, 0, size=500)},  # 0.006: sure, and within the dead band
        {"spurious": Reliance(torch.tensor([[[0, 0], [9, 0]], [[0, 0], [0, 10]]]))},  # 19 samples
    ],
    ids=["relevance", "gain", "chance", "dead band", "support"],
)
def test_no_feature_finding(sets):
    assert report(reliance=sets).findings == ()


def test_attention_alone_is_no_feature_finding():
    found = report(attention={"spurious": share([0.9, 0.9])}).findings
    assert {finding.kind for finding in found} == {"attention"}


def test_feature_finding_shows_the_attention_on_the_set():
    sets = {"reliance": {"spurious": reliance(60, 5)}, "attention": {"spurious": share([0.12, 0.4])}}
    finding = only(report(**sets).findings, "feature")
    assert finding.evidence[1] == "Attention on them is highest for dog: mass 0.40, 4.0 times chance."


# Attention: mass, and whether anything follows from it

WITHOUT = (
    "the outcome of 0.16 (95 % interval 0.13 to 0.20) of 400 samples changes, and accuracy goes from 0.99 to 0.85."
)


def test_reliance_is_told_in_the_same_figures_everywhere():
    measured = {"spurious": reliance(60, 5)}
    seen = report(attention={"spurious": share([0.4, 0.1])}, reliance=measured)
    assert WITHOUT in only(seen.findings, "feature").text
    assert WITHOUT in only(seen.findings, "attention").text


@pytest.mark.parametrize(
    ("measured", "sentence"),
    [
        ({}, "was not measured: mass is not reliance."),
        ({"spurious": reliance(60, 5)}, f"Predictions do rely on them: without what they hold, {WITHOUT}"),
        ({"spurious": reliance(6, 5)}, "Predictions were not seen to rely on them"),
        ({"spurious": Reliance(torch.tensor([[[0, 0], [9, 0]], [[0, 0], [0, 10]]]))}, "was not measured"),
    ],
    ids=["unmeasured", "confirmed", "denied", "support"],
)
def test_attention_finding_says_whether_reliance_confirms_it(measured, sentence):
    found = report(attention={"spurious": share([0.4, 0.1])}, reliance=measured).findings
    finding = only(found, "attention")
    assert sentence in finding.text


def test_attention_finding_uses_the_measured_error():
    wide = share([0.16, 0.1], error=torch.tensor([0.05, 0.05]))
    narrow = share([0.16, 0.1], error=torch.tensor([0.01, 0.01]))
    assert report(attention={"spurious": wide}).findings == ()
    finding = only(report(attention={"spurious": narrow}).findings, "attention")
    assert finding.standard_error == pytest.approx(0.01)
    assert finding.interval == pytest.approx((0.06 - 0.0196, 0.06 + 0.0196), abs=1e-4)
    assert finding.p_value == pytest.approx(2 * 2 * stats.norm.sf(6), rel=1e-4)  # two classes, two sides


def test_attention_findings_are_one_family():
    """0.048 with standard error 0.02 is p = 0.016: beyond chance among two classes, not among two sets of two."""
    error = torch.tensor([0.02, 0.02])
    one = {"spurious": share([0.148, 0.1], error=error)}
    two = {**one, "relevance": share([0.1, 0.1], error=error)}
    assert len(report(attention=one).findings) == 1
    assert only(report(attention=one).findings, "attention").p_value == pytest.approx(
        2 * 2 * stats.norm.sf(2.4), rel=1e-3
    )
    assert report(attention=two).findings == ()


def test_same_class_in_two_sets_has_two_keys():
    sets = {"spurious": share([0.4, 0.1]), "relevance": share([0.1, 0.5], chance=0.4)}
    assert {finding.key for finding in report(attention=sets).findings} == {
        ("attention", "spurious, cat"),
        ("attention", "relevance, cat"),
    }


def outcomes(support):
    return {
        "outcome_mass": torch.tensor([[0.6, 0.3], [0.1, 0.1]]),
        "outcome_support": torch.tensor([[support, 300], [40, 300]]),
        "outcome_error": torch.full((2, 2), 0.03),
    }


def test_attention_in_wrong_and_right_predictions_is_evidence():
    finding = only(report(attention={"spurious": share([0.4, 0.1], **outcomes(100))}).findings, "attention")
    (sentence,) = finding.evidence
    assert sentence.startswith("Mass in wrong predictions 0.60, in right ones 0.30: a difference of 0.30")
    assert "0.22 to 0.38" in sentence  # 1.96 x 0.03 x sqrt(2)
    few = only(report(attention={"spurious": share([0.4, 0.1], **outcomes(19))}).findings, "attention")
    assert few.evidence == ()


# Causes


def test_class_finding_names_the_prior():
    counts = [[[95, 3, 2], [4, 94, 2], [45, 5, 50]]]
    finding = only(report(counts, train_counts=torch.tensor([[500, 480, 20]])).findings, "class")
    assert finding.where == "eel"
    assert finding.evidence == (
        "Predicted too seldom: 18 % of the predictions, 33 % of the labels.",
        "Rare in training: 2.0 % of the samples.",
        "Mostly taken for cat: 45 of 50 errors.",
    )


def test_class_that_is_not_rare_is_not_called_so():
    counts = [[[60, 20, 20], [0, 100, 0], [0, 0, 100]]]
    finding = only(report(counts, train_counts=torch.tensor([[100, 100, 100]])).findings, "class")
    assert not any("training" in sentence for sentence in finding.evidence)


def test_group_finding_tells_its_cells():
    counts = [[[90, 10], [8, 92]], [[40, 60], [12, 88]]]
    found = report(counts, train_counts=torch.tensor([[300, 300], [100, 300]])).findings
    group = next(finding for finding in found if finding.where == "outdoors")
    assert group.evidence == (
        "Lowest recalls in it: cat 0.40 on 100 samples, dog 0.88 on 100 samples.",
        "Share of training: 40 %.",
    )
    cell = next(finding for finding in found if finding.where == "outdoors, cat")
    assert cell.evidence == ("In training, 25 % of the class are of this group.",)

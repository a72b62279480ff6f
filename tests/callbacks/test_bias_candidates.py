"""Candidates of a report against samples counted one by one: which tokens, which quantity, and how sure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from attn_callbacks.bias import BiasReport, Candidate
from attn_callbacks.callbacks._bias_report import build_report
from attn_callbacks.callbacks._fed import FedCounts
from attn_callbacks.metrics import ClassMass, GroupCalibration, GroupConfusion, TokenAssociation

TOKENS, CLASSES, REST = 12, 2, 0
"""Token 0 is in every sample."""


def built(metrics: dict[str, Any], target: torch.Tensor, right: torch.Tensor, places: bool = False) -> BiasReport:
    predicted = torch.where(right, target, 1 - target)
    metrics["confusion"], metrics["calibration"] = GroupConfusion(CLASSES, 1), GroupCalibration(CLASSES, 1)
    metrics["confusion"].update(predicted, target, None)
    metrics["calibration"].update(5.0 * torch.nn.functional.one_hot(predicted, CLASSES), target, None)
    return build_report(
        *(0, 0, metrics),
        class_names=("negative", "positive"),
        group_names=None,
        fed=FedCounts(),
        min_support=20,
        token_name=lambda token: f"token {token}",
        examples=lambda token: [f"sample of {token}"],
        are_places=places,
    )


def reported(cells: dict[tuple[int, bool, bool], int], draws: float = 1.0, places: bool = False) -> BiasReport:
    """Report on samples of (class, right, holds token 1); where it is held and wrong, it draws so much attention."""
    rows = [cell for cell, number in cells.items() for _ in range(number)]
    target, right, held = (torch.tensor([row[part] for row in rows]) for part in range(3))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(len(rows), 4, dtype=torch.long)
    tokens[:, 1] = torch.where(held, 1, REST)
    received = 1 + 0.1 * torch.rand(tokens.shape, generator=generator)
    received[:, 1] *= torch.where(held & ~right, draws, 1.0)
    metric = TokenAssociation(TOKENS, CLASSES)
    metric.update(received, tokens, None, right, target)
    return built({"association": metric}, target, right, places)


def of_kind(report: BiasReport, kind: str) -> list[Candidate]:
    return [candidate for candidate in report.candidates if candidate.kind == kind]


# Simpson's paradox: within either class the token goes with errors, over both together with right predictions.
PARADOX = {
    (0, False, True): 30,
    (0, False, False): 10,
    (0, True, True): 180,
    (0, True, False): 220,
    (1, False, True): 70,
    (1, False, False): 230,
    (1, True, True): 2,
    (1, True, False): 38,
}


def test_presence_is_compared_within_classes() -> None:
    (found,) = of_kind(reported(PARADOX), "presence")
    held_wrong, held_right = (30 + 70) / (40 + 300), (180 + 2) / (400 + 40)
    assert held_wrong < held_right  # what the crude shares say
    weights = np.array([40 * 400 / 440, 300 * 40 / 340])
    wrong = np.average([30 / 40, 70 / 300], weights=weights)
    right = np.average([180 / 400, 2 / 40], weights=weights)
    assert found.wrong == pytest.approx(wrong)
    assert found.right == pytest.approx(right)
    assert found.difference > 0.2
    assert found.lift == pytest.approx(wrong / right)
    assert (found.name, found.support, found.examples) == ("token 1", 282, ("sample of 1",))


def test_token_of_a_hard_class_is_no_candidate_for_that() -> None:
    """Class 1 always holds it and is mostly wrong: crudely 0.8 apart, within the classes not at all."""
    confounded = {(0, False, False): 10, (0, True, False): 190, (0, True, True): 10, (1, False, True): 190}
    confounded |= {(1, True, True): 10, (1, True, False): 1, (1, False, False): 19}
    report = reported(confounded)
    assert of_kind(report, "presence") == [] or of_kind(report, "presence")[0].p_value > 0.1
    assert [finding for finding in report.findings if finding.kind == "feature"] == []


@pytest.mark.parametrize("kind", ["attention", "presence"])
def test_size_interval_and_chance_agree(kind: str) -> None:
    report = reported(PARADOX, draws=1.4)
    (found,) = of_kind(report, kind)
    assert found.p_value < 0.05
    assert math.erfc(found.difference / found.error / math.sqrt(2)) == pytest.approx(found.p_value, rel=1e-6)
    (finding,) = [finding for finding in report.findings if finding.where == found.where]
    assert finding.size == pytest.approx(found.difference)
    assert finding.standard_error == found.error
    assert 0 < finding.interval[0] < finding.size < finding.interval[1] <= 1


def test_attention_is_told_on_a_scale_that_ends() -> None:
    (found,) = of_kind(reported(PARADOX, draws=100.0), "attention")
    relative = 100 / (103 / 4)  # of uniform attention, up to the noise
    assert found.wrong == pytest.approx(relative / (1 + relative), abs=0.01)
    assert found.right == pytest.approx(0.5, abs=0.01)
    assert found.lift == pytest.approx(relative, rel=0.1)
    assert 0 < found.difference < 1


def test_all_that_were_compared_are_counted() -> None:
    """A hundred tokens of which only the first goes with errors, and that not surely enough for a hundred."""
    right = torch.arange(400) % 2 == 0
    tokens = torch.randint(3, 50, (400, 20), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = torch.where((torch.arange(400) % 8 == 1) | (torch.arange(400) % 16 == 0), 1, 2)
    metric = TokenAssociation(50, CLASSES)
    target = torch.zeros(400, dtype=torch.long)
    metric.update(torch.ones(400, 20), tokens, None, right, target)
    report = built({"association": metric}, target, right)
    compared = {candidate.compared for candidate in report.candidates}
    assert compared == {2 * 49}  # 47 words at random, and tokens 1 and 2, by attention and by presence
    (found,) = [candidate for candidate in of_kind(report, "presence") if candidate.name == "token 1"]
    assert 1e-4 < found.p_value < 0.05  # alone it would be beyond chance
    assert [finding.where for finding in report.findings if finding.kind == "feature"] == []


@pytest.mark.parametrize(("rare", "count"), [(15, 0), (100, 1)])
def test_token_of_nearly_all_samples_is_no_candidate(rare: int, count: int) -> None:
    """It is part of the format in 94 % of the samples, and a word in 60 %; errors look at it in both."""
    cells = {(0, False, True): 50, (0, True, True): 200 - rare, (0, True, False): rare}
    found = of_kind(reported(cells, draws=5.0), "attention")
    assert [candidate.name for candidate in found] == ["token 1"] * count


def test_places_are_candidates_though_all_samples_have_them() -> None:
    report = reported({(0, False, True): 50, (0, True, True): 50}, draws=5.0, places=True)
    assert {candidate.kind for candidate in report.candidates} == {"attention"}
    assert report.candidates[0].name == "token 1"


def test_share_of_a_set_reaches_the_report() -> None:
    """Attention passes over relevant tokens altogether: the extreme of a finding, not the absence of one."""
    metric, target = ClassMass(CLASSES), torch.arange(80) % 2
    right = torch.ones(80, dtype=torch.bool)
    metric.update(torch.zeros(80), torch.full((80,), 0.4), target, right)
    report = built({"mass/relevance": metric}, target, right)
    assert report.attention["relevance"].chance.tolist() == pytest.approx([0.4, 0.4])
    assert {finding.where for finding in report.findings} == {"relevance, negative", "relevance, positive"}

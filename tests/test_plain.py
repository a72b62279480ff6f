"""Results as JSON: every class that has a `to_dict` writes what strict JSON can hold, whatever was not measured."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attn_callbacks
from attn_callbacks._plain import plain
from attn_callbacks.analysis import (
    FeatureImportance,
    GateImportance,
    HeadAblation,
    HeadClusters,
    HeadInteractions,
    HeadShapley,
    PatternProbeResult,
    PruningCurve,
    RedundantPair,
)
from attn_callbacks.bias import AttentionShare, BiasReport, Calibration, Candidate, Reliance
from attn_callbacks.bias.fairness import Disparity
from attn_callbacks.bias.priors import PriorShift
from attn_callbacks.callbacks._error_result import ErrorAnalysisResult, WrongSample
from attn_callbacks.callbacks._importance_study import HeadStudy
from attn_callbacks.callbacks._paths_result import AttentionPathsResult, TracedSample
from attn_callbacks.feedback.strength import StrengthState
from attn_callbacks.functional.effect_size import EffectSize
from attn_callbacks.functional.paths import AttentionPath
from attn_callbacks.functional.roles import ROLES
from attn_callbacks.metrics.alignment import AlignmentResult
from attn_callbacks.metrics.roles import HeadRolesResult

NAN, NAMES = math.nan, ("a", "b")
CELLS = torch.tensor([[0.5, NAN], [math.inf, -math.inf]], dtype=torch.float64)
COUNTS = torch.ones(2, 2, dtype=torch.long)
HEADS = (("a", 0), ("a", 1), ("b", 0), ("b", 1))


def roles() -> HeadRolesResult:
    values = torch.full((1, 2, len(ROLES)), NAN, dtype=torch.float64)
    wins = torch.zeros(1, 2, 30, dtype=torch.long)
    return HeadRolesResult(*[values] * 6, values.nan_to_num().long(), wins, torch.full((len(ROLES),), 0.5), ("a",))


def clusters() -> HeadClusters:
    pair = RedundantPair((0, 0), (1, 1), 0.1, NAN)
    return HeadClusters(
        COUNTS, CELLS, CELLS, NAN, 2, (NAN, 0.1), ((0, 0), (1, 1)), CELLS, CELLS, COUNTS[0], CELLS, (pair,), CELLS[0],
        NAMES,
    )  # fmt: skip


def gates() -> GateImportance:
    return GateImportance(NAMES, *[CELLS] * 6, NAN, 3, False)


def curve() -> PruningCurve:
    return PruningCurve(NAMES, HEADS[:2], (0, 2), CELLS[0], CELLS[1], NAN, False)


def wrong() -> WrongSample:
    return WrongSample(1, NAN, math.inf, 0, 1, ("word",), {"a": CELLS[None]})


def errors() -> ErrorAnalysisResult:
    effect = EffectSize(*[CELLS] * 6)
    values = (COUNTS, CELLS, CELLS, effect, CELLS, effect, *[CELLS] * 5, effect, CELLS)
    return ErrorAnalysisResult(1, NAMES, NAMES, NAMES, *values, (wrong(),), (wrong(),))


def path() -> AttentionPath:
    return AttentionPath((1, 0), (None,), NAN)


def traced() -> TracedSample:
    return TracedSample(0, NAMES, None, None, CELLS[0], (path(),))


def study() -> HeadStudy:
    return HeadStudy(1, gates(), None, curve(), None, NAN)


MADE: dict[type, Callable[[], Any]] = {
    AlignmentResult: lambda: AlignmentResult(CELLS[None], CELLS[None], COUNTS[None], ("a",)),
    AttentionPath: path,
    AttentionPathsResult: lambda: AttentionPathsResult("rollout", 1, NAMES, (traced(),)),
    AttentionShare: lambda: AttentionShare(torch.tensor([NAN, 0.1]), torch.tensor([1.0, NAN]), torch.zeros(2)),
    BiasReport: lambda: BiasReport(1, 2, torch.zeros(1, 2, 2), NAMES),
    Calibration: lambda: Calibration(torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 2)),
    Candidate: lambda: Candidate("a", math.inf, NAN, NAN, 0.5, 3),
    Disparity: lambda: Disparity(CELLS[0], CELLS[1], (NAN, NAN), 0),
    ErrorAnalysisResult: errors,
    FeatureImportance: lambda: FeatureImportance(
        {"masking": CELLS}, COUNTS[0], CELLS[0], "loss", (0.1,), {"masking": CELLS}, {"masking": CELLS}, NAMES
    ),
    GateImportance: gates,
    HeadAblation: lambda: HeadAblation(
        NAMES, CELLS, CELLS, COUNTS, (HEADS[:2],), CELLS[0], CELLS[1], NAN, "zero", False, False
    ),
    HeadClusters: clusters,
    HeadInteractions: lambda: HeadInteractions(
        HEADS[:2], ("a",), *[CELLS] * 2, COUNTS, CELLS, CELLS, NAN, "exact", False
    ),
    HeadRolesResult: roles,
    HeadShapley: lambda: HeadShapley(NAMES, CELLS, CELLS, NAN, NAN, NAN, 0, 0.0, False),
    HeadStudy: study,
    PatternProbeResult: lambda: PatternProbeResult(*[CELLS[None]] * 3, ("a",), 2),
    PriorShift: lambda: PriorShift(CELLS[0], CELLS[0], CELLS[0]),
    PruningCurve: curve,
    Reliance: lambda: Reliance(torch.zeros(2, 2, 2)),
    StrengthState: StrengthState,
    TracedSample: traced,
    WrongSample: wrong,
}


@pytest.mark.parametrize("result", MADE, ids=lambda result: result.__name__)
def test_results_are_strict_json(result: type) -> None:
    found = MADE[result]().to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_no_result_is_forgotten() -> None:
    found = set()
    for module in pkgutil.walk_packages(attn_callbacks.__path__, "attn_callbacks."):
        members = vars(importlib.import_module(module.name)).values()
        found |= {each for each in members if inspect.isclass(each) and "to_dict" in vars(each)}
    assert {each for each in found if each.__module__.startswith("attn_callbacks")} == set(MADE)


def test_by_hand() -> None:
    assert plain({"a": (1, NAN, -math.inf), "b": [True, None, "x"]}) == {"a": [1, None, None], "b": [True, None, "x"]}
    assert plain(torch.tensor([[1.0, NAN]])) == [[1.0, None]]
    assert plain(np.array([1, 2])) == [1, 2]
    assert [plain(value) for value in (np.float32(NAN), np.int64(3), torch.tensor(2))] == [None, 3, 2]
    assert isinstance(plain(np.int64(3)), int)

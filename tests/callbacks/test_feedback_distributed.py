"""Two processes with feedback train what one process trains on the same data, and decide the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.callbacks.feeding import CASES
from tests.callbacks.feeding_script import main
from tests.callbacks.processes import run_on_two

DRAWS = {"MaskRandomization", "AdversarialTraining", "FeatureRegularization", "EnsembleFeedback"}
"""Each process exchanges regions, or attacks a batch, among its own samples: no run on one process is the same."""

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

Result = dict[str, Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Result, Result]:
    """What one process found, and each of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    main(one, 1)
    run_on_two("tests.callbacks.feeding_script", two, seconds=400)
    paths = (one / "feeding0.json", two / "feeding0.json", two / "feeding1.json")
    return tuple(json.loads(path.read_text()) for path in paths)  # type: ignore[return-value]


@pytest.mark.parametrize("name", CASES)
def test_processes_agree_to_the_last_bit(name: str, results: tuple[Result, Result, Result]) -> None:
    _, first, second = results
    assert first[name]["weights"] == second[name]["weights"]
    assert first[name]["decisions"] == second[name]["decisions"]
    assert first[name]["state"] == second[name]["state"]
    assert first[name]["fed"] == second[name]["fed"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in DRAWS])
def test_two_processes_train_what_one_trains(name: str, results: tuple[Result, Result, Result]) -> None:
    one, two, _ = results
    for expected, found in zip(one[name]["weights"], two[name]["weights"], strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
    assert one[name]["fed"] == two[name]["fed"]
    assert [len(entry) for entry in one[name]["decisions"]] == [len(entry) for entry in two[name]["decisions"]]

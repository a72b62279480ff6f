"""What looks at heads sees on two processes what it sees on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.callbacks.heads_script import main
from tests.callbacks.processes import run_on_two

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a run on one process and of one on two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    main(one, 1)
    run_on_two("tests.callbacks.heads_script", two)
    return one, two


@pytest.fixture(scope="module")
def one(folders: tuple[Path, Path]) -> dict[str, Any]:
    return json.loads((folders[0] / "rank0.json").read_text())


@pytest.fixture(scope="module")
def two(folders: tuple[Path, Path]) -> list[dict[str, Any]]:
    return [json.loads((folders[1] / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["roles", "errors", "alignment"])
def test_two_processes_measure_what_one_does(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    expected, found = one["even"][name], two[0]["even"][name]
    assert expected.keys() == found.keys()
    for field, values in expected.items():
        np.testing.assert_allclose(found[field], values, rtol=1e-3, atol=1e-5, err_msg=field)
    assert np.max(expected["g" if name == "errors" else "samples"]) > 0


def test_processes_agree(two: list[dict[str, Any]]) -> None:
    for part in ("roles", "errors", "alignment", "health"):
        assert two[0]["even"][part] == two[1]["even"][part]
        assert two[0]["uneven"][part] == two[1]["uneven"][part]
    assert two[0]["weights"] == two[1]["weights"]


def test_training_is_what_it_is_on_one(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert two[0]["weights"] == pytest.approx(one["weights"], rel=1e-6)
    monitored = {name for name in one["even"]["metrics"] if not name.startswith("health/max")}
    assert {name.split("/")[0] for name in monitored} >= {"roles", "alignment", "health"}
    for name in monitored - {"roles/drift"}:  # its samples are those of the first process
        assert two[0]["even"]["metrics"][name] == pytest.approx(one["even"]["metrics"][name], rel=1e-3, nan_ok=True)
    assert two[0]["warnings"] == two[1]["warnings"] == []


def test_experiments_are_run_by_the_first_process(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert one["alone"] == two[0]["alone"] == {"importance": True, "paths": True}
    assert two[1]["alone"] == {"importance": False, "paths": False}


def test_uneven_shares_are_counted_once_each(two: list[dict[str, Any]]) -> None:
    assert np.max(two[0]["uneven"]["roles"]["samples"]) == 32
    assert np.max(two[0]["uneven"]["alignment"]["samples"]) == 32


def test_only_rank_zero_writes(folders: tuple[Path, Path]) -> None:
    single, double = (
        {path.relative_to(folder / "run").as_posix() for path in (folder / "run").glob("**/*") if path.is_file()}
        for folder in folders
    )
    assert {name.split("/")[0] for name in single} >= {"alignment", "errors", "importance", "paths", "roles"}
    assert single <= double

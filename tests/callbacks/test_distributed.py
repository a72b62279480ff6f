"""Two processes see what one process sees on all of the data, and agree on what to do about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attn_callbacks.metrics import HeadStatisticsMetric
from tests.callbacks.distributed_script import FAILING, LAYERS, ROUNDS, layer_batch, main
from tests.callbacks.processes import run_on_two

pytestmark = pytest.mark.ddp


Result = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a run on one process and of one on two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    main(one, 1)
    run_on_two("tests.callbacks.distributed_script", two)
    return one, two


@pytest.fixture(scope="module")
def one(folders: tuple[Path, Path]) -> Result:
    return json.loads((folders[0] / "rank0.json").read_text())


@pytest.fixture(scope="module")
def two(folders: tuple[Path, Path]) -> list[Result]:
    return [json.loads((folders[1] / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_measure_what_one_does(one: Result, two: list[Result]) -> None:
    expected, found = one["even"], two[0]["even"]
    assert found["samples"] == expected["samples"]
    np.testing.assert_allclose(found["mean"], expected["mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["error"], expected["error"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["importance"], expected["importance"], rtol=1e-4, atol=1e-7)
    assert np.min(expected["importance"][0]) > 0
    for name in ("counts", "train_counts", "support"):
        assert found["report"][name] == expected["report"][name]
    assert np.sum(expected["report"]["counts"]) == 64
    mass = [result["report"]["attention"]["relevance"]["mass"] for result in (found, expected)]
    np.testing.assert_allclose(*mass, rtol=1e-5)
    np.testing.assert_allclose(found["weights"], expected["weights"], rtol=1e-6)
    assert expected["weights"] != [[1.0, 1.0]] * 4
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)


def test_ranks_agree_to_the_last_bit(two: list[Result]) -> None:
    assert two[0] == two[1]


def test_agreed_values_are_logged_without_a_warning(two: list[Result]) -> None:
    assert two[0]["warnings"] == []


def test_callbacks_choose_by_the_values_of_all(one: Result, two: list[Result]) -> None:
    assert two[0]["chosen"] == pytest.approx(one["chosen"], rel=1e-4)
    assert two[0]["chosen"]["distance"] > 0


def test_a_validation_costs_one_collective(two: list[Result]) -> None:
    first, *others = two[0]["collectives"]
    assert sorted(first) == ["all_gather", "all_gather", "all_reduce"]  # the processes agree on layers and sizes
    assert others == [["all_reduce"]]


def test_conclusions_are_those_of_one_process(two: list[Result]) -> None:
    held: list[str] = []
    for number, shares in enumerate(ROUNDS):
        held += dict.fromkeys(layer for share in shares for layer in share if layer not in held)
        found = two[0]["conclusions"][number]
        assert found == two[1]["conclusions"][number]
        if number == FAILING or not held:
            expected = "A process could not measure all of its data." if held else []
            assert (found["names"], found["fields"]) == (expected, [])
            continue
        assert set(found["names"]) == set(held)
        union = HeadStatisticsMetric(len(held), max(LAYERS[layer] for layer in held))
        for rank, share in enumerate(shares):
            for layer in share:
                union.update(found["names"].index(layer), *layer_batch(number, rank, layer))
        for own, expected in zip(found["fields"], union.compute(), strict=True):
            np.testing.assert_allclose(own, expected.nan_to_num(-1), rtol=1e-14)


def test_processes_agree_anew_only_where_something_is_new(two: list[Result]) -> None:
    agree, conclude = ["all_gather", "all_gather"], ["all_reduce"]
    calls = [conclusion["calls"] for conclusion in two[0]["conclusions"]]
    assert calls[0] == [*agree, *conclude]
    grown = [*conclude, *agree, *conclude]
    assert calls[1:] == [grown, conclude, grown, conclude, conclude, conclude]


def test_uneven_shares_are_counted_once_each(two: list[Result]) -> None:
    assert np.sum(two[0]["uneven"]["report"]["counts"]) == 32
    assert np.max(two[0]["uneven"]["samples"]) == 32


def test_only_rank_zero_writes(folders: tuple[Path, Path], one: Result) -> None:
    single, double = (
        {path.relative_to(folder / "run").as_posix(): path for path in (folder / "run").glob("**/*") if path.is_file()}
        for folder in folders
    )
    assert len([name for name in single if name.endswith(".png")]) > 10
    assert set(single) == set(double)  # the validation of its own was at a step that was drawn before
    lines = {
        name: [run[name].read_text().count("\n") for run in (single, double)]
        for name in single
        if "attention/" in name and not name.endswith("png")
    }
    assert lines["attention/bias.jsonl"] == [2, 3]
    rows = [count - 1 for count in lines["attention/head_statistics.csv"]]
    importance = 2 * np.size(one["even"]["importance"][0])  # of two epochs: a validation alone has no training steps
    assert rows[1] - importance == 1.5 * (rows[0] - importance)

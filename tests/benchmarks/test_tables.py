"""Every table runs, on problems so small that its numbers mean nothing, and writes what the page reads."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from benchmarks import runner
from benchmarks.memory_arm import measured
from benchmarks.paired import Interval
from benchmarks.resident import Memory, resident_growth
from benchmarks.table import Block, Goal, Setting, Table

ARM = {
    "seconds",
    "ratio",
    "low",
    "high",
    "least_ratio",
    "process_seconds",
    "process_ratio",
    "process_low",
    "process_high",
}
GOAL = {
    *("number", "quantity", "bound", "predicted", "limit", "between", "block", "of", "at_least", "unit"),
    *("measured", "verdict"),
}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", runner.NAMES)
def test_table_runs_and_writes_what_the_page_reads(name, tmp_path, capsys, monkeypatch):
    # a fresh process for each arm would take seconds; `test_memory_of_a_fresh_process` starts one
    monkeypatch.setattr("benchmarks.memory.fresh_memory", lambda arm, tokens, threads: measured(arm, tokens))
    if name == "pictures":
        pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    assert runner.main([name, "--quick", "--long", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"table", "title", "seconds", "error", "blocks", "goals", "machine"} <= set(result)
    assert result["error"] is None
    assert result["machine"]["threads"] == 1
    assert {"processor", "cores", "device", "torch", "date"} <= set(result["machine"])
    for block in result["blocks"]:
        assert {"key", "title", "pairs", "kernel", "arms", "values"} <= set(block)
        for arm in block["arms"].values() if block["pairs"] else ():
            assert set(arm) >= ARM
    assert result["goals"]
    for goal in result["goals"]:
        assert set(goal) == GOAL
        assert goal["measured"] is not None, f"{goal['number']} {goal['quantity']} names a block that is not run"
        assert goal["measured"]["value"] == goal["measured"]["value"]
        assert goal["verdict"] in ("met", "undecided", "missed")
        if goal["number"] in ("G19", "G20"):  # counted and not timed: right on small problems too
            assert goal["measured"]["value"] == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["goals"] == result["goals"]
    assert list(summary["tables"]) == [name]
    assert summary["tables"][name]["machine"] == result["machine"]


def test_a_table_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    def broken(setting):
        yield Block("first", "a block before it breaks")
        raise RuntimeError("no such luck")

    def whole(setting: Setting):
        yield Block("only", "a block", setting.turns({"one": lambda: None}))

    tables = {"memory": Table("memory", "broken", (), broken), "capture": Table("capture", "whole", (), whole)}
    monkeypatch.setattr(runner, "load", tables.__getitem__)
    assert runner.main(["memory", "capture", "--quick", "--out", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "[1/2] memory" in output.out
    assert "[2/2] capture" in output.out
    assert "Failed: memory." in output.err
    failed, done = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("memory", "capture"))
    assert failed["error"] == "RuntimeError: no such luck"
    assert [block["key"] for block in failed["blocks"]] == ["first"]
    assert list(done["blocks"][0]["arms"]) == ["one"]


def test_unknown_names_are_refused_before_anything_runs(tmp_path, capsys):
    assert runner.main(["captures", "--out", str(tmp_path)]) == 2
    assert "No table is named 'captures'. Known: attention_call," in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_single_table_joins_those_that_were_measured_before(tmp_path, monkeypatch):
    def run(setting: Setting):
        yield Block("only", "a block", values={"value": Interval.exact(setting.pick(1.0, 0.5))})

    goals = {name: Goal(name, "q", 1.0, None, "", "", "only", "value") for name in ("memory", "capture", "losses")}
    monkeypatch.setattr(runner, "load", lambda name: Table(name, name, (goals[name],), run))
    for name in ("capture", "losses", "memory", "capture"):
        assert runner.main([name, "--quick", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["tables"]) == [goal["number"] for goal in summary["goals"]] == ["memory", "capture", "losses"]


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        (["--device", "foo"], "`--device` must be cpu or cuda, got 'foo'."),
        (["--device", "meta"], "`--device` must be cpu or cuda, got 'meta'."),
        (["--device", "cuda:99"], "`--device cuda:99` needs a GPU that torch can use, and it finds"),
        (["--threads", "0"], "`--threads` must be at least 1, got 0."),
    ],
)
def test_what_would_stop_a_run_is_said_before_anything_runs(wrong, answer, tmp_path, capsys):
    assert runner.main(["recompiles", "--quick", "--out", str(tmp_path / "new"), *wrong]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(answer)
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_the_place_of_the_folder_is_refused_before_anything_runs(below, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert runner.main(["recompiles", "--quick", "--out", str(file / below)]) == 2
    output = capsys.readouterr()
    assert "cannot be a folder" in output.err
    assert output.out == ""
    assert file.read_text() == "mine"


def test_resident_growth_sees_memory_that_is_touched():
    size = 256 * 2**20  # more than an allocator keeps
    assert 0.7 * size < resident_growth(partial(torch.ones, size // 4)) < 1.3 * size


@pytest.mark.slow
def test_memory_of_a_fresh_process():
    from benchmarks.resident import fresh_memory

    memory = fresh_memory("fused forward", 4096)
    output = 12 * 4096 * 64 * 4
    assert output <= memory.tensors < 1.2 * output
    assert 0.5 * output < memory.resident < 3 * output
    with pytest.raises(RuntimeError, match="`no such arm` at 64 tokens failed in its own process"):
        fresh_memory("no such arm", 64)


def test_exact_statistics_need_less_than_the_maps_of_one_layer():
    memory = measured("all exact statistics", 1024)
    assert isinstance(memory, Memory)
    assert 0 < memory.tensors < 12 * 1024 * 1024 * 4 / 2

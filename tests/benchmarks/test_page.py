from __future__ import annotations

import json
import re

import pytest

from benchmarks import page
from benchmarks.runner import NAMES, load

MACHINE = {
    "processor": "Some CPU",
    "cores": 2,
    "device": "cpu",
    "threads": 1,
    "torch": "2.13.0",
    "python": "3.11",
    "date": "2026-01-01",
    "quick": False,
}


def write(folder, name, machine=MACHINE, error=None, **measured):
    """Write the file of a table in which some goals, by number, have the given value, low and high."""
    goals = []
    for goal in load(name).goals:
        facts = goal.judged({}, "cpu")
        if goal.number in measured:
            ends = dict(zip(("value", "low", "high"), measured[goal.number], strict=True))
            facts |= {"measured": ends, "verdict": "met" if goal.at_least == (ends["value"] > goal.bound) else "missed"}
        goals.append(facts)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine, "error": error, "goals": goals}))


def rows(text):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| G")
    ]


def test_every_goal_has_a_row_in_order(tmp_path):
    write(tmp_path, "recompiles")
    numbers = [row[0] for row in rows(page.table(tmp_path))]
    assert sorted(set(numbers), key=lambda number: int(number[1:])) == [f"G{number}" for number in range(1, 22)]
    assert numbers == sorted(numbers, key=lambda number: int(number[1:]))


def test_what_nobody_measured_says_so(tmp_path):
    write(tmp_path, "recompiles", G19=(0.0, 0.0, 0.0))
    measured = {row[0]: row[5] for row in rows(page.table(tmp_path))}
    assert measured["G19"] == "0"
    assert {measured[number] for number in ("G1", "G5", "G16", "G17", "G21")} == {"not measured yet"}


def test_numbers_are_those_of_the_files(tmp_path):
    write(tmp_path, "log_points", G12=(9.87, 9.51, 10.2), G13=(612.0, 601.0, 633.3))
    text = page.table(tmp_path)
    found = {row[0]: row for row in rows(text)}
    assert found["G12"][5:7] == ["9.87 [9.51, 10.2]", "met"]
    assert found["G13"][5:7] == ["612 [601, 633] µs", "**missed**, by a factor of 12.2"]
    assert "Measured on: Some CPU, 1 thread of 2 cores, torch 2.13.0, Python 3.11, 2026-01-01." in text


def test_two_machines_and_failures_are_told(tmp_path):
    write(tmp_path, "recompiles", error="RuntimeError: no such luck")
    write(tmp_path, "log_points", machine={**MACHINE, "processor": "Other CPU", "threads": 2})
    text = page.table(tmp_path)
    assert "Some CPU, 1 thread of 2 cores, torch 2.13.0, Python 3.11, 2026-01-01 (recompiles)." in text
    assert "Other CPU, 2 threads of 2 cores" in text
    assert "`recompiles` failed: RuntimeError: no such luck" in text


def test_quick_runs_are_refused(tmp_path, capsys):
    write(tmp_path, "recompiles", machine={**MACHINE, "quick": True})
    with pytest.raises(ValueError, match="Measured with --quick, which measures nothing: recompiles"):
        page.table(tmp_path)
    assert page.main([str(tmp_path), str(page.PAGE)]) == 2
    assert "--quick" in capsys.readouterr().err


def test_only_what_is_between_the_markers_changes(tmp_path):
    write(tmp_path, "recompiles", G19=(0.0, 0.0, 0.0))
    path = tmp_path / "page.md"
    path.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    assert page.main([str(tmp_path), str(path)]) == 0
    once = path.read_text()
    assert re.fullmatch(r"before\n<!-- .*?-->\n\n.*\n\n<!-- .*-->\nafter\n", once, flags=re.DOTALL)
    assert "old" not in once
    page.main([str(tmp_path), str(path)])
    assert path.read_text() == once
    with pytest.raises(ValueError, match="The page needs the lines"):
        page.fill("no markers", "table")


def test_a_folder_is_asked_for(tmp_path, capsys):
    assert page.main([]) == page.main([str(tmp_path / "none")]) == 2
    assert "Give the folder" in capsys.readouterr().err


def test_a_folder_without_results_leaves_the_page_alone(tmp_path, capsys):
    path = tmp_path / "page.md"
    path.write_text(f"{page.BEGIN}\nold\n{page.END}\n")
    assert page.main([str(tmp_path), str(path)]) == 2
    assert "holds no results" in capsys.readouterr().err
    assert path.read_text() == f"{page.BEGIN}\nold\n{page.END}\n"


def test_a_page_that_is_not_there_is_named(tmp_path, capsys):
    write(tmp_path, "recompiles", G19=(0.0, 0.0, 0.0))
    assert page.main([str(tmp_path), str(tmp_path / "none.md")]) == 2
    assert "There is no page" in capsys.readouterr().err


def test_the_published_page_has_all_goals_and_tables():
    text = page.PAGE.read_text("utf-8")
    assert len(rows(text.partition(page.BEGIN)[2])) >= 20
    assert [name for name in NAMES if f"| `{name}` |" not in text] == []

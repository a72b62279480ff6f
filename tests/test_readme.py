"""The README's code runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def _title(block: str) -> str:
    return next(line for line in reversed(block.splitlines()) if line.strip())[:40]


@pytest.mark.parametrize("block", BLOCKS, ids=_title)
def test_python_block_runs_and_prints_what_its_comments_say(block, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*?\)  # (.*)", block):
        assert expected in printed


def test_blocks_were_found():
    assert len(BLOCKS) == 5


def test_links_point_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target

"""The page that chooses a loss names every public module, and nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import losses

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")


def test_every_public_class_is_on_the_page() -> None:
    classes = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    outputs = {name for name in classes if hasattr(getattr(losses, name), "_fields")}
    assert {name for name in classes - outputs if f"`{name}" not in PAGE} == set()


def test_every_class_on_the_page_exists() -> None:
    named = re.findall(r"`([A-Z][A-Za-z]+)[`(]", PAGE)
    assert len(named) > 40
    assert [name for name in named if name not in losses.__all__] == []

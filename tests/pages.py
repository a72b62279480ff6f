"""What the tests of documentation pages share: their code, their headings, and what they call."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any


def blocks(page: str) -> list[str]:
    """Return the Python code of a page."""
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def titles(page: str) -> list[str]:
    """Return the headings of the second level."""
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return re.findall(r"^## (.*)$", prose, flags=re.MULTILINE)


def known(page: str, homes: Sequence[ModuleType]) -> dict[str, Any]:
    """Return everything public that can be called and that the page does not define itself."""
    found = {name: getattr(home, name) for home in homes for name in home.__all__}
    own = {node.name for block in blocks(page) for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ClassDef)}
    return {name: value for name, value in found.items() if callable(value) and name not in own}


def check_arguments(page: str, homes: Sequence[ModuleType]) -> int:
    """Bind the arguments of every public name that a page calls, in code or in prose; return how many there are."""
    callables, count = known(page, homes), 0
    for home, name, call in _calls(page, callables):
        target = next((getattr(h, name) for h in homes if home and h.__name__ == home), callables[name])
        given = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        inspect.signature(target).bind_partial(*[None] * len(call.args), **given)
        count += 1
    return count


def _calls(page: str, callables: dict[str, Any]) -> Iterator[tuple[str, str, ast.Call]]:
    for match in re.finditer(r"(?<!def )\b(?:(losses)\.)?([A-Za-z_]\w*)\(", page):
        home, name = match.group(1) or "", match.group(2)
        if name not in callables:
            continue
        call = ast.parse(_to_closing_bracket(page[match.start(2) :]), mode="eval").body
        assert isinstance(call, ast.Call), match.group()
        yield home, name, call


def _to_closing_bracket(text: str) -> str:
    depth = accumulate((letter == "(") - (letter == ")") for letter in text)
    return text[
        : next(
            end for end, (level, letter) in enumerate(zip(depth, text, strict=True), 1) if letter == ")" and not level
        )
    ]

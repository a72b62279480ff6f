"""The public names, pinned: none comes or goes without a change to `public_surface.json`."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest

import attn_callbacks

SURFACE: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_name("public_surface.json").read_text())


def parameters(thing: object) -> list[str]:
    """Names of the parameters of a function or a constructor; nothing for constants and exceptions."""
    plain = not callable(thing) or (isinstance(thing, type) and issubclass(thing, BaseException))
    return [] if plain else list(inspect.signature(thing).parameters)


@pytest.mark.parametrize("package", SURFACE)
def test_names_and_parameters(package: str) -> None:
    module = importlib.import_module(package)
    found = {name: parameters(getattr(module, name)) for name in module.__all__}
    assert found == SURFACE[package]


@pytest.mark.parametrize("package", SURFACE)
def test_names_are_listed_once_and_by_dir(package: str) -> None:
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__))
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", SURFACE)
def test_every_name_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert [name for name in module.__all__ if not inspect.getdoc(getattr(module, name))] == []


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'attn_callbacks' has no attribute 'Nonsense'"):
        attn_callbacks.Nonsense  # noqa: B018


def test_version_is_a_literal_of_three_numbers() -> None:
    assert [part.isdigit() for part in attn_callbacks.__version__.split(".")] == [True] * 3

"""Import contracts: which room may import which, and what an import loads.

The arrows are read from the source, so an import inside a function counts too; imports under ``TYPE_CHECKING`` do not,
because they never run. What an import really loads is then measured in a process of its own.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("attn_callbacks", "losses")
LIGHTNING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})

# Room -> the other rooms of attn_callbacks it may import. `_checks` and `_plain` are open to all and are left out.
ROOMS: dict[str, set[str]] = {
    "_checks": set(),
    "_lightning": set(),
    "_plain": set(),
    "batch": set(),
    "functional": set(),
    "capture": {"functional"},
    "render": set(),
    "store": set(),
    "metrics": {"functional"},
    "analysis": {"capture", "functional"},
    "bias": {"functional", "metrics"},
    "feedback": {"bias", "capture", "functional"},
    "tb_plugin": {"render", "store"},
}
ROOMS["callbacks"] = set(ROOMS)
ROOMS["__init__"] = set(ROOMS)  # loads them lazily; `LOADS` below holds it to that

# Room -> what it may import besides the standard library. `losses` stands for the whole package.
LIBRARIES: dict[str, set[str]] = {
    "_checks": set(),
    "_plain": set(),
    "_lightning": {"lightning", "pytorch_lightning", "lightning_utilities"},
    "batch": {"torch"},
    "capture": {"torch", "transformers"},  # transformers inside functions only; `LOADS` holds it to that
    "functional": {"scipy", "torch"},  # scipy inside functions only; `LOADS` holds it to that
    "render": {"PIL", "numpy"},
    "store": {"numpy"},
    "metrics": {"torch", "torchmetrics"},
    "analysis": {"numpy", "scipy", "torch"},  # the same
    "bias": {"numpy", "torch", "torchmetrics"},
    "feedback": {"numpy", "torch"},
    "tb_plugin": {"numpy", "tensorboard", "werkzeug"},
    "callbacks": {"lightning_utilities", "numpy", "tensorboard", "torch", "torchmetrics"},
    "__init__": set(),
    "losses": {"scipy", "torch", "torchjd"},  # all but torch inside functions only; `LOADS` holds it to that
}

# Imported one after the other in one process, light before heavy; none may have loaded what stands beside it by then.
LOADS: dict[str, set[str]] = {
    "attn_callbacks": {"numpy", "tensorboard", "torch", "torchmetrics", "transformers", *LIGHTNING},
    "attn_callbacks.render": {"tensorboard", "torch", "torchmetrics", "transformers", *LIGHTNING},
    "attn_callbacks.store": {"tensorboard", "torch", "torchmetrics", "transformers", *LIGHTNING},
    "attn_callbacks.tb_plugin": {"torch", "torchmetrics", *LIGHTNING},
    "losses": {"scipy", "torchjd", "torchmetrics", "transformers", *LIGHTNING},
    "attn_callbacks.functional": {"scipy", "torchmetrics", "transformers", *LIGHTNING},
    "attn_callbacks.capture": {"torchmetrics", "transformers", *LIGHTNING},
    "attn_callbacks.batch": {"torchmetrics", "transformers", *LIGHTNING},
    "attn_callbacks.analysis": {"scipy", "torchmetrics", "transformers", *LIGHTNING},
    "attn_callbacks.metrics": {*LIGHTNING},
    "attn_callbacks.bias": {*LIGHTNING},
    "attn_callbacks.feedback": {*LIGHTNING},
}


class _Imports(ast.NodeVisitor):
    """Collect ``(line, dotted name)`` of everything a module imports at run time."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        origin = "." * node.level + (node.module or "")
        self.found += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self.found.append((node.lineno, str(node.args[0].value)))
        self.generic_visit(node)


def violations(source: str, room: str) -> Iterator[str]:
    """Say, one sentence each, which imports in ``source`` a module of ``room`` may not have."""
    imports = _Imports()
    imports.visit(ast.parse(source))
    for line, name in imports.found:
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "":
            yield f"line {line}: relative import of {name!r}"
        elif package == "losses" or room == "losses":
            if package != room and package not in sys.stdlib_module_names | LIBRARIES[room]:
                yield f"line {line}: `{room}` may not import {name!r}"
        elif package == "attn_callbacks":
            if target not in {room, "_checks", "_plain", "__version__"} | ROOMS[room]:
                yield f"line {line}: `{room}` may not import {name!r}"
        elif package not in sys.stdlib_module_names | LIBRARIES[room]:
            yield f"line {line}: `{room}` may not import {name!r}"


def room_of(path: Path) -> str:
    package, first = path.relative_to(ROOT).with_suffix("").parts[:2]
    return package if package == "losses" else first


MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in LIBRARIES, f"`{room}` is a new room: write down in ROOMS and LIBRARIES what it may import"
    assert list(violations(path.read_text(encoding="utf-8"), room)) == []


def test_every_room_has_both_rules() -> None:
    assert set(ROOMS) | {"losses"} == set(LIBRARIES)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("functional", "import attn_callbacks.capture"),
        ("capture", "from attn_callbacks.metrics import HeadStatistics"),
        ("capture", "from attn_callbacks import render"),
        ("capture", "from attn_callbacks import AttentionHeatmaps"),
        ("capture", "def later():\n    import pytorch_lightning"),
        ("functional", "import torchmetrics"),
        ("metrics", "from attn_callbacks.capture import AttentionCall"),
        ("feedback", "from attn_callbacks import _lightning"),
        ("render", "import torch"),
        ("render", "if True:\n    from torch import nn"),
        ("render", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
        ("render", "import importlib\nimportlib.import_module('torch.nn')"),
        ("callbacks", "from lightning.pytorch import Callback"),
        ("callbacks", "import losses"),
        ("callbacks", "from losses import WeightedCrossEntropyLoss"),
        ("callbacks", "from . import heatmaps"),
        ("__init__", "import torch"),
        ("losses", "import attn_callbacks"),
        ("losses", "from attn_callbacks._checks import at_least"),
        ("losses", "import numpy"),
    ],
)
def test_a_wrong_arrow_is_found(room: str, source: str) -> None:
    assert len(list(violations(source, room))) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("capture", "import math\nimport torch.nn.functional as F\nfrom attn_callbacks.capture import AttentionCall"),
        ("capture", "from attn_callbacks._checks import at_least\nfrom attn_callbacks import __version__"),
        ("feedback", "if TYPE_CHECKING:\n    from attn_callbacks.capture import AttentionCall\n    import lightning"),
        ("feedback", "import typing\nif typing.TYPE_CHECKING:\n    import losses"),
        ("callbacks", "from attn_callbacks._lightning import Callback\nfrom attn_callbacks.capture import record"),
        ("_lightning", "import importlib\nimportlib.import_module('lightning.pytorch')"),
        ("losses", "from losses.classification.weighted import WeightedCrossEntropyLoss\nfrom torch import nn"),
    ],
)
def test_a_right_arrow_passes(room: str, source: str) -> None:
    assert list(violations(source, room)) == []


@pytest.mark.parametrize("folder", [*PACKAGES, "tests"])
def test_every_folder_is_a_package(folder: str) -> None:
    """Without its ``__init__.py`` a room stays out of the wheel, and tests/losses shadows the real ``losses``."""
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    assert [str(path) for path in sorted(folders) if not (path / "__init__.py").is_file()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def _exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """Import every module of ``LOADS`` in one fresh process: its file, or the error, and what is loaded by then."""
    script = """
import importlib, json, sys
report = {}
for name in json.loads(sys.argv[1]):
    try:
        origin = importlib.import_module(name).__file__
    except Exception as error:
        origin = f"{type(error).__name__}: {error}"
    report[name] = [origin, *(loaded for loaded in sys.modules if "." not in loaded)]
print(json.dumps(report))
"""
    names = json.dumps([name for name in LOADS if _exists(name)])
    command = [sys.executable, "-c", script, names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", [name for name in LOADS if _exists(name)])
def test_import_stays_light(module: str, loaded: dict[str, list[str]]) -> None:
    origin, *names = loaded[module]
    assert Path(origin).is_relative_to(ROOT), f"`{module}` is not ours, or does not import: {origin}"
    assert sorted(LOADS[module].intersection(names)) == []


def test_losses_and_capture_load_torch(loaded: dict[str, list[str]]) -> None:
    """The check above would pass if nothing were recorded; this one would not."""
    assert "torch" in loaded["losses"]
    assert "torch" in loaded["attn_callbacks.capture"]

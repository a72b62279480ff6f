"""The pages about heads: their code runs, all have the same sections, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import attn_callbacks
from attn_callbacks import analysis, callbacks, capture, functional, metrics, render
from tests.callbacks.models import NAME, Classifier, loader, pl
from tests.pages import blocks, check_arguments, titles

FOLDER = Path(__file__).parents[1] / "docs" / "heads"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md"))}
METHODS = sorted({*PAGES} - {"README.md", "minilm.md", "vision.md"})
HOMES = (attn_callbacks, analysis, callbacks, capture, functional, metrics, render)
SECTIONS = ("Use it", "How to read it", "Cost", "Limits", "Source")

every_method = pytest.mark.parametrize("name", METHODS)


class QuietTrainer(pl.Trainer):
    """Trains as a page says, and prints nothing."""

    def __init__(self, **options: Any) -> None:
        quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
        super().__init__(**{**options, **quiet, "accelerator": "cpu"})


class Translation(pl.LightningModule):
    """Four source words become three target words, linked to the first three."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.net = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        states = self.net(self.embed(batch["source_text"]), self.embed(batch["target_text"]))
        return F.cross_entropy(F.linear(states, self.embed.weight).flatten(0, 1), batch["target_text"].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def pairs() -> DataLoader[Any]:
    links, ones = torch.eye(3, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    samples = [
        {
            "source_text": torch.randint(9, (4,)),
            "target_text": torch.randint(9, (3,)),
            "links": links,
            "target_valid": ones,
        }
        for _ in range(8)
    ]
    return DataLoader(samples, 4)  # type: ignore[arg-type]


def prelude(name: str) -> dict[str, Any]:
    """What the pages take for granted."""
    module, train, validation = (Translation(), pairs(), pairs()) if name == "alignment.md" else (None, None, None)
    return {
        "module": module or Classifier(),
        "train_loader": train or loader(16),
        "val_loader": validation or loader(16, seed=1),
    }


@every_method
def test_code_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", QuietTrainer)
    torch.manual_seed(0)
    names = prelude(name)
    for block in blocks(PAGES[name]):
        if "transformers" in block:
            pytest.importorskip("transformers")
        code = block.replace("import pytorch_lightning as pl", f"import {NAME} as pl")
        exec(compile(code, name, "exec"), names)


@every_method
def test_sections(name: str) -> None:
    found = titles(PAGES[name])
    assert all(any(title.startswith(section) for title in found) for section in SECTIONS), found
    assert "RESULT" not in PAGES[name]


@every_method
def test_arguments_exist(name: str) -> None:
    assert check_arguments(PAGES[name], HOMES) > 0


def test_everything_public_is_on_a_page() -> None:
    text = "\n".join(PAGES.values())
    observers = {"HeadRoles", "HeadImportance", "AttentionPaths", "ErrorAnalysis", "AlignmentMonitor", "TrainingHealth"}
    functions = {name for name in analysis.__all__ if not isinstance(getattr(analysis, name), type)}
    assert {name for name in observers | functions if not re.search(rf"\b{name}\b", text)} == set()


def test_the_index_names_every_page() -> None:
    assert {*re.findall(r"\]\((\w+\.md)\)", PAGES["README.md"])} >= {*PAGES} - {"README.md"}


def test_links_point_to_files() -> None:
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page):
            assert (FOLDER / target).exists(), (name, target)

"""The pages of the feedback: their code runs, every feedback has one, and they name no argument that does not exist."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import attn_callbacks
import losses
from attn_callbacks import feedback
from attn_callbacks.feedback import Feedback, StepFeedback
from tests.callbacks.models import NAME, pl
from tests.pages import blocks, check_arguments, titles

FOLDER = Path(__file__).parents[1] / "docs" / "feedback"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md"))}
METHODS = sorted(
    name
    for name in feedback.__all__
    if isinstance(found := getattr(feedback, name), type)
    and issubclass(found, Feedback)
    and found not in (Feedback, StepFeedback)
)
CONTROLS = ("RandomLossWeights", "RandomRationaleControl", "StaticInverseFrequency")
HOMES = (losses, attn_callbacks, feedback)  # a name that two of them have is, bare, that of the last
SECTIONS = ("Use it", "When to use", "What it needs", "Suggested settings", "Cost", "Resume", "Attribution")
QUIET = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "max_epochs": 2,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}

every_page = pytest.mark.parametrize("name", PAGES)


class Words(Dataset[dict[str, Tensor]]):
    """Sentences whose word 2 is the label; word 4, which is marked, agrees with it nine times in ten."""

    def __init__(self, samples: int) -> None:
        self.labels = torch.randint(2, (samples,))
        self.groups = torch.where(torch.rand(samples) < 0.9, self.labels, 1 - self.labels)
        self.ids = torch.randint(6, 20, (samples, 6))
        self.ids[:, 2], self.ids[:, 4] = 2 + self.labels, 4 + self.groups

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = torch.arange(6)
        parts = {"input_ids": self.ids[index], "labels": self.labels[index], "group": self.groups[index]}
        return {**parts, "spurious": place == 4, "relevance": place == 2}


class Steps(pl.LightningModule):
    """The steps that the pages leave out."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, target = _parts(batch)
        return F.cross_entropy(self(inputs), target)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self(_parts(batch)[0])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Classifier(Steps):
    """Embedding, one layer of attention, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 2)
        self.attention, self.dropout = nn.MultiheadAttention(8, 2, batch_first=True), nn.Dropout(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.embedding(ids)
        return self.head(self.dropout(tokens + self.attention(tokens, tokens, tokens)[0]).mean(dim=1))


class TableClassifier(Steps):
    """A network on twenty columns."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, features: Tensor) -> Tensor:
        return self.model(features)


class ShortTrainer(pl.Trainer):
    """Trains for two epochs, whatever a page says, and writes nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, **QUIET})


def _parts(batch: Any) -> tuple[Tensor, Tensor]:
    return (batch["input_ids"], batch["labels"]) if isinstance(batch, dict) else (batch[0], batch[1])


def prelude() -> dict[str, Any]:
    """What the pages take for granted."""
    train, validation, labels = Words(64), Words(64), torch.randint(2, (64,))
    columns = torch.randn(64, 20)
    columns[:, 0] += 3 * labels
    table = TensorDataset(columns, labels)
    return {
        "Classifier": Classifier,
        "TableClassifier": TableClassifier,
        "train": train,
        "train_loader": DataLoader(train, 32),
        "val_loader": DataLoader(validation, 32),
        "table_loader": DataLoader(table, 32),
        "table_val_loader": DataLoader(table, 32),
    }


def snake(name: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()


@every_page
def test_code_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", ShortTrainer)
    names = prelude()
    for block in blocks(PAGES[name]):
        code = block.replace("import pytorch_lightning as pl", f"import {NAME} as pl")
        exec(compile(code, name, "exec"), names)
    if name != "controls.md":  # its monitors are local
        assert len(names["monitor"].ledger) == 2
        assert names["monitor"].feedback


@pytest.mark.parametrize("method", METHODS)
def test_every_feedback_has_a_page(method: str) -> None:
    if method in CONTROLS:
        assert f"\n## {method}\n" in PAGES["controls.md"]
    else:
        page = PAGES[f"{snake(method)}.md"]
        assert page.startswith(f"# {method}\n")
        assert len(titles(page)) == len(SECTIONS)
        assert all(title.startswith(start) for title, start in zip(titles(page), SECTIONS, strict=True)), titles(page)
    assert f"`{method}`" in PAGES["README.md"]


@every_page
def test_arguments_exist(name: str) -> None:
    check_arguments(PAGES[name], HOMES)


@every_page
def test_settings_in_prose_and_tables_exist(name: str) -> None:
    public = [getattr(home, name) for home in HOMES for name in home.__all__]
    parameters = {parameter for each in public if callable(each) for parameter in _parameters(each)}
    prose = re.sub(r"```.*?```", "", PAGES[name], flags=re.DOTALL)
    named = re.findall(r"`(\w+)=[^`]*`", prose)
    for row in re.findall(r"^\| (`[^|]*) \| [^|]+ \| [^|]+ \|$", prose, flags=re.MULTILINE):
        named += re.findall(r"`(\w+)`", row) if "| setting | default | why |" in prose else []
    assert set(named) - {"group"} <= parameters  # `group=` is what a training step passes to its loss


def _parameters(target: Any) -> list[str]:
    try:
        return list(inspect.signature(target).parameters)
    except ValueError:
        return []


@pytest.mark.parametrize("method", [method for method in METHODS if method not in CONTROLS])
def test_defaults_in_tables_are_those_of_the_code(method: str) -> None:
    parameters = inspect.signature(getattr(feedback, method)).parameters
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([^|]+) \| [^|]+ \|$", PAGES[f"{snake(method)}.md"], re.MULTILINE)
    for settings, defaults in rows:
        pairs = zip(re.findall(r"\w+", settings), defaults.split(", "), strict=True)
        for setting, default in pairs:
            assert ast.literal_eval(default.strip(" `")) == parameters[setting].default, (setting, default)


def test_links_point_to_files() -> None:
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page):
            assert (FOLDER / target).exists(), (name, target)

"""Tiny models, data and trainers that the callback tests share."""

from __future__ import annotations

import importlib
import os
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import losses
from attn_callbacks import (
    AlignmentMonitor,
    AttentionGuidance,
    AttentionHeatmaps,
    AttentionPaths,
    BiasMonitor,
    ClassReweighting,
    ErrorAnalysis,
    HeadImportance,
    HeadRoles,
    HeadStatistics,
    TrainingHealth,
)

# The whole suite runs under the other name with ATTN_CALLBACKS_LIGHTNING=lightning.pytorch
NAME = os.environ.get("ATTN_CALLBACKS_LIGHTNING", "pytorch_lightning")
pl: Any = importlib.import_module(NAME)

HEADS, LAYERS, WIDTH, LENGTH, VOCABULARY = 2, 2, 16, 10, 40

REGISTRY: dict[str, Callable[[], Any]] = {
    "AlignmentMonitor": lambda: AlignmentMonitor(),
    "AttentionHeatmaps": lambda: AttentionHeatmaps(samples=2),
    "AttentionPaths": lambda: AttentionPaths(samples=2),
    "BiasMonitor": lambda: BiasMonitor(),
    "ErrorAnalysis": lambda: ErrorAnalysis(samples=2),
    "HeadImportance": lambda: HeadImportance(),
    "HeadRoles": lambda: HeadRoles(),
    "HeadStatistics": lambda: HeadStatistics(),
    "TrainingHealth": lambda: TrainingHealth(every_n_steps=2),
}
"""Every public callback as an observer, with the least arguments."""

DRAWING = sorted({*REGISTRY} - {"TrainingHealth"})
"""The callbacks that look at validations and draw pictures."""

STATEFUL = {"BiasMonitor", "HeadRoles", "TrainingHealth"}
"""The callbacks that write into checkpoints; Lightning asks that two of a kind differ in their arguments."""


def feeding_monitor(**options: Any) -> BiasMonitor:
    """A monitor with all feedback there is."""
    guidance = AttentionGuidance(losses.AttentionGuidedLoss(), coefficient=1.0)
    options = {"min_support": 2, **options}
    return BiasMonitor(feedback=[ClassReweighting(by="group", min_support=2), guidance], **options)


class Texts(Dataset[dict[str, Tensor]]):
    """Sentences whose word 3 is the label and whose word 5 agrees with it nine times in ten; padded at the right."""

    def __init__(self, samples: int = 32, seed: int = 0, agreement: float = 0.9) -> None:
        source = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 2, (samples,), generator=source)
        agrees = torch.rand(samples, generator=source) < agreement
        self.shortcut = torch.where(agrees, self.labels, 1 - self.labels)
        self.group = 2 * self.labels + self.shortcut
        self.input_ids = torch.randint(6, VOCABULARY, (samples, LENGTH), generator=source)
        self.input_ids[:, 3], self.input_ids[:, 5] = 2 + self.labels, 4 + self.shortcut
        lengths = torch.randint(LENGTH - 3, LENGTH + 1, (samples,), generator=source)
        self.attention_mask = (torch.arange(LENGTH) < lengths[:, None]).long()
        self.input_ids *= self.attention_mask
        self.relevance = torch.zeros(samples, LENGTH, dtype=torch.bool)
        self.relevance[:, 3] = True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "labels", "group", "relevance")
        return {name: getattr(self, name)[index] for name in names}


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """``(tokens, label)`` without padding, or ``(image, label)``."""

    def __init__(self, samples: int = 32, seed: int = 0, images: bool = False) -> None:
        source = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 2, (samples,), generator=source)
        tokens = torch.randint(4, VOCABULARY, (samples, LENGTH), generator=source)
        tokens[:, 3] = 2 + self.labels
        pictures = torch.rand(samples, 3, 16, 16, generator=source) + self.labels[:, None, None, None]
        self.inputs = pictures if images else tokens

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


def encoder(dropout: float = 0.0) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=dropout, batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS)


class TextEncoder(nn.Module):
    """``nn.TransformerEncoder`` on dict batches with padding, or on ``(tokens, label)``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(VOCABULARY, WIDTH), encoder(dropout)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return self.head(self.hidden(batch["input_ids"], batch["attention_mask"] == 0)[:, 0])
        return self.head(self.hidden(batch[0], None)[:, 0])

    def hidden(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        return self.encoder(self.embed(tokens), src_key_padding_mask=padding)


class Bert(nn.Module):
    """A Hugging Face classifier built from a configuration."""

    def __init__(self, attention: str = "sdpa", dropout: float = 0.0) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            attn_implementation=attention,
        )
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, batch: Any) -> Any:
        return self.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class Vit(nn.Module):
    """A vision transformer: 16 patches and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.encoder, self.head = encoder(), nn.Linear(WIDTH, 2)

    def forward(self, batch: Any) -> Tensor:
        patches = self.patches(batch[0]).flatten(2).mT
        return self.head(self.encoder(torch.cat([self.token.expand(len(patches), -1, -1), patches], dim=1))[:, 0])


class EncoderDecoder(nn.Module):
    """``nn.Transformer`` with three learned queries over the tokens, on dict batches or on ``(tokens, label)``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.queries = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(1, 3, WIDTH))
        self.model = nn.Transformer(WIDTH, HEADS, 1, 1, 2 * WIDTH, dropout=dropout, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, batch: Any) -> Tensor:
        texts = isinstance(batch, dict)
        padding = batch["attention_mask"] == 0 if texts else None
        tokens = self.embed(batch["input_ids"] if texts else batch[0])
        queries = self.queries.expand(len(tokens), -1, -1)
        states = self.model(tokens, queries, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        return self.head(states[:, 0])


class BagOfWords(nn.Module):
    """No attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, batch: Any) -> Tensor:
        return self.head(self.embed(batch[0]).mean(dim=1))


class ClassifierSteps:
    """Steps of a classifier over ``(x, y)`` and dict batches, for a LightningModule of either import name."""

    def __init__(self, net: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.net = TextEncoder() if net is None else net
        self.lr = lr
        self.criterion = losses.WeightedCrossEntropyLoss(2, num_groups=4)

    def forward(self, batch: Any) -> Any:
        return self.net(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)

    def loss(self, batch: Any) -> Tensor:
        target = batch["labels"] if isinstance(batch, dict) else batch[1]
        group = batch["group"] if isinstance(batch, dict) else torch.zeros_like(target)
        return self.criterion(self(batch), target, group=group)


class Classifier(ClassifierSteps, pl.LightningModule):
    """The classifier under the import name of this run."""


def watchable(name: str, dropout: float = 0.0) -> Classifier:
    """A classifier with attention of the kind that a callback looks at."""
    return Classifier(EncoderDecoder(dropout) if name == "AlignmentMonitor" else TextEncoder(dropout))


def classifier(package: Any, net: nn.Module | None = None) -> Any:
    """The classifier under any import name."""
    return type("Classifier", (ClassifierSteps, package.LightningModule), {})(net)


def loader(samples: int = 32, seed: int = 0, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(Texts(samples, seed), batch_size, **options)


def pair_loader(samples: int = 32, seed: int = 0, batch_size: int = 8, images: bool = False) -> DataLoader[Any]:
    return DataLoader(Pairs(samples, seed, images), batch_size)


def quiet_trainer(folder: Path, callbacks: Sequence[Any] = (), package: Any = pl, **options: Any) -> Any:
    """A trainer that writes nothing but what was asked for."""
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder),
    }
    return package.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def csv_logger(folder: Path, package: Any = pl) -> Any:
    return package.loggers.CSVLogger(str(folder), name="", version="run")


def board_logger(folder: Path, package: Any = pl) -> Any:
    return package.loggers.TensorBoardLogger(str(folder), name="", version="board")


def fit(module: Any, trainer: Any, train: Any = None, validation: Any = None, **options: Any) -> Any:
    trainer.fit(module, train or loader(32), validation or loader(16, seed=1), **options)
    return module


def leftovers(module: nn.Module) -> dict[str, Any]:
    """What a callback may have left in a module or in torch; empty when nothing is."""
    from torch.nn.modules import module as hooks
    from torch.overrides import _get_current_function_mode_stack

    steps = {name: vars(module)[name] for name in ("training_step", "validation_step") if name in vars(module)}
    places = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    owned = {name: getattr(part, name) for name in places for part in module.modules() if getattr(part, name)}
    shared = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    left = {**steps, **owned, **{name: getattr(hooks, name) for name in shared if getattr(hooks, name)}}
    left.update({"modes": modes} if (modes := _get_current_function_mode_stack()) else {})
    patched = isinstance(torch.overrides.has_torch_function, types.FunctionType)  # else it is built in
    return {**left, "has_torch_function": torch.overrides.has_torch_function} if patched else left

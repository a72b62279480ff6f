"""What the callbacks cost a training run: an epoch with validation, with and without them.

Run: ``python -m benchmarks.training [folder for the JSON files]``.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from attn_callbacks import AttentionHeatmaps, BiasMonitor, HeadStatistics
from benchmarks.paired import compare, report

TRAIN, VALIDATION, TOKENS, BATCH = 320, 64, 64, 16


class Classifier(pl.LightningModule):
    """A small BERT on random tokens: only the time matters."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024)
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return logits."""
        return {"logits": self.model(**batch).logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def epoch(callbacks: Callable[[], list[pl.Callback]], folder: str) -> Callable[[], None]:
    """Return a function that trains one epoch and validates."""

    def loader(samples: int) -> DataLoader[dict[str, Tensor]]:
        ids = torch.randint(1000, 30000, (samples, TOKENS))
        rows = [
            {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(i % 2)}
            for i, row in enumerate(ids)
        ]
        return DataLoader(rows, BATCH)

    training, validation = loader(TRAIN), loader(VALIDATION)

    def run() -> None:
        trainer = pl.Trainer(
            max_epochs=1,
            callbacks=callbacks(),
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            accelerator="cpu",
        )
        trainer.fit(Classifier(), training, validation)

    return run


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/benchmarks")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as runs:
        arms = {
            "bare": epoch(list, runs),
            "HeadStatistics": epoch(lambda: [HeadStatistics()], runs),
            "AttentionHeatmaps": epoch(lambda: [AttentionHeatmaps()], runs),
            "BiasMonitor": epoch(lambda: [BiasMonitor()], runs),
            "all three": epoch(lambda: [HeadStatistics(), AttentionHeatmaps(), BiasMonitor()], runs),
        }
        report("epoch of training and validation", compare(arms, pairs=15, warm_up=1), folder)


if __name__ == "__main__":
    main()

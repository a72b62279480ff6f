"""Train on two processes with a sampler that was built before there were any; each writes what it was fed.

Usage: sampler_script.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from attn_callbacks.feedback.sampler import DynamicDistributedSampler

LABELS = [0] * 30 + [1] * 7
SEED = 3


class Fed(pl.LightningModule):
    """Notes the samples of each epoch; the classes weigh 1 : k in the k-th epoch but the first."""

    def __init__(self, sampler: DynamicDistributedSampler) -> None:
        super().__init__()
        self.sampler = sampler
        self.layer = torch.nn.Linear(1, 1)
        self.fed: list[list[int]] = []
        self.kept: list[bool] = []

    def on_train_epoch_start(self) -> None:
        self.fed.append([])
        self.kept.append(self.trainer.train_dataloader.sampler is self.sampler)
        if self.current_epoch:
            self.sampler.set_class_weights([1.0, 1.0 + self.current_epoch])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.fed[-1] += batch.tolist()
        return self.layer(batch[:, None].float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


def train(folder: Path, devices: int, **arguments: Any) -> Fed:
    sampler = DynamicDistributedSampler(LABELS, seed=SEED)
    module = Fed(sampler)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **arguments,
    )
    trainer.fit(module, DataLoader(torch.arange(len(LABELS)), 4, sampler=sampler))
    seen = {"fed": module.fed, "kept": module.kept}
    (folder / f"{devices}_{trainer.global_rank}.json").write_text(json.dumps(seen))
    return module


if __name__ == "__main__":
    train(Path(sys.argv[1]), 2)

"""Train on as many processes as told, then validate on shares of unequal size; each process writes what it saw.

Usage: distributed_script.py FOLDER DEVICES
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from attn_callbacks import AttentionHeatmaps, HeadStatistics
from tests.callbacks.models import Classifier, Texts, csv_logger, feeding_monitor, pl, quiet_trainer


class OwnShare(IterableDataset[dict[str, torch.Tensor]]):
    """All batches are on rank 0, none is on rank 1: what no sampler has made equal."""

    def __init__(self, rank: int) -> None:
        self.texts = Texts(0 if rank else 32, seed=1)

    def __iter__(self) -> Any:
        return (self.texts[index] for index in range(len(self.texts)))


class Even(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        # one batch holds all that is trained on, so that the mean over processes is that of one process
        return DataLoader(Texts(32), 32 // self.trainer.world_size)

    def val_dataloader(self) -> Any:
        return DataLoader(Texts(64, seed=1), 8)


class Uneven(pl.LightningDataModule):
    def val_dataloader(self) -> Any:
        return DataLoader(OwnShare(self.trainer.global_rank), 8)


class Descending(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)  # Adam would blow up differences of rounding

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch)


def seen(module: Any, monitor: Any, statistics: Any, trainer: Any) -> dict[str, Any]:
    return {
        "report": monitor.report.to_dict(),
        "ledger": monitor.ledger,
        "weights": module.criterion.class_weight.tolist(),
        "mean": statistics.result.mean.nan_to_num(-1).tolist(),
        "error": statistics.result.standard_error.nan_to_num(-1).tolist(),
        "samples": statistics.result.samples.tolist(),
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
    }


def main(folder: Path, devices: int) -> None:
    torch.manual_seed(0)
    module, monitor, statistics = Descending(), feeding_monitor(min_support=1), HeadStatistics()
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    callbacks = [AttentionHeatmaps(samples=1), statistics, monitor]
    trainer = quiet_trainer(folder, callbacks, logger=csv_logger(folder), max_epochs=2, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=Even())
    even = json.loads(json.dumps(seen(module, monitor, statistics, trainer)))
    if devices > 1:
        trainer.validate(module, datamodule=Uneven(), verbose=False)
    told = [str(warning.message) for warning in caught if "sync_dist" in str(warning.message)]
    results = {"even": even, "uneven": seen(module, monitor, statistics, trainer), "warnings": told}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Train on as many processes as told, then validate on shares of unequal size; each process writes what it saw.

Usage: distributed_script.py FOLDER DEVICES
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset

from attn_callbacks import AttentionHeatmaps, HeadStatistics
from attn_callbacks.callbacks._head_sums import HeadSums
from attn_callbacks.functional import STATISTICS
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


COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "barrier", "broadcast", "gather", "reduce")


@contextmanager
def counted(calls: list[str]) -> Iterator[None]:
    """Append the name of every collective that is called, from wherever it is called, to ``calls``."""
    homes = (
        distributed,
        distributed.distributed_c10d,
    )  # those that use others, as `all_gather_object`, find them there
    patches = [
        mock.patch.object(home, name, spied(getattr(home, name), calls)) for home in homes for name in COLLECTIVES
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def spied(function: Any, calls: list[str]) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return call


class Marks(pl.Callback):
    """Notes what a validation called, from the first hook to the last: logging is done in between."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.validations = calls, []

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.calls.clear()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations.append(list(self.calls))


def collectives(folder: Path, devices: int, callbacks: list[Any]) -> list[list[str]]:
    """What each validation of a run with these callbacks called, beyond what it calls without them."""

    def validations(callbacks: list[Any], run: Path) -> list[list[str]]:
        calls: list[str] = []
        marks, module = Marks(calls), Descending()
        options = {"strategy": "ddp", "devices": devices, "max_epochs": 2}
        trainer = quiet_trainer(run, [*callbacks, marks], logger=csv_logger(run), **options)
        with counted(calls):
            trainer.fit(module, datamodule=Even())
        return marks.validations

    plain = validations([], folder / "plain")
    watched = validations(callbacks, folder / "watched")
    for mine, usual in zip(watched, plain, strict=True):
        for name in usual:
            mine.remove(name)
    return watched


LAYERS = {"first": 2, "second": 3, "third": 4}
"""Names of layers and how many heads they have."""
ROUNDS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((), ()),
    (("first", "second"), ("second",)),
    (("second", "first"), ("first", "second")),
    ((), ("third", "first")),
    (("first", "second", "third"), ()),
    (("first",), ("first",)),
    (("first",), ("first",)),
]
"""Layers that each of two processes sees, conclusion by conclusion. In the last but one the second process fails."""
FAILING = 5


def layer_batch(number: int, rank: int, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * number + 100 * rank + list(LAYERS).index(layer))
    values = torch.rand(4, LAYERS[layer], len(STATISTICS), generator=generator)
    return values, torch.randint(1, 9, (4,), generator=generator)


def conclusions(rank: int) -> list[dict[str, Any]]:
    """What a process concludes in each of the ``ROUNDS``, and the collectives it called."""
    sums, found = HeadSums(2), []
    for number, shares in enumerate(ROUNDS):
        for layer in shares[rank]:
            sums.add(layer, *layer_batch(number, rank, layer))
        calls: list[str] = []
        try:
            with counted(calls):
                names, result = sums.conclude(torch.device("cpu"), failed=number == FAILING and rank == 1) or ((), ())
        except RuntimeError as error:
            names, result = str(error), ()
        found.append({"names": names, "fields": [field.nan_to_num(-1).tolist() for field in result], "calls": calls})
    return found


def seen(module: Any, monitor: Any, statistics: Any, trainer: Any) -> dict[str, Any]:
    return {
        "report": monitor.report.to_dict(),
        "ledger": [{**entry, "time": None} for entry in monitor.ledger],
        "weights": module.criterion.class_weight.tolist(),
        "mean": statistics.result.mean.nan_to_num(-1).tolist(),
        "error": statistics.result.standard_error.nan_to_num(-1).tolist(),
        "samples": statistics.result.samples.tolist(),
        "importance": [field.nan_to_num(-1).tolist() for field in statistics.importance],
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
    }


def main(folder: Path, devices: int) -> None:
    torch.manual_seed(0)
    module, monitor, statistics = (
        Descending(),
        feeding_monitor(min_support=1),
        HeadStatistics(importance_every_n_steps=1),
    )
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    best = pl.callbacks.ModelCheckpoint(str(folder / "best"), monitor="heads/entropy_mean", mode="max")
    stop = pl.callbacks.EarlyStopping("heads/distance_mean", patience=9)
    callbacks = [AttentionHeatmaps(samples=1), statistics, monitor, best, stop]
    options = {"max_epochs": 2, "enable_checkpointing": True, **options}
    trainer = quiet_trainer(folder, callbacks, logger=csv_logger(folder), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=Even())
    even = json.loads(json.dumps(seen(module, monitor, statistics, trainer)))
    if devices > 1:
        trainer.validate(module, datamodule=Uneven(), verbose=False)
    told = [str(warning.message) for warning in caught if "sync_dist" in str(warning.message)]
    results = {"even": even, "uneven": seen(module, monitor, statistics, trainer), "warnings": told}
    results["chosen"] = {"entropy": float(best.best_model_score), "distance": float(stop.best_score)}
    if devices > 1:
        results["conclusions"] = conclusions(trainer.global_rank)
        results["collectives"] = collectives(folder, devices, [HeadStatistics()])
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

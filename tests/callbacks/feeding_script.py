"""Train with every feedback on as many processes as told; each process writes what became of it.

Usage: feeding_script.py FOLDER DEVICES
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from attn_callbacks import BiasMonitor, DynamicDistributedSampler
from tests.callbacks.feeding import CASES, Case, Marked
from tests.callbacks.models import pl, quiet_trainer


class Whole(pl.LightningDataModule):
    """Each epoch is one batch over all processes, so that the mean over them is that of one process."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.train, self.case = Marked(48, agreement=0.9), case

    def train_dataloader(self) -> Any:
        batch = 48 // self.trainer.world_size
        if self.case.resampled:
            sampler = DynamicDistributedSampler(self.train.labels, groups=self.train.group)
            return DataLoader(self.train, batch, sampler=sampler)
        return DataLoader(self.train, batch)

    def val_dataloader(self) -> Any:
        return DataLoader(Marked(64, seed=1, agreement=self.case.agreement), 8)


def descending(case: Case) -> Any:
    """The module of a case, under plain gradient descent: Adam would blow up differences of rounding."""
    module = case.module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.3)
    return module


def main(folder: Path, devices: int) -> None:
    """Run every case and write its weights and decisions."""
    found, rank = {}, 0
    for name, case in CASES.items():
        torch.manual_seed(0)
        module = descending(case)
        monitor = BiasMonitor(feedback=[case.feedback()], min_support=4, patience=None)
        options = {"strategy": "ddp_find_unused_parameters_true", "devices": devices} if devices > 1 else {}
        trainer = quiet_trainer(folder, [monitor], max_epochs=4, **options)
        trainer.fit(module, datamodule=Whole(case))
        rank = trainer.global_rank
        decided = [entry["decisions"] for entry in monitor.ledger]
        found[name] = {
            "weights": [value.double().flatten().tolist() for value in module.state_dict().values()],
            "state": repr(monitor.state_dict()["feedback"]),
            "fed": monitor.state_dict()["fed"].tolist(),
            "decisions": [[(each["feedback"], each["action"]) for each in decisions] for decisions in decided],
        }
    (folder / f"feeding{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

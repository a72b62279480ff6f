"""Train on as many processes as told with everything that looks at heads; each process writes what it saw.

Usage: heads_script.py FOLDER DEVICES
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from attn_callbacks import (
    AlignmentMonitor,
    AttentionPaths,
    ErrorAnalysis,
    HeadImportance,
    HeadRoles,
    TrainingHealth,
)
from tests.callbacks.distributed_script import Descending, Even, Uneven
from tests.callbacks.models import EncoderDecoder, csv_logger, quiet_trainer


def numbers(result: Any, *names: str) -> dict[str, Any]:
    found = {name: getattr(result, name) for name in names}
    return {name: value.nan_to_num(-1).tolist() for name, value in found.items()}


def seen(callbacks: dict[str, Any], trainer: Any) -> dict[str, Any]:
    """What has to be the same on all processes, and on one."""
    roles, errors, alignment = (callbacks[name].result for name in ("roles", "errors", "alignment"))
    return {
        "roles": numbers(roles, "score", "strength", "samples", "wins"),
        "errors": {"rate": errors.error_rate, **numbers(errors.outcome, "g", "p_value")},
        "alignment": numbers(alignment, "mean", "standard_error", "samples"),
        "health": [[step, layer, alert.kind] for step, layer, alert in callbacks["health"].found],
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
    }


def main(folder: Path, devices: int) -> None:
    torch.manual_seed(0)
    callbacks = {
        "roles": HeadRoles(),
        "errors": ErrorAnalysis(samples=2),
        "alignment": AlignmentMonitor(),
        "health": TrainingHealth(every_n_steps=1),
        "importance": HeadImportance(batches=1),
        "paths": AttentionPaths(samples=2, method="relevance", layers=["net.model.encoder.*"]),
    }
    module = Descending(EncoderDecoder())
    options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    trainer = quiet_trainer(folder, list(callbacks.values()), logger=csv_logger(folder), max_epochs=2, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=Even())
    results: dict[str, Any] = {"even": json.loads(json.dumps(seen(callbacks, trainer)))}
    results["alone"] = {name: callbacks[name].result is not None for name in ("importance", "paths")}
    results["weights"] = sum(weight.double().abs().sum() for weight in module.parameters()).item()
    results["warnings"] = [
        str(w.message) for w in caught if "sync_dist" in str(w.message) or "switched" in str(w.message)
    ]
    if devices > 1:
        trainer.validate(module, datamodule=Uneven(), verbose=False)
        results["uneven"] = seen(callbacks, trainer)
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

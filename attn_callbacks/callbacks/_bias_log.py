"""Write a BiasReport and what was done about it: pictures, text, numbers, and one line of JSON a validation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attn_callbacks.bias import BiasReport
from attn_callbacks.callbacks._loggers import can_log, log_point, log_text, with_epoch
from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.render import confusion_picture

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["log_report"]


def log_report(
    trainer: Trainer,
    writer: BackgroundWriter,
    folder: Path | None,
    report: BiasReport,
    actions: Sequence[str],
    monitored: Mapping[str, float],
) -> None:
    """Write everything, where there is a logger. Call it on rank zero.

    Args:
        trainer: Knows the loggers.
        writer: Draws in the background; what failed there is left out.
        folder: Folder of the run.
        report: What was found.
        actions: What was done about it.
        monitored: Tag and value of what models are selected by.
    """
    if not can_log(trainer):
        return
    draw = partial(
        confusion_picture,
        report.counts.numpy().copy(),
        report.class_names,
        title=f"predictions, epoch {report.epoch}",
        group_names=report.group_names if report.has_groups else None,
    )
    scalars = with_epoch(trainer, {**monitored, **dict(_scalars(report))})
    log_point(trainer, writer, folder, {"bias/confusion": writer.submit(draw)}, scalars)
    text = report.summary()
    if actions:
        text = "\n".join([text, "", "**Fed back**", "", *(f"- {action}" for action in actions)])
    log_text(trainer, "bias/summary", text)
    if folder is not None:
        path = folder / "attention" / "bias.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**report.to_dict(), "actions": list(actions)}) + "\n")


def _scalars(report: BiasReport) -> Iterator[tuple[str, float]]:
    for label, recall in zip(report.class_names, report.recall.tolist(), strict=True):
        if recall == recall:
            yield f"bias/recall/{label}", recall
    if report.has_groups:
        for label, accuracy in zip(report.group_names, report.group_accuracy.tolist(), strict=True):
            if accuracy == accuracy:
                yield f"bias/accuracy/{label}", accuracy
    for name, share in report.attention.items():
        for label, mass in zip(report.class_names, share.mass.tolist(), strict=True):
            if mass == mass:
                yield f"bias/{name}_mass/{label}", mass

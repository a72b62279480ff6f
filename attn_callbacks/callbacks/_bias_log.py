"""Write a BiasReport and what was done about it: pictures, text, numbers, and one line of JSON a validation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_callbacks.bias import BiasReport
from attn_callbacks.callbacks._loggers import can_log, log_point, log_text, with_epoch
from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.feedback import Action
from attn_callbacks.feedback.ledger import Ledger
from attn_callbacks.render import confusion_picture

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["log_report"]


def log_report(
    trainer: Trainer,
    writer: BackgroundWriter,
    folder: Path | None,
    report: BiasReport,
    ledger: Ledger,
    actions: Mapping[str, Sequence[Action]],
    monitored: Mapping[str, float],
    prefix: str,
) -> None:
    """Write everything, where there is a logger. Call it on rank zero.

    Args:
        trainer: Knows the loggers.
        writer: Draws in the background; what failed there is left out.
        folder: Folder of the run.
        report: What was found.
        ledger: All decisions so far.
        actions: What each feedback did about it, by its name.
        monitored: Tag and value of what models are selected by.
        prefix: What tags begin with; slashes of it become part of the names of files.
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
    scalars = with_epoch(trainer, {**monitored, **dict(_scalars(report, prefix))})
    log_point(trainer, writer, folder, {f"{prefix}/confusion": writer.submit(draw)}, scalars)
    log_text(trainer, f"{prefix}/summary", "\n".join([report.summary(), *_decided(ledger, actions)]))
    if folder is not None:
        path = folder / "attention" / f"{prefix.replace('/', '_')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report.to_dict()) + "\n")
        # written anew each time: the effect of a decision is known one validation after it
        lines = "".join(json.dumps(line) + "\n" for line in ledger.lines())
        path.with_name(path.name.replace("bias", "ledger", 1)).write_text(lines, encoding="utf-8")


def _decided(ledger: Ledger, actions: Mapping[str, Sequence[Action]]) -> Iterator[str]:
    """Say what was done, and what came of what was done before."""
    now = ledger.entries[-1]
    if now["note"]:
        yield from ("", now["note"])
    if ledger.late:
        yield from ("", "**Since the last report**", "", *(f"- {text}" for text in ledger.late))
    if actions:
        yield from ("", "**Would be fed back** (dry run)" if _is_dry(now) else "**Fed back**", "")
        yield from (f"- {name}: {action}" for name, made in actions.items() for action in made)
    known = [decision for entry in ledger.entries[-2:-1] for decision in entry["decisions"] if decision["effect"]]
    if known:
        yield from ("", "**Effect of the validation before**", "")
        yield from (_effect(decision) for decision in known)


def _is_dry(entry: Mapping[str, Any]) -> bool:
    return any(decision["dry_run"] for decision in entry["decisions"])


def _effect(decision: Mapping[str, Any]) -> str:
    finding, effect = decision["finding"], decision["effect"]
    what = f"{decision['feedback']}: {finding['kind']} finding {finding['where']}"
    return f"- {what} {finding['size']:.2f} -> {finding['size'] + effect:.2f} ({effect:+.2f})"


def _scalars(report: BiasReport, prefix: str) -> Iterator[tuple[str, float]]:
    for label, recall in zip(report.class_names, report.recall.tolist(), strict=True):
        if recall == recall:
            yield f"{prefix}/recall/{label}", recall
    if report.has_groups:
        for label, accuracy in zip(report.group_names, report.group_accuracy.tolist(), strict=True):
            if accuracy == accuracy:
                yield f"{prefix}/accuracy/{label}", accuracy
    for name, share in report.attention.items():
        for label, mass in zip(report.class_names, share.mass.tolist(), strict=True):
            if mass == mass:
                yield f"{prefix}/{name}_mass/{label}", mass

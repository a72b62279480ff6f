"""Write pictures, numbers and text to every logger of a Trainer, told apart by what they can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.render import Picture

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["can_log", "log_numbers", "log_point", "log_text", "run_folder", "with_epoch"]

Drawings = Mapping[str, "Future[Picture]"]
Write = Callable[[dict[str, Picture]], None]


def can_log(trainer: Trainer) -> bool:
    """Some logger keeps what it is given."""
    return bool(_loggers(trainer))


def run_folder(trainer: Trainer) -> Path | None:
    """Folder of the run, ``None`` without a logger. Communicates between processes: call it on every rank."""
    loggers = _loggers(trainer)
    folder = trainer.log_dir if loggers else None
    if folder is None:
        return None
    if getattr(loggers[0], "log_dir", None) is not None:
        return Path(folder)
    # what the Trainer knows of other loggers is a folder that all runs share
    return Path(folder, *(str(part) for part in (loggers[0].name, loggers[0].version) if part is not None))


def log_point(
    trainer: Trainer,
    writer: BackgroundWriter,
    folder: Path | None,
    pictures: Drawings,
    scalars: Mapping[str, float] | None = None,
) -> None:
    """Write pictures and numbers by tag at the current step. Call it on rank zero.

    TensorBoard gets all of them in one event, a logger that takes no pictures gets PNG files in ``folder``; both are
    made in the background. All other loggers are called from here, in order: some of them count steps by the call.

    Args:
        trainer: Knows the loggers and the step.
        writer: Draws in the background.
        folder: Where PNG files go, if anywhere.
        pictures: What the writer was asked to draw. Those that failed are left out.
        scalars: Numbers.
    """
    scalars = dict(scalars or {})
    if not pictures and not scalars:
        return
    step = trainer.global_step
    later: list[Write] = []
    for logger in _loggers(trainer):
        is_board = hasattr(logger.experiment, "_get_file_writer")
        in_event = scalars if is_board and _logs_plainly(logger) else {}
        if scalars and not in_event:
            logger.log_metrics(dict(scalars), step=step)
        if is_board:
            file = logger.experiment._get_file_writer()
            later.append(partial(_write_event, file, in_event, step, time.time()))
        elif _takes_pictures(logger):
            _hand_over(logger, _drawn(pictures), step)
        elif folder is not None and pictures:
            later.append(partial(_write_files, folder, step))
    if later:
        writer.submit(partial(_write_all, later, pictures))


def with_epoch(trainer: Trainer, scalars: Mapping[str, float]) -> dict[str, float]:
    """Add the epoch to numbers, if there are any, as Lightning does to what it logs."""
    return {**scalars, "epoch": float(trainer.current_epoch)} if scalars else {}


def log_numbers(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Write the numbers that are known at the current step, without the background. Call it on rank zero."""
    known = {tag: value for tag, value in scalars.items() if value == value}
    for logger in _loggers(trainer):
        logger.log_metrics(with_epoch(trainer, known), step=trainer.global_step)


def log_text(trainer: Trainer, tag: str, text: str) -> None:
    """Write Markdown text to every logger, or into ``<tag>.md`` of its folder if it takes none. On rank zero."""
    for logger in _loggers(trainer):
        if hasattr(logger.experiment, "add_text"):
            logger.experiment.add_text(tag, text, trainer.global_step)
        elif hasattr(logger, "log_text"):
            logger.log_text(key=tag, columns=["text"], data=[[text]], step=trainer.global_step)
        elif getattr(logger, "log_dir", None) is not None:
            path = Path(logger.log_dir, f"{tag}.md")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"# Step {trainer.global_step}\n\n{text}\n\n")


def _loggers(trainer: Trainer) -> list[Any]:
    # the one that `fast_dev_run` puts in the place of all others answers to every name and keeps nothing
    return [logger for logger in trainer.loggers if type(logger).__name__ != "DummyLogger"]


def _logs_plainly(logger: Any) -> bool:
    """Its `log_metrics` is Lightning's own, and puts nothing before the tags: one event can say the same."""
    package = type(logger).log_metrics.__module__.partition(".")[0]
    return package in ("lightning", "lightning_fabric", "pytorch_lightning") and not getattr(logger, "_prefix", "")


def _takes_pictures(logger: Any) -> bool:
    return hasattr(logger.experiment, "add_image") or hasattr(logger, "log_image")


def _hand_over(logger: Any, pictures: Mapping[str, Picture], step: int) -> None:
    for tag, picture in pictures.items():
        if hasattr(logger.experiment, "add_image"):
            logger.experiment.add_image(tag, picture.rgb(), step, dataformats="HWC")
        else:
            logger.log_image(key=tag, images=[picture.rgb()], step=step)


def _drawn(pictures: Drawings) -> dict[str, Picture]:
    """Wait for the pictures; what went wrong with others is told by the writer."""
    return {tag: drawing.result() for tag, drawing in pictures.items() if drawing.exception() is None}


def _write_all(writes: list[Write], pictures: Drawings) -> None:
    drawn = _drawn(pictures)
    for write in writes:
        write(drawn)


def _write_event(file: Any, scalars: Mapping[str, float], step: int, at: float, pictures: dict[str, Picture]) -> None:
    # `add_scalar` writes an event each, and `add_image` decodes and encodes again: each several times slower
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary()
    for tag, value in scalars.items():
        summary.value.add(tag=tag, simple_value=value)
    for tag, picture in pictures.items():
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=picture.png()
        )
        summary.value.add(tag=tag, image=image)
    if summary.value:
        file.add_summary(summary, step, at)


def _write_files(folder: Path, step: int, pictures: dict[str, Picture]) -> None:
    for tag, picture in pictures.items():
        path = folder / f"{tag}_step{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.png())

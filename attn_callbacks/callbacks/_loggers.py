"""Write pictures, numbers and text to every logger of a Trainer, told apart by what they can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_callbacks.render import Picture

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["can_log", "log_agreed", "log_pictures", "log_scalars", "log_text", "run_folder"]


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


def log_agreed(module: LightningModule, name: str, value: float) -> None:
    """Log a value that all processes agree on, so that callbacks can monitor it. Call it on every rank.

    The maximum of equal values is that value, to the last bit; a mean would round it, and without any reduction
    Lightning warns that each process may have a value of its own.
    """
    module.log(name, value, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")


def log_pictures(trainer: Trainer, pictures: Mapping[str, Picture], folder: Path | None) -> None:
    """Write pictures by tag at the current step; a logger that takes no pictures gets PNG files in ``folder``.

    Call it on rank zero.
    """
    step = trainer.global_step
    for logger in _loggers(trainer) if pictures else ():
        experiment = logger.experiment
        if hasattr(experiment, "_get_file_writer"):
            _write_summary(experiment, pictures, step)
        elif hasattr(experiment, "add_image"):
            for tag, picture in pictures.items():
                experiment.add_image(tag, picture.rgb(), step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            for tag, picture in pictures.items():
                logger.log_image(key=tag, images=[picture.rgb()], step=step)
        elif folder is not None:
            _write_files(folder, pictures, step)


def log_scalars(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Write numbers by tag at the current step, in one call a logger. Call it on rank zero."""
    for logger in _loggers(trainer) if values else ():
        logger.log_metrics(dict(values), step=trainer.global_step)


def log_text(trainer: Trainer, tag: str, text: str) -> None:
    """Write Markdown text to the loggers that take some. Call it on rank zero."""
    for logger in _loggers(trainer):
        if hasattr(logger.experiment, "add_text"):
            logger.experiment.add_text(tag, text, trainer.global_step)
        elif hasattr(logger, "log_text"):
            logger.log_text(key=tag, columns=["text"], data=[[text]], step=trainer.global_step)


def _loggers(trainer: Trainer) -> list[Any]:
    # the one that `fast_dev_run` puts in the place of all others answers to every name and keeps nothing
    return [logger for logger in trainer.loggers if type(logger).__name__ != "DummyLogger"]


def _write_summary(experiment: Any, pictures: Mapping[str, Picture], step: int) -> None:
    # `add_image` decodes and encodes again, five times slower; one event holds all pictures of a step
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = []
    for tag, picture in pictures.items():
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=picture.png()
        )
        values.append(Summary.Value(tag=tag, image=image))
    experiment._get_file_writer().add_summary(Summary(value=values), step)


def _write_files(folder: Path, pictures: Mapping[str, Picture], step: int) -> None:
    for tag, picture in pictures.items():
        path = folder / f"{tag}_step{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.png())

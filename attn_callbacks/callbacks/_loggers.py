"""Write pictures, numbers and text to every logger of a Trainer, told apart by what they can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_callbacks.render import Picture

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["can_log", "log_pictures", "log_scalars", "log_text", "run_folder"]


def can_log(trainer: Trainer) -> bool:
    """Some logger keeps what it is given (``fast_dev_run`` replaces them by one that does not)."""
    return any(getattr(logger, "log_metrics", None) and not _is_dummy(logger) for logger in trainer.loggers)


def run_folder(trainer: Trainer) -> Path | None:
    """Folder of the run. Communicates between processes: call it on every rank."""
    folder = trainer.log_dir
    return None if folder is None else Path(folder)


def log_pictures(trainer: Trainer, pictures: Mapping[str, Picture], folder: Path | None) -> None:
    """Write pictures by tag at the current step; a logger that takes no pictures gets PNG files in ``folder``.

    Call it on rank zero.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        if _is_dummy(logger) or not pictures:
            continue
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
            for tag, picture in pictures.items():
                path = folder / f"{tag}_step{step}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture.png())


def log_scalars(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Write numbers by tag at the current step, in one call a logger. Call it on rank zero."""
    for logger in trainer.loggers:
        if values and not _is_dummy(logger):
            logger.log_metrics(dict(values), step=trainer.global_step)


def log_text(trainer: Trainer, tag: str, text: str) -> None:
    """Write Markdown text to the loggers that take some. Call it on rank zero."""
    for logger in trainer.loggers:
        experiment = None if _is_dummy(logger) else logger.experiment
        if hasattr(experiment, "add_text"):
            experiment.add_text(tag, text, trainer.global_step)
        elif hasattr(logger, "log_text"):
            logger.log_text(key=tag, columns=["text"], data=[[text]], step=trainer.global_step)


def _is_dummy(logger: Any) -> bool:
    return type(logger).__name__ == "DummyLogger"


def _write_summary(experiment: Any, pictures: Mapping[str, Picture], step: int) -> None:
    # `add_image` decodes and encodes again, five times slower; one event holds all pictures of a step
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = []
    for tag, picture in pictures.items():
        height, width = picture.rgb().shape[:2]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture.png())
        values.append(Summary.Value(tag=tag, image=image))
    experiment._get_file_writer().add_summary(Summary(value=values), step)

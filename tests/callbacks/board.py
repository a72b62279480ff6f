"""Callbacks that log, and the event files of TensorBoard read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attn_callbacks import AttentionHeatmaps, HeadStatistics
from tests.callbacks.models import feeding_monitor


def watchers() -> list[Any]:
    """All callbacks that log."""
    return [AttentionHeatmaps(samples=2), HeadStatistics(per_head=True), feeding_monitor(classes=("bad", "good"))]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return accumulator.Reload()


def raw_events(folder: Path) -> list[list[str]]:
    """Tags of each event that holds a summary, in the order of the file."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = [event for path in sorted(folder.glob("events*")) for event in EventFileLoader(str(path)).Load()]
    return [[value.tag for value in event.summary.value] for event in found if event.HasField("summary")]

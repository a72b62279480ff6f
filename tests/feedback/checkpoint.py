"""The way of a state through a checkpoint."""

from __future__ import annotations

import io

import torch


def saved(state):
    """Return a state after the trip through a checkpoint that refuses anything but plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

"""Run a model for an experiment and leave it, and the random generators, as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

__all__ = ["drawing_devices", "same_draws", "undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation for a while, without gradients and outside of inference mode.

    The flag is set and given back module by module: some stay in evaluation while the model trains, and what ``train``
    and ``eval`` do beside is not wanted here.

    Args:
        model: The model.
    """
    modes = [(module, module.training) for module in model.modules()]
    with torch.inference_mode(False), torch.no_grad(), same_draws(model):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


def drawing_devices(model: nn.Module) -> list[torch.device]:
    """Return the devices, other than the CPU, on which a model may draw numbers."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return sorted(devices, key=str)


def same_draws(model: nn.Module) -> AbstractContextManager[None]:
    """Give the global generators back as they were: blocks that follow one another draw the same numbers."""
    return torch.random.fork_rng(drawing_devices(model))

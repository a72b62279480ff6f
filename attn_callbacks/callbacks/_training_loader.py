"""The sampler of a Trainer's training loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from attn_callbacks.feedback import DynamicDistributedSampler

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["restart_loader", "training_sampler"]


def training_sampler(trainer: Trainer) -> Any:
    """Return what draws the indices of the training data.

    Raises:
        ValueError: If there is not one ``DataLoader``, nothing draws indices for it, or its sampler is for other data.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        came = type(loader).__name__
        raise ValueError(f"Resampling needs one `DataLoader` as training data, got {came}. Resample in it yourself.")
    if getattr(trainer, "overfit_batches", 0):
        raise ValueError("Resampling does not go with `overfit_batches`, which takes the sampler away. Leave one out.")
    sampler = loader.sampler
    if type(sampler).__name__ == "_InfiniteConstantSampler":
        raise ValueError(
            "Resampling needs a data set with indices, and the training data is an iterable. Use an indexed data set."
        )
    samples: Any = loader.dataset
    if isinstance(sampler, DynamicDistributedSampler) and int(sampler.counts.sum()) != len(samples):
        raise ValueError(
            f"`DynamicDistributedSampler` was built from {int(sampler.counts.sum())} labels, and the data set has "
            f"{len(samples)} samples. Build it from the labels of all samples, in their order."
        )
    return sampler


def restart_loader(trainer: Trainer) -> None:
    """Let workers draw again in the first epoch of a run, from a sampler that can be steered.

    The Trainer (Lightning 2.4 to 2.6, `FitLoop.setup_data`) starts them before it tells the sampler its epoch, and
    before any hook that could tell it its weights, or take back those of the last run.
    """
    loader: Any = trainer.train_dataloader
    fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
    steerable = isinstance(getattr(loader, "sampler", None), DynamicDistributedSampler) and loader.num_workers
    if steerable and fetcher is not None and not trainer.fit_loop.restarted_mid_epoch:
        with torch.random.fork_rng(devices=[]):  # an iterator draws a seed from the global numbers
            iter(fetcher)

"""What a method is, and the cells (class, or class in group) that many of them balance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pytorch_lightning import Callback
from torch import Tensor, nn
from torch.utils.data import Sampler, WeightedRandomSampler

from benchmarks.debias.classifier import Classifier, fit
from benchmarks.debias.work import Samples, Splits, Work

__all__ = ["Method", "balanced_sampler", "cells", "inverse_frequency", "trained", "with_cells"]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        name: What the command line calls it.
        run: Trains a model on a work, ``run(work, splits, steps, seed)``, and returns what predicts.
        needs: Parts the training data must have, such as ``("spurious",)``.
        floating: It needs inputs that have a gradient: no token ids.
    """

    name: str
    run: Callable[[Work, Splits, int, int], nn.Module]
    needs: tuple[str, ...] = ()
    floating: bool = False

    def unfit(self, work: Work, train: Samples) -> str:
        """Return a sentence if the method does not apply to the data, else nothing."""
        lacking = [part for part in self.needs if part not in train.parts]
        if lacking:
            return f"Skipped {self.name} on {work.name}: its data has no {' and no '.join(lacking)}."
        if self.floating and not train.parts["inputs"].is_floating_point():
            return f"Skipped {self.name} on {work.name}: token ids have no gradient."
        return ""


def trained(
    work: Work,
    splits: Splits,
    steps: int,
    *,
    kind: type[Classifier] = Classifier,
    criterion: nn.Module | None = None,
    sampler: Sampler[int] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Classifier:
    """Train a fresh model.

    Args:
        work: Says what the model and the optimiser are.
        splits: Samples, whose training part gets its cells.
        steps: Length of the run.
        kind: Class of the module.
        criterion: The loss; ``None`` takes cross entropy.
        sampler: Draws training samples; ``None`` takes each once an epoch.
        callbacks: Of the method.
    """
    module = kind(work, work.model(), criterion or nn.CrossEntropyLoss(), steps)
    fit(work, module, with_cells(splits.train), splits.monitor, callbacks=callbacks, sampler=sampler)
    return module


def cells(samples: Samples) -> Tensor:
    """Return a number for each sample's class, or class and group where there are groups: 0 up, none left out."""
    group = samples.group
    joint = samples.labels if group is None else group * (int(samples.labels.max()) + 1) + samples.labels
    numbers: Tensor = joint.unique(return_inverse=True)[1]
    return numbers


def with_cells(samples: Samples) -> Samples:
    """Add the part ``cell``."""
    return samples.replaced(cell=cells(samples))


def inverse_frequency(samples: Samples) -> Tensor:
    """Return a weight for each sample that makes its cells count alike; they average one."""
    cell = cells(samples)
    counts = cell.bincount().float()
    return (len(cell) / (len(counts) * counts))[cell]


def balanced_sampler(samples: Samples, weight: Tensor | None = None) -> Sampler[int]:
    """Draw as many samples as there are, with replacement, from every cell alike or by ``weight``."""
    chances = inverse_frequency(samples) if weight is None else weight
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return WeightedRandomSampler(chances.tolist(), len(samples), generator=generator)

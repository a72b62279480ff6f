"""What people use today and takes one run: other losses, other sampling, and what acts on the inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import losses
from benchmarks.debias.classifier import Classifier
from benchmarks.debias.exchange import exchanged
from benchmarks.debias.method import Method, balanced_sampler, cells, inverse_frequency, trained
from benchmarks.debias.work import Samples, Splits, Work, region

__all__ = ["BASELINES", "counts", "erm"]

DRO_STEP = 0.1  # faster than published: these runs are short


def erm(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Plain cross entropy."""
    return trained(work, splits, steps)


def static_weights(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Weigh samples by the inverse frequency of their class, or of their class in their group."""
    weighted = splits._replace(train=splits.train.replaced(sample_weight=inverse_frequency(splits.train)))
    return trained(work, weighted, steps, criterion=losses.WeightedCrossEntropyLoss(len(work.classes)))


def focal(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Down-weigh samples that are already right."""
    return trained(work, splits, steps, criterion=losses.FocalLoss(gamma=2.0))


def class_balanced(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Weigh classes by their effective number of samples."""
    criterion = losses.ClassBalancedLoss(counts(work, splits.train), beta=0.999)
    return trained(work, splits, steps, criterion=criterion)


def logit_adjustment(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Add the log prior to the logits, in training only."""
    return trained(work, splits, steps, criterion=losses.LogitAdjustedLoss(counts(work, splits.train)))


def sampled(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Draw every class, or every class in every group, as often."""
    return trained(work, splits, steps, sampler=balanced_sampler(splits.train))


def group_dro(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Minimise the loss of the worst group; without groups, of the worst class."""
    number = int(cells(splits.train).max()) + 1
    return trained(work, splits, steps, criterion=losses.GroupDROLoss(number, DRO_STEP))


class RightReasons(Classifier):
    """Penalise input gradients on spurious tokens (RRR)."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss with the penalty."""
        inputs = batch["inputs"].detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            logits = self({**batch, "inputs": inputs})
        penalty = losses.input_gradient_penalty(logits, inputs, _masked(batch))
        return self.loss(logits, batch) + self.work.penalty * penalty


class Randomised(Classifier):
    """Train on inputs whose spurious tokens come from another sample."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of the changed inputs."""
        inputs = exchanged(self.work, batch["inputs"], _masked(batch))
        return self.loss(self({**batch, "inputs": inputs}), batch)


def right_reasons(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Penalise input gradients."""
    return trained(work, splits, steps, kind=RightReasons)


def mask_randomisation(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Randomise what is spurious."""
    return trained(work, splits, steps, kind=Randomised)


def counts(work: Work, samples: Samples) -> list[int]:
    """Return how many samples each class has."""
    found: list[int] = torch.bincount(samples.labels, minlength=len(work.classes)).tolist()
    return found


def _masked(batch: dict[str, Tensor]) -> Tensor:
    mask = region(batch)
    if mask is None:
        raise ValueError("The batch has no 'spurious' tokens: this method does not apply to it.")
    return mask.expand(-1, batch["inputs"].shape[1], -1, -1) if mask.ndim == 4 else mask


BASELINES = (
    Method("erm", erm),
    Method("static-weights", static_weights),
    Method("focal", focal),
    Method("class-balanced", class_balanced),
    Method("logit-adjustment", logit_adjustment),
    Method("balanced-sampler", sampled),
    Method("group-dro", group_dro),
    Method("rrr", right_reasons, needs=("spurious",), floating=True),
    Method("mask-randomisation", mask_randomisation, needs=("spurious",)),
)

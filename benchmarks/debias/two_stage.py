"""What people use today in two runs: JTT repeats the errors of a first model, DFR trains the last layer again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import losses
from benchmarks.debias.classifier import predict
from benchmarks.debias.method import Method, balanced_sampler, cells, trained
from benchmarks.debias.work import Samples, Splits, Work

__all__ = ["TWO_STAGE", "retrain_head"]

EARLY, REPEATS = 1 / 5, 20.0  # share of the budget of the first model; how often its errors are drawn
STRENGTHS, REFITS, HEAD_STEPS = (0.1, 0.03, 0.01, 0.003, 0.001), 10, 300


def just_train_twice(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Draw what an early model got wrong more often. The first model comes on top of the budget."""
    first = trained(work, splits, max(1, round(EARLY * steps)))
    wrong = predict(first, splits.train).argmax(dim=1) != splits.train.labels
    sampler = balanced_sampler(splits.train, torch.where(wrong, REPEATS, 1.0))
    return trained(work, splits, steps, sampler=sampler)


def feature_reweighting(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Train plainly, then the last layer again on balanced monitor samples (DFR)."""
    module = trained(work, splits, steps)
    retrain_head(module, splits.monitor)
    return module


def retrain_head(module: nn.Module, samples: Samples) -> None:
    """Fit the head again on its own inputs: sparse, standardised, the mean of fits to balanced draws.

    The strength of sparsity is chosen by the worst cell on one half of the samples, after a fit to the other.

    Args:
        module: A trained module with a linear layer ``head`` in it, which is changed.
        samples: What to fit to.
    """
    head = next(part for name, part in module.named_modules() if name.split(".")[-1] == "head")
    if not isinstance(head, nn.Linear):
        raise TypeError(f"`head` must be a Linear, got {type(head).__name__}.")
    features, cell = _features(module, head, samples), cells(samples)
    mean, scale = features.mean(dim=0), features.std(dim=0).clamp_min(1e-4)
    features, target = (features - mean) / scale, samples.labels
    halves = torch.randperm(len(samples)).tensor_split(2)
    strength = max(STRENGTHS, key=lambda each: _worst(features, target, cell, halves, each, head.out_features))
    fits = [_fit(features, target, _balanced(cell), strength, head.out_features) for _ in range(REFITS)]
    weight, bias = (torch.stack([fit[part] for fit in fits]).mean(dim=0) for part in (0, 1))
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - (weight / scale) @ mean)


def _features(module: nn.Module, head: nn.Linear, samples: Samples) -> Tensor:
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        predict(module, samples)
    finally:
        handle.remove()
    return torch.cat(seen)


def _balanced(cell: Tensor) -> Tensor:
    """Draw as many rows of each cell as the smallest has."""
    rows = [(cell == each).nonzero()[:, 0] for each in cell.unique()]
    least = min(len(own) for own in rows)
    return torch.cat([own[torch.randperm(len(own))[:least]] for own in rows])


def _fit(features: Tensor, target: Tensor, rows: Tensor, strength: float, classes: int) -> tuple[Tensor, Tensor]:
    """Minimise cross entropy plus ``strength`` times the absolute values of the weights."""
    head = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    penalty = losses.ElasticNetPenalty(l1=strength, l2=0.0, dim=1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(HEAD_STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features[rows]), target[rows]).backward()
        optimizer.step()
        penalty.proximal_step(head.weight, 0.1)
    return head.weight.detach(), head.bias.detach()


def _worst(
    features: Tensor, target: Tensor, cell: Tensor, halves: tuple[Tensor, ...], strength: float, classes: int
) -> float:
    fitted, held = halves
    weight, bias = _fit(features, target, fitted[_balanced(cell[fitted])], strength, classes)
    right = ((features[held] @ weight.T + bias).argmax(dim=1) == target[held]).float()
    return min(float(right[cell[held] == each].mean()) for each in cell[held].unique())


TWO_STAGE = (Method("jtt", just_train_twice), Method("dfr", feature_reweighting))

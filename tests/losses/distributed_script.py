"""Scenarios that two processes and one process go through, each on its share of the same samples.

Usage: distributed_script.py FOLDER RANK WORLD

A scenario is a function of the rank and the number of processes that returns plain tensors; add it to ``SCENARIOS``.
What it calls ``loss`` is averaged over the processes before it is compared, and must be what one process has; all else
must be equal in both processes, and what one process has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from losses._distributed import process_count, sum_over_processes
from losses.balancing import DynamicWeightAverage, GradientSurgery, GradNorm, LossBalancer
from losses.classification import SeesawLoss, WeightedCrossEntropyLoss
from losses.groups import GroupDROLoss, WorstGroupLoss
from losses.reliance import InputGradientPenalty

FEATURES, CLASSES, STEPS = 5, 4, 3

Result = dict[str, Tensor]


class Classifier(nn.Module):
    """A linear model that holds its criterion, as a Lightning module does."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer, self.criterion = nn.Linear(FEATURES, CLASSES), criterion
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, data: Tensor, target: Tensor, **others: Any) -> Tensor:
        return self.criterion(self.layer(data), target, **others)


def train(
    criterion: nn.Module,
    rank: int,
    world: int,
    sizes: Sequence[int] = (4, 4),
    steps: int = STEPS,
    **others: Callable[[int], Tensor],
) -> Result:
    """Train on one batch a step in double precision, and return losses, gradients and state.

    Args:
        criterion: Loss of logits, targets and ``others``.
        rank: Which share of every batch this process takes.
        world: Number of processes; one takes the whole batch.
        sizes: Samples of each share.
        steps: Number of optimiser steps.
        others: Returns a keyword argument, or another ``target``, for the whole batch of the step with that number.
    """
    model: nn.Module = Classifier(criterion).double()
    if world > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result: dict[str, list[Tensor]] = {"loss": [], "gradient": []}
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batch = {
            "data": torch.randn(sum(sizes), FEATURES, generator=generator).double(),
            "target": torch.randint(CLASSES, (sum(sizes),), generator=generator),
            **{name: draw(step) for name, draw in others.items()},
        }
        if world > 1:
            batch = {name: value.split(list(sizes))[rank] for name, value in batch.items()}
        loss = model(**batch)
        optimizer.zero_grad()
        loss.backward()
        result["loss"].append(loss.detach())
        result["gradient"].append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        for name, value in criterion.state_dict().items():
            result.setdefault(f"state {name}", []).append(value.clone())
        optimizer.step()
    return {name: torch.stack(values) for name, values in result.items()}


def groups_of(*batches: Sequence[int]) -> Callable[[int], Tensor]:
    """Return the group indices of the batch of each step."""
    return lambda step: torch.tensor(batches[step % len(batches)])


def weighted_cross_entropy(rank: int, world: int) -> Result:
    return train(WeightedCrossEntropyLoss(CLASSES, [1.0, 2.0, 0.5, 4.0]), rank, world)


class GlobalMean(nn.Module):
    """The mean over what counts in all processes, whatever the share of each: a sum, divided by the mean count."""

    def __init__(self, criterion: WeightedCrossEntropyLoss) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = self.criterion(logits, target)
        if self.criterion.reduction == "mean":
            return loss
        return loss * process_count() / sum_over_processes((target != -100).sum())


def global_mean(rank: int, world: int) -> Result:
    """``mean`` is over the samples of one process; of unequal shares, a sum makes the mean over all of them."""
    reduction = "mean" if world == 1 else "sum"
    criterion = GlobalMean(WeightedCrossEntropyLoss(CLASSES, [1.0, 2.0, 0.5, 4.0], reduction=reduction))
    target = torch.tensor([0, -100, 2, -100, 1, 2, 0, 1])
    return train(criterion, rank, world, (5, 3), target=lambda step: target)


def seesaw(rank: int, world: int) -> Result:
    return train(SeesawLoss(CLASSES), rank, world)


def group_dro(rank: int, world: int) -> Result:
    """Shares of unequal size; a group on one process only, groups on neither, a sample that is ignored."""
    criterion = GroupDROLoss(4, 0.5, group_counts=[50, 9, 4, 1], adjustment=1.0)
    group = groups_of([0, 0, 1, 1, 1, 3, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1], [2, 1, 2, 1, 2, 3, 3, 3])
    target, weight = torch.tensor([0, -100, 2, 3, 1, 2, 0, 1]), torch.arange(8.0).double()
    return train(
        criterion, rank, world, (5, 3), group=group, target=lambda step: target, sample_weight=lambda step: weight
    )


def group_dro_sum(rank: int, world: int) -> Result:
    """Sums add up over the processes; gradients, which are averaged, are then half of those of one process."""
    result = train(
        GroupDROLoss(2, 0.5, reduction="sum"), rank, world, (5, 3), 1, group=groups_of([0, 1, 1, 1, 1, 1, 0, 0])
    )
    return {**result, "loss": result["loss"] * world, "gradient": result["gradient"] * world}


def worst_group(rank: int, world: int) -> Result:
    group = groups_of([0, 0, 1, 1, 1, 2, 0, 0], [1, 1, 1, 1, 1, 0, 2, 2], [2, 1, 2, 1, 2, 1, 1, 1])
    return train(WorstGroupLoss(3), rank, world, (5, 3), group=group)


def an_empty_share(rank: int, world: int) -> Result:
    return train(GroupDROLoss(2, 0.5), rank, world, (4, 0), group=groups_of([0, 1, 1, 1]))


def evaluation_on_one_process(rank: int, world: int) -> Result:
    """In evaluation mode nothing waits for the other process, which does not call the loss."""
    if rank == 0:
        for criterion in (GroupDROLoss(2), WorstGroupLoss(2)):
            criterion.eval()(torch.eye(2), torch.tensor([0, 0]), group=torch.tensor([0, 1]))
    return {}


def a_process_group_of_one(rank: int, world: int) -> Result:
    """A process that is outside the group, or alone in it, counts its own samples only."""
    alone = distributed.new_group([0]) if world > 1 else None
    criterion, logits = GroupDROLoss(2, 0.5, process_group=alone), torch.tensor([[0.0, 1.0 + rank], [0.0, 0.0]])
    loss = criterion(logits, torch.tensor([0, 0]), group=torch.tensor([0, 1]))
    means = torch.tensor([1.0 + rank, 0.0]).exp().log1p()
    share = (0.5 * means).softmax(dim=0)
    return {"difference": (loss - share @ means).abs().round(decimals=5)}


class Guarded(nn.Module):
    """Cross entropy and an input-gradient penalty that measures its own scale."""

    def __init__(self) -> None:
        super().__init__()
        self.penalty = InputGradientPenalty(calibration_steps=2)

    def forward(self, logits: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        base = nn.functional.cross_entropy(logits, target)
        return base + self.penalty(logits, inputs, torch.eye(FEATURES)[:1], base_loss=base)


class Tasks(nn.Module):
    """Two tasks on shared features; the losses are computed and balanced inside, as a Lightning module does."""

    def __init__(self, strategy: nn.Module | None) -> None:
        super().__init__()
        self.shared, self.first, self.second = nn.Linear(FEATURES, 4), nn.Linear(4, 1), nn.Linear(4, 1)
        self.balancer = LossBalancer(["first", "second"], strategy)

    def losses(self, data: Tensor) -> dict[str, Tensor]:
        features, wanted = self.shared(data).tanh(), data[:, :1]
        return {
            "first": (self.first(features) - wanted).square().mean(),
            "second": (5 * self.second(features) + wanted).square().mean(),
        }

    def forward(self, data: Tensor) -> Tensor:
        steered = isinstance(self.balancer.strategy, GradNorm)
        return self.balancer(self.losses(data), **({"shared": self.shared.weight} if steered else {}))


def share(step: int, rank: int, world: int) -> Tensor:
    data = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(step)).double()
    return data.chunk(world)[rank]


def balanced(strategy: nn.Module, rank: int, world: int) -> Result:
    """Epochs of three steps; the state of the strategy, and what was learned."""
    model = Tasks(strategy).double()
    wrapped: nn.Module = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.002)
    losses = []
    for step in range(8):
        loss = wrapped(share(step, rank, world))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 3 == 2:
            model.balancer.step()
    return {"loss": torch.stack(losses), **model.state_dict()}


def dynamic_weight_average(rank: int, world: int) -> Result:
    return balanced(DynamicWeightAverage(2), rank, world)


def gradnorm(rank: int, world: int) -> Result:
    return balanced(GradNorm(2, lr=0.1), rank, world)


def gradient_surgery(rank: int, world: int) -> Result:
    model = Tasks(None).double()
    GradientSurgery("upgrad").backward(list(model.losses(share(0, rank, world)).values()), model.parameters())
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def what_processes_draw(rank: int, world: int) -> Result:
    """PCGrad takes the rows in an order that it draws, one in each process: the result is the mean."""
    rows = torch.tensor([[1.0, 0.0], [-3.0, 1.0], [-3.0, -1.0], [2.0, -2.0]]).double()
    weights = []
    for seed in [rank] if world > 1 else [0, 1]:
        torch.manual_seed(seed)
        weights.append(torch.zeros(2, dtype=torch.float64, requires_grad=True))
        GradientSurgery("pcgrad").backward([row @ weights[-1] for row in rows], weights[-1:])
    return {"gradient": torch.stack([weight.grad for weight in weights if weight.grad is not None]).mean(dim=0)}


def reached_by_one_process(rank: int, world: int) -> Result:
    """Parameters that the samples of one process alone reach, by one loss or by both, are not left out."""
    shared, both, single = (torch.full((3,), value).double().requires_grad_() for value in (1.0, 2.0, 3.0))
    losses = torch.zeros(2, dtype=torch.float64)
    for part in [rank] if world > 1 else [0, 1]:
        product = shared * (both if part == 0 else 1)
        terms = [product @ torch.arange(3.0).double(), -product.sum() + (single.square().sum() if part == 0 else 0)]
        losses = losses + torch.stack(terms) * world / 2
    GradientSurgery("upgrad").backward(list(losses), [shared, both, single])
    names = ("shared", "both", "single")
    return {name: part.grad for name, part in zip(names, (shared, both, single), strict=True) if part.grad is not None}


def input_gradient_penalty(rank: int, world: int) -> Result:
    """The scale that both processes measure is that of one; its sums are those of both."""
    criterion = Guarded()
    model = Classifier(criterion).double()
    for step in range(3):
        inputs = share(step, rank, world).requires_grad_()
        target = torch.arange(8).chunk(world)[rank] % CLASSES
        model(inputs, target, inputs=inputs).backward()
    return {"scale": criterion.penalty.scale, "steps": criterion.penalty.steps.clone()}


SCENARIOS: dict[str, Callable[[int, int], Result]] = {
    "WeightedCrossEntropyLoss": weighted_cross_entropy,
    "WeightedCrossEntropyLoss, the mean over all processes": global_mean,
    "GroupDROLoss": group_dro,
    "GroupDROLoss, sum": group_dro_sum,
    "GroupDROLoss, an empty share": an_empty_share,
    "GroupDROLoss, a process group of one": a_process_group_of_one,
    "WorstGroupLoss": worst_group,
    "SeesawLoss": seesaw,
    "DynamicWeightAverage": dynamic_weight_average,
    "GradNorm": gradnorm,
    "GradientSurgery": gradient_surgery,
    "GradientSurgery, what processes draw": what_processes_draw,
    "GradientSurgery, reached by one process": reached_by_one_process,
    "InputGradientPenalty": input_gradient_penalty,
    "evaluation on one process": evaluation_on_one_process,
}


def main(folder: Path, rank: int, world: int) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    results = {}
    for name, scenario in SCENARIOS.items():
        torch.manual_seed(0)
        results[name] = scenario(rank, world)
        distributed.barrier()  # nobody leaves, or goes on, while the other still needs an answer
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

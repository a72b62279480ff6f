"""Six losses in a plain PyTorch loop, without Lightning, each where plain cross entropy fails, and a control.

Run: ``python -m examples.losses_alone [seeds]``. One thread, a minute a seed; needs scikit-learn, downloads nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.small_models import VisionTransformer, convolutional, perceptron
from examples.unfair_digits import Data, coloured, decoyed, long_tail, read_digits
from losses import (
    FGM,
    AttentionSuppressionLoss,
    ClassBalancedLoss,
    GroupDROLoss,
    InputGradientPenalty,
    LogitAdjustedLoss,
    MaskRandomization,
)

Step = Callable[[Any, Data], Tensor]


class Task(NamedTuple):
    """A training set on which plain cross entropy goes wrong, a fair test, and the losses to compare."""

    build: Callable[[], nn.Module]
    data: Data
    test: Data
    parts: Tensor  # which part of the test each sample belongs to; the worst part is what counts
    arms: dict[str, Step]
    epochs: int
    batch: int
    weight_decay: float = 1e-4


def plain(model: Any, data: Data) -> Tensor:
    """Cross entropy, whatever else the model returns."""
    return F.cross_entropy(logits_of(model(data.images)), data.target)


def logits_of(output: Any) -> Tensor:
    """Return the logits of any of the models."""
    return output if isinstance(output, Tensor) else output[0]


def rare_digits(digits: Data, seed: int) -> Task:
    """Weights help a little, margins more."""
    data, test, counts = long_tail(digits, seed)
    balanced, adjusted = ClassBalancedLoss(counts, beta=0.99), LogitAdjustedLoss(counts)
    arms: dict[str, Step] = {
        "F.cross_entropy": plain,
        "ClassBalancedLoss": lambda model, part: balanced(model(part.images), part.target),
        "LogitAdjustedLoss": lambda model, part: adjusted(model(part.images), part.target),
    }
    return Task(lambda: perceptron(64, 10), data, test, test.target, arms, 60, 32, 1e-2)


def misleading_colour(digits: Data, seed: int) -> Task:
    """The groups are digit half x colour."""
    data, test = coloured(digits.rows(slice(0, 1000)), 0.97, seed), coloured(digits.rows(slice(1250, None)), 0.5, ~seed)
    robust = GroupDROLoss(num_groups=4, step_size=0.1)
    arms: dict[str, Step] = {
        "F.cross_entropy": plain,
        "GroupDROLoss": lambda model, part: robust(model(part.images), part.target, group=part.group),
    }
    return Task(lambda: perceptron(128, 2), data, test, test.group, arms, 40, 64)


def decoy(digits: Data, seed: int) -> Task:
    """The corner patch must not decide: punish its gradient, attack it, or (the control) put noise in its place."""
    penalty, attack = InputGradientPenalty(), FGM(epsilon=1.0, norm="linf")

    def punished(model: Any, part: Data) -> Tensor:
        images = part.images.clone().requires_grad_()
        logits = model(images)
        loss = F.cross_entropy(logits, part.target)
        return loss + penalty(logits, images, part.mask, base_loss=loss)

    def attacked(model: Any, part: Data) -> Tensor:
        worse = attack(lambda images: F.cross_entropy(model(images), part.target), part.images, part.mask)
        return (plain(model, part) + worse) / 2

    arms = {"F.cross_entropy": plain, "InputGradientPenalty": punished, "FGM on the decoy": attacked}
    return _decoy_task(digits, seed, convolutional, arms)


def decoy_seen_by_attention(digits: Data, seed: int) -> Task:
    """No other token may attend to the patch, in any layer; the same control."""
    suppression = AttentionSuppressionLoss()

    def suppressed(model: Any, part: Data) -> Tensor:
        logits, maps = model(part.images)
        patches = F.max_pool2d(part.mask.float(), 2).flatten(1)  # of each token but the class token
        return F.cross_entropy(logits, part.target) + 30 * suppression(maps, F.pad(patches, (1, 0)))

    return _decoy_task(
        digits, seed, VisionTransformer, {"F.cross_entropy": plain, "AttentionSuppressionLoss": suppressed}
    )


def _decoy_task(digits: Data, seed: int, build: Callable[[], nn.Module], arms: dict[str, Step]) -> Task:
    data = decoyed(digits.rows(slice(0, 1200)), honest=False, seed=seed)
    test = decoyed(digits.rows(slice(1200, None)), honest=True, seed=~seed)
    noise = MaskRandomization("uniform")

    def randomised(model: Any, part: Data) -> Tensor:
        return plain(model, part._replace(images=noise(part.images, part.mask)))

    return Task(build, data, test, test.target, {**arms, "control: MaskRandomization": randomised}, 15, 32)


TASKS: dict[str, Callable[[Data, int], Task]] = {
    "rare digits": rare_digits,
    "misleading colour": misleading_colour,
    "decoy, convolutional": decoy,
    "decoy, vision transformer": decoy_seen_by_attention,
}


def train(task: Task, step: Step, seed: int) -> nn.Module:
    """Train as anybody does: the step returns a loss."""
    torch.manual_seed(seed)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=task.weight_decay)
    for _ in range(task.epochs):
        for rows in torch.randperm(len(task.data.target)).split(task.batch):
            optimizer.zero_grad()
            step(model, task.data.rows(rows)).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> Tensor:
    """Return the mean accuracy of the test's parts, and the worst, ``(2,)``."""
    right = (logits_of(model(task.test.images)).argmax(dim=1) == task.test.target).float()
    parts = torch.stack([right[task.parts == part].mean() for part in task.parts.unique()])
    return torch.stack([parts.mean(), parts.min()])


def main(seeds: int = 1) -> dict[str, dict[str, float]]:
    """Train every arm of every task, print mean and worst test accuracy, and return the worst, averaged over seeds."""
    torch.set_num_threads(1)
    digits, worst = read_digits(), {}
    for title, build in TASKS.items():
        print(title)
        tasks, worst[title] = [build(digits, seed) for seed in range(seeds)], {}
        for name in tasks[0].arms:
            runs = torch.stack([evaluate(train(task, task.arms[name], seed), task) for seed, task in enumerate(tasks)])
            spread = [f" ± {error:.2f}" for error in runs.std(dim=0)] if seeds > 1 else ["", ""]
            mean, low = runs.mean(dim=0).tolist()
            worst[title][name] = low
            print(f"  {name:26s} mean {mean:.2f}{spread[0]}   worst {low:.2f}{spread[1]}")
    return worst


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Six losses in a plain PyTorch loop, without Lightning, each where plain cross entropy fails.

Run: ``python -m examples.losses_alone``. One thread, about a minute; needs scikit-learn, downloads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

    title: str
    build: Callable[[], nn.Module]
    data: Data
    test: Data
    parts: Tensor  # which part of the test each sample belongs to; the worst part is what counts
    arms: dict[str, Step]
    epochs: int
    batch: int
    weight_decay: float = 1e-4


class VisionTransformer(nn.Module):
    """2x2 patches, a class token, two layers; returns logits and the attention weights of each layer."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(37, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits ``(samples, 10)`` and weights ``(samples, heads, queries, keys)`` of each layer."""
        tokens = F.pad(self.patches(images).flatten(2).transpose(1, 2), (0, 0, 1, 0)) + self.positions
        maps = []
        for layer in self.layers:
            mixed, weights = layer.self_attn(tokens, tokens, tokens, average_attn_weights=False)
            tokens = layer.norm1(tokens + mixed)
            tokens = layer.norm2(tokens + layer.linear2(F.relu(layer.linear1(tokens))))
            maps.append(weights)
        return self.head(tokens[:, 0]), maps


def perceptron(inputs: int, classes: int) -> nn.Module:
    """Two hidden layers."""
    layers = [nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)]
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional() -> nn.Module:
    """Two convolutions."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 36, 10))


def plain(model: Any, data: Data) -> Tensor:
    """Cross entropy, whatever else the model returns."""
    return F.cross_entropy(logits_of(model(data.images)), data.target)


def logits_of(output: Any) -> Tensor:
    """Return the logits of any of the models."""
    return output if isinstance(output, Tensor) else output[0]


def rare_digits(digits: Data) -> Task:
    """Weights help a little, margins more."""
    data, test, counts = long_tail(digits, seed=0)
    balanced, adjusted = ClassBalancedLoss(counts, beta=0.99), LogitAdjustedLoss(counts)
    arms: dict[str, Step] = {
        "F.cross_entropy": plain,
        "ClassBalancedLoss": lambda model, part: balanced(model(part.images), part.target),
        "LogitAdjustedLoss": lambda model, part: adjusted(model(part.images), part.target),
    }
    return Task("rare digits", lambda: perceptron(64, 10), data, test, test.target, arms, 60, 32, 1e-2)


def misleading_colour(digits: Data) -> Task:
    """The groups are digit half x colour."""
    data, test = coloured(digits.rows(slice(0, 1000)), 0.97, 0), coloured(digits.rows(slice(1250, None)), 0.5, 9)
    robust = GroupDROLoss(num_groups=4, step_size=0.1)
    arms: dict[str, Step] = {
        "F.cross_entropy": plain,
        "GroupDROLoss": lambda model, part: robust(model(part.images), part.target, group=part.group),
    }
    return Task("misleading colour", lambda: perceptron(128, 2), data, test, test.group, arms, 40, 64)


def decoy(digits: Data) -> Task:
    """The corner patch must not decide: punish its gradient, attack it, or (the control) put noise in its place."""
    data, test = decoyed(digits.rows(slice(0, 1200)), False, 0), decoyed(digits.rows(slice(1200, None)), True, 9)
    penalty, attack, noise = InputGradientPenalty(), FGM(epsilon=1.0, norm="linf"), MaskRandomization("uniform")

    def punished(model: Any, part: Data) -> Tensor:
        images = part.images.clone().requires_grad_()
        logits = model(images)
        loss = F.cross_entropy(logits, part.target)
        return loss + penalty(logits, images, part.mask, base_loss=loss)

    def attacked(model: Any, part: Data) -> Tensor:
        worse = attack(lambda images: F.cross_entropy(model(images), part.target), part.images, part.mask)
        return (plain(model, part) + worse) / 2

    def randomised(model: Any, part: Data) -> Tensor:
        return plain(model, part._replace(images=noise(part.images, part.mask)))

    arms = {"F.cross_entropy": plain, "InputGradientPenalty": punished, "FGM on the decoy": attacked}
    arms["control: MaskRandomization"] = randomised
    return Task("decoy, convolutional", convolutional, data, test, test.target, arms, 15, 32)


def decoy_seen_by_attention(digits: Data) -> Task:
    """No token may attend to the patch, in any layer."""
    data, test = decoyed(digits.rows(slice(0, 1200)), False, 0), decoyed(digits.rows(slice(1200, None)), True, 9)
    suppression = AttentionSuppressionLoss()

    def suppressed(model: Any, part: Data) -> Tensor:
        logits, maps = model(part.images)
        patches = F.max_pool2d(part.mask.float(), 2).flatten(1)  # of each token but the class token
        return F.cross_entropy(logits, part.target) + 30 * suppression(maps, F.pad(patches, (1, 0)))

    arms: dict[str, Step] = {"F.cross_entropy": plain, "AttentionSuppressionLoss": suppressed}
    return Task("decoy, vision transformer", VisionTransformer, data, test, test.target, arms, 15, 32)


def train(model: nn.Module, data: Data, step: Step, epochs: int, batch: int, weight_decay: float) -> nn.Module:
    """Train as anybody does: the step returns a loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=weight_decay)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.target)).split(batch):
            optimizer.zero_grad()
            step(model, data.rows(rows)).backward()
            optimizer.step()
    return model.eval()


def main() -> dict[str, dict[str, float]]:
    """Train every arm of every task, print mean and worst test accuracy, and return the worst."""
    torch.set_num_threads(1)
    digits, worst = read_digits(), {}
    for build in (rare_digits, misleading_colour, decoy, decoy_seen_by_attention):
        task = build(digits)
        print(task.title)
        worst[task.title] = {}
        for name, step in task.arms.items():
            torch.manual_seed(0)
            model = train(task.build(), task.data, step, task.epochs, task.batch, task.weight_decay)
            with torch.no_grad():
                right = (logits_of(model(task.test.images)).argmax(dim=1) == task.test.target).float()
            parts = torch.stack([right[task.parts == part].mean() for part in task.parts.unique()])
            worst[task.title][name] = parts.min().item()
            print(f"  {name:26s} mean {parts.mean():.2f}   worst {parts.min():.2f}")
    return worst


if __name__ == "__main__":
    main()

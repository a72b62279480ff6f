"""Three small classifiers in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["VisionTransformer", "convolutional", "perceptron"]


class VisionTransformer(nn.Module):
    """2x2 patches of a 12x12 image, a class token, two layers; returns logits and the attention of each layer."""

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
    """Two convolutions on 12x12 images."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 36, 10))

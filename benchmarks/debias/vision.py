"""A small vision transformer, and where in a picture its tokens are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["VisionTransformer", "tokens_of"]


class VisionTransformer(nn.Module):
    """Patches, a class token that comes first, and a linear head that reads it; norms come first, no dropout.

    Args:
        channels: Colours of a picture.
        side: Height and width of a picture.
        patch: Height and width of a patch.
        width: Features of a token.
        layers: Number of layers, of four heads each.
        classes: Number of classes.
    """

    def __init__(self, channels: int, side: int, patch: int, width: int, layers: int, classes: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.encoder = nn.TransformerEncoder(layer, num_layers=layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits ``(samples, classes)``."""
        patches = self.patches(batch["inputs"]).flatten(2).transpose(1, 2)  # (samples, patches, width)
        tokens = F.pad(patches, (0, 0, 1, 0)) + self.positions
        logits: Tensor = self.head(self.encoder(tokens)[:, 0])
        return logits


def tokens_of(pixels: Tensor, patch: int, class_token: bool = False) -> Tensor:
    """Mark the tokens in whose patch any pixel is marked.

    Args:
        pixels: True on pixels, ``(samples, height, width)``.
        patch: Height and width of a patch.
        class_token: What the class token, which comes first, is said to be.

    Shape:
        - output: ``(samples, 1 + patches)``
    """
    patches = pixels.unfold(1, patch, patch).unfold(2, patch, patch).any(dim=(3, 4)).flatten(1)
    return F.pad(patches, (1, 0), value=class_token)

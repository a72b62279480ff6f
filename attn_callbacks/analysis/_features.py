"""What may be masked and asked of a sample, and whether masking tells anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_callbacks.analysis._erasure import Eraser

__all__ = ["CONTROL", "METHODS", "check_masking", "checked_rankings", "checked_shares", "checked_target", "maskable"]


METHODS: tuple[str, ...] = ("attention", "gradient", "value", "masking")
"""Names of the scores, in order."""

CONTROL = "random"
"""Name of the ranking that others are compared with."""


def maskable(eraser: Eraser, features: Tensor | None) -> Tensor:
    """Return what may be masked, ``(samples, features)``, on the CPU.

    Raises:
        ValueError: If ``features`` has another shape.
    """
    shape = (len(eraser.inputs), eraser.features)
    places = torch.ones(shape, dtype=torch.bool) if eraser.valid is None else eraser.valid.cpu()
    if features is None:
        return places
    if tuple(features.shape) != shape:
        raise ValueError(f"`features` must have shape (samples, features) = {shape}, got {tuple(features.shape)}.")
    return places & features.cpu().bool()


def checked_rankings(rankings: Mapping[str, Tensor] | None, places: Tensor) -> dict[str, Tensor]:
    """Return scores of somebody else's, by name.

    Raises:
        ValueError: If some have another shape or the name of ours.
    """
    found = dict(rankings or {})
    for name, scores in found.items():
        if name in (*METHODS, CONTROL):
            raise ValueError(f"`rankings` must not use the names of the scores that are computed, got {name!r}.")
        if scores.shape != places.shape:
            raise ValueError(
                f"`rankings` must have shape (samples, features) = {tuple(places.shape)}, got {tuple(scores.shape)} "
                f"for {name!r}."
            )
    return found


def checked_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """Return the shares.

    Raises:
        ValueError: If there is none, or one that is no share.
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"`shares` must hold shares of the features, above 0 and at most 1, got {tuple(shares)}.")
    return tuple(shares)


def checked_target(logits: Tensor, target: Tensor | None) -> Tensor:
    """Return the class of each sample, ``(samples,)``, on the CPU; ``None`` takes the one with the largest logit.

    Raises:
        ValueError: If it has another shape, or there is no such class.
    """
    if target is None:
        return logits.argmax(dim=1)
    samples, classes = logits.shape
    if tuple(target.shape) != (samples,):
        raise ValueError(f"`target` must have shape (samples,) = {(samples,)}, got {tuple(target.shape)}.")
    chosen = target.cpu().long()
    if not bool(((chosen >= 0) & (chosen < classes)).all()):
        raise ValueError(f"`target` must hold classes from 0 to {classes - 1}, got {chosen.tolist()}.")
    return chosen


def check_masking(eraser: Eraser, places: Tensor, target: Tensor, before: Tensor, share: float) -> None:
    """Check that masking does something, and leaves a model that can be asked.

    Args:
        eraser: Runs the model.
        places: What may be masked, ``(samples, features)``.
        target: Class of each sample.
        before: Its log-probability for the inputs as they are.
        share: The largest share of the features that is masked together.

    Raises:
        RuntimeError: If masking every feature changes nothing.
        ValueError: If the model returns NaN for a sample as it is, or once masked as far as that goes.
    """
    after = eraser.log_probabilities(torch.arange(len(places)), places, target)
    if torch.allclose(after, before, rtol=0, atol=1e-12):
        raise RuntimeError(
            "Masking every feature leaves all probabilities as they are, so nothing can be said about single ones. Let "
            "`logits` run the model on the inputs it is given, and with `replacement=None` heed `valid`."
        )
    counts = places.sum(dim=1)
    loses_all = (share * counts).ceil() >= counts
    lost = (before.isnan() | (after.isnan() & loses_all)).nonzero()[:, 0].tolist()
    if lost:
        raise ValueError(
            f"The model returns NaN for samples {lost}, as they are or with all features masked. Leave out samples "
            "that have one token only, keep a token in each (special ones, by `features`), or give a `replacement`."
        )

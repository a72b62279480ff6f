"""Which attention modules are meant by `layers`, and what to say if there is none."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence

from torch import nn

__all__ = ["AttentionNotFoundError", "check_found", "checked_layers", "checked_model", "is_selected"]


class AttentionNotFoundError(RuntimeError):
    """A model ran while attention was listened to, and none was seen."""


def checked_model(model: nn.Module) -> nn.Module:
    """Return the model.

    Raises:
        TypeError: If it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    return model


def checked_layers(layers: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names as a tuple.

    Raises:
        TypeError: If it is a single string.
    """
    if isinstance(layers, str):
        raise TypeError(f"`layers` must be a sequence of names, got the string {layers!r}. Write [{layers!r}].")
    return None if layers is None else tuple(layers)


def is_selected(name: str, layers: Sequence[str] | None) -> bool:
    """Tell whether an attention module is meant; ``None`` means all."""
    return layers is None or any(_selects(pattern, name) for pattern in layers)


def check_found(model: nn.Module, seen: Collection[str], layers: Sequence[str] | None) -> None:
    """Check that a model that ran had attention, and each of ``layers`` some of it.

    Raises:
        AttentionNotFoundError: If none was seen.
        ValueError: If an entry of ``layers`` matches nothing that was seen.
    """
    if not seen:
        raise AttentionNotFoundError(
            f"No attention was seen in the forward of `{type(model).__name__}`. Looked for: "
            "scaled_dot_product_attention, nn.MultiheadAttention and nn.Transformer layers, flex_attention, and a "
            "softmax over the last axis followed by a product with values. Choose a backend that goes through one "
            "of them (Hugging Face: attn_implementation='sdpa'), or call `attn_callbacks.record(name, weights)` "
            "where the model computes its weights."
        )
    for pattern in layers or ():
        if not any(_selects(pattern, name) for name in seen):
            known = ", ".join(map(repr, seen))
            raise ValueError(f"`layers` names no attention module: {pattern!r}. Known: {known}.")


def _selects(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")

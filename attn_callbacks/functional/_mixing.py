"""What one layer of attention and its residual connection do to the tokens: one matrix a layer, of equal tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_callbacks.functional._precision import wide

__all__ = [
    "both_real",
    "check_positions",
    "checked_maps",
    "masked",
    "positive_means",
    "positive_weights",
    "residual_mix",
    "target_rows",
]


def checked_maps(weights: Sequence[Tensor], valid: Tensor | None, name: str = "weights") -> tuple[int, int]:
    """Return ``(batch, tokens)`` of the layers' maps.

    Raises:
        TypeError: If ``weights`` is one tensor instead of one a layer.
        ValueError: If there is no layer, a map has not four axes, is not square, or layers disagree in samples or
            tokens; if ``valid`` has another shape.
    """
    if isinstance(weights, Tensor):
        raise TypeError(f"`{name}` must be a sequence of tensors, one a layer, got one tensor. Pass [{name}].")
    if not len(weights):
        raise ValueError(f"`{name}` must hold at least one layer, got none.")
    for layer, maps in enumerate(weights):
        _check_map(f"{name}[{layer}]", maps, tuple(weights[0].shape))
    batch, tokens = weights[0].shape[0], weights[0].shape[-1]
    if valid is not None and tuple(valid.shape) != (batch, tokens):
        raise ValueError(f"`valid` must have shape (batch, tokens) = {(batch, tokens)}, got {tuple(valid.shape)}.")
    return batch, tokens


def masked(mean: Tensor, valid: Tensor | None) -> Tensor:
    """Set what padding gives or receives to zero, whatever it was.

    Shape:
        - mean, output: ``(batch, queries, keys)``
        - valid: ``(batch, tokens)``
    """
    return mean if valid is None else mean.where(both_real(valid.to(mean.device)), 0.0)


def both_real(valid: Tensor) -> Tensor:
    """Mark the pairs of which both are tokens: ``(..., tokens)`` to bool ``(..., tokens, tokens)``."""
    return valid.bool()[..., :, None] & valid.bool()[..., None, :]


def residual_mix(maps: Tensor, valid: Tensor | None, residual: float) -> Tensor:
    """Average the heads, add the residual connection, and let rows sum to one.

    A row without any weight keeps its token, unless ``residual`` is zero: then it stays empty.

    Shape:
        - maps: ``(batch, heads, tokens, tokens)``
        - output: ``(batch, tokens, tokens)``, float32 or wider
    """
    mixed = masked(wide(maps).mean(dim=1), valid) * (1.0 - residual)
    mixed.diagonal(dim1=-2, dim2=-1).add_(residual)
    total = mixed.sum(dim=-1, keepdim=True)
    return mixed.div_(total.where(total > 0, 1.0))


def _checked_pairs(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the weights and gradients of every layer as they belong together.

    Raises:
        TypeError: If one of the two is one tensor instead of one a layer.
        ValueError: If they differ in number or shape.
    """
    for name, given in (("weights", weights), ("gradients", gradients)):
        if isinstance(given, Tensor):
            raise TypeError(f"`{name}` must be a sequence of tensors, one a layer, got one tensor. Pass [{name}].")
    if len(weights) != len(gradients):
        raise ValueError(f"`gradients` must hold one tensor a layer ({len(weights)}), got {len(gradients)}.")
    pairs = list(zip(weights, gradients, strict=True))
    for layer, (maps, slopes) in enumerate(pairs):
        if maps.shape != slopes.shape:
            raise ValueError(
                f"`gradients[{layer}]` must have the shape of its weights {tuple(maps.shape)}, got "
                f"{tuple(slopes.shape)}. Both lists begin with the first layer."
            )
    return pairs


def positive_weights(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Weigh attention with its gradient and cut what is negative, head by head.

    Shape:
        - weights, gradients, output: ``(batch, heads, queries, keys)`` a layer; the output in float32 or wider
    """
    return [(wide(maps) * wide(slopes)).clamp_min_(0.0) for maps, slopes in _checked_pairs(weights, gradients)]


def positive_means(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Average `positive_weights` over heads, ``(batch, queries, keys)`` a layer."""
    return [maps.mean(dim=1) for maps in positive_weights(weights, gradients)]


def target_rows(
    targets: Tensor | Sequence[int], batch: int, tokens: int, device: torch.device, name: str = "targets"
) -> Tensor:
    """Return the positions of the wanted rows of every sample, ``(batch, targets)``, on ``device``.

    Raises:
        ValueError: If ``targets`` has another shape or, checked where they are no device tensor, lies outside.
    """
    positions = torch.as_tensor(targets)
    if positions.ndim not in (1, 2) or (positions.ndim == 2 and len(positions) != batch):
        raise ValueError(
            f"`{name}` must have shape (targets,) or (batch, targets) with {batch} samples, got "
            f"{tuple(positions.shape)}."
        )
    check_positions(name, positions, tokens)
    return positions.to(device, torch.long).expand(batch, -1)


def check_positions(name: str, positions: Tensor, tokens: int) -> None:
    """Raise unless ``positions`` are integers and, looked at where that makes no device wait, those of tokens."""
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(f"`{name}` must be positions (integers), got {positions.dtype}.")
    if positions.device.type == "cpu" and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= tokens:
            raise ValueError(f"`{name}` must lie between 0 and {tokens - 1}, got {low if low < 0 else high}.")


def _check_map(name: str, maps: Tensor, first: tuple[int, ...]) -> None:
    shape = tuple(maps.shape)
    if len(shape) != 4:
        raise ValueError(f"`{name}` must have axes (batch, heads, tokens, tokens), got shape {shape}.")
    if shape[2] != shape[3]:
        raise ValueError(
            f"`{name}` must be square, of self-attention, got {shape[2]} queries x {shape[3]} keys. For "
            "cross-attention use `encoder_decoder_relevance`; where a layer merges or pools tokens, take the layers "
            "before it."
        )
    if (shape[0], shape[2]) != (first[0], first[2]):
        raise ValueError(
            f"`{name}` must have the {first[0]} samples and {first[2]} tokens of the first layer, got {shape[0]} and "
            f"{shape[2]}. Layers that merge, drop or window tokens have no common path: take those before or after."
        )

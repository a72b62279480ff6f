"""What may be perturbed, and what the closures of the adversarial losses must return."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from losses._checks import check_within
from losses._masks import aligned_mask

__all__ = ["Forward", "allowed_entries", "check_logits", "check_loss", "check_reached"]

Forward = Callable[[Tensor], Tensor]


def allowed_entries(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return which entries may be perturbed, as booleans in the shape of ``inputs``, after checking both.

    Args:
        inputs: Embeddings or pixels.
        mask: ``True`` where the inputs may change; ``None`` allows every entry.

    Shape:
        - inputs: ``(samples, ...)``
        - mask: as :func:`losses._masks.aligned_mask`
        - output: the shape of ``inputs``

    Raises:
        TypeError: If ``inputs`` is not a floating tensor, or ``mask`` is no tensor.
        ValueError: If ``inputs`` has fewer than two axes, ``mask`` does not fit, or (checked on the CPU only) it has
            values outside ``[0, 1]``.
        RuntimeError: In ``torch.inference_mode``, where nothing can be differentiated.
    """
    _check_inputs(inputs)
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=inputs.device).expand(inputs.shape)
    aligned = aligned_mask("mask", mask, inputs)
    check_within("mask", aligned, 0, 1)
    return (aligned != 0).expand(inputs.shape)


def check_loss(loss: Tensor) -> Tensor:
    """Return what ``forward_loss`` returned, if it is a scalar."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"`forward_loss` must return a scalar tensor, got {type(loss).__name__}. Return the loss alone."
        )
    if loss.dim() != 0:
        raise ValueError(
            f"`forward_loss` must return a scalar, got shape {tuple(loss.shape)}. Reduce it, for example by `.mean()`."
        )
    return loss


def check_logits(logits: Tensor, samples: int) -> Tensor:
    """Return what ``forward_logits`` returned, if it has shape ``(samples, classes, positions...)``."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"`forward_logits` must return logits as a tensor, got {type(logits).__name__}.")
    if logits.dim() < 2 or logits.shape[0] != samples:
        raise ValueError(
            f"`forward_logits` must return logits of shape (samples, classes, positions...) with {samples} samples, "
            f"got {tuple(logits.shape)}."
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"`forward_logits` must return at least 2 classes, got shape {tuple(logits.shape)}, whose softmax is "
            "constant. For one logit `z` per sample return `torch.cat([torch.zeros_like(z), z], dim=1)`."
        )
    return logits


def check_reached(reached: bool, closure: str) -> None:
    """Raise unless the gradient of what ``closure`` returned has ``reached`` the tensor that it was given."""
    if not reached:
        raise ValueError(
            f"`{closure}` must compute its result from the tensor it is given, but no gradient reaches that tensor. "
            "Use the closure's argument instead of the clean inputs, without `detach()` or `torch.no_grad()`."
        )


def _check_inputs(inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor):
        raise TypeError(f"`inputs` must be a tensor of embeddings or pixels, got {type(inputs).__name__}.")
    if not inputs.is_floating_point():
        raise TypeError(
            f"`inputs` must be floating, got {inputs.dtype}: token ids cannot be perturbed. Pass their embeddings, "
            "and a closure that takes embeddings."
        )
    if inputs.dim() < 2:
        raise ValueError(f"`inputs` must have at least 2 axes (samples, ...), got shape {tuple(inputs.shape)}.")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "An adversarial perturbation needs gradients, which `torch.inference_mode` rules out. Use `torch.no_grad`, "
            "in Lightning `Trainer(inference_mode=False)`, or leave the term out of validation."
        )

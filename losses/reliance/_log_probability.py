"""The gradient of log-probabilities by the inputs, in any precision, and what it needs of both."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from losses._checks import accumulation_dtype

__all__ = ["check_inputs", "log_probability_gradient"]

_LARGEST_LOGIT_GRADIENT = 16  # of what float16 can hold, 65504; the rest is room for the layers below


def check_inputs(logits: Tensor, inputs: Tensor) -> None:
    """Raise unless ``inputs`` has the samples of ``logits``, and both have a graph."""
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or inputs.shape[0] != logits.shape[0]:
        got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(
            f"`inputs` must be a tensor of shape (samples, features...) with {logits.shape[0]} samples as `logits`, "
            f"got {got}."
        )
    if not inputs.requires_grad:
        raise ValueError(
            "`inputs` must require a gradient, got a tensor without: call `inputs.requires_grad_()` before the forward "
            "pass, or pass embeddings where the inputs are token ids."
        )
    if not logits.requires_grad:
        raise ValueError(
            "`logits` must carry the graph that leads to `inputs`, got a tensor without: run the forward pass with "
            "gradients enabled, in validation too (`torch.enable_grad()`), and do not detach."
        )


def log_probability_gradient(logits: Tensor, inputs: Tensor) -> Tensor:
    """Return the gradient of the sum of all log-probabilities by ``inputs``, in their shape, at least float32."""
    scale = 2.0 ** math.floor(math.log2(_LARGEST_LOGIT_GRADIENT / logits.shape[1]))  # a power of two rounds nothing
    with torch.autocast(inputs.device.type, enabled=False):  # it would downcast what the model kept in float32
        with torch.enable_grad():
            total = scale * F.log_softmax(logits, dim=1, dtype=accumulation_dtype(logits)).sum()
        (gradient,) = torch.autograd.grad(
            total, inputs, create_graph=torch.is_grad_enabled(), retain_graph=True, allow_unused=True
        )
        if gradient is None:
            raise ValueError(
                "`logits` must be computed from `inputs`, but does not depend on them: pass the very tensor that the "
                "model was called with, not a copy or a slice of it."
            )
        return gradient.to(accumulation_dtype(gradient)) / scale

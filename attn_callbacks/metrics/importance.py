"""Importance of heads added up over examples: its mean, and how sure that mean is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.metrics.accumulator import Accumulator
from attn_callbacks.metrics.moments import mean_and_error

__all__ = ["MOMENTS", "HeadImportanceMetric", "HeadImportanceResult", "importance_result"]

MOMENTS = 4
"""Sums of each head over examples: those counted, ``|g|``, ``g ** 2``, and those left out."""


class HeadImportanceResult(NamedTuple):
    """What `HeadImportanceMetric` computes; each field is ``(layers, heads)``.

    Args:
        mean: Mean over examples of the size of the gate gradient, NaN without an example. float64.
        standard_error: Standard error of ``mean``, NaN below two examples. float64.
        samples: Number of examples. int64.
        left_out: Number of examples left out because their gradient is not finite. int64.
    """

    mean: Tensor
    standard_error: Tensor
    samples: Tensor
    left_out: Tensor


class HeadImportanceMetric(Accumulator):
    """Average the size of each head's gate gradient over examples: how much the loss hangs on the head.

    Unlike a mean of signed gradients it does not vanish where a head helps one example and harms the next. States are
    sums of fixed size, so the result of several processes is that of one process on all their examples. An update waits
    for no device.

    Args:
        layers: Number of attention layers (or sites).
        heads: Largest number of heads of any layer; the missing heads of smaller layers stay NaN.

    Raises:
        ValueError: If ``layers`` or ``heads`` is below 1; in `update`, if a layer, head count or shape does not fit.

    Example:
        >>> metric = HeadImportanceMetric(layers=1, heads=2)
        >>> metric.update(0, torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
        >>> result = metric.compute()
        >>> result.mean.tolist(), result.standard_error.tolist()
        ([[2.0, 0.0]], [[1.0, 0.0]])

    References:
        Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019, equation 4.
    """

    moments: Tensor

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        self.layers, self.heads = at_least("layers", layers, 1), at_least("heads", heads, 1)
        self.add_zeros("moments", layers, heads, MOMENTS)

    def update(self, layer: int, gradients: Tensor) -> None:
        """Add one batch of one layer.

        Args:
            layer: Index of the layer.
            gradients: `gate_gradient` of each example, ``(batch, heads)``, for a loss that is the sum over examples.
                What is not finite, as after an overflow in half precision, is left out and counted apart.
        """
        if not 0 <= layer < self.layers:
            raise ValueError(f"`layer` must lie between 0 and {self.layers - 1}, got {layer}.")
        check_axes("gradients", gradients, 2)
        heads = gradients.shape[1]
        if heads > self.heads:
            raise ValueError(f"`gradients` must have at most {self.heads} heads, got {heads}. Raise `heads`.")
        values = gradients.detach().double()
        counted = values.isfinite()
        sizes = values.abs().where(counted, 0.0)
        sums = torch.stack([counted.double(), sizes, sizes**2, (~counted).double()], dim=-1).sum(dim=0)  # (heads, 4)
        self.writable("moments")[layer, :heads] += sums

    def compute(self) -> HeadImportanceResult:
        """Return mean, standard error and numbers of examples of every layer and head."""
        return importance_result(self.moments)


def importance_result(moments: Tensor) -> HeadImportanceResult:
    """Conclude from the state of one `HeadImportanceMetric`, or from the sum of several.

    Args:
        moments: The `MOMENTS`.

    Shape:
        - moments: ``(layers, heads, 4)``, float64
    """
    count, first, second, left_out = moments.unbind(dim=-1)
    return HeadImportanceResult(*mean_and_error(count, first, second), count.long(), left_out.long())

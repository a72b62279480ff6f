"""Importance of heads: how the loss answers when one of them is turned down."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gate_gradient"]


def gate_gradient(output: Tensor, gradient: Tensor) -> Tensor:
    r"""Differentiate the loss with respect to a gate of one on each head, from what backward has computed anyway.

    A gate ``g`` on the output ``z`` of a head has the derivative ``dL/dg = sum z * dL/dz``, over queries and channels.
    Since ``z`` is linear in the weights ``A``, ``sum A * dL/dA`` over queries and keys is the same number: give either
    pair. Its negative estimates, to first order, by how much the loss rises without the head; the mean over examples of
    its absolute value is the importance of Michel et al. Take the absolute value example by example: signs cancel in a
    sum over a batch. Gradients of a loss that is a mean over the batch are one over its size too small.

    One pass over both tensors, in float32 or wider. With ``create_graph=True`` in the backward it is differentiable.

    Args:
        output: Output of attention before the heads are merged, or its weights, also after dropout.
        gradient: Gradient of the loss with respect to ``output``.

    Shape:
        - output, gradient: ``(batch, heads, queries, head_dim)``, or ``(batch, heads, queries, keys)``
        - output of the function: ``(batch, heads)``

    Raises:
        ValueError: If the two shapes differ or have fewer than two axes.

    Example:
        >>> output = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]], requires_grad=True)  # one token, two heads
        >>> loss = (output.sum() - 5) ** 2
        >>> gate_gradient(output, *torch.autograd.grad(loss, output))
        tensor([[6., 6.]], grad_fn=<SumBackward1>)

    References:
        Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019, equation 4.
    """
    if output.shape != gradient.shape or output.ndim < 2:
        raise ValueError(
            f"`output` and `gradient` must have one shape (..., queries, head_dim), got {tuple(output.shape)} and "
            f"{tuple(gradient.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(output.dtype, gradient.dtype), torch.float32)
    return (output.to(dtype) * gradient.to(dtype)).sum(dim=(-2, -1))

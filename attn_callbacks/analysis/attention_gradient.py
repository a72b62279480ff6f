"""The gradient of an output with respect to attention weights, also where a fused kernel never made them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from attn_callbacks.capture import AttentionCall

__all__ = ["attention_gradients"]

_DEEPEST = 8  # functions between the softmax and what the model goes on with: dropout, casts, views, the product


def attention_gradients(
    output: Tensor, calls: Sequence[AttentionCall], *, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    r"""Differentiate one number with respect to the attention weights of every call.

    Under a fused kernel there are no weights to differentiate with respect to. But attention returns
    :math:`z_i = \sum_j A[i, j] v_j`, so

    .. math:: \partial y / \partial A[i, j] = \langle \partial y / \partial z_i, v_j \rangle

    which is exact, with values shared between heads as well. Where the model computes its own softmax, autograd gives
    the gradient there. Weights count as free numbers: it is not asked that rows go on summing to one.

    One backward, which leaves the ``.grad`` of parameters alone, and ``heads * queries * keys`` numbers a call and
    sample: for a few samples, not for training batches. Run the model in eval mode: dropout inside a fused kernel is
    not seen, and the gradient would be that of the weights after it.

    Args:
        output: One number, such as the sum over samples of their class' logits; samples of a network that does not mix
            them keep their own gradients.
        calls: Calls of a forward that ran with gradients, as :class:`~attn_callbacks.AttentionRecorder` keeps them.
        retain_graph: Keep the graph for another backward.

    Shape:
        - result: ``(batch, heads, queries, keys)`` a call, in the order of ``calls``, float32 or wider; zero where
          ``output`` does not depend on a call

    Raises:
        ValueError: If ``output`` is not one number or has no graph, if a call has none (the native kernels of
            ``nn.TransformerEncoder`` have none, nor have layers below which nothing requires a gradient), if what a
            call returned was changed in place, or if ``output`` depends on none of them.

    Example:
        >>> from attn_callbacks import AttentionRecorder
        >>> model = torch.nn.MultiheadAttention(4, num_heads=2, batch_first=True)
        >>> tokens = torch.randn(1, 3, 4)
        >>> with AttentionRecorder(model) as recorder:
        ...     mixed, _ = model(tokens, tokens, tokens, need_weights=False)
        >>> [gradient] = attention_gradients(mixed.sum(), recorder.calls)
        >>> gradient.shape
        torch.Size([1, 2, 3, 3])

    References:
        Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
        Transformers", 2021, section 3 (what it is used for).
    """
    if output.numel() != 1 or not output.requires_grad:
        raise ValueError(
            f"`output` must be one number with a graph, got shape {tuple(output.shape)} and requires_grad="
            f"{output.requires_grad}. Run the model under `torch.enable_grad()` and sum the logits of interest."
        )
    places = [_place(call) for call in calls]
    edges: list[Any] = [place.edge for place in places]
    found = torch.autograd.grad(output, edges, retain_graph=retain_graph, allow_unused=True) if edges else ()
    if edges and all(gradient is None for gradient in found):
        raise ValueError("`output` depends on no attention of `calls`. Take both from one forward.")
    with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
        return tuple(
            _zeros(call) if gradient is None else _at_weights(call, place, gradient)
            for call, place, gradient in zip(calls, places, found, strict=True)
        )


class _Place(NamedTuple):
    """Where in the graph to take a gradient."""

    edge: Tensor | GradientEdge
    is_output: bool  # of the mixed values; else of the weights themselves


def _place(call: AttentionCall) -> _Place:
    if call.recorded is not None and call.output is None:
        _check_graph(call, call.recorded)
        base = call.recorded._base
        return _Place(call.recorded if base is None else base, is_output=False)
    _check_graph(call, call.output)
    output = cast(Tensor, call.output)
    if call.query is not None and call.value is not None:
        return _Place(output, is_output=True)
    softmax = _softmax_behind(output.grad_fn)
    if softmax is None:
        raise ValueError(
            f"No softmax was found behind the output of {call.name!r}. Hand its weights over: "
            "attn_callbacks.record(name, weights)."
        )
    return _Place(GradientEdge(softmax, 0), is_output=False)


def _check_graph(call: AttentionCall, used: Tensor | None) -> None:
    if used is None or not used.requires_grad:
        raise ValueError(
            f"The attention of {call.name!r} has no graph. Run the model under `torch.enable_grad()`; where nothing "
            "below the layer requires a gradient, let its input (or the embeddings) require one."
        )
    if call.recorded is None and used._version:
        raise ValueError(
            f"What the attention of {call.name!r} returned was changed in place since, so its gradient is another "
            "one. Write `x = x + y` in the model instead of `x += y`."
        )


def _softmax_behind(node: Any) -> Any:
    """Find the softmax nearest to a function of the graph, breadth first: that of the values' own past lies deeper."""
    nodes = [node]
    for _ in range(_DEEPEST):
        for each in nodes:
            if each.name() == "SoftmaxBackward0":
                return each
        nodes = [below for each in nodes for below, _ in each.next_functions if below is not None]
    return None


def _at_weights(call: AttentionCall, place: _Place, gradient: Tensor) -> Tensor:
    shape = call.shape
    if place.is_output:
        value = cast(Tensor, call.value)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        own = value.to(wide).repeat_interleave(shape[1] // value.shape[1], dim=1)
        return gradient.to(wide).reshape(*shape[:3], -1) @ own.mT
    if call.recorded is not None and call.recorded is not place.edge and isinstance(place.edge, Tensor):
        gradient = _cut(gradient, place.edge, call.recorded)
    keys = gradient.shape[-1]
    wide = torch.promote_types(gradient.dtype, torch.float32)
    own = gradient.to(wide).reshape(*shape[:3], keys)
    return own[..., : shape[3]]  # a virtual sink key may follow the others


def _cut(gradient: Tensor, base: Tensor, view: Tensor) -> Tensor:
    """Cut out of the gradient of a tensor what belongs to a view of it: the model may go on with another view."""
    like_base = torch.empty_strided(base.shape, base.stride(), dtype=gradient.dtype, device=gradient.device)
    offset = view.storage_offset() - base.storage_offset()
    return like_base.copy_(gradient).as_strided(view.shape, view.stride(), offset)


def _zeros(call: AttentionCall) -> Tensor:
    return torch.zeros(call.shape, device=call.device)

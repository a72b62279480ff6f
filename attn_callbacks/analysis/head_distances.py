"""Distances between all heads of a forward, from the calls that a recorder keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional.head_distance import head_distance

__all__ = ["head_distances"]


@torch.no_grad()
def head_distances(calls: Sequence[AttentionCall]) -> Tensor:
    """Measure :func:`~attn_callbacks.functional.head_distance` between the heads of all given calls, sample by sample.

    Takes masks and padding from the calls. Holds the weights of all calls for one sample at a time. Layers with other
    masks, such as sliding windows among full attention, or of cross-attention, are measured apart from the rest: select
    calls by name.

    Args:
        calls: Calls of one forward, one a layer, as :class:`~attn_callbacks.AttentionRecorder` keeps them.

    Shape:
        - output: ``(batch, heads, heads)`` over the heads of all calls in their order, float32

    Raises:
        ValueError: If there is no call, or heads cannot be compared: other queries, keys or masks, or cross-attention
            among self-attention.

    Example:
        >>> from attn_callbacks import AttentionRecorder
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 3).eval()
        >>> with AttentionRecorder(model) as recorder:
        ...     encoded = model(torch.randn(4, 5, 8))
        >>> head_distances(recorder.calls).shape
        torch.Size([4, 6, 6])
    """
    if not calls:
        raise ValueError("`calls` must hold at least one call of attention, got none.")
    if len({call.is_cross for call in calls}) > 1:
        raise ValueError(
            "Heads have a distance only where they see the same queries and keys, but `calls` mix self- and "
            "cross-attention. Measure them apart."
        )
    return torch.cat([_one_sample([call.select(sample) for call in calls]) for sample in range(calls[0].shape[0])])


def _one_sample(calls: Sequence[AttentionCall]) -> Tensor:
    weights = [call.weights() for call in calls]
    if len({(each.shape[0], *each.shape[2:]) for each in weights}) > 1:
        return head_distance(weights)  # says which ones differ
    queries, keys = (torch.stack(each).all(dim=0) for each in zip(*map(_tokens, calls), strict=True))
    return head_distance(weights, allowed=[_allowed(call) for call in calls], valid=queries, key_valid=keys)


def _allowed(call: AttentionCall) -> Tensor:
    allowed = call.allowed()
    # recorded weights show what is allowed by what is not 0, and a weight may be too small for its type
    return allowed if call.recorded is None else allowed.any(dim=1, keepdim=True)


def _tokens(call: AttentionCall) -> tuple[Tensor, Tensor]:
    return call.query_valid, call.key_valid

"""The loss term of attention guidance: exact attention mass on token sets, without the weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import one_of

if TYPE_CHECKING:
    from attn_callbacks.capture import AttentionCall

__all__ = ["QUERIES", "attention_term", "chosen_heads", "guided_calls"]

QUERIES = ("all", "first")
_FLOOR = 2.0**-20  # no weight to speak of: the least sum of a row that counts, the least share under a logarithm


def attention_term(
    calls: Sequence[AttentionCall],
    relevance: Tensor | None = None,
    spurious: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    heads: Sequence[int] | None = None,
    queries: str = "all",
) -> Tensor:
    r"""Return minus the log of the attention that stays off spurious tokens, plus that of what falls on relevant ones.

    With :math:`m` the share of a query's attention on a token set, among real tokens, a query costs
    :math:`-\log(1 - m_{\text{spurious}})`, unless it is spurious itself, and :math:`-\log m_{\text{relevant}}`. If the
    first is zero in every layer, no other token depends on the spurious ones at all. Costs are averaged over a sample's
    queries and heads, then over layers, then over the samples that carry the annotation; the two terms add up.

    Samples without a token of a set contribute nothing, nor do queries that cannot attend to what is wanted: early ones
    of causal attention, padding, samples in which every token is spurious.

    The indicators of the sets go into the value slot of the fused kernel, so nothing of size queries x keys is built:
    about one forward of the kernel a layer; for ``queries="first"`` one row of it.

    Args:
        calls: Self-attention over the annotated tokens, one or more layers.
        relevance: ``True`` on tokens that attention should rest on.
        spurious: ``True`` on tokens that it must not rest on.
        valid: ``True`` for tokens, ``False`` for padding; ``None``: all are tokens.
        heads: Indices of the heads that count in every layer; ``None``: all.
        queries: ``"all"`` real tokens, or the ``"first"`` of each sample, where the classification token sits.

    Shape:
        - relevance, spurious, valid: ``(batch, keys)``
        - output: scalar, zero where no sample is annotated

    Raises:
        ValueError: If there is no annotation or no call, shapes differ, a layer has no such head, or ``queries`` is
            unknown.

    Example:
        >>> from attn_callbacks.capture import AttentionCall
        >>> tokens = torch.zeros(1, 2, 4, 8, requires_grad=True)
        >>> calls = [AttentionCall("attention", query=tokens, key=tokens)]
        >>> attention_term(calls, spurious=torch.tensor([[False, False, False, True]]))  # -log(3 / 4)
        tensor(0.2877, grad_fn=<SumBackward1>)
    """
    one_of("queries", queries, QUERIES)
    _check(calls, {"relevance": relevance, "spurious": spurious, "valid": valid})
    batch, _, _, keys = calls[0].shape
    real = torch.ones(batch, keys, device=calls[0].device) if valid is None else valid.bool().float()
    wanted = [_near(relevance.float() * real, real)] if relevance is not None else []
    wanted += [_away(spurious.float() * real, real)] if spurious is not None else []
    with torch.autocast(calls[0].device.type, enabled=False):  # would take the sums in half precision
        layers = [_layer_costs(call, real, wanted, heads, queries == "first") for call in calls]
        terms = [_mean(costs, wish) for costs, wish in zip(zip(*layers, strict=True), wanted, strict=True)]
        return torch.stack(terms).sum(dim=0)


def guided_calls(calls: Sequence[AttentionCall], shape: Sequence[int]) -> list[AttentionCall]:
    """Return the calls that can be guided: self-attention over the annotated tokens, with a graph where there is one.

    Args:
        calls: Attention of a step.
        shape: ``(batch, keys)`` of the annotation.

    Raises:
        RuntimeError: If no self-attention has the keys of the annotation, or none carries a graph.
    """
    own = [call for call in calls if not call.is_cross]
    fitting = [call for call in own if (call.shape[0], call.shape[3]) == tuple(shape)]
    if not fitting:
        seen = sorted({(call.shape[0], call.shape[3]) for call in own})
        raise RuntimeError(
            f"`AttentionGuidance` found no self-attention over (batch, keys) = {tuple(shape)}; seen: {seen or 'none'}. "
            "Annotate every token as the model sees it, special tokens and padding included."
        )
    trainable = [call for call in fitting if call.requires_grad]
    if torch.is_grad_enabled() and not trainable:  # without gradients the caller only wants the number
        raise RuntimeError(
            f"`AttentionGuidance` cannot train the attention of {fitting[0].name!r}: none of the {len(fitting)} calls "
            "carries a gradient. Unfreeze the layers to guide, and use non-reentrant activation checkpointing "
            "(`use_reentrant=False`)."
        )
    return trainable if torch.is_grad_enabled() else fitting


def chosen_heads(call: AttentionCall, values: Tensor, heads: Sequence[int] | None) -> Tensor:
    """Return the values of some heads of a layer.

    Args:
        call: The layer's call.
        values: Something of each head.
        heads: Indices of the heads; ``None``: all.

    Shape:
        - values: ``(batch, heads, ...)``
        - output: ``(batch, chosen heads, ...)``

    Raises:
        ValueError: If the layer has no such head.
    """
    if heads is None:
        return values
    if not all(0 <= head < call.shape[1] for head in heads):
        raise ValueError(f"`heads` must lie in 0..{call.shape[1] - 1}, the heads of {call.name!r}, got {list(heads)}.")
    return values.index_select(1, _index(tuple(heads), values.device))


@lru_cache(maxsize=64)
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Return indices on the device, copied there once: each copy of a list would wait for a GPU."""
    with torch.inference_mode(False):  # such a tensor could not be kept for a backward pass
        return torch.tensor(heads, device=device)


class _Wish(NamedTuple):
    """What attention should rest on."""

    keys: Tensor  # (batch, keys), how much each is wanted
    queries: Tensor  # (batch, keys), how much each counts as a query
    present: Tensor  # (batch,), the sample is annotated


def _near(member: Tensor, real: Tensor) -> _Wish:
    return _Wish(member, real, member.sum(dim=1) > 0)


def _away(member: Tensor, real: Tensor) -> _Wish:
    outside = real - member  # summed by the kernel itself: 1 - mass would have no digits left in half precision
    return _Wish(outside, outside, member.sum(dim=1) > 0)


def _layer_costs(
    call: AttentionCall, real: Tensor, wanted: Sequence[_Wish], heads: Sequence[int] | None, only_first: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each wish, every sample's mean cost ``(batch,)`` and whether it has any row ``(batch,)``."""
    columns = torch.stack([real, *(wish.keys for wish in wanted)], dim=-1)[:, None]  # (batch, 1, keys, columns)
    sums, counted, rows = _first_row(call, columns, real) if only_first else _all_rows(call, columns)
    sums, counted = chosen_heads(call, sums, heads), chosen_heads(call, counted, heads)
    total = sums[..., 0]
    costs = []
    for wish, part in zip(wanted, sums[..., 1:].unbind(dim=-1), strict=True):
        share = part / total.clamp(min=_FLOOR)
        weight = wish.queries if rows is None else wish.queries.gather(1, rows)
        weight = weight[:, None] * (counted & (total > _FLOOR) & (share > 0))  # (batch, heads, rows)
        size = weight.sum(dim=(1, 2))
        cost = (weight * -torch.log(_FLOOR + (1 - _FLOOR) * share)).sum(dim=(1, 2)) / size.where(size > 0, 1.0)
        costs.append((cost, size > 0))
    return costs


def _all_rows(call: AttentionCall, columns: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the sums of every query's attention over ``columns``, which queries count, and which they are."""
    found = call.expectation(columns)
    return found.values, found.counted, found.rows


def _first_row(call: AttentionCall, columns: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    first = real.argmax(dim=1, keepdim=True)  # not 0 where padding stands on the left
    weights = call.weights(first)  # (batch, heads, 1, keys)
    sums = weights @ columns.to(weights.dtype)
    return sums, (real.gather(1, first) > 0)[:, None].expand(sums.shape[:3]), first


def _mean(layers: Sequence[tuple[Tensor, Tensor]], wish: _Wish) -> Tensor:
    """Average over the layers in which a sample has rows, then over the samples that have any."""
    seen = torch.stack([counts for _, counts in layers])  # (layers, batch)
    cost = torch.stack([cost for cost, _ in layers]).sum(dim=0) / seen.sum(dim=0).clamp(min=1)
    present = seen.any(dim=0) & wish.present
    return cost.where(present, 0.0).sum() / present.sum().clamp(min=1)


def _check(calls: Sequence[AttentionCall], masks: dict[str, Tensor | None]) -> None:
    if not calls:
        raise ValueError("`calls` must hold at least one attention call, got none.")
    if masks["relevance"] is None and masks["spurious"] is None:
        raise ValueError("Nothing to guide by: pass `relevance` to reward tokens, or `spurious` to suppress tokens.")
    expected = (calls[0].shape[0], calls[0].shape[3])
    named = [(name, tuple(mask.shape)) for name, mask in masks.items() if mask is not None]
    named += [(f"{call.name} as (batch, keys)", (call.shape[0], call.shape[3])) for call in calls]
    for name, shape in named:
        if shape != expected:
            raise ValueError(f"`{name}` must have shape (batch, keys) = {expected}, got {shape}.")

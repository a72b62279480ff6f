"""One attention call: what went into it, and what can be asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_callbacks.capture import flex

__all__ = ["AttentionCall"]

_MASKED = -1e8
"""Additive masks below this are "may not attend": ``finfo.min``, ``-inf`` and -1e9 are, no position bias ever is."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of attention inside a model's forward, ready to be asked for its weights.

    Holds references to the tensors of the call, so nothing of size queries x keys exists until :meth:`weights` or
    :meth:`logits` is asked for it. Everything asked is computed in float32 (or wider), with autocast switched off and
    without dropout, and keeps the graph when the forward had one.

    Args:
        name: Path of the module in which attention was called, such as ``encoder.layer.3.attention.self``.
        index: This is the n-th call of that module within one forward of the model, counted from zero.
        is_cross: Queries and keys come from different sequences.
        query: Queries as the kernel received them, after projection, normalisation and rotation.
        key: Keys; under grouped-query attention with fewer heads than ``query``.
        value: Values.
        mask: ``True`` = may attend, or an additive bias.
        is_causal: Query ``i`` may attend to keys ``0..i`` (aligned at the first query, as in PyTorch).
        scale: Factor on the scores; ``None`` is ``1 / sqrt(head_dim)``.
        enable_gqa: Query head ``h`` reads key head ``h // (heads / key_heads)``.
        score_mod: FlexAttention's function of a score and its position.
        mask_mod: FlexAttention's function of a position: ``True`` = may attend.
        scores: For attention without a fused kernel: the input of its softmax, mask included.
        recorded: For :func:`attn_callbacks.record`: the weights themselves.
        given_query_valid: What :attr:`query_valid` answers; ``None`` derives it from the mask.
        given_key_valid: What :attr:`key_valid` answers; ``None`` derives it from the mask.

    Shape:
        - query: ``(batch, heads, queries, head_dim)``
        - key, value: ``(batch, key_heads, keys, head_dim)``
        - mask: broadcastable to ``(batch, heads, queries, keys)``
        - scores, recorded: ``(batch, heads, queries, keys)``

    Example:
        >>> tokens = torch.zeros(1, 2, 3, 4)
        >>> call = AttentionCall("attention", query=tokens, key=tokens, is_causal=True)
        >>> call.weights()[0, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])
    """

    name: str
    index: int = 0
    is_cross: bool = False
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    score_mod: Callable[..., Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None
    scores: Tensor | None = None
    recorded: Tensor | None = None
    given_query_valid: Tensor | None = None
    given_key_valid: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, queries, keys)`` of the weights."""
        seen = self.scores if self.scores is not None else self.recorded
        if seen is not None:
            batch, heads, queries, keys = seen.shape
            return batch, heads, queries, keys
        query, key = self._fused()
        return max(query.shape[0], key.shape[0]), query.shape[1], query.shape[2], key.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the tensors of the call live."""
        return self._any_tensor().device

    @property
    def requires_grad(self) -> bool:
        """The weights carry a graph: the forward ran with gradients and attention depends on something learned."""
        tensors = (self.query, self.key, self.mask, self.scores, self.recorded)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    @property
    def query_valid(self) -> Tensor:
        """``(batch, queries)``: ``True`` where the query is a token and not padding.

        Self-attention takes it from the keys; a mask says nothing about the queries of cross-attention, which then
        all count as tokens. :meth:`with_valid` tells better.
        """
        batch, _, queries, keys = self.shape
        if self.given_query_valid is not None:
            return self.given_query_valid
        if not self.is_cross and queries == keys:
            return self.key_valid
        return torch.ones(batch, queries, dtype=torch.bool, device=self.device)

    @property
    def key_valid(self) -> Tensor:
        """``(batch, keys)``: ``True`` where some query may attend to the key."""
        if self.given_key_valid is not None:
            return self.given_key_valid
        batch, _, _, keys = self.shape
        return self._mask_allows(None).any(dim=-2).any(dim=1).expand(batch, keys)

    def with_valid(self, queries: Tensor | None = None, keys: Tensor | None = None) -> AttentionCall:
        """Return this call with known validity of its tokens.

        Args:
            queries: ``(batch, queries)``, ``True`` where the query is a token; ``None`` derives it from the mask.
            keys: ``(batch, keys)``, likewise.
        """
        return replace(self, given_query_valid=queries, given_key_valid=keys)

    def allowed(self, rows: Tensor | None = None) -> Tensor:
        """Where a query may attend: bool, broadcastable to ``(batch, heads, rows, keys)``.

        Args:
            rows: Indices of the wanted queries, ``(rows,)`` or, one list a sample, ``(batch, rows)``; ``None``: all.
        """
        allowed = self._mask_allows(rows)
        if not self.is_causal:
            return allowed
        _, _, queries, keys = self.shape
        wanted = torch.arange(queries, device=self.device) if rows is None else rows
        causal = torch.arange(keys, device=self.device) <= wanted[..., None]  # (rows, keys) or (batch, rows, keys)
        return allowed & (causal if causal.ndim == 2 else causal[:, None])

    def logits(self, rows: Tensor | None = None) -> Tensor | None:
        """Scores before the softmax, ``-inf`` where a query may not attend; ``None`` for recorded weights.

        Args:
            rows: As in :meth:`allowed`.

        Shape:
            - output: ``(batch, heads, rows, keys)``, float32 or wider
        """
        if self.recorded is not None:
            return None
        with torch.autocast(self.device.type, enabled=False):  # would cast float() @ float() down again
            return self._raw_scores(rows).masked_fill(~self.allowed(rows), -math.inf)

    def weights(self, rows: Tensor | None = None) -> Tensor:
        """Attention weights without dropout: rows sum to one, rows without any allowed key are zero.

        Costs memory and time of ``rows x keys`` a head; ask for some rows of a long sequence.

        Args:
            rows: Indices of the wanted queries, ``(rows,)`` or, one list a sample, ``(batch, rows)``; ``None``: all.

        Shape:
            - output: ``(batch, heads, rows, keys)``, float32 or wider

        Raises:
            ValueError: If ``rows`` has more than two axes.
        """
        logits = self.logits(rows)
        if logits is None:
            return self._recorded_rows(rows)
        dead = logits.detach().amax(dim=-1, keepdim=True) == -math.inf
        # zeros, not -inf, in rows without keys: a softmax of -inf alone is NaN, and so is its gradient
        return torch.softmax(logits.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)

    def _any_tensor(self) -> Tensor:
        tensor = next((t for t in (self.query, self.scores, self.recorded) if t is not None), None)
        if tensor is None:
            raise ValueError("`AttentionCall` needs `query` and `key`, or `scores`, or `recorded`; got none of them.")
        return tensor

    def _fused(self) -> tuple[Tensor, Tensor]:
        if self.query is None or self.key is None:
            raise ValueError("`AttentionCall` needs `query` and `key`, or `scores`, or `recorded`; got none of them.")
        return self.query, self.key

    def _recorded_rows(self, rows: Tensor | None) -> Tensor:
        recorded = _take(_wide(_present(self.recorded)), rows)
        return recorded.nan_to_num(0.0)

    def _raw_scores(self, rows: Tensor | None) -> Tensor:
        if self.scores is not None:
            return _wide(_take(self.scores, rows))
        query, key = self._fused()
        query, key = _wide(_take(query, rows)), _wide(key)
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = 1.0 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale
        scores = (query @ key.transpose(-2, -1)) * scale
        if self.mask is not None and self.mask.is_floating_point():
            scores = scores + _wide(_take(self.mask, rows))
        if self.score_mod is not None:
            scores = flex.modified_scores(self.score_mod, scores, rows)
        return scores

    def _mask_allows(self, rows: Tensor | None) -> Tensor:
        """What the masks allow, ``is_causal`` left aside."""
        if self.recorded is not None:
            return _take(self.recorded, rows) > 0
        additive = self.scores if self.scores is not None else self.mask
        if self.mask_mod is not None:
            return flex.allowed(self.mask_mod, self.shape, rows, self.device)
        if additive is None:
            return torch.ones(1, 1, 1, self.shape[-1], dtype=torch.bool, device=self.device)
        taken = _take(additive, rows)
        return taken if taken.dtype == torch.bool else taken > max(_MASKED, torch.finfo(taken.dtype).min / 2)


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("`AttentionCall` holds no recorded weights.")
    return tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of a ``(batch | 1, heads | 1, queries | 1, n)`` tensor; a broadcast query axis stays as it is."""
    if rows is None or tensor.shape[-2] == 1:
        return tensor
    if rows.ndim == 1:
        return tensor.index_select(-2, rows.to(tensor.device))
    if rows.ndim != 2:
        raise ValueError(f"`rows` must have shape (rows,) or (batch, rows), got {tuple(rows.shape)}.")
    wide = tensor.expand(len(rows), -1, -1, -1)
    index = rows.to(tensor.device)[:, None, :, None].expand(-1, wide.shape[1], -1, wide.shape[-1])
    return wide.gather(-2, index)

"""One attention call: what went into it, and what can be asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from attn_callbacks.capture import flex
from attn_callbacks.capture.exact.problem import Problem
from attn_callbacks.capture.exact.reading import read_problem
from attn_callbacks.capture.rows import check_rows, row_chunks, take_rows
from attn_callbacks.capture.scores import cut_off, fused_scores, let_through, softmax_rows, wide
from attn_callbacks.capture.statistics import CallStatistics

__all__ = ["AttentionCall"]

_LONG = 2**20


@dataclass(frozen=True, eq=False)
class AttentionCall(CallStatistics):
    """One call of attention inside a model's forward, ready to be asked for its weights.

    Comes from one of three sources: the arguments of a fused kernel (``query``, ``key``), the input of the model's own
    softmax (``scores``), or weights that the model handed over (``recorded``). Holds references to these tensors, so
    nothing of size queries x keys is built until it is asked for. Everything asked is computed in float32 (or wider),
    with autocast switched off and without dropout, and keeps the graph when the forward had one.

    Args:
        name: Path of the module in which attention was called, such as ``encoder.layer.3.attention.self``.
        index: This is the n-th call of that module within one forward of the model, counted from zero.
        is_cross: Queries and keys come from different sequences.
        is_decoder: Self-attention of a decoder behind an encoder: over tokens of its own, not those of the encoder.
        query: Queries as the kernel received them, after projection, normalisation and rotation.
        key: Keys; under grouped-query attention with fewer heads than ``query``.
        value: Values; ``None`` where they were not seen.
        output: The tensor that the model goes on with, before the heads are merged: the kernel's output or, where the
            model mixes the values itself, at times its weights; ``None`` where neither was seen.
        mask: ``True`` = may attend, or an additive bias.
        is_causal: Query ``i`` may attend to keys ``0..i`` (aligned at the first query, as in PyTorch).
        scale: Factor on the scores; ``None`` is ``1 / sqrt(head_dim)``.
        enable_gqa: Query head ``h`` reads key head ``h // (heads / key_heads)``.
        score_mod: FlexAttention's function of a score and its position.
        mask_mod: FlexAttention's function of a position: ``True`` = may attend.
        scores: For attention without a fused kernel: the input of its softmax, mask included.
        recorded: For :func:`attn_callbacks.record`, and for weights behind a virtual key: the weights themselves.
        given_query_valid: What :attr:`query_valid` answers; ``None`` derives it from the mask.
        given_key_valid: What :attr:`key_valid` answers; ``None`` derives it from the mask.

    Shape:
        - query: ``(batch, heads, queries, head_dim)``
        - key, value: ``(batch, key_heads, keys, head_dim)``
        - output: ``(batch, heads, queries, head_dim | keys)``, or with the axes in which the model holds it
        - mask: four axes, broadcastable to ``(batch, heads, queries, keys)``
        - scores, recorded: ``(batch, heads, queries, keys)``

    Raises:
        ValueError: If there is not exactly one source.

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
    is_decoder: bool = False
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None
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

    def __post_init__(self) -> None:
        given = [name for name in ("query", "key", "scores", "recorded") if getattr(self, name) is not None]
        if given not in (["query", "key"], ["scores"], ["recorded"]):
            got = ", ".join(f"`{name}`" for name in given) or "none"
            raise ValueError(f"`AttentionCall` needs `query` and `key`, or `scores`, or `recorded`; got {got}.")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, queries, keys)`` of the weights."""
        if self.query is None or self.key is None:
            batch, heads, queries, keys = self._source.shape
            return batch, heads, queries, keys
        batch, heads = (max(pair) for pair in zip(self.query.shape[:2], self.key.shape[:2], strict=True))
        return batch, heads, self.query.shape[2], self.key.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the tensors of the call live."""
        return self._source.device

    @property
    def requires_grad(self) -> bool:
        """The weights carry a graph: the forward ran with gradients and attention depends on something learned."""
        tensors = (self.query, self.key, self.mask, self.scores, self.recorded)
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    @property
    def query_valid(self) -> Tensor:
        """``(batch, queries)``: ``True`` where the query is a token and not padding.

        Self-attention takes it from the keys; a mask says nothing about the queries of cross-attention, nor about those
        of a sequence that attends to a cache, which then all count as tokens. :meth:`with_valid` tells better.
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
        given = self.given_key_valid
        return cast(Tensor, self._remembered("key_valid", self._seen_keys)).clone() if given is None else given

    def with_valid(self, queries: Tensor | None = None, keys: Tensor | None = None) -> AttentionCall:
        """Return this call with known validity of its tokens.

        Args:
            queries: ``(batch, queries)``, ``True`` where the query is a token; ``None`` derives it from the mask.
            keys: ``(batch, keys)``, likewise.
        """
        return replace(self, given_query_valid=queries, given_key_valid=keys)

    def select(self, sample: int) -> AttentionCall:
        """Return the call for one entry of the batch axis, which stays with length one."""
        batch = self.shape[0]
        if not 0 <= sample < batch:
            raise ValueError(f"`sample` must be at least 0 and below the batch size {batch}, got {sample}.")
        own: dict[str, Any] = {n: t[sample : sample + 1] for n, t in self._tensors().items() if len(t) == batch}
        own["score_mod"] = flex.at_sample(self.score_mod, sample, 1)
        own["mask_mod"] = flex.at_sample(self.mask_mod, sample, 0)
        return replace(self, **own)

    def detach(self) -> AttentionCall:
        """Return this call without its graph."""
        detached: dict[str, Any] = {name: tensor.detach() for name, tensor in self._tensors().items()}
        return replace(self, **detached)

    def allowed(self, rows: Tensor | Sequence[int] | None = None) -> Tensor:
        """Where a query may attend: bool, broadcastable to the shape of :meth:`weights` for the same ``rows``."""
        rows = check_rows(rows, self.shape, self.device)
        allowed = self._unmasked(rows)
        if not self.is_causal:
            return allowed
        _, _, queries, keys = self.shape
        wanted = torch.arange(queries, device=self.device) if rows is None else rows
        causal = torch.arange(keys, device=self.device) <= wanted[..., None]  # (rows, keys) or (batch, rows, keys)
        return allowed & (causal if causal.ndim == 2 else causal[:, None])

    def logits(self, rows: Tensor | Sequence[int] | None = None) -> Tensor | None:
        """Scores before the softmax, ``-inf`` where a query may not attend; ``None`` for recorded weights.

        Arguments and shape are those of :meth:`weights`.
        """
        if self.recorded is not None:
            return None
        rows = check_rows(rows, self.shape, self.device)
        with torch.autocast(self.device.type, enabled=False):  # would cast float() @ float() down again
            if self.query is None or self.key is None:
                return cut_off(take_rows(self._source, rows))
            scores = fused_scores(self.query, self.key, self.scale, rows)
            if self.score_mod is not None:
                scores = flex.modified_scores(self.score_mod, scores, rows)
            bias = self._bias(rows)
            return scores if bias is None else scores + bias

    def weights(self, rows: Tensor | Sequence[int] | None = None) -> Tensor:
        """Attention weights without dropout: rows sum to one, rows without any allowed key are zero.

        Costs memory and time of ``rows x keys`` a head; ask for some rows of a long sequence. Where the model's softmax
        includes a virtual key (a learned sink), rows sum to what is left for the others.

        Args:
            rows: Indices of the wanted queries, ``(rows,)``, also as a list, or ``(batch, rows)``; ``None``: all.

        Shape:
            - output: ``(batch, heads, rows, keys)``, float32 or wider

        Raises:
            ValueError: If ``rows`` has neither of the two shapes or, checked on the CPU only, an index out of range.
            TypeError: If ``rows`` are not integers.
        """
        if self.recorded is not None:
            return wide(take_rows(self.recorded, check_rows(rows, self.shape, self.device))).nan_to_num(0.0)
        return softmax_rows(cast(Tensor, self.logits(rows)))

    def _problem(self, keeps_half: bool) -> Problem | None:
        return read_problem(self, keeps_half)

    @property
    def _has_matrix(self) -> bool:
        # for a learned bias the model took the kernel that builds the matrix
        return self.query is None or (self.mask is not None and self.mask.requires_grad and torch.is_grad_enabled())

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    @property
    def _source(self) -> Tensor:
        return next(tensor for tensor in (self.query, self.scores, self.recorded) if tensor is not None)

    def _seen_keys(self) -> Tensor:
        batch, _, queries, keys = self.shape
        tensor = self.mask if self.query is not None else self._source
        is_long = tensor is not None and tensor.shape[-2] > 1 and queries * keys > _LONG
        # a mask function has no tensor yet, and of a long mask no second one is made
        chunks = row_chunks(self.shape, self.device) if self.mask_mod is not None or is_long else [None]
        valid = torch.zeros(batch, keys, dtype=torch.bool, device=self.device)
        for rows in chunks:
            valid = valid | self._unmasked(rows).any(dim=-2).any(dim=1)
        return valid & (torch.arange(keys, device=self.device) < queries) if self.is_causal else valid

    def _bias(self, rows: Tensor | None) -> Tensor | None:
        """What is added to the scores: the additive mask, and ``-inf`` where a query may not attend."""
        bias = torch.zeros((), dtype=torch.float32, device=self.device)
        if self.mask is not None and self.mask.is_floating_point():
            bias = cut_off(take_rows(self.mask, rows))
            if not self.is_causal:
                return bias
        elif self.mask is None and self.mask_mod is None and not self.is_causal:
            return None
        return torch.where(self.allowed(rows), bias, -math.inf)

    def _unmasked(self, rows: Tensor | None) -> Tensor:
        """Where the masks let a query attend, ``is_causal`` left aside."""
        if self.recorded is not None:
            return take_rows(self.recorded, rows) > 0
        if self.mask_mod is not None:
            return flex.allowed(self.mask_mod, self.shape, rows, self.device)
        mask = self.mask if self.scores is None else self.scores
        if mask is None:
            return torch.ones(1, 1, 1, self.shape[-1], dtype=torch.bool, device=self.device)
        return let_through(mask, rows)

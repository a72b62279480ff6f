"""What can be asked of a call of attention without its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, integer
from attn_callbacks.capture.answers import CallSummary, RowStatistic, TopKeys
from attn_callbacks.capture.arguments import check_order, check_same_tokens, feature_columns, sample_widths
from attn_callbacks.capture.asking import Asking
from attn_callbacks.capture.exact import distribution, extremes, position
from attn_callbacks.capture.rows import row_chunks

__all__ = ["CallStatistics"]


class CallStatistics(Asking):
    r"""Statistics of attention in ``O(queries * head_dim)`` memory.

    The value slot of a fused kernel averages whatever is put there under the attention weights: keys give the entropy,
    positions the mean position, indicators the mass on a set. One statistic costs about as much as the forward of the
    kernel itself; nothing of size queries x keys is built.

    Answers are exact for the calls of fused kernels, under any mask, and for matrices that the model made itself (read
    in blocks of rows). Two things have no identity: the entropies under an additive bias that is not one of the query
    plus one of the key (T5), and everything behind a ``score_mod``. There 64 stratified rows are looked at, and the
    answer says so: :attr:`RowStatistic.is_exact`.

    Computed in float32 (float64 stays), without dropout. On a GPU the log-sum-exp, entropies, expectations and pooled
    maps take the kernel of the call's own precision: an entropy from bfloat16 is off by up to 0.003 nats where scores
    reach 5 and 0.06 where they reach 50, an expectation by 0.4 % of the largest feature. In float32 a mean distance is
    off by up to 1e-5 of the length. Differentiable, once, when the call has a graph.

    References:
        Dao et al., "FlashAttention", 2022, section 3.1 (the log-sum-exp that kernels keep).
    """

    def logsumexp(self) -> RowStatistic:
        """Log-sum-exp of the scores of every query. One call of a kernel."""
        return self._ask(distribution.logsumexp, lambda rows: rows.logsumexp(), keeps_half=True)

    def expectation(self, features: Tensor) -> RowStatistic:
        """Average features of the keys under attention. One call, for about every ``head_dim`` features.

        Args:
            features: ``(keys, features)``, or other ones for each sample and head.

        Shape:
            - features: ``(keys, features)`` or ``(batch | 1, heads | 1, keys, features)``
            - values: ``(batch, heads, queries, features)``

        Raises:
            ValueError: If ``features`` has another shape.
        """
        return self._ask_expectation(feature_columns(features, self.shape, self.device))

    def entropy(self) -> RowStatistic:
        """Entropy of every query's weights, in nats. One call."""
        return self.entropy_and_expectation(torch.zeros(self.shape[3], 0, device=self.device))[0]

    def entropy_and_expectation(self, features: Tensor) -> tuple[RowStatistic, RowStatistic]:
        """Entropy and :meth:`expectation` in one call, which up to 8 features make a fifth dearer.

        Example:
            >>> from attn_callbacks.capture import AttentionCall
            >>> call = AttentionCall("attention", query=torch.zeros(1, 1, 2, 4), key=torch.zeros(1, 1, 2, 4))
            >>> entropy, position = call.entropy_and_expectation(torch.tensor([[0.0], [1.0]]))
            >>> entropy.values, position.mean()
            (tensor([[[0.6931, 0.6931]]]), tensor([[[0.5000]]]))
        """
        return self._ask_entropy(feature_columns(features, self.shape, self.device))

    @torch.no_grad()
    def summary(self, features: Tensor | None = None) -> CallSummary:
        """Answer the commonest questions in one pass over blocks of scores, without a graph.

        On a CPU it takes about the time of one forward of the kernel, where the questions one by one take three. Exact
        under every additive bias, T5's included.

        Args:
            features: As in :meth:`expectation`; ``None``: none.

        Raises:
            ValueError: If ``features`` has another shape, or the call holds recorded weights, which have no scores.
        """
        none = torch.zeros(self.shape[3], 0, device=self.device)
        return self._ask_all(feature_columns(none if features is None else features, self.shape, self.device))

    def renyi_entropy(self, order: float = 2.0) -> RowStatistic:
        r"""Rényi entropy :math:`\frac{1}{1 - a} \log \sum_j p_{ij}^a` in nats. One call more than the log-sum-exp.

        ``renyi_entropy(2).values.exp()`` is the effective number of keys.

        Args:
            order: Above 0 and finite; at 1 it is :meth:`entropy`.

        Raises:
            ValueError: If ``order`` is not that, or closer to 1 than 0.01, where float32 has no digits left.

        References:
            Rényi, "On measures of entropy and information", 1961.
        """
        check_order(order)
        if order == 1:
            return self.entropy()
        return self._ask(lambda p: distribution.renyi_entropy(p, order), lambda rows: rows.renyi_entropy(order))

    def max_logit(self) -> RowStatistic:
        """Largest score of every query, before the softmax. Scores in blocks of rows: about half a call."""
        return self._ask(extremes.max_logit, lambda rows: rows.max_logit(), uses_logsumexp=False)

    def confidence(self) -> RowStatistic:
        """Largest weight of every query (Voita et al., 2019, section 4). As :meth:`max_logit`."""
        return self._ask(extremes.confidence, lambda rows: rows.confidence())

    def mean_position(self) -> RowStatistic:
        """Mean index of the attended keys. One call."""
        return self._ask(position.mean_position, lambda rows: rows.mean_position(), uses_logsumexp=False)

    def position_variance(self) -> RowStatistic:
        """Variance of the index of the attended keys. One call in float64; on a GPU, blocks of scores."""
        return self._ask(position.position_variance, lambda rows: rows.position_variance(), uses_logsumexp=False)

    def mean_distance(self, mean_position: RowStatistic | None = None) -> RowStatistic:
        """Mean distance between a query and the keys it attends to, in tokens. One call if causal, else one and a half.

        Args:
            mean_position: The answer of :meth:`mean_position`, if it is known: saves a call.

        Raises:
            ValueError: If queries and keys are not the same tokens.
        """
        check_same_tokens("mean_distance", self.shape, self.is_cross)
        known = self._known_mean(mean_position)
        return self._ask(
            position.mean_distance, lambda rows, *_: rows.mean_distance(), *known, uses_logsumexp=bool(known)
        )

    def window_mass(self, width: int) -> RowStatistic:
        """Weight on keys at most ``width`` tokens away. A band of scores, ``O(queries * width)``.

        Raises:
            ValueError: If ``width`` is below 0, or queries and keys are not the same tokens.
        """
        check_same_tokens("window_mass", self.shape, self.is_cross)
        width = at_least("width", width, 0)
        return self._ask(lambda p: position.window_mass(p, width), lambda rows: rows.window_mass(width))

    def far_mass(self, width: int | Tensor) -> RowStatistic:
        """Weight on keys more than ``width`` tokens away: long-range attention. One call at most.

        Args:
            width: In tokens; ``(batch,)`` for a width of each sample.

        Raises:
            ValueError: If ``width`` is below 0 or has another shape, or queries and keys are not the same tokens.
            TypeError: If ``width`` does not hold integers.
        """
        check_same_tokens("far_mass", self.shape, self.is_cross)
        if isinstance(width, Tensor):
            own = sample_widths(width, self.shape[0]).to(self.device)
            return self._ask(lambda p, w: position.far_mass(p, w[:, 0]), lambda rows, w: rows.far_mass(w), own)
        most = at_least("width", width, 0)
        return self._ask(lambda p: position.far_mass(p, most), lambda rows: rows.far_mass(most))

    def choices(self) -> Tensor:
        """Count the keys, padding left out, that each query may attend to: ``(batch | 1, heads | 1, queries)``."""
        return self._choices()

    def first_mass(self, k: int = 1) -> RowStatistic:
        """Weight on each sample's first ``k`` keys that are not padding: attention sinks. A column of scores a key.

        Rows that may attend to none of them do not count.

        Raises:
            ValueError: If ``k`` is below 1.

        References:
            Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023.
        """
        keys = self.key_valid.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
        most = min(at_least("k", k, 1), self.shape[3])
        return self._ask_keys(keys.indices[:, None, :most], keys.values[:, None, :most].bool())

    def offset_mass(self, offset: int) -> RowStatistic:
        """Weight on the key at ``query + offset``: -1 is the previous token. ``O(queries * head_dim)``.

        Rows that may not attend to that key do not count.

        Raises:
            ValueError: If queries and keys are not the same tokens.
        """
        check_same_tokens("offset_mass", self.shape, self.is_cross)
        length = self.shape[3]
        keys = torch.arange(length, device=self.device) + max(-length, min(length, integer("offset", offset)))
        index = keys.clamp(0, max(length - 1, 0))
        exists = ((keys >= 0) & (keys < length)) & self.key_valid[:, index]
        return self._ask_keys(index[None, :, None], exists[..., None])

    def received_mass(self) -> Tensor:
        """Sum of the weights that each key gets from all valid queries: ``(batch, heads, keys)``.

        One call with the roles of queries and keys swapped. Exact for all calls.
        """
        return self._received()

    def bucketed_weights(self, query_buckets: int, key_buckets: int) -> Tensor:
        """Pool the weights: mean over the valid queries of each bucket, sum over the keys of each bucket.

        Rows of queries still sum to one (to zero where a bucket has no valid query). Exact; one call for about
        ``head_dim`` buckets of keys.

        Args:
            query_buckets: Number of equal parts of the queries, at most as many as there are queries.
            key_buckets: Likewise of the keys.

        Shape:
            - output: ``(batch, heads, query_buckets, key_buckets)``

        Raises:
            ValueError: If there are more buckets than queries or keys.
        """
        queries, keys = self.shape[2:]
        parts = (at_least("query_buckets", query_buckets, 1), at_least("key_buckets", key_buckets, 1))
        if parts[0] > queries or parts[1] > keys:
            raise ValueError(f"Buckets must be at most (queries, keys) = {(queries, keys)}, got {parts}.")
        return self._pooled(parts)

    def top_keys(self, k: int, rows: Tensor | None = None) -> TopKeys:
        """Largest weights of each query and their keys, a few rows at a time.

        Args:
            k: How many; at most as many as there are keys.
            rows: Indices of the wanted queries as in :meth:`AttentionCall.weights`; ``None`` takes all.

        Raises:
            ValueError: If ``k`` is below 1 or above the number of keys.
        """
        if not 1 <= integer("k", k) <= self.shape[3]:
            raise ValueError(f"`k` must lie between 1 and the number of keys {self.shape[3]}, got {k}.")
        chunks = row_chunks(self.shape, self.device) if rows is None else [rows]
        found = [self.weights(chunk).topk(k, dim=-1) for chunk in chunks]
        values, indices = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
        return TopKeys(values, indices)

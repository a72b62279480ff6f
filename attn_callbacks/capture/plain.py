"""Statistics of rows from their weights, for the calls that no fused kernel can answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PlainRows"]


@dataclass(frozen=True, eq=False)
class PlainRows:
    """Some rows of attention as a matrix.

    Shape:
        - weights, logits: ``(batch, heads, rows, keys)``
        - allowed: bool, broadcastable to ``weights``
        - queries: index of each row, ``(batch, rows)``
    """

    weights: Tensor
    logits: Tensor | None
    allowed: Tensor
    queries: Tensor

    def alive(self) -> Tensor:
        """Rows with weight on some key, ``(batch, heads, rows)``."""
        return self.weights.detach().sum(dim=-1) != 0

    def logsumexp(self) -> Tensor:
        """Log-sum-exp of the scores.

        Raises:
            ValueError: If the model handed over its weights: they do not tell the scores.
        """
        return self._scores("logsumexp").logsumexp(dim=-1)

    def max_logit(self) -> Tensor:
        """Largest score.

        Raises:
            ValueError: As :meth:`logsumexp`.
        """
        return self._scores("max_logit").amax(dim=-1)

    def confidence(self) -> Tensor:
        """Largest weight."""
        return self.weights.amax(dim=-1)

    def entropy(self) -> Tensor:
        """Entropy in nats."""
        tiny = torch.finfo(self.weights.dtype).tiny
        return -(self.weights * self.weights.clamp_min(tiny).log()).sum(dim=-1)

    def renyi_entropy(self, order: float) -> Tensor:
        """Rényi entropy in nats."""
        some = self.weights > 0
        powers = self.weights.where(some, 1.0).pow(order) * some  # a power below 1 has no gradient at zero
        total = powers.sum(dim=-1)
        return total.where(total > 0, 1.0).log() / (1.0 - order)

    def expectation(self, features: Tensor) -> Tensor:
        """Mean of ``features (batch | 1, heads | 1, keys, width)`` under attention."""
        return self.weights @ features.to(self.weights.dtype)

    def mean_position(self) -> Tensor:
        """Mean index of the attended keys."""
        keys = torch.arange(self.weights.shape[-1], device=self.weights.device, dtype=self.weights.dtype)
        return self.weights @ keys

    def position_variance(self) -> Tensor:
        """Variance of the attended position."""
        weights = self.weights.double()
        position = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
        apart = position - (weights @ position)[..., None]  # weights that do not sum to one allow no shorter form
        return (weights * apart**2).sum(dim=-1).to(self.weights.dtype)

    def mean_distance(self) -> Tensor:
        """Mean distance between query and key."""
        return (self.weights * self._apart().abs()).sum(dim=-1)

    def window_mass(self, width: int) -> Tensor:
        """Weight on keys at most ``width`` away."""
        return (self.weights * (self._apart().abs() <= width)).sum(dim=-1)

    def far_mass(self, width: int | Tensor) -> Tensor:
        """Weight on keys more than ``width`` away, one number or ``(batch, 1)``."""
        limit = width[..., None, None] if isinstance(width, Tensor) else width
        return (self.weights * (self._apart().abs() > limit)).sum(dim=-1)

    def key_mass(self, keys: Tensor, exists: Tensor) -> Tensor:
        """Weight on ``keys (batch | 1, queries | 1, n)`` of each query, as far as they exist."""
        return (self._at(self.weights, keys) * self._own(exists)[:, None]).sum(dim=-1)

    def may_see(self, keys: Tensor, exists: Tensor) -> Tensor:
        """Rows that may attend to some of these keys, ``(batch, heads, rows)``."""
        return (self._at(self.allowed.expand_as(self.weights), keys) & self._own(exists)[:, None]).any(dim=-1)

    def _scores(self, name: str) -> Tensor:
        if self.logits is None:
            raise ValueError(f"`{name}` needs scores, and this call holds recorded weights only.")
        return self.logits

    def _at(self, matrix: Tensor, keys: Tensor) -> Tensor:
        index = self._own(keys)[:, None].expand(*matrix.shape[:3], -1)
        return matrix.gather(-1, index)

    def _own(self, of_queries: Tensor) -> Tensor:
        """Take the rows of ``(batch | 1, queries | 1, n)``."""
        if of_queries.shape[1] == 1:
            return of_queries.expand(len(self.queries), self.queries.shape[1], -1)
        wide = of_queries.expand(len(self.queries), -1, -1)
        return wide.gather(1, self.queries[..., None].expand(-1, -1, wide.shape[-1]))

    def _apart(self) -> Tensor:
        keys = torch.arange(self.weights.shape[-1], device=self.weights.device)
        return (keys - self.queries[..., None])[:, None]  # (batch | 1, 1, rows, keys)

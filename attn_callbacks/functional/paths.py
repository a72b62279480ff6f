"""The path of a token: which heads carried it, layer by layer, from which inputs."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, in_range
from attn_callbacks._plain import plain
from attn_callbacks.functional._mixing import both_real, checked_maps, target_rows
from attn_callbacks.functional._precision import wide

__all__ = ["AttentionPath", "top_paths"]


@dataclass(frozen=True)
class AttentionPath:
    """One way from a token of the last layer down to an input.

    Args:
        tokens: Positions on the way, the target first, the input last: one more than there are layers.
        heads: Head of every step, that of the last layer first; ``None`` where the residual connection was taken.
        weight: Product of the weights of all steps.
    """

    tokens: tuple[int, ...]
    heads: tuple[int | None, ...]
    weight: float

    @property
    def source(self) -> int:
        """Position of the input at which the path ends."""
        return self.tokens[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists; NaN becomes ``None``."""
        return {"tokens": plain(self.tokens), "heads": plain(self.heads), "weight": plain(self.weight)}


def top_paths(
    weights: Sequence[Tensor],
    target: int | Sequence[int] | Tensor,
    *,
    count: int = 8,
    valid: Tensor | None = None,
    residual: float = 0.5,
    normalise: bool = True,
) -> list[tuple[AttentionPath, ...]]:
    r"""Find the strongest paths of one token, through single heads and residual connections, exactly.

    A step from token ``i`` of a layer to token ``j`` of the one below weighs ``(1 - residual) / heads * A[h, i, j]``
    through head ``h``, and ``residual`` (with ``j = i``) past attention; with ``normalise``, all steps from a token sum
    to one. The weight of a path is the product of its steps: the weights of *all* paths between two tokens add up to
    their entry in `attention_rollout`. There are ``(heads * tokens + 1) ** layers`` paths, so even the strongest often
    has a small share: look at how much the paths found have together before telling a story about one.

    With `gradient_weights` in the place of ``weights`` it traces `gradient_rollout`; with ``normalise=False`` as well,
    `attention_relevance` (of which a path then has ``2 ** -layers``, at the default ``residual``).

    One pass over all maps finds the best way on from every token; a best-first search with it as its bound then visits
    about ``count * layers`` partial paths.

    Args:
        weights: Attention of every layer, first layer first, or other maps that are at least zero.
        target: Position of the token in the last layer, one for all samples or one a sample.
        count: Number of paths. Fewer are found where fewer have a weight.
        valid: ``True`` for tokens, ``False`` for padding, which then is on no path; ``None``: all.
        residual: Share of the residual connection.
        normalise: Scale the steps from every token to a sum of one.

    Shape:
        - weights: ``(batch, heads, tokens, tokens)`` a layer
        - target: ``(batch,)`` where there is one a sample
        - valid: ``(batch, tokens)``

    Returns:
        The paths of every sample, strongest first; none for a target that is padding.

    Raises:
        ValueError: As `attention_rollout`; if ``target`` lies outside, or ``count`` is below 1.
        TypeError: If ``weights`` is one tensor.

    Example:
        >>> layer = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
        >>> for path in top_paths([layer, layer], 1, count=3)[0]:
        ...     print(path.tokens, path.heads, path.weight)
        (1, 1, 1) (None, None) 0.25
        (1, 1, 1) (None, 0) 0.1875
        (1, 1, 1) (0, None) 0.1875
    """
    batch, tokens = checked_maps(weights, valid)
    at_least("count", count, 1)
    in_range("residual", residual, 0.0, 1.0)
    wanted = torch.as_tensor(target)
    wanted = wanted.reshape(-1, 1) if wanted.ndim else wanted.expand(batch, 1)
    targets = target_rows(wanted, batch, tokens, torch.device("cpu"), "target")[:, 0].tolist()
    found = []
    for sample in range(batch):
        real = torch.ones(tokens, dtype=torch.bool) if valid is None else valid[sample].bool()
        graph = _Graph([maps[sample] for maps in weights], real, residual, normalise)
        found.append(tuple(graph.paths(targets[sample], count)) if bool(real[targets[sample]]) else ())
    return found


@dataclass(order=True)
class _Partial:
    """A path on its way down; the one that may end strongest comes first, among equal ones the older."""

    bound: float  # less than zero: minus the weight of the best path that goes on from here
    age: int
    weight: float = field(compare=False)
    tokens: tuple[int, ...] = field(compare=False)
    heads: tuple[int | None, ...] = field(compare=False)


class _Graph:
    """The steps of one sample, layer by layer, and the best way on from every token."""

    def __init__(self, layers: list[Tensor], real: Tensor, residual: float, normalise: bool) -> None:
        self._layers, self._real = layers, real.to(layers[0].device)
        self._residual, self._normalise = residual, normalise
        self._stays: list[Tensor] = []  # of every layer, weight of the residual step from each token
        self._scales: list[Tensor] = []  # what attention of a token's row is multiplied with
        self._best = [self._real.double()]  # below every layer, weight of the best path from each token
        for maps in layers:
            self._add(maps)

    def paths(self, target: int, count: int) -> Iterator[AttentionPath]:
        """Yield the ``count`` strongest paths from ``target``."""
        layers = len(self._layers)
        waiting = [_Partial(-float(self._best[layers][target]), 0, 1.0, (target,), ())]
        age, left = 1, count
        while waiting and left:
            partial = heapq.heappop(waiting)
            if len(partial.heads) == layers:
                left -= 1
                yield AttentionPath(partial.tokens, partial.heads, partial.weight)
                continue
            for further in self._steps(partial, count, age):
                heapq.heappush(waiting, further)
                age += 1

    def _add(self, maps: Tensor) -> None:
        """Take in the next layer: the best way on from a token is its best step to where the best way goes on."""
        below, real = self._best[-1], self._real
        pairs = both_real(real)
        strongest = wide(maps).amax(dim=0).double().where(pairs, 0.0)  # of all heads, (tokens, tokens)
        total = wide(maps).mean(dim=0).double().where(pairs, 0.0).sum(dim=-1)
        total = total * (1.0 - self._residual) + self._residual
        scale = 1.0 / total.where(total > 0, 1.0) if self._normalise else torch.ones_like(total)
        self._stays.append(scale * self._residual)
        self._scales.append(scale * (1.0 - self._residual) / len(maps))
        attended = (strongest * below).amax(dim=-1) * self._scales[-1]
        self._best.append(torch.maximum(attended, self._stays[-1] * below) * real)

    def _steps(self, partial: _Partial, count: int, age: int) -> Iterator[_Partial]:
        """Yield the ``count`` best next steps; no worse one can be part of the ``count`` best paths."""
        layer, token = len(self._layers) - 1 - len(partial.heads), partial.tokens[-1]
        rows = wide(self._layers[layer][:, token]).double().where(self._real, 0.0)  # (heads, keys)
        rows = rows * self._scales[layer][token]
        weights = torch.cat([self._stays[layer][token, None], rows.flatten()])
        ends = torch.cat([self._best[layer][token, None], self._best[layer].repeat(len(rows))])
        best = (weights * ends).sort(descending=True, stable=True).indices[:count]
        keys = rows.shape[-1]
        found = zip(best.tolist(), weights[best].tolist(), ends[best].tolist(), strict=True)
        for number, (step, weight, end) in enumerate(found):
            whole = partial.weight * weight
            if whole * end > 0:
                head, key = (None, token) if step == 0 else divmod(step - 1, keys)
                yield _Partial(-whole * end, age + number, whole, (*partial.tokens, key), (*partial.heads, head))

"""Who answers a question to a call: a fused kernel, the matrix that the model made, or a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from attn_callbacks.capture.answers import CallSummary, RowStatistic
from attn_callbacks.capture.exact import chosen, distribution, one_pass, received
from attn_callbacks.capture.exact.problem import Problem, cached_heads, cut, in_parts
from attn_callbacks.capture.exact.reading import with_separated_bias
from attn_callbacks.capture.plain import PlainRows
from attn_callbacks.capture.pooling import pooled_weights, received_from_rows
from attn_callbacks.capture.posed import Posed, parts_of
from attn_callbacks.capture.rows import row_chunks
from attn_callbacks.capture.scores import softmax_rows, wide
from attn_callbacks.functional.rows import stratified_rows

__all__ = ["Asking"]

_OF_PLAIN = (PlainRows.entropy, PlainRows.confidence, PlainRows.max_logit, PlainRows.logsumexp)
_ROWS = 64  # of the sample that stands in where no identity holds


class Asking(Posed):
    """The part of a call that finds who answers."""

    def _known_mean(self, mean: RowStatistic | None) -> tuple[Tensor, ...]:
        """Use a mean position that was asked for before, unless it is a sample's or lacks the graph of this call."""
        lacks_graph = (
            torch.is_grad_enabled() and self.requires_grad and mean is not None and not mean.values.requires_grad
        )
        return () if mean is None or not mean.is_exact or lacks_graph else (mean.values,)

    def _ask(
        self,
        exact: Callable[..., Tensor],
        plain: Callable[..., Tensor],
        *features: Tensor,
        uses_logsumexp: bool = True,
        keeps_half: bool = False,
    ) -> RowStatistic:
        """Ask the kernel, ``exact(problem, *features)``, or else rows of weights, ``plain(rows, *features)``."""
        with _undisturbed(self.device):
            problem = self._posed(uses_logsumexp, keeps_half)
            if problem is None:
                return self._ask_rows(lambda rows: plain(rows, *features))
            counted = self._counted(problem)

            def zeroed(part: Problem, own_counted: Tensor, *own: Tensor) -> Tensor:
                return _zeroed(exact(part, *own), own_counted)

            width = sum(own.shape[-1] for own in features)
            return _answer(parts_of(problem, zeroed, counted, *features, width=width), counted)

    def _ask_expectation(self, features: Tensor) -> RowStatistic:
        plain = PlainRows.expectation
        return self._ask(distribution.expectation, plain, features, uses_logsumexp=False, keeps_half=True)

    def _ask_entropy(self, features: Tensor) -> tuple[RowStatistic, RowStatistic]:
        with _undisturbed(self.device):
            problem = self._read(keeps_half=True)
            whole = None if problem is None else with_separated_bias(problem)
            if whole is None:
                entropy = self._ask_rows(lambda rows: rows.entropy())
                return entropy, self._ask_expectation(features)

            counted = self._counted(whole)

            def compute(part: Problem, batch: slice, heads: slice) -> tuple[Tensor, ...]:
                found = distribution.entropy_and_expectation(part, cut(features, batch, heads))
                own = cut(counted, batch, heads)
                return _zeroed(found[0], own), _zeroed(found[1], own), found[2]

            width = whole.query.shape[-1] + features.shape[-1]
            entropies, expected, logsumexp = in_parts(whole, width, compute)
            self._known()[whole.query.dtype] = logsumexp
            return _answer(entropies, counted), _answer(expected, counted)

    def _ask_all(self, features: Tensor) -> CallSummary:
        with _undisturbed(self.device):
            problem = self._posed(uses_logsumexp=False)
            if problem is None:
                entropy, confidence, top, lse = (self._ask_rows(ask) for ask in _OF_PLAIN)
                expected = self._ask_rows(lambda rows: rows.expectation(features))
                return CallSummary(entropy, confidence, top, lse, expected, self._received())
            counted = self._counted(problem)

            def compute(part: Problem, batch: slice, heads: slice) -> tuple[Tensor, ...]:
                own = cut(counted, batch, heads)
                *found, mean, mass = one_pass.survey(part, cut(features, batch, heads), own)
                return *found, _zeroed(mean, own), mass

            *found, mean, mass = in_parts(problem, features.shape[-1], compute, cached_heads(problem))
            self._known()[problem.query.dtype] = found[-1]
            entropy, confidence, top, lse = (_answer(_zeroed(values, counted), counted) for values in found)
            return CallSummary(entropy, confidence, top, lse, _answer(mean, counted), wide(mass))

    def _ask_keys(self, keys: Tensor, exists: Tensor) -> RowStatistic:
        """Ask for the weight of every query on ``keys (batch | 1, queries | 1, n)``, as far as they exist."""
        with _undisturbed(self.device):
            problem = self._posed(uses_logsumexp=True)
            if problem is None:
                return self._ask_rows(lambda rows: rows.key_mass(keys, exists), lambda rows: rows.may_see(keys, exists))

            def compute(part: Problem, batch: slice, heads: slice) -> tuple[Tensor, ...]:
                own, real = (cut(tensor[:, None], batch, heads)[:, 0] for tensor in (keys, exists))
                return chosen.mass_on_keys(part, own, real)

            values, sees = in_parts(problem, 0, compute)
            counted = self._counted(problem) & sees
            return _answer(_zeroed(values, counted), counted)

    def _choices(self) -> Tensor:
        problem = self._read(keeps_half=True)
        if problem is None:
            known = self.key_valid[:, None, None]
            chunks = row_chunks(self.shape, self.device)
            counts = [(self.allowed(rows) & known).sum(dim=-1).expand(-1, -1, len(rows)) for rows in chunks]
            return torch.cat(counts, dim=2)
        gone = torch.zeros_like(self.key_valid, dtype=problem.query.dtype).masked_fill(~self.key_valid, -torch.inf)
        bias = gone[:, None, None] if problem.key_bias is None else problem.key_bias + gone[:, None, None]
        return replace(problem, key_bias=bias).choices()

    def _received(self) -> Tensor:
        with _undisturbed(self.device):
            problem = self._posed(uses_logsumexp=True)
            if problem is None:
                return received_from_rows(self.weights, self.query_valid, self.shape)
            return wide(parts_of(problem, received.received_mass, self._counted(problem)))

    def _pooled(self, parts: tuple[int, int]) -> Tensor:
        with _undisturbed(self.device):
            problem = self._posed(uses_logsumexp=False, keeps_half=True)
            if problem is None:
                return pooled_weights(self.weights, self.query_valid, self.shape, parts)

            def pooled(part: Problem, counted: Tensor) -> Tensor:
                return received.bucketed_weights(part, counted, parts)

            return wide(parts_of(problem, pooled, self._counted(problem), width=parts[1]))

    def _ask_rows(
        self, plain: Callable[[PlainRows], Tensor], counts: Callable[[PlainRows], Tensor] | None = None
    ) -> RowStatistic:
        """Ask rows of weights: all of them where the matrix exists, else a stratified sample."""
        batch, _, queries, _ = self.shape
        sample, drawn = None, self.query_valid
        if self._has_matrix or queries <= _ROWS:
            chunks = [rows.expand(batch, -1) for rows in row_chunks(self.shape, self.device)]
        else:
            sample, drawn = stratified_rows(self.query_valid, _ROWS, torch.Generator().manual_seed(0))
            chunks = [sample]
        values, alive = [], []
        for rows in chunks:
            own = self._plain_rows(rows)
            values.append(plain(own))
            alive.append(own.alive() if counts is None else own.alive() & counts(own))
        counted = torch.cat(alive, dim=2) & drawn[:, None]
        return _answer(_zeroed(torch.cat(values, dim=2), counted), counted, sample)

    def _plain_rows(self, rows: Tensor) -> PlainRows:
        logits = self.logits(rows)
        weights = self.weights(rows) if logits is None else softmax_rows(logits)
        return PlainRows(weights, logits, self.allowed(rows), rows)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Compute in the precision of the tensors, and out of sight of a recorder that is listening."""
    with torch.autocast(device.type, enabled=False), torch._C.DisableTorchFunction():
        yield


def _zeroed(values: Tensor, counted: Tensor) -> Tensor:
    """Put zeros in rows that do not count; what kernels leave there may be anything."""
    return wide(values).where(counted if values.ndim == 3 else counted[..., None], 0.0)


def _answer(values: Tensor, counted: Tensor, rows: Tensor | None = None) -> RowStatistic:
    return RowStatistic(values, counted.expand(values.shape[:3]).clone(), rows)

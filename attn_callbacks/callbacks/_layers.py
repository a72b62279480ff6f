"""What callbacks ask of a recorded call: a name for it, its real tokens, and which rows to look at."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional import stratified_rows

__all__ = ["drawn_rows", "is_generation_step", "known_tokens", "maps_per_sample", "samples_of"]


def is_generation_step(call: AttentionCall) -> bool:
    """A decoder extends its text by one token; of hundreds of such calls none says anything about a layer."""
    return call.index > 0 and call.shape[2] == 1


def known_tokens(call: AttentionCall, valid: Tensor | None) -> AttentionCall:
    """Leave out padding that the batch knows of and the mask of the call does not show.

    Args:
        call: Any call.
        valid: ``(samples, tokens)`` from the batch; ignored where it cannot be about this call's tokens, as in a
            decoder behind an encoder.
    """
    batch, _, queries, keys = call.shape
    if valid is None or call.is_cross or call.is_decoder or queries != keys or valid.shape != (batch, queries):
        return call
    valid = valid.to(call.device)
    return call.with_valid(call.query_valid & valid, call.key_valid & valid)


def drawn_rows(call: AttentionCall, rows: int, generator: torch.Generator) -> tuple[Tensor | None, Tensor]:
    """Rows to look at ``(batch, rows)`` (``None``: all of them) and which of them are real."""
    if call.shape[2] <= rows:
        return None, call.query_valid
    return stratified_rows(call.query_valid, rows, generator)


def maps_per_sample(batch: int, samples: int | None) -> int:
    """Return how many attention maps each sample has: several in windows or crops, 0 if that cannot be told."""
    return batch // samples if samples and batch % samples == 0 else 0


def samples_of(values: Tensor, weight: Tensor, samples: int | None) -> tuple[Tensor, Tensor]:
    """Average windows or crops of one sample, so that a sample counts once.

    Args:
        values: ``(batch, ...)``, NaN where undefined.
        weight: ``(batch,)``
        samples: Samples in the batch.

    Returns:
        Values ``(samples, ...)`` and weights ``(samples,)``.
    """
    if maps_per_sample(len(values), samples) < 2:
        return values, weight
    return values.unflatten(0, (samples, -1)).nanmean(dim=1), weight.unflatten(0, (samples, -1)).sum(dim=1)

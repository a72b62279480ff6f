"""Work on blocks of queries one after the other, in the memory of one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["in_blocks"]


def in_blocks(
    queries: int, step: int, compute: Callable[[int, int], tuple[Tensor, ...]], keeps_graph: bool
) -> tuple[Tensor, ...]:
    """Join what ``compute(start, stop)`` gives for blocks of queries, ``(batch, heads, stop - start, ...)`` each.

    With a graph every block is computed again in the backward: else all of them would be kept for it.
    """
    ends = [(start, min(start + step, queries)) for start in range(0, queries, step)]
    if len(ends) < 2:
        return compute(0, queries)
    if keeps_graph:
        parts = [checkpoint(compute, *end, use_reentrant=False, preserve_rng_state=False) for end in ends]
        return tuple(torch.cat(blocks, dim=2) for blocks in zip(*parts, strict=True))
    wholes: list[Tensor] = []
    for start, stop in ends:
        blocks = compute(start, stop)
        if not wholes:  # filled block by block: small results between large temporary ones would scatter the heap
            wholes = [block.new_empty(*block.shape[:2], queries, *block.shape[3:]) for block in blocks]
        for whole, block in zip(wholes, blocks, strict=True):
            whole[:, :, start:stop] = block
    return tuple(wholes)

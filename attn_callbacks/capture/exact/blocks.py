"""Work on blocks of queries one after the other, in the memory of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["in_blocks"]


def in_blocks(
    queries: int,
    step: int,
    compute: Callable[[int, int], tuple[Tensor, ...]],
    keeps_graph: bool,
    read: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """Join what ``compute(start, stop)`` gives for blocks of queries, ``(batch, heads, stop - start, ...)`` each.

    With a graph every block is computed again in the backward: else all of them would be kept for it.

    Raises:
        RuntimeError: In the backward, if one of the tensors that ``compute`` has ``read`` was changed in place since.
    """
    ends = [(start, min(start + step, queries)) for start in range(0, queries, step)]
    if len(ends) < 2:
        return compute(0, queries)
    if keeps_graph:
        again = _unless_changed(compute, [tensor for tensor in read if not tensor.is_inference()])
        parts = [checkpoint(again, *end, use_reentrant=False, preserve_rng_state=False) for end in ends]
        return tuple(torch.cat(blocks, dim=2) for blocks in zip(*parts, strict=True))
    wholes: list[Tensor] = []
    for start, stop in ends:
        blocks = compute(start, stop)
        if not wholes:  # filled block by block: small results between large temporary ones would scatter the heap
            wholes = [block.new_empty(*block.shape[:2], queries, *block.shape[3:]) for block in blocks]
        for whole, block in zip(wholes, blocks, strict=True):
            whole[:, :, start:stop] = block
    return tuple(wholes)


def _unless_changed(
    compute: Callable[[int, int], tuple[Tensor, ...]], read: Sequence[Tensor]
) -> Callable[[int, int], tuple[Tensor, ...]]:
    versions = [tensor._version for tensor in read]

    def again(start: int, stop: int) -> tuple[Tensor, ...]:
        if [tensor._version for tensor in read] != versions:
            raise RuntimeError(
                "Queries, keys or the mask of an attention call were changed in place after a statistic of it was "
                "computed and before its backward. Change a copy, or run the backward before."
            )
        return compute(start, stop)

    return again

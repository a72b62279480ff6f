"""What the processes of a distributed run tell one another."""

from __future__ import annotations

from typing import Any

from torch import distributed as dist

__all__ = ["are_connected", "from_all_processes"]


def are_connected(processes: int) -> bool:
    """Tell whether this run has several processes that can be asked.

    A run on one device may live in a process group of somebody else, who would not answer.

    Args:
        processes: How many processes the run has.
    """
    return processes > 1 and dist.is_available() and dist.is_initialized()


def from_all_processes(share: Any, *, is_distributed: bool) -> list[Any]:
    """Return what each process holds, in their order. Every process must call it.

    Args:
        share: What this one holds; anything that can be pickled.
        is_distributed: There are others.
    """
    if not is_distributed:
        return [share]
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    return shares

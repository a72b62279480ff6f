"""Sums over the processes of a distributed run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["process_count", "sum_over_processes"]


def process_count(process_group: ProcessGroup | None = None) -> int:
    """Return the number of processes; one where no process group was initialised, or this process is not in it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return max(distributed.get_world_size(process_group), 1)  # torch says -1 to a process that is not in the group


@torch.no_grad()
def sum_over_processes(tensor: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """Return the sum of ``tensor`` over all processes, detached; every process has to call it.

    Args:
        tensor: Same shape and dtype in every process.
        process_group: Processes to add up; ``None`` means all of them.

    Shape:
        - tensor: any
        - output: the shape of ``tensor``
    """
    total = tensor.detach().clone()
    if process_count(process_group) > 1:
        distributed.all_reduce(total, group=process_group)
    return total

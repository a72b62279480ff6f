"""Peak memory of the tensors that a call makes, counted and not sampled; and an allocator that keeps its pages."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["keep_freed_pages", "peak_bytes"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most bytes of tensors alive at once during ``run()``, not counting those that were there before.

    What a kernel needs inside itself is not seen.
    """
    meter = _Meter()
    with meter:
        run()
    return meter.peak


def keep_freed_pages() -> None:
    """Let the C library keep the memory that tensors free.

    Else it gives large blocks back at random, and the page faults of taking them again, which can double a time, hit
    one side of a comparison or the other. Only glibc can be told; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD) if mallopt is not None else ():
            mallopt(option, 2**30)


class _Meter(TorchDispatchMode):
    """Keeps a list of the storages that operations returned, and drops those that are gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return output

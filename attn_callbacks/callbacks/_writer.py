"""A thread that draws and writes pictures while training goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from attn_callbacks.callbacks._guard import Guard

__all__ = ["MOST_BYTES", "MOST_JOBS", "THREAD_NAME", "BackgroundWriter"]

MOST_JOBS = 64
MOST_BYTES = 64 * 2**20
THREAD_NAME = "attn_callbacks-writer"

Result = TypeVar("Result")


class BackgroundWriter:
    """Run jobs one after the other in a thread of their own; how many may wait, and what those hold, is bounded.

    The thread starts with the first job and ends in :meth:`close`, which waits for all of them. What goes wrong in a
    job is told by the thread that hands in the next one, or closes. A job gets copies (numpy arrays) and leaves torch
    alone, whose modes and random generators belong to the thread that trains. What a job returned is not counted any
    more: it lives as long as somebody keeps its future.

    Args:
        guard: Keeps in what goes wrong.

    Example:
        >>> writer = BackgroundWriter(Guard("Example"))
        >>> drawn = writer.submit(lambda: "a picture")
        >>> drawn.result()
        'a picture'
        >>> writer.close()
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[Future[object], int]] = deque()
        self._held = 0

    @property
    def off(self) -> bool:
        """Something went wrong, which was told."""
        return self._guard.off

    def submit(self, job: Callable[[], Result], size: int = 0) -> Future[Result]:
        """Hand in a job. Waits for older ones while too much is waiting.

        Args:
            job: What is to be done. It may ask for the results of jobs handed in before.
            size: Bytes that the job holds until it is done.
        """
        while self._waiting and (self._waiting[0][0].done() or self._is_full(size)):
            self._await_oldest()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, THREAD_NAME)
        future = self._pool.submit(job)
        self._waiting.append((future, size))  # type: ignore[arg-type]  # only waited for
        self._held += size
        return future

    def close(self) -> None:
        """Wait until everything is done and end the thread; a second time is harmless."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None  # not before: an interrupt while waiting closes again
        while self._waiting:
            self._await_oldest()

    def _is_full(self, size: int) -> bool:
        return len(self._waiting) >= MOST_JOBS or self._held + size > MOST_BYTES

    def _await_oldest(self) -> None:
        future, size = self._waiting[0]
        with suppress(Exception):  # told below, once the job is out of the queue: `close` would go round for ever
            future.exception()  # waits; an interrupt leaves the job in the queue
        self._waiting.popleft()
        self._held -= size
        with self._guard.block():
            future.result()

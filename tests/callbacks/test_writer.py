"""The thread that draws: order, bounds, failures, and that none is left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from attn_callbacks.callbacks import _writer
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._host import to_host
from attn_callbacks.callbacks._writer import BackgroundWriter


def writer_threads() -> list[str]:
    """Threads of writers that live."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(_writer.THREAD_NAME)]


@pytest.fixture
def writer() -> Iterator[BackgroundWriter]:
    writer = BackgroundWriter(Guard("It"))
    yield writer
    writer.close()


def test_jobs_run_one_after_the_other_in_a_thread_of_their_own(writer: BackgroundWriter) -> None:
    done: list[tuple[int, int]] = []
    for number in range(20):
        writer.submit(lambda number=number: done.append((number, threading.get_ident())))
    writer.close()
    assert [number for number, _ in done] == list(range(20))
    assert len({thread for _, thread in done} | {threading.get_ident()}) == 2


def test_a_job_may_ask_for_the_results_of_older_ones(writer: BackgroundWriter) -> None:
    first = writer.submit(lambda: 1)
    assert writer.submit(lambda: first.result() + 1).result(timeout=5) == 2


def test_no_thread_before_the_first_job_nor_after_closing(writer: BackgroundWriter) -> None:
    assert writer_threads() == []
    for _ in range(2):  # it may be used again
        writer.submit(lambda: None)
        assert len(writer_threads()) == 1
        writer.close()
        writer.close()
        assert writer_threads() == []


def test_closing_waits_for_everything(writer: BackgroundWriter) -> None:
    done: list[int] = []
    for number in range(3):
        writer.submit(lambda number=number: (time.sleep(0.03), done.append(number)))
    writer.close()
    assert done == [0, 1, 2]


def test_a_failure_is_told_once_and_by_the_thread_that_trains(
    writer: BackgroundWriter, recwarn: pytest.WarningsRecorder
) -> None:
    go = threading.Event()

    def fail() -> None:
        go.wait(5)
        raise OSError("No space left on device")

    failed, good = writer.submit(fail), writer.submit(lambda: "fine")
    go.set()
    assert isinstance(failed.exception(timeout=5), OSError)
    assert good.result(timeout=5) == "fine"
    assert not writer.off
    writer.submit(fail)
    assert writer.off
    writer.close()
    (warning,) = recwarn
    assert str(warning.message) == "It is switched off for the rest of this run. OSError: No space left on device"


@pytest.mark.parametrize(("limit", "value", "size"), [("MOST_JOBS", 2, 0), ("MOST_BYTES", 25, 10)])
def test_a_full_queue_makes_the_main_thread_wait(
    limit: str, value: int, size: int, writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_writer, limit, value)
    go, handed_in = threading.Event(), []

    def train() -> None:
        for number in range(3):
            writer.submit(go.wait, size)
            handed_in.append(number)

    trainer = threading.Thread(target=train)
    trainer.start()
    time.sleep(0.1)
    before = list(handed_in)
    go.set()
    trainer.join(timeout=5)
    assert before == [0, 1]  # a third would be one too many
    assert handed_in == [0, 1, 2]


def test_a_drained_queue_takes_jobs_without_waiting(writer: BackgroundWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_writer, "MOST_BYTES", 25)
    for _ in range(3):
        writer.submit(lambda: None, 20).result(timeout=5)
    go = threading.Event()
    trainer = threading.Thread(target=lambda: [writer.submit(lambda: go.wait(5), 10) for _ in range(2)])
    trainer.start()
    trainer.join(timeout=1)
    waits = trainer.is_alive()
    go.set()
    trainer.join(timeout=5)
    assert not waits


def test_a_job_that_cannot_be_waited_for_does_not_hold_up_closing(writer: BackgroundWriter) -> None:
    writer.submit(lambda: None, 10).result(timeout=5)
    cancelled: Future[object] = Future()
    cancelled.cancel()
    writer._waiting.append((cancelled, 5))
    writer._held += 5
    with pytest.warns(UserWarning, match="It is switched off.*CancelledError"):
        writer.close()
    assert (len(writer._waiting), writer._held) == (0, 0)


def test_a_job_larger_than_all_bounds_is_taken_alone(writer: BackgroundWriter) -> None:
    jobs = [writer.submit(lambda: None, 10 * _writer.MOST_BYTES) for _ in range(3)]
    assert [job.result(timeout=5) for job in jobs] == [None] * 3


def test_an_interrupt_while_closing_loses_nothing(writer: BackgroundWriter) -> None:
    go, done = threading.Event(), []
    writer.submit(lambda: (go.wait(5), done.append(True)))

    def interrupt(*_: Any) -> None:
        go.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            writer.close()
    finally:
        signal.signal(signal.SIGALRM, before)
    writer.close()  # as `on_exception` does
    assert done == [True]
    assert writer_threads() == []


def test_copies_are_made_at_once_and_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or copy(tensor))
    given = [torch.rand(2, 3), torch.tensor([True, False]), torch.rand(4, dtype=torch.float64), torch.arange(3)]
    made = to_host(given)
    assert len(copies) == 1
    for own, original in zip(made, given, strict=True):
        assert own.dtype == original.dtype
        assert torch.equal(own, original)
        original.zero_()
        assert own.any()
    assert to_host([]) == []

"""Alignments of several processes: what each saw, under its own layers, is what one would have seen."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from attn_callbacks.callbacks import _alignment_sums
from attn_callbacks.callbacks._alignment_sums import AlignmentSums
from attn_callbacks.metrics.alignment import AlignmentMetric, AlignmentResult

HEADS = {"first": 2, "second": 3}
SHARES: tuple[dict[str, tuple[int, ...]], ...] = ({"first": (0, 1)}, {"second": (2,), "first": (3,)})
"""Of two processes: the batches of each layer."""
CPU = torch.device("cpu")


def add(sums: AlignmentSums, share: dict[str, tuple[int, ...]]) -> None:
    for layer, seeds in share.items():
        for seed in seeds:
            source = torch.Generator().manual_seed(seed)
            weights = torch.rand(4, HEADS[layer], 5, 6, generator=source).softmax(dim=-1)
            sums.add(layer, weights, sure=torch.rand(4, 5, 6, generator=source) < 0.3)


def whole() -> AlignmentResult:
    sums = AlignmentSums()
    for share in SHARES:
        add(sums, share)
    result = sums.conclude(CPU, failure=None)
    assert result is not None
    return result


def close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, equal_nan=True)


def test_layers_of_other_sizes_stand_side_by_side() -> None:
    result = whole()
    assert result.layer_names == ("first", "second")
    assert result.mean.shape[:2] == (2, 3)
    assert result.mean[0, 2].isnan().all()
    assert result.samples[:, 0, 0].tolist() == [12, 4]


def test_a_conclusion_starts_anew() -> None:
    sums = AlignmentSums()
    assert sums.conclude(CPU, failure=None) is None
    for _ in range(2):
        add(sums, SHARES[0])
        result = sums.conclude(CPU, failure=None)
        assert result is not None
        assert result.samples.max() == 8


def test_a_failure_is_one_of_all() -> None:
    with pytest.raises(RuntimeError, match=r"could not measure all of its data\. why"):
        AlignmentSums().conclude(CPU, failure="why")


@pytest.mark.parametrize("fails", ["copy", "reset"])
def test_a_copy_that_fails_is_told_to_the_others(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_args: Any) -> Any:
        raise OSError("no memory")

    told: list[Any] = []

    def exchange(share: Any, *, is_distributed: bool) -> list[Any]:
        told.append(share)
        return [(None, {}), share]

    monkeypatch.setattr(_alignment_sums, "from_all_processes", exchange)
    sums = AlignmentSums()
    add(sums, SHARES[0])
    if fails == "copy":
        monkeypatch.setattr(_alignment_sums, "to_host", failing)
    else:
        monkeypatch.setattr(AlignmentMetric, "reset", failing)
    with pytest.raises(RuntimeError, match=r"could not measure all of its data\. OSError: no memory"):
        sums.conclude(CPU, failure=None)
    assert told == [("OSError: no memory", {})]  # once


def _process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=len(SHARES))
    sums = AlignmentSums(processes=len(SHARES))
    add(sums, SHARES[rank])
    result = sums.conclude(CPU, failure=None)
    assert result is not None
    try:
        sums.conclude(CPU, failure="why" if rank == 1 else None)
    except RuntimeError as error:
        torch.save((tuple(result[:3]), result.layer_names, str(error)), Path(folder) / str(rank))
    distributed.destroy_process_group()


@pytest.mark.ddp
def test_every_process_finds_what_one_would(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=len(SHARES))
    expected = whole()
    for rank in range(len(SHARES)):
        fields, names, error = torch.load(tmp_path / str(rank))
        close(fields, expected[:3])
        assert names == expected.layer_names
        assert "could not measure all of its data. why" in error  # also where nothing went wrong

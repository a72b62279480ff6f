"""The samples that HeadRoles keeps: told from others by every bit, within their memory, copied once a validation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from attn_callbacks.callbacks import _host, _roles_copies, _roles_memory
from attn_callbacks.callbacks._roles_batch import RowMaps
from attn_callbacks.callbacks._roles_copies import bits_to_host, sample_marks
from attn_callbacks.callbacks._roles_memory import HeadMemory
from attn_callbacks.callbacks.head_roles import HeadRoles
from attn_callbacks.functional.head_distance import head_distance
from tests.callbacks.models import Classifier, Texts, fit, loader, quiet_trainer


def maps(batch: int, heads: int = 2, keys: int = 6, seed: int = 0) -> RowMaps:
    weights = torch.rand(batch, heads, keys, keys, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    flags = torch.ones(batch, keys, dtype=torch.bool)
    return RowMaps(weights, None, torch.ones(1, 1, 1, 1, dtype=torch.bool), flags, flags, True)


def look(memory: HeadMemory, inputs: Tensor | None, own: RowMaps, size: int | None = None) -> dict[str, Tensor]:
    memory.begin()
    memory.see(len(own.weights) if size is None else size, inputs)
    memory.take("layer", own)
    return memory.drift()


# --- samples are told from others --------------------------------------------------------------------------------

IDS = torch.tensor([[5, 7, 9], [1, 2, 3]])
NANS = torch.tensor([[1.0, math.nan], [math.nan, 2.0]])


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (IDS, IDS[:, [1, 0, 2]]),  # the same tokens in another order
        (IDS, IDS.flip(0)),
        (IDS.double(), IDS.double()[:, [2, 1, 0]]),  # the lower half of their bits is zero
        (IDS.half(), IDS.half()[:, [2, 1, 0]]),
        (IDS > 4, (IDS > 4).flip(0)),
        (torch.arange(2), torch.arange(2).flip(0)),  # one number a sample
        (NANS, NANS.flip(1)),
    ],
)
def test_another_order_is_noticed(before: Tensor, now: Tensor) -> None:
    memory = HeadMemory(2)
    look(memory, before, maps(2))
    assert look(memory, before.clone(), maps(2, seed=1))["layer"].min() > 0
    assert not memory.shuffled
    assert look(memory, now, maps(2, seed=2)) == {}  # no drift between samples that are not the same
    assert memory.shuffled
    look(memory, now, maps(2))
    assert not memory.shuffled


def test_marks_of_samples_hardly_ever_meet() -> None:
    inputs = torch.randint(0, 3, (4000, 6), generator=torch.Generator().manual_seed(0))
    different = len(inputs.unique(dim=0))
    for dtype in (torch.long, torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.complex64):
        assert len(sample_marks(inputs.to(dtype)).unique()) == different
    assert torch.equal(sample_marks(inputs), sample_marks(inputs.T.contiguous().T))


class Permuted(Texts):
    """Gives the tokens of each sample in another order each time: their sums agree."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        found = super().__getitem__(index)
        return {**found, "input_ids": found["input_ids"][torch.randperm(len(found["input_ids"]))]}


def test_permuted_tokens_have_no_drift(tmp_path: Path) -> None:
    roles = HeadRoles(clusters=False)
    with pytest.warns(UserWarning, match="knows no drift"):
        fit(Classifier(), quiet_trainer(tmp_path, [roles], max_epochs=2), loader(8), DataLoader(Permuted(8), 8))
    assert roles.drift is not None
    assert roles.drift.isnan().all()


# --- memory ------------------------------------------------------------------------------------------------------


def kept(memory: HeadMemory) -> list[tuple[int, ...]]:
    return [tuple(each.weights.shape) for each in memory._old.values()]


@pytest.mark.parametrize(("rows", "expected"), [(17, 2), (16, 2), (15, 1), (7, 0), (0, 0)])
def test_a_layer_never_takes_more(rows: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight samples: two rows of each fit, one, of seven samples, none."""
    monkeypatch.setattr(_roles_memory, "LAYER_BYTES", rows * 4 * 2 * 6)
    memory = HeadMemory(8)
    look(memory, None, maps(8))
    assert kept(memory) == ([(8, 2, expected, 6)] if expected else [(7, 2, 1, 6)] if rows else [])


def test_batches_share_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_roles_memory, "LAYER_BYTES", 5 * 4 * 2 * 6)
    memory = HeadMemory(8)
    for _ in range(3):
        memory.see(3, None)
        memory.take("layer", maps(3))
    memory.drift()
    assert kept(memory) == [(3, 2, 1, 6), (2, 2, 1, 6)]


def test_no_room_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    monkeypatch.setattr(_roles_memory, "LAYER_BYTES", 0)
    roles = HeadRoles()
    with pytest.warns(UserWarning, match="The clusters of `HeadRoles` is switched off.*No sample was kept"):
        fit(Classifier(), quiet_trainer(tmp_path, [roles], max_epochs=2), loader(8), loader(8))
    assert roles.drift is not None
    assert roles.drift.isnan().all()
    assert len(roles.timeline) == 2


def test_more_samples_than_usual_are_kept() -> None:
    memory = HeadMemory(100)
    look(memory, None, maps(120, keys=3))
    assert kept(memory) == [(100, 2, 3, 3)]


def test_windows_of_samples_are_limited() -> None:
    memory = HeadMemory(8)
    look(memory, None, maps(8 * 16, keys=3), size=8)
    assert kept(memory) == [(64, 2, 3, 3)]


def test_distances_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, own = HeadMemory(2), maps(2, heads=3)
    look(memory, None, own)
    torch.testing.assert_close(memory.distances(torch.device("cpu"))[0], head_distance(own.weights))
    monkeypatch.setattr(_roles_memory, "_MOST_TERMS", 4 * 2 * 2 * 6)  # two of the six rows
    torch.testing.assert_close(memory.distances(torch.device("cpu"))[0], head_distance(own.weights[:, :, ::3]))


# --- copies ------------------------------------------------------------------------------------------------------


def test_one_copy_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(_roles_copies, "to_host", lambda tensors: calls.append(len(tensors)) or _host.to_host(tensors))
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: pytest.fail("a copy of its own") if not calls else tensor)
    memory = HeadMemory(4)
    for seed in range(2):
        memory.begin()
        memory.see(4, IDS)
        for layer in ("one", "two", "three"):
            memory.take(layer, maps(4, seed=seed))
        assert len(calls) == seed
        moved = memory.drift()
    assert len(calls) == 2
    assert set(moved) == {"one", "two", "three"}


def test_what_waits_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_roles_memory, "_WAITING_BYTES", 1)
    memory = HeadMemory(4)
    memory.see(4, IDS)
    memory.take("layer", maps(4))
    assert not memory._waiting
    assert torch.equal(memory._new["layer", 0].weights, maps(4).weights)


def test_what_waits_holds_nothing_of_its_batch() -> None:
    memory, own = HeadMemory(2), maps(16)
    memory.see(16, None)
    memory.take("layer", own)
    waiting = memory._waiting["layer", 0]
    assert waiting.weights.untyped_storage().nbytes() == own.weights[:2].numel() * 4


def test_copies_keep_every_bit() -> None:
    with torch.inference_mode():
        given = [IDS * 2**61, IDS > 4, NANS, torch.empty(0, 3), torch.tensor(2.5).half(), IDS.double() / 3]
    copies = bits_to_host(given)
    for each, copy in zip(given, copies, strict=True):
        torch.testing.assert_close(copy, each, rtol=0, atol=0, equal_nan=True)
        assert copy.dtype == each.dtype
        assert not copy.is_inference()
    assert bits_to_host([]) == []

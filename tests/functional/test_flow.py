"""Flow against cuts, by brute force over all of them, and against networkx."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_callbacks.functional.flow import attention_flow
from attn_callbacks.functional.rollout import attention_rollout
from tests.functional.test_rollout import CAUSAL, random_maps

pytest.importorskip("scipy")


def capacities(maps: list[Tensor], sample: int) -> list[np.ndarray]:
    """Mixing of each layer, which rollout of a single layer gives."""
    return [attention_rollout([own[sample : sample + 1].double()])[0].numpy() for own in maps]


def smallest_cut(layers: list[np.ndarray], target: int, source: int) -> float:
    """The least capacity of all cuts between a target of the last layer and an input."""
    tokens = layers[0].shape[0]
    inner = list(itertools.product(range(1, len(layers)), range(tokens)))
    best = np.inf
    for chosen in itertools.product([False, True], repeat=len(inner)):
        above = {place for place, side in zip(inner, chosen, strict=True) if side} | {(len(layers), target)}
        cut = 0.0
        for layer, mixed in enumerate(layers):
            for i, j in itertools.product(range(tokens), repeat=2):
                cut += mixed[i, j] * (
                    (layer + 1, i) in above and (layer, j) not in above and (layer > 0 or j == source)
                )
        best = min(best, cut)
    return best


def test_one_layer_is_the_capacity_itself() -> None:
    maps = random_maps(1)
    found = attention_flow(maps)
    torch.testing.assert_close(found, attention_rollout([maps[0].double()]), rtol=0, atol=1e-8)


def test_two_causal_layers_by_hand() -> None:
    """From 1 to 0: straight down and then over, 1/8, and over and then straight down, 1/8."""
    found = attention_flow([CAUSAL, CAUSAL])
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.0], [0.25, 0.875]]], dtype=torch.float64))


def test_equals_the_smallest_of_all_cuts() -> None:
    maps = random_maps(3, batch=1, tokens=3, seed=4)
    layers = capacities(maps, 0)
    expected = [[smallest_cut(layers, target, source) for source in range(3)] for target in range(3)]
    np.testing.assert_allclose(attention_flow(maps)[0], expected, atol=1e-7)


def test_equals_networkx() -> None:
    networkx = pytest.importorskip("networkx")
    maps = random_maps(4, batch=2, tokens=6, seed=2)
    found = attention_flow(maps, targets=[0, 5])
    for sample in range(2):
        graph = networkx.DiGraph()
        for layer, mixed in enumerate(capacities(maps, sample)):
            for i, j in itertools.product(range(6), repeat=2):
                graph.add_edge((layer + 1, i), (layer, j), capacity=float(mixed[i, j]))
        for place, target in enumerate((0, 5)):
            for source in range(6):
                expected = networkx.maximum_flow_value(graph, (4, target), (0, source))
                assert found[sample, place, source].item() == pytest.approx(expected, abs=1e-7)


def test_never_exceeds_the_cut_at_either_end() -> None:
    maps = random_maps(5, tokens=5, seed=8)
    found = attention_flow(maps)
    for sample in range(2):
        layers = capacities(maps, sample)
        out, into = layers[-1].sum(1), layers[0].sum(0)
        assert (found[sample].numpy() <= np.minimum(out[:, None], into[None]) + 1e-7).all()
    assert (found <= 1 + 1e-7).all()


def test_padding_neither_gives_nor_receives() -> None:
    maps, valid = random_maps(), torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    found = attention_flow(maps, valid=valid)
    alone = attention_flow([own[:1, :, :4, :4] for own in maps])
    torch.testing.assert_close(found[0, :4, :4], alone[0], rtol=0, atol=1e-7)
    assert not found[0, 4:].any()
    assert not found[0, :, 4:].any()


def test_a_batch_is_its_samples_one_by_one() -> None:
    maps = random_maps(tokens=4)
    whole = attention_flow(maps)
    for sample in range(2):
        assert torch.equal(whole[sample : sample + 1], attention_flow([own[sample : sample + 1] for own in maps]))


def test_targets_of_every_sample() -> None:
    maps = random_maps(2, tokens=4)
    whole = attention_flow(maps)
    found = attention_flow(maps, targets=torch.tensor([[3], [1]]))
    assert torch.equal(found[:, 0], torch.stack([whole[0, 3], whole[1, 1]]))


def test_merged_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="merge, drop or window"):
        attention_flow([torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)])


def test_scipy_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"needs scipy.*attn-callbacks\[analysis\]"):
        attention_flow([CAUSAL])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_no_flow_of_nothing(value: float) -> None:
    maps = random_maps(2)
    maps[1][0, 0, 2, 1] = value
    with pytest.raises(ValueError, match=r"`weights\[1\]` must be finite between valid tokens"):
        attention_flow(maps)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 2] = False
    assert attention_flow(maps, valid=valid, targets=[0]).isfinite().all()

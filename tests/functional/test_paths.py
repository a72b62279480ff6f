"""Paths against all paths there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from attn_callbacks.functional.paths import AttentionPath, top_paths
from attn_callbacks.functional.relevance import attention_relevance
from attn_callbacks.functional.rollout import attention_rollout, gradient_rollout, gradient_weights
from tests.functional.test_rollout import CAUSAL, random_gradients, random_maps

Steps = tuple[tuple[int, ...], tuple[int | None, ...]]


def all_paths(
    maps: list[Tensor], target: int, length: int, residual: float = 0.5, normalise: bool = True
) -> dict[Steps, float]:
    """Weight of every path of the first sample, found by trying all of them."""
    found: dict[Steps, float] = {}
    steps = [[(None, 0), *itertools.product(range(own.shape[1]), range(length))] for own in reversed(maps)]
    for ways in itertools.product(*steps):
        tokens, heads, weight = [target], [], 1.0
        for own, (head, key) in zip(reversed(maps), ways, strict=True):
            row = own[0, :, tokens[-1], :length].double()
            total = float((1 - residual) * row.sum() / len(row) + residual) if normalise else 1.0
            step = residual if head is None else (1 - residual) / len(row) * float(row[head, key])
            weight *= step / total
            tokens.append(tokens[-1] if head is None else key)
            heads.append(head)
        if weight > 0:
            found[tuple(tokens), tuple(heads)] = weight
    return found


@pytest.mark.parametrize("count", [1, 5, 60, 10_000])
@pytest.mark.parametrize("residual", [0.0, 0.2, 0.5])
def test_equals_the_best_of_all_paths(count: int, residual: float) -> None:
    maps = random_maps(3, batch=1, heads=2, tokens=3, seed=11)
    every = all_paths(maps, 1, 3, residual)
    (found,) = top_paths(maps, 1, count=count, residual=residual)
    expected = sorted(every.values(), reverse=True)[:count]
    assert len(found) == len(expected)
    assert [path.weight for path in found] == pytest.approx(expected)
    assert len({(path.tokens, path.heads) for path in found}) == len(found)
    for path in found:
        assert path.weight == pytest.approx(every[path.tokens, path.heads])


@pytest.mark.parametrize("factor", [0.1, 20.0])
def test_weights_above_one_are_searched_exactly_too(factor: float) -> None:
    maps = [factor * own * own for own in random_maps(3, batch=1, heads=2, tokens=3, seed=12)]
    expected = sorted(all_paths(maps, 0, 3, normalise=False).values(), reverse=True)[:9]
    (found,) = top_paths(maps, 0, count=9, normalise=False)
    assert [path.weight for path in found] == pytest.approx(expected)


def test_all_paths_may_part_at_the_first_step() -> None:
    maps = random_maps(1, batch=1, heads=2, tokens=3)
    assert [path.weight for path in top_paths(maps, 1, count=7)[0]] == pytest.approx(
        sorted(all_paths(maps, 1, 3).values(), reverse=True)
    )


def test_all_paths_add_up_to_rollout() -> None:
    maps = random_maps(2, batch=1, heads=2, tokens=4, seed=3)
    (found,) = top_paths(maps, 2, count=10_000)
    into = torch.zeros(4, dtype=torch.float64)
    for path in found:
        into[path.source] += path.weight
    torch.testing.assert_close(into.float(), attention_rollout(maps)[0, 2])


def test_with_gradients_they_add_up_to_gradient_rollout_and_relevance() -> None:
    maps = random_maps(2, batch=1, heads=2, tokens=4, seed=3)
    gradients = random_gradients(maps)
    weighted = gradient_weights(maps, gradients)
    for expected, normalise, factor in (
        (gradient_rollout(maps, gradients), True, 1),
        (attention_relevance(maps, gradients), False, 4),
    ):
        into = torch.zeros(4, dtype=torch.float64)
        for path in top_paths(weighted, 2, count=10_000, normalise=normalise)[0]:
            into[path.source] += factor * path.weight
        torch.testing.assert_close(into.float(), expected[0, 2])


def test_causal_layers_by_hand() -> None:
    (found,) = top_paths([CAUSAL, CAUSAL], 1, count=100)
    assert found[0] == AttentionPath((1, 1, 1), (None, None), 0.25)
    assert {path.weight for path in found[1:3]} == {0.1875}
    assert sum(path.weight for path in found) == pytest.approx(1.0)
    assert sum(path.weight for path in found if path.source == 0) == pytest.approx(0.234375)
    assert top_paths([CAUSAL, CAUSAL], 0, count=9)[0][0].tokens == (0, 0, 0)  # nothing else can be seen


def test_a_planted_path_is_found() -> None:
    """Head 2 of the last layer looks from token 4 to 1, and head 0 of the first from 1 to 3."""
    maps = [torch.full((1, 3, 5, 5), 0.2) for _ in range(2)]
    maps[1][0, 2, 4] = torch.eye(5)[1]
    maps[0][0, 0, 1] = torch.eye(5)[3]
    (found,) = top_paths(maps, 4, count=1, residual=0.0)
    assert (found[0].tokens, found[0].heads) == ((4, 1, 3), (2, 0))
    assert found[0].weight == pytest.approx(1 / 9)
    assert found[0].to_dict() == {"tokens": [4, 1, 3], "heads": [2, 0], "weight": found[0].weight}


def test_equal_paths_come_in_a_fixed_order() -> None:
    maps = [torch.full((1, 2, 3, 3), 1 / 3)] * 2
    found = [top_paths(maps, 0, count=7)[0] for _ in range(2)]
    assert found[0] == found[1]


def test_padding_is_on_no_path() -> None:
    maps, valid = random_maps(2, heads=2), torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    found = top_paths(maps, 1, count=400, valid=valid)
    alone = top_paths([own[:1, :, :4, :4] for own in maps], 1, count=400)
    assert [(path.tokens, path.heads) for path in found[0]] == [(path.tokens, path.heads) for path in alone[0]]
    assert [path.weight for path in found[0]] == pytest.approx([path.weight for path in alone[0]])
    assert top_paths(maps, 5, valid=valid)[0] == ()
    assert top_paths(maps, 5, valid=valid)[1]


def test_every_sample_may_have_a_target_of_its_own() -> None:
    maps = random_maps(2)
    both = top_paths(maps, torch.tensor([0, 3]), count=4)
    assert both[0] == top_paths([own[:1] for own in maps], 0, count=4)[0]
    assert both[1] == top_paths([own[1:] for own in maps], 3, count=4)[0]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (2, {}, "`target` must lie between 0 and 1, got 2"),
        (-1, {}, "got -1"),
        ([0, 1], {}, "with 1 samples"),
        (0, {"count": 0}, "`count` must be at least 1"),
        (0, {"residual": -0.1}, "`residual` must lie between"),
    ],
)
def test_other_arguments_are_refused(target: int | list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_paths([CAUSAL], target, **options)

"""Role scores against loops in float64, closed forms, and heads of which the role is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_callbacks.functional import roles as module
from attn_callbacks.functional.roles import ROLES, head_roles
from tests.functional.reference import random_case
from tests.functional.role_reference import NAMES, Sample, reference_roles

GENERATOR = np.random.default_rng


def as_arrays(scores) -> np.ndarray:
    """All fields ``(fields, batch, heads, roles)``."""
    return np.stack([field.numpy() for field in scores])


def expected_scores(weights, allowed, positions, valid, key_valid, **known) -> np.ndarray:
    """The same from the loops; ``known`` holds arrays ``(batch, keys)`` and numbers."""
    batch, heads = weights.shape[:2]
    output = np.full((3, batch, heads, len(NAMES)), np.nan)
    for b, h in np.ndindex(batch, heads):
        own = {name: list(value[b]) if isinstance(value, np.ndarray) else value for name, value in known.items()}
        wanted = valid[b, h] if valid.ndim == 3 else valid[b]
        places = (list(map(int, positions[b])), list(map(bool, wanted)), list(map(bool, key_valid[b])))
        found = reference_roles(Sample(weights[b, h], allowed[b, h], *places, **own))
        output[:, b, h] = np.array([found[name] for name in NAMES]).T
    return output


def text(batch: int = 3, tokens: int = 13, seed: int = 1) -> dict[str, np.ndarray]:
    draw = GENERATOR(seed)
    special = np.zeros((batch, tokens), dtype=bool)
    special[:, 0] = True
    special[1, 6] = True
    separator = draw.random((batch, tokens)) < 0.2
    return {"tokens": draw.integers(5, size=(batch, tokens)), "special": special, "separator": separator}


def tensors(arrays: dict[str, object]) -> dict[str, object]:
    return {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in arrays.items()}


def test_names_are_those_of_the_reference() -> None:
    assert ROLES == NAMES


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("known", [{}, {"long_range": 3, "window": 1}])
def test_random_text_matches_loops(padding, causal, known) -> None:
    weights, _, positions, allowed, valid, key_valid = random_case(padding, causal, tokens=13)
    known = {**text(), **known}
    found = head_roles(
        torch.tensor(weights),
        allowed=torch.tensor(allowed[:, :1]),
        valid=torch.tensor(valid),
        key_valid=torch.tensor(key_valid),
        **tensors(known),
    )
    assert all(field.dtype == torch.float32 for field in found)
    np.testing.assert_allclose(
        as_arrays(found), expected_scores(weights, allowed, positions, valid, key_valid, **known), atol=2e-6
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_random_image_matches_loops(prefix, causal) -> None:
    grid = (3, 4, prefix)
    weights, _, positions, allowed, valid, key_valid = random_case("", causal, tokens=12 + prefix)
    found = head_roles(torch.tensor(weights), grid=grid, window=2, allowed=torch.tensor(allowed[:1, :1]))
    expected = expected_scores(weights, allowed, positions, valid, key_valid, grid=grid, window=2)
    np.testing.assert_allclose(as_arrays(found), expected, atol=2e-6)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_sampled_rows_match_loops_over_those_rows(one_by_one) -> None:
    weights, _, _, allowed, valid, key_valid = random_case("right", causal=True, tokens=13)
    positions = np.array([[0, 3, 1, 4], [2, 0, 0, 1], [1, 2, 4, 9]])
    at = positions[:, None, :, None]
    weights, allowed = np.take_along_axis(weights, at, axis=2), np.take_along_axis(allowed, at, axis=2).copy()
    if one_by_one:
        allowed[:, 1, :, 2] = False  # heads differ
        weights = np.where(allowed, weights, 0)
    valid = np.take_along_axis(valid, positions, axis=1)
    known = {**text(), "segments": GENERATOR(5).integers(2, size=(3, 13))}
    found = head_roles(
        torch.tensor(weights),
        positions=torch.tensor(positions),
        allowed=torch.tensor(allowed) if one_by_one else torch.tensor(allowed[:, :1]),
        valid=torch.tensor(valid),
        key_valid=torch.tensor(key_valid),
        **tensors(known),
    )
    expected = expected_scores(weights, allowed, positions, valid, key_valid, **known)
    np.testing.assert_allclose(as_arrays(found), expected, atol=2e-6)


def test_rows_may_differ_between_heads() -> None:
    weights, _, positions, allowed, _, key_valid = random_case("", causal=False, tokens=9)
    valid = GENERATOR(3).random((3, 2, 9)) < 0.5
    found = head_roles(torch.tensor(weights), valid=torch.tensor(valid))
    expected = expected_scores(weights, allowed, positions, valid, key_valid)
    np.testing.assert_allclose(as_arrays(found), expected, atol=2e-6)


@pytest.mark.parametrize("padding", ["", "right"])
def test_parts_give_what_the_whole_gives(padding, monkeypatch) -> None:
    weights, _, _, allowed, valid, key_valid = random_case(padding, causal=False, batch=5, tokens=13)
    arguments = {"weights": weights, "allowed": allowed[:, :1], "valid": valid, "key_valid": key_valid}
    arguments = tensors({**arguments, **text(batch=5)})
    whole = head_roles(**arguments)
    monkeypatch.setattr(module, "_BUDGET", 2 * 8 * 13 * 13)  # two samples at a time
    torch.testing.assert_close(tuple(head_roles(**arguments)), tuple(whole), equal_nan=True)


def test_padding_changes_nothing() -> None:
    weights, _, _, allowed, _, _ = random_case("", causal=True, tokens=13)
    known = tensors(text())
    plain = head_roles(torch.tensor(weights), allowed=torch.tensor(allowed[:1, :1]), **known)
    for sides in ((3, 0), (0, 3)):
        grown = torch.nn.functional.pad(torch.tensor(weights), sides * 2)
        start = sides[0]
        grown[:, :, [0, 1, 2] if start else [13, 14, 15]] = 1 / 16  # queries of padding attend to anything
        valid = torch.nn.functional.pad(torch.ones(3, 13, dtype=torch.bool), sides)
        mask = torch.nn.functional.pad(torch.tensor(allowed[:1, :1]), sides * 2)
        wider = {name: torch.nn.functional.pad(values, sides, value=1) for name, values in known.items()}
        found = head_roles(grown, allowed=mask, valid=valid, key_valid=valid, **wider)
        names = [k for k, name in enumerate(ROLES) if name != "block" or not start]  # padding ended segments
        for padded, bare in zip(found, plain, strict=True):
            torch.testing.assert_close(padded[..., names], bare[..., names], equal_nan=True)


@pytest.mark.parametrize("causal", [False, True])
def test_valid_tokens_are_valid_keys_of_self_attention(causal: bool) -> None:
    weights, _, _, _, valid, key_valid = random_case("left", causal, tokens=9)
    weights, valid, key_valid = map(torch.tensor, (weights, valid, key_valid))
    allowed = torch.ones(9, 9).tril() if causal else None
    torch.testing.assert_close(
        tuple(head_roles(weights, allowed=allowed, valid=valid)),
        tuple(head_roles(weights, allowed=allowed, valid=valid, key_valid=key_valid)),
        equal_nan=True,
    )


def test_no_sample_gives_no_score() -> None:
    assert head_roles(torch.ones(0, 2, 5, 5)).score.shape == (0, 2, len(ROLES))


def test_cross_attention_has_the_roles_of_keys_only() -> None:
    weights = torch.rand(2, 3, 4, 7).softmax(dim=-1)
    marks = torch.arange(7).expand(2, 7) == 6
    found = head_roles(weights, torch.ones(2, 7, dtype=torch.long), special=marks, separator=marks, square=False)
    defined = {name for name, score in zip(ROLES, found.score[0, 0], strict=True) if not score.isnan()}
    assert defined == {"sink", "special", "separator", "vertical", "uniform"}


def test_sample_without_a_token_is_nan_and_leaves_the_others() -> None:
    weights = torch.full((2, 1, 5, 5), 0.2)
    valid = torch.tensor([[False] * 5, [True] * 5])
    found = head_roles(weights, valid=valid)
    assert found.score[0].isnan().all()
    assert (found.coverage[0] == 0).all()
    torch.testing.assert_close(
        tuple(field[1:] for field in found), tuple(head_roles(weights[1:])), equal_nan=True, rtol=0, atol=0
    )


def test_rows_without_any_attention_do_not_count() -> None:
    weights, known = torch.rand(2, 2, 13, 13).softmax(dim=-1), tensors(text(batch=2))
    weights[:, :, 4] = 0.0
    valid = torch.arange(13).expand(2, 13) != 4
    keys = torch.ones(2, 13, dtype=torch.bool)
    expected = head_roles(weights, valid=valid, key_valid=keys, **known)
    torch.testing.assert_close(tuple(head_roles(weights, **known)), tuple(expected), equal_nan=True)


def test_half_precision_is_read_in_float32() -> None:
    weights = torch.rand(2, 2, 8, 8).softmax(dim=-1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = head_roles(weights)
    assert half.score.dtype == torch.float32
    torch.testing.assert_close(tuple(half), tuple(head_roles(weights.float())), equal_nan=True, rtol=0, atol=0)


def test_arguments_stay_as_they_are_and_nothing_carries_a_graph() -> None:
    weights = torch.rand(2, 2, 9, 9).softmax(dim=-1).requires_grad_()
    given = {"weights": weights, **tensors(text(batch=2, tokens=9)), "valid": torch.arange(9).expand(2, 9) < 8}
    before = {name: value.detach().clone() for name, value in given.items()}
    assert not head_roles(**given).score.requires_grad
    for name, value in given.items():
        assert torch.equal(value, before[name]), name


def test_no_value_is_read() -> None:
    known = {name: value.to("meta") for name, value in tensors(text()).items()}
    flags = torch.ones(3, 13, dtype=torch.bool, device="meta")
    found = head_roles(torch.ones(3, 2, 13, 13, device="meta"), valid=flags, **known)
    assert found.score.shape == (3, 2, len(ROLES))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": torch.ones(2, 3, 3)}, "`weights` must have 4 axes"),
        ({"tokens": torch.ones(2, 4)}, r"`tokens` must have shape \(batch, keys\) = \(2, 6\), got \(2, 4\)"),
        ({"special": torch.ones(6)}, r"`special` must have shape \(batch, keys\) = \(2, 6\), got \(6,\)"),
        ({"grid": (2, 3, 1)}, r"`grid` must cover the 6 keys as prefix \+ rows \* columns, got 1 \+ 2 \* 3 = 7"),
        ({"grid": (2, 3)}, r"`grid` must be \(rows, columns, prefix\), got \(2, 3\)"),
        ({"grid": (0, 3, 6)}, "`grid` must be at least 1, got 0"),
        ({"window": -1}, "`window` must be at least 0, got -1"),
        ({"long_range": 0.0}, "`long_range` must be above 0"),
        ({"weights": torch.ones(2, 1, 3, 6)}, "`positions` must say which query each row is"),
        ({"positions": torch.tensor([0, 1, 2, 3, 4, 6])}, "`positions` must lie between 0 and 5, got 6"),
        ({"positions": torch.tensor([[0, 1, 2, 3, 4, -1]] * 2)}, "`positions` must lie between 0 and 5, got -1"),
        ({"positions": torch.arange(6.0)}, r"`positions` must be positions \(integers\), got torch.float32"),
    ],
)
def test_wrong_argument_raises(arguments: dict[str, object], message: str) -> None:
    weights: Tensor = torch.full((2, 1, 6, 6), 1 / 6)
    with pytest.raises(ValueError, match=message):
        head_roles(**{"weights": weights, **arguments})

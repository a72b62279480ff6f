"""Head statistics against loops in float64, closed forms and a fixture computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attn_callbacks.functional import STATISTICS, head_statistics
from tests.functional.reference import NAMES, as_tensors, named, random_case, reference_statistics

POSITIONAL = ("distance", "long_range_mass", "self_mass", "previous_mass", "next_mass")


def test_names_are_those_of_the_reference():
    assert STATISTICS == NAMES


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("long_range", [0.25, 2])
def test_statistics_random_attention_match_loops(padding, causal, long_range):
    case = random_case(padding, causal)
    weights, logits, positions, allowed, valid, key_valid = as_tensors(*case)
    result = head_statistics(
        weights,
        logits,
        positions=positions,
        allowed=allowed,
        valid=valid,
        key_valid=key_valid,
        long_range=long_range,
    )
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), reference_statistics(*case, long_range=long_range), atol=2e-6)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_statistics_padding_is_read_from_allowed(padding):
    case = random_case(padding, causal=False)
    weights, logits, _, allowed, valid, _ = as_tensors(*case)
    result = head_statistics(weights, logits, allowed=allowed[:, :1, :1], valid=valid)
    np.testing.assert_allclose(result.numpy(), reference_statistics(*case), atol=2e-6)


def test_statistics_sampled_rows_match_loops_over_those_rows():
    weights, logits, _, allowed, valid, key_valid = random_case("right", causal=True, tokens=9)
    rows = np.array([[0, 3, 1], [2, 0, 0], [1, 2, 4]])
    taken = np.take_along_axis(valid, rows, axis=1) & np.array([[True] * 3, [True, True, False], [True] * 3])
    at = rows[:, None, :, None]
    case = (
        np.take_along_axis(weights, at, axis=2),
        np.take_along_axis(logits, at, axis=2),
        rows,
        np.take_along_axis(allowed, at, axis=2),
        taken,
        key_valid,
    )
    tensors = as_tensors(*case)
    result = head_statistics(
        tensors[0], tensors[1], positions=tensors[2], allowed=tensors[3], valid=tensors[4], key_valid=tensors[5]
    )
    np.testing.assert_allclose(result.numpy(), reference_statistics(*case), atol=2e-6)


def test_statistics_rows_shared_by_all_samples_equal_rows_of_each_sample():
    weights = torch.rand(2, 3, 3, 6).softmax(dim=-1)
    shared = torch.tensor([5, 0, 2])
    assert torch.equal(
        head_statistics(weights, positions=shared).nan_to_num(-1.0),
        head_statistics(weights, positions=shared.repeat(2, 1)).nan_to_num(-1.0),
    )


@pytest.mark.parametrize("tokens", [2, 5, 12])
def test_statistics_uniform_attention_has_its_closed_form(tokens):
    found = named(head_statistics(torch.full((1, 1, tokens, tokens), 1 / tokens)))
    expected = {
        "entropy": math.log(tokens),
        "entropy_normalised": 1.0,
        "confidence": 1 / tokens,
        "distance": (tokens**2 - 1) / (3 * tokens),
        "self_mass": 1 / tokens,
        "previous_mass": 1 / tokens,
        "next_mass": 1 / tokens,
        "first_mass": 1 / tokens,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert math.isnan(found["max_logit"])


@pytest.mark.parametrize("tokens", [2, 12])
def test_statistics_uniform_causal_attention_has_its_closed_form(tokens):
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    found = named(head_statistics((allowed / allowed.sum(-1, keepdim=True))[None, None], allowed=allowed))
    harmonic = sum(1 / k for k in range(1, tokens + 1))
    expected = {
        "entropy": math.lgamma(tokens + 1) / tokens,
        "entropy_normalised": 1.0,
        "confidence": harmonic / tokens,
        "distance": (tokens - 1) / 4,
        "previous_mass": (harmonic - 1) / (tokens - 1),
        "first_mass": harmonic / tokens,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert math.isnan(found["next_mass"])  # no row may attend to the key after it


@pytest.mark.parametrize(("causal", "expected"), [(False, 0.5625), (True, 0.4034)])
@pytest.mark.parametrize("tokens", [200, 400])
def test_statistics_long_range_mass_of_uniform_attention_is_the_same_at_every_length(tokens, causal, expected):
    allowed = torch.ones(tokens, tokens, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    found = named(head_statistics((allowed / allowed.sum(-1, keepdim=True))[None, None], allowed=allowed))
    assert found["long_range_mass"] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("offset", "name"), [(0, "self_mass"), (-1, "previous_mass"), (1, "next_mass")])
def test_statistics_one_hot_attention_is_found_by_its_offset(offset, name):
    tokens = 6
    weights = torch.zeros(1, 1, tokens, tokens)
    for i in range(tokens):
        weights[0, 0, i, min(max(i + offset, 0), tokens - 1)] = 1.0
    found = named(head_statistics(weights))
    assert found[name] == 1.0
    assert found["entropy"] == found["entropy_normalised"] == 0.0
    assert found["confidence"] == 1.0
    assert found["distance"] == pytest.approx(abs(offset) * (tokens - 1) / tokens)
    for other in {"self_mass", "previous_mass", "next_mass"} - {name}:
        assert found[other] < 0.5


def test_statistics_hand_computed_fixture():
    weights = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    logits = torch.tensor([[[[2.0, 9.0], [-1.0, 0.5]]]])
    found = named(head_statistics(weights, logits, allowed=torch.tensor([[True, False], [True, True]])))
    expected = {
        "entropy": 0.5623 / 2,
        "entropy_normalised": 0.8113,
        "confidence": 0.875,
        "distance": 0.125,
        "long_range_mass": 0.125,  # a quarter of two tokens: one step is farther
        "self_mass": 0.875,
        "previous_mass": 0.25,
        "first_mass": 0.625,
        "max_logit": 2.0,  # 9 is not allowed
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_statistics_left_padding_gives_the_values_without_padding():
    allowed = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    logits = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).masked_fill(~allowed, -torch.inf)
    plain = head_statistics(logits.softmax(dim=-1), logits, allowed=allowed)
    pad = (3, 0, 3, 0)
    padded_weights = torch.nn.functional.pad(logits.softmax(dim=-1), pad)
    padded_allowed = torch.nn.functional.pad(allowed, pad, value=False)
    padded = head_statistics(padded_weights, torch.nn.functional.pad(logits, pad, value=50.0), allowed=padded_allowed)
    torch.testing.assert_close(padded, plain, equal_nan=True)


def test_statistics_first_key_under_a_sliding_window_comes_from_key_valid():
    index = torch.arange(6)
    allowed = (index[:, None] - index).abs() <= 1
    weights = (allowed / allowed.sum(-1, keepdim=True))[None, None, 3:]
    rows = {"positions": index[3:], "allowed": allowed[3:]}
    without = named(head_statistics(weights, **rows))
    with_keys = named(head_statistics(weights, key_valid=torch.ones(1, 6, dtype=torch.bool), **rows))
    assert without["first_mass"] == pytest.approx(1 / 3)  # the first key that these rows can see
    assert math.isnan(with_keys["first_mass"])  # none of them sees key 0


def test_statistics_cross_attention_has_no_positions():
    found = named(head_statistics(torch.full((1, 1, 2, 5), 0.2), square=False))
    assert all(math.isnan(found[name]) for name in POSITIONAL)
    assert found["entropy"] == pytest.approx(math.log(5))
    assert found["first_mass"] == pytest.approx(0.2)


def test_statistics_rows_per_head_may_differ():
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]).repeat(1, 2, 1, 1)
    valid = torch.tensor([[[True, False], [False, True]]])
    entropy = head_statistics(weights, valid=valid)[0, :, STATISTICS.index("entropy")]
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(2)]))


def test_statistics_sample_without_a_valid_row_is_nan_and_leaves_the_others():
    weights = torch.full((2, 1, 3, 3), 1 / 3)
    weights[0] = 0.0
    values = head_statistics(weights, torch.zeros(2, 1, 3, 3))
    assert values[0].isnan().all()
    assert not values[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_half_precision_is_read_in_float32(dtype):
    weights = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)).softmax(dim=-1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = head_statistics(weights, weights)
    assert half.dtype == torch.float32
    assert torch.equal(half, head_statistics(weights.float(), weights.float()))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_statistics_do_not_depend_on_the_default_precision(default):
    weights, logits, _, allowed, valid, _ = (tensor.float() for tensor in as_tensors(*random_case("left", causal=True)))
    plain = head_statistics(weights, logits, allowed=allowed, valid=valid)
    torch.set_default_dtype(default)
    try:
        found = head_statistics(weights, logits, allowed=allowed, valid=valid)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)


def test_statistics_carry_no_graph():
    weights = torch.rand(1, 1, 3, 3).softmax(dim=-1).requires_grad_()
    assert not head_statistics(weights, weights).requires_grad


def test_statistics_row_with_weight_but_no_allowed_key_does_not_count():
    allowed = torch.tensor([[True, True], [False, False]])
    found = named(head_statistics(torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]), allowed=allowed))
    assert (found["entropy"], found["confidence"]) == pytest.approx((math.log(2), 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": torch.ones(2, 3, 3)}, r"`weights` must have 4 axes, got shape \(2, 3, 3\)"),
        ({"logits": torch.ones(1, 1, 2, 2)}, r"`logits` must have the shape of `weights` \(2, 1, 3, 3\)"),
        ({"positions": torch.arange(4)}, r"`positions` must have shape \(rows,\) = \(3,\)"),
        ({"weights": torch.ones(2, 1, 2, 3)}, r"`positions` must say which query .* 2 rows meet 3 keys.*square=False"),
        ({"allowed": torch.ones(4, 4)}, r"`allowed` must be broadcastable to `weights` \(2, 1, 3, 3\), got \(4, 4\)"),
        ({"valid": torch.ones(3)}, r"`valid` must have shape \(batch, rows\) = \(2, 3\) or"),
        ({"key_valid": torch.ones(3)}, r"`key_valid` must have shape \(batch, keys\) = \(2, 3\), got \(3,\)"),
        ({"long_range": 0}, "`long_range` must be above 0, got 0"),
        ({"long_range": math.nan}, "`long_range` must be above 0, got nan"),
    ],
)
def test_statistics_wrong_argument_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        head_statistics(**{"weights": torch.full((2, 1, 3, 3), 1 / 3), **arguments})

"""Statistics of some rows of a call, against loops over single numbers in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attn_callbacks.capture import AttentionCall
from attn_callbacks.capture.sampled import sampled_head_statistics
from attn_callbacks.capture.scores import softmax_rows
from attn_callbacks.functional import STATISTICS, head_statistics, stratified_rows
from tests.capture.cases import BATCH, CASES, HEADS, INDEX, LEFT, TOKENS, Case
from tests.functional import reference

ROWS = {"all": None, "drawn": 4, "shared": torch.tensor([7, 0, 3])}


def expected(case: Case, rows: np.ndarray, drawn: np.ndarray, long_range: float) -> np.ndarray:
    """Loops over the drawn rows of the whole matrix."""
    call, shape = case.call, case.call.shape
    allowed = np.broadcast_to(case.allowed, shape)
    at = rows[:, None, :, None]
    allowed, scores = (np.take_along_axis(np.broadcast_to(full, shape), at, axis=2) for full in (allowed, case.scores))
    finite = allowed & np.isfinite(scores)
    attends = finite.any(axis=(1, 3)) & drawn
    values = reference.reference_statistics(
        reference.softmax_rows(scores, finite),
        scores,
        rows,
        allowed,
        attends,
        np.broadcast_to(case.allowed, shape).any(axis=(1, 2)),
        long_range,
    )
    if call.is_cross or shape[2] != shape[3]:
        names = ("distance", "long_range_mass", "self_mass", "previous_mass", "next_mass")
        values[..., [STATISTICS.index(name) for name in names]] = math.nan
    if call.recorded is not None:
        values[..., STATISTICS.index("max_logit")] = math.nan
    return values


def draw(case: Case, kind: str) -> tuple[Tensor | None, Tensor | None, np.ndarray, np.ndarray]:
    """Rows and which of them count, as given to the function and as full arrays."""
    wanted, valid = ROWS[kind], case.call.query_valid
    if wanted is None:
        return None, valid, np.broadcast_to(INDEX, (BATCH, TOKENS)), valid.numpy()
    if isinstance(wanted, Tensor):
        return wanted, None, np.broadcast_to(wanted.numpy(), (BATCH, 3)), np.ones((BATCH, 3), dtype=bool)
    rows, drawn = stratified_rows(valid, wanted, torch.Generator().manual_seed(0))
    return rows, drawn, rows.numpy(), drawn.numpy()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", CASES)
def test_sampled_statistics_equal_loops(name: str, kind: str) -> None:
    case = CASES[name]()
    rows, drawn, *full = draw(case, kind)
    found = sampled_head_statistics(case.call, rows, drawn)
    assert found.shape == (BATCH, HEADS, len(STATISTICS))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected(case, *full, long_range=0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("long_range", [0.5, 2])
def test_sampled_statistics_pass_the_long_range_on(long_range: float) -> None:
    case = CASES["boolean padding"]()
    rows, drawn, *full = draw(case, "drawn")
    found = sampled_head_statistics(case.call, rows, drawn, long_range)
    np.testing.assert_allclose(found.numpy(), expected(case, *full, long_range=long_range), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_sampled_statistics_equal_those_of_the_weights(name: str) -> None:
    call = CASES[name]().call
    rows, drawn = stratified_rows(call.query_valid, 5, torch.Generator().manual_seed(1))
    logits = call.logits(rows)
    of_weights = head_statistics(
        call.weights(rows) if logits is None else softmax_rows(logits),
        logits,
        positions=rows,
        allowed=call.allowed(rows),
        valid=drawn,
        key_valid=call.key_valid,
        square=not call.is_cross and call.shape[2] == call.shape[3],
    )
    found = sampled_head_statistics(call, rows, drawn)
    torch.testing.assert_close(found, of_weights, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["plain", "bfloat16", "scores", "recorded", "flex"])
def test_sampled_statistics_are_the_same_under_autocast(name: str) -> None:
    call = CASES[name]().call
    plain = sampled_head_statistics(call, None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sampled_head_statistics(call, None, None).nan_to_num(9.0), plain.nan_to_num(9.0))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "recorded, padding", "flex"])
def test_sampled_statistics_do_not_depend_on_the_default_precision(name: str, default: torch.dtype) -> None:
    call = CASES[name]().call
    plain = sampled_head_statistics(call, None, None)
    torch.set_default_dtype(default)
    try:
        found = sampled_head_statistics(call, None, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.nan_to_num(9.0), plain.nan_to_num(9.0))
    assert found.dtype == torch.float32


def test_sampled_statistics_know_the_tokens_that_the_caller_knows() -> None:
    """Padding at the left that no mask shows: no row, no first token, and a shorter sequence for what is far away."""
    valid = torch.tensor(LEFT[:, 0, 0])
    call = CASES["plain"]().call.with_valid(valid, valid)
    found = sampled_head_statistics(call, None, call.query_valid)
    weights = call.weights()[1, :, 3:]  # of the six real tokens of the second sample, to all keys
    far = torch.tensor(np.abs(INDEX[3:, None] - INDEX) > 0.25 * 6)
    expected = {"first_mass": weights[..., 3], "long_range_mass": (weights * far).sum(dim=-1)}
    for name, rows in expected.items():
        torch.testing.assert_close(found[1, :, STATISTICS.index(name)], rows.mean(dim=-1))


@pytest.mark.parametrize("name", ["plain", "learned bias, padding", "scores", "recorded"])
def test_sampled_statistics_leave_the_call_as_it_is_and_carry_no_graph(name: str) -> None:
    call = CASES[name]().call
    tensors = {field: getattr(call, field) for field in ("query", "key", "mask", "scores", "recorded")}
    before = {field: tensor.clone() for field, tensor in tensors.items() if tensor is not None}
    for field in before:
        if tensors[field].is_floating_point():
            tensors[field].requires_grad_()
    for rows in (None, torch.tensor([[0, 1], [3, 2]])):
        assert not sampled_head_statistics(call, rows, None).requires_grad
    assert all(torch.equal(tensors[field], tensor) for field, tensor in before.items())


def test_sampled_statistics_show_broken_logits() -> None:
    call = CASES["plain"]().call
    call.query[0, 1, 3, 2] = math.nan
    found = sampled_head_statistics(call, None, None)
    assert found[0, 1, STATISTICS.index("entropy")].isnan()
    assert not found[0, 0, STATISTICS.index("entropy")].isnan()


def test_sampled_statistics_build_nothing_of_the_whole_matrix() -> None:
    sizes = []

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            sizes.append(output.numel() if isinstance(output, Tensor) else 0)
            return output

    tokens = torch.randn(1, 2, 512, 8)
    call = AttentionCall("a", query=tokens, key=tokens, is_causal=True)
    rows, drawn = stratified_rows(call.query_valid, 16, torch.Generator())
    with Meter():
        sampled_head_statistics(call, rows, drawn)
    assert max(sizes) <= 2 * 16 * 512


def test_sampled_statistics_refuse_a_wrong_argument() -> None:
    call = CASES["plain"]().call
    with pytest.raises(ValueError, match="`long_range` must be above 0, got 0"):
        sampled_head_statistics(call, None, None, 0)
    with pytest.raises(ValueError, match=r"`valid` must have shape \(batch, rows\) = \(2, 9\)"):
        sampled_head_statistics(call, None, torch.ones(2, 4, dtype=torch.bool))

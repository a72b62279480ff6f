"""What holds for every function of attention maps: padding does not matter, nor does the precision of the model."""

from __future__ import annotations

import pytest
import torch

from tests.functional.every_function import CALLS, Inputs, assert_same, masked_functions

MASKED = [name for name, (_, excluded) in CALLS.items() if excluded is not None]


def test_every_function_with_a_mask_is_here() -> None:
    assert masked_functions() - {"target_share", "stratified_rows"} <= set(CALLS)  # which read nothing but masks


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 7.0])
@pytest.mark.parametrize("name", MASKED)
def test_whatever_stands_in_padding_changes_nothing(name: str, value: float) -> None:
    if name == "attention_flow":
        pytest.importorskip("scipy")
    call, excluded = CALLS[name]
    clean = Inputs.drawn()
    assert_same(call(clean.spoiled(excluded, value)), call(clean.spoiled(excluded, 0.0)), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_takes_no_digit(name: str) -> None:
    if name == "attention_flow":
        pytest.importorskip("scipy")
    call, _ = CALLS[name]
    given = Inputs.drawn()
    with torch.autocast("cpu", torch.bfloat16):
        found = call(given)
    assert_same(found, call(given), rtol=1e-6, atol=1e-7)

"""What is entered around a step: guards that keep errors in, and the outputs of a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._watch import QuietRecorder, forward_outputs


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4))

    def forward(self, x: Tensor) -> str:
        self.second(self.first(x))
        return "outer"


def test_only_outermost_outputs_are_collected() -> None:
    module, outputs = Outer(), []
    with forward_outputs(module, outputs):
        module(torch.zeros(1, 2))
        hidden = module.first(torch.zeros(1, 2))
        module.second(hidden)
        nn.Linear(2, 2)(torch.zeros(1, 2))  # nobody's
    assert outputs[0] == "outer"
    assert [tuple(output.shape) for output in outputs[1:]] == [(1, 3), (1, 4)]
    module(torch.zeros(1, 2))
    assert len(outputs) == 3


def test_outputs_are_collected_until_an_error() -> None:
    module, outputs = Outer(), []
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), forward_outputs(module, outputs):
        module(torch.zeros(1, 7))
    module.first(torch.zeros(1, 2))
    assert [output for output in outputs if output is not None] == []


def test_guard_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    guard = Guard("It")
    for _ in range(2):
        with guard.block():
            raise KeyError("`valid` reads 'mask'")
    assert guard.off
    (warning,) = recwarn
    assert str(warning.message) == "It is switched off for the rest of this run. KeyError: `valid` reads 'mask'"


def test_guard_lets_an_interrupt_through() -> None:
    guard = Guard("It")
    with pytest.raises(KeyboardInterrupt), guard.block():
        raise KeyboardInterrupt
    assert not guard.off


def test_recorder_keeps_the_errors_of_its_receiver_and_not_those_of_the_step() -> None:
    model, tokens, seen = nn.MultiheadAttention(4, 1, batch_first=True), torch.ones(1, 2, 4), []

    def receive(call: Any) -> None:
        seen.append(call.requires_grad and torch.is_grad_enabled())
        raise ValueError("broken")

    recorder = QuietRecorder(model, None, receive, Guard("It"))

    def step() -> None:
        with recorder.watch():
            model(tokens, tokens, tokens)
            model(tokens, tokens, tokens)

    with pytest.warns(UserWarning, match="It is switched off for the rest of this run. ValueError: broken"):
        step()
    assert seen == [False]
    with recorder.watch() as inert:
        assert inert is None
    with pytest.raises(ZeroDivisionError), QuietRecorder(model, None, seen.append, Guard("It")).watch():
        raise ZeroDivisionError

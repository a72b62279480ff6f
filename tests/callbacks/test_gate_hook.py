"""How long a hook holds the values that it needs: until their gradient came, or their graph is gone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from attn_callbacks.callbacks._gate_hook import meet_gradient
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.capture import AttentionCall, AttentionRecorder
from tests.callbacks.gating import FORMS, TARGETS, VALUES, Net


def met(net: Net, gates: list[Tensor]) -> tuple[Tensor, list[StorageWeakRef]]:
    """A loss whose backward adds to ``gates``, and what the hooks hold until then."""
    held: list[StorageWeakRef] = []

    def listen(call: AttentionCall) -> None:
        assert meet_gradient(call, gates.append, lambda: True, Guard("It"))
        assert call.output is not None
        held.append(StorageWeakRef(call.output.untyped_storage()))

    with AttentionRecorder(net, on_call=listen):
        loss = F.cross_entropy(net(VALUES), TARGETS)
    return loss, held


@pytest.mark.parametrize("form", FORMS)
def test_values_go_with_the_graph(form: str) -> None:
    loss, held = met(Net(form), [])
    assert [reference.expired() for reference in held] == [False, False]
    del loss  # no backward ever comes, and nothing is collected
    assert [reference.expired() for reference in held] == [True, True]


@pytest.mark.parametrize("form", FORMS)
def test_values_go_when_backward_has_used_them(form: str) -> None:
    gates: list[Tensor] = []
    loss, held = met(Net(form), gates)
    loss.backward(retain_graph=True)
    assert [reference.expired() for reference in held] == [False, False]
    loss.backward()
    assert [reference.expired() for reference in held] == [True, True]
    assert loss.grad_fn is not None
    first, second = gates[:2], gates[2:]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_values_stay_with_the_graph_where_torch_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    gates: list[Tensor] = []
    loss, held = met(Net("eager"), gates)
    loss.backward()
    assert len(gates) == 2
    assert [reference.expired() for reference in held] == [False, False]
    del loss
    assert [reference.expired() for reference in held] == [True, True]

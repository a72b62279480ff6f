from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.capture import AttentionCall, AttentionNotFoundError, AttentionRecorder
from tests.capture.reference import attention_rows, close

QUERY, KEY = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8)
VALUE = torch.randn(2, 4, 6, 8)
SCALE = 8**-0.5


class Function(nn.Module):
    """A module around any function."""

    def __init__(self, function: Callable[..., object], num_heads: int | None = None) -> None:
        super().__init__()
        self.function = function
        if num_heads is not None:
            self.num_heads = num_heads

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


def seen(function: Callable[..., Tensor], *inputs: Tensor, num_heads: int | None = None) -> AttentionCall:
    module = Function(function, num_heads)
    with torch.no_grad(), AttentionRecorder(module) as recorder:
        output = module(*inputs)
        assert torch.equal(output, function(*inputs))
    (call,) = (call for call in recorder.calls if call is recorder.calls[0])
    return call


def scores() -> Tensor:
    return QUERY @ KEY.mT * SCALE


WAYS = {
    "method": lambda: scores().softmax(-1) @ VALUE,
    "functional": lambda: F.softmax(scores(), dim=-1).matmul(VALUE),
    "torch": lambda: torch.matmul(torch.softmax(scores(), dim=3), VALUE),
    "special": lambda: torch.special.softmax(scores(), -1) @ VALUE,
    "module": lambda: nn.Softmax(dim=-1)(scores()) @ VALUE,
    "wider": lambda: F.softmax(scores(), dim=-1, dtype=torch.float64).float() @ VALUE,
    "cast back": lambda: F.softmax(scores(), dim=-1).type_as(VALUE).to(VALUE.dtype) @ VALUE,
    "dropout": lambda: F.dropout(scores().softmax(-1), 0.5, training=False) @ VALUE,
    "dropout module": lambda: nn.Dropout(0.1).eval()(scores().softmax(-1)) @ VALUE,
    "keywords": lambda: F.softmax(input=scores(), dim=-1) @ VALUE,
    "keyword": lambda: torch.matmul(input=scores().softmax(dim=-1), other=VALUE),
    "einsum": lambda: torch.einsum("bhqk,bhkd->bhqd", scores().softmax(-1), VALUE),
    "einsum, values first": lambda: torch.einsum("bhkd,bhqk->bqhd", VALUE, scores().softmax(-1)),
    "einsum, implicit": lambda: torch.einsum("abik, abkz", scores().softmax(-1), VALUE),
    "einsum, ellipsis": lambda: torch.einsum("...ij,...jd->...id", scores().softmax(-1), VALUE),
    "einsum, list": lambda: torch.einsum("bhij,bhjd->bhid", [scores().softmax(-1), VALUE]),
    "heads in the batch": lambda: torch.bmm(scores().softmax(-1).view(8, 5, 6), VALUE.flatten(0, 1)),
    "out of heads in the batch": lambda: torch.bmm(scores().flatten(0, 1).softmax(-1), VALUE.flatten(0, 1)),
    "copied": lambda: scores().softmax(-1).clone().contiguous() @ VALUE,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_softmax_and_product_are_attention(way: Callable[[], Tensor]) -> None:
    call = seen(way, num_heads=4)
    assert call.shape == (2, 4, 5, 6)
    assert call.scores is not None
    assert close(call.weights(), attention_rows(QUERY, KEY))


GATES = {
    "classifier": lambda: torch.randn(2, 10).softmax(-1) @ torch.randn(10, 4),
    "token classifier": lambda: torch.randn(2, 5, 10).softmax(-1),
    "label embeddings": lambda: torch.randn(2, 5, 10).softmax(-1) @ torch.randn(10, 4),
    "label embeddings, einsum": lambda: torch.einsum(
        "bnc,cd->bnd", torch.randn(2, 5, 10).softmax(-1), torch.randn(10, 4)
    ),
    "dense experts": lambda: torch.einsum("bne,bned->bnd", torch.randn(2, 5, 3).softmax(-1), torch.randn(2, 5, 3, 8)),
    "dense experts, other order": lambda: torch.einsum(
        "bned,bne->bnd", torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3).softmax(-1)
    ),
    "experts, unsqueezed": lambda: (torch.randn(2, 5, 3).softmax(-1).unsqueeze(-2) @ torch.randn(2, 5, 3, 8)).squeeze(
        -2
    ),
    "experts, indexed": lambda: torch.randn(2, 5, 3).softmax(-1)[:, :, None] @ torch.randn(2, 5, 3, 8),
    "expert weights": lambda: torch.einsum(
        "bne,bnd,edf->bnf", torch.randn(2, 5, 3).softmax(-1), torch.randn(2, 5, 8), torch.randn(3, 8, 4)
    ),
    "einsum of entries": lambda: torch.einsum("...,...->...", torch.randn(2, 5, 3).softmax(-1), torch.randn(2, 5, 3)),
    "router": lambda: torch.randn(2, 5, 3).softmax(-1).topk(2, dim=-1)[0].sum(-1),
    "weighted sum": lambda: (torch.randn(2, 5, 3).softmax(-1)[..., None] * torch.randn(2, 5, 3, 8)).sum(-2),
    "over another axis": lambda: torch.randn(2, 5, 6).softmax(1) @ torch.randn(2, 6, 8),
    "on the right": lambda: torch.randn(2, 7, 5) @ torch.randn(2, 5, 6).softmax(-1),
    "used up": lambda: torch.randn(2, 5, 6).softmax(-1).argmax(-1),
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gates_are_not_attention(gate: Callable[[], Tensor]) -> None:
    module = Function(gate)
    with pytest.raises(AttentionNotFoundError), AttentionRecorder(module):
        module()


def test_masks_in_the_scores_are_masks_of_the_call() -> None:
    mask = torch.ones(2, 1, 1, 6).bool()
    mask[1, ..., 4:] = False
    call = seen(lambda: scores().masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1) @ VALUE)
    assert torch.equal(call.key_valid, mask[:, 0, 0])
    assert close(call.weights(), attention_rows(QUERY, KEY, mask))


def test_a_virtual_key_that_is_cut_off_keeps_its_share() -> None:
    sink = torch.full((2, 4, 5, 1), 0.7)
    call = seen(lambda: F.dropout(torch.cat([scores(), sink], -1).softmax(-1)[..., :-1], 0.0) @ VALUE)
    expected = torch.cat([scores(), sink], -1).double().softmax(-1)[..., :-1]
    assert close(call.weights(), expected)
    assert (call.weights().sum(-1) < 1).all()


def test_three_axes_are_split_into_the_heads_the_module_names() -> None:
    flat = QUERY.flatten(0, 1) @ KEY.flatten(0, 1).mT * SCALE
    values = VALUE.flatten(0, 1)
    assert seen(lambda: flat.softmax(-1) @ values, num_heads=4).shape == (2, 4, 5, 6)
    assert seen(lambda: flat.softmax(-1) @ values, num_heads=3).shape == (8, 1, 5, 6)  # does not divide
    assert seen(lambda: flat.softmax(-1) @ values).shape == (8, 1, 5, 6)


def test_heads_are_also_found_around_a_helper_made_on_the_fly() -> None:
    def attend() -> Tensor:
        flat = QUERY.flatten(0, 1) @ KEY.flatten(0, 1).mT * SCALE
        return Function(lambda: flat.softmax(-1) @ VALUE.flatten(0, 1))()

    call = seen(attend, num_heads=4)
    assert call.name == "Function"
    assert close(call.weights(), attention_rows(QUERY, KEY))


def test_five_axes_fold_into_the_batch() -> None:
    query, key = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 4, 6, 8)
    call = seen(lambda: (query @ key.mT * SCALE).softmax(-1) @ key)
    assert close(call.weights(), attention_rows(query.flatten(0, 1), key.flatten(0, 1)))


def test_weights_used_twice_are_one_call() -> None:
    def twice() -> Tensor:
        weights = scores().softmax(-1)
        return weights @ VALUE + weights @ VALUE

    module = Function(twice)
    with AttentionRecorder(module) as recorder:
        module()
    assert len(recorder.calls) == 1


def test_two_attentions_that_interleave_are_both_seen() -> None:
    def interleaved() -> Tensor:
        first, second = scores().softmax(-1), (2 * scores()).softmax(-1)
        return first @ VALUE + second @ VALUE

    module = Function(interleaved)
    with AttentionRecorder(module) as recorder:
        module()
    assert close(recorder.calls[0].weights(), attention_rows(QUERY, KEY))
    assert close(recorder.calls[1].weights(), attention_rows(QUERY, KEY, scale=2 * SCALE))


def test_many_gates_do_not_pile_up() -> None:
    def route() -> Tensor:
        for _ in range(50):
            torch.randn(2, 5, 3).softmax(-1)
        return scores().softmax(-1) @ VALUE

    module = Function(route)
    with AttentionRecorder(module) as recorder:
        module()
        assert len(recorder._sites._softmax._waiting) <= 4
    assert len(recorder.calls) == 1


def test_gradients_flow_through_the_scores() -> None:
    query = QUERY.clone().requires_grad_()
    module = Function(lambda: (query @ KEY.mT * SCALE).softmax(-1) @ VALUE)
    with AttentionRecorder(module) as recorder:
        module()
    got = torch.autograd.grad(recorder.calls[0].weights()[..., 0].sum(), query)[0]
    expected = torch.autograd.grad((query @ KEY.mT * SCALE).softmax(-1)[..., 0].sum(), query)[0]
    assert torch.allclose(got, expected, atol=1e-7)

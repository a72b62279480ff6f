"""What holds for every attention, over random shapes and masks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_callbacks.capture import AttentionCall
from tests.capture.exact.cases import attention, chance, noise
from tests.capture.exact.questions import QUESTIONS, TOLERANCE, error
from tests.capture.exact.reference import Reference

MASKS = ("none", "keys", "pairs", "heads", "triangle and keys", "key bias", "bias", "float keys")
often = settings(max_examples=25, derandomize=True, deadline=None)


def masked(kind: str, batch: int, heads: int, length: int, seed: int) -> torch.Tensor | None:
    keep = chance(batch, 1, 1, length, share=0.7, seed=seed)
    return {
        "none": None,
        "keys": keep,
        "pairs": chance(1, 1, length, length, share=0.6, seed=seed),
        "heads": chance(batch, heads, length, length, share=0.5, seed=seed),
        "triangle and keys": torch.ones(length, length, dtype=torch.bool).tril() & keep,
        "key bias": noise(1, heads, 1, length, seed=seed),
        "bias": noise(1, heads, length, length, seed=seed),
        "float keys": torch.zeros(keep.shape).masked_fill(~keep, -math.inf),
    }[kind]


@st.composite
def calls(draw: st.DrawFn, masks: tuple[str, ...] = MASKS) -> AttentionCall:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 3)]))
    seed = draw(st.integers(0, 9))
    mask = masked(draw(st.sampled_from(masks)), batch, key_heads * group, length, seed)
    return attention(
        length,
        batch=batch,
        heads=key_heads * group,
        key_heads=key_heads,
        width=draw(st.sampled_from([1, 3, 8, 16])),
        mask=mask,
        is_causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3, 2.0])),
    )


@often
@given(call=calls())
def test_every_statistic_is_that_of_the_full_matrix(call: AttentionCall) -> None:
    reference = Reference(call)
    for name, question in QUESTIONS.items():
        tolerance = 5 * TOLERANCE * question.unit(call.shape[-1])
        assert error(question.ask(call), question.expect(reference)) <= tolerance, name
    assert np.allclose(call.received_mass().numpy(), reference.received_mass(), 2e-4, 2e-5)


@often
@given(call=calls())
def test_entropies_lie_between_zero_and_the_logarithm_of_the_keys(call: AttentionCall) -> None:
    choices = call.allowed().expand(call.shape).sum(dim=-1).clamp_min(1).log()
    shannon, renyi = call.entropy(), call.renyi_entropy()
    if shannon.is_exact:
        assert (shannon.values >= -1e-4).all()
        assert (shannon.values <= choices + 1e-4).all()
        assert (renyi.values >= -1e-4).all()
        assert (renyi.values <= shannon.values + 1e-4).all()


@often
@given(call=calls(), width=st.integers(0, 25))
def test_windows_grow_to_all_of_the_weight(call: AttentionCall, width: int) -> None:
    narrow, wider, all_keys = (call.window_mass(w) for w in (width, width + 1, call.shape[2]))
    assert torch.allclose(all_keys.values, all_keys.counted.expand_as(all_keys.values).float(), atol=1e-5)
    assert (narrow.values <= wider.values + 1e-5).all()


@often
@given(call=calls(), parts=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_weight_is_neither_lost_nor_made(call: AttentionCall, parts: tuple[int, int]) -> None:
    counted = call.entropy().counted if call.entropy().is_exact else call.mean_position().counted
    rows = counted.expand(call.shape[:3]).sum(dim=-1).float()
    assert torch.allclose(call.received_mass().sum(dim=-1), rows, 1e-4, 1e-4)
    parts = (min(parts[0], call.shape[2]), min(parts[1], call.shape[3]))
    totals = call.bucketed_weights(*parts).sum(dim=-1)
    assert ((totals - 1).abs().minimum(totals.abs()) < 1e-4).all()
    everything = call.first_mass(call.shape[3])
    assert torch.allclose(everything.values, everything.counted.expand_as(everything.values).float(), atol=1e-4)
    assert torch.equal(everything.counted.expand(call.shape[:3]).sum(dim=-1).float(), rows)


@often
@given(call=calls())
def test_positions_lie_in_the_sequence(call: AttentionCall) -> None:
    last = call.shape[3] - 1
    for values in (call.mean_position().values, call.mean_distance().values):
        assert (values >= -1e-3).all()
        assert (values <= last + 1e-3).all()
    assert (call.position_variance().values >= -1e-2).all()
    assert (call.position_variance().values <= (last / 2) ** 2 + 1e-2).all()


@often
@given(call=calls(("none", "keys", "pairs", "key bias")), turn=st.integers(1, 3))
def test_heads_in_another_order_answer_in_that_order(call: AttentionCall, turn: int) -> None:
    heads = call.shape[1]
    key = call.key.repeat_interleave(heads // call.key.shape[1], dim=1)
    mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask.roll(turn, 1)
    rolled = replace(call, query=call.query.roll(turn, 1), key=key.roll(turn, 1), mask=mask, enable_gqa=False)
    for name, question in QUESTIONS.items():
        if name != "expectation of each head":
            got, expected = question.ask(rolled).values, question.ask(call).values.roll(turn, 1)
            assert torch.allclose(got, expected, 1e-4, 1e-3), name
    assert torch.allclose(rolled.received_mass(), call.received_mass().roll(turn, 1), 1e-4, 1e-4)


@often
@given(call=calls(("keys", "pairs", "triangle and keys", "float keys")), more=st.integers(1, 9))
def test_a_masked_key_at_the_end_changes_nothing(call: AttentionCall, more: int) -> None:
    """Nor does the query that comes with it."""
    pad = (0, 0, 0, more)
    mask = call.mask.expand(*call.mask.shape[:2], call.shape[2], call.shape[3])
    lowest = False if mask.dtype == torch.bool else -math.inf
    longer = replace(
        call,
        query=F.pad(call.query, pad, value=3.0),
        key=F.pad(call.key, pad, value=5.0),
        mask=F.pad(mask, (0, more, 0, more), value=lowest),
    )
    for name, question in QUESTIONS.items():
        if "expectation" not in name:
            got, expected = question.ask(longer), question.ask(call)
            unit = question.unit(call.shape[3] + more)
            assert torch.allclose(got.values[:, :, : call.shape[2]], expected.values, 1e-4, 1e-4 * unit), name
            assert (got.values[:, :, call.shape[2] :] == 0).all(), name
    assert torch.allclose(longer.received_mass()[..., : call.shape[3]], call.received_mass(), 1e-4, 1e-4)
    assert (longer.received_mass()[..., call.shape[3] :] == 0).all()


@often
@given(call=calls(("none",)), seed=st.integers(0, 9))
def test_a_constant_added_to_a_row_moves_the_logsumexp_alone(call: AttentionCall, seed: int) -> None:
    constant = 3 * noise(1, call.shape[1], call.shape[2], 1, seed=seed)
    moved = replace(call, mask=constant)
    shift = moved.logsumexp().values - call.logsumexp().values
    assert torch.allclose(shift, constant[..., 0].expand_as(shift), atol=1e-4)
    for name, question in QUESTIONS.items():
        if name not in ("logsumexp", "max logit"):
            got, expected = question.ask(moved), question.ask(call)
            if got.is_exact:
                assert torch.allclose(got.values, expected.values, 1e-4, 1e-4 * question.unit(call.shape[3])), name
    assert torch.allclose(moved.received_mass(), call.received_mass(), 1e-4, 1e-4)

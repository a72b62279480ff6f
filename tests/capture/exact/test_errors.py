"""Arguments that make no sense are refused, in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_callbacks.capture import AttentionCall
from tests.capture.exact.cases import attention, padding

CALL = attention(is_causal=True)
SHAPES = [(12, 3), (13,), (4, 13, 3), (3, 4, 13, 3), (2, 3, 13, 3), (2, 4, 12, 3), (1, 2, 4, 13, 3), ()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["expectation", "entropy_and_expectation"])
@pytest.mark.parametrize("source", ["fused", "scores", "recorded"])
def test_features_of_a_wrong_shape(name: str, shape: tuple[int, ...], source: str) -> None:
    given = {"scores": CALL.logits(), "recorded": CALL.weights()}
    call = CALL if source == "fused" else AttentionCall("a", **{source: given[source]})
    with pytest.raises(ValueError, match="`features` must have shape"):
        getattr(call, name)(torch.zeros(shape))


@pytest.mark.parametrize("source", ["fused", "scores", "recorded"])
@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("window_mass", -1, "`width` must be at least 0, got -1"),
        ("first_mass", 0, "`k` must be at least 1, got 0"),
        ("renyi_entropy", 0.0, "`order` must be .*got 0"),
        ("renyi_entropy", -1.0, "`order` must be .*got -1"),
        ("renyi_entropy", float("nan"), "`order` must be .*got nan"),
        ("top_keys", 0, "`k` must .*got 0"),
        ("top_keys", 14, "`k` must .*got 14"),
    ],
)
def test_arguments_out_of_range(source: str, name: str, argument: float, message: str) -> None:
    given = {"scores": CALL.logits(), "recorded": CALL.weights()}
    call = CALL if source == "fused" else AttentionCall("a", **{source: given[source]})
    with pytest.raises(ValueError, match=message):
        getattr(call, name)(argument)


@pytest.mark.parametrize(
    ("name", "argument"), [("window_mass", 1.5), ("window_mass", True), ("first_mass", 1.0), ("offset_mass", 0.5)]
)
def test_numbers_of_tokens_are_whole(name: str, argument: object) -> None:
    with pytest.raises(TypeError, match="must be an integer, got"):
        getattr(CALL, name)(argument)


@pytest.mark.parametrize("call", [attention(is_cross=True), attention(5, 9), attention(9, 5, is_causal=True)])
def test_positions_of_other_sequences_are_not_compared(call: AttentionCall) -> None:
    for ask in (call.mean_distance, lambda: call.window_mass(1), lambda: call.offset_mass(0)):
        with pytest.raises(ValueError, match=r"self-attention|same tokens"):
            ask()


@pytest.mark.parametrize("offset", [13, -13, 500])
def test_an_offset_beyond_the_sequence_has_no_rows(offset: int) -> None:
    for call in (CALL, AttentionCall("a", scores=CALL.logits()), AttentionCall("a", recorded=CALL.weights())):
        got = call.offset_mass(offset)
        assert got.values.shape == (2, 4, 13)
        assert not got.values.any()
        assert not got.counted.any()
        assert got.mean().isnan().all()


def test_entropy_of_order_one_is_shannons_or_refused() -> None:
    try:
        got = CALL.renyi_entropy(1.0)
    except ValueError as error:
        assert "`order`" in str(error)  # noqa: PT017
    else:
        assert torch.allclose(got.values, CALL.entropy().values, atol=1e-5)


def test_a_sample_without_a_valid_key_has_no_first_key() -> None:
    got = attention(mask=padding(pads=13)).first_mass(2)
    counted = got.counted.expand(2, 4, 13)
    assert counted[0].all()
    assert not counted[1].any()
    assert got.mean()[1].isnan().all()


def test_buckets_are_checked_as_before() -> None:
    for call in (CALL, replace(CALL, mask=padding())):
        with pytest.raises(ValueError, match="Buckets must be at most"):
            call.bucketed_weights(14, 2)
        with pytest.raises(ValueError, match="`key_buckets` must be at least 1, got 0"):
            call.bucketed_weights(2, 0)

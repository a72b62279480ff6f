"""Each statistic of each kind of call equals that of the full matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.capture import AttentionCall
from tests.capture.exact.cases import BIASED, CAPPED, CASES, attention, is_square, made, padding
from tests.capture.exact.questions import QUESTIONS, TOLERANCE, Question, error, key_features, means_agree
from tests.capture.exact.reference import Reference

OF_SCORES = ("logsumexp", "max logit")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def is_sampled(case: str, question: Question) -> bool:
    return case in CAPPED or (case in BIASED and question.is_entropy)


def test_the_reference_is_what_the_weights_say(case: str) -> None:
    call, reference = made(case)
    assert np.allclose(call.weights().numpy(), reference.weights, atol=1e-6)
    assert (call.allowed().expand(call.shape).numpy() == reference.allowed).all()


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_row_is_that_of_the_full_matrix(case: str, name: str) -> None:
    (call, reference), question = made(case), QUESTIONS[name]
    if question.compares_positions and not is_square(call):
        with pytest.raises(ValueError, match=r"self-attention|same tokens"):
            question.ask(call)
        return
    if name in OF_SCORES and call.recorded is not None:
        with pytest.raises(ValueError, match="scores"):
            question.ask(call)
        return
    got, expected = question.ask(call), question.expect(reference)
    tolerance = TOLERANCE * question.unit(call.shape[-1])
    assert got.values.dtype == (torch.float64 if case == "double" else torch.float32)
    assert got.counted.dtype == torch.bool
    assert error(got, expected) <= tolerance
    if not is_sampled(case, question):
        assert got.is_exact
    if got.is_exact or call.shape[2] <= 20:  # as many rows are drawn as there are
        assert means_agree(got, expected, tolerance)


@pytest.mark.parametrize("case", [*BIASED, *CAPPED])
def test_a_sample_of_rows_says_so(case: str) -> None:
    call, _ = made(case)
    asked = [question for question in QUESTIONS.values() if is_sampled(case, question)]
    for question in asked:
        if question.compares_positions and not is_square(call):
            continue
        got = question.ask(call)
        assert got.is_exact == (got.rows is None)
        if got.rows is not None:
            assert got.rows.shape[0] == call.shape[0]
            assert got.rows.shape[1] == got.values.shape[2]
            for rows, counted in zip(got.rows, got.counted.expand(got.values.shape[:3]).any(dim=1), strict=True):
                assert ((rows >= 0) & (rows < call.shape[2])).all()
                assert (rows[counted].diff() >= 0).all()


@pytest.mark.parametrize("case", ["T5, long", "flex soft cap, long"])
def test_the_same_rows_are_drawn_again(case: str) -> None:
    call, _ = made(case)
    state = torch.get_rng_state()
    first, second = call.entropy(), call.entropy()
    assert not first.is_exact
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.values, second.values)
    assert torch.equal(torch.get_rng_state(), state)


def test_received_mass(case: str) -> None:
    call, reference = made(case)
    got = call.received_mass().numpy()
    assert got.shape == reference.received_mass().shape
    assert np.allclose(got, reference.received_mass(), 1e-4, 1e-5)


@pytest.mark.parametrize("parts", [(3, 2), (1, 5)])
def test_buckets(case: str, parts: tuple[int, int]) -> None:
    call, reference = made(case)
    parts = (min(parts[0], call.shape[2]), min(parts[1], call.shape[3]))
    got = call.bucketed_weights(*parts).numpy()
    assert np.allclose(got, reference.bucketed_weights(*parts), atol=TOLERANCE)


@pytest.mark.parametrize("case", ["plain", "long, padding", "T5, long", "scores, long"])
def test_as_many_buckets_as_tokens(case: str) -> None:
    call, reference = made(case)
    parts = call.shape[2:]
    assert np.allclose(call.bucketed_weights(*parts).numpy(), reference.bucketed_weights(*parts), atol=TOLERANCE)


@pytest.mark.parametrize("rows", [None, [0], "of each sample"])
def test_top_keys(case: str, rows: object) -> None:
    call, reference = made(case)
    last = call.shape[2] - 1
    if rows == "of each sample":
        rows = torch.tensor([[last, 0], [0, last // 2]])[: call.shape[0]]
    top = call.top_keys(min(3, call.shape[3]), rows)
    weights = call.weights(rows).numpy()
    assert top.values.shape == top.indices.shape == (*weights.shape[:3], min(3, call.shape[3]))
    expected = -np.sort(-(reference.weights if rows is None else weights), axis=-1)[..., :3]
    assert np.allclose(top.values.numpy(), expected, atol=TOLERANCE)
    assert np.allclose(np.take_along_axis(weights, top.indices.numpy(), -1), expected, atol=TOLERANCE)


def test_double_precision_is_kept_inside() -> None:
    call, reference = made("double")
    for name, question in QUESTIONS.items():
        assert error(question.ask(call), question.expect(reference)) <= 1e-9, name
    assert call.received_mass().dtype == torch.float64
    assert np.allclose(call.received_mass().numpy(), reference.received_mass(), atol=1e-10)


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_empty_batch_has_no_rows(name: str) -> None:
    call = attention(5, batch=0)
    got = QUESTIONS[name].ask(call)
    assert got.values.shape[:3] == (0, 4, 5)
    assert got.mean().shape[:2] == (0, 4)


def test_an_empty_batch_receives_nothing() -> None:
    call = attention(5, batch=0, mask=padding(length=5)[:0])
    assert call.received_mass().shape == (0, 4, 5)
    assert call.bucketed_weights(2, 3).shape == (0, 4, 2, 3)


def test_the_same_call_is_asked_twice() -> None:
    call, _ = made("causal, padding left")
    before = [tensor.clone() for tensor in (call.query, call.key, call.mask)]
    for question in QUESTIONS.values():
        first, second = question.ask(call), question.ask(call)
        assert torch.equal(first.values, second.values)
        first.values.fill_(7.0)
        assert torch.equal(question.ask(call).values, second.values)
    for tensor, copy in zip((call.query, call.key, call.mask), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("case", ["causal, padding left", "grouped heads", "T5, padding", "recorded"])
def test_one_sample_alone_has_the_rows_it_has_in_the_batch(case: str) -> None:
    call, _ = made(case)
    for sample in range(2):
        alone = call.select(sample)
        reference = Reference(alone)
        for name, question in QUESTIONS.items():
            if name not in OF_SCORES or call.recorded is None:
                tolerance = TOLERANCE * question.unit(call.shape[-1])
                assert error(question.ask(alone), question.expect(reference)) <= tolerance, name


def test_features_of_another_precision() -> None:
    call, reference = made("causal")
    features = key_features(call.shape)
    for kind in (torch.float64, torch.bfloat16, torch.long, torch.bool):
        given = (features > 0).to(kind) if kind in (torch.long, torch.bool) else features.to(kind)
        assert error(call.expectation(given), reference.expectation(given)) <= TOLERANCE


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["causal, padding left", "T5, padding", "recorded", "flex lengths"])
def test_the_default_precision_does_not_matter(case: str, default: torch.dtype) -> None:
    call, reference = made(case)
    features = key_features(call.shape)
    torch.set_default_dtype(default)
    try:
        answers = [call.entropy_and_expectation(features)[1], call.mean_distance(), call.window_mass(2)]
        received, pooled = call.received_mass(), call.bucketed_weights(3, 2)
        means = [answer.mean() for answer in answers]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in (received, pooled, *means))
    expected = (reference.expectation(features), reference.mean_distance(), reference.window_mass(2))
    assert all(error(a, b) <= 13 * TOLERANCE for a, b in zip(answers, expected, strict=True))
    assert np.allclose(received.numpy(), reference.received_mass(), 1e-4, 1e-5)
    assert np.allclose(pooled.numpy(), reference.bucketed_weights(3, 2), atol=TOLERANCE)


def test_a_statistic_by_hand() -> None:
    call = AttentionCall("a", query=torch.zeros(1, 1, 4, 2), key=torch.zeros(1, 1, 4, 2), is_causal=True)
    assert torch.allclose(call.entropy().values[0, 0].exp(), torch.arange(1.0, 5.0))
    assert torch.allclose(call.renyi_entropy().values[0, 0].exp(), torch.arange(1.0, 5.0))
    assert torch.allclose(call.logsumexp().values[0, 0].exp(), torch.arange(1.0, 5.0))
    assert torch.allclose(call.mean_position().values[0, 0], torch.tensor([0.0, 0.5, 1.0, 1.5]), atol=1e-6)
    assert torch.allclose(call.mean_distance().values[0, 0], torch.tensor([0.0, 0.5, 1.0, 1.5]), atol=1e-6)
    assert torch.allclose(call.window_mass(1).values[0, 0], torch.tensor([1.0, 1.0, 2 / 3, 0.5]), atol=1e-6)
    assert torch.allclose(call.first_mass().values[0, 0], torch.tensor([1.0, 0.5, 1 / 3, 0.25]), atol=1e-6)
    assert torch.allclose(call.offset_mass(-1).values[0, 0], torch.tensor([0.0, 0.5, 1 / 3, 0.25]), atol=1e-6)
    assert call.offset_mass(-1).counted.expand(1, 1, 4).tolist() == [[[False, True, True, True]]]
    assert torch.allclose(call.received_mass()[0, 0], torch.tensor([25 / 12, 13 / 12, 7 / 12, 0.25]), atol=1e-5)

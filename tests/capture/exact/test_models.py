"""Statistics of calls recorded in Hugging Face models equal those of the weights of the same calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from attn_callbacks.capture import AttentionCall, AttentionRecorder  # noqa: E402
from attn_callbacks.capture.exact import kernel  # noqa: E402
from tests.capture.exact.cases import is_square  # noqa: E402
from tests.capture.exact.questions import QUESTIONS, TOLERANCE, error, means_agree  # noqa: E402
from tests.capture.exact.reference import Reference  # noqa: E402
from tests.capture.zoo import BY_NAME, INPUTS, build  # noqa: E402

MODELS = ("Bert", "GPT2", "Llama", "Mistral", "T5", "Bart", "ViT", "Whisper")
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "gradients": nullcontext,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "mixed precision": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def recorded(name: str, kind: str, mode: AbstractContextManager[object]) -> tuple[AttentionCall, ...]:
    family = BY_NAME[name]
    model = build(family, kind)
    with mode, AttentionRecorder(model) as recorder:
        model(**INPUTS[family.inputs]())
    return recorder.calls


def check(call: AttentionCall, exact: bool = True) -> None:
    reference = Reference(call)
    size = max(1.0, np.abs(reference.scores[reference.allowed]).max() / 10)
    for name, question in QUESTIONS.items():
        if question.compares_positions and not is_square(call):
            continue
        got, expected = question.ask(call), question.expect(reference)
        tolerance = TOLERANCE * question.unit(call.shape[-1]) * size
        assert error(got, expected) <= tolerance, name
        assert means_agree(got, expected, tolerance), name
        assert got.is_exact or (question.is_entropy and not exact), name
    assert np.allclose(call.received_mass().detach().numpy(), reference.received_mass(), 5e-4, 1e-4)
    assert np.allclose(call.bucketed_weights(3, 2).detach().numpy(), reference.bucketed_weights(3, 2), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_calls_of_fused_kernels(name: str) -> None:
    calls = recorded(name, "sdpa", torch.no_grad())
    for call in (calls[0], calls[-1]):
        assert call.query is not None
        check(call, exact=name != "T5")


@pytest.mark.parametrize("name", ["Bert", "Llama", "T5", "Bart"])
def test_calls_of_softmax(name: str) -> None:
    for call in recorded(name, "eager", torch.no_grad())[:3:2]:
        assert call.scores is not None
        check(call)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_calls_of_every_mode_inside_and_outside_of_it(name: str, mode: str) -> None:
    with MODES[mode]():
        (call, *_) = recorded(name, "sdpa", nullcontext())
        inside = {name: question.ask(call).values.detach().clone() for name, question in QUESTIONS.items()}
        received = call.received_mass().detach().clone()
    check(call, exact=name != "T5")
    assert torch.equal(received, call.received_mass())
    for asked, question in QUESTIONS.items():
        assert torch.equal(inside[asked], question.ask(call).values), asked
    assert call.requires_grad == (mode in ("gradients", "mixed precision"))


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_asking_records_nothing(kind: str) -> None:
    """What statistics compute looks like attention, and the recorder is still listening."""
    kernel._kernel.cache_clear()  # its check of a kernel comes with the first question
    family = BY_NAME["T5"]
    model = build(family, kind)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(**INPUTS[family.inputs]())
        before = len(recorder.calls)
        for call in recorder.calls[:6:5]:
            for question in QUESTIONS.values():
                if is_square(call) or not question.compares_positions:
                    question.ask(call)
            call.received_mass(), call.bucketed_weights(2, 2), call.top_keys(2)
        assert len(recorder.calls) == before


def test_gradients_reach_the_parameters_of_a_model() -> None:
    model, inputs = build(BY_NAME["Llama"], "sdpa"), INPUTS["left"]()
    with AttentionRecorder(model) as recorder:
        model(**inputs)
    call = recorder.calls[-1]
    parameters = [p for name, p in model.named_parameters() if "layers.0" in name]
    alive = call.entropy().counted
    weights = call.weights()
    full = -(weights * weights.clamp_min(1e-30).log()).sum(dim=-1)
    ours = torch.autograd.grad(call.entropy().values.sum(), parameters, retain_graph=True)
    expected = torch.autograd.grad((full * alive).sum(), parameters)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp_min(1.0)

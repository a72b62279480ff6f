from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.capture import AttentionCall, AttentionNotFoundError, AttentionRecorder, record
from tests.capture.reference import EagerAttention, SelfAttention, Stack, left_behind

TOKENS = torch.randn(2, 5, 8)


def names(recorder: AttentionRecorder) -> list[str]:
    return [call.name for call in recorder.calls]


def three_layers() -> Stack:
    return Stack(SelfAttention(), EagerAttention(), SelfAttention())


class Failing(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        raise self.error


class Function(nn.Module):
    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self) -> object:
        return self.function()


class Shared(nn.Module):
    """One attention module, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SelfAttention()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.layer(tokens))


def test_calls_come_in_the_order_of_execution() -> None:
    model = three_layers()
    with AttentionRecorder(model) as recorder:
        model(TOKENS)
    assert names(recorder) == ["layers.0", "layers.1", "layers.2"]
    assert recorder.names == ("layers.0", "layers.1", "layers.2")


def test_calls_of_one_module_are_counted_anew_in_each_forward() -> None:
    model = Shared()
    with AttentionRecorder(model) as recorder:
        model(TOKENS)
        model(TOKENS)
    assert [(call.name, call.index) for call in recorder.calls] == [("layer", 0), ("layer", 1)] * 2


def test_order_is_that_of_the_calls_not_of_the_returns() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SelfAttention()

        def forward(self, tokens: Tensor) -> Tensor:
            heads = tokens[:, None]
            return self.inner(F.scaled_dot_product_attention(heads, heads, heads)[:, 0])

    with AttentionRecorder(Outer()) as recorder:
        recorder.model(TOKENS)
    assert names(recorder) == ["Outer", "inner"]


def test_a_second_block_starts_empty() -> None:
    model = three_layers()
    recorder = AttentionRecorder(model)
    for _ in range(2):
        with recorder:
            model(TOKENS)
        assert names(recorder) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["layers.1"], ["layers.1"]),
        (["layers"], ["layers.0", "layers.1", "layers.2"]),
        (["layers.2", "layers.0"], ["layers.0", "layers.2"]),
        (["layers.[01]"], ["layers.0", "layers.1"]),
        (["*"], ["layers.0", "layers.1", "layers.2"]),
        (["*.2"], ["layers.2"]),
        ([], []),
    ],
)
def test_layers_select_by_name_prefix_and_pattern(layers: list[str], expected: list[str]) -> None:
    model = three_layers()
    with AttentionRecorder(model, layers) as recorder:
        model(TOKENS)
    assert names(recorder) == expected
    assert recorder.names == ("layers.0", "layers.1", "layers.2")


@pytest.mark.parametrize("pattern", ["layers.5", "layer", "head", "*.attention"])
def test_a_pattern_without_attention_says_which_names_exist(pattern: str) -> None:
    known = "Known: 'layers.0', 'layers.1', 'layers.2'."
    message = re.escape(f"`layers` names no attention module: '{pattern}'. {known}")
    model = three_layers()
    with pytest.raises(ValueError, match=message), AttentionRecorder(model, ["layers.0", pattern]):
        model(TOKENS)


def test_a_block_without_a_forward_is_no_error() -> None:
    with AttentionRecorder(three_layers(), ["nothing"]) as recorder:
        pass
    assert recorder.calls == ()


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got function"):
        AttentionRecorder(F.softmax)
    with pytest.raises(TypeError, match=r"`layers` must be a sequence of names, got the string 'a'. Write \['a'\]"):
        AttentionRecorder(nn.Linear(1, 1), "a")


def test_a_recorder_does_not_nest_in_itself() -> None:
    recorder = AttentionRecorder(three_layers())
    with recorder, pytest.raises(RuntimeError, match="already recording; make a second one"):
        recorder.__enter__()
    assert left_behind() == []


def test_a_model_without_attention_says_what_was_looked_for() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(dim=-1))
    with pytest.raises(AttentionNotFoundError) as error, AttentionRecorder(model):
        model(TOKENS)
    for word in ("`Sequential`", "scaled_dot_product_attention", "nn.MultiheadAttention", "flex_attention", "softmax"):
        assert word in str(error.value)
    for way_out in ("attn_implementation='sdpa'", "attn_callbacks.record(name, weights)"):
        assert way_out in str(error.value)
    assert isinstance(error.value, RuntimeError)
    assert left_behind() == []


def test_scripted_modules_are_not_found() -> None:
    model = torch.jit.script(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval())
    with pytest.raises(AttentionNotFoundError), AttentionRecorder(model):
        model(TOKENS)


def test_nothing_is_left_behind() -> None:
    model = Stack(SelfAttention(), EagerAttention())
    with AttentionRecorder(model):
        model(TOKENS)
        assert left_behind() != []
    assert left_behind() == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), SystemExit()])
def test_an_exception_in_the_model_leaves_nothing_behind(error: BaseException) -> None:
    model = Stack(SelfAttention(), Failing(error))
    recorder = AttentionRecorder(model)
    with pytest.raises(type(error)) as caught, recorder:
        model(TOKENS)
    assert caught.value is error
    assert names(recorder) == ["layers.0"]
    assert left_behind() == []


@pytest.mark.parametrize("need_weights", [True, False])
def test_an_exception_inside_multi_head_attention_leaves_nothing_behind(need_weights: bool) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(RuntimeError, match=r"size|shape"), AttentionRecorder(model):
        model(TOKENS, TOKENS, TOKENS, attn_mask=torch.zeros(5, 3), need_weights=need_weights)
    model.out_proj.weight = nn.Parameter(torch.zeros(8, 7))  # fails after attention, while the functions are replaced
    with pytest.raises(RuntimeError, match="shapes"), AttentionRecorder(model):
        model(TOKENS, TOKENS, TOKENS, need_weights=need_weights)
    assert left_behind() == []


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("layer", [SelfAttention, EagerAttention, lambda: MultiHead()])
@pytest.mark.filterwarnings("error")
def test_an_exception_in_the_receiver_leaves_nothing_behind(
    error: BaseException, layer: Callable[[], nn.Module]
) -> None:
    received = []

    def receive(call: AttentionCall) -> None:
        received.append(call.name)
        raise error

    model = Stack(layer(), layer())
    with pytest.raises(type(error)) as caught, AttentionRecorder(model, on_call=receive):
        model(TOKENS)
    assert caught.value is error
    assert len(received) == 1
    assert left_behind() == []
    with AttentionRecorder(model) as recorder:  # and the next one works
        model(TOKENS)
    assert len(recorder.calls) == 2


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(tokens, tokens, tokens)[0]


def test_a_module_that_fails_inside_the_block_can_be_tried_again() -> None:
    model = Shared()
    with AttentionRecorder(model) as recorder:
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.randn(2, 5, 9))
        model(TOKENS)
    assert [(call.name, call.index) for call in recorder.calls] == [("layer", 0), ("layer", 1)]


@pytest.mark.filterwarnings("error")
def test_attention_of_a_module_that_raised_is_not_delivered() -> None:
    class Breaking(SelfAttention):
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            super().forward(tokens, mask)
            raise ValueError("broken")

    model = Stack(SelfAttention(), Breaking())
    with pytest.raises(ValueError, match="broken"), AttentionRecorder(model) as recorder:
        model(TOKENS)
    assert names(recorder) == ["layers.0"]


def test_a_receiver_gets_each_call_and_nothing_is_kept() -> None:
    received: list[AttentionCall] = []
    model = three_layers()
    with AttentionRecorder(model, ["layers.0", "layers.1"], on_call=received.append) as recorder:
        model(TOKENS)
    assert [call.name for call in received] == ["layers.0", "layers.1"]
    assert recorder.calls == ()
    assert recorder.names == ("layers.0", "layers.1", "layers.2")


@pytest.mark.parametrize("layer", [SelfAttention, EagerAttention, MultiHead])
def test_what_a_receiver_computes_is_not_recorded(layer: Callable[[], nn.Module]) -> None:
    received = []
    other = Stack(SelfAttention())

    def receive(call: AttentionCall) -> None:
        received.append(call.name)
        call.weights() @ torch.ones(2, call.shape[1], 5, 3)
        F.scaled_dot_product_attention(TOKENS, TOKENS, TOKENS)
        other(TOKENS)
        record("received", call.weights())

    model = Stack(layer(), layer())
    with AttentionRecorder(model) as outer, AttentionRecorder(model, on_call=receive) as recorder:
        model(TOKENS)
    assert received == list(recorder.names) == names(outer)
    assert len(received) == 2


def test_recorders_nest() -> None:
    model = three_layers()
    with AttentionRecorder(model) as outer:
        model(TOKENS)
        with AttentionRecorder(model, ["layers.1"]) as inner, AttentionRecorder(model.layers[1]) as part:
            model(TOKENS)
        model(TOKENS)
    assert names(outer) == ["layers.0", "layers.1", "layers.2"] * 3
    assert names(inner) == ["layers.1"]
    assert names(part) == ["EagerAttention"]
    assert left_behind() == []


@pytest.mark.parametrize("training", [True, False])
def test_recorders_nest_around_multi_head_attention(training: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).train(training)
    with torch.no_grad(), AttentionRecorder(model) as outer, AttentionRecorder(model.layers[1]) as inner:
        model(TOKENS)
    assert names(outer) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert names(inner) == ["self_attn"]
    assert torch.equal(outer.calls[1].weights(), inner.calls[0].weights())
    assert left_behind() == []


def test_other_threads_are_not_recorded_and_not_disturbed() -> None:
    model, other = Stack(MultiHead(), EagerAttention()), Stack(MultiHead(), SelfAttention(), EagerAttention())
    inside, done, results = threading.Event(), threading.Event(), {}

    class Waiting(nn.Module):  # the other thread runs while this one is in the middle of its forward
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            inside.set()
            assert done.wait(30)
            return tokens

    def run() -> None:
        inside.wait(30)
        results["output"] = other(TOKENS)
        record("elsewhere", torch.ones(1, 1, 1, 1))
        model.layers[0](TOKENS)
        done.set()

    expected = other(TOKENS)
    model.layers.extend([Waiting(), SelfAttention()])
    thread = threading.Thread(target=run)
    thread.start()
    with AttentionRecorder(model) as recorder:
        model(TOKENS)
    thread.join()
    assert names(recorder) == ["layers.0.attention", "layers.1", "layers.3"]
    assert torch.equal(results["output"], expected)


def test_threads_that_overlap_each_see_their_own_and_restore_the_originals() -> None:
    barrier, order, seen = threading.Barrier(2), [threading.Event(), threading.Event()], {}

    class Meeting(nn.Module):  # stands in for the values' projection: both threads are inside their attention
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            barrier.wait(30)
            return tokens

    def run(number: int) -> None:
        model = Stack(MultiHead(), Meeting(), MultiHead())
        with AttentionRecorder(model) as recorder:
            for _ in range(20):
                model(TOKENS)
            barrier.wait(30)
            if number == 1:
                order[0].wait(30)
        seen[number] = names(recorder)
        order[0].set()  # the first thread to enter leaves first

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == dict.fromkeys(range(2), ["layers.0.attention", "layers.2.attention"] * 20)
    assert left_behind() == []


def test_copies_made_after_and_during_recording_are_clean() -> None:
    model = three_layers()
    with AttentionRecorder(model) as recorder:
        model(TOKENS)
        twin = copy.deepcopy(model)
        twin(TOKENS)  # not the model: not recorded
    assert len(recorder.calls) == 3
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert torch.equal(twin(TOKENS), model(TOKENS))
    call = copy.deepcopy(recorder.calls[0].detach())
    assert torch.equal(call.weights(), recorder.calls[0].weights())


class Recording(nn.Module):
    """Sigmoid attention, which nobody recognises."""

    def __init__(self, when: str = "never") -> None:
        super().__init__()
        self.when, self.num_heads = when, 1

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = tokens @ tokens.mT
        if self.when == "never":
            weights = scores.sigmoid()
            weights = weights / weights.sum(dim=-1, keepdim=True)
            record("sigmoid", weights[:, None])
            return weights @ tokens
        weights = scores.softmax(dim=-1)
        if self.when == "before":
            record("own", weights[:, None])
        if self.when == "before dropout":
            dropped = F.dropout(weights, 0.5)
            record("own", weights[:, None])
            return dropped @ tokens
        mixed = weights @ tokens
        if self.when == "after":
            record("own", weights[:, None])
        return mixed


def test_recorded_weights_are_named_after_the_module() -> None:
    model = Stack(SelfAttention(), Recording())
    with AttentionRecorder(model) as recorder:
        model(TOKENS)
    assert names(recorder) == ["layers.0", "layers.1.sigmoid"]
    assert torch.allclose(recorder.calls[1].weights().sum(dim=-1), torch.ones(2, 1, 5))
    with AttentionRecorder(model, ["layers.1"]) as recorder, torch.no_grad():
        model(TOKENS)
    assert names(recorder) == ["layers.1.sigmoid"]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("when", ["before", "before dropout", "after"])
def test_a_softmax_that_the_model_records_counts_once(when: str, guard: Callable[[], torch.no_grad]) -> None:
    model = Stack(Recording(when), EagerAttention(), Recording(when))
    with guard(), AttentionRecorder(model) as recorder:
        model(TOKENS)
    assert names(recorder) == ["layers.0.own", "layers.1", "layers.2.own"]


def test_recorded_weights_keep_or_lose_their_graph_like_all_others() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.full((1, 1, 2, 2), 0.5))

        def forward(self) -> None:
            record("own", self.weights)

    with AttentionRecorder(Module()) as recorder:
        recorder.model()
        with torch.no_grad():
            recorder.model()
    assert [call.requires_grad for call in recorder.calls] == [True, False]


def test_record_without_a_recorder_does_nothing() -> None:
    assert record("anything", torch.ones(3)) is None


def test_recorded_weights_need_four_axes() -> None:
    model = Function(lambda: record("anything", torch.ones(3)))
    message = r"axes \(batch, heads, queries, keys\), got shape \(3,\)"
    with pytest.raises(ValueError, match=message), AttentionRecorder(model):
        model()


def test_tensors_are_not_kept_by_a_finished_recorder() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Gate(nn.Module):
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            gate = tokens.softmax(dim=-1)  # waits in vain for its product with values
            alive.append(weakref.ref(gate))
            return tokens

    recorder = AttentionRecorder(
        Stack(EagerAttention(), Gate()), on_call=lambda call: alive.append(weakref.ref(call.scores))
    )
    with torch.no_grad(), recorder:
        recorder.model(TOKENS)
    gc.collect()
    assert [tensor() for tensor in alive] == [None, None]

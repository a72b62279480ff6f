"""Gradients of attention weights against models that compute their weights, and keep their gradients, themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks import AttentionCall, AttentionRecorder, record
from attn_callbacks.analysis.attention_gradient import attention_gradients
from attn_callbacks.functional.relevance import attention_relevance
from attn_callbacks.functional.rollout import attention_rollout
from tests.callbacks.models import Bert, Texts

BATCH, HEADS, LENGTH, SIZE = 3, 4, 6, 2
WIDTH = HEADS * SIZE
TOKENS = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

Attend = Callable[..., Tensor]


def written_out(kept: list[Tensor]) -> Attend:
    """``scaled_dot_product_attention`` as the formula, whose weights are kept with their gradients."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            key, value = (own.repeat_interleave(query.shape[1] // own.shape[1], 1) for own in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1)
        weights.retain_grad()
        kept.append(weights)
        return weights @ value

    return attend


def expected(run: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Gradients of the weights where every kernel is written out."""
    kept: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", written_out(kept))
        run().backward()
    return [weights.grad for weights in kept]


def found(run: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, ...]:
    with AttentionRecorder(model) as recorder:
        output = run()
    return attention_gradients(output, recorder.calls)


class Layer(nn.Module):
    """Attention with fewer values than queries, or as many."""

    def __init__(self, groups: int = HEADS, causal: bool = False) -> None:
        super().__init__()
        self.groups, self.causal = groups, causal
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, groups * SIZE), nn.Linear(WIDTH, groups * SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            part(tokens).unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=self.causal, enable_gqa=self.groups != HEADS
        )
        return tokens + self.out(mixed.transpose(1, 2).flatten(2)).tanh()


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_fused_kernels(groups: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Layer(groups, causal), Layer(groups, causal)).double()

    def run() -> Tensor:
        return model(TOKENS).square().sum()

    gradients = found(run, model)
    assert [own.shape for own in gradients] == [(BATCH, HEADS, LENGTH, LENGTH)] * 2
    for own, known in zip(gradients, expected(run, monkeypatch), strict=True):
        allowed = known != 0 if causal else torch.ones_like(known, dtype=torch.bool)
        torch.testing.assert_close(own * allowed, known)
        assert known.abs().max() > 1e-3


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multi_head_attention_of_both_kinds(padded: bool, batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first).double()
    tokens = TOKENS if batch_first else TOKENS.transpose(0, 1)
    padding = torch.arange(LENGTH) >= torch.tensor([[3], [5], [6]]) if padded else None

    def run(need_weights: bool = False) -> Tensor:
        options = {"key_padding_mask": padding, "need_weights": need_weights}
        return model(tokens, tokens, tokens, **options)[0].square().sum()

    (known,) = expected(run, monkeypatch)
    (fused,) = found(run, model)
    (own_softmax,) = found(lambda: run(need_weights=True), model)
    torch.testing.assert_close(fused, own_softmax)
    torch.testing.assert_close(fused, known)


@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3).double().train(training)
    padding = torch.arange(LENGTH) >= torch.tensor([[3], [5], [6]])

    def run() -> Tensor:
        return model(TOKENS, src_key_padding_mask=padding)[:, 0].square().sum()

    gradients = found(run, model)
    for own, known in zip(gradients, expected(run, monkeypatch), strict=True):
        torch.testing.assert_close(own, known)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hugging_face(attention: str) -> None:
    model, data = Bert(attention).eval(), Texts(4)
    batch = {"input_ids": data.input_ids, "attention_mask": data.attention_mask}
    eager = Bert("eager").eval()
    eager.load_state_dict(model.state_dict())
    output = eager.bert(**batch, output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    output.logits[:, 1].sum().backward()
    gradients = found(lambda: model(batch)[:, 1].sum(), model)
    assert len(gradients) == len(output.attentions)
    for own, weights in zip(gradients, output.attentions, strict=True):
        seen = data.attention_mask[:, None, None].bool().expand_as(own)
        torch.testing.assert_close(own[seen], weights.grad[seen], rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


class Own(nn.Module):
    """Computes its weights in a way of its own, and keeps them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.project = way, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.project(tokens).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT
        if self.way == "sink":
            scores = torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        if self.way == "recorded":
            self.weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            record("own", self.weights)
        elif self.way == "view":
            self.weights = scores.flatten(0, 1).exp()
            self.weights.retain_grad()
            record("own", self.weights.view(scores.shape))
            return self.weights @ value.flatten(0, 1)
        else:
            self.weights = scores.softmax(-1)
        self.weights.retain_grad()
        if self.way == "einsum":
            return torch.einsum("bhqk,bhkd->bqhd", self.weights, value).flatten(2)
        used = self.weights[..., :-1] if self.way == "sink" else F.dropout(self.weights, 0.5, self.way == "dropout")
        return used @ value


@pytest.mark.parametrize("way", ["plain", "einsum", "recorded", "sink", "dropout", "view"])
def test_attention_written_by_hand(way: str) -> None:
    model = Own(way).double()
    with AttentionRecorder(model) as recorder:
        output = model(TOKENS).square().sum()
    (own,) = attention_gradients(output, recorder.calls, retain_graph=True)
    model.weights.grad = None  # kept gradients add up, over calls of `torch.autograd.grad` as well
    output.backward()
    known = model.weights.grad
    torch.testing.assert_close(own, known.view(BATCH, HEADS, LENGTH, -1)[..., :LENGTH])
    assert own.abs().max() > 1e-3


def test_samples_keep_their_own_gradients() -> None:
    model = nn.Sequential(Layer(), Layer()).double()
    whole = found(lambda: model(TOKENS).square().sum(), model)
    for sample in range(BATCH):
        alone = found(lambda sample=sample: model(TOKENS[sample : sample + 1]).square().sum(), model)
        for own, all_of_them in zip(alone, whole, strict=True):
            torch.testing.assert_close(own[0], all_of_them[sample])


def test_a_layer_that_the_output_does_not_know_has_zeros() -> None:
    first, second = Layer(), Layer()
    model = nn.Sequential(first, second)
    with AttentionRecorder(model) as recorder:
        tokens = first(TOKENS.float())
        second(tokens)
    gradients = attention_gradients(tokens.sum(), recorder.calls)
    assert gradients[0].any()
    assert not gradients[1].any()
    assert gradients[1].shape == (BATCH, HEADS, LENGTH, LENGTH)


def test_parameters_get_no_gradient_and_the_graph_may_be_kept() -> None:
    model = Layer()
    with AttentionRecorder(model) as recorder:
        output = model(TOKENS.float()).sum()
    first = attention_gradients(output, recorder.calls, retain_graph=True)
    again = attention_gradients(output, recorder.calls)
    assert torch.equal(first[0], again[0])
    assert not first[0].requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


# --- what is refused ---------------------------------------------------------------------------------------------


def calls_of(run: Callable[[], Any], model: nn.Module) -> tuple[Any, tuple[AttentionCall, ...]]:
    with AttentionRecorder(model) as recorder:
        output = run()
    return output, recorder.calls


def test_a_forward_without_gradients_is_refused() -> None:
    model = Layer()
    with torch.no_grad():
        _, calls = calls_of(lambda: model(TOKENS.float()), model)
    with pytest.raises(ValueError, match=r"attention of 'Layer' has no graph.*enable_grad"):
        attention_gradients(model(TOKENS.float()).sum(), calls)


def test_an_output_that_depends_on_no_call_is_refused() -> None:
    model = Layer()
    _, calls = calls_of(lambda: model(TOKENS.float()), model)
    with pytest.raises(ValueError, match="depends on no attention of `calls`"):
        attention_gradients(model(TOKENS.float()).sum(), calls)


@pytest.mark.parametrize("output", [torch.ones(2, requires_grad=True), torch.ones(())])
def test_an_output_that_cannot_be_differentiated_is_refused(output: Tensor) -> None:
    with pytest.raises(ValueError, match="`output` must be one number with a graph"):
        attention_gradients(output, [])


def test_what_was_changed_in_place_is_refused() -> None:
    class Scaled(Layer):
        def forward(self, tokens: Tensor) -> Tensor:
            mixed = F.scaled_dot_product_attention(*[self.query(tokens)[:, None]] * 3)
            mixed *= 2
            return mixed

    model = Scaled()
    output, calls = calls_of(lambda: model(TOKENS.float()).sum(), model)
    with pytest.raises(ValueError, match="changed in place"):
        attention_gradients(output, calls)


# --- a pretrained model ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_minilm_on_both_backends() -> None:
    transformers = pytest.importorskip("transformers")
    from examples.sentiment_data import minilm

    try:
        folder = minilm()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["The film was long, but moving in the end.", "Dull."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    valid = batch["attention_mask"].bool()
    gradients, maps = {}, {}
    for kind in ("sdpa", "eager"):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=kind, local_files_only=True).eval()
        with AttentionRecorder(model) as recorder:
            hidden = model(**batch).last_hidden_state
        pooled = (hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        gradients[kind] = attention_gradients(pooled[:, :8].sum(), recorder.calls)
        maps[kind] = [call.weights() for call in recorder.calls]
    seen = valid[:, None, None] & valid[:, None, :, None]
    for own, other in zip(gradients["sdpa"], gradients["eager"], strict=True):
        torch.testing.assert_close(own * seen, other * seen, rtol=1e-3, atol=1e-5)
    rolled = attention_rollout(maps["sdpa"], valid=valid)
    torch.testing.assert_close(rolled.sum(-1), valid.float())
    assert not rolled[1, :, ~valid[1]].any()
    relevance = attention_relevance(maps["sdpa"], gradients["sdpa"], valid=valid)
    assert relevance.diagonal(dim1=1, dim2=2)[valid].min() >= 1.0
    short = attention_relevance(
        *([own[1:, :, : valid[1].sum(), : valid[1].sum()] for own in part["sdpa"]] for part in (maps, gradients))
    )
    torch.testing.assert_close(relevance[1:, : valid[1].sum(), : valid[1].sum()], short)

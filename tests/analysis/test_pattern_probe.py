"""The probe on a model whose induction, duplicate-token and previous-token heads were planted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_callbacks.analysis.pattern_probe import PROBED, AttentionPatternProbe
from attn_callbacks.capture import AttentionRecorder

WORDS, PLACES = 24, 32
SHARP = 20.0


class Attention(nn.Module):
    """Two causal heads with weights to be set by hand; the residual stream is [token, position, token before]."""

    def __init__(self) -> None:
        super().__init__()
        width, self.head = 2 * WORDS + PLACES, WORDS + PLACES
        self.query, self.key, self.value = (nn.Linear(width, 2 * self.head, bias=False) for _ in range(3))
        self.merge = nn.Linear(2 * self.head, width, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, stream: Tensor) -> Tensor:
        split = [
            layer(stream).unflatten(-1, (2, self.head)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        heads = F.scaled_dot_product_attention(*split, is_causal=True, scale=1.0)
        return stream + self.merge(heads.transpose(1, 2).flatten(2))


def plant(layer: nn.Linear, head: int, out: slice, into: slice, factor: float = 1.0, shift: int = 0) -> None:
    """Let a projection read a part of the stream into a part of a head, ``shift`` places further on."""
    size = into.stop - into.start
    start = head * (WORDS + PLACES) + out.start
    with torch.no_grad():
        layer.weight[start : start + size, into] += factor * torch.eye(size).roll(shift, dims=0)


TOKEN, PLACE, BEFORE = slice(0, WORDS), slice(WORDS, WORDS + PLACES), slice(WORDS + PLACES, 2 * WORDS + PLACES)
WORD_PART, PLACE_PART = slice(0, WORDS), slice(WORDS, WORDS + PLACES)


class Planted(nn.Module):
    """A previous-token head in the first layer; an induction head that reads it, and a duplicate-token head above."""

    def __init__(self, composed: bool = True) -> None:
        super().__init__()
        self.below, self.above = Attention(), Attention()
        plant(self.below.query, 0, PLACE_PART, PLACE, SHARP)
        plant(self.below.key, 0, PLACE_PART, PLACE, shift=1)
        plant(self.below.value, 0, WORD_PART, TOKEN)
        if composed:
            with torch.no_grad():
                self.below.merge.weight[BEFORE, WORD_PART] += torch.eye(WORDS)
        plant(self.above.query, 0, WORD_PART, TOKEN, SHARP)
        plant(self.above.key, 0, WORD_PART, BEFORE)
        for part, source, factor in ((WORD_PART, TOKEN, 1.0), (PLACE_PART, PLACE, -2.0)):  # not on itself
            plant(self.above.query, 1, part, source, SHARP)
            plant(self.above.key, 1, part, source, factor)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.eye(PLACES)[: tokens.shape[1]].expand(len(tokens), -1, -1)
        stream = torch.cat([F.one_hot(tokens, WORDS), places], dim=-1)
        return self.above(self.below(F.pad(stream, (0, WORDS))))


def probe(**changes: object) -> AttentionPatternProbe:
    return AttentionPatternProbe(**{"vocabulary": WORDS, "block": 12, "samples": 5, **changes})


def found(result, pattern: str) -> list[tuple[str, int]]:
    return [(head.layer, head.head) for head in result.heads(pattern)]


def test_planted_heads_are_found_and_no_others() -> None:
    result = probe(prefix=[0]).run(Planted())  # something must come before the first token of the block
    assert result.layer_names == ("below", "above")
    assert found(result, "induction") == [("above", 0)]
    assert found(result, "duplicate") == [("above", 1)]
    assert found(result, "previous") == [("below", 0)]
    for pattern in PROBED:
        (head,) = result.heads(pattern)
        assert head.strength > 0.99
        assert head.standard_error < 0.01


def test_induction_head_is_gone_without_the_head_that_it_reads() -> None:
    result = probe().run(Planted(composed=False))
    assert found(result, "induction") == []
    assert found(result, "previous") == [("below", 0)]


def test_texts_repeat_a_block_of_distinct_tokens() -> None:
    texts = probe(vocabulary=[3, 5, 7, 9, 11], block=4, prefix=[1, 9]).tokens()
    assert texts.shape == (5, 10)
    assert texts[:, :2].tolist() == [[1, 9]] * 5
    assert torch.equal(texts[:, 2:6], texts[:, 6:])
    for block in texts[:, 2:6].tolist():
        assert set(block) == {3, 5, 7, 11}
    assert len({tuple(block) for block in texts.tolist()}) > 1


def test_texts_are_the_same_at_every_call_and_others_with_another_seed() -> None:
    state = torch.random.get_rng_state()
    assert torch.equal(probe().tokens(), probe().tokens())
    assert not torch.equal(probe().tokens(), probe(seed=1).tokens())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("prefix", [(), (0, 1)])
def test_scores_of_random_heads_match_loops(prefix: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Embedding(WORDS, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    wanted = probe(prefix=prefix, batch_size=2)
    result = wanted.run(model)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(wanted.tokens())
    (weights,) = (call.weights().double().numpy() for call in recorder.calls)
    tokens, start = wanted.tokens().numpy(), len(prefix)
    for h in range(2):
        scores = np.zeros((5, 3))
        for b in range(5):
            for i in range(start + 12, start + 24):
                (first,) = (j for j in range(start, start + 12) if tokens[b, j] == tokens[b, i])
                scores[b] += [weights[b, h, i, first + 1], weights[b, h, i, first], weights[b, h, i, i - 1]]
        scores /= 12
        np.testing.assert_allclose(result.score[0, h], scores.mean(0), atol=1e-6)
        np.testing.assert_allclose(result.standard_error[0, h], scores.std(0, ddof=1) / np.sqrt(5), atol=1e-6)
    np.testing.assert_allclose(result.chance, 1 / (start + 24), atol=1e-6)


def test_chance_knows_the_causal_mask() -> None:
    chance = probe().run(Planted()).chance
    np.testing.assert_allclose(chance, np.mean([1 / (i + 1) for i in range(12, 24)]), atol=1e-6)


def test_modes_and_weights_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Embedding(WORDS, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True))
    model[1].norm1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    first, second = probe().run(model), probe().run(model)
    assert torch.equal(first.score, second.score)  # without dropout
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_are_given_back_after_an_error() -> None:
    model = Planted().train()
    with pytest.raises(RuntimeError, match="no"):
        probe().run(model, forward=_refuse)
    assert all(module.training for module in model.modules())


def _refuse(model: nn.Module, texts: Tensor) -> None:
    raise RuntimeError("no")


def test_layers_with_fewer_heads_and_selected_layers() -> None:
    layers = [nn.TransformerEncoderLayer(8, heads, 16, batch_first=True) for heads in (4, 2)]
    model = nn.Sequential(nn.Embedding(WORDS, 8), *layers)
    result = probe(samples=1).run(model)
    assert result.score.isnan()[..., 0].tolist() == [[False] * 4, [False, False, True, True]]
    assert result.standard_error.isnan().all()  # of one sample there is none
    assert probe(layers=["2.*"]).run(model).layer_names == ("2.self_attn",)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["score"][1][3] == [None] * 3


def test_model_without_self_attention_over_the_texts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No self-attention over 24 tokens was seen. Pass `forward`"):
        probe().run(Planted(), forward=lambda model, texts: model(texts[:, :-1]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block": 25}, ValueError, "`vocabulary` must have at least `block` = 25 ids, got 24"),
        ({"block": 24, "prefix": [0]}, ValueError, "must have at least `block` = 24 ids, got 23"),
        ({"block": 1}, ValueError, "`block` must be at least 2, got 1"),
        ({"samples": 0}, ValueError, "`samples` must be at least 1"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
    ],
)
def test_wrong_argument_raises(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        probe(**arguments)


def test_wrong_pattern_raises() -> None:
    with pytest.raises(ValueError, match="`pattern` must be one of 'induction', 'duplicate', 'previous', got 'next'"):
        probe().run(Planted()).heads("next")


@pytest.mark.slow
def test_pretrained_model_has_previous_and_duplicate_token_heads_but_no_induction_head() -> None:
    transformers = pytest.importorskip("transformers")
    data = pytest.importorskip("examples.sentiment_data")
    try:
        path = data.minilm()
    except FileNotFoundError:
        pytest.skip("MiniLM is not installed")
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True)
    result = AttentionPatternProbe(range(1996, 6000), block=24, samples=8, prefix=[101]).run(model)
    assert result.score.shape == (6, 12, 3)
    assert found(result, "previous")[0] == ("encoder.layer.0.attention.self", 2)
    assert found(result, "duplicate") == [("encoder.layer.2.attention.self", 9)]
    assert found(result, "induction") == []

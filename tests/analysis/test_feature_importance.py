"""Feature importance on models of which it is known what they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.analysis._features import METHODS
from attn_callbacks.analysis.feature_importance import feature_importance
from tests.capture.reference import EagerAttention, SelfAttention

WIDTH, TOKENS, MASK = 8, 6, 0


class Reader(nn.Module):
    """Looks mostly at position 1, whose value is empty, and decides by the token at position 3.

    Token ids are one-hot; the query of every position asks for the keys of positions 1 and 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(4.0))

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        batch, length = tokens.shape
        scores = torch.zeros(batch, 1, length, length)
        scores[..., 1], scores[..., 3] = 3.0, 2.0
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
        sign = (tokens == 5).float() - (tokens == 4).float()
        value = (self.gain * sign * torch.arange(length).ne(1)).view(batch, 1, length, 1)
        mixed = nn.functional.scaled_dot_product_attention(*self._factors(scores), value.expand(-1, -1, -1, length))
        decided = mixed[:, 0, 0, 0]
        return torch.stack([-decided, decided], dim=1)

    @staticmethod
    def _factors(scores: Tensor) -> tuple[Tensor, Tensor]:
        length = scores.shape[-1]
        scores = scores.clamp_min(-1e4)
        return scores * length**0.5, torch.eye(length).expand(len(scores), 1, -1, -1)


def run(model: nn.Module, tokens: Tensor, valid: Tensor | None) -> Tensor:
    return model(tokens, valid)


@pytest.fixture(name="tokens")
def sentences() -> Tensor:
    tokens = torch.full((2, TOKENS), 3)
    tokens[:, 1] = 5  # looked at, not used
    tokens[0, 3], tokens[1, 3] = 5, 4
    return tokens


@pytest.mark.parametrize("replacement", [MASK, None])
@pytest.mark.parametrize("measure", ["probability", "loss"])
def test_finds_what_the_model_reads(tokens: Tensor, replacement: int | None, measure: str) -> None:
    model = Reader()
    model.train()
    valid = torch.ones_like(tokens, dtype=torch.bool)
    found = feature_importance(model, tokens, run, valid=valid, replacement=replacement, measure=measure, batch_size=5)
    assert model.training
    assert model.gain.grad is None
    assert set(found.scores) == set(METHODS)
    assert found.scores["attention"].argmax(dim=1).tolist() == [1, 1]
    for name in ("gradient", "value", "masking"):
        assert found.scores[name].argmax(dim=1).tolist() == [3, 3], name
    assert found.target.tolist() == [1, 0]
    # by hand, sample by sample and feature by feature
    with torch.no_grad():
        for sample in range(2):
            for place in range(TOKENS):
                changed, seen = tokens[sample : sample + 1].clone(), valid[:1].clone()
                if replacement is None:
                    seen[0, place] = False
                else:
                    changed[0, place] = replacement
                p, q = (model(x, v).softmax(1)[0, found.target[sample]] for x, v in
                        ((tokens[sample : sample + 1], valid[:1]), (changed, seen)))  # fmt: skip
                expected = p - q if measure == "probability" else p.log() - q.log()
                assert float(found.scores["masking"][sample, place]) == pytest.approx(float(expected), abs=1e-6)


def test_comprehensiveness_and_sufficiency(tokens: Tensor) -> None:
    model = Reader()
    found = feature_importance(model, tokens, run, replacement=MASK, shares=(0.1, 0.5))
    with torch.no_grad():
        full = model(tokens).softmax(1)[0, 1]
        without = tokens[:1].clone()
        without[0, 3] = MASK
        only = torch.full((1, TOKENS), MASK)
        only[0, 3] = tokens[0, 3]
        expected = [float(full - model(x).softmax(1)[0, 1]) for x in (without, only)]
    assert float(found.comprehensiveness["masking"][0, 0]) == pytest.approx(expected[0], abs=1e-6)
    assert float(found.sufficiency["masking"][0, 0]) == pytest.approx(expected[1], abs=1e-6)
    assert float(found.comprehensiveness["attention"][0, 0]) == pytest.approx(0.0, abs=1e-6)  # masks position 1
    assert float(found.comprehensiveness["masking"].mean()) > float(found.comprehensiveness["random"].mean())
    assert "| masking |" in found.summary()
    assert found.table(0, ["a|b", "x", "y", "good", "z", "w"]).splitlines()[2].startswith("| good |")
    assert found.to_dict()["comprehensiveness"]["masking"] == found.comprehensiveness["masking"].tolist()


def test_special_tokens_and_padding_are_no_features(tokens: Tensor) -> None:
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, 5] = False
    features = torch.ones_like(valid)
    features[:, 0] = False
    found = feature_importance(Reader(), tokens, run, valid=valid, features=features, replacement=MASK)
    for values in found.scores.values():
        assert torch.equal(values.isnan(), ~(valid & features))


class Patches(nn.Module):
    """Four patches and a class token; the brightness of the last patch decides."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 1, batch_first=True)
        torch.manual_seed(0)

    def forward(self, image: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(image, 4).flatten(2).mT  # (batch, 4, channels)
        tokens = torch.cat([means.new_zeros(len(means), 1, 4), means.mean(-1, keepdim=True).expand(-1, -1, 4)], dim=1)
        mixed = self.mix(tokens, tokens, tokens)[0]
        decided = 3 * means[:, 3].sum(dim=1) + 1e-3 * mixed.sum(dim=(1, 2))
        return torch.stack([-decided, decided], dim=1)


def test_patches() -> None:
    image = torch.rand(3, 3, 8, 8)
    model = Patches()
    found = feature_importance(model, image, lambda model, x, valid: model(x), replacement=0.0, grid=(2, 2))
    means = nn.functional.avg_pool2d(image, 4).flatten(2).mT.mean(-1, keepdim=True).expand(-1, -1, 4)
    tokens = torch.cat([torch.zeros(3, 1, 4), means], dim=1)
    weights = model.mix(tokens, tokens, tokens)[1].detach()
    torch.testing.assert_close(found.scores["attention"], weights.mean(dim=1)[:, 1:])  # without the class token
    assert found.scores["masking"].shape == (3, 4)
    assert found.scores["masking"].argmax(dim=1).tolist() == [3, 3, 3]
    assert found.layer_names == ("mix",)


def test_a_colour_takes_the_place_of_patches() -> None:
    model, image, colour = Patches(), torch.rand(2, 3, 8, 8), torch.tensor([0.1, 0.2, 0.3])
    found, expected = (
        feature_importance(model, image, lambda model, x, _: model(x), replacement=given, grid=(2, 2), seed=1)
        for given in (colour, colour[:, None, None].expand(3, 8, 8))
    )
    torch.testing.assert_close(found.scores["masking"], expected.scores["masking"])
    with pytest.raises(ValueError, match=r"`grid` must give rows and columns of patches .* got \(2, 2, 1\)"):
        feature_importance(Patches(), image, lambda model, x, _: model(x), replacement=0.0, grid=(2, 2, 1))


def test_rankings_of_somebody_else_are_put_to_the_same_test(tokens: Tensor) -> None:
    def ask(**options: Any) -> Any:
        return feature_importance(Reader(), tokens, lambda m, x, v: m(x, v), replacement=MASK, **options)

    plain = ask()
    found = ask(rankings={"mine": plain.scores["masking"], "reversed": -plain.scores["masking"]})
    for part in ("comprehensiveness", "sufficiency"):
        torch.testing.assert_close(getattr(found, part)["mine"], getattr(plain, part)["masking"])
    better, worse = (found.comprehensiveness[name].mean() for name in ("mine", "reversed"))
    assert better > worse
    assert "| mine |" in found.summary()
    with pytest.raises(ValueError, match=r"`rankings` must have shape \(samples, features\) = .* for 'short'"):
        ask(rankings={"short": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="`rankings` must not use the names of the scores that are computed"):
        ask(rankings={"value": plain.scores["value"]})


def test_says_so_where_masking_changes_nothing(tokens: Tensor) -> None:
    model = Reader()
    with pytest.raises(RuntimeError, match="Masking every feature leaves all probabilities"):
        feature_importance(model, tokens, lambda m, x, valid: m(tokens[: len(x)], None), replacement=MASK)
    with pytest.raises(RuntimeError, match="heed `valid`"):  # hidden tokens that nobody hides
        feature_importance(model, tokens, lambda m, x, valid: m(x, None))


def test_refusals(tokens: Tensor) -> None:
    model = Reader()
    with pytest.raises(ValueError, match="`logits` must return"):
        feature_importance(model, tokens, lambda m, x, valid: m(x)[:, 0], replacement=MASK)
    with pytest.raises(ValueError, match="`valid` must have shape"):
        feature_importance(model, tokens, run, valid=torch.ones(2, 3), replacement=MASK)
    with pytest.raises(ValueError, match="`grid` must give"):
        feature_importance(model, torch.rand(1, 3, 8, 8), run, replacement=0.0, grid=(3, 2))
    with pytest.raises(ValueError, match="`replacement` must say"):
        feature_importance(model, torch.rand(1, 3, 8, 8), run, grid=(2, 2))
    bag = nn.Sequential(nn.Embedding(6, 2))
    with pytest.raises(ValueError, match="No self-attention over the 6 features"):
        feature_importance(bag, tokens, lambda m, x, valid: _recorded(m, x), replacement=MASK)


def _recorded(model: nn.Module, tokens: Tensor) -> Tensor:
    from attn_callbacks import record

    hidden = model(tokens)
    record("narrow", hidden[:, None, :2, :2].softmax(dim=-1))
    return hidden.sum(dim=1)


@pytest.mark.parametrize("is_eager", [False, True])
def test_a_frozen_model_on_token_ids(is_eager: bool) -> None:
    model = nn.Sequential(nn.Embedding(6, 8), EagerAttention() if is_eager else SelfAttention(), nn.Linear(8, 2))
    tokens = torch.randint(1, 6, (3, TOKENS))

    def last(m: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
        hidden = m[0](x)
        hidden += 1.0  # as position embeddings are added by some
        return m[2](m[1](hidden))[:, -1]

    expected = feature_importance(model, tokens, last, replacement=MASK).scores
    model.requires_grad_(False)
    found = feature_importance(model, tokens, last, replacement=MASK).scores
    for name in METHODS:
        torch.testing.assert_close(found[name], expected[name], msg=name, equal_nan=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_forward_has_more_samples_than_were_allowed() -> None:
    tokens = torch.randint(3, 6, (7, TOKENS))
    valid = torch.arange(TOKENS) < torch.tensor([6, 5, 4, 6, 4, 6, 5])[:, None]
    sizes: list[int] = []

    def counted(m: nn.Module, x: Tensor, v: Tensor | None) -> Tensor:
        sizes.append(len(x))
        return m(x, v)

    few = feature_importance(Reader(), tokens, counted, valid=valid, replacement=MASK, batch_size=3)
    assert max(sizes) == 3
    many = feature_importance(Reader(), tokens, counted, valid=valid, replacement=MASK)
    for name in METHODS:
        torch.testing.assert_close(few.scores[name], many.scores[name], equal_nan=True)
    assert few.summary() == many.summary()


class Strict(Reader):
    """Where all keys are hidden, there is no number."""

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        found = super().forward(tokens, valid)
        return found if valid is None else found.masked_fill(~valid.any(dim=1, keepdim=True), torch.nan)


def test_samples_that_lose_all_tokens_are_named(tokens: Tensor) -> None:
    valid = torch.ones_like(tokens, dtype=torch.bool)
    whole = feature_importance(Strict(), tokens, run, valid=valid)  # masks no more than half of them
    assert not whole.comprehensiveness["masking"].isnan().any()
    valid[1, 1:] = False
    with pytest.raises(ValueError, match=r"NaN for samples \[1\]"):
        feature_importance(Strict(), tokens, run, valid=valid)
    with pytest.raises(ValueError, match=r"NaN for samples \[0, 1\]"):
        feature_importance(Strict(), tokens, run, valid=valid, shares=(0.1, 1.0))


def test_the_summary_counts_who_has_a_value(tokens: Tensor) -> None:
    found = feature_importance(Reader(), tokens.repeat(2, 1), run, replacement=MASK)
    assert "of" not in found.summary()
    for part in (found.comprehensiveness, found.sufficiency):
        part["value"][1] = torch.nan
    kept = found.comprehensiveness["value"].mean(dim=1)[[0, 2, 3]]
    line = next(line for line in found.summary().splitlines() if line.startswith("| value"))
    assert f"{float(kept.mean()):+.3f} ± {float(kept.std() / 3**0.5):.3f} (3 of 4)" in line


def test_what_cannot_be_asked_is_said_before_anything_runs(tokens: Tensor) -> None:
    runs: list[int] = []

    def counted(m: nn.Module, x: Tensor, v: Tensor | None) -> Tensor:
        runs.append(len(x))
        return m(x, v)

    for shares in ((), (2,), (0.1, 0.0)):
        with pytest.raises(ValueError, match="`shares` must hold shares of the features, above 0 and at most 1"):
            feature_importance(Reader(), tokens, counted, replacement=MASK, shares=shares)
    with pytest.raises(ValueError, match="`inputs` holds no sample"):
        feature_importance(Reader(), tokens[:0], counted, replacement=MASK)
    assert not runs
    for wrong in (torch.tensor([0, 2]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="`target` must hold classes from 0 to 1"):
            feature_importance(Reader(), tokens, counted, replacement=MASK, target=wrong)


def test_inputs_made_in_inference_mode(tokens: Tensor) -> None:
    with torch.inference_mode():
        ids, valid = tokens.clone(), torch.ones_like(tokens, dtype=torch.bool)
        found = feature_importance(Reader(), ids, run, valid=valid, replacement=MASK)
    assert found.scores["masking"].argmax(dim=1).tolist() == [3, 3]


@pytest.mark.slow
def test_minilm_reads_the_word_that_decides() -> None:
    transformers = pytest.importorskip("transformers")
    from examples.sentiment_data import minilm

    try:
        folder = minilm()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)

    def embedded(texts: list[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"].bool()

    def pooled(m: nn.Module, ids: Tensor, valid: Tensor | None) -> Tensor:
        mask = torch.ones_like(ids) if valid is None else valid.long()
        hidden = m(input_ids=ids, attention_mask=mask).last_hidden_state
        return nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)

    with torch.no_grad():
        topics = pooled(model.eval(), *embedded(["animals, pets, cats and dogs", "money, banks and finance"]))
    ids, valid = embedded(["the cat lay on the old chair", "we paid it into the bank on monday"])
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    found = feature_importance(
        model, ids, lambda m, x, v: 10 * pooled(m, x, v) @ topics.T, valid=valid, features=~special,
        replacement=tokenizer.mask_token_id,
    )  # fmt: skip
    words = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in ids]
    best = found.scores["masking"].nan_to_num(-9.0).argmax(dim=1).tolist()
    assert found.target.tolist() == [0, 1]
    assert [words[sample][place] for sample, place in enumerate(best)] == ["cat", "bank"]
    assert len(found.layer_names) == 6
    assert not any(values[~special & valid].isnan().any() for values in found.scores.values())

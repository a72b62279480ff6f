"""Ablation: hand-computed games, whole runs without any shortcut, sets, means, budgets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.analysis.ablation import ablate_heads
from attn_callbacks.capture import AttentionCall, AttentionNotFoundError, AttentionRecorder, HeadIntervention, call_name
from tests.analysis.games import Game, covering, game_loss, ones
from tests.capture.reference import SelfAttention, Stack, left_behind
from tests.capture.test_intervention import out_of
from tests.capture.zoo import FAMILIES, INPUTS, Family, build

LAYER = "players.0"


def naive(model: nn.Module, batch: Any, loss: Any, name: str, head: int, value: Tensor | float = 0.0) -> Tensor:
    """How much each loss rises, from two whole runs."""

    def change(call: AttentionCall) -> Tensor | None:
        if call_name(call) != name:
            return None
        output = call.output.clone()
        output[:, head] = value
        return output

    with torch.no_grad():
        with HeadIntervention(model, lambda call: None):
            plain = loss(model, batch)
        with HeadIntervention(model, change):
            return (loss(model, batch) - plain).double()


def test_a_game_of_two() -> None:
    found = ablate_heads(Game(), [ones()], game_loss(covering), [(LAYER, 0), (LAYER, 1), [(LAYER, 1), (LAYER, 0)]])
    torch.testing.assert_close(found.change, torch.tensor([[0.2, 0.1]], dtype=torch.float64))
    torch.testing.assert_close(found.set_change, torch.tensor([1.0], dtype=torch.float64))
    assert found.sets == (((LAYER, 0), (LAYER, 1)),)
    assert found.loss == pytest.approx(1.0)
    assert found.standard_error[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    assert found.samples.tolist() == [[4, 4]]
    assert found.reused_prefix
    assert found.is_complete


def test_standard_errors_are_those_of_paired_differences() -> None:
    numbers = torch.tensor([[[1.0, 5.0]], [[3.0, 1.0]], [[2.0, 0.0]]])
    batches = [numbers[:2], numbers[2:]]
    found = ablate_heads(Game(), batches, game_loss(lambda outputs: 100 * numbers_of(outputs) + outputs[:, 0, 0]))
    changes = np.array([1.0, 3.0, 2.0]) * -1
    assert found.change[0, 0].item() == pytest.approx(changes.mean() - 100 * 0, abs=1e-9)
    assert found.standard_error[0, 0].item() == pytest.approx(changes.std(ddof=1) / math.sqrt(3))


def numbers_of(outputs: Tensor) -> Tensor:
    """Something that differs between samples and does not hang on the first head."""
    return outputs[:, 0, 1].round()


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_hugging_face_models_as_in_whole_runs(family: Family, kind: str) -> None:
    if kind not in family.kinds:
        pytest.skip("the model has no such attention")
    model, batch = build(family, kind), INPUTS[family.inputs]()
    with AttentionRecorder(model) as recorder, torch.no_grad():
        model(**batch)
    names = [call_name(call) for call in recorder.calls]
    wanted = [(names[0], 1), (names[-1], 2)]
    found = ablate_heads(model, [batch], squashed, [*wanted, (names[-1], 0)])
    assert found.reused_prefix
    assert found.layer_names == tuple(names)
    for name, head in wanted:
        expected = naive(model, batch, squashed, name, head)
        layer = found.layer_names.index(name)
        torch.testing.assert_close(found.change[layer, head], expected.mean(), rtol=1e-4, atol=1e-7)
        assert abs(float(expected.mean())) > 1e-6
    assert left_behind() == []


def squashed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return out_of(model(**batch)).float().flatten(1).tanh().mean(dim=1)


def test_the_mean_is_that_of_valid_tokens_of_all_batches() -> None:
    family = next(family for family in FAMILIES if family.name == "Bert")
    model, padded = build(family, "sdpa"), INPUTS["right"]()
    other = {name: value[:1, :7] for name, value in INPUTS["none"]().items()}
    batches = [padded, other]
    total, count = 0.0, 0.0
    for batch in batches:
        with AttentionRecorder(model) as recorder, torch.no_grad():
            model(**batch)
        name, output = recorder.calls[1].name, recorder.calls[1].output.double()
        valid = batch.get("attention_mask", torch.ones(batch["input_ids"].shape)).double()
        total = total + np.einsum("bhqd,bq->hd", output.numpy(), valid.numpy())
        count += float(valid.sum())
    mean = torch.tensor(total / count)
    expected = torch.cat([naive(model, batch, squashed, name, 2, mean[2].float()) for batch in batches]).mean()
    found = ablate_heads(model, batches, squashed, [(name, 2)], value="mean")
    torch.testing.assert_close(found.change[1, 2], expected, rtol=1e-3, atol=1e-8)
    assert found.value == "mean"
    zero = ablate_heads(model, batches, squashed, [(name, 2)])
    assert abs(float(zero.change[1, 2] - expected)) > 1e-5


def test_heads_that_say_the_same_of_every_input_are_missed_by_nobody_who_knows_their_mean() -> None:
    loss = game_loss(lambda outputs: (outputs - 1).square().sum(dim=(1, 2)))
    assert ablate_heads(Game(), [ones()], loss, value="mean").change.tolist() == [[0.0, 0.0]]
    assert ablate_heads(Game(), [ones()], loss).change.tolist() == [[1.0, 1.0]]


def test_layers_with_other_numbers_of_heads_are_filled_up() -> None:
    model = nn.Sequential(SelfAttention(8, 2), SelfAttention(8, 4))
    batch = torch.randn(3, 5, 8)
    found = ablate_heads(model, [batch], lambda model, batch: model(batch).square().mean(dim=(1, 2)))
    assert found.change.isnan().tolist() == [[False, False, True, True], [False] * 4]
    assert found.samples.tolist() == [[3, 3, 0, 0], [3] * 4]
    only = ablate_heads(model, [batch], lambda model, batch: model(batch).square().mean(dim=(1, 2)), layers=["1"])
    assert only.layer_names == ("1",)
    torch.testing.assert_close(only.change[0], found.change[1])


def test_grouped_queries_are_heads_of_their_own() -> None:
    class Grouped(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            query, key = tokens.view(2, 5, 4, 4).transpose(1, 2), tokens[..., :8].view(2, 5, 2, 4).transpose(1, 2)
            return F.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    batch = torch.randn(2, 5, 16)
    found = ablate_heads(Grouped(), [batch], lambda model, batch: model(batch).sum(dim=(1, 2, 3)))
    with torch.no_grad():
        expected = -Grouped()(batch).sum(dim=(2, 3)).double().mean(dim=0)
    torch.testing.assert_close(found.change[0], expected, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_called_twice_has_two_rows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SelfAttention(8, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(self.layer(tokens))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean(dim=(1, 2))

    model, batch = Twice(), torch.randn(3, 5, 8)
    found = ablate_heads(model, [batch], loss)
    assert found.layer_names == ("layer", "layer#1")
    for layer, name in enumerate(found.layer_names):
        for head in range(2):
            expected = naive(model, batch, loss, name, head).mean()
            torch.testing.assert_close(found.change[layer, head], expected, rtol=1e-4, atol=1e-7)
    assert len(set(found.change.flatten().tolist())) == 4


def test_batches_and_their_order_do_not_matter() -> None:
    model, data = Stack(SelfAttention(), SelfAttention()), torch.randn(12, 5, 8)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum(dim=1)

    whole, parts, turned = (
        ablate_heads(model, batches, loss) for batches in ([data], data.split(5), list(data.split(5))[::-1])
    )
    for other in (parts, turned):
        torch.testing.assert_close(other.change, whole.change, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(other.standard_error, whole.standard_error, rtol=1e-4, atol=1e-7)


def test_a_loss_without_a_gradient_will_do() -> None:
    found = ablate_heads(Game(), [ones()], game_loss(lambda outputs: (outputs.sum(dim=(1, 2)) < 1.5).long()))
    assert found.change.tolist() == [[1.0, 1.0]]


def test_samples_that_do_not_count() -> None:
    numbers = torch.tensor([[[1.0, 1.0]], [[9.0, 9.0]], [[3.0, 1.0]]])
    loss = game_loss(lambda outputs: outputs.sum(dim=(1, 2)).where(torch.tensor([True, False, True]), torch.nan))
    found = ablate_heads(Game(), [numbers], loss)
    assert found.change.tolist() == [[-2.0, -1.0]]
    assert found.samples.tolist() == [[2, 2]]
    assert found.loss == pytest.approx(3.0)


def test_the_time_is_up() -> None:
    shares: list[float] = []
    found = ablate_heads(Game(), [ones()] * 2, game_loss(covering), seconds=1e-9, progress=shares.append)
    assert found.change.isnan().all()
    assert not found.is_complete
    assert found.samples.tolist() == [[0, 0]]
    assert shares == [0.0]


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    shares: list[float] = []
    ablate_heads(Game(), [ones()] * 2, game_loss(covering), progress=shares.append)
    assert shares == [0.0, 0.25, 0.5, 0.75, 1.0]
    ablate_heads(Game(), [ones()], game_loss(covering), progress=True)
    assert "100%" in capsys.readouterr().err


def test_what_changes_nothing_fails() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = SelfAttention()

        def forward(self, tokens: Tensor) -> Tensor:
            return tokens.sum(dim=1) + 0 * self.attention(tokens).sum(dim=1)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum(dim=1)

    with pytest.raises(RuntimeError, match="stays as it is with all heads off"):
        ablate_heads(Idle(), [torch.randn(2, 5, 8)], loss)
    other, batch = SelfAttention(), torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError, match="`loss` runs no attention of `model`"):
        ablate_heads(SelfAttention(), [batch], lambda model, batch: other(batch).sum(dim=(1, 2)))
    with pytest.raises(AttentionNotFoundError):
        ablate_heads(nn.Linear(8, 8), [batch], lambda model, batch: model(batch).sum(dim=(1, 2)))


def test_one_batch_that_does_not_change_is_no_failure() -> None:
    batches = [torch.zeros(2, 1, 2), ones(2)]
    found = ablate_heads(Game(), batches, game_loss(lambda outputs: outputs.sum(dim=(1, 2))))
    assert found.change.tolist() == [[-0.5, -0.5]]


def test_what_is_wrong_is_said() -> None:
    model, loss = Game(), game_loss(covering)
    with pytest.raises(ValueError, match=r"\('players.0', 2\)` is no head.*'players.0' with 2"):
        ablate_heads(model, [ones()], loss, [(LAYER, 2)])
    with pytest.raises(ValueError, match="`heads` holds no head"):
        ablate_heads(model, [ones()], loss, [])
    with pytest.raises(ValueError, match="empty set"):
        ablate_heads(model, [ones()], loss, [[]])
    with pytest.raises(ValueError, match="`batches` holds no batch"):
        ablate_heads(model, [], loss)
    with pytest.raises(ValueError, match=r"one loss per sample, a tensor of shape \(samples,\), got shape \(\)"):
        ablate_heads(model, [ones()], lambda model, batch: model(batch).mean())
    with pytest.raises(ValueError, match="`value` must be one of 'zero', 'mean', got 'none'"):
        ablate_heads(model, [ones()], loss, value="none")
    with pytest.raises(ValueError, match="`seconds` must be above 0"):
        ablate_heads(model, [ones()], loss, seconds=0)
    with pytest.raises(ValueError, match="`layers` names no attention module: 'other'"):
        ablate_heads(model, [ones()], loss, layers=["other"])


def test_weights_have_no_mean() -> None:
    class Einsum(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
            weights = (heads @ heads.mT).softmax(dim=-1)
            return torch.einsum("bhij,bhjd->bihd", weights, heads).flatten(2)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum(dim=(1, 2))

    batch = torch.randn(2, 5, 8)
    assert not ablate_heads(Einsum(), [batch], loss).change.isnan().any()
    with pytest.raises(ValueError, match="'Einsum' mixes its values by an einsum of its own"):
        ablate_heads(Einsum(), [batch], loss, value="mean")


def test_as_a_dict() -> None:
    found = ablate_heads(Game(), [ones()], game_loss(covering), [[(LAYER, 0), (LAYER, 1)]]).to_dict()
    assert found["sets"] == [[[LAYER, 0], [LAYER, 1]]]
    assert found["set_change"] == pytest.approx([1.0])
    assert found["layer_names"] == [LAYER]
    assert all(isinstance(value, (str, bool, float, list)) for value in found.values())

"""Gate importance: exact where the loss is linear, per example, and the errors of run_bertology as regressions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.analysis.ablation import ablate_heads
from attn_callbacks.analysis.head_importance import head_importance
from attn_callbacks.capture import AttentionRecorder, call_name
from tests.analysis.games import Game, covering, game_loss, ones
from tests.callbacks.models import WIDTH, TextEncoder, Texts
from tests.capture.reference import SelfAttention, Stack, left_behind
from tests.capture.test_intervention import out_of
from tests.capture.zoo import FAMILIES, INPUTS, Family, build


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(dim=1)


def test_first_order_is_exact_where_the_loss_is_linear() -> None:
    numbers = torch.randn(6, 2, 3)
    weights = torch.randn(2, 3)
    loss = game_loss(lambda outputs: (outputs * weights).sum(dim=(1, 2)))
    found = head_importance(Game(2), numbers.split(4), loss)
    gradients = (numbers * weights).double().numpy()
    assert np.allclose(found.importance, np.abs(gradients).mean(axis=0))
    assert np.allclose(found.standard_error, np.abs(gradients).std(axis=0, ddof=1) / math.sqrt(6))
    assert np.allclose(found.signed, gradients.mean(axis=0))
    assert np.allclose(found.signed_error, gradients.std(axis=0, ddof=1) / math.sqrt(6))
    torch.testing.assert_close(found.change, ablate_heads(Game(2), [numbers], loss).change, rtol=1e-5, atol=1e-6)
    assert found.layer_names == ("players.0", "players.1")
    assert (found.samples, found.is_complete) == (6, True)
    assert found.loss == pytest.approx(float((numbers * weights).sum(dim=(1, 2)).mean()), rel=1e-5)


def test_sizes_are_taken_of_each_example() -> None:
    """run_bertology takes the size of a batch's sum: a head that helps one and harms another is worth nothing there."""
    numbers = torch.tensor([[[1.0, 1.0]], [[-1.0, 1.0]]])
    found = head_importance(Game(), [numbers], game_loss(lambda outputs: outputs.sum(dim=(1, 2))))
    assert found.importance.tolist() == [[1.0, 1.0]]
    assert found.signed.tolist() == [[0.0, 1.0]]


def test_batches_and_their_order_do_not_matter() -> None:
    """run_bertology never clears the gradient of its mask: batch t adds the size of the sum of all batches so far."""
    model, data = Stack(SelfAttention(), SelfAttention()), torch.randn(12, 5, 8)
    whole = head_importance(model, [data], squared)
    for batches in (data.split(5), list(data.split(5))[::-1], data.split(1)):
        found = head_importance(model, batches, squared)
        for name in ("importance", "standard_error", "signed", "confidence"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-4, atol=1e-7)


def test_samples_that_do_not_count() -> None:
    numbers = torch.tensor([[[1.0, 1.0]], [[9.0, 9.0]], [[3.0, 1.0]]])
    loss = game_loss(lambda outputs: outputs.sum(dim=(1, 2)).where(torch.tensor([True, False, True]), torch.nan))
    found = head_importance(Game(), [numbers], loss)
    assert found.importance.tolist() == [[2.0, 1.0]]
    assert (found.samples, found.loss) == (2, 3.0)


def test_a_second_call_begins_anew() -> None:
    model, data = Stack(SelfAttention()), torch.randn(4, 5, 8)
    assert torch.equal(head_importance(model, [data], squared).signed, head_importance(model, [data], squared).signed)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_hugging_face_models_by_the_definition(family: Family, kind: str) -> None:
    if kind not in family.kinds:
        pytest.skip("the model has no such attention")
    model, batch = build(family, kind), INPUTS[family.inputs]()
    found = head_importance(model, [batch], squashed)
    with AttentionRecorder(model) as recorder:
        losses = squashed(model, batch)
    assert found.layer_names == tuple(map(call_name, recorder.calls))
    for layer, call in enumerate(recorder.calls):
        sizes = []
        for sample in range(2):
            (gradient,) = torch.autograd.grad(losses[sample], call.output, retain_graph=True)
            own = (call.output * gradient).detach().double().reshape(*call.shape[:2], -1).sum(dim=-1)
            sizes.append(own.sum(dim=0).abs())  # the other sample's is 0
        torch.testing.assert_close(found.importance[layer], torch.stack(sizes).mean(dim=0), rtol=2e-3, atol=1e-6)
    assert left_behind() == []


def squashed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return out_of(model(**batch)).float().flatten(1).tanh().mean(dim=1)


def test_confidence_is_the_mean_largest_weight_of_valid_queries() -> None:
    family = next(family for family in FAMILIES if family.name == "Bert")
    model, batch = build(family, "sdpa"), INPUTS["right"]()
    with AttentionRecorder(model) as recorder, torch.no_grad():
        model(**batch)
    found = head_importance(model, [batch], squashed)
    for layer, call in enumerate(recorder.calls):
        largest = call.weights().double().numpy().max(axis=-1)
        rows = [largest[sample][:, batch["attention_mask"][sample].bool().numpy()].mean(axis=-1) for sample in (0, 1)]
        assert np.allclose(found.confidence[layer], np.mean(rows, axis=0), atol=1e-6)


def test_windows_of_a_sample_are_added_up() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = SelfAttention()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.attention(tokens.unflatten(1, (4, -1)).flatten(0, 1)).unflatten(0, (-1, 4)).sum(dim=(1, 2))

    model, data = Windows(), torch.randn(3, 8, 8)
    found = head_importance(model, [data], squared)
    alone = torch.stack([head_importance(model, [data[n : n + 1]], squared).signed[0] for n in range(3)])
    torch.testing.assert_close(found.importance[0], alone.abs().mean(dim=0), rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_called_twice_has_two_rows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SelfAttention()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(self.layer(tokens)).sum(dim=1)

    found = head_importance(Twice(), [torch.randn(3, 5, 8)], squared)
    assert found.layer_names == ("layer", "layer#1")
    assert len(set(found.importance.flatten().tolist())) == 4


def test_a_model_that_a_loss_runs_twice_has_one_row() -> None:
    model, data = Stack(SelfAttention()), torch.randn(4, 5, 8)

    def both(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum(dim=1) + 2 * model(batch.flip(1) + 1).sum(dim=1)

    found = head_importance(model, [data], both)
    first = head_importance(model, [data], lambda model, batch: model(batch).sum(dim=1))
    second = head_importance(model, [data], lambda model, batch: 2 * model(batch.flip(1) + 1).sum(dim=1))
    assert found.layer_names == ("layers.0",)
    torch.testing.assert_close(found.signed, first.signed + second.signed, rtol=1e-4, atol=1e-6)


def test_frozen_models_and_half_precision() -> None:
    model, data = Stack(SelfAttention(), SelfAttention()), torch.randn(8, 5, 8)
    expected = head_importance(model, [data], squared).importance
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(head_importance(model, [data], squared).importance, expected)
    half = head_importance(model.bfloat16(), [data.bfloat16()], squared).importance
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.02)


def test_inside_no_grad() -> None:
    model, data = Stack(SelfAttention()), torch.randn(4, 5, 8)
    expected = head_importance(model, [data], squared)
    with torch.no_grad():
        assert torch.equal(head_importance(model, [data], squared).signed, expected.signed)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, data = TextEncoder(), Texts(256)
    layer = nn.TransformerEncoderLayer(WIDTH, 8, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    model.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    batch = {name: getattr(data, name) for name in ("input_ids", "attention_mask", "labels")}
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(20):
        rows = {name: value[step % 4 * 64 : step % 4 * 64 + 64] for name, value in batch.items()}
        F.cross_entropy(model(rows), rows["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, {name: value[:128] for name, value in batch.items()}


def entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch), batch["labels"], reduction="none")


def test_on_a_trained_model_first_order_goes_with_ablation(trained: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, batch = trained
    first, exact = head_importance(model, [batch], entropy), ablate_heads(model, [batch], entropy)
    both = torch.stack([first.change.flatten(), exact.change.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9
    assert exact.change.max() > 0.01


def test_nothing_is_left_behind() -> None:
    class Noisy(nn.Module):
        """Dropout, batch normalisation, one part in evaluation."""

        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm, self.drop = SelfAttention(dropout=0.3), nn.BatchNorm1d(8), nn.Dropout(0.4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.drop(self.norm(self.attention(tokens).sum(dim=1)))

    model, data = Noisy().train(), torch.randn(4, 5, 8)
    model.norm.eval()
    model.attention.out.weight.grad = torch.ones_like(model.attention.out.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags, state = [part.training for part in model.modules()], torch.get_rng_state()
    attributes = [set(vars(part)) for part in model.modules()]
    for measure in (head_importance, ablate_heads):
        found: Any = [measure(model, [data], squared) for _ in range(2)]
        assert found[0].to_dict() == found[1].to_dict()  # in evaluation there is no dropout
        with pytest.raises(ZeroDivisionError):
            measure(model, [data], lambda model, batch: model(batch).sum(dim=1) / (1 // 0))
        assert [part.training for part in model.modules()] == flags
        assert [set(vars(part)) for part in model.modules()] == attributes
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        graded = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert list(graded) == ["attention.out.weight"]
        assert bool((graded["attention.out.weight"] == 1).all())
        assert left_behind() == []


def test_a_layer_that_no_gradient_reaches_is_not_known() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = SelfAttention(), SelfAttention()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.second(self.first(tokens).detach()).sum(dim=1)

    found = head_importance(Cut(), [torch.randn(3, 5, 8)], squared)
    assert found.importance.isnan().tolist() == [[True, True], [False, False]]


def test_what_says_nothing_fails() -> None:
    data = torch.randn(3, 5, 8)
    with pytest.raises(RuntimeError, match="No gradient of the loss reaches a head"):
        head_importance(Stack(SelfAttention()), [data], lambda model, batch: 0 * model(batch).sum(dim=1))
    with pytest.raises(ValueError, match="values without a graph"):
        head_importance(Stack(SelfAttention()), [data], lambda model, batch: model(batch).sum(dim=1).detach())
    with pytest.raises(ValueError, match="attends on 3 maps for 2 losses"):
        head_importance(Stack(SelfAttention()), [data], lambda model, batch: model(batch).sum(dim=1)[:2])


def test_the_time_is_up_after_one_batch() -> None:
    found = head_importance(Game(), [ones()] * 3, game_loss(covering), seconds=1e-9)
    assert (found.samples, found.is_complete) == (4, False)
    assert found.importance[0].tolist() == pytest.approx([0.2, 0.1])


def test_as_a_dict() -> None:
    found = head_importance(Game(), [ones()], game_loss(covering)).to_dict()
    assert found["change"][0] == pytest.approx([0.2, 0.1])
    assert found["layer_names"] == ["players.0"]
    assert all(isinstance(value, (str, bool, int, float, list)) for value in found.values())

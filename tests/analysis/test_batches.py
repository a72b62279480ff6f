"""Batches that differ: in layers, in heads, in what a module keeps of them, and in how they were made."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.analysis import (
    ablate_heads,
    head_interactions,
)
from attn_callbacks.analysis._batches import outside_inference
from tests.analysis.games import ones
from tests.analysis.runs import ALL, Run
from tests.capture.reference import SelfAttention

every_run = pytest.mark.parametrize("run", ALL.values(), ids=ALL)


def squared(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).flatten(1).square().sum(dim=1)


class Deep(nn.Module):
    """Long inputs run more layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention(8, 2) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in [*self.layers][:: 1 if tokens.shape[1] > 4 else 2]:
            tokens = tokens + layer(tokens)
        return tokens


def test_layers_that_run_in_later_batches_only_are_found() -> None:
    model, batches = Deep(), [torch.randn(3, 4, 8), torch.randn(3, 6, 8)]
    names = ("layers.0", "layers.1", "layers.2")
    found = {name: run(model, batches, squared) for name, run in ALL.items()}
    turned = {name: run(model, batches[::-1], squared) for name, run in ALL.items()}
    for name in found:
        if name != "exact":  # which takes the heads that it was told
            assert found[name].layer_names == turned[name].layer_names == names, name
    for name, field in (("importance", "importance"), ("ablation", "change"), ("means", "change")):
        torch.testing.assert_close(
            getattr(found[name], field), getattr(turned[name], field), equal_nan=True, rtol=1e-4, atol=1e-6
        )
    assert found["ablation"].samples[:, 0].tolist() == [6, 6, 6]  # taking away what does not run changes nothing
    assert found["importance"].importance.isfinite().all()
    assert len(found["pruning"].heads) == 6
    only = ablate_heads(model, batches, squared, layers=["layers.0", "layers.2"])
    assert only.layer_names == ("layers.0", "layers.2")


@pytest.mark.parametrize("is_inside", [False, True], ids=["made in inference mode", "run in it too"])
@every_run
def test_batches_made_in_inference_mode(run: Run, is_inside: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8), SelfAttention(8, 2))
    plain = torch.randn(4, 5, 8)

    def loss(model: nn.Module, batch: dict[str, list[Tensor]]) -> Tensor:
        return squared(model, batch["tokens"][0])

    with torch.inference_mode():
        batch = {"tokens": [plain.clone()], "text": "a"}
    assert batch["tokens"][0].is_inference()
    with torch.inference_mode(is_inside):
        found = run(model, [batch], loss)
    assert found.to_dict() == run(model, [{"tokens": [plain]}], loss).to_dict()
    assert batch["tokens"][0].is_inference()  # what the caller holds stays his


def test_only_what_needs_it_is_copied() -> None:
    pair = namedtuple("pair", "first second")
    fine = {"a": [torch.ones(1)], "b": pair(torch.ones(1), 2)}
    assert outside_inference(fine) is fine
    with torch.inference_mode():
        frozen = torch.ones(2)
    for batch in (pair(frozen, 1), (frozen, 1), [frozen], UserDict(x=frozen), {"x": (frozen,)}):
        found = outside_inference(batch)
        assert type(found) is type(batch)
        (inner, *_) = found.values() if hasattr(found, "values") else found
        inner = inner[0] if isinstance(inner, tuple) else inner
        assert not inner.is_inference()


class Hidden(nn.Module):
    """On long inputs, the first block's output reaches the end behind the back of whoever watches outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Noting([self]) for _ in range(3))
        self.seen = torch.zeros(())

    def forward(self, tokens: Tensor) -> Tensor:
        first = tokens
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number == 0:
                first = self.seen if tokens.shape[1] > 5 else tokens
        return tokens + first


class _Noting(nn.Module):
    def __init__(self, owner: list[nn.Module]) -> None:
        super().__init__()
        self.attention, self._owner = SelfAttention(8, 2), owner

    def forward(self, tokens: Tensor) -> Tensor:
        self._owner[0].seen = tokens + self.attention(tokens)
        return self._owner[0].seen


@pytest.mark.parametrize("order", [1, -1])
def test_prefixes_are_checked_in_each_batch(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hidden()
    batches = [torch.randn(4, 4, 8), torch.randn(4, 6, 8)][::order]
    found = ablate_heads(model, batches, squared)
    pairs = [((0, 0), (2, 1)), ((1, 0), (2, 0)), ((0, 1), (1, 1))]
    paired = head_interactions(model, batches, squared, pairs)
    assert not found.reused_prefix
    assert ablate_heads(model, [batch for batch in batches if batch.shape[1] < 5], squared).reused_prefix
    monkeypatch.setattr("attn_callbacks.analysis._experiment.HeadExperiment.can_reuse", lambda *args: False)
    torch.testing.assert_close(found.change, ablate_heads(model, batches, squared).change, rtol=1e-4, atol=1e-6)
    whole = head_interactions(model, batches, squared, pairs)
    torch.testing.assert_close(paired.interaction, whole.interaction, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_layer_with_other_numbers_of_heads_in_another_batch() -> None:
    class Changing(nn.Module):
        def forward(self, numbers: Tensor) -> Tensor:
            value = numbers[:, 0, :, None, None].expand(-1, -1, 3, 1)
            return F.scaled_dot_product_attention(value, value, value).sum(dim=(1, 2, 3))

    with pytest.raises(ValueError, match="'Changing' has 2 heads in one batch and 4 in another"):
        ablate_heads(Changing(), [ones(), ones(4, 1, 4)], lambda model, batch: model(batch))

"""Runs that begin in the middle: what is saved, what is the same, and when it is left alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis.ablation import ablate_heads
from attn_callbacks.capture import AttentionCall, HeadIntervention, call_name
from tests.capture.reference import EagerAttention, SelfAttention, Stack, left_behind

DATA = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).flatten(1).square().sum(dim=1)


class Block(nn.Module):
    """Norm, attention, norm, dropout; counts its runs."""

    def __init__(self, attention: type[nn.Module] = SelfAttention) -> None:
        super().__init__()
        self.before, self.attention, self.after = nn.LayerNorm(8), attention(), nn.LayerNorm(8)
        self.drop, self.runs = nn.Dropout(0.5), 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        return tokens + self.drop(self.after(self.attention(self.before(tokens))))


def whole_runs(model: nn.Module, heads: int = 2) -> dict[tuple[str, int], float]:
    """What two whole runs say of each head."""
    names: list[str] = []
    model.eval()
    with torch.no_grad():
        with HeadIntervention(model, lambda call: names.append(call_name(call))):
            plain = squared(model, DATA)
        found = {}
        for name in names:
            for head in range(heads):

                def change(call: AttentionCall, name: str = name, head: int = head) -> Tensor | None:
                    if call_name(call) != name:
                        return None
                    output = call.output.clone()
                    output[:, head] = 0.0
                    return output

                with HeadIntervention(model, change):
                    found[name, head] = float((squared(model, DATA) - plain).mean())
    return found


def compare(model: nn.Module, reused: bool) -> None:
    expected = whole_runs(model)
    found = ablate_heads(model, [DATA], squared)
    assert found.reused_prefix == reused
    for (name, head), value in expected.items():
        layer = found.layer_names.index(name)
        assert found.change[layer, head].item() == pytest.approx(value, rel=1e-3, abs=1e-5), (name, head)
    assert len(expected) == found.change.numel()
    assert left_behind() == []
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("attention", [SelfAttention, EagerAttention])
def test_blocks_before_the_head_are_not_run_again(attention: type[nn.Module]) -> None:
    model = nn.Sequential(*(Block(attention) for _ in range(4)))
    compare(model, reused=True)
    before = Counter({place: block.runs for place, block in enumerate(model)})
    experiment = HeadExperiment(model, [DATA], squared, None)
    with experiment.open():
        recorded = experiment.record(DATA)
        for layer in range(4):
            experiment.losses(DATA, [2 * layer], recorded=recorded)
    runs = Counter({place: block.runs for place, block in enumerate(model)}) - before
    assert runs == {0: 3, 1: 4, 2: 5, 3: 6}  # one to find the heads, one to record, and those behind the head


class Shared(nn.Module):
    """One block over and over, one norm in many places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.block, self.other = nn.LayerNorm(8), Block(), Block()
        self.block.before = self.other.after = self.norm

    def forward(self, tokens: Tensor) -> Tensor:
        for _ in range(3):
            tokens = self.norm(self.block(self.norm(tokens)))
        return self.other(self.block(tokens))


def test_modules_that_run_in_several_places() -> None:
    model = Shared()
    assert len(whole_runs(model)) == 10
    compare(model, reused=True)


class TwoInOne(nn.Module):
    """A module that attends itself, after one in it did."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = SelfAttention(), nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(self.inner(self.norm(tokens)))
        heads = tokens.unflatten(-1, (2, 4)).transpose(1, 2)
        first = F.scaled_dot_product_attention(heads, heads, heads)
        return self.norm(F.scaled_dot_product_attention(first, heads, heads).transpose(1, 2).flatten(2))


def test_modules_that_attend_several_times() -> None:
    model = nn.Sequential(TwoInOne(), Block(), TwoInOne())
    assert [name for name, head in whole_runs(model) if head == 0] == [
        *("0.inner", "0", "0#1", "1.attention", "2.inner", "2", "2#1"),
    ]
    compare(model, reused=True)


class Recursive(nn.Module):
    """Runs itself before it attends."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), SelfAttention()

    def forward(self, tokens: Tensor, depth: int = 2) -> Tensor:
        if depth:
            tokens = self(tokens, depth - 1)
        return tokens + self.attention(self.norm(tokens))


def test_modules_that_run_themselves() -> None:
    model = nn.Sequential(Block(), Recursive())
    assert [name for name, head in whole_runs(model) if head == 0][1:] == [f"1.attention{n}" for n in ("", "#1", "#2")]
    compare(model, reused=True)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(8, 8), nn.ModuleList(SelfAttention() for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.embed(tokens)
        for block in self.blocks:
            tokens += block(tokens)
        return tokens


def test_outputs_that_change_in_place_are_not_used() -> None:
    compare(InPlace(), reused=False)


class SometimesInPlace(InPlace):
    """Passes the check on its first batch."""

    def forward(self, tokens: Tensor) -> Tensor:
        if len(tokens) > 2:
            return super().forward(tokens)
        tokens = self.embed(tokens)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


def test_outputs_that_change_in_place_later_on_are_not_used() -> None:
    model = SometimesInPlace()
    found = ablate_heads(model, [DATA[:2], DATA], squared)
    assert not found.reused_prefix
    first, second = (ablate_heads(model, [data], squared) for data in (DATA[:2], DATA))
    assert first.reused_prefix
    assert not second.reused_prefix
    torch.testing.assert_close(found.change, (2 * first.change + 4 * second.change) / 6)


class Remembering(nn.Module):
    """Hands what its first block computed to its last one behind the back of whoever watches outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.seen = nn.ModuleList(_Keeper() for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        for block, keeper in zip(self.blocks, self.seen, strict=True):
            tokens = keeper(block(tokens))
        return tokens + self.seen[0].kept + self.seen[1].kept


class _Keeper(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        self.kept = 2 * tokens
        return tokens


def test_what_modules_keep_to_themselves_shows() -> None:
    compare(Remembering(), reused=False)


class Drawing(nn.Module):
    """Draws numbers in evaluation as well: paired runs get the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = F.dropout(block(tokens), 0.1)
        return tokens


def test_paired_runs_draw_the_same_numbers() -> None:
    model = Drawing()
    found = [ablate_heads(model, [DATA, DATA], squared) for _ in range(2)]
    assert torch.equal(found[0].change, found[1].change)
    alone = ablate_heads(model, [DATA], squared)
    torch.testing.assert_close(alone.change, found[0].change)
    nothing = HeadExperiment(model, [DATA], squared, None)
    with nothing.open():
        assert torch.equal(nothing.losses(DATA), nothing.losses(DATA))


class Failing(nn.Module):
    """Catches an exception of one of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.broken, self.last = Block(), _Broken(), Block()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.first(tokens)
        try:
            tokens = self.broken(tokens)
        except ZeroDivisionError:
            tokens = tokens + 1
        return self.last(tokens)


class _Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens) / (1 // 0)


def test_exceptions_that_the_model_catches() -> None:
    compare(Failing(), reused=True)


def test_a_loss_that_runs_the_model_twice() -> None:
    model = Stack(Bare(), Bare())

    def both(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) * model(batch.flip(1) + 1)).sum(dim=1)

    found = ablate_heads(model, [DATA], both)
    assert found.layer_names == ("layers.0", "layers.1")
    model.eval()
    for layer, name in enumerate(found.layer_names):
        gate = torch.tensor([1.0, 0.0])[:, None, None]
        change = {name: gate}
        with torch.no_grad():
            plain = both(model, DATA)

            def gated(call: AttentionCall, change: dict[str, Tensor] = change) -> Tensor | None:
                return call.output * change[call.name] if call.name in change else None

            with HeadIntervention(model, gated):
                expected = float((both(model, DATA) - plain).mean())
        assert found.change[layer, 1].item() == pytest.approx(expected, rel=1e-3)


class Bare(SelfAttention):
    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens)

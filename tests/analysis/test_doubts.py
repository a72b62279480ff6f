"""What experiments refuse to say: of noise, NaN and losses without a gradient; and what time does not suffice for."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.analysis import (
    ablate_heads,
    head_importance,
    head_interactions,
    head_shapley,
    pruning_curve,
)
from tests.analysis.games import Game, covering, game_loss, ones
from tests.analysis.runs import ALL, Run

PAIR = (("players.0", 0), ("players.0", 1))
every_run = pytest.mark.parametrize("run", ALL.values(), ids=ALL)


class Padded(nn.Module):
    """Eager and causal, padded on the left: the queries of padding see nothing and are NaN, and nobody reads them."""

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
        allowed = valid[:, None, None] & torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        weights = (heads @ heads.mT).masked_fill(~allowed, -torch.inf).softmax(dim=-1)
        return (weights @ heads).transpose(1, 2).flatten(2)[:, -1]


def test_means_leave_out_queries_of_padding_that_are_nan() -> None:
    tokens, valid = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool)
    valid[0, :2] = False

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(*batch).square().sum(dim=1)

    found = ablate_heads(Padded(), [(tokens, valid)], loss, value="mean")
    assert found.samples.tolist() == [[3, 3]]
    assert not found.change.isnan().any()
    heads = tokens.unflatten(-1, (2, -1)).transpose(1, 2)
    mixed = [heads[n, :, p:] for n, p in enumerate((2, 0, 0))]
    rows = [(w @ w.mT).masked_fill(~torch.ones(w.shape[1], w.shape[1]).bool().tril(), -torch.inf) for w in mixed]
    outputs = [row.softmax(dim=-1) @ w for row, w in zip(rows, mixed, strict=True)]
    means = torch.cat(outputs, dim=1).mean(dim=1)
    last = torch.stack([each[:, -1] for each in outputs])
    expected = (means.square().sum(dim=-1) - last.square().sum(dim=-1)).mean(dim=0)
    torch.testing.assert_close(found.change[0].float(), expected, rtol=1e-4, atol=1e-5)
    sure = head_importance(Padded(), [(tokens, valid)], loss).confidence
    largest = torch.stack([row.softmax(dim=-1).amax(dim=-1).mean(dim=-1) for row in rows]).mean(dim=0)
    torch.testing.assert_close(sure[0].float(), largest, rtol=1e-4, atol=1e-5)


@every_run
def test_a_loss_that_is_nan_for_every_sample_is_named(run: Run) -> None:
    with pytest.raises(ValueError, match="The loss of every sample is NaN"):
        run(Game(), [ones()], game_loss(lambda outputs: outputs.sum(dim=(1, 2)) * torch.nan))


@pytest.mark.parametrize("run", [run for name, run in ALL.items() if name != "importance"])
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_change(run: Run, seed: int) -> None:
    """Losses that draw from a generator of their own change with all heads off, and without."""
    generator = torch.Generator().manual_seed(seed)
    loss = game_loss(lambda out: 1e-4 * out.sum(dim=(1, 2)) + torch.rand(len(out), generator=generator))
    with pytest.raises(RuntimeError, match=r"Two runs of the unchanged model differ by 0\.\d+ a sample"):
        run(Game(), [ones(16)], loss)


def test_little_noise_is_borne() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = game_loss(lambda out: covering(out) + 1e-3 * torch.rand(len(out), generator=generator))
    assert ablate_heads(Game(), [ones(16)], loss).change[0].tolist() == pytest.approx([0.2, 0.1], abs=1e-2)


@pytest.mark.parametrize("run", [head_importance, head_interactions, pruning_curve])
def test_no_gradient_at_all_is_named(run: Run) -> None:
    gain = torch.ones((), requires_grad=True)
    loss = game_loss(lambda outputs: covering(outputs).detach() + 0 * gain)
    with pytest.raises(RuntimeError, match="No gradient of the loss reaches a head"):
        run(Game(), [ones(), ones()], loss)


def test_a_first_batch_without_a_gradient_is_no_failure() -> None:
    steep = game_loss(lambda outputs: (outputs.sum(dim=(1, 2)) - 1.0).relu())
    assert head_interactions(Game(), [0.1 * ones(), ones()], steep).samples[0, 1] == 8


def test_the_bar_of_a_curve_ends_at_its_end() -> None:
    class Half(Game):
        def forward(self, numbers: Tensor) -> Tensor:
            first, second = (player(numbers[:, layer]) for layer, player in enumerate(self.players))
            return torch.stack([first.detach(), second], dim=1)

    shares: list[float] = []
    curve = pruning_curve(Half(2), [ones(4, 2)], game_loss(lambda x: x.sum(dim=(1, 2))), progress=shares.append)
    assert [name for name, _ in curve.heads] == ["players.1"] * 2  # no gradient reaches the others
    assert curve.is_complete
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


@every_run
def test_whole_passes_over_the_data_keep_to_the_time(run: Run) -> None:
    def slow(model: nn.Module, batch: Tensor) -> Tensor:
        time.sleep(0.01)
        return covering(model(batch))

    begun, shares = time.monotonic(), list[float]()
    found = run(Game(), [ones()] * 100, slow, seconds=0.05, progress=shares.append)
    assert time.monotonic() - begun < 0.4  # a pass over all batches takes a second
    assert not found.is_complete
    assert shares == sorted(shares)
    assert shares[-1] < 1


def test_what_the_time_did_not_suffice_for_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("attn_callbacks.analysis._budget.time.monotonic", lambda: now[0])

    def counted(model: nn.Module, batch: Tensor) -> Tensor:
        now[0] += 1
        return covering(model(batch))

    batches = [ones()] * 10
    mean = ablate_heads(Game(), batches, counted, heads=[PAIR[0]], value="mean", seconds=4)
    assert mean.change.isnan().all()
    assert np.isnan(mean.loss)
    shares: list[float] = []
    game = head_shapley(Game(), batches, counted, heads=PAIR, seconds=15, progress=shares.append)
    assert game.value.isnan().all()
    assert game.all_on == pytest.approx(1.0)
    assert np.isnan([game.all_off, game.gap]).all()
    assert len(shares) > 10  # within a pass too
    curve = pruning_curve(Game(), batches, counted, seconds=15)
    assert (curve.removed, curve.is_complete) == ((0,), False)
    assert np.isnan(curve.loss)

"""Importance gathered in the backward of training steps, against gates that were really there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from attn_callbacks.callbacks import _gate_hook
from tests.callbacks.gating import (
    FORMS,
    LENGTH,
    SAMPLES,
    TARGETS,
    VALUES,
    WIDTH,
    Importance,
    Net,
    Still,
    assert_means,
    data,
    explicit,
    train,
)
from tests.callbacks.models import HEADS, LAYERS, Bert, Classifier, fit, leftovers, loader, pl, quiet_trainer
from tests.capture.reference import left_behind


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [4, 5])
def test_mean_and_standard_error_over_examples(form: str, batch_size: int, tmp_path: Path) -> None:
    module = Still(Net(form))
    callback = train(tmp_path, module, Importance(), batch_size)
    expected = explicit(module.net)
    assert_means(callback, expected)
    (result,) = callback.found
    error = np.abs(expected).std(axis=0, ddof=1) / SAMPLES**0.5
    np.testing.assert_allclose(result.standard_error, error, rtol=1e-4, atol=1e-8)
    assert result.samples.tolist() == [[SAMPLES] * HEADS] * LAYERS
    assert callback.gates.layer_names == tuple(f"net.layers.{n}" for n in range(LAYERS))


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_gradients(parts: int, tmp_path: Path) -> None:
    module = Still()
    assert_means(train(tmp_path, module, Importance(), 2, accumulate_grad_batches=parts), explicit(module.net))


class Scaled(pl.plugins.MixedPrecision):
    """A gradient scaler without half precision: its factor is all that changes."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1))

    def autocast_context_manager(self) -> Any:
        return torch.autocast("cpu", enabled=False)


def test_a_gradient_scaler_whose_scale_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, plugin = Still(), Scaled()
    callback = Importance()
    trainer = quiet_trainer(tmp_path, [callback], plugins=[plugin])
    with monkeypatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "get_scale", lambda self: pytest.fail("waits for the device"))
        fit(module, trainer, data(), data())
    assert plugin.scaler.get_scale() > 1024
    assert_means(callback, explicit(module.net))


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision: str, tmp_path: Path) -> None:
    module = Still()
    expected = explicit(module.net)
    assert_means(train(tmp_path, module, Importance(), precision=precision), expected, tolerance=2e-3)


def test_windows_of_a_sample_are_summed(tmp_path: Path) -> None:
    class Windows(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            tokens = (
                batch[0].repeat_interleave(2, dim=0) * torch.tensor([1.0, -0.5]).repeat(len(batch[0]))[:, None, None]
            )
            return F.cross_entropy(self.net(tokens).unflatten(0, (-1, 2)).mean(dim=1), batch[1])

    module = Windows()
    found = []
    for tokens, target in zip(VALUES, TARGETS, strict=True):
        gates = torch.ones(LAYERS, HEADS, requires_grad=True)
        logits = module.net(torch.stack([tokens, -0.5 * tokens]), gates).mean(dim=0)
        found += torch.autograd.grad(F.cross_entropy(logits, target), gates)
    callback = train(tmp_path, module, Importance())
    assert_means(callback, torch.stack(found).numpy())
    assert callback.found[0].samples.max() == SAMPLES


def test_a_dead_head_has_none(tmp_path: Path) -> None:
    module = Still()
    module.net.layers[1].out.weight.data[:, : WIDTH // HEADS] = 0.0
    means = train(tmp_path, module, Importance()).means
    assert means[1, 0] == 0
    assert (means.flatten()[[0, 1, 3]] > 1e-4).all()


@pytest.mark.parametrize(("every", "samples"), [(2, 8), (3, 4), (9, 4)])
def test_every_nth_step(every: int, samples: int, tmp_path: Path) -> None:
    callback = train(tmp_path, Still(), Importance(every))
    assert callback.found[0].samples.max() == samples


def test_each_validation_has_its_own_steps(tmp_path: Path) -> None:
    callback = train(tmp_path, Still(), Importance(2), max_epochs=4)  # steps 0 2 | 4 | 6 8 | 10
    assert [int(result.samples.max()) for result in callback.found] == [8, 4, 8, 4]
    callback = train(tmp_path, Still(), Importance(4), max_epochs=3)  # steps 0 | 4 | 8
    assert [int(result.samples.max()) for result in callback.found] == [4, 4, 4]
    callback = train(tmp_path, Still(), Importance(6), max_epochs=3)  # steps 0 | none | 6
    assert [result is None for result in callback.found] == [False, True, False]


def test_layers_are_selected(tmp_path: Path) -> None:
    callback = train(tmp_path, Still(), Importance(layers=["net.layers.1"]))
    assert callback.gates.layer_names == ("net.layers.1",)
    assert callback.means.shape == (1, HEADS)


class Noting(Classifier):
    """Writes down every loss, to the last bit."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, lr=0.05)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.losses.append(super().training_step(batch, batch_idx))
        return self.losses[-1]


def twenty_steps(module: Callable[[], Any], folder: Path, *loaders: Any) -> tuple[Any, Any]:
    """Train without and with; nothing may be left."""
    runs = []
    for callbacks in ([], [Importance(3)]):
        torch.manual_seed(0)
        own = module()
        trainer = quiet_trainer(folder, callbacks, max_steps=20, max_epochs=-1)
        fit(own, trainer, *loaders)
        assert trainer.global_step == 20
        assert leftovers(own) == {}
        assert left_behind() == []
        runs.append(own)
    return runs[0], runs[1]


def assert_identical(bare: Any, watched: Any) -> None:
    assert torch.equal(torch.stack(bare.losses), torch.stack(watched.losses))
    state = watched.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in bare.state_dict().items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_is_bit_identical(attention: str, tmp_path: Path) -> None:
    bare, watched = twenty_steps(lambda: Noting(Bert(attention, dropout=0.2)), tmp_path, loader(32), loader(8, seed=1))
    assert_identical(bare, watched)
    assert len({loss.item() for loss in bare.losses}) == 20


def test_compiled_training_is_bit_identical_and_keeps_its_graphs(tmp_path: Path) -> None:
    graphs: list[int] = []

    class Compiled(Still):
        def __init__(self) -> None:
            super().__init__(Net(dropout=0.2), lr=0.1)
            torch.compiler.reset()
            self.counter, self.losses = CompileCounter(), []
            self.net.compile(backend=self.counter)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.losses.append(super().training_step(batch, batch_idx))
            return self.losses[-1]

        def on_train_end(self) -> None:
            graphs.append(self.counter.frame_count)

    assert_identical(*twenty_steps(Compiled, tmp_path, data(), data()))
    assert graphs[0] == graphs[1] > 0


def test_an_error_in_the_backward_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(output: Tensor, gradient: Tensor) -> Tensor:
        raise ValueError("broken")

    monkeypatch.setattr(_gate_hook, "gate_gradient", broken)
    callback = Importance()
    with pytest.warns(UserWarning, match="Importance is switched off for the rest of this run. ValueError: broken"):
        train(tmp_path, Still(), callback)
    assert callback.found == [None]


def test_a_model_without_attention_switches_off(tmp_path: Path) -> None:
    callback = Importance()
    with pytest.warns(UserWarning, match="Importance is switched off .* No attention was seen"):
        train(tmp_path, Still(nn.Sequential(nn.Flatten(), nn.Linear(LENGTH * WIDTH, 3))), callback)
    assert callback.found == [None]


def test_an_error_in_a_step_leaves_nothing(tmp_path: Path) -> None:
    class Failing(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    module = Failing()
    callback = Importance()
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, module, callback)
    assert left_behind() == []


def test_validation_is_not_touched(tmp_path: Path) -> None:
    class Looking(Still):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert left_behind() == []
            assert not torch.is_grad_enabled()

    train(tmp_path, Looking(), Importance())

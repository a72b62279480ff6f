"""Training steps out of the ordinary: what counts as the gradient of a head there, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_callbacks import AttentionGuidance, BiasMonitor
from attn_callbacks.capture import record
from losses import AttentionGuidedLoss
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
    explicit,
    train,
)
from tests.callbacks.models import HEADS, LAYERS, Bert, Classifier, csv_logger, fit, loader, quiet_trainer
from tests.capture.reference import SelfAttention


class Checkpointed(Net):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, tokens: Tensor, gates: Tensor | None = None) -> Tensor:
        if gates is not None:
            return super().forward(tokens, gates)
        tokens = tokens.requires_grad_()
        for layer in self.layers:
            tokens = tokens + checkpoint(layer, tokens, use_reentrant=self.use_reentrant)
        return self.head(tokens.mean(dim=1))


def test_activation_checkpointing_without_reentry(tmp_path: Path) -> None:
    module = Still(Checkpointed(use_reentrant=False))
    callback = train(tmp_path, module, Importance())
    assert_means(callback, explicit(module.net))
    assert callback.found[0].samples.max() == SAMPLES  # the forward inside backward is not counted again


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_has_no_numbers_and_says_so_once(tmp_path: Path) -> None:
    callback = Importance()
    with pytest.warns(UserWarning, match=r"No gradient .* 'net.layers.0', 'net.layers.1'.*use_reentrant=False") as told:
        train(tmp_path, Still(Checkpointed(use_reentrant=True)), callback, max_epochs=2)
    assert len([w for w in told if "No gradient" in str(w.message)]) == 1
    assert all(result.mean.isnan().all() for result in callback.found)
    assert callback.found[0].mean.shape == (LAYERS, HEADS)


def test_frozen_layers_have_no_numbers_and_others_have(tmp_path: Path) -> None:
    module = Still()
    module.net.layers[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"No gradient .* in 'net.layers.0': its"):
        callback = train(tmp_path, module, Importance())
    assert np.isnan(callback.means[0]).all()
    np.testing.assert_allclose(callback.means[1], np.abs(explicit(module.net)).mean(axis=0)[1], rtol=1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_output_that_is_changed_in_place_is_not_taken_for_what_it_was(inside: bool, tmp_path: Path) -> None:
    class Plain(nn.Module):
        """A bias that learns makes torch take plain operations, which do not need their output again."""

        def forward(self, *projected: Tensor) -> Tensor:
            bias = torch.zeros(LENGTH, LENGTH, requires_grad=True)
            mixed = F.scaled_dot_product_attention(*projected, bias)
            return mixed.add_(1.0) if inside else mixed

    class Changing(SelfAttention):
        def __init__(self) -> None:
            super().__init__(WIDTH, HEADS)
            self.plain = Plain()

        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            mixed = self.plain(*self.project(tokens))
            return self.out((mixed if inside else mixed.add_(1.0)).transpose(1, 2).flatten(2))

    module = Still()
    module.net.layers[1] = Changing()
    with pytest.warns(UserWarning, match=r"No gradient .* in 'net.layers.1.plain': its.*changed in place"):
        callback = train(tmp_path, module, Importance())
    assert np.isnan(callback.means).tolist() == [[False] * HEADS, [True] * HEADS]


@pytest.mark.parametrize("form", FORMS)
def test_manual_optimization_sums_the_backwards_of_a_step(form: str, tmp_path: Path) -> None:
    class Manual(Still):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            logits = self.net(batch[0])
            self.manual_backward(F.cross_entropy(logits, batch[1]), retain_graph=True)
            self.manual_backward(-3 * logits[:, 0].mean())

    module = Manual(Net(form))
    callback = train(tmp_path, module, Importance())
    assert_means(callback, explicit(module.net, lambda logits, y: F.cross_entropy(logits, y) - 3 * logits[:, 0].mean()))


def test_two_losses_of_two_forwards_are_two_calls(tmp_path: Path) -> None:
    class Adversarial(Still):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for sign in (1, -1):
                optimizer = self.optimizers()
                self.toggle_optimizer(optimizer)
                self.manual_backward(F.cross_entropy(self.net(sign * batch[0]), batch[1]))
                self.untoggle_optimizer(optimizer)

    module = Adversarial()
    callback = train(tmp_path, module, Importance())
    names = [f"net.layers.{n}" for n in range(LAYERS)]
    assert callback.gates.layer_names == (*names, *(f"{name}#1" for name in names))
    np.testing.assert_allclose(callback.means[:2], np.abs(explicit(module.net)).mean(axis=0), rtol=1e-5)
    assert callback.found[0].samples.min() == SAMPLES


def test_gradients_asked_for_inside_the_step_are_part_of_the_loss(tmp_path: Path) -> None:
    """A penalty on gradients runs a backward of its own; what it finds reaches the heads once, by the loss."""

    class Penalised(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            norms = torch.autograd.grad(loss, self.net.head.weight, retain_graph=True)[0].norm()
            deeper = torch.autograd.grad(loss, self.net.layers[0].out.weight, retain_graph=True)[0].norm()
            return loss + 0 * norms.detach() + 0 * deeper.detach()

    module = Penalised()
    assert_means(train(tmp_path, module, Importance()), explicit(module.net))


@pytest.mark.parametrize("teacher_first", [True, False])
def test_a_forward_without_gradients_is_not_counted(teacher_first: bool, tmp_path: Path) -> None:
    class Teacher(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if teacher_first:
                self.teach(batch[0])
            loss = super().training_step(batch, batch_idx)
            if not teacher_first:
                self.teach(batch[0])
            return loss

        @torch.no_grad()
        def teach(self, tokens: Tensor) -> None:
            self.net(tokens)

    module = Teacher()
    callback = train(tmp_path, module, Importance())
    assert callback.gates.layer_names == tuple(f"net.layers.{n}" for n in range(LAYERS))
    assert_means(callback, explicit(module.net))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_backward_is_not_counted(tmp_path: Path) -> None:
    class Skipping(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx == 1 else None

    assert train(tmp_path, Skipping(), Importance()).found[0].samples.max() == 4


def test_a_step_inside_a_step_is_part_of_it(tmp_path: Path) -> None:
    class Nested(Still):
        def training_step(self, batch: Any, batch_idx: int, again: bool = True) -> Any:
            return self.training_step(batch, batch_idx, False) if again else super().training_step(batch, batch_idx)

    module = Nested()
    assert_means(train(tmp_path, module, Importance()), explicit(module.net))


@pytest.mark.parametrize("kept", [False, True])
def test_a_view_of_the_weights_that_a_model_records(kept: bool, tmp_path: Path) -> None:
    """The model goes on with another view of the same tensor than the one it hands over, or with that very one."""

    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.head = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 3)
            self.gates: Tensor | None = None

        def forward(self, tokens: Tensor) -> Tensor:
            weights = self.score(tokens).exp()  # (batch, keys, heads)
            weights = weights / weights.sum(dim=1, keepdim=True)
            by_head = weights.mT[:, :, None]
            record("pool", by_head)
            by_head = by_head if kept else weights.transpose(1, 2).unsqueeze(2)
            gates = torch.ones(2) if self.gates is None else self.gates
            return self.head(((by_head @ tokens[:, None]) * gates[:, None, None]).sum(dim=(1, 2)))

    module = Still(Pool())
    callback = train(tmp_path, module, Importance())
    found = []
    for tokens, target in zip(VALUES, TARGETS, strict=True):
        module.net.gates = torch.ones(2, requires_grad=True)
        found += torch.autograd.grad(F.cross_entropy(module.net(tokens[None]), target[None]), module.net.gates)
    assert_means(callback, torch.stack(found)[:, None].numpy())


def test_a_loss_term_on_attention_is_part_of_the_loss(tmp_path: Path) -> None:
    """Guidance acts on scores: with it, queries and keys get more gradient, and the output of heads as much as ever."""
    guidance = AttentionGuidance(AttentionGuidedLoss(), coefficient=1.0)
    found = []
    for callbacks in ([], [BiasMonitor(feedback=[guidance])]):
        torch.manual_seed(0)
        module, importance = Classifier(Bert(), lr=0.0), Importance()
        folder = tmp_path / str(len(found))
        trainer = quiet_trainer(folder, [importance, *callbacks], logger=csv_logger(folder))
        fit(module, trainer, loader(16), loader(8, seed=1))
        found.append(importance.means[-1])
    np.testing.assert_allclose(*found, rtol=1e-5)

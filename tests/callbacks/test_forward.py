"""The forward call of a step, made again from other inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.callbacks._forward import ForwardCall
from attn_callbacks.callbacks._regions import region_on
from attn_callbacks.callbacks._substitute import substitute
from tests.callbacks.models import Bert, Texts, Vit, classifier, leftovers, pl


def batch_of(samples: int = 4) -> dict[str, Tensor]:
    texts = Texts(samples)
    return {name: torch.stack([texts[i][name] for i in range(samples)]) for name in texts[0]}


def watched(module: Any, batch: Any, inputs: Tensor, trace: bool = True) -> tuple[ForwardCall, Any]:
    call = ForwardCall(module, inputs, trace=trace)
    with call.watch():
        output = module(batch)
    return call, output


@pytest.mark.parametrize("net", [None, "bert"])
def test_token_ids_become_embeddings_with_a_gradient(net: str | None) -> None:
    torch.manual_seed(0)
    module, batch = classifier(pl, Bert() if net else None), batch_of()
    plain = module(batch)
    call, output = watched(module, batch, batch["input_ids"])
    assert torch.equal(output, plain)
    assert call.seen
    assert len(call.outputs) == 1
    assert call.outputs[0] is output
    (gradient,) = torch.autograd.grad(output.sum(), call.continuous, retain_graph=True)
    assert gradient.shape == (4, 10, 16)
    assert gradient.abs().sum() > 0
    assert torch.allclose(call.from_continuous(call.continuous), plain)
    moved = call.continuous + 0.1 * gradient
    assert call.from_continuous(moved).sum() > plain.sum()
    assert leftovers(module) == {}
    assert not any("forward" in vars(part) for part in module.modules())


def test_frozen_embeddings_have_a_gradient_all_the_same() -> None:
    module, batch = classifier(pl), batch_of()
    module.net.embed.requires_grad_(False)
    call, output = watched(module, batch, batch["input_ids"])
    (gradient,) = torch.autograd.grad(output.sum(), call.continuous)
    assert gradient.abs().sum() > 0
    assert module.net.embed.weight.grad is None


def test_the_call_runs_again_on_other_inputs_of_the_batch() -> None:
    torch.manual_seed(0)
    module, batch, other = classifier(pl).eval(), batch_of(), batch_of(8)
    with torch.no_grad():
        call, _ = watched(module, batch, batch["input_ids"], trace=False)
        ids = other["input_ids"][4:]
        expected = module({**batch, "input_ids": ids})
        assert torch.equal(call.again(ids), expected)
    assert call.continuous is None


def test_pictures_are_continuous_themselves() -> None:
    torch.manual_seed(0)
    module, images = classifier(pl, Vit()), torch.randn(2, 3, 16, 16, requires_grad=True)
    call, output = watched(module, (images, torch.tensor([0, 1])), images)
    assert call.continuous is images
    assert torch.equal(call.from_continuous(images + 1), module((images + 1, None)))
    assert torch.autograd.grad(output.sum(), images)[0].abs().sum() > 0


def test_a_call_on_a_network_below_the_module_counts() -> None:
    class Below(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).sum()

    module, inputs = Below(), torch.randn(4, 3)
    call = ForwardCall(module, inputs, trace=False)
    with call.watch():
        module.training_step(inputs, 0)
    assert torch.equal(call.again(2 * inputs), module.net(2 * inputs))


def test_inputs_that_were_changed_before_the_call_are_told() -> None:
    module, batch = classifier(pl), batch_of()
    call = ForwardCall(module, batch["input_ids"], trace=True)
    with call.watch():
        module({**batch, "input_ids": batch["input_ids"].clone()})
    assert not call.seen
    with pytest.raises(ValueError, match="Hand them over unchanged"):
        call.again(batch["input_ids"])


def test_an_exception_leaves_nothing_behind() -> None:
    module, batch = classifier(pl), batch_of()
    call = ForwardCall(module, batch["input_ids"], trace=True)
    with pytest.raises(RuntimeError), call.watch():
        raise RuntimeError
    assert not any("forward" in vars(part) for part in module.modules())


def test_substitution_reaches_everywhere_and_changes_nothing_in_place() -> None:
    old, new, other = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)
    batch = {"a": [old, other], "b": (other, {"c": old}), "d": 3}
    changed = substitute(batch, old, new)
    assert changed["a"][0] is new
    assert changed["b"][1]["c"] is new
    assert changed["a"][1] is other
    assert batch["a"][0] is old
    assert substitute(batch, torch.zeros(2), new) is batch  # an equal tensor is another one


def test_a_tokenizers_batch_keeps_its_type() -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([[1, 2]])
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones(1, 2)})
    changed = substitute(batch, ids, ids + 1)
    assert isinstance(changed, transformers.BatchEncoding)
    assert changed.input_ids.tolist() == [[2, 3]]
    assert batch.input_ids is ids


@pytest.mark.parametrize(("tokens", "expected"), [(16, 16), (17, 16), (21, 16)])
def test_patches_lie_on_pictures(tokens: int, expected: int) -> None:
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    mask[0, tokens - expected + 5] = True  # row 1, column 1 of 4 x 4
    pixels = region_on(mask, torch.zeros(1, 3, 16, 16))
    assert pixels[0].nonzero().tolist() == [[row, column] for row in range(4, 8) for column in range(4, 8)]


def test_a_mask_of_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="does not lie on inputs"):
        region_on(torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 5, 3))

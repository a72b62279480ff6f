"""One shared wrapper a step: contexts around it, terms on its loss, and nothing of it left afterwards."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.callbacks._steps import StepTap, tap_step


class Module(nn.Module):
    def __init__(self, output: Any = None) -> None:
        super().__init__()
        self.output = output

    def training_step(self, batch: Any) -> Any:
        """Return what was asked for."""
        return batch if self.output is None else self.output

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch, batch_idx, dataloader_idx


def adding(amount: float) -> StepTap:
    return StepTap(term=lambda batch, output: torch.tensor(amount))


def test_terms_add_to_a_tensor() -> None:
    module = Module()
    tap_step(module, "training_step", adding(2.0))
    tap_step(module, "training_step", adding(0.5))
    assert module.training_step(torch.tensor(1.0)) == 3.5


def test_terms_add_to_the_loss_of_a_dict_and_leave_the_users_dict_alone() -> None:
    output = {"loss": torch.tensor(1.0), "logits": "kept"}
    module = Module(output)
    tap_step(module, "training_step", adding(2.0))
    assert module.training_step(None) == {"loss": torch.tensor(3.0), "logits": "kept"}
    assert output["loss"] == 1.0


def test_a_skipped_step_stays_skipped() -> None:
    module, asked = Module(), []
    tap_step(module, "training_step", StepTap(term=lambda batch, output: asked.append(batch)))
    assert module.training_step(None) is None
    assert asked == []


def test_no_term_keeps_the_very_output() -> None:
    output = {"loss": torch.tensor(1.0)}
    module = Module(output)
    tap_step(module, "training_step", StepTap(term=lambda batch, output: None))
    assert module.training_step(None) is output


def test_gradient_flows_through_loss_and_term() -> None:
    weight = torch.ones((), requires_grad=True)
    module = Module(3 * weight)
    tap_step(module, "training_step", StepTap(term=lambda batch, output: 4 * weight))
    module.training_step(None).backward()
    assert weight.grad == 7


def test_contexts_see_the_batch_and_close_in_reverse_before_terms() -> None:
    events: list[Any] = []

    def tap(name: str) -> StepTap:
        @contextmanager
        def context(batch: Any) -> Iterator[None]:
            events.append(("enter", name, batch))
            yield
            events.append(("exit", name))

        return StepTap(context=context, term=lambda batch, output: events.append(("term", name)))

    module = Module(torch.tensor(0.0))
    tap_step(module, "training_step", tap("a"))
    tap_step(module, "training_step", tap("b"))
    module.training_step(batch=5)
    entered = [("enter", "a", 5), ("enter", "b", 5)]
    assert events == [*entered, ("exit", "b"), ("exit", "a"), ("term", "a"), ("term", "b")]


def test_all_arguments_pass() -> None:
    module = Module()
    tap_step(module, "validation_step", StepTap())
    assert module.validation_step("batch", 3, dataloader_idx=1) == ("batch", 3, 1)


def test_lightning_reads_the_signature_of_the_step() -> None:
    module = Module()
    for name in ("training_step", "validation_step"):
        plain = inspect.signature(getattr(module, name))
        tap_step(module, name, StepTap())
        assert inspect.signature(getattr(module, name)) == plain
    assert module.training_step.__doc__ == "Return what was asked for."


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_removal_in_any_order_leaves_nothing(order: tuple[int, int]) -> None:
    module = Module()
    removes = [tap_step(module, "training_step", adding(1.0)), tap_step(module, "training_step", adding(2.0))]
    removes[order[0]]()
    assert module.training_step(torch.tensor(0.0)) == (1.0 if order[0] else 2.0)
    removes[order[1]]()
    assert "training_step" not in vars(module)


def test_removing_twice_is_harmless() -> None:
    module = Module()
    first = tap_step(module, "training_step", adding(1.0))
    first()
    second = tap_step(module, "training_step", adding(1.0))
    first()
    assert module.training_step(torch.tensor(0.0)) == 1.0
    second()
    second()
    assert vars(module).get("training_step") is None


def test_an_attribute_of_the_module_comes_back() -> None:
    """A compiled module carries its steps as attributes."""
    module = Module()
    module.training_step = own = lambda batch: 10 * batch
    remove = tap_step(module, "training_step", adding(1.0))
    assert module.training_step(torch.tensor(2.0)) == 21
    remove()
    assert vars(module)["training_step"] is own


@pytest.mark.parametrize("wrap", [functools.wraps, lambda step: lambda outer: outer])
def test_a_foreign_wrapper_on_top_keeps_working(wrap: Any) -> None:
    module = Module()
    remove = tap_step(module, "training_step", adding(1.0))
    inner = module.training_step

    @wrap(inner)
    def outer(batch: Tensor) -> Tensor:
        return 2 * inner(batch)

    module.training_step = outer
    assert module.training_step(torch.tensor(3.0)) == 8
    remove()
    assert module.training_step is outer
    assert module.training_step(torch.tensor(3.0)) == 6
    second = tap_step(module, "training_step", adding(1.0))
    assert module.training_step(torch.tensor(3.0)) == 7
    second()
    assert module.training_step is outer


def test_a_deep_copy_runs_its_own_plain_step() -> None:
    module = Module()
    tap_step(module, "training_step", adding(1.0))
    twin = copy.deepcopy(module)
    twin.output = torch.tensor(5.0)
    assert twin.training_step.__self__ is twin
    assert twin.training_step(None) == 5
    assert module.training_step(torch.tensor(0.0)) == 1


def test_a_shallow_copy_gets_a_wrapper_of_its_own() -> None:
    module = Module()
    remove = tap_step(module, "training_step", adding(1.0))
    twin = copy.copy(module)
    tap_step(twin, "training_step", adding(10.0))
    assert module.training_step(torch.tensor(0.0)) == 1
    remove()
    assert "training_step" not in vars(module)


def test_an_error_in_the_step_closes_the_contexts() -> None:
    closed = []

    @contextmanager
    def context(batch: Any) -> Iterator[None]:
        try:
            yield
        finally:
            closed.append(batch)

    module = Module({"no loss": 1})
    tap_step(module, "training_step", StepTap(context=context, term=lambda batch, output: torch.tensor(1.0)))
    with pytest.raises(KeyError, match="loss"):
        module.training_step("batch")
    assert closed == ["batch"]


def test_attributes_of_the_wrapped_function_do_not_get_in_the_way() -> None:
    module = Module()

    def own(batch: Tensor) -> Tensor:
        return batch

    own.taps, own.module = "theirs", "theirs"  # type: ignore[attr-defined]
    module.training_step = own
    tap_step(module, "training_step", adding(1.0))
    assert module.training_step(torch.tensor(1.0)) == 2

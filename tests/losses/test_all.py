"""One battery over every public loss module: copies, state, compilation, mixed precision, a GPU."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import losses
from tests.losses.cases import Arguments, Case

FAMILIES = ("classification", "groups", "attention", "reliance", "balancing", "adversarial", "ensemble")
CASES: dict[str, Case] = {}
for _family in FAMILIES:
    CASES |= importlib.import_module(f"tests.losses.{_family}.cases").CASES

every = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


def tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments or outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def convert(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested arguments with ``change`` applied to their floating tensors."""
    if isinstance(value, Tensor):
        return change(value).detach().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: convert(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [convert(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def call(module: nn.Module, arguments: Arguments, seed: int = 0) -> Any:
    """Call the module; what it draws is the same every time."""
    torch.manual_seed(seed)
    return module(*arguments[0], **arguments[1])


def total(output: Any) -> Tensor:
    """Return one number that depends on every floating part of the output."""
    return torch.stack([part.float().sum() for part in tensors(output) if part.is_floating_point()]).sum()


def drawn(case: Case, seed: int = 0) -> Arguments:
    torch.manual_seed(seed)
    return case.arguments()


def test_every_public_module_is_here() -> None:
    public = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    modules = {name for name in public if issubclass(getattr(losses, name), nn.Module)}
    assert modules == set(CASES)


@every
def test_gradients_are_finite_and_not_all_zero(case: Case) -> None:
    arguments = drawn(case)
    inputs = [part for part in tensors(arguments) if part.requires_grad]
    total(call(case.build(), arguments)).backward()
    gradients = [part.grad for part in inputs if part.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.ne(0).any() for gradient in gradients)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.empty])
def test_nothing_to_count_is_a_finite_zero_with_a_gradient(case: Case) -> None:
    torch.manual_seed(0)
    assert case.empty is not None
    arguments = case.empty()
    loss = total(call(case.build(), arguments))
    loss.backward()
    assert loss.item() == 0.0
    gradients = [part.grad for part in tensors(arguments) if part.requires_grad]
    assert any(gradient is not None for gradient in gradients)
    assert all(gradient is None or gradient.eq(0).all() for gradient in gradients)


@every
def test_state_round_trip_is_exact(case: Case) -> None:
    used, fresh = case.build(), case.build()
    for seed in range(3):
        call(used, drawn(case, seed))
    fresh.load_state_dict(used.state_dict(), strict=True)
    for name, value in used.state_dict().items():
        same = torch.equal(fresh.state_dict()[name], value) if isinstance(value, Tensor) else True
        assert same, name
    for seed in range(3, 5):
        torch.testing.assert_close(call(fresh, drawn(case, seed)), call(used, drawn(case, seed)), rtol=0, atol=0)


@every
def test_copies_and_pickles_are_independent_equals(case: Case) -> None:
    module = case.build()
    call(module, drawn(case))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert not {part.data_ptr() for part in other.buffers()} & {part.data_ptr() for part in module.buffers()}
        torch.testing.assert_close(call(other, drawn(case, 1)), call(copy.deepcopy(module), drawn(case, 1)))


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.compiles is True])
def test_compiles_once_without_a_graph_break(case: Case) -> None:
    torch.compiler.reset()  # the losses share a forward, and only so many compiled versions of it are kept
    counter = CompileCounter()
    plain, module = case.build(), case.build()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for seed in range(3):
        torch.testing.assert_close(call(compiled, drawn(case, seed)), call(plain, drawn(case, seed)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.half is True])
def test_half_precision_is_close_to_single(case: Case, dtype: torch.dtype) -> None:
    arguments = drawn(case)
    halved = convert(arguments, lambda part: part.to(dtype))
    rounded = convert(halved, lambda part: part.float())
    with torch.autocast("cpu", dtype=dtype):
        output = call(case.build(), halved)
    expected = call(case.build(), rounded)
    torch.testing.assert_close(total(output), total(expected), rtol=2e-2, atol=2e-2)
    total(output).backward()
    assert all(part.grad is None or part.grad.isfinite().all() for part in tensors(halved) if part.requires_grad)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if case.gpu is True])
def test_a_gpu_gives_what_the_cpu_gives(case: Case) -> None:
    arguments = drawn(case)
    expected = call(case.build(), arguments)
    moved = _moved(arguments)
    output = call(case.build().cuda(), moved)
    for here, there in zip(tensors(output), tensors(expected), strict=True):
        assert here.device.type == "cuda"
        torch.testing.assert_close(here.cpu(), there, rtol=1e-4, atol=1e-5)
    total(output).backward()
    total(expected).backward()
    for here, there in zip(tensors(moved), tensors(arguments), strict=True):
        if there.grad is not None:
            torch.testing.assert_close(here.grad.cpu(), there.grad, rtol=1e-3, atol=1e-5)


def _moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cuda().requires_grad_(value.requires_grad)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).cuda()
    if isinstance(value, dict):
        return {name: _moved(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_moved(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value

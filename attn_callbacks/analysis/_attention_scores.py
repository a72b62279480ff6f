"""What the attention of one forward says about the tokens or patches of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks.analysis._erasure import Eraser
from attn_callbacks.analysis.attention_gradient import attention_gradients
from attn_callbacks.capture import AttentionCall, AttentionRecorder, call_name
from attn_callbacks.functional.feature_importance import (
    attention_gradient_mass,
    received_attention,
    value_weighted_attention,
)

__all__ = ["attention_scores"]


def attention_scores(
    eraser: Eraser, target: Tensor, query: int | None, layers: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Return the layers and, by method, ``(samples, features)``; values are NaN where the model hides its own.

    Args:
        eraser: Runs the model.
        target: Class of each sample.
        query: The only query that counts; ``None``: all.
        layers: Names or glob patterns of attention modules; ``None``: all.

    Raises:
        ValueError: If no self-attention over the features was seen.
    """
    names: tuple[str, ...] = ()
    parts, before = [], 0
    for inputs, valid in eraser.parts():
        chosen = target[before : before + len(inputs)]
        names, scores = _of_part(eraser, inputs, valid, chosen, query, layers)
        parts.append(scores)
        before += len(inputs)
    return names, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _of_part(
    eraser: Eraser,
    inputs: Tensor,
    valid: Tensor | None,
    target: Tensor,
    query: int | None,
    layers: Sequence[str] | None,
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    inputs = inputs.detach()
    if inputs.is_floating_point():
        inputs = inputs.clone().requires_grad_()  # below it, nothing may require a gradient
    with torch.enable_grad(), _leaves(eraser.model), AttentionRecorder(eraser.model, layers) as recorder:
        output = eraser.run(inputs, valid)
        chosen = output.gather(1, target.to(output.device)[:, None]).sum()
    calls = [call for call in recorder.calls if _is_over_features(call, inputs, eraser.features)]
    if not calls:
        shapes = sorted({call.shape for call in recorder.calls})
        raise ValueError(
            f"No self-attention over the {eraser.features} features was seen, but (batch, heads, queries, keys) "
            f"{shapes}. Name its `layers`, or give the `grid` of the patches."
        )
    gradients = attention_gradients(chosen, calls)
    found = [
        _of_call(call, gradient, valid, eraser.features, query) for call, gradient in zip(calls, gradients, strict=True)
    ]
    stacked = {name: torch.stack([part[name] for part in found]) for name in found[0]}
    scores = {name: each.sum(dim=0) if name == "gradient" else each.mean(dim=0) for name, each in stacked.items()}
    return tuple(call_name(call) for call in calls), scores


@contextmanager
def _leaves(model: nn.Module) -> Iterator[None]:
    """Let what modules make of ids require a gradient: in a frozen model, nothing else below attention does."""

    def require(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        is_made = isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad
        if not is_made or not args or not isinstance(args[0], Tensor) or args[0].is_floating_point():
            return None
        leaf: Tensor = output.detach().requires_grad_()
        return leaf.clone()  # the model may change it in place, which leaves do not bear

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(require).remove)
        yield


@torch.no_grad()
def _of_call(
    call: AttentionCall, gradient: Tensor, given: Tensor | None, features: int, query: int | None
) -> dict[str, Tensor]:
    own, weights = call.detach(), call.detach().weights()
    valid = own.query_valid if given is None else given.to(weights.device)
    found = {
        "attention": received_attention(weights, valid=valid, query=query),
        "gradient": attention_gradient_mass(weights, gradient, valid=valid, query=query),
    }
    is_known = own.value is not None and own.value.ndim == 4 and own.value.shape[2] == weights.shape[3]
    found["value"] = (
        value_weighted_attention(weights, own.value, valid=valid, query=query)
        if own.value is not None and is_known
        else torch.full_like(found["attention"], torch.nan)
    )
    prefix = weights.shape[3] - features  # a class token and others stand before the patches
    return {name: values[:, prefix:].cpu() for name, values in found.items()}


def _is_over_features(call: AttentionCall, inputs: Tensor, features: int) -> bool:
    batch, _, queries, keys = call.shape
    first = keys - features
    most = 8 if inputs.ndim == 4 else 0  # class, distillation and register tokens
    return batch == len(inputs) and queries == keys and not call.is_cross and 0 <= first <= most

"""One call of a fused kernel that also hands out the log-sum-exp of every row, on whatever device the tensors are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.capture.rows import rows_at_once
from attn_callbacks.capture.scores import softmax_rows, wide

__all__ = ["attend"]

Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None", bool, float], tuple[Tensor, Tensor]]


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, is_causal: bool = False, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute ``softmax(scale * query @ key + bias) @ value`` and the log-sum-exp of the scores.

    Every fused kernel computes the log-sum-exp for its backward; the public function does not return it, the operators
    below it do. They are private, so that each is checked once against the plain formula before it is trusted; the
    formula itself, in blocks of rows, stands in for one that is missing or wrong.

    The output carries a graph, the log-sum-exp does not: a kernel has no derivative for it.

    Args:
        query: Queries.
        key: Keys.
        value: Anything to average under attention; its width may differ from ``head_dim``.
        bias: Added to the scores; ``-inf`` where a query may not attend.
        is_causal: Query ``i`` may attend to keys ``0..i``.
        scale: Factor on the scores.

    Shape:
        - query: ``(batch, heads, queries, head_dim)``
        - key: ``(batch, key_heads, keys, head_dim)``
        - value: ``(batch, key_heads, keys, width)``
        - bias: four axes, broadcastable to ``(batch, heads, queries, keys)``
        - output: ``(batch, heads, queries, width)`` and ``(batch, heads, queries)``; a row without keys has the output
          zero and an undefined log-sum-exp
    """
    if 0 in (*query.shape, *key.shape):  # kernels divide by the number of rows
        return query.new_zeros(*query.shape[:3], value.shape[-1]), query.new_zeros(query.shape[:3])
    width = value.shape[-1]
    widest = max(width, query.shape[-1])
    if width != query.shape[-1] or query.is_cuda:  # fused kernels take one width, on a GPU a multiple of eight
        widest += -widest % 8
        query, key, value = (F.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in (query, key, value))
    # flash attention has no bias, takes 256 columns, and begins the diagonal of other shapes at their far corner
    for_flash = bias is None and widest <= 256 and not (is_causal and query.shape[2] != key.shape[2])
    kernel = _kernel(query.device.type, query.dtype, bias is not None, for_flash)
    output, logsumexp = kernel(query, key, value, bias, is_causal, scale)
    return output[..., :width], logsumexp.detach()


@cache
def _kernel(device: str, dtype: torch.dtype, has_bias: bool, for_flash: bool) -> Kernel:
    """Choose the kernel that the model's own attention uses on this device, if it passes its check."""
    half = dtype in (torch.float16, torch.bfloat16)
    choices: dict[str, list[Kernel]] = {
        "cpu": [_cpu_flash],
        "cuda": [_cuda_flash, _efficient] if half and for_flash else [_efficient],
    }
    if device == "cuda" and dtype == torch.float64:  # no fused kernel takes it there
        choices = {}
    for kernel in choices.get(device, []):
        problem = _trial_error(kernel, device, dtype, has_bias, 24 if for_flash else 40)
        if problem is None:
            return kernel
        warnings.warn(
            f"The fused kernel `{kernel.__name__[1:]}` of torch {torch.__version__} cannot be used on {device}: "
            f"{problem}. Exact statistics take a slower way there, with the same results.",
            stacklevel=2,
        )
    return _in_blocks


def _cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logsumexp = operator(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)
    broken = _zeros_or_nan(query, key)  # it answers scores of NaN with zeros
    if output.requires_grad:  # its backward needs the output as it was
        return output + broken[..., None], logsumexp + broken
    return output.add_(broken[..., None]), logsumexp.add_(broken)


def _zeros_or_nan(query: Tensor, key: Tensor) -> Tensor:
    """Return ``(batch, heads, queries)``: NaN for the rows of weights that have NaN, else zero."""
    of_keys = key.detach().sum(dim=(-2, -1)).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return 0.0 * (query.detach().sum(dim=-1) + of_keys[..., None])


def _cuda_flash(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    del bias  # has none
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    output, logsumexp = operator(query, key, value, 0.0, is_causal, False, scale=scale)[:2]
    return output, logsumexp


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) if group > 1 else tensor for tensor in (key, value))
    if bias is not None:  # the kernel reads aligned rows
        keys = key.shape[2]
        bias = F.pad(bias.expand(*bias.shape[:3], keys), (0, -keys % 16))
        bias = bias[..., :keys].expand(len(query), heads, query.shape[2], keys)
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    output, logsumexp = operator(query, key, value, bias, True, 0.0, is_causal, scale=scale)[:2]
    return output, logsumexp[..., : query.shape[2]]  # comes padded


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The formula as it stands, a few megabytes of scores at a time."""
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    group = heads // key.shape[1]
    key, value = (wide(tensor).repeat_interleave(group, dim=1) for tensor in (key, value))
    step = rows_at_once(batch * heads, keys, queries)
    outputs, logsumexps = [], []
    for start in range(0, queries, step):
        scores = scale * wide(query[:, :, start : start + step]) @ key.transpose(-2, -1)
        if bias is not None:
            scores = scores + (bias if bias.shape[2] == 1 else bias[:, :, start : start + step])
        if is_causal:
            rows = torch.arange(start, start + scores.shape[2], device=query.device)
            scores = scores.masked_fill(torch.arange(keys, device=query.device) > rows[:, None], -torch.inf)
        outputs.append(softmax_rows(scores) @ value)
        logsumexps.append(scores.detach().logsumexp(dim=-1))
    return torch.cat(outputs, dim=2).to(query.dtype), torch.cat(logsumexps, dim=2)


def _trial_error(kernel: Kernel, device: str, dtype: torch.dtype, has_bias: bool, keys: int) -> str | None:
    """Say what is wrong with a kernel, after one small causal call of it, in which two heads share their keys."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(device, dtype)

    query, key, value = noise(1, 2, 24, 8), noise(1, 1, keys, 8), noise(1, 1, keys, 8)
    bias = noise(1, 1, 1, keys) if has_bias else None
    scores = 0.5 * query.double() @ key.double().mT + (0.0 if bias is None else bias.double())
    scores = scores.masked_fill(torch.ones(24, keys, dtype=torch.bool, device=device).triu(1), -torch.inf)
    try:
        with torch.no_grad():
            output, logsumexp = kernel(query, key, value, bias, True, 0.5)
        errors = (output - scores.softmax(dim=-1) @ value.double(), logsumexp - scores.logsumexp(dim=-1))
    except (AttributeError, RuntimeError, TypeError) as error:
        return str(error).partition("\n")[0]
    worst = max(float(error.abs().nan_to_num(torch.inf).max()) for error in errors)
    tolerance = 0.05 if dtype in (torch.float16, torch.bfloat16) else 1e-3
    return None if worst < tolerance else f"its results are off by {worst:.2g}"

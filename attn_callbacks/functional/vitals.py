"""What the health of a head shows in: a few numbers of a few rows, cheap enough for training steps."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional._frame import Frame
from attn_callbacks.functional.entropy import row_entropy

__all__ = ["VITALS", "head_vitals", "pooled_vitals"]

VITALS: tuple[str, ...] = ("rows", "entropy", "confidence", "key_mass", "max_logit")
"""Names along the last axis of `head_vitals`, in order."""


def head_vitals(
    weights: Tensor, logits: Tensor | None = None, *, allowed: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Measure of every head on every sample what its health shows in.

    | vital | definition |
    |---|---|
    | ``rows`` | number of rows that count: valid, with some weight and at least two allowed keys |
    | ``entropy`` | mean over rows of the entropy over that of uniform attention, from 0 to 1 |
    | ``confidence`` | mean over rows of the largest weight |
    | ``key_mass`` | largest mean over rows of the weight on one key |
    | ``max_logit`` | largest score of an allowed key before the softmax |

    About seven passes over ``weights``, without gradients; a few rows of a batch are enough.

    Args:
        weights: Attention weights, each row summing to one; a row of zeros is invalid.
        logits: Scores before the softmax; ``None`` leaves ``max_logit`` at minus infinity.
        allowed: ``True`` where a row may attend; ``None`` allows every key.
        valid: ``True`` for the rows that count.

    Shape:
        - weights, logits: ``(batch, heads, rows, keys)``
        - allowed: bool, broadcastable to ``weights``
        - valid: bool ``(batch, rows)``
        - output: ``(batch, heads, vitals)``, float32, along `VITALS`; what is not finite in a row that counts shows

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> weights = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
        >>> head_vitals(weights, allowed=torch.ones(2, 2, dtype=torch.bool).tril())
        tensor([[[1.0000, 0.8113, 0.7500, 0.7500,   -inf]]])
    """
    check_axes("weights", weights, 4)
    frame = Frame(allowed=allowed, valid=valid)
    pairs, wanted = frame.pairs(weights), frame.wanted(weights)
    weights = weights.detach().float().where(pairs, 0.0)  # what may not be attended to must not show, whatever it is
    choices = pairs.sum(dim=-1)
    counted = (weights.sum(dim=-1) != 0) & (choices > 1) & wanted  # (batch, heads, rows)
    rows = counted.sum(dim=-1)
    entropy = row_entropy(weights) / choices.clamp_min(2).float().log()
    means = [values.where(counted, 0.0).sum(dim=-1) / rows for values in (entropy, weights.amax(dim=-1))]
    received = weights.where(counted[..., None], 0.0).sum(dim=-2).amax(dim=-1) / rows
    top = weights.new_full(rows.shape, -torch.inf)
    if logits is not None:
        if logits.shape != weights.shape:
            expected = tuple(weights.shape)
            raise ValueError(f"`logits` must have the shape of `weights` {expected}, got {tuple(logits.shape)}.")
        shown = pairs & counted[..., None]
        top = logits.detach().float().where(shown, -torch.inf).amax(dim=(-2, -1))
    return torch.stack([rows.float(), *means, received, top], dim=-1)


def pooled_vitals(vitals: Tensor) -> Tensor:
    """Combine the vitals of samples, or of several processes: of heads over all rows.

    Means are weighted by rows; ``key_mass`` is the smallest one of any sample, since a dead head has one key in all of
    them, and ``max_logit`` the largest.

    Args:
        vitals: Output of `head_vitals`, or of this function.

    Shape:
        - vitals: ``(samples, heads, vitals)``
        - output: ``(heads, vitals)``; NaN where no sample has a row

    Example:
        >>> pooled_vitals(torch.tensor([[[1.0, 0.2, 0.9, 0.8, 5.0]], [[3.0, 0.6, 0.5, 0.3, 7.0]]]))
        tensor([[4.0000, 0.5000, 0.6000, 0.3000, 7.0000]])
    """
    check_axes("vitals", vitals, 3)
    rows, *means, received, top = vitals.unbind(dim=-1)
    total, known = rows.sum(dim=0), rows > 0
    pooled = [(rows * values).where(known, 0.0).sum(dim=0) / total for values in means]
    least = received.where(known, torch.inf).amin(dim=0).masked_fill(total == 0, torch.nan)
    most = top.where(known, -torch.inf).amax(dim=0).masked_fill(total == 0, torch.nan)
    return torch.stack([total, *pooled, least, most], dim=-1)

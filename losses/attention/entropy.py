"""Entropy of attention: raise it against over-reliance on single tokens, or lower it for sharper heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses._checks import REDUCTIONS, one_of
from losses.attention._layers import as_layers, layer_mean, reduce_layers, reduce_samples, widened
from losses.attention._row_sums import entropy_sums
from losses.attention._rows import FLOOR, allowed_keys, check_query_valid, check_valid, counted_rows, real_rows

__all__ = ["AttentionEntropyLoss", "attention_entropy"]

MODES = ("raise", "lower", "ear")


def attention_entropy(
    weights: Tensor | Sequence[Tensor],
    valid: Tensor | None = None,
    *,
    mode: str = "raise",
    query_valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Penalise attention that is too sharp, or too flat, by the entropy of its rows.

    With :math:`H = -\sum_j a_j \log a_j` the entropy of a row, renormalised over the ``n`` keys that it may attend to,

    .. math::
        \ell_{\text{raise}} = 1 - \frac{H}{\log n}, \qquad \ell_{\text{lower}} = \frac{H}{\log n}

    both in ``[0, 1]`` whatever the length: minimising the first flattens attention, the second sharpens it. Costs are
    averaged over a sample's rows and heads, then over layers, then over samples. Rows with fewer than two allowed keys
    have no choice, and rows without weight on them attend to nothing: neither counts. Costs one logarithm per weight.

    ``"ear"`` is the published regulariser, for parity: with :math:`\bar a` the mean over heads and a second softmax
    over valid keys, :math:`-\sum_{\text{layers}} \operatorname{mean}_{\text{tokens}} H(\operatorname{softmax}(\bar a))`
    in nats. It sums over layers and is negative. The second softmax squeezes it: between one key and a uniform row it
    spans only 1.9 / 0.4 / 0.2 % of ``log n`` at ``n`` = 16 / 64 / 128, so it fades with length; and sharp heads that
    disagree have a flat mean. Prefer ``"raise"``.

    Entropy alone does not remove a shortcut: it says nothing about which tokens to attend to.

    Args:
        weights: Attention weights after the softmax, of one layer or of several.
        valid: ``True`` for real tokens, or where a query may attend, such as a causal mask; ``None`` allows every pair.
            By key, where ``queries == keys`` and no ``query_valid`` is given, it also leaves out the rows of padding;
            by pair, rows without two allowed keys are left out. ``"ear"`` takes real tokens only.
        mode: ``"raise"``, ``"lower"`` or ``"ear"``.
        query_valid: ``True`` for the real tokens among the queries of cross-attention. ``None`` takes a layer with
            ``queries == keys`` for self-attention, whose queries are the tokens that keys are, and every other for
            cross-attention between real queries: pass it wherever cross-attention may have as many queries as keys.
        reduction: ``"mean"`` over samples, ``"sum"`` or ``"none"``.

    Shape:
        - weights: ``(batch, heads, queries, keys)``; heads and queries may differ between layers
        - valid: ``(batch, keys)``, or ``(batch or 1, heads or 1, queries, keys)``
        - query_valid: ``(batch, queries)``
        - output: scalar, or ``(batch,)`` for ``reduction="none"``

    Raises:
        ValueError: If there are no weights, a shape does not fit, an argument is not among the allowed ones or (checked
            on the CPU only) a mask has values outside ``[0, 1]`` or the weights are not those after a softmax.
        TypeError: If ``weights`` holds something else than floating tensors.

    Example:
        >>> scores = torch.tensor([[[[0.0, 0.0], [9.0, 0.0]]]], requires_grad=True)
        >>> loss = attention_entropy(scores.softmax(dim=-1))
        >>> loss.backward()
        >>> loss
        tensor(0.4991, grad_fn=<DivBackward0>)
        >>> scores.grad[0, 0, 1].sign()
        tensor([ 1., -1.])

    References:
        Attanasio et al., "Entropy-based Attention Regularization Frees Unintended Bias Mitigation from Lists", Findings
        of ACL 2022 (``"ear"``; added to cross entropy with a coefficient of 0.01).
    """
    one_of("mode", mode, MODES)
    one_of("reduction", reduction, REDUCTIONS)
    layers = as_layers(weights)
    query_valid = check_query_valid(query_valid, layers)
    with torch.autocast(layers[0].device.type, enabled=False):
        if mode == "ear":
            return _ear(layers, check_valid(valid, layers[0]), query_valid, reduction)
        return reduce_layers([_layer_cost(layer, valid, query_valid, mode) for layer in layers], None, reduction)


class AttentionEntropyLoss(nn.Module):
    """Raise or lower the entropy of attention; see :func:`attention_entropy`.

    Args:
        mode: ``"raise"``, ``"lower"`` or ``"ear"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - forward: as :func:`attention_entropy`

    Raises:
        ValueError: If an argument is not among the allowed ones.

    Example:
        >>> scores = torch.zeros(1, 2, 3, 3, requires_grad=True)
        >>> loss = AttentionEntropyLoss(mode="lower")([scores.softmax(dim=-1)])
        >>> loss.backward()
        >>> loss
        tensor(1., grad_fn=<DivBackward0>)
    """

    def __init__(self, mode: str = "raise", reduction: str = "mean") -> None:
        super().__init__()
        self.mode = one_of("mode", mode, MODES)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)

    def forward(
        self, weights: Tensor | Sequence[Tensor], valid: Tensor | None = None, *, query_valid: Tensor | None = None
    ) -> Tensor:
        """Return the loss of the attention ``weights``."""
        return attention_entropy(weights, valid, mode=self.mode, query_valid=query_valid, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"mode={self.mode!r}, reduction={self.reduction!r}"


def _layer_cost(layer: Tensor, valid: Tensor | None, query_valid: Tensor | None, mode: str) -> tuple[Tensor, Tensor]:
    """Return each sample's mean cost ``(batch,)``, and whether it has any row ``(batch,)``."""
    allowed = allowed_keys(valid, query_valid, layer)
    total, weighted = entropy_sums(widened(layer), allowed.keys)
    size = total.clamp(min=FLOOR)
    share = (size.log() - weighted / size) / allowed.number.clamp(min=2).log()
    return layer_mean(1 - share if mode == "raise" else share, counted_rows(total, allowed.rows))


def _ear(layers: list[Tensor], valid: Tensor | None, query_valid: Tensor | None, reduction: str) -> Tensor:
    by_layer = [_ear_layer(layer, valid, query_valid) for layer in layers]
    counted = torch.stack([counts for _, counts in by_layer]).any(dim=0)
    return reduce_samples(torch.stack([cost for cost, _ in by_layer]).sum(dim=0), counted, reduction)


def _ear_layer(layer: Tensor, valid: Tensor | None, query_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each sample's mean negative entropy ``(batch,)``, and whether it has any row ``(batch,)``."""
    scores = pooled = widened(layer).mean(dim=1)  # (batch, queries, keys)
    if valid is not None:
        scores = pooled.masked_fill(~valid[:, None], torch.finfo(pooled.dtype).min)
    negative = (scores.softmax(dim=-1) * pooled).sum(dim=-1) - scores.logsumexp(dim=-1)
    rows = torch.ones_like(negative, dtype=torch.bool) if valid is None else valid.any(dim=1, keepdim=True)
    real = real_rows(layer, valid, query_valid)
    rows = rows[:, None] if real is None else rows[:, None] & real
    counted_rows(pooled.detach().sum(dim=-1, keepdim=True).mT, rows)  # for its check; every real row counts
    return layer_mean(negative[:, None], rows)

"""Sparsity of attention: reward rows that put their weight on few keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses._checks import REDUCTIONS, one_of
from losses.attention._layers import as_layers, layer_mean, reduce_layers, widened
from losses.attention._row_sums import square_sums
from losses.attention._rows import FLOOR, Allowed, allowed_keys, any_seen, check_query_valid, counted_rows

__all__ = ["AttentionSparsityLoss", "attention_sparsity"]

FORMS = ("hoyer", "l1")


def attention_sparsity(
    weights: Tensor | Sequence[Tensor],
    valid: Tensor | None = None,
    *,
    form: str = "hoyer",
    query_valid: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Penalise attention rows that spread their weight over many keys.

    With the ``n`` keys that a row may attend to,

    .. math::
        \ell_{\text{hoyer}} = 1 - \frac{\sqrt n - \lVert a \rVert_1 / \lVert a \rVert_2}{\sqrt n - 1}, \qquad
        \ell_{\text{l1}} = \frac{\lVert a \rVert_1}{n}

    ``"hoyer"`` is 0 for a row on a single key and 1 for a uniform one, whatever the length and the scale of the row; it
    costs no logarithm, as ``attention_entropy(mode="lower")`` does. ``"l1"`` shrinks all weights alike, and only makes
    sense where they need not sum to one: sigmoid attention, gates, scores after a ReLU. The L1 norm of a softmax row is
    the constant 1, which trains nothing, so such rows are refused.

    Costs are averaged over a sample's rows and heads, then over layers, then over samples. Rows with fewer than two
    allowed keys do not count; with ``"hoyer"``, neither do rows without weight on them.

    Args:
        weights: Attention weights, not negative (of any sign with ``"l1"``), of one layer or of several.
        valid: ``True`` for real tokens, or where a query may attend, such as a causal mask; ``None`` allows every pair.
            By key, where ``queries == keys`` and no ``query_valid`` is given, it also leaves out the rows of padding;
            by pair, rows without two allowed keys are left out.
        form: ``"hoyer"`` or ``"l1"``.
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
            on the CPU only) a mask has values outside ``[0, 1]``, ``form="hoyer"`` meets negative weights, or
            ``form="l1"`` a layer whose rows all sum to one.
        TypeError: If ``weights`` holds something else than floating tensors.

    Example:
        >>> scores = torch.tensor([[[[0.0, 0.0], [9.0, 0.0]]]], requires_grad=True)
        >>> loss = attention_sparsity(scores.softmax(dim=-1))
        >>> loss.backward()
        >>> loss
        tensor(0.5001, grad_fn=<DivBackward0>)

    References:
        Hoyer, "Non-negative Matrix Factorization with Sparseness Constraints", JMLR 5, 2004 (the measure, of which this
        is one minus).
    """
    one_of("form", form, FORMS)
    one_of("reduction", reduction, REDUCTIONS)
    layers = as_layers(weights)
    query_valid = check_query_valid(query_valid, layers)
    cost = _hoyer if form == "hoyer" else _l1
    with torch.autocast(layers[0].device.type, enabled=False):
        costs = [cost(layer, allowed_keys(valid, query_valid, layer)) for layer in layers]
        return reduce_layers(costs, None, reduction)


class AttentionSparsityLoss(nn.Module):
    """Reward attention on few keys; see :func:`attention_sparsity`.

    Args:
        form: ``"hoyer"``, or ``"l1"`` for weights that need not sum to one.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        - forward: as :func:`attention_sparsity`

    Raises:
        ValueError: If an argument is not among the allowed ones.

    Example:
        >>> scores = torch.zeros(1, 2, 3, 3, requires_grad=True)
        >>> loss = AttentionSparsityLoss(form="l1")([scores.sigmoid()])
        >>> loss.backward()
        >>> loss
        tensor(0.5000, grad_fn=<DivBackward0>)
    """

    def __init__(self, form: str = "hoyer", reduction: str = "mean") -> None:
        super().__init__()
        self.form = one_of("form", form, FORMS)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)

    def forward(
        self, weights: Tensor | Sequence[Tensor], valid: Tensor | None = None, *, query_valid: Tensor | None = None
    ) -> Tensor:
        """Return the loss of the attention ``weights``."""
        return attention_sparsity(weights, valid, form=self.form, query_valid=query_valid, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Show how to build the loss again."""
        return f"form={self.form!r}, reduction={self.reduction!r}"


def _hoyer(layer: Tensor, allowed: Allowed) -> tuple[Tensor, Tensor]:
    """Return each sample's mean cost ``(batch,)``, and whether it has any row ``(batch,)``."""
    total, squares = square_sums(widened(layer), allowed.keys)
    ratio = total / torch.where(total <= FLOOR, 1.0, squares).sqrt()  # from 1 to sqrt(n)
    cost = (ratio - 1) / (allowed.number.clamp(min=2).sqrt() - 1)
    return layer_mean(cost, counted_rows(total, allowed.rows))


def _l1(layer: Tensor, allowed: Allowed) -> tuple[Tensor, Tensor]:
    """Return each sample's mean cost ``(batch,)``, and whether it has any row ``(batch,)``."""
    size = widened(layer).abs()
    norm = (size if allowed.keys is None else size * allowed.keys).sum(dim=-1)
    counted = allowed.rows.expand_as(norm)
    _refuse_softmax(norm.detach(), counted, layer.dtype)
    return layer_mean(norm / allowed.number.clamp(min=1), counted)


def _refuse_softmax(norm: Tensor, counted: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4
    apart = ~((norm - 1).abs() <= tolerance)  # NaN, too
    if any_seen(counted) and not any_seen(apart & counted):
        raise ValueError(
            '`form="l1"` needs weights that are free to shrink, got rows that all sum to one, as after a softmax: the '
            'L1 norm is then constant and trains nothing. Use `form="hoyer"`.'
        )

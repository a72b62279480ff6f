"""How far heads lie apart by where they look, and how far one head has moved between two states of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional._frame import Frame
from attn_callbacks.functional.entropy import row_entropy

__all__ = ["head_distance", "head_drift"]

_BLOCK = {"cpu": 2**20}  # weights of all heads held at once; what fits a cache of the processor
_LARGE_BLOCK = 2**25  # other devices: few launches
_OTHER_MASKS = "Heads have a distance only where they may attend to the same keys, but {}. Measure them apart."


def head_distance(
    weights: Tensor | Sequence[Tensor],
    *,
    allowed: Tensor | Sequence[Tensor] | None = None,
    valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    r"""Measure the distance between all pairs of heads: 0 where they look alike, 1 where they share no key.

    .. math:: d(h, k) = \sqrt{\tfrac{1}{\text{rows}} \sum_i \mathrm{JS}(A_h[i], A_k[i])}

    with the Jensen-Shannon divergence in bits, as in :func:`attn_callbacks.functional.jensen_shannon`. The root makes
    it a metric (its points even lie in a Euclidean space), which clustering and layouts want. Clark et al. sum the
    divergence over tokens; the mean lets samples of different lengths weigh equally.

    Rows with fewer than two allowed keys say nothing about a head and leave, as do padded ones and, for a pair, rows in
    which one of its heads has no weight. Weights on keys that are not allowed are removed and rows divided by their
    sum, so half precision does no harm. Heads of several layers are compared if they have the same queries and keys;
    cross-attention works as well.

    Takes one logarithm a pair of heads and weight, in float32: absolute errors of up to about 5e-4, the same weights
    are at 0 exactly. Memory is that of some blocks of rows besides ``weights``. No gradients.

    Args:
        weights: Attention weights of one layer, or of several, whose heads are numbered through.
        allowed: ``True`` where a query may attend, one mask or one a layer; ``None`` allows every valid key. It must be
            the same for all heads: where it is written out for each head or layer, values are read back.
        valid: ``True`` for the rows that count; padded queries are ``False``.
        key_valid: ``True`` for keys that are not padding.

    Shape:
        - weights: ``(batch, heads, queries, keys)`` a layer
        - allowed: bool, broadcastable to ``weights``
        - valid: bool ``(batch, queries)``
        - key_valid: bool ``(batch, keys)``
        - output: ``(batch, heads, heads)`` over the heads of all layers, float32, symmetric, zero on the diagonal; NaN
          where a pair has no row

    Raises:
        ValueError: If layers differ in anything but their number of heads or in their mask, or a shape does not fit.

    Example:
        >>> weights = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]]])  # two heads
        >>> head_distance(weights, allowed=torch.ones(2, 2, dtype=torch.bool).tril())
        tensor([[[0.0000, 0.2209],
                 [0.2209, 0.0000]]])

    References:
        Clark et al., "What Does BERT Look At?", 2019, section 6; Endres and Schindelin, "A New Metric for Probability
        Distributions", 2003.
    """
    layers = [weights] if isinstance(weights, Tensor) else list(weights)
    _check_layers(layers)
    frame = _same_for_all(layers, allowed, valid, key_valid)
    heads = sum(layer.shape[1] for layer in layers)
    total = torch.zeros(len(layers[0]), heads, heads, 2, device=layers[0].device)
    for samples, maps, counted in _blocks(layers, frame):
        _add_pairs(total[samples], maps, counted)
    total = total + total.transpose(1, 2)  # one of the two is zero
    distance = (total[..., 0] / total[..., 1]).clamp(0.0, 1.0).sqrt()  # 0 / 0 is NaN: no row
    distance.diagonal(dim1=-2, dim2=-1).zero_()
    return distance


def head_drift(
    before: Tensor,
    after: Tensor,
    *,
    allowed: Tensor | None = None,
    valid: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Measure how far each head has moved between two states of a model, on the same samples.

    The distance of :func:`head_distance` between a head and its own earlier self, exact also where it is tiny: a head
    whose weights moved by a ten-thousandth is not at 0. Compare states on fixed samples, in eval mode.

    Args:
        before: Attention weights of one layer.
        after: Those of the same layer and the same samples later.
        allowed: ``True`` where a query may attend; ``None`` allows every valid key.
        valid: ``True`` for the rows that count; padded queries are ``False``.
        key_valid: ``True`` for keys that are not padding.

    Shape:
        - before, after: ``(batch, heads, queries, keys)``
        - allowed: bool, broadcastable to ``before``, the same for all heads
        - valid: bool ``(batch, queries)``
        - key_valid: bool ``(batch, keys)``
        - output: ``(batch, heads)``, float32; NaN where no row counts

    Raises:
        ValueError: If the two differ in shape, or another shape does not fit.

    Example:
        >>> before = torch.tensor([[[[0.5, 0.5]], [[1.0, 0.0]]]])
        >>> head_drift(before, torch.tensor([[[[0.5, 0.5]], [[0.0, 1.0]]]]))
        tensor([[0., 1.]])
    """
    check_axes("before", before, 4)
    if after.shape != before.shape:
        raise ValueError(
            f"`before` and `after` must have one shape, got {tuple(before.shape)} and {tuple(after.shape)}. Give both "
            "the same samples."
        )
    frame = _same_for_all([before], allowed, valid, key_valid)
    total = torch.zeros(*before.shape[:2], 2, device=before.device)
    for samples, maps, counted in _blocks([before, after], frame):
        (old, new), (had, has) = maps.chunk(2, dim=1), counted.chunk(2, dim=1)
        counts = had & has
        total[samples, :, 0] += _row_divergence(old, new).where(counts, 0.0).sum(dim=-1)
        total[samples, :, 1] += counts.sum(dim=-1)
    return (total[..., 0] / total[..., 1]).clamp(0.0, 1.0).sqrt()


def _add_pairs(total: Tensor, maps: Tensor, counted: Tensor) -> None:
    """Add divergence and number of rows of every pair ``h < k`` to ``total (batch, heads, heads, 2)``, in place."""
    entropy = row_entropy(maps)  # (batch, heads, rows)
    halves = maps / 2  # the sum of two halves of one head is that head, to the bit
    for head in range(maps.shape[1] - 1):
        rest = slice(head + 1, None)
        counts = counted[:, head, None] & counted[:, rest]
        middle = row_entropy(halves[:, head, None] + halves[:, rest])
        divergence = (middle - (entropy[:, head, None] + entropy[:, rest]) / 2).clamp_min(0.0) / math.log(2)
        total[:, head, rest, 0] += divergence.where(counts, 0.0).sum(dim=-1)
        total[:, head, rest, 1] += counts.sum(dim=-1)


def _row_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Divergence of rows in bits, ``(..., keys) -> (...)``: every key gives a number of at least 0 that is exact."""
    both = p + q
    tilt = (p - q) / both.clamp_min(torch.finfo(both.dtype).tiny)
    size = tilt.abs()
    # ln(1 - t^2), each way where it does not cancel; then (1 + t) ln(1 + t) + (1 - t) ln(1 - t)
    spread = torch.log1p(-size.square()).where(size < 0.5, ((1 - size) * (1 + size)).log())
    share: Tensor = (spread + 2 * size * size.atanh()) / (2 * math.log(2))
    return (both * share.where(size < 1, 1.0)).sum(dim=-1) / 2  # 1: a key of one side only


def _blocks(layers: Sequence[Tensor], frame: Frame) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield samples, rows of all heads ``(batch, heads, rows, keys)`` that sum to one, and which of them count."""
    first = layers[0]
    batch, _, queries, keys = first.shape
    pairs, wanted = frame.pairs(first).expand(batch, 1, queries, keys), frame.wanted(first).expand(batch, 1, queries)
    is_masked = frame.allowed is not None or frame.key_valid is not None
    budget = _BLOCK.get(first.device.type, _LARGE_BLOCK) // max(sum(layer.shape[1] for layer in layers) * keys, 1)
    samples, rows = max(budget // max(queries, 1), 1), min(max(budget, 1), max(queries, 1))
    for start in range(0, batch, samples):
        some = slice(start, start + samples)
        for row in range(0, queries, rows):
            part = slice(row, row + rows)
            maps = torch.cat([layer.detach()[some, :, part].float() for layer in layers], dim=1)
            choices = pairs[some, :, part]
            if is_masked:
                maps = maps.where(choices, 0.0)
            mass = maps.sum(dim=-1)
            attends = (mass > 0) & mass.isfinite()
            maps = maps.where(attends[..., None], 0.0) / mass.where(attends, 1.0)[..., None]
            yield some, maps, attends & wanted[some, :, part] & (choices.sum(dim=-1) > 1)


def _check_layers(layers: Sequence[Tensor]) -> None:
    if not layers:
        raise ValueError("`weights` must hold at least one layer, got none.")
    for layer in layers:
        check_axes("weights", layer, 4)
    expected = layers[0].shape
    for number, layer in enumerate(layers):
        if (len(layer), *layer.shape[2:]) != (len(layers[0]), *expected[2:]):
            raise ValueError(
                f"Heads have a distance only where they see the same queries and keys, but layer 0 has the shape "
                f"{tuple(expected)} and layer {number} {tuple(layer.shape)}. Measure such layers apart."
            )


def _same_for_all(
    layers: Sequence[Tensor],
    allowed: Tensor | Sequence[Tensor] | None,
    valid: Tensor | None,
    key_valid: Tensor | None,
) -> Frame:
    """Return the rows and pairs in which all heads are compared."""
    rows = (len(layers[0]), layers[0].shape[2])
    if valid is not None and valid.shape != rows:
        raise ValueError(
            f"`valid` must have shape (batch, queries) = {rows}, the same for all heads, got {tuple(valid.shape)}."
        )
    return Frame(allowed=_one_mask(allowed, layers), valid=valid, key_valid=key_valid)


def _one_mask(allowed: Tensor | Sequence[Tensor] | None, layers: Sequence[Tensor]) -> Tensor | None:
    """Return the mask that all heads share, ``(batch, 1, queries, keys)``."""
    if allowed is None:
        return None
    masks = [allowed] if isinstance(allowed, Tensor) else list(allowed)
    if len(masks) not in (1, len(layers)):
        raise ValueError(f"`allowed` must be one mask, or one a layer ({len(layers)}), got {len(masks)}.")
    shared = [_of_a_layer(mask, layer, number) for number, (mask, layer) in enumerate(zip(masks, layers, strict=False))]
    for number, mask in enumerate(shared):
        if number and not torch.equal(shared[0], mask):
            raise ValueError(_OTHER_MASKS.format(f"the masks of layers 0 and {number} differ"))
    return shared[0]


def _of_a_layer(mask: Tensor, layer: Tensor, number: int) -> Tensor:
    """Return the mask that the heads of a layer share, ``(batch, 1, queries, keys)``."""
    batch, heads, queries, keys = layer.shape
    try:
        full = mask.bool().expand(batch, heads, queries, keys)
    except RuntimeError:
        raise ValueError(
            f"`allowed` must be broadcastable to `weights` {tuple(layer.shape)}, got {tuple(mask.shape)}."
        ) from None
    if heads > 1 and full.stride(1) and not (full == full[:, :1]).all():  # expanded, they are the same unread
        raise ValueError(_OTHER_MASKS.format(f"the masks of the heads of layer {number} differ"))
    return full[:, :1]

"""Alignment of every cross-attention head with gold links, added up over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, one_of
from attn_callbacks._plain import plain
from attn_callbacks.functional.alignment import LINKING
from attn_callbacks.functional.alignment_shape import ALIGNMENT_QUANTITIES, alignment_ratios
from attn_callbacks.metrics.accumulator import Accumulator

__all__ = ["MOMENTS", "AlignmentMetric", "AlignmentResult", "alignment_result"]

MOMENTS = 6
"""Sums over samples that are kept for each quantity: 1, x, y, x x, x y and y y, for a numerator x and denominator y."""


class AlignmentResult(NamedTuple):
    """What `AlignmentMetric` computes; tensors are ``(layers, heads, quantities)`` along `ALIGNMENT_QUANTITIES`.

    Args:
        mean: Each quantity over all samples together, NaN where it is not known. float64.
        standard_error: Standard error of ``mean``, samples being independent; NaN below two samples. float64.
        samples: Number of samples that had a value. int64.
        layer_names: Names of the layers.
    """

    mean: Tensor
    standard_error: Tensor
    samples: Tensor
    layer_names: tuple[str, ...] = ()

    def quantity(self, name: str) -> Tensor:
        """Return one quantity of every head, ``(layers, heads)``."""
        return self.mean[..., ALIGNMENT_QUANTITIES.index(one_of("name", name, ALIGNMENT_QUANTITIES))]

    def best_head(self) -> tuple[int, int] | None:
        """Return layer and number of the head that aligns best; ``None`` if no head was measured.

        The lowest error rate or, without gold links, the highest confidence, by which FastSpeech (Ren et al., 2019)
        chooses a head to take durations from. The best of many heads looks better than it is: where the number itself
        matters, choose on one data set and measure on another.
        """
        error, confidence = self.quantity("error_rate"), self.quantity("confidence")
        score = confidence if error.isnan().all() else 1 - error
        if score.isnan().all():
            return None
        layer, head = divmod(int(score.nan_to_num(-torch.inf).argmax()), score.shape[1])
        return layer, head

    def best_layer_error(self) -> float:
        """Return the lowest mean over heads of a layer's error rate; NaN without gold links."""
        means = self.quantity("error_rate").nanmean(dim=1)
        return float(means.nan_to_num(torch.inf).min()) if not means.isnan().all() else torch.nan

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        return {
            "quantities": list(ALIGNMENT_QUANTITIES),
            "layer_names": list(self.layer_names),
            "mean": plain(self.mean),
            "standard_error": plain(self.standard_error),
            "samples": plain(self.samples),
        }


class AlignmentMetric(Accumulator):
    """Add up how every head of every layer aligns two sequences: error rate, precision, recall, order and coverage.

    Sums of links over all samples are divided at the end, as is usual for the alignment error rate; the definitions are
    in :func:`attn_callbacks.functional.alignment_scores` and :func:`attn_callbacks.functional.alignment_ratios`. All
    states are sums of whole numbers (but for two quantities), so several processes find, to the last digit, what one
    finds on all their samples. Standard errors take samples as independent (ratio estimate). An update waits for no
    device, and takes a handful of passes over the weights.

    Args:
        layers: Number of cross-attention layers.
        heads: Largest number of heads of any layer; the missing heads of smaller layers stay NaN.
        method: How links are read off, ``"argmax"`` or ``"mutual"``; see
            :func:`attn_callbacks.functional.alignment_links`.

    Raises:
        ValueError: If ``layers`` or ``heads`` is below 1 or ``method`` is another word; in `update`, if a layer, head
            count or shape does not fit.

    Example:
        >>> metric = AlignmentMetric(layers=1, heads=2)
        >>> weights = torch.stack([torch.eye(3), torch.eye(3).flip(0)])[None]  # in order, and the other way round
        >>> metric.update(0, weights, sure=torch.eye(3, dtype=torch.bool)[None])
        >>> result = metric.compute()
        >>> result.quantity("error_rate"), result.quantity("monotonicity")
        (tensor([[0.0000, 0.6667]], dtype=torch.float64), tensor([[1., 0.]], dtype=torch.float64))
        >>> result.best_head()
        (0, 0)

    References:
        Och and Ney, "Improved Statistical Alignment Models", 2000, section 4. Cochran, "Sampling Techniques", 1977,
        section 6.4 (ratio estimate).
    """

    moments: Tensor

    def __init__(self, layers: int, heads: int, method: str = "argmax") -> None:
        super().__init__()
        self.layers, self.heads = at_least("layers", layers, 1), at_least("heads", heads, 1)
        self.method = one_of("method", method, LINKING)
        self.add_zeros("moments", layers, heads, len(ALIGNMENT_QUANTITIES), MOMENTS)

    def update(
        self,
        layer: int,
        weights: Tensor,
        sure: Tensor | None = None,
        possible: Tensor | None = None,
        *,
        query_valid: Tensor | None = None,
        key_valid: Tensor | None = None,
    ) -> None:
        """Add one batch of one layer.

        Args:
            layer: Index of the layer.
            weights: Cross-attention weights, ``(batch, heads, queries, keys)``; rows are target tokens.
            sure: Gold links without doubt, bool ``(batch, queries, keys)``; ``None``: none are known.
            possible: Gold links that may or may not be there, likewise.
            query_valid: ``True`` for target tokens that may be linked, ``(batch, queries)``.
            key_valid: ``True`` for source tokens that may be linked, ``(batch, keys)``.
        """
        if not 0 <= layer < self.layers:
            raise ValueError(f"`layer` must lie between 0 and {self.layers - 1}, got {layer}.")
        ratios = alignment_ratios(
            weights, sure, possible, method=self.method, query_valid=query_valid, key_valid=key_valid
        )
        heads = ratios.shape[1]
        if heads > self.heads:
            raise ValueError(f"`weights` must have at most {self.heads} heads, got {heads}. Raise `heads`.")
        x, y = ratios.unbind(dim=-1)
        sums = torch.stack([(y > 0).double(), x, y, x * x, x * y, y * y], dim=-1).sum(dim=0)
        self.writable("moments")[layer, :heads] += sums

    def compute(self) -> AlignmentResult:
        """Return value, standard error and number of samples of every layer, head and quantity."""
        return alignment_result(self.moments)


def alignment_result(moments: Tensor, layer_names: Sequence[str] = ()) -> AlignmentResult:
    """Conclude from the state of one `AlignmentMetric`, or from the sum of several.

    Args:
        moments: The `MOMENTS`.
        layer_names: Names of the layers.

    Shape:
        - moments: ``(layers, heads, quantities, 6)``, float64
    """
    samples, x, y, xx, xy, yy = moments.unbind(dim=-1)
    mean = x / y  # 0 / 0 is NaN: no sample
    spread = (xx - 2 * mean * xy + mean**2 * yy).clamp_min(0.0)
    error = (spread / y**2 * samples / (samples - 1).clamp_min(1)).sqrt().masked_fill(samples < 2, torch.nan)
    return AlignmentResult(mean, error, samples.long(), tuple(layer_names))

"""Right for the right reasons: penalise the gradient of the prediction by inputs that must not decide it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from losses._checks import REDUCTIONS, at_least, check_within, in_range, one_of
from losses._distributed import sum_over_processes
from losses._masks import aligned_mask
from losses._state import StatefulLoss
from losses.classification._per_sample import check_logits, reduce
from losses.reliance._log_probability import check_inputs, log_probability_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["InputGradientPenalty", "input_gradient_penalty"]

_LARGEST_SCALE = 1e8  # a penalty that is all but zero says nothing about its size later


def input_gradient_penalty(
    logits: Tensor,
    inputs: Tensor,
    target_mask: Tensor,
    *,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Penalise squared input gradients of the log-probabilities where a mask forbids the model to look.

    .. math::
        \ell_n = s_n \sum_d \Bigl( A_{n, d} \, \frac{\partial}{\partial x_{n, d}} \sum_k \log p_{n, k} \Bigr)^2, \qquad
        L = \frac{1}{|M|} \sum_{n \in M} \ell_n

    with ``A`` the mask and ``M`` the samples that have any of it; a sample with an empty mask contributes zero. Use it
    where it is known which pixels or tokens must *not* decide; it acts on what the model computes, not on where its
    attention goes. Differentiating it takes a second backward pass through a graph of the first, so a training step
    costs about twice as much (2.1 times for a multilayer perceptron) and holds the graph of the first backward pass as
    well.

    The gradient is that of the batch's sum: samples must not see each other, as they do in batch norm while training.
    Every operation between ``inputs`` and ``logits`` must be twice differentiable. Fused attention is not (run the
    model under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``), nor is a model compiled by ``torch.compile``.

    Log-probabilities, the square and the sum run in float32 also under autocast. Between them the gradient passes
    through the model in the model's own precision, and ``GradScaler`` does not scale it there. So it starts with at
    most 16 at a logit, whatever the number of classes, and is scaled back, exactly, before it is squared.

    Args:
        logits: Unnormalised scores that were computed from ``inputs``.
        inputs: What the model was given, or embeddings inside it; ``requires_grad`` was set before the forward pass.
        target_mask: Degree in ``[0, 1]`` (or boolean) to which an input must not be used.
        sample_weight: Weight of each sample; ``None`` means one.
        reduction: ``"mean"`` over the samples that have a mask, ``"sum"`` or ``"none"``.

    Shape:
        - logits: ``(samples, classes)`` or ``(samples, classes, positions...)``; one class is a binary head, whose
          classes have the logits 0 and ``logits``
        - inputs: ``(samples, features)``, ``(samples, tokens, features)`` or ``(samples, channels, height, width)``
        - target_mask: the shape of ``inputs``, or ``(samples, tokens)``, ``(samples, height, width)``: without features
          or channels. An axis of size one repeats the mask.
        - sample_weight: ``(samples,)``
        - output: scalar, or ``(samples,)`` for ``reduction="none"``

    Raises:
        ValueError: If a shape does not fit, ``inputs`` requires no gradient, ``logits`` does not depend on it, or
            (checked on the CPU only) the mask has values outside ``[0, 1]``.
        TypeError: If ``target_mask`` is no tensor.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> inputs = torch.tensor([[2.0, 1.0]], requires_grad=True)
        >>> forbidden = torch.tensor([[True, False]])
        >>> loss = input_gradient_penalty(model(inputs), inputs, forbidden)
        >>> loss
        tensor(0.2136, grad_fn=<DivBackward0>)
        >>> loss.backward()
        >>> model.weight.grad[:, 0]  # makes the prediction surer, so that the input changes it less
        tensor([-0.2998,  0.2998])

    References:
        Ross, Hughes and Doshi-Velez, "Right for the Right Reasons: Training Differentiable Models by Constraining
        their Explanations", IJCAI 2017.
    """
    one_of("reduction", reduction, REDUCTIONS)
    check_logits(logits)
    check_inputs(logits, inputs)
    mask = aligned_mask("target_mask", target_mask, inputs)
    check_within("target_mask", mask, 0, 1)
    gradient = log_probability_gradient(_of_each_class(logits), inputs)
    masked = torch.where(mask != 0, gradient, 0.0) * mask.to(gradient.dtype)
    present = (mask != 0).flatten(1).any(dim=1).expand(len(inputs))
    return reduce(masked.square().flatten(1).sum(dim=1), sample_weight, present, reduction)


def _of_each_class(logits: Tensor) -> Tensor:
    """Return logits of both classes of a binary head; the log-softmax of its one logit would be constant."""
    if logits.shape[1] > 1:
        return logits
    with torch.enable_grad():  # in validation the gradient is taken all the same
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


class InputGradientPenalty(StatefulLoss):
    r"""Penalise input gradients, scaled to the order of the base loss; see :func:`input_gradient_penalty`.

    Published coefficients for one and the same data set run from 10 to a million, since the size of an input gradient
    depends on the inputs, on the model, and on how far training has come. Here the first ``calibration_steps`` training
    calls that are given a ``base_loss`` return zero and measure both terms while the model trains plainly; afterwards

    .. math::
        L = \text{strength} \cdot \frac{\sum_t \text{base}_t}{\sum_t \text{penalty}_t} \cdot \text{penalty}

    with the ratio frozen, so that ``strength=1`` starts with two terms of one order. Let the calibration last until the
    base loss has come down well: before a model has learned anything its input gradients are tiny, and a ratio measured
    then would hold them there. Calls in which a term is not positive and finite are not counted.

    Without ``base_loss`` nothing is measured; what was never measured has scale one, and a warning says so. The sums
    are persistent buffers, so a resumed run goes on with the same scale. In a distributed run they are added up over
    the processes, which every training call with a ``base_loss`` takes part in. Keep the penalty outside activation
    checkpointing, which would run, and so measure, each call twice.

    Args:
        strength: Factor on the scaled penalty.
        calibration_steps: Number of training calls that measure the scale and return zero, so a run no longer than that
            is plain training: choose fewer for a short run. ``0`` keeps the scale at one.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. With ``"none"`` means over samples are compared.
        process_group: Processes to measure over; ``None`` means all of them.

    Shape:
        - base_loss: scalar, or any shape with ``reduction="none"``
        - forward: as :func:`input_gradient_penalty`

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 3)
        >>> penalty = InputGradientPenalty(strength=1.0, calibration_steps=1)
        >>> inputs = torch.randn(2, 4, requires_grad=True)
        >>> forbidden = torch.tensor([[True, False, False, False]])  # the first input of every sample
        >>> logits = model(inputs)
        >>> base = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]))
        >>> penalty(logits, inputs, forbidden, base_loss=base).item()  # measures
        0.0
        >>> term = penalty(logits, inputs, forbidden, base_loss=base)
        >>> torch.testing.assert_close(term, base)
        >>> (base + term).backward()
    """

    measured: Tensor
    steps: Tensor

    def __init__(
        self,
        strength: float = 1.0,
        *,
        calibration_steps: int = 100,
        reduction: str = "mean",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.strength = in_range("strength", strength, 0)
        self.calibration_steps = at_least("calibration_steps", calibration_steps, 0)
        self.reduction = one_of("reduction", reduction, REDUCTIONS)
        self.process_group = process_group
        self._warned = False
        self.register_buffer("measured", torch.zeros(2))  # sums of the base loss and of the penalty
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def scale(self) -> Tensor:
        """The factor that brings the penalty to the order of the base loss, as measured so far; a detached scalar."""
        base, penalty = self.measured.detach().unbind()
        ratio = base / penalty.clamp_min(torch.finfo(penalty.dtype).tiny)
        return torch.where(penalty > 0, ratio, 1.0).clamp(max=_LARGEST_SCALE)

    def forward(
        self,
        logits: Tensor,
        inputs: Tensor,
        target_mask: Tensor,
        *,
        sample_weight: Tensor | None = None,
        base_loss: Tensor | None = None,
    ) -> Tensor:
        """Return the scaled penalty; in training, zero until ``base_loss`` has measured the scale."""
        penalty = input_gradient_penalty(
            logits, inputs, target_mask, sample_weight=sample_weight, reduction=self.reduction
        )
        factor = self.strength * self.scale
        if base_loss is not None and self.learning and self.calibration_steps > 0:
            measuring = self.steps < self.calibration_steps
            self._measure(base_loss, penalty)
            factor = torch.where(measuring, 0.0, factor)
            penalty = torch.where(measuring & ~penalty.isfinite(), 0.0, penalty)  # zero times infinity is no zero
        elif self.learning and self.calibration_steps > 0 and not self._warned:
            self._warn_if_nothing_measured()
        return factor * penalty

    def extra_repr(self) -> str:
        """Show how to build the penalty again."""
        return f"{self.strength}, calibration_steps={self.calibration_steps}, reduction={self.reduction!r}"

    @torch.no_grad()
    def _measure(self, base_loss: Tensor, penalty: Tensor) -> None:
        pair = torch.stack([base_loss.to(self.measured).mean(), penalty.to(self.measured).mean()])
        pair = sum_over_processes(pair, self.process_group)
        counts = (pair.isfinite() & (pair > 0)).all() & (self.steps < self.calibration_steps)
        self.measured.add_(torch.where(counts, pair, 0.0))
        self.steps.add_(counts)

    def _warn_if_nothing_measured(self) -> None:
        if torch.compiler.is_compiling():
            return
        self._warned = True  # looks at the device once
        if self.steps == 0:
            warnings.warn(
                "InputGradientPenalty has calibrated nothing: its scale is 1. Pass `base_loss` in training, or build "
                "it with `calibration_steps=0`.",
                stacklevel=5,
            )

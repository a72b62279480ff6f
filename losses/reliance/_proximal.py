"""What the penalties on weights share: features along one axis, their strengths, and exact zeros after a step."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from losses._checks import accumulation_dtype, at_least, check_shape, check_weight_values
from losses._state import StatefulLoss

__all__ = ["ProximalPenalty", "StepSize", "feature_rows"]

_LONGEST_STEP = 10.0  # more than Adam itself moves an entry, in learning rates: a useless one cannot escape
_FLOOR = 1e-20  # where neither the loss nor the penalty has moved an entry yet
StepSize = float | Tensor
Weights = Tensor | Sequence[Tensor]


def feature_rows(weight: Weights, dim: int) -> list[Tensor]:
    """Return each weight as ``(features, entries)`` in at least float32, after checking that features agree.

    Raises:
        ValueError: If there is no weight, one has no axis ``dim``, or their numbers of features differ.
        TypeError: If a weight is no floating tensor.
    """
    weights = _as_list(weight)
    rows = []
    for index, each in enumerate(weights):
        if not isinstance(each, Tensor) or not each.is_floating_point():
            raise TypeError(f"`weight[{index}]` must be a floating tensor, got {getattr(each, 'dtype', type(each))}.")
        if not -each.dim() <= dim < each.dim():
            raise ValueError(f"`weight[{index}]` must have an axis {dim} of features, got shape {tuple(each.shape)}.")
        if each.shape[dim] != weights[0].shape[dim]:
            raise ValueError(
                f"`weight[{index}]` must have {weights[0].shape[dim]} features on axis {dim} as the first weight has, "
                f"got {each.shape[dim]}. Use a penalty of its own for it."
            )
        rows.append(each.movedim(dim, 0).reshape(each.shape[dim], -1).to(accumulation_dtype(each)))
    return rows


class ProximalPenalty(StatefulLoss, ABC):
    """Base of the penalties on weights: a subclass says what they cost and how a proximal step shrinks them.

    Weights are passed at call time, so that the penalty owns none: nothing is twice in a state dict, and copies of a
    module that holds both stay consistent. The buffer ``feature_strength`` is changed in place by
    :meth:`set_feature_strength`.

    Args:
        dim: Axis of the weights that counts features.
        num_features: Number of features with strengths of their own; ``None`` takes it from ``feature_strength``, or
            builds a penalty without any.
        feature_strength: Factor of each feature; ``None`` means one.

    Shape:
        - feature_strength: ``(num_features,)``

    Raises:
        ValueError: If a shape does not fit, or a strength is negative or not finite.
    """

    feature_strength: Tensor | None

    def __init__(self, dim: int, num_features: int | None, feature_strength: Tensor | Sequence[float] | None) -> None:
        super().__init__()
        self.dim = dim
        if num_features is None and feature_strength is not None:
            num_features = len(feature_strength)
        self.num_features = None if num_features is None else at_least("num_features", num_features, 1)
        self.register_buffer("feature_strength", None if num_features is None else torch.ones(num_features))
        if feature_strength is not None:
            self.set_feature_strength(feature_strength)
        self._attachments: list[_Attachment] = []

    @torch.no_grad()
    def set_feature_strength(self, strength: Tensor | Sequence[float]) -> None:
        """Replace the strengths of the features in place, after checking them.

        Args:
            strength: New factor of each feature.

        Shape:
            - strength: ``(num_features,)``

        Raises:
            ValueError: If the shape does not fit, or a strength is negative or not finite.
            RuntimeError: If the penalty was built without ``num_features``.
        """
        table = self.feature_strength
        if table is None:
            raise RuntimeError(f"{type(self).__name__} has no strengths by feature: build it with `num_features`.")
        new = torch.as_tensor(strength, dtype=table.dtype, device=table.device)
        check_shape("strength", new, table.shape, "(num_features,)")
        check_weight_values("strength", new)
        table.copy_(new)

    @property
    def attached(self) -> bool:
        """Whether an optimiser applies the penalty after its steps; see :meth:`attach`."""
        return any(attachment.alive for attachment in self._attachments)

    def forward(self, weight: Weights) -> Tensor:
        """Return the penalty; to a weight that an optimiser shrinks, see :meth:`attach`, it has no gradient."""
        shrunk = {key for attachment in self._attachments if attachment.alive for key in attachment.weights}
        if not shrunk:
            return self._value(weight)
        return self._value([each.detach() if id(each) in shrunk else each for each in _as_list(weight)])

    @torch.no_grad()
    def proximal_step(self, weights: Weights, lr: StepSize) -> None:
        """Shrink the weights in place by the proximal map of ``lr`` times the penalty.

        For a loop that does not use :meth:`attach`: call it right after a step of plain gradient descent. A weight that
        is given twice is shrunk once.

        Args:
            weights: Weights to shrink, as they are passed to the penalty.
            lr: Learning rate of the step.
        """
        chosen = _unique(weights)
        self._shrink(chosen, [lr] * len(chosen))

    def attach(self, optimizer: Optimizer, weights: Weights, *, adaptive: bool = True) -> RemovableHandle:
        r"""Let an optimiser apply the penalty after each of its steps, which gives exact zeros.

        Training then ends where "loss plus penalty" is least, so do not add the penalty to the loss as well: to a
        weight that is attached, and to no other, it has no gradient while it is, so its value is good for a log and
        without effect in a sum. Its gradient would give small weights, never zeros. Pass the very tensor each time:
        another that shares its memory counts as another weight.

        Each weight is shrunk with the learning rate that its parameter group has in that step. Under Adam and its
        relatives (whose state has ``exp_avg_sq``) an entry's step is not the learning rate but
        :math:`\eta / (\sqrt{\hat v} + \epsilon)`, and the proximal map is taken in that metric; with ``lr`` alone, a
        useless weight with a small but steady gradient is pushed by a full ``lr`` in every step and never stays zero.
        No step shrinks an entry by more than ten learning rates, so what the data has not shown yet does not vanish at
        once, and on its way training follows a weaker penalty. For the weights concerned this costs as much as four
        (elastic net) to nine (group lasso) steps of AdamW.

        A step that ``GradScaler`` skips shrinks nothing, also in fused optimisers; nor is a weight shrunk that had no
        gradient. Attach again after building another optimiser. Optimisers that shard their state are not supported.

        Args:
            optimizer: Optimiser of the weights; in Lightning, attach in ``configure_optimizers``.
            weights: Weights to shrink, as they are passed to the penalty. One that is given twice is shrunk once.
            adaptive: ``False`` takes the plain learning rate under every optimiser.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            ValueError: If the optimiser does not hold a weight, or applies the penalty to it already.
        """
        chosen = _unique(weights)
        feature_rows(chosen, self.dim)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        taken = {key for old in self._attachments if old.alive and old.optimizer() is optimizer for key in old.weights}
        for index, weight in enumerate(chosen):
            if id(weight) not in known:
                raise ValueError(
                    f"`weights[{index}]` is not among the parameters of the optimizer: pass the parameter."
                )
            if id(weight) in taken:
                raise ValueError(f"`weights[{index}]` is attached to the optimizer already: it would be shrunk twice.")

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                self._shrink(chosen, self._step_sizes(optimizer, chosen, adaptive))

        handle = optimizer.register_step_post_hook(after_step)
        self._attachments = [old for old in self._attachments if old.alive]
        self._attachments.append(_Attachment(handle, weakref.ref(optimizer), frozenset(map(id, chosen))))
        return handle

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy keeps: it is attached to no optimiser."""
        return {**self.__dict__, "_attachments": []}

    @abstractmethod
    def _value(self, weight: Weights) -> Tensor:
        """Return what the weights cost."""

    @abstractmethod
    def _pulls(self, weights: list[Tensor]) -> list[Tensor]:
        """Return the size of the penalty's gradient at each entry, where it is differentiable."""

    @abstractmethod
    def _shrink(self, weights: list[Tensor], lrs: list[StepSize]) -> None:
        """Apply the proximal map in place; a learning rate is one number, or one for every entry."""

    def _step_sizes(self, optimizer: Optimizer, weights: list[Tensor], adaptive: bool) -> list[StepSize]:
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        # GradScaler calls a fused optimiser also when it must not step: the optimiser finds out on the device
        skipped = getattr(optimizer, "found_inf", None)
        sizes: list[StepSize] = []
        for weight, pull in zip(weights, self._pulls(weights), strict=True):
            size = 0.0 if weight.grad is None else groups[id(weight)]["lr"]
            spread = _spread(optimizer, weight, groups[id(weight)]) if adaptive else None
            if spread is not None:
                size = size / torch.maximum(spread, pull / _LONGEST_STEP).clamp_min(_FLOOR)
            if skipped is not None:
                size = torch.where(skipped.to(weight.device) == 0, torch.as_tensor(size, device=weight.device), 0.0)
            sizes.append(size)
        return sizes


class _Attachment(NamedTuple):
    handle: RemovableHandle
    optimizer: weakref.ref[Optimizer]
    weights: frozenset[int]

    @property
    def alive(self) -> bool:
        return self.optimizer() is not None and self.handle.id in (self.handle.hooks_dict_ref() or ())


def _spread(optimizer: Optimizer, weight: Tensor, group: dict[str, Any]) -> Tensor | None:
    """Return what Adam divides its step by at each entry, or ``None`` for an optimiser of another kind."""
    state = optimizer.state.get(weight, {})
    moment: Tensor | None = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if moment is None or "betas" not in group:
        return None
    step = torch.as_tensor(state.get("step", group.get("step", 1)), dtype=torch.float32, device=moment.device)
    correction: Tensor = 1 - group["betas"][1] ** step
    return (moment.to(accumulation_dtype(moment)) / correction).sqrt() + float(group.get("eps", 0.0))


def _as_list(weights: Weights) -> list[Tensor]:
    each = [weights] if isinstance(weights, Tensor) else list(weights)
    if not each:
        raise ValueError("`weight` holds no tensor: pass the weights to penalise.")
    return each


def _unique(weights: Weights) -> list[Tensor]:
    return list({id(weight): weight for weight in _as_list(weights)}.values())

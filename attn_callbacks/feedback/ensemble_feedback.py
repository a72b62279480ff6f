"""Ensemble feedback: members that do without the features the ensemble relies on too much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks._checks import check_number
from attn_callbacks.bias import BiasReport, Finding
from attn_callbacks.feedback._bound import BoundFeedback, find_at
from attn_callbacks.feedback._member_weights import MemberWeights
from attn_callbacks.feedback._reliance import KIND, feature_findings
from attn_callbacks.feedback.action import Action

__all__ = ["EnsembleFeedback"]

Features = Sequence[int] | Tensor


class EnsembleFeedback(BoundFeedback):
    """Hide a feature set from one more member of an ensemble at every report that shows reliance on it.

    Members that cannot see a shortcut have to learn something else, and the mean of all listens to them too. A set is
    hidden from members in turn, in the end from all, but never so that a member sees nothing. Hidden features are zero,
    in training and in prediction. With ``criterion``, the class with the largest finding is also made the concern of
    one member, whose own loss weighs it ``growth`` times as much at each further report.

    Changes training: what members see, and what they weigh. Answers reliance on its sets (``"feature"`` findings), and
    class bias if members have class weights. Those act while training still makes mistakes; raising one class shifts
    that member's loss and learning rate with it, so the factor is bounded. Costs nothing beside the ensemble, whose
    members each take a forward pass. Hiding a set from a member suddenly costs accuracy at first.

    Args:
        features: Which features are in each named set: their numbers along the last axis of the inputs, or a mask of
            the inputs' features.
        ensemble: Dotted path of a ``losses.DeepEnsemble`` in the LightningModule, built with ``masks`` (ones show
            everything).
        criterion: Dotted path of the ``losses.EnsembleLoss`` that trains it; ``None``: the ensemble alone is changed.
            Its masks, if it has any, are kept equal.
        growth: Factor of a class weight at a step, above 1.
        limit: Largest factor of a class weight, above 1.

    Raises:
        ValueError: If an argument is out of its range; in `bind`, if there is no ensemble with masks that fit the
            features, or its criterion has other masks.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import losses
        >>> module = nn.Module()
        >>> module.model = losses.DeepEnsemble([nn.Linear(4, 2), nn.Linear(4, 2)], masks=torch.ones(2, 4))
        >>> feedback = EnsembleFeedback({"border": (0, 3)})
        >>> feedback.bind(module)
        >>> feedback.state_dict()["hidden"]
        {'border': []}
    """

    answers = frozenset({KIND})
    _next: int
    _hidden: dict[str, list[int]]
    _shown: Tensor | None  # masks that training began with

    def __init__(
        self,
        features: Mapping[str, Features],
        ensemble: str = "model",
        criterion: str | None = None,
        *,
        growth: float = 2.0,
        limit: float = 8.0,
    ) -> None:
        if not isinstance(features, Mapping) or not features:
            raise TypeError(f"`features` must map the name of each set to its features, got {features!r}.")
        for name, value in (("growth", growth), ("limit", limit)):
            check_number(name, value)
            if not 1 < value < math.inf:
                raise ValueError(f"`{name}` must be above 1 and finite, got {value}.")
        self.features = dict(features)
        self.ensemble, self.criterion = ensemble, criterion
        self._weights = MemberWeights(float(growth), float(limit))
        self._clear()

    def apply(self, report: BiasReport) -> Sequence[Action]:
        """Hide each set that is relied on from one more member, and raise the worst class in one member's loss.

        Args:
            report: What the last validation pass showed.
        """
        if self._module is None or self._shown is None:
            raise ValueError("`EnsembleFeedback` has no ensemble. Call `bind(module)` first and keep the module.")
        actions = [action for found in feature_findings(report, self.features) if (action := self._hide(found))]
        worst = next((found for found in report.findings if found.kind == "class"), None)
        if worst is not None and self._weights.known:
            actions += self._raise(worst, report.class_names.index(worst.where))
        self._write()
        return actions

    def answered(self, report: BiasReport) -> tuple[Finding, ...]:
        """Return the findings of reliance on its sets, and of class bias where members have class weights."""
        own = feature_findings(report, self.features)
        return tuple(found for found in super().answered(report) if found.kind != KIND or found in own)

    def state_dict(self) -> dict[str, object]:
        """Return from whom what is hidden, the raised classes, and what training began with."""
        state: dict[str, object] = {
            **super().state_dict(),
            "hidden": {name: list(members) for name, members in self._hidden.items()},
            "next": self._next,
            "weights": self._weights.state(),
        }
        return state if self._shown is None else {**state, "shown": self._shown.clone()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; once bound, masks and weights are written at once.

        Args:
            state: What :meth:`state_dict` returned.
        """
        hidden, turn, weights, shown = (state.get(name) for name in ("hidden", "next", "weights", "shown"))
        if isinstance(hidden, Mapping):
            self._hidden = {name: [int(member) for member in hidden.get(name, ())] for name in self.features}
        self._next = turn if isinstance(turn, int) else self._next
        if isinstance(weights, Mapping):
            self._weights.load(weights)
        self._shown = shown.clone() if isinstance(shown, Tensor) else self._shown
        super().load_state_dict(state)
        self._write()

    def __repr__(self) -> str:
        weights = self._weights
        return (
            f"EnsembleFeedback(sets={list(self.features)}, ensemble={self.ensemble!r}, criterion={self.criterion!r}, "
            f"growth={weights.growth}, limit={weights.limit})"
        )

    def _acting_changed(self) -> None:
        self._write()

    def _look_into(self, module: nn.Module) -> None:
        masks = self._masks(module)
        for name in self.features:
            self._set(name, masks)
        losses = self._losses(module)
        own = getattr(losses, "masks", None)
        if isinstance(own, Tensor) and own.shape != masks.shape:
            raise ValueError(
                f"`{self.criterion}` has masks of shape {tuple(own.shape)}, `{self.ensemble}` of "
                f"{tuple(masks.shape)}: build both with the same masks."
            )

    def _start_anew(self) -> None:
        self._clear()

    def _take_up(self, module: nn.Module) -> None:
        masks, losses = self._masks(module), self._losses(module)
        if self._shown is None:
            self._shown = masks.detach().cpu().clone()
        if self._shown.shape != masks.shape:
            raise ValueError(
                f"The saved masks have shape {tuple(self._shown.shape)}, those of `{self.ensemble}` "
                f"{tuple(masks.shape)}. Resume with the same ensemble."
            )
        if losses is not None:
            self._weights.start(losses)
        self.answers = frozenset({KIND, "class"} if self._weights.known else {KIND})
        self._write()

    def _clear(self) -> None:
        self._shown = None
        self._hidden = {name: [] for name in self.features}
        self._next = 0
        self._weights.clear()

    def _hide(self, finding: Finding) -> Action | None:
        """Hide a set from the next member that sees it and is left with something."""
        masks, name = self._wanted(), finding.where
        members = [(self._next + turn) % len(masks) for turn in range(len(masks))]
        hidden = self._set(name, masks)
        for member in members:
            if bool((masks[member] & hidden).any()) and bool((masks[member] & ~hidden).any()):
                self._hidden[name].append(member)
                self._next = (member + 1) % len(masks)
                number = len(self._hidden[name])
                text = f"{name}: hidden from member {member}, now from {number} of {len(masks)}"
                return Action(text, finding.key, float(number - 1), float(number))
        return None

    def _raise(self, finding: Finding, label: int) -> list[Action]:
        table, old, new = self._weights.raise_class(label)
        if new == old:
            return []
        text = f"{finding.where}: weight in the loss of member {table} x{old:g} -> x{new:g}"
        return [Action(text, finding.key, old, new)]

    def _wanted(self) -> Tensor:
        """Return the masks with all that is hidden."""
        if self._shown is None:
            raise ValueError("`EnsembleFeedback` has no ensemble. Call `bind(module)` first.")
        masks = self._shown.clone()
        for name, members in self._hidden.items():
            masks[members] &= ~self._set(name, masks)
        return masks

    @torch.no_grad()
    def _write(self) -> None:
        module = self._module
        if module is None or self._shown is None:
            return
        masks, losses = self._wanted() if self.acting else self._shown, self._losses(module)
        self._masks(module).copy_(masks)  # in place: compiled steps and distributed copies see it
        own = getattr(losses, "masks", None)
        if isinstance(own, Tensor):
            own.copy_(masks)
        if losses is not None and self._weights.known:
            self._weights.write(losses, self.acting)

    def _losses(self, module: nn.Module) -> Any:
        return None if self.criterion is None else find_at(module, self.criterion, "a `losses.EnsembleLoss`")

    def _masks(self, module: nn.Module) -> Tensor:
        found = find_at(module, self.ensemble, "a `losses.DeepEnsemble`")
        masks = getattr(found, "masks", None)
        if not hasattr(found, "members") or not isinstance(masks, Tensor):
            raise ValueError(
                f"Expected a `losses.DeepEnsemble` with masks at `{self.ensemble}` of {type(module).__name__}, got "
                f"{type(found).__name__} without `members` or `masks`. Build it with "
                "`masks=torch.ones(members, features)`."
            )
        return masks

    def _set(self, name: str, masks: Tensor) -> Tensor:
        """Return the features of a set as a mask on what one member sees."""
        shape, given = tuple(masks.shape[1:]), self.features[name]
        if isinstance(given, Tensor) and given.dtype == torch.bool:
            if tuple(given.shape) != shape:
                raise ValueError(
                    f"`features[{name!r}]` must have shape {shape} as the masks, got {tuple(given.shape)}."
                )
            return given.cpu()
        indices = [int(index) for index in given]
        if not indices or not all(0 <= index < shape[-1] for index in indices):
            raise ValueError(f"`features[{name!r}]` must name features from 0 to {shape[-1] - 1}, got {indices}.")
        marked = torch.zeros(shape, dtype=torch.bool)
        marked[..., indices] = True
        return marked

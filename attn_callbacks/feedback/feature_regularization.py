"""Feature regularisation: weights of a feature set shrink as strongly as the network relies on it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from attn_callbacks._checks import check_number, in_range, integer, name_list
from attn_callbacks.bias import BiasReport, Finding
from attn_callbacks.feedback._bound import BoundFeedback, check_loss, find_at
from attn_callbacks.feedback._reliance import KIND, changed_without, feature_findings
from attn_callbacks.feedback.action import Action

__all__ = ["FeatureRegularization"]

_FORGOTTEN = 1e-3  # of the strength: what memory leaves below it is none
_WORTH_SAYING = 0.005


class FeatureRegularization(BoundFeedback):
    """Shrink the weights that read a set of features, as strongly as predictions were found to rely on that set.

    Each report sets the strength of every set to ``strength`` times the share of samples whose outcome changes without
    it (reliance that is within chance counts as none); features outside all sets are never shrunk. The penalty is
    applied after each optimiser step as a proximal step, which gives exact zeros, under Adam too. Where features are
    columns of an input layer, or rows of an embedding, this closes the way in; deeper down it does not.

    Changes training: the weights, after steps. Answers reliance on its sets (``"feature"`` findings), which the batch
    schema has to name, so that the monitor can measure it. Costs up to nine optimiser steps for the weights concerned,
    and nothing while all strengths are zero.

    Args:
        penalty: ``losses.GroupLassoPenalty`` or ``losses.ElasticNetPenalty``, built with ``num_features``; its own
            strengths multiply those set here.
        weights: Dotted paths of the parameters in the LightningModule, such as ``"model.0.weight"``; the features lie
            along the ``dim`` of the penalty.
        features: Which features are in each named set.
        strength: Strength for a set without which every outcome changes, above 0.
        memory: Share of its last strength that a set keeps at least when less reliance is measured. At 0 a set that is
            cured is let go at once, and its weights come back.

    Raises:
        ValueError: If an argument is out of its range; in `bind`, if there are no such parameters or they have another
            number of features; in `bind_optimizers`, if no optimiser holds all of them.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import losses
        >>> penalty = losses.GroupLassoPenalty(0.1, num_features=4)
        >>> feedback = FeatureRegularization(penalty, "0.weight", {"border": (0, 3)})
        >>> module = nn.Sequential(nn.Linear(4, 2))
        >>> feedback.bind(module)
        >>> feedback.bind_optimizers([torch.optim.Adam(module.parameters())])
        >>> penalty.feature_strength  # nothing was found yet
        tensor([0., 0., 0., 0.])

    References:
        Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", JRSS B 2006.
    """

    answers = frozenset({KIND})

    def __init__(
        self,
        penalty: nn.Module,
        weights: str | Sequence[str],
        features: Mapping[str, Sequence[int]],
        *,
        strength: float = 1.0,
        memory: float = 0.9,
    ) -> None:
        self.penalty = _check_penalty(penalty)
        self.weights = (weights,) if isinstance(weights, str) else name_list("weights", weights)
        self.features = _check_features(features, len(self.penalty.feature_strength))
        check_number("strength", strength)
        if not 0 < strength < math.inf:
            raise ValueError(f"`strength` must be above 0 and finite, got {strength}.")
        self.strength, self.memory = float(strength), in_range("memory", memory, 0, 1)
        self._strengths = dict.fromkeys(self.features, 0.0)
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._handle: Any = None
        self._write()

    def bind_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Find the optimiser that trains the weights; the penalty follows each of its steps from now on.

        Args:
            optimizers: All optimisers of the run.

        Raises:
            ValueError: If none holds all the weights.
        """
        wanted = {id(weight) for weight in self._parameters(self._bound())}
        for optimizer in optimizers:
            if wanted <= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}:
                self._detach()
                self._optimizer = weakref.ref(optimizer)
                self._write()
                return
        raise ValueError(
            f"`FeatureRegularization` needs one optimizer that holds all of {list(self.weights)}, got "
            f"{len(optimizers)} of which none does. Give the weights to one optimizer, or use one feedback for each."
        )

    def apply(self, report: BiasReport) -> Sequence[Action]:
        """Set the strength of every set of features by its reliance.

        Args:
            report: What the last validation pass showed.
        """
        actions = []
        for name, old in self._strengths.items():
            changed = changed_without(report, name)
            if changed is None:
                continue
            new = max(self.strength * changed, self.memory * old)
            new = new if new > _FORGOTTEN * self.strength else 0.0
            self._strengths[name] = new
            if abs(new - old) > _WORTH_SAYING * self.strength:
                text = f"{name}: strength {old:.2f} -> {new:.2f} (outcomes changed without it {changed:.2f})"
                actions.append(Action(text, (KIND, name), old, new))
        self._write()
        return actions

    def answered(self, report: BiasReport) -> tuple[Finding, ...]:
        """Return the findings of reliance on its sets, the largest first."""
        return feature_findings(report, self.features)

    def state_dict(self) -> dict[str, object]:
        """Return the strength of every set."""
        return {**super().state_dict(), "strengths": dict(self._strengths)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; sets that it does not know start at zero.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        kept = state.get("strengths")
        if isinstance(kept, Mapping):
            self._strengths = {name: float(kept.get(name, 0.0)) for name in self.features}
        self._write()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_optimizer": None, "_handle": None}

    def __repr__(self) -> str:
        sets = {name: len(indices) for name, indices in self.features.items()}
        return (
            f"FeatureRegularization({self.penalty!r}, {list(self.weights)}, features by set: {sets}, "
            f"strength={self.strength}, memory={self.memory})"
        )

    def _acting_changed(self) -> None:
        self._write()

    def _look_into(self, module: nn.Module) -> None:
        self._parameters(module)

    def _start_anew(self) -> None:
        self._strengths = dict.fromkeys(self.features, 0.0)

    def _take_up(self, module: nn.Module) -> None:
        self._optimizer = None  # that of the last run; this one's comes once it is built
        self._write()

    def _write(self) -> None:
        """Write the strengths, and let the penalty follow the optimiser while it has something to do."""
        strengths = torch.zeros(len(self.penalty.feature_strength))
        for name, indices in self.features.items():
            if self.acting:
                strengths[list(indices)] = strengths[list(indices)].clamp(min=self._strengths[name])
        self.penalty.set_feature_strength(strengths)
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None or not bool(strengths.any()):
            self._detach()
        elif self._handle is None:
            weights = self._parameters(self._bound())
            self.penalty.to(weights[0].device)
            self._handle = self.penalty.attach(optimizer, weights)

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _bound(self) -> nn.Module:
        if self._module is None:
            raise ValueError("`FeatureRegularization` has no weights. Call `bind(module)` first and keep the module.")
        return self._module

    def _parameters(self, module: nn.Module) -> list[nn.Parameter]:
        return [self._parameter(module, path) for path in self.weights]

    def _parameter(self, module: nn.Module, path: str) -> nn.Parameter:
        found, dim = find_at(module, path, "a parameter"), self.penalty.dim
        if not isinstance(found, nn.Parameter):
            raise ValueError(
                f"Expected a parameter at `{path}` of {type(module).__name__}, got {type(found).__name__}."
            )
        expected = len(self.penalty.feature_strength)
        if not -found.dim() <= dim < found.dim() or found.shape[dim] != expected:
            raise ValueError(
                f"`{path}` must have {expected} features along axis {dim} as the penalty has, got shape "
                f"{tuple(found.shape)}. Build the penalty with `dim=` and `num_features=` to fit."
            )
        return found


def _check_penalty(penalty: Any) -> Any:
    example = "losses.GroupLassoPenalty(0.1, num_features=...)"
    check_loss("penalty", penalty, example)
    missing = [name for name in ("attach", "set_feature_strength") if not callable(getattr(penalty, name, None))]
    if missing or not isinstance(getattr(penalty, "feature_strength", None), Tensor):
        raise ValueError(
            f"`penalty` must have strengths by feature and be attached to an optimizer, such as `{example}`, got "
            f"{penalty!r}."
        )
    return penalty


def _check_features(features: Mapping[str, Sequence[int]], number: int) -> dict[str, tuple[int, ...]]:
    if not isinstance(features, Mapping) or not features:
        raise TypeError(f"`features` must map the name of each set to its features, got {features!r}.")
    checked = {name: tuple(integer(f"features[{name!r}]", index) for index in features[name]) for name in features}
    for name, indices in checked.items():
        if not indices or not all(0 <= index < number for index in indices):
            raise ValueError(
                f"`features[{name!r}]` must name some of the {number} features by 0 to {number - 1}, got {indices}."
            )
    return checked

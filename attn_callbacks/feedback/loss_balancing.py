"""Loss balancing: coefficients of auxiliary terms that rise while the bias they work against stays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks._checks import check_number, in_range
from attn_callbacks.bias import BiasReport, Finding
from attn_callbacks.bias.rates import rate_error
from attn_callbacks.feedback._accuracy_level import AccuracyLevel, compared
from attn_callbacks.feedback._bound import BoundFeedback, find_at
from attn_callbacks.feedback._reliance import is_candidate
from attn_callbacks.feedback.action import Action

__all__ = ["LossBalancing"]


class LossBalancing(BoundFeedback):
    """Steer a ``losses.LossBalancer`` in the module: end its epochs, and raise the terms that work against a bias.

    For a training step that adds up several named losses. Each ``fixed`` term that ``terms`` names is multiplied by
    ``growth`` at every report that still has a finding of its kind. Where accuracy has fallen below its running mean by
    more than ``tolerance`` and chance, all raised terms go one step back instead, and never beyond that again; no term
    goes below what the module set. Strategies that compare epochs (``DynamicWeightAverage``) get their ``step()`` with
    the first validation of each epoch, so not twice in an epoch of several.

    Changes training: coefficients of the loss. Answers what ``terms`` names. Costs nothing per step; a compiled step is
    compiled again when a coefficient changes.

    Args:
        balancer: Dotted path of the balancer in the LightningModule.
        terms: Name of the ``fixed`` term that answers each kind of finding, such as ``{"feature": "reliance",
            "attention": "rationale"}``; ``None``: the strategy alone is steered.
        growth: Factor of one step, above 1.
        limit: Largest multiple of the coefficient that the module set, above 1.
        tolerance: Accuracy that may be lost.
        step: Call ``balancer.step()`` once an epoch; ``False`` where the module does.

    Raises:
        ValueError: If an argument is out of its range; in `bind`, if there is no balancer or it has not these terms.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import losses
        >>> module = nn.Module()
        >>> module.balancer = losses.LossBalancer(["label"], fixed={"rationale": 0.1})
        >>> feedback = LossBalancing(terms={"class": "rationale"})
        >>> feedback.bind(module)
        >>> report = BiasReport(0, 0, torch.tensor([[[90, 10], [40, 60]]]), ("negative", "positive"))
        >>> print(*feedback.apply(report))
        rationale: coefficient 0.1 -> 0.2 (finding stays: class positive)
        >>> module.balancer.fixed
        {'rationale': 0.2}
    """

    _level: AccuracyLevel | None  # that accuracy usually has
    _ended: int
    _given: dict[str, float]  # coefficients that the module set
    _natural: Tensor | None  # weights of a strategy that `step` changes, before it did

    def __init__(
        self,
        balancer: str = "balancer",
        terms: Mapping[str, str] | None = None,
        *,
        growth: float = 2.0,
        limit: float = 16.0,
        tolerance: float = 0.02,
        step: bool = True,
    ) -> None:
        if terms is not None and not isinstance(terms, Mapping):
            raise TypeError(f"`terms` must map kinds of finding to names of terms, got {terms!r}.")
        for name, value in (("growth", growth), ("limit", limit)):
            check_number(name, value)
            if not 1 < value < math.inf:
                raise ValueError(f"`{name}` must be above 1 and finite, got {value}.")
        self.balancer = balancer
        self.terms = dict(terms or {})
        self.answers = frozenset(self.terms)
        self.growth, self.limit = float(growth), float(limit)
        self.tolerance, self.step = in_range("tolerance", tolerance, 0, 1), step
        self._clear()

    def apply(self, report: BiasReport) -> Sequence[Action]:
        """End an epoch of the balancer if one has passed, and move the coefficients by one step.

        Args:
            report: What the last validation pass showed.
        """
        if self._module is None:
            raise ValueError("`LossBalancing` has no balancer. Call `bind(module)` first and keep the module.")
        actions = self._end_epoch(report.epoch)
        fell = self._fell(report)
        before = report.accuracy if self._level is None else self._level.mean
        for term in dict.fromkeys(self.terms.values()):
            finding = next((found for found in self.answered(report) if self.terms[found.kind] == term), None)
            old = self._factors[term]
            if fell and old > 1:
                new = self._ceilings[term] = max(1.0, old / self.growth)
                why = f"accuracy {report.accuracy:.2f} fell from {before:.2f}"
            elif not fell and finding is not None:
                new = max(old, min(old * self.growth, self._ceilings[term]))
                why = f"finding stays: {finding.kind} {finding.where}"
            else:
                continue
            if new != old:
                self._factors[term] = new
                actions.append(self._action(term, old, new, why, finding))
        self._write()
        return actions

    def answered(self, report: BiasReport) -> tuple[Finding, ...]:
        """Return the findings of the kinds that have a term; features only if predictions are known to rely on them."""
        return tuple(found for found in super().answered(report) if not is_candidate(report, found))

    def state_dict(self) -> dict[str, object]:
        """Return coefficients, multiples and their bounds, the level of accuracy, and the last epoch that was ended."""
        state = {
            **super().state_dict(),
            "given": dict(self._given),
            "factors": dict(self._factors),
            "ceilings": dict(self._ceilings),
            "level": [] if self._level is None else list(self._level),
            "ended": self._ended,
        }
        return state if self._natural is None else {**state, "weight": self._natural.clone()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; once bound, the coefficients are written at once.

        Args:
            state: What :meth:`state_dict` returned.
        """
        given = state.get("given")
        if isinstance(given, Mapping):
            self._given = {term: float(given[term]) for term in self._factors if term in given}
        for name, kept in (("factors", self._factors), ("ceilings", self._ceilings)):
            saved = state.get(name)
            if isinstance(saved, Mapping):
                kept.update({term: float(saved[term]) for term in kept if term in saved})
        level, ended, natural = (state.get(name) for name in ("level", "ended", "weight"))
        if isinstance(level, list):
            self._level = AccuracyLevel(*level) if level else None
        self._ended = ended if isinstance(ended, int) else self._ended
        self._natural = natural.clone() if isinstance(natural, Tensor) else self._natural
        super().load_state_dict(state)
        self._write()

    def __repr__(self) -> str:
        return (
            f"LossBalancing({self.balancer!r}, {self.terms}, growth={self.growth}, limit={self.limit}, "
            f"tolerance={self.tolerance}, step={self.step})"
        )

    def _acting_changed(self) -> None:
        self._write()
        weight = None if self._module is None else self._weight(self._find(self._module))
        if not self.acting and weight is not None and self._natural is not None:
            with torch.no_grad():
                weight.copy_(self._natural)

    def _look_into(self, module: nn.Module) -> None:
        found = self._find(module)
        unknown = sorted(set(self.terms.values()) - set(found.fixed))
        if unknown:
            raise ValueError(
                f"`terms` names {unknown}, but the `fixed` terms of `{self.balancer}` are {sorted(found.fixed)}."
            )
        self._check_coefficients(found)

    def _start_anew(self) -> None:
        self._clear()

    def _take_up(self, module: nn.Module) -> None:
        fixed = self._find(module).fixed
        self._given = {term: self._given.get(term, float(fixed[term])) for term in self._factors}
        self._write()

    def _clear(self) -> None:
        self._factors = dict.fromkeys(self.terms.values(), 1.0)
        self._ceilings = dict.fromkeys(self.terms.values(), self.limit)
        self._level = None
        self._ended = -1
        self._given, self._natural = {}, None

    def _write(self) -> None:
        fixed = {} if self._module is None else self._find(self._module).fixed
        for term, given in self._given.items():
            if term in fixed:
                fixed[term] = given * (self._factors[term] if self.acting else 1.0)

    def _end_epoch(self, epoch: int) -> list[Action]:
        """Let the strategy compare epochs; only while acting, since its weights change with it."""
        if self._module is None or not self.step or epoch == self._ended:
            return []
        self._ended = epoch
        if not self.acting:
            return []
        balancer = self._find(self._module)
        weight = self._weight(balancer)
        before = None if weight is None else weight.detach().clone()
        balancer.step()
        if weight is None or before is None or torch.equal(weight, before):
            return []
        self._natural = before if self._natural is None else self._natural
        shown = ", ".join(f"{task} {value:.2f}" for task, value in zip(balancer.tasks, weight.tolist(), strict=True))
        return [Action(f"weights of the losses: {shown}")]

    def _fell(self, report: BiasReport) -> bool:
        """Say whether accuracy is below its running mean, by more than the tolerance and chance; take it in."""
        error = float(rate_error(torch.tensor(report.accuracy), report.support.sum()))
        self._level, fell = compared(self._level, report.accuracy, error, self.tolerance)
        return fell

    def _action(self, term: str, old: float, new: float, why: str, finding: Finding | None) -> Action:
        old, new = old * self._given[term], new * self._given[term]
        text = f"{term}: coefficient {old:.3g} -> {new:.3g} ({why})"
        return Action(text, None if finding is None else finding.key, old, new)

    def _find(self, module: nn.Module) -> Any:
        found = find_at(module, self.balancer, "a `losses.LossBalancer`")
        if not all(hasattr(found, name) for name in ("tasks", "fixed", "strategy", "step")):
            raise ValueError(
                f"Expected a `losses.LossBalancer` at `{self.balancer}` of {type(module).__name__}, got "
                f"{type(found).__name__}, which lacks `tasks`, `fixed`, `strategy` or `step`."
            )
        return found

    def _check_coefficients(self, balancer: Any) -> None:
        for term in self._factors:
            if not balancer.fixed[term] > 0:
                raise ValueError(
                    f"The coefficient of {term!r} must be above 0 to be raised, got {balancer.fixed[term]}."
                )

    @staticmethod
    def _weight(balancer: Any) -> Tensor | None:
        weight = getattr(balancer.strategy, "weight", None)
        return weight if isinstance(weight, Tensor) else None

"""Attention guidance: a loss term that draws attention to relevant tokens and away from spurious ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attn_callbacks._checks import check_number, integer, name_list, one_of
from attn_callbacks.bias import BiasReport, Finding
from attn_callbacks.feedback._bound import BoundFeedback, check_loss
from attn_callbacks.feedback._reliance import KIND, feature_findings
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.attention_term import QUERIES, attention_term, chosen_heads, guided_calls
from attn_callbacks.feedback.step import StepFeedback, TrainingStep
from attn_callbacks.feedback.strength import StrengthSettings, StrengthState, evidence, fallen, ramp, strength_step
from attn_callbacks.feedback.term_scale import averaged, scale

__all__ = ["AttentionGuidance"]


class AttentionGuidance(BoundFeedback, StepFeedback):
    """Add a term to the training loss that keeps attention off spurious tokens, or on relevant ones.

    By default the term is the exact attention mass of :func:`attn_callbacks.feedback.attention_term.attention_term`,
    over all layers and queries: supervision of the last layer alone tends to fail, since information flows around it,
    and no token depends on a set that no layer attends to.

    Works in a window of strengths only, so validation moves the strength
    (:func:`attn_callbacks.feedback.strength.strength_step`): up while the model still relies on spurious tokens, down
    when it does not and accuracy falls. Attention is not reliance: let the monitor measure that, too, and compare with
    :class:`~attn_callbacks.feedback.RandomRationaleControl`.

    Changes training. Answers attention bias and reliance on spurious tokens (a ``"feature"`` finding), not candidates;
    for group bias it joins in as a second means, beside what the finding names. Costs about one more forward and
    backward of the attention kernel of each guided layer; with a ``loss`` of your own, its weights instead.

    Args:
        loss: ``None``, or a module without learnable parameters such as ``losses.AttentionGuidedLoss()``, called as
            ``loss(list of weights, relevance, valid, spurious=spurious)``.
        coefficient: Strength to start with: factor on the term, finite and not negative.
        layers: Names or glob patterns of the attention modules to guide; ``None``: all.
        heads: Indices of the heads to guide in each of them; ``None``: all.
        queries: ``"all"`` tokens, or the ``"first"``, where the classification token sits; for the built-in term.
        when: ``"always"``; ``"biased"``: from the first report with a finding that it answers on; or ``"unmeasured"``:
            the same, but never where reliance on spurious tokens is measured, since counter-examples can be made there
            (:class:`~attn_callbacks.feedback.MaskRandomization`), nor where validation has no marks.
        control: Move the strength by what validation shows; ``False`` leaves it as it is.
        scale_free: Multiply the strength by the running average of the loss over that of the term, so that 1 means
            equal sizes: of 40 tokens attended alike, one spurious one costs 150 times less than one relevant one.
            ``None``: for the built-in term. Processes of a distributed run then add up four numbers a step.
        warm_up: Number of steps over which the strength grows from nothing, after guidance was switched on.
        raise_by: Factor on the strength while reliance stays.
        limit: The strength stays between ``1 / limit`` and ``limit`` times ``coefficient``.
        tolerance: Fall of accuracy below its running mean that is accepted, as is any within two standard errors.

    Raises:
        ValueError: If an argument is out of its range, ``loss`` has learnable parameters, or ``queries`` is asked of
            it; in `term`, if the loss is not a scalar.
        TypeError: If ``loss`` is not a module, a number not a number, or ``layers`` a single string.
        RuntimeError: In `term`, if no self-attention has the tokens of the annotation, or none carries a graph.

    Example:
        >>> guidance = AttentionGuidance(coefficient=2.0, when="biased")
        >>> counts = torch.tensor([[[95, 5], [5, 95]], [[60, 40], [40, 60]]])
        >>> report = BiasReport(0, 100, counts, ("negative", "positive"), ("Amazon", "Tweets"))
        >>> for action in guidance.apply(report):
        ...     print(action.text.partition(" (")[0])
        attention guidance switched on with strength 2
    """

    sees = frozenset({"attention"})
    answers = frozenset({"feature", "group", "attention"})

    def __init__(
        self,
        loss: nn.Module | None = None,
        coefficient: float = 1.0,
        *,
        layers: Sequence[str] | None = None,
        heads: Sequence[int] | None = None,
        queries: str = "all",
        when: str = "always",
        control: bool = True,
        scale_free: bool | None = None,
        warm_up: int = 0,
        raise_by: float = 1.5,
        limit: float = 10.0,
        tolerance: float = 0.02,
    ) -> None:
        check_number("coefficient", coefficient)
        if not 0 <= coefficient < math.inf:
            raise ValueError(f"`coefficient` must be finite and not negative, got {coefficient}.")
        self.loss = _checked_loss(loss, one_of("queries", queries, QUERIES))
        self.coefficient = coefficient
        self.layers = None if layers is None else name_list("layers", layers)
        self.heads = None if heads is None else tuple(integer("heads", head) for head in heads)
        self.queries = queries
        self.when = one_of("when", when, ("always", "biased", "unmeasured"))
        self.control = control
        self.scale_free = loss is None if scale_free is None else scale_free
        self.settings = StrengthSettings(raise_by=raise_by, limit=limit, tolerance=tolerance, warm_up=warm_up)
        self._on = self.when == "always"
        self._steps = 0  # taken part in
        self._state = StrengthState()
        self._averages: Tensor | None = None

    @property
    def active(self) -> bool:
        """The term is added; while it is not, attention need not be captured."""
        return self.acting and self._on

    @property
    def strength(self) -> float:
        """Factor on the term after the warm-up, before ``scale_free``: ``coefficient``, as validation has moved it."""
        return self.coefficient * self._state.factor

    def term(self, step: TrainingStep) -> Tensor | None:
        """Return what is to be added to the loss of a training step; ``None`` while not active, or without annotation.

        Args:
            step: The step. What counts of its attention is self-attention over the annotated tokens.
        """
        if not self.active:
            return None
        found = self._guiding_term(step)
        factor: Tensor | float = self.strength * ramp(self._steps, self.settings.warm_up)
        self._steps += 1
        if self.scale_free:  # also without annotation: the other processes wait
            nothing = torch.zeros_like(step.loss)
            self._averages = averaged(self._averages, step.loss, nothing if found is None else found, _annotated(step))
            factor = factor * scale(self._averages)
        return None if found is None else factor * found

    def apply(self, report: BiasReport) -> tuple[Action, ...]:
        """Switch guidance on if it waited for a finding, and move its strength.

        Args:
            report: What the last validation pass showed.
        """
        before, found, seen = self.strength, self.answered(report), evidence(report)
        if self.control:
            warm = not self.acting or self._steps >= self.settings.warm_up
            acted = self.active and self._steps > 0
            self._state = strength_step(self._state, seen, self.settings, act=self._on and warm, acted=acted)
        if not self._on and found:
            self._on = True
            text = f"attention guidance switched on with strength {before:g} ({found[0].text.rstrip('.')})"
            return (Action(text, found[0].key, 0.0, before),)
        if self.strength == before:
            return ()
        rose = self.strength > before
        why = seen.reason if rose else fallen(self._state, seen)
        text = f"attention guidance: strength {before:.3g} -> {self.strength:.3g} ({why})"
        return (Action(text, _cause(found) if rose else None, before, self.strength),)

    def answered(self, report: BiasReport) -> tuple[Finding, ...]:
        """Return the findings it can do something about, the largest first: reliance only on what it guides away from.

        Args:
            report: What the last validation pass showed.
        """
        if self.when == "unmeasured" and ("spurious" in report.reliance or not report.attention):
            return ()
        reliance = feature_findings(report, ("spurious",))
        return tuple(found for found in super().answered(report) if found.kind != KIND or found in reliance)

    def state_dict(self) -> dict[str, object]:
        """Return whether guidance is on, and how strong."""
        state = {**super().state_dict(), "active": self._on, "steps": self._steps, **self._state.to_dict()}
        return state if self._averages is None else {**state, "averages": self._averages.clone()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; with ``when="always"`` guidance stays on.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        self._on = self.when == "always" or bool(state.get("active", self._on))
        steps, averages = state.get("steps"), state.get("averages")
        self._steps = steps if isinstance(steps, int) else self._steps
        self._averages = averages.clone() if isinstance(averages, Tensor) else self._averages
        self._state = self._state.restored(state)

    def __repr__(self) -> str:
        return (
            f"AttentionGuidance({self.loss!r}, {self.coefficient}, layers={self.layers}, heads={self.heads}, "
            f"queries={self.queries!r}, when={self.when!r}, control={self.control}, scale_free={self.scale_free}, "
            f"warm_up={self.settings.warm_up}, raise_by={self.settings.raise_by}, limit={self.settings.limit}, "
            f"tolerance={self.settings.tolerance})"
        )

    def _start_anew(self) -> None:
        self._on, self._steps, self._state, self._averages = self.when == "always", 0, StrengthState(), None

    def _guiding_term(self, step: TrainingStep) -> Tensor | None:
        relevance, spurious = step.relevance, step.spurious
        annotation = spurious if relevance is None else relevance
        if annotation is None:
            return None
        calls = guided_calls(step.calls, annotation.shape)
        if self.loss is None:
            return attention_term(calls, relevance, spurious, step.valid, heads=self.heads, queries=self.queries)
        weights = [chosen_heads(call, call.weights(), self.heads) for call in calls]
        term: Tensor = self.loss.to(annotation.device)(weights, relevance, step.valid, spurious=spurious)
        if term.dim() > 0:
            raise ValueError(f"`loss` must return a scalar, got shape {tuple(term.shape)}. Use reduction='mean'.")
        return term


def _checked_loss(loss: nn.Module | None, queries: str) -> nn.Module | None:
    if loss is None:
        return None
    check_loss("loss", loss, "losses.AttentionGuidedLoss()")
    if queries != "all":
        raise ValueError(f"queries={queries!r} is for the built-in term, got `loss` as well: let the loss choose.")
    return loss


def _annotated(step: TrainingStep) -> Tensor:
    """Whether any token of the step is marked, as a bool scalar on the device."""
    marked = [
        mask if step.valid is None else mask & step.valid
        for mask in (step.relevance, step.spurious)
        if mask is not None
    ]
    none = torch.zeros((), dtype=torch.bool, device=step.loss.device)
    return torch.stack([none, *(mask.any() for mask in marked)]).any()


def _cause(found: Sequence[Finding]) -> tuple[str, str] | None:
    """Return the key of the finding that strength answers first."""
    kinds = ("feature", "attention", "group")
    first = min(found, key=lambda finding: kinds.index(finding.kind), default=None)
    return None if first is None else first.key

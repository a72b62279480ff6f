"""What was decided and what came of it: the memory of a bias loop, and the judge of its feedback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attn_callbacks.bias import BiasReport, Finding
from attn_callbacks.bias.sizes import measure, size_of
from attn_callbacks.feedback._trial import Trial, takes_part
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.base import Feedback

__all__ = ["Ledger", "feedback_names"]

Entry = dict[str, Any]


class Ledger:
    """Keeps every decision with its finding and, one validation later, the effect on it; withdraws what does not help.

    A feedback is judged by one finding of a kind it answers: the largest in the first report in which it acts. Unless
    the mean of that finding's size over the last half of ``patience`` validations is below its first size by more than
    the standard error of the difference, the feedback is withdrawn, and the ledger says so. Validations that did not
    measure it do not count. Whoever passed is tried again when the finding comes back.

    All of it is plain numbers and text: it goes into a checkpoint, and into lines of JSON. What was decided between the
    last two validations is in :attr:`late`.

    Args:
        patience: Validations after which a feedback that has not helped is withdrawn; ``None``: never.

    Example:
        >>> import torch
        >>> report = BiasReport(0, 100, torch.tensor([[[90, 10], [40, 60]]]), ("negative", "positive"))
        >>> ledger = Ledger(patience=None)
        >>> ledger.add(report, {"accuracy": 0.75}, {"Notice": [Action("seen", ("class", "positive"))]})
        >>> better = BiasReport(1, 200, torch.tensor([[[90, 10], [20, 80]]]), ("negative", "positive"))
        >>> ledger.add(better, {"accuracy": 0.85}, {})
        >>> decision = ledger.entries[0]["decisions"][0]
        >>> decision["action"], round(decision["finding"]["size"], 2), round(decision["effect"], 2)
        ('seen', 0.3, -0.2)
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.entries: list[Entry] = []
        self._trials: dict[str, Trial] = {}
        self._between: list[Entry] = []  # decided before there was any entry
        self._since: list[str] = []
        self.late: list[str] = []

    def add(
        self,
        report: BiasReport,
        measured: Mapping[str, float],
        actions: Mapping[str, Sequence[Action | str]],
        *,
        dry_run: bool = False,
        time: float | None = None,
        note: str | None = None,
    ) -> None:
        """Add a validation and what was decided in it, and tell the decisions before it what came of them.

        Args:
            report: What was found.
            measured: What models are selected by.
            actions: What each feedback did, by its name.
            dry_run: Nothing of it was done.
            time: Seconds since 1970, for the reader.
            note: What else the reader should know of this validation.
        """
        self.late, self._since = self._since, []
        if self.entries:
            for decision in self.entries[-1]["decisions"]:
                _close(decision, report)
        decisions, self._between = self._between, []
        decisions += [
            _decision(name, _as_action(action), report, dry_run) for name, made in actions.items() for action in made
        ]
        numbers = {name: value if math.isfinite(value) else None for name, value in measured.items()}
        self.entries.append(
            {"epoch": report.epoch, "step": report.step, "time": time, **numbers, "note": note, "decisions": decisions}
        )

    def add_between(self, name: str, action: Action) -> None:
        """Enter what was decided between validations: with the last one, or else with the first to come.

        Args:
            name: Name of the feedback.
            action: What was done.
        """
        place = self.entries[-1]["decisions"] if self.entries else self._between
        place.append(_decision(name, action, None, dry_run=False))
        self._since.append(f"{name}: {action}")

    def first_action(self, name: str, feedback: Feedback) -> list[Action]:
        """Return what to say, once, of a feedback that waits for no finding.

        Args:
            name: Its name in the ledger.
            feedback: The feedback.
        """
        known = any(decision["feedback"] == name for entry in self.entries for decision in entry["decisions"])
        return [] if known or feedback.early is None else [Action(f"on from the start ({feedback.early})")]

    def useless(self, name: str, feedback: Feedback, report: BiasReport) -> Action | None:
        """Judge a feedback after a report; return what to say if it is to be withdrawn.

        Args:
            name: Its name in the ledger.
            feedback: The feedback.
            report: The report it has just answered.
        """
        if self.patience is None or (feedback.early is not None and not self._has_answered(name)):
            return None
        trial = self._trials.get(name)
        if trial is None:
            found = _measurable(feedback, report) if takes_part(feedback) else []
            if found:
                self._trials[name] = Trial.of(max(found, key=lambda finding: finding.size))
            return None
        trial.add(measure(report, trial.key))
        if trial.is_over(self.patience):
            del self._trials[name]
            return None
        if not trial.has_failed(self.patience):
            return None
        still = next((finding for finding in _measurable(feedback, report) if finding.key == trial.key), None)
        if still is None:  # too small to be told from chance: the next finding begins anew
            del self._trials[name]
            return None
        late = trial.late()
        return Action(
            f"withdrawn: in {len(trial.sizes)} validations the finding it answers did not fall from {trial.start:.2f} "
            f"by more than its standard error, to {late.size:.2f} in the mean of the last half "
            f"({still.text.rstrip('.')})",
            trial.key,
            trial.start,
            late.size,
        )

    def _has_answered(self, name: str) -> bool:
        decisions = (decision for entry in self.entries for decision in entry["decisions"])
        return any(decision["feedback"] == name and decision["finding"] is not None for decision in decisions)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a checkpoint."""
        trials = {name: trial.state() for name, trial in self._trials.items()}
        return {"entries": self.entries, "trials": trials, "between": self._between}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.entries = list(state.get("entries", ()))
        trials = state.get("trials", {})
        self._trials = {name: Trial.restored(trial) for name, trial in trials.items() if "sizes" in trial}
        self._between = list(state.get("between", ()))

    def lines(self) -> list[Entry]:
        """Return one flat dict a decision: when, what was found, what was done, and the effect where it is known."""
        return [
            {**{name: entry[name] for name in ("epoch", "step", "time")}, **decision}
            for entry in self.entries
            for decision in entry["decisions"]
        ]


def feedback_names(feedback: Sequence[Feedback]) -> tuple[str, ...]:
    """Return the class name of each feedback; the second of a kind has a number.

    Example:
        >>> from attn_callbacks.feedback import ClassReweighting
        >>> feedback_names([ClassReweighting("first"), ClassReweighting("second")])
        ('ClassReweighting', 'ClassReweighting_1')
    """
    kinds = [type(each).__name__ for each in feedback]
    before = [kinds[:place].count(kind) for place, kind in enumerate(kinds)]
    return tuple(f"{kind}_{count}" if count else kind for kind, count in zip(kinds, before, strict=True))


def _measurable(feedback: Feedback, report: BiasReport) -> list[Finding]:
    return [finding for finding in feedback.answered(report) if measure(report, finding.key) is not None]


def _as_action(action: Action | str) -> Action:
    return action if isinstance(action, Action) else Action(str(action))


def _decision(name: str, action: Action, report: BiasReport | None, dry_run: bool) -> Entry:
    findings = () if report is None else report.findings
    finding = next((found for found in findings if found.key == action.finding), None)
    shown = None
    if finding is not None:
        shown = {
            "kind": finding.kind,
            "where": finding.where,
            "size": finding.size,
            "interval": [limit if math.isfinite(limit) else None for limit in finding.interval],
            "text": finding.text,
        }
    elif action.finding is not None:
        size = None if report is None else size_of(report, action.finding)
        shown = {"kind": action.finding[0], "where": action.finding[1], "size": size}
    return {
        "feedback": name,
        "finding": shown,
        "action": action.text,
        "old": action.old,
        "new": action.new,
        "dry_run": dry_run,
        "effect": None,
    }


def _close(decision: Entry, report: BiasReport) -> None:
    """Note how the size changed by the next validation, whether or not it still is a finding; unknown stays unknown."""
    finding = decision["finding"]
    if finding is None or finding["size"] is None:
        return
    now = size_of(report, (finding["kind"], finding["where"]))
    decision["effect"] = None if now is None else now - finding["size"]

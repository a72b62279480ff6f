"""What was decided and what came of it: the memory of a bias loop, and the judge of its feedback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.base import Feedback

__all__ = ["Ledger", "feedback_names"]

Entry = dict[str, Any]


class Ledger:
    """Keeps every decision with its finding and, one validation later, the effect on it; withdraws what does not help.

    A feedback is judged by the largest finding of the kinds it answers. When it first changes something, the size of
    that finding is noted; if none of the next ``patience`` validations shows one that is smaller by more than its
    standard error (or none at all), the feedback is withdrawn, and the ledger says so.

    All of it is plain numbers and text: it goes into a checkpoint, and into lines of JSON.

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
        self._trials: dict[str, dict[str, float]] = {}

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
        if self.entries:
            for decision in self.entries[-1]["decisions"]:
                _close(decision, report)
        decisions = [
            _decision(name, _as_action(action), report, dry_run) for name, made in actions.items() for action in made
        ]
        numbers = {name: value if math.isfinite(value) else None for name, value in measured.items()}
        self.entries.append(
            {"epoch": report.epoch, "step": report.step, "time": time, **numbers, "note": note, "decisions": decisions}
        )

    def useless(self, name: str, feedback: Feedback, report: BiasReport, acted: bool) -> Action | None:
        """Judge a feedback after a report; return what to say if it is to be withdrawn.

        Args:
            name: Its name in the ledger.
            feedback: The feedback.
            report: The report it has just answered.
            acted: It changed something.
        """
        largest = next(iter(feedback.answered(report)), None)
        size = 0.0 if largest is None else largest.size
        trial = self._trials.get(name)
        if trial is None:
            if acted and largest is not None:
                self._trials[name] = {"size": size, "error": largest.standard_error, "reports": 0, "best": size}
            return None
        trial["reports"] += 1
        trial["best"] = min(trial["best"], size)
        if self.patience is None or trial["reports"] < self.patience:
            return None
        if trial["best"] < trial["size"] - trial["error"]:
            self._trials[name] = {"size": math.inf, "error": 0.0, "reports": 0, "best": size}  # it has proved itself
            return None
        if largest is None or size == 0.0:
            return None
        return Action(
            f"withdrawn: in {trial['reports']:.0f} validations the largest finding it answers never fell from "
            f"{trial['size']:.2f} by more than its standard error ({largest.text.rstrip('.')})",
            largest.key,
            trial["size"],
            size,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for a checkpoint."""
        return {"entries": self.entries, "trials": self._trials}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.entries = list(state.get("entries", ()))
        self._trials = {name: dict(trial) for name, trial in state.get("trials", {}).items()}

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


def _as_action(action: Action | str) -> Action:
    return action if isinstance(action, Action) else Action(str(action))


def _decision(name: str, action: Action, report: BiasReport, dry_run: bool) -> Entry:
    finding = next((found for found in report.findings if found.key == action.finding), None)
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
        shown = {"kind": action.finding[0], "where": action.finding[1], "size": None}
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
    """Note how the finding changed by the next validation; 0 is what a finding that is gone has left."""
    finding = decision["finding"]
    if finding is None or finding["size"] is None:
        return
    key = (finding["kind"], finding["where"])
    now = next((found.size for found in report.findings if found.key == key), 0.0)
    decision["effect"] = now - finding["size"]

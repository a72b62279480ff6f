"""Feedback on training steps that waits until reliance on its token set was found."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from attn_callbacks._checks import one_of
from attn_callbacks.bias import BiasReport, Finding
from attn_callbacks.feedback._bound import BoundFeedback
from attn_callbacks.feedback._reliance import KIND, feature_findings
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.step import StepFeedback

__all__ = ["SwitchedFeedback"]


class SwitchedFeedback(BoundFeedback, StepFeedback):
    """Base of what takes part in steps from the first finding of reliance on.

    It stays on when the finding is gone: the shortcut is still in the data, and comes back once nothing opposes it.

    Args:
        region: Name of the token set it acts on; ``None``: the whole input, which no finding speaks of.
        when: ``"biased"``, or ``"always"``.

    Raises:
        ValueError: If ``when`` is unknown, or it would wait for ever.
    """

    answers = frozenset({KIND})

    def __init__(self, region: str | None, when: str) -> None:
        if when == "biased" and region == "relevance":
            raise ValueError("Reliance on `relevance` is never a finding to wait for: pass when='always'.")
        self.region = region
        self.when = one_of("when", when, ("biased", "always"))
        self._on = when == "always"

    @property
    def active(self) -> bool:
        """It takes part in steps: it is switched on and acting."""
        return self.acting and self._on

    def apply(self, report: BiasReport) -> Sequence[Action]:
        """Switch on at the first finding of reliance on the region.

        Args:
            report: What the last validation pass showed.
        """
        found = self.answered(report)
        if not found:
            return ()
        if self._on:
            return self._strengthen(found[0])
        self._on = True
        text = f"{self._name} switched on with {self._strength_name} {self._strength:g} ({found[0].text.rstrip('.')})"
        return (Action(text, found[0].key, 0.0, self._strength),)

    def answered(self, report: BiasReport) -> tuple[Finding, ...]:
        """Return the findings of reliance on the region, the largest first."""
        return () if self.region is None else feature_findings(report, (self.region,))

    def state_dict(self) -> dict[str, object]:
        """Return whether it is switched on."""
        return {**super().state_dict(), "on": self._on}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; with ``when="always"`` it stays on.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        self._on = self.when == "always" or bool(state.get("on", self._on))

    _name = ""
    _strength_name = ""

    @property
    @abstractmethod
    def _strength(self) -> float:
        """The number that says how strongly it acts."""

    def _strengthen(self, finding: Finding) -> Sequence[Action]:
        """Answer a finding that is still there although it was on."""
        del finding
        return ()

    def _start_anew(self) -> None:
        self._on = self.when == "always"

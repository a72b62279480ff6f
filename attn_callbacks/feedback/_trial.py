"""A feedback on trial: does the finding fall that it acts on?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from attn_callbacks.bias import Finding
from attn_callbacks.bias.sizes import Measured
from attn_callbacks.feedback.base import Feedback
from attn_callbacks.feedback.step import StepFeedback

__all__ = ["Trial", "takes_part"]

_BACK = 2.0
"""Standard errors by which a finding has to rise for a feedback that has proved itself to be tried again."""


@dataclass
class Trial:
    """The sizes of one finding since a feedback took it up, all of them plain numbers.

    Args:
        kind: Kind of the finding.
        where: Its place.
        start: Its size when the trial began.
        error: Standard error of that.
        sizes: Its size in each validation since that measured it.
        errors: Their standard errors.
        unknown: Validations since the last that measured it.
        proved: It fell; the trial waits for it to come back.
    """

    kind: str
    where: str
    start: float
    error: float
    sizes: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    unknown: int = 0
    proved: bool = False

    @classmethod
    def of(cls, finding: Finding) -> Trial:
        """Begin with a finding."""
        return cls(finding.kind, finding.where, finding.size, finding.standard_error)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Trial:
        """Continue from :meth:`state`."""
        return cls(**{**state, "sizes": list(state["sizes"]), "errors": list(state["errors"])})

    @property
    def key(self) -> tuple[str, str]:
        """Key of the finding."""
        return self.kind, self.where

    def state(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings and lists."""
        return asdict(self)

    def add(self, found: Measured | None) -> None:
        """Take the size in a further validation; ``None``: it was not measured, and does not count."""
        self.unknown = self.unknown + 1 if found is None else 0
        if found is not None:
            self.sizes.append(found.size)
            self.errors.append(found.error)

    def late(self) -> Measured:
        """Return the mean over the last half of the validations: what one of them shows by chance is evened out."""
        half = (len(self.sizes) + 1) // 2
        return Measured(sum(self.sizes[-half:]) / half, math.hypot(*self.errors[-half:]) / half)

    def is_over(self, patience: int) -> bool:
        """Whether nobody measures the finding any more."""
        return self.unknown >= patience

    def has_failed(self, patience: int) -> bool:
        """Judge once ``patience`` validations are there; whoever passed is tried again when the finding is back.

        Args:
            patience: Length of the trial.

        Returns:
            The finding is not below its start by more than the standard error of the difference.
        """
        if len(self.sizes) < patience:
            return False
        late = self.late()
        chance = math.hypot(self.error, late.error)
        if self.proved:
            if late.size > self.start + _BACK * chance:
                self._begin_again(late, proved=False)
            self.sizes, self.errors = [], []
            return False
        if late.size < self.start - chance:
            self._begin_again(late, proved=True)
            return False
        return True

    def _begin_again(self, late: Measured, proved: bool) -> None:
        self.start, self.error, self.proved = late.size, late.error, proved
        self.sizes, self.errors = [], []


def takes_part(feedback: Feedback) -> bool:
    """Whether a feedback changes training now."""
    return feedback.acting and (not isinstance(feedback, StepFeedback) or feedback.active)

"""One finding: a bias that was measured, how large it is, how sure, and what answers it."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One bias that was measured.

    Args:
        kind: ``"class"`` (a class is recognised less often than others), ``"group"`` (a group, or a class within a
            group, fares worse than in other groups), ``"feature"`` (predictions rely on a token set, or a token goes
            with errors) or ``"attention"`` (attention leans on spurious tokens, or passes over relevant ones). Feedback
            acts on the kinds it can cure.
        where: Name of the class or group; ``"group, class"``; name of the token set or candidate; for attention
            ``"set, class"``.
        size: How much there is of it: recall or accuracy below the mean of the peers, share of outcomes that change
            without the set, attention mass off chance, or the difference of a candidate between wrong and right
            predictions. In (0, 1].
        standard_error: Standard error of ``size``.
        support: Number of samples behind it.
        text: What was found, in a sentence or two.
        interval: 95 % confidence interval of ``size``.
        p_value: Probability of such a size by chance, corrected for the number of comparisons of its kind.
        answers: Class names of the feedback that answers it, the first choice first; with an argument where it takes
            one. Empty where a person has to look first.
        evidence: Further sentences: causes, the classes that are hit, examples.

    Example:
        >>> Finding("class", "cat", 0.3, 0.05, 40, "Class cat: ...").key
        ('class', 'cat')
    """

    kind: str
    where: str
    size: float
    standard_error: float
    support: int
    text: str
    interval: tuple[float, float] = (math.nan, math.nan)
    p_value: float = math.nan
    answers: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """Kind and place: what tells the same finding in two reports."""
        return self.kind, self.where

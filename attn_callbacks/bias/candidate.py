"""What might be spurious where nobody marked it: a token or region whose attention or presence goes with errors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from attn_callbacks._checks import one_of
from attn_callbacks._plain import plain

__all__ = ["Candidate"]


@dataclass(frozen=True)
class Candidate:
    """A token or image region that draws more attention, or occurs more often, in wrong predictions than in right ones.

    A hint, not a proof: look at the examples, mark it as a token set, and measure what predictions lose without it.
    Wrong predictions are compared with right ones of the same classes.

    Everything but the examples, and the place of an image region in words, is the same in all processes of a run:
    examples are those that the first process saw.

    Args:
        name: What it is called in sentences, such as ``"token 'athos'"`` or ``"region row 1, column 4"``.
        lift: How many times as much attention it draws, or as often it occurs, in wrong predictions; 1 is no tie.
        p_value: Two-sided probability of such a difference by chance, *not* corrected for the number of candidates.
        wrong: The quantity of ``kind`` in wrong predictions, from 0 to 1.
        right: The same in right predictions.
        support: Number of samples in which it occurs.
        examples: A few samples, as text.
        compared: How many tokens or regions it was chosen from; 0: the candidates of the report.
        kind: ``"attention"``: mean of ``v / (1 + v)``, where ``v`` is the attention on an occurrence over uniform
            attention, so that 0.5 is chance. ``"presence"``: share of samples that hold it, averaged over classes.
        error: Standard error of ``wrong - right``; NaN: that which fits ``p_value``.

    Raises:
        ValueError: If ``kind`` is another.

    Example:
        >>> candidate = Candidate("token 'athos'", 3.0, 1e-5, 0.3, 0.1, 60, ("edu from athos",), kind="presence")
        >>> round(candidate.difference, 2)
        0.2
        >>> candidate.where
        "presence of token 'athos'"
    """

    name: str
    lift: float
    p_value: float
    wrong: float
    right: float
    support: int
    examples: tuple[str, ...] = ()
    compared: int = 0
    kind: Literal["attention", "presence"] = "attention"
    error: float = math.nan

    def __post_init__(self) -> None:
        one_of("kind", self.kind, ("attention", "presence"))

    @property
    def difference(self) -> float:
        """``wrong - right``."""
        return self.wrong - self.right

    @property
    def where(self) -> str:
        """What tells it from all others of a report: the name, and for presence that it is that."""
        return self.name if self.kind == "attention" else f"presence of {self.name}"

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain numbers and strings; NaN is ``None``."""
        return {name: plain(value) for name, value in asdict(self).items()}

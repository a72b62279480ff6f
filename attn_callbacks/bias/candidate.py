"""What might be spurious where nobody marked it: a token or region whose attention goes with errors."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Candidate"]


@dataclass(frozen=True)
class Candidate:
    """A token or image region that draws more attention, or occurs more often, in wrong predictions than in right ones.

    A hint, not a proof: look at the examples, mark it as a token set, and measure what predictions lose without it.

    Args:
        name: What it is called in sentences, such as ``"token 'athos'"`` or ``"region row 1, column 4"``.
        lift: ``wrong / right``; 1 is no tie.
        p_value: Two-sided probability of such a difference by chance, *not* corrected for the number of candidates.
        wrong: Mean attention mass, or presence, in wrong predictions.
        right: The same in right predictions.
        support: Number of samples in which it occurs.
        examples: A few samples, as text.
        compared: How many tokens or regions it was chosen from; 0: the candidates of the report.

    Example:
        >>> candidate = Candidate("token 'athos'", 3.0, 1e-5, 0.3, 0.1, 60, ("edu from athos rutgers",))
        >>> round(candidate.difference, 2)
        0.2
    """

    name: str
    lift: float
    p_value: float
    wrong: float
    right: float
    support: int
    examples: tuple[str, ...] = ()
    compared: int = 0

    @property
    def difference(self) -> float:
        """``wrong - right``."""
        return self.wrong - self.right

    def to_dict(self) -> dict[str, object]:
        """Return the fields by name."""
        return asdict(self)

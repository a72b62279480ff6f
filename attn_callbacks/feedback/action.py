"""One change that a feedback made to training, or would have made."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Action"]


@dataclass(frozen=True)
class Action:
    """What was done about a finding, as a sentence and, where it is one number, as the number before and after.

    Args:
        text: One sentence, without a final full stop.
        finding: Kind and place of the finding it answers (:attr:`~attn_callbacks.bias.Finding.key`); ``None`` where it
            answers several, or none.
        old: The number that was changed, before.
        new: The same, after.

    Example:
        >>> print(Action("cat: weight 1.00 -> 1.38", ("class", "cat"), 1.0, 1.38))
        cat: weight 1.00 -> 1.38
    """

    text: str
    finding: tuple[str, str] | None = None
    old: float | None = None
    new: float | None = None

    def __str__(self) -> str:
        return self.text

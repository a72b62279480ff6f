"""What becomes of feedback that cannot do its part in training steps: refused if asked for, else withdrawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from attn_callbacks._lightning import MisconfigurationException, rank_zero_warn
from attn_callbacks.callbacks._guard import message
from attn_callbacks.capture import AttentionNotFoundError
from attn_callbacks.feedback import StepFeedback

__all__ = ["FedFailures"]

_SETTINGS = (RuntimeError, AttentionNotFoundError)
"""Errors that speak of the set-up, as KeyError and ValueError do; other RuntimeErrors (memory is full) do not."""


class FedFailures:
    """Tell feedback that somebody asked for from feedback that switched itself on.

    Args:
        enter: Called with what was withdrawn, and why.
        automatic: Nobody asked for any of it.
        expects: Tells whether validation has the marks that a feedback acts on.
        processes: Number of processes. With more than one an error of a step always ends training: the others do not
            know of it, and would wait.
    """

    def __init__(
        self,
        enter: Callable[[StepFeedback, str], None],
        automatic: bool = False,
        processes: int = 1,
        expects: Callable[[StepFeedback], bool] = lambda feedback: True,
    ) -> None:
        self._enter, self._automatic, self._processes = enter, automatic, processes
        self._expects = expects

    @contextmanager
    def of(self, feedback: Sequence[StepFeedback]) -> Iterator[None]:
        """Withdraw feedback that raises inside.

        Args:
            feedback: Whose part it is.

        Raises:
            MisconfigurationException: If somebody asked for one of them.
        """
        try:
            yield
        except Exception as error:
            if not isinstance(error, (KeyError, ValueError)) and type(error) not in _SETTINGS:
                raise
            if self._processes > 1 or any(self._is_wanted(each) for each in feedback):
                raise MisconfigurationException(message(error)) from error
            for each in feedback:
                kind = type(error).__name__
                self._withdraw(each, f"`{type(each).__name__}` cannot take part in training. {kind}: {message(error)}")

    def tell_idle(self, feedback: StepFeedback, steps: int) -> None:
        """Refuse what was asked for and has nothing to look at; other feedback is withdrawn instead.

        Where nobody asked, and validation has no marks either, there is nothing to warn of: few data have some.

        Args:
            feedback: The feedback, the same on all processes.
            steps: Training steps it was active in.
        """
        own = getattr(feedback, "guidance", feedback)
        marks = getattr(own, "region", None) or "relevance` or `spurious"
        text = (
            f"`{type(feedback).__name__}` saw no `{marks}` in {steps} training steps, so it did nothing. Say where "
            "training batches have them: BatchSchema(spurious=...)"
        )
        if self._is_wanted(feedback):
            raise MisconfigurationException(f"{text}.")
        self._withdraw(feedback, text, warn=not self._automatic or self._expects(feedback))

    def _is_wanted(self, feedback: StepFeedback) -> bool:
        return not self._automatic and feedback.early is not None

    def _withdraw(self, feedback: StepFeedback, text: str, warn: bool = True) -> None:
        feedback.withdraw()
        text = text.rstrip(".")
        self._enter(feedback, f"withdrawn: {text}")
        if warn:
            rank_zero_warn(f"{text}. It is withdrawn.")

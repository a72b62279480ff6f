"""The promise every feedback keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from attn_callbacks.bias import BiasReport, Finding
from attn_callbacks.feedback.action import Action

__all__ = ["Feedback"]


class Feedback(ABC):
    """Change training in answer to a bias report, in a way that can be saved, resumed, withdrawn and read.

    Subclass it to feed something else back. Every process of a distributed run receives the same report and has to
    come to the same decision, so :meth:`apply` uses the report and its own state alone: no clock, no random numbers.

    A feedback that is not :attr:`acting` leaves training as it would be without it, and yet goes on deciding: so a dry
    run can tell what would have been done.

    Attributes:
        answers: Kinds of finding it can cure: ``"class"``, ``"group"``, ``"feature"``, ``"attention"``.

    Example:
        >>> class Notice(Feedback):
        ...     answers = frozenset({"class"})
        ...
        ...     def apply(self, report):
        ...         return [Action(f"Seen: {finding.where}", finding.key) for finding in self.answered(report)]
        >>> import torch
        >>> report = BiasReport(0, 0, torch.tensor([[[90, 10], [40, 60]]]), ("negative", "positive"))
        >>> [str(action) for action in Notice().apply(report)]
        ['Seen: positive']
    """

    answers: frozenset[str] = frozenset()
    _held = False
    _withdrawn = False

    @property
    def acting(self) -> bool:
        """It changes training: it is neither held back, as in a dry run, nor withdrawn."""
        return not (self._held or self._withdrawn)

    @property
    def early(self) -> str | None:
        """Why it changes training before any report; ``None``: it waits for one.

        What a report finds is then what it has left, which says nothing of what it does: it is judged by its effect
        from its first answer to a finding on.
        """
        return None

    @property
    def withdrawn(self) -> bool:
        """It was taken back for good, because it did not help."""
        return self._withdrawn

    def hold(self, held: bool) -> None:
        """Hold it back, or let it act again.

        Args:
            held: Leave training as it would be without it.
        """
        self._switch(held, self._withdrawn)

    def withdraw(self) -> None:
        """Take it back for good; a resumed run knows."""
        self._switch(self._held, True)

    def reinstate(self) -> None:
        """Let it act again after a withdrawal, for a new run."""
        self._switch(self._held, False)

    def bind(self, module: nn.Module) -> None:
        """Find in the training module what will be changed. Runs before training, and again for every new run.

        Args:
            module: The LightningModule.

        Raises:
            ValueError: If what is needed is not there.
        """
        del module

    def bind_sampler(self, sampler: object) -> None:
        """Take the sampler of the training loader, at the start of every epoch.

        Args:
            sampler: Whatever draws the indices of the training data.

        Raises:
            ValueError: If it is none that can be steered, and that is needed.
        """
        del sampler

    def bind_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Take the optimisers, once there are any, for each run.

        Args:
            optimizers: All optimisers of the run.

        Raises:
            ValueError: If what is needed is not among them.
        """
        del optimizers

    @abstractmethod
    def apply(self, report: BiasReport) -> Sequence[Action]:
        """Answer a report.

        Args:
            report: What the last validation pass showed.

        Returns:
            Each change that was made or, while not :attr:`acting`, would have been made; empty without one.
        """

    def answered(self, report: BiasReport) -> tuple[Finding, ...]:
        """Return the findings that are of a kind it answers, the largest first."""
        return tuple(finding for finding in report.findings if finding.kind in self.answers)

    def state_dict(self) -> dict[str, object]:
        """Return all that a resumed run needs: tensors, numbers, strings, lists and dicts of them, nothing else.

        A checkpoint is loaded with ``weights_only=True``; one other value would make all of it unreadable.
        """
        return {"withdrawn": self._withdrawn}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state, before or after :meth:`bind`; loading it twice changes nothing more.

        Args:
            state: What :meth:`state_dict` returned; keys that it lacks keep their present value.
        """
        self._switch(self._held, bool(state.get("withdrawn", self._withdrawn)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def _switch(self, held: bool, withdrawn: bool) -> None:
        before = self.acting
        self._held, self._withdrawn = held, withdrawn
        if self.acting != before:
            self._acting_changed()

    def _acting_changed(self) -> None:  # noqa: B027
        """Write, or undo, what acting means; called when :attr:`acting` changed."""

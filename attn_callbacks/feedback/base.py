"""The promise every feedback keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import nn

from attn_callbacks.bias import BiasReport, Finding

__all__ = ["Feedback"]


class Feedback(ABC):
    """Change training in answer to a bias report, in a way that can be saved, resumed and read.

    Subclass it to feed something else back. Every process of a distributed run receives the same report and has to
    come to the same decision, so :meth:`apply` uses the report and its own state alone: no clock, no random numbers.

    Attributes:
        answers: Kinds of finding it can cure: ``"class"``, ``"group"``, ``"attention"``.

    Example:
        >>> class Notice(Feedback):
        ...     answers = frozenset({"class"})
        ...
        ...     def apply(self, report):
        ...         return tuple(f"Seen: {finding.where}." for finding in self.answered(report))
        >>> import torch
        >>> report = BiasReport(0, 0, torch.tensor([[[90, 10], [40, 60]]]), ("negative", "positive"))
        >>> Notice().apply(report)
        ('Seen: positive.',)
    """

    answers: frozenset[str] = frozenset()

    def bind(self, module: nn.Module) -> None:
        """Find in the training module what will be changed. Runs before training, and again for every new run.

        Args:
            module: The LightningModule.

        Raises:
            ValueError: If what is needed is not there.
        """
        del module

    @abstractmethod
    def apply(self, report: BiasReport) -> tuple[str, ...]:
        """Answer a report.

        Args:
            report: What the last validation pass showed.

        Returns:
            One sentence for each change made; empty when nothing changed.
        """

    def answered(self, report: BiasReport) -> tuple[Finding, ...]:
        """Return the findings that are of a kind it answers, the largest first."""
        return tuple(finding for finding in report.findings if finding.kind in self.answers)

    def state_dict(self) -> dict[str, object]:
        """Return all that a resumed run needs: tensors, numbers, strings, lists and dicts of them, nothing else.

        A checkpoint is loaded with ``weights_only=True``; one other value would make all of it unreadable.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state, before or after :meth:`bind`; loading it twice changes nothing more.

        Args:
            state: What :meth:`state_dict` returned; keys that it lacks keep their present value.
        """
        del state

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

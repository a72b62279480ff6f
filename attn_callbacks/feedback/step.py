"""Feedback that takes part in training steps, and what it sees of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from attn_callbacks.feedback.base import Feedback

if TYPE_CHECKING:
    from attn_callbacks.capture import AttentionCall

__all__ = ["StepFeedback", "TrainingStep"]


class TrainingStep(Protocol):
    """One training step as a feedback sees it."""

    @property
    def calls(self) -> Sequence[AttentionCall]:
        """Its attention, where the feedback sees ``"attention"``."""

    @property
    def inputs(self) -> Tensor:
        """Floating inputs of the batch or embeddings of its ids, where the feedback sees ``"inputs"``."""

    @property
    def logits(self) -> Tensor:
        """Logits ``(samples, classes)``, with their graph."""

    @property
    def loss(self) -> Tensor:
        """What the step returned, without any term; a scalar with its graph."""

    @property
    def target(self) -> Tensor | None:
        """Class of each sample, ``(samples,)``."""

    @property
    def group(self) -> Tensor | None:
        """Group of each sample, ``(samples,)``."""

    @property
    def valid(self) -> Tensor | None:
        """``True`` for tokens, ``False`` for padding, ``(samples, tokens)``."""

    @property
    def relevance(self) -> Tensor | None:
        """``True`` on tokens that should decide, ``(samples, tokens)``."""

    @property
    def spurious(self) -> Tensor | None:
        """``True`` on tokens that must not decide, ``(samples, tokens)``."""

    @property
    def generator(self) -> torch.Generator:
        """A source of random numbers of its own, on the CPU: seeded by run, step and process."""

    @property
    def number(self) -> int:
        """Optimiser steps taken before it."""

    def region(self, name: str, inputs: Tensor) -> Tensor | None:
        """Return where a token set lies on ``inputs``: bool, without their axis of features or channels.

        Args:
            name: ``"spurious"``, ``"relevance"``, ``"valid"`` or a set that the batch schema names.
            inputs: Token ids or continuous inputs.

        Returns:
            The mask, ``None`` where the batch has none: ``(samples, tokens)``, or ``(samples, height, width)``.
        """

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of other continuous inputs, with their graph: the network runs once more.

        Args:
            inputs: In the shape of :attr:`inputs`.
        """


class StepFeedback(Feedback):
    """Feedback that changes the inputs of a training step, or adds a term to its loss.

    Attributes:
        sees: What has to be captured for it: ``"attention"``, ``"inputs"``.
        second_order: Its term is a function of gradients: the step then runs on operations that can be differentiated
            twice, as fused attention cannot.
        layers: Names or glob patterns of the attention modules it looks at; ``None``: all.
        region: Name of the token set that it changes inputs on: batches that do not mark it are left alone. ``None``:
            it changes inputs of any batch.

    Example:
        >>> class WeightlessLogits(StepFeedback):
        ...     sees = frozenset({"inputs"})
        ...
        ...     def term(self, step):
        ...         return 0.01 * step.logits.square().mean()
        ...
        ...     def apply(self, report):
        ...         return []
        >>> WeightlessLogits().active
        True
    """

    sees: frozenset[str] = frozenset()
    second_order = False
    layers: tuple[str, ...] | None = None
    region: str | None = None

    @property
    def active(self) -> bool:
        """It takes part in steps; while it does not, nothing is captured for it."""
        return self.acting

    @property
    def early(self) -> str | None:
        """``"always"``, unless it has a setting ``when`` that says otherwise."""
        return "always" if getattr(self, "when", "always") == "always" else None

    def change_inputs(self, inputs: Tensor, step: TrainingStep) -> Tensor | None:
        """Return what the step shall start from instead; ``None``: leave it.

        Args:
            inputs: The batch's inputs: token ids, pictures, features.
            step: The step, of which nothing but the batch is known yet.
        """
        del inputs, step
        return None

    def term(self, step: TrainingStep) -> Tensor | None:
        """Return what is added to the loss of the step, a scalar; ``None``: nothing.

        Args:
            step: The step.
        """
        del step
        return None

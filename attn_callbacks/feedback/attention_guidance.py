"""Attention guidance: a loss term that draws attention to relevant tokens and away from spurious ones."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attn_callbacks._checks import check_number, one_of
from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback.base import Feedback

if TYPE_CHECKING:
    from attn_callbacks.capture import AttentionCall

__all__ = ["AttentionGuidance"]


class AttentionGuidance(Feedback):
    """Add ``coefficient * loss(attention)`` to the training loss, from the start or once a bias was found.

    Guides every layer by default: supervision of the last layer alone tends to fail, since information flows around it,
    and no token depends on a set that no layer attends to. Works in a window of strengths only; compare a few
    coefficients, and random tokens as a control.

    Changes training. Answers group bias and attention bias. Costs the N x N weights of the guided layers, with their
    gradients, in every training step.

    Args:
        loss: Called as ``loss(list of weights, relevance, valid, spurious=spurious)``, such as
            ``losses.AttentionGuidedLoss()``; without learnable parameters.
        coefficient: Factor on the loss, finite and not negative.
        layers: Names or glob patterns of the attention modules to guide, for the recorder; ``None``: all.
        when: ``"always"``, or ``"biased"``: from the first report with a finding of group or attention on.

    Raises:
        ValueError: If an argument is out of its range, or ``loss`` has learnable parameters.
        TypeError: If ``loss`` is not a module, ``coefficient`` not a number, or ``layers`` a single string.

    Example:
        >>> from losses import AttentionGuidedLoss
        >>> from attn_callbacks.capture import AttentionCall
        >>> tokens = torch.zeros(1, 2, 4, 8, requires_grad=True)
        >>> feedback = AttentionGuidance(AttentionGuidedLoss(), coefficient=2.0)
        >>> relevance = torch.tensor([[True, False, False, False]])
        >>> feedback.loss_term([AttentionCall("attention", query=tokens, key=tokens)], relevance, None, None)
        tensor(1.5000, grad_fn=<MulBackward0>)
    """

    answers = frozenset({"group", "attention"})

    def __init__(
        self,
        loss: nn.Module,
        coefficient: float = 1.0,
        *,
        layers: Sequence[str] | None = None,
        when: str = "always",
    ) -> None:
        if not isinstance(loss, nn.Module):
            raise TypeError(f"`loss` must be a module such as `losses.AttentionGuidedLoss()`, got {loss!r}.")
        if any(True for _ in loss.parameters()):
            raise ValueError(
                f"`loss` must have no learnable parameters, got {type(loss).__name__} with some: no optimizer would "
                "train them. Call it in `training_step` instead."
            )
        check_number("coefficient", coefficient)
        if not 0 <= coefficient < math.inf:
            raise ValueError(f"`coefficient` must be finite and not negative, got {coefficient}.")
        if isinstance(layers, str):
            raise TypeError(f"`layers` must be a list of names, got {layers!r}: pass [{layers!r}].")
        self.loss = loss
        self.coefficient = coefficient
        self.layers = None if layers is None else tuple(layers)
        self.when = one_of("when", when, ("always", "biased"))
        self._active = when == "always"
        self._module: weakref.ref[nn.Module] | None = None

    @property
    def active(self) -> bool:
        """The term is added; while it is not, attention need not be captured."""
        return self._active

    def bind(self, module: nn.Module) -> None:
        """Wait for a finding again if ``when="biased"`` and the module is another one than last time.

        Args:
            module: The LightningModule.
        """
        if self._module is not None and self._module() is not module:
            self._active = self.when == "always"
        self._module = weakref.ref(module)

    def apply(self, report: BiasReport) -> tuple[str, ...]:
        """Switch guidance on if it waited for a finding and the report has one; it then stays on.

        Args:
            report: What the last validation pass showed.
        """
        found = self.answered(report)
        if self._active or not found:
            return ()
        self._active = True
        return (f"attention guidance switched on with coefficient {self.coefficient:g} ({found[0].text.rstrip('.')})",)

    def loss_term(
        self,
        calls: Sequence[AttentionCall],
        relevance: Tensor | None,
        spurious: Tensor | None,
        valid: Tensor | None,
    ) -> Tensor | None:
        """Return what is to be added to the loss of one training step.

        Args:
            calls: Attention of the step. What counts is self-attention over as many keys as the annotation has columns.
            relevance: Relevance of each token, boolean or in [0, 1]; ``None`` where there is none.
            spurious: Degree to which each token is spurious, likewise.
            valid: ``True`` for tokens, ``False`` for padding; ``None``: all are tokens.

        Shape:
            - relevance, spurious, valid: ``(batch, keys)``
            - output: scalar

        Returns:
            The term; ``None`` while guidance is not active, or without any annotation.

        Raises:
            RuntimeError: If no self-attention has the keys of the annotation, or none carries a graph.
            ValueError: If the loss is not a scalar.
        """
        annotation = spurious if relevance is None else relevance
        if not self._active or annotation is None:
            return None
        calls = _matching(calls, tuple(annotation.shape))
        if torch.is_grad_enabled():  # else the caller only wants the number
            calls = _trainable(calls)
        term: Tensor = self.loss.to(annotation.device)(
            [call.weights() for call in calls], relevance, valid, spurious=spurious
        )
        if term.dim() > 0:
            raise ValueError(f"`loss` must return a scalar, got shape {tuple(term.shape)}. Use reduction='mean'.")
        return self.coefficient * term

    def state_dict(self) -> dict[str, object]:
        """Return whether guidance is active."""
        return {"active": self._active}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; with ``when="always"`` guidance stays active.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._active = self.when == "always" or bool(state.get("active", self._active))

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_module": None}  # a copy in another process binds to the module there

    def __repr__(self) -> str:
        return f"AttentionGuidance({self.loss!r}, {self.coefficient}, layers={self.layers}, when={self.when!r})"


def _matching(calls: Sequence[AttentionCall], expected: tuple[int, ...]) -> list[AttentionCall]:
    own = [call for call in calls if not call.is_cross]
    matching = [call for call in own if (call.shape[0], call.shape[3]) == expected]
    if not matching:
        seen = sorted({(call.shape[0], call.shape[3]) for call in own})
        raise RuntimeError(
            f"`AttentionGuidance` found no self-attention over (batch, keys) = {expected}; seen: {seen or 'none'}. "
            "Annotate every token as the model sees it, special tokens and padding included."
        )
    return matching


def _trainable(calls: Sequence[AttentionCall]) -> list[AttentionCall]:
    trainable = [call for call in calls if call.requires_grad]
    if not trainable:
        raise RuntimeError(
            f"`AttentionGuidance` cannot train the attention of {calls[0].name!r}: none of the {len(calls)} calls "
            "carries a gradient. Unfreeze the layers to guide, and use non-reentrant activation checkpointing "
            "(`use_reentrant=False`)."
        )
    return trainable

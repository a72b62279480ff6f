"""Input-gradient penalty: predictions may not change with inputs that must not decide."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attn_callbacks.feedback._bound import check_loss
from attn_callbacks.feedback._switched import SwitchedFeedback
from attn_callbacks.feedback.step import TrainingStep

__all__ = ["InputGradientPenalty"]


class InputGradientPenalty(SwitchedFeedback):
    """Add a penalty on the input gradient of the prediction within a region: right for the right reasons.

    It acts on what the network computes, not on where its attention goes. On pictures it works over a wide range of
    strengths, and its strength is not steered. On token ids the range is narrow, since a gradient that vanishes at one
    word says little about the next word: prefer :class:`~attn_callbacks.feedback.MaskRandomization` there. With
    ``calibration_steps`` the penalty is scaled to the size of the training loss: its first steps measure that and add
    nothing, from when it is switched on. Keep them few: a shortcut that is learned meanwhile may stay.

    Changes training: the loss of steps. Answers reliance on the region (a ``"feature"`` finding). A step costs about
    twice as much, holds the graph of a backward pass, and runs on attention that can be differentiated twice, which
    builds the N x N weights. Samples must not see each other, as they do in batch norm.

    Args:
        penalty: Called as ``penalty(logits, inputs, mask, base_loss=loss)``, such as
            ``losses.InputGradientPenalty(0.1, calibration_steps=100)``; without learnable parameters. Its state is kept
            with that of the feedback.
        region: ``"spurious"``, or a token set that the batch schema names.
        when: ``"biased"``: from the first report with a finding on; or ``"always"``.

    Raises:
        ValueError: If ``when`` is unknown, or ``penalty`` has learnable parameters.
        TypeError: If ``penalty`` is no module.

    Example:
        >>> import losses
        >>> feedback = InputGradientPenalty(losses.InputGradientPenalty(0.1, calibration_steps=50), when="always")
        >>> sorted(feedback.state_dict()["penalty"])
        ['measured', 'steps']

    References:
        Ross, Hughes and Doshi-Velez, "Right for the Right Reasons: Training Differentiable Models by Constraining
        their Explanations", IJCAI 2017.
    """

    sees = frozenset({"inputs"})
    second_order = True
    _name = "input-gradient penalty"
    _strength_name = "strength"

    def __init__(self, penalty: nn.Module, *, region: str = "spurious", when: str = "biased") -> None:
        super().__init__(region, when)
        self.penalty = check_loss("penalty", penalty, "losses.InputGradientPenalty()")
        self._natural = _copied(penalty)

    def term(self, step: TrainingStep) -> Tensor | None:
        """Return the penalty; ``None`` while it is not active, or where the region is not marked.

        Args:
            step: The step.

        Raises:
            ValueError: If the penalty is not a scalar.
        """
        if not self.active:
            return None
        inputs = step.inputs
        mask = step.region(str(self.region), inputs)
        if mask is None and not _many_processes():
            return None
        # a penalty that measures adds up over all processes, so one whose batch has no mark must not stay away
        marked = _nothing(inputs) if mask is None else mask
        term: Tensor = self.penalty.to(inputs.device)(step.logits, inputs, marked, base_loss=step.loss.detach())
        if term.dim() > 0:
            raise ValueError(f"`penalty` must return a scalar, got shape {tuple(term.shape)}. Use reduction='mean'.")
        return None if mask is None else term

    def state_dict(self) -> dict[str, object]:
        """Return whether it is switched on, and the state of the penalty."""
        return {**super().state_dict(), "penalty": _copied(self.penalty)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        kept = state.get("penalty")
        if isinstance(kept, Mapping):
            self.penalty.load_state_dict(kept)

    def __repr__(self) -> str:
        return f"InputGradientPenalty({self.penalty!r}, region={self.region!r}, when={self.when!r})"

    @property
    def _strength(self) -> float:
        return float(getattr(self.penalty, "strength", 1.0))

    def _start_anew(self) -> None:
        super()._start_anew()
        self.penalty.load_state_dict(self._natural)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def _nothing(inputs: Tensor) -> Tensor:
    """Return a mask on ``inputs`` that marks nothing, the same for all samples, tokens and pixels."""
    return torch.zeros([1] * inputs.dim(), dtype=torch.bool, device=inputs.device)


def _many_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

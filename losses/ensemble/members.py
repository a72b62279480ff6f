"""An ensemble whose members each have a loss of their own, and features of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from losses._checks import accumulation_dtype
from losses._state import allow_missing_state
from losses.ensemble._masks import Masks, feature_masks, masked_views
from losses.ensemble._members import stack_members
from losses.ensemble.ambiguity import ambiguity_decomposition

__all__ = ["EnsembleLoss", "EnsembleOutput"]


class EnsembleOutput(NamedTuple):
    """What :class:`EnsembleLoss` returns; train on ``loss``, log the rest.

    Args:
        loss: Mean of the members' losses.
        member_losses: Loss of each member by its own criterion, ``(members,)``.
        ensemble_loss: Cross entropy of the mean probabilities, detached.
        ambiguity: Mean cross entropy of the members less ``ensemble_loss``, detached; what the ensemble gains.
    """

    loss: Tensor
    member_losses: Tensor
    ensemble_loss: Tensor
    ambiguity: Tensor


class EnsembleLoss(nn.Module):
    """Train each member of an ensemble by its own loss, on its own features.

    Members that are wrong in different ways make a good ensemble; different losses (one on all classes alike, one for
    the rare ones) and different features (one without the background) are ways to get there. The loss is the mean of
    the members' losses. Whatever these are, ``ensemble_loss`` and ``ambiguity`` are in terms of plain cross entropy;
    see :func:`ambiguity_decomposition`. That report costs a log-softmax over all members and keeps no graph.

    Masks hide nothing by themselves. A model has to take its inputs from :meth:`views`, in training and in prediction;
    a :class:`DeepEnsemble` that is built with the same masks does so in both (see the example). They are part of the
    state dict. A checkpoint of a criterion that has none still loads: a warning says so, and they stay.

    Args:
        members: Loss of each member, built with ``reduction="mean"`` or ``"sum"``.
        masks: Features that each member sees; ``None`` shows all of them. Hidden features are zero.
        ignore_index: Class index that the report leaves out; the members have their own.

    Shape:
        - masks: ``(members, features...)``, nonzero = sees it; aligned with the last axes of the inputs

    Raises:
        ValueError: If there is no member, the masks do not fit them, or a mask hides everything.
        TypeError: If a member is no module.

    Example:
        >>> from losses import DeepEnsemble
        >>> criterion = EnsembleLoss([torch.nn.CrossEntropyLoss()] * 2, masks=[[1, 1, 0], [0, 1, 1]])
        >>> model = DeepEnsemble.of(lambda: torch.nn.Linear(3, 2), members=2, masks=criterion.masks)
        >>> inputs = torch.ones(4, 3)
        >>> criterion.views(inputs)[:, 0]  # what the members of the model see of the first sample
        tensor([[1., 1., 0.],
                [0., 1., 1.]])
        >>> output = criterion(model.member_logits(inputs), torch.tensor([0, 1, 1, 0]))
        >>> output.loss.backward()
        >>> torch.testing.assert_close(output.loss.detach() - output.ambiguity, output.ensemble_loss)
        >>> model(inputs).shape  # predicts through the same masks
        torch.Size([4, 2])
    """

    masks: Tensor | None

    def __init__(self, members: Sequence[nn.Module], *, masks: Masks | None = None, ignore_index: int = -100) -> None:
        super().__init__()
        for index, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise TypeError(f"`members[{index}]` must be a loss module, got {type(member).__name__}.")
        if not members:
            raise ValueError("`members` must hold the loss of at least one member, got none.")
        self.members = nn.ModuleList(members)
        self.ignore_index = ignore_index
        self.register_buffer("masks", feature_masks(masks, len(self.members)))
        allow_missing_state(self)

    def views(self, inputs: Tensor) -> Tensor:
        """Return what each member sees of ``inputs``, with zeros in place of the rest.

        Shape:
            - inputs: ``(batch, ..., features...)``
            - output: ``(members, batch, ..., features...)``

        Raises:
            ValueError: If the features are not those of the masks.
            TypeError: If ``inputs`` is no tensor.
        """
        return masked_views(inputs, self.masks, len(self.members))

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor, **arguments: Any) -> EnsembleOutput:
        """Return the loss to train on, and what makes it up; ``arguments`` go to the loss of every member.

        Shape:
            - logits: ``(members, samples, classes, positions...)``, or ``(samples, classes, positions...)`` each
            - target: ``(samples, positions...)`` integer, or ``(samples, classes, positions...)`` floating
        """
        stacked = stack_members(logits)
        if len(stacked) != len(self.members):
            raise ValueError(f"`logits` must hold those of {len(self.members)} members, got {len(stacked)}.")
        losses = [loss(member, target, **arguments) for loss, member in zip(self.members, stacked, strict=True)]
        for index, loss in enumerate(losses):
            if loss.dim() > 0:
                raise ValueError(
                    f"`members[{index}]` must return one number, got shape {tuple(loss.shape)}: build it with "
                    '`reduction="mean"`.'
                )
        member_losses = torch.stack([loss.to(accumulation_dtype(loss)) for loss in losses])
        report = ambiguity_decomposition(stacked.detach(), target, ignore_index=self.ignore_index)
        return EnsembleOutput(member_losses.mean(), member_losses, report.ensemble_loss, report.ambiguity)

    def extra_repr(self) -> str:
        """Show the settings; the members follow."""
        masks = "None" if self.masks is None else f"of shape {tuple(self.masks.shape)}"
        return f"masks={masks}, ignore_index={self.ignore_index}"

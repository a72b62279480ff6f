"""Group weights that follow the losses seen in validation: group DRO with what validation knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from attn_callbacks._checks import at_least, check_number, one_of
from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback._table import TableFeedback
from attn_callbacks.feedback._table_cells import Cells, changes, read_cells
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.criterion import check_table
from attn_callbacks.feedback.weight_policies import blend, group_dro_step, share_weights

__all__ = ["GroupReweighting"]


class GroupReweighting(TableFeedback):
    r"""Give the groups that fare worst a larger share in the loss: group DRO, steered by validation.

    A group is here a class within a group, or with ``by="group"`` the whole of it. It waits for the first finding of
    group bias. Then every group gets an even share :math:`q_g` of the loss, and after each validation
    :math:`q_g \leftarrow q_g\, e^{\eta\, \ell_g}`, normalised, with the averaged validation loss :math:`\ell_g` of the
    group (without that, its share of errors). Samples of a group weigh :math:`q_g / \pi_g`, where :math:`\pi_g` is its
    share in what training is fed (without that count, in validation), so that :math:`\sum_g \pi_g w_g = 1` and the loss
    keeps its scale. Groups that validation lacks, or has few samples of, keep their :math:`q_g` exactly.

    The weights are written in place into the buffer ``class_weight`` of the loss, one row a group, such as that of
    ``losses.WeightedCrossEntropyLoss(num_classes, num_groups=...)``; the training step has to pass ``group=`` to it.
    The feedback's state keeps them, and the module's state dict no longer does.

    Changes training. Answers group bias, and nothing else. Use it where groups are known in training; it assumes clean
    labels, and loses its effect once training accuracy reaches 1: stop early or regularise. It looks at validation
    data: keep a split of its own to select models on. Costs nothing per step.

    Args:
        criterion: Dotted path of the loss in the LightningModule.
        by: ``"cell"`` for each class within each group, or ``"group"``. Where groups are correlated with classes, as
            with a shortcut, a group holds both samples that follow it and samples that do not, and its own weight
            cannot tell them apart.
        step_size: Change of the log share per validation for each unit of loss.
        smoothing: Share of the old average loss in the new one, from 0 to below 1.
        floor: No group falls below this part of an even share, above 0 and below 1.
        limit: Weights stay between ``1 / limit`` and ``limit`` before normalisation, around their geometric mean. Keep
            it small if labels are noisy, or groups so small that they would be learned by heart.
        min_support: Least number of validation samples behind a loss that counts; below it, a share rests.

    Raises:
        ValueError: If an argument is out of its range; in `bind`, if there is no such loss or it has no rows for
            groups; in `apply`, if the report has no groups or does not fit the table.
        TypeError: If a setting is not a number.

    Example:
        >>> import torch
        >>> from losses import WeightedCrossEntropyLoss
        >>> module = torch.nn.Module()
        >>> module.criterion = WeightedCrossEntropyLoss(2, num_groups=2)
        >>> feedback = GroupReweighting(by="group")
        >>> feedback.bind(module)
        >>> counts = torch.tensor([[[45, 5], [5, 45]], [[25, 25], [20, 30]]])
        >>> fed = torch.tensor([[40, 40], [10, 10]])
        >>> report = BiasReport(0, 0, counts, ("negative", "positive"), ("Amazon", "Tweets"), train_counts=fed)
        >>> for action in feedback.apply(report):
        ...     print(action)
        Tweets: weight 1.00 -> 2.93 (error 0.45)
        Amazon: weight 1.00 -> 0.52 (error 0.10)
        >>> module.criterion.class_weight
        tensor([[0.5167, 0.5167],
                [2.9331, 2.9331]])

    References:
        Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020.
    """

    answers = frozenset({"group"})

    def __init__(
        self,
        criterion: str = "criterion",
        by: str = "cell",
        *,
        step_size: float = 1.0,
        smoothing: float = 0.5,
        floor: float = 0.1,
        limit: float = 10.0,
        min_support: int = 20,
    ) -> None:
        super().__init__(criterion, "weight")
        self.by = one_of("by", by, ("group", "cell"))
        self.step_size = _between("step_size", step_size, 0, math.inf)
        check_number("smoothing", smoothing)
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must lie in [0, 1), got {smoothing}: at 1 nothing new would count.")
        self.smoothing = smoothing
        self.floor = _between("floor", floor, 0, 1)
        self.limit = _between("limit", limit, 1, math.inf)
        self.min_support = at_least("min_support", min_support, 1)
        self._share: tuple[float, ...] | None = None
        self._average: tuple[float, ...] | None = None

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The share of each group, or cell, in the loss; ``None`` while it waits for a finding."""
        return self._share

    def apply(self, report: BiasReport) -> Sequence[Action]:
        """Average the losses and, from the first finding of group bias on, move the shares and write the weights.

        Args:
            report: What the last validation pass showed.
        """
        shape = self._bound_shape()
        cells = read_cells(report, self.by, shape, f"{self.criterion}.{self._buffer}")
        measured = self._measured(cells)
        self._updates += 1
        self._average = blend(self._average or (math.nan,) * len(measured), measured, self.smoothing)
        if self._share is None and not self.answered(report):
            return ()
        # what is absent, here or from training, has nothing to move by
        moving = [fed > 0 and not math.isnan(value) for fed, value in zip(cells.prior, measured, strict=True)]
        loss = [value if move else math.nan for value, move in zip(self._average, moving, strict=True)]
        share = self._share or (1 / len(loss),) * len(loss)
        self._share = group_dro_step(share, loss, step_size=self.step_size, floor=self.floor)
        weight = share_weights(self._share, cells.prior, limit=self.limit)
        repeats = math.prod(shape) // len(weight)
        before, after = self._steer(self._spread(weight, repeats))
        quantity = "error" if cells.loss is None else "loss"
        notes = [f"{quantity} {value:.2f}" for value in self._average]
        return changes(report, cells, "weight", before[::repeats], after[::repeats], notes)

    def state_dict(self) -> dict[str, object]:
        """Return shares, averaged losses, weights, the table it started from, and the number of reports seen."""
        state = super().state_dict()
        for name, values in (("share", self._share), ("average", self._average)):
            if values is not None:
                state[name] = list(values)
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; once bound, the weights are written at once.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        share, average = state.get("share"), state.get("average")
        self._share = tuple(share) if isinstance(share, list) else self._share
        self._average = tuple(average) if isinstance(average, list) else self._average

    def __repr__(self) -> str:
        return (
            f"GroupReweighting({self.criterion!r}, {self.by!r}, step_size={self.step_size}, "
            f"smoothing={self.smoothing}, floor={self.floor}, limit={self.limit}, min_support={self.min_support})"
        )

    def _measured(self, cells: Cells) -> tuple[float, ...]:
        """Return the loss of each cell, or its share of wrong predictions; NaN below the least support."""
        loss = tuple(1 - value for value in cells.recall) if cells.loss is None else cells.loss
        return tuple(
            value if size >= self.min_support and math.isfinite(value) else math.nan
            for value, size in zip(loss, cells.support, strict=True)
        )

    def _spread(self, weight: Sequence[float], repeats: int) -> list[float]:
        """Lay log weights out over the table; those that are not known rest."""
        table = [value for value in weight for _ in range(repeats)]
        rest = self._initial() if self._log_weight is None else self._log_weight
        return [old if math.isnan(value) else value for old, value in zip(rest, table, strict=True)]

    def _check_table(self, table: Tensor, where: str) -> None:
        check_table(table, self.by, where)

    def _start_anew(self) -> None:
        super()._start_anew()
        self._share, self._average = None, None


def _between(name: str, value: float, low: float, high: float) -> float:
    check_number(name, value)
    if not low < value < high:
        raise ValueError(f"`{name}` must lie between {low} and {high}, both excluded, got {value}.")
    return value

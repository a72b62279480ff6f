"""Control: weights by inverse frequency, set once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from attn_callbacks._checks import one_of
from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback._table import TableFeedback
from attn_callbacks.feedback._table_cells import changes, read_cells
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.criterion import check_table
from attn_callbacks.feedback.weight_policies import inverse_frequency_weights

__all__ = ["StaticInverseFrequency"]


class StaticInverseFrequency(TableFeedback):
    """Weigh classes, groups or classes within groups by the inverse of how many samples training was fed.

    A **control**, to compare with: what steers weights by validation should do better than this, which needs no
    validation. It acts once, on the first report that knows what training was fed (so after a first part of training
    with the loss as it is), and then rests; what was not seen by then keeps the weight it has. To weigh from the first
    step on, give the loss its weights instead.

    Changes training. Answers no finding: it acts without one, and is never withdrawn for not helping.

    Args:
        criterion: Dotted path of the loss in the LightningModule; the loss holds a buffer ``class_weight``.
        by: ``"class"``; ``"group"`` or ``"cell"`` (each class within each group), which need groups in the batch schema
            and a training step that passes ``group=`` to the loss.

    Raises:
        ValueError: If ``by`` is unknown; in `bind`, if there is no such loss or its table does not fit ``by``; in
            `apply`, if the report does not fit the table.

    Example:
        >>> import torch
        >>> from losses import WeightedCrossEntropyLoss
        >>> module = torch.nn.Module()
        >>> module.criterion = WeightedCrossEntropyLoss(2)
        >>> feedback = StaticInverseFrequency()
        >>> feedback.bind(module)
        >>> counts = torch.tensor([[[50, 0], [10, 40]]])
        >>> report = BiasReport(0, 0, counts, ("negative", "positive"), train_counts=torch.tensor([[80, 20]]))
        >>> [str(action) for action in feedback.apply(report)]
        ['positive: weight 1.00 -> 2.50 (0.20 of what was fed)', 'negative: weight 1.00 -> 0.63 (0.80 of what was fed)']
        >>> feedback.apply(report)
        ()
    """

    def __init__(self, criterion: str = "criterion", by: str = "class") -> None:
        super().__init__(criterion, "weight")
        self.by = one_of("by", by, ("class", "group", "cell"))

    def apply(self, report: BiasReport) -> Sequence[Action]:
        """Set the weights, if that is still to be done and it is known what training was fed.

        Args:
            report: What the last validation pass showed.
        """
        shape = self._bound_shape()
        cells = read_cells(report, self.by, shape, f"{self.criterion}.{self._buffer}")
        self._updates += 1
        if self._log_weight is not None or not any(cells.counts):
            return ()
        weight = inverse_frequency_weights(cells.counts, cells.prior)
        repeats = math.prod(shape) // len(weight)
        table = [value for value in weight for _ in range(repeats)]
        rest = self._initial()
        before, after = self._steer(
            [old if math.isnan(value) else value for old, value in zip(rest, table, strict=True)]
        )
        notes = [f"{share:.2f} of what was fed" for share in cells.prior]
        return changes(report, cells, "weight", before[::repeats], after[::repeats], notes, answering=False)

    def __repr__(self) -> str:
        return f"StaticInverseFrequency({self.criterion!r}, {self.by!r})"

    def _check_table(self, table: Tensor, where: str) -> None:
        check_table(table, self.by, where)

"""Control: weights drawn at random after each validation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attn_callbacks._checks import at_least
from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback._table import TableFeedback
from attn_callbacks.feedback._table_cells import read_cells
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.weight_policies import preserve_prior

__all__ = ["RandomLossWeights"]


class RandomLossWeights(TableFeedback):
    r"""Draw the weights of the loss anew after each validation: a softmax of standard normal numbers.

    A **control**, to compare with: weights that change and that know nothing. What helps no more than this does not
    help by what it measures. The weights are :math:`w_c \propto e^{z_c}` with :math:`z_c \sim \mathcal{N}(0, 1)`, in
    the normalisation of the other feedback, :math:`\sum_c \pi_c w_c = 1`; as margins they are shifts of minus their
    logarithm. Draws depend on the seed and on the number of reports alone: a resumed run draws what the unbroken one
    would have drawn, all processes draw the same, and no other source of random numbers is disturbed.

    Changes training. Answers no finding: it acts without one, and is never withdrawn for not helping.

    Args:
        criterion: Dotted path of the loss in the LightningModule, with one weight a class, or a class and group.
        seed: Picks the draws, at least 0.
        act: ``"weight"`` (buffer ``class_weight``), ``"margin"`` (buffer ``adjustment``), or ``"auto"``: as margin
            where the loss has an ``adjustment``. The same as what it is compared with.

    Raises:
        ValueError: If an argument is out of its range; in `bind`, if there is no such loss; in `apply`, if the report
            does not fit the table.
        TypeError: If ``seed`` is not an integer.

    Example:
        >>> import torch
        >>> from losses import WeightedCrossEntropyLoss
        >>> module = torch.nn.Module()
        >>> module.criterion = WeightedCrossEntropyLoss(2)
        >>> feedback = RandomLossWeights(seed=1)
        >>> feedback.bind(module)
        >>> report = BiasReport(0, 0, torch.tensor([[[40, 10], [10, 40]]]), ("negative", "positive"))
        >>> [str(action) for action in feedback.apply(report)]
        ['random weights drawn, from 0.77 to 1.23']

    References:
        Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning", TMLR 2022.
    """

    def __init__(self, criterion: str = "criterion", seed: int = 0, *, act: str = "auto") -> None:
        super().__init__(criterion, act)
        self.seed = at_least("seed", seed, 0)

    def apply(self, report: BiasReport) -> Sequence[Action]:
        """Draw, and write what was drawn.

        Args:
            report: What the last validation pass showed.
        """
        shape = self._bound_shape()
        by = "class" if len(shape) == 1 else "cell"
        cells = read_cells(report, by, shape, f"{self.criterion}.{self._buffer}")
        draws = np.random.default_rng([self.seed, self._updates]).standard_normal(math.prod(shape)).tolist()
        self._updates += 1
        _, after = self._steer(preserve_prior(draws, cells.prior))
        return (Action(f"random {self._quantity}s drawn, from {min(after):.2f} to {max(after):.2f}"),)

    def __repr__(self) -> str:
        return f"RandomLossWeights({self.criterion!r}, {self.seed}, act={self.act!r})"

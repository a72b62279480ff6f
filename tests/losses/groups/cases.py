"""The losses over groups of the battery."""

from __future__ import annotations

import torch

from losses.groups import CVaRLoss, GroupDROLoss, WorstGroupLoss
from tests.losses.cases import Arguments, Case

CLASSES, GROUPS = 4, 3
TABLE = [[1.0, 2.0, 0.5, 3.0], [0.5, 1.0, 1.0, 2.0], [2.0, 1.0, 1.0, 1.0]]


def arguments() -> Arguments:
    logits = torch.randn(6, CLASSES).requires_grad_()
    target, group = torch.randint(CLASSES, (6,)), torch.randint(GROUPS, (6,))
    return (logits, target), {"sample_weight": torch.rand(6), "group": group}


def ignored() -> Arguments:
    group = torch.randint(GROUPS, (6,))
    return (torch.randn(6, CLASSES).requires_grad_(), torch.full((6,), -100)), {"group": group}


CASES = {
    "GroupDROLoss": Case(
        lambda: GroupDROLoss(GROUPS, 0.5, group_counts=[90, 9, 1], adjustment=1.0, class_weight=[1.0, 2.0, 0.5, 3.0]),
        arguments,
        ignored,
    ),
    "WorstGroupLoss": Case(lambda: WorstGroupLoss(GROUPS), arguments, ignored),
    "CVaRLoss": Case(lambda: CVaRLoss(0.4, class_weight=TABLE, num_groups=GROUPS), arguments, ignored),
}

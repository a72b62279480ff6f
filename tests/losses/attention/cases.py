"""The modules of `losses.attention` in the battery."""

from __future__ import annotations

import torch

from losses import AttentionGuidedLoss
from losses.attention.alignment import GuidedAlignmentLoss
from losses.attention.consistency import AttentionConsistencyLoss
from losses.attention.disagreement import HeadDisagreementLoss
from losses.attention.entropy import AttentionEntropyLoss
from losses.attention.sparsity import AttentionSparsityLoss
from losses.attention.suppression import AttentionSuppressionLoss
from tests.losses.cases import Arguments, Case


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).softmax(dim=-1).requires_grad_()


def arguments() -> Arguments:
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    return ([weights(2, 3, 5, 5), weights(2, 3, 5, 5)], mask, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])), {}


def unmarked() -> Arguments:
    return (weights(2, 3, 5, 5), torch.zeros(2, 5)), {}


VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


def heads() -> Arguments:
    return ([weights(2, 3, 5, 5), weights(2, 3, 5, 5)], VALID), {}


def all_padding() -> Arguments:
    return (weights(2, 3, 5, 5), torch.zeros(2, 5)), {}


def linked() -> Arguments:
    return ([weights(2, 3, 4, 5)], torch.rand(2, 4, 5).round(), VALID), {"query_valid": VALID[:, 1:]}


def unlinked() -> Arguments:
    return (weights(2, 3, 4, 5), torch.zeros(2, 4, 5)), {}


def two_views() -> Arguments:
    return (weights(2, 3, 5, 5), weights(2, 3, 5, 5), VALID), {}


def two_padded_views() -> Arguments:
    return (weights(2, 3, 5, 5), weights(2, 3, 5, 5), torch.zeros(2, 5)), {}


CASES = {
    "AttentionConsistencyLoss": Case(AttentionConsistencyLoss, two_views, two_padded_views),
    "GuidedAlignmentLoss": Case(lambda: GuidedAlignmentLoss(head=1), linked, unlinked),
    "HeadDisagreementLoss": Case(HeadDisagreementLoss, heads, all_padding),
    "AttentionEntropyLoss": Case(AttentionEntropyLoss, heads, all_padding),
    "AttentionGuidedLoss": Case(lambda: AttentionGuidedLoss(form="log"), arguments, unmarked),
    "AttentionSparsityLoss": Case(AttentionSparsityLoss, heads, all_padding),
    "AttentionSuppressionLoss": Case(lambda: AttentionSuppressionLoss(threshold=0.1), arguments, unmarked),
}

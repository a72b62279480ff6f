"""Ours: the bias monitor with feedback, and its control."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import losses
from attn_callbacks import AttentionGuidance, BiasMonitor
from benchmarks.debias.method import Method, trained
from benchmarks.debias.work import Samples, Splits, Work

__all__ = ["OURS", "random_rationale"]


def attention(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Guide attention alone."""
    guidance = AttentionGuidance(losses.AttentionGuidedLoss(form="log"), coefficient=1.0)
    monitor = BiasMonitor(feedback=[guidance], classes=work.classes, groups=work.groups)
    return trained(work, splits, steps, callbacks=[monitor])


def random_rationale(work: Work, splits: Splits, steps: int, seed: int) -> nn.Module:
    """Guide attention by random tokens, as many as are annotated, drawn once a sample: the control of `attention`."""
    draw = torch.Generator().manual_seed(seed)
    train = splits.train
    for name in ("spurious", "relevance"):
        if name in train.parts:
            train = train.replaced(**{name: random_tokens(train, name, draw)})
    return attention(work, splits._replace(train=train), steps, seed)


def random_tokens(samples: Samples, name: str, draw: torch.Generator) -> Tensor:
    """Mark as many tokens of a sample as are marked, real ones, at random."""
    marked = samples.parts[name].bool()
    valid = samples.parts.get("attention_mask", torch.ones_like(marked)).bool()
    chance = torch.rand(marked.shape, generator=draw).masked_fill(~valid, 2.0)  # padding comes last
    rank = chance.argsort(dim=1).argsort(dim=1)
    return rank < marked.sum(dim=1, keepdim=True)


OURS = (
    Method("random-rationale", random_rationale),
    Method("ours-attention", attention),
)

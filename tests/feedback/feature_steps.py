"""A training step and reports of reliance, as small as the feedback on features needs them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from attn_callbacks.bias import BiasReport, Finding
from attn_callbacks.bias.reliance import Reliance

CLASSES = ("negative", "positive")


class FakeStep:
    """A step of a model on floating inputs; ``regions`` are its token sets by name."""

    def __init__(self, model=None, inputs=None, target=None, seed=0, **regions):
        self.model, self.target, self.regions, self.forwards = model, target, regions, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.number, self.calls, self.group = seed, (), None
        self.valid, self.relevance, self.spurious = (regions.get(n) for n in ("valid", "relevance", "spurious"))
        if model is not None:
            self.inputs = inputs.detach().clone().requires_grad_()
            self.logits = model(self.inputs)
            self.loss = F.cross_entropy(self.logits, torch.zeros(len(inputs)).long() if target is None else target)

    def region(self, name, inputs):
        return self.regions.get(name)

    def forward(self, inputs):
        self.forwards += 1
        return self.model(inputs)


class SumOfTokens(nn.Module):
    """Logits of ``(samples, tokens, features)``."""

    def __init__(self, features=3, dropout=0.0):
        super().__init__()
        self.hidden, self.head = nn.Linear(features, 5), nn.Linear(5, 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs):
        return self.head(self.dropout(self.hidden(inputs).tanh()).sum(dim=1))


def finding(kind="feature", where="spurious", size=0.3):
    return Finding(kind, where, size, 0.05, 200, f"Accuracy falls by {size:.2f} without {where}.")


def report(*findings, measured=(), epoch=0, accuracy=0.8, samples=200):
    """Return what feedback reads of a report; sets in ``measured`` were looked at, those with a finding too."""
    ordered = tuple(sorted(findings, key=lambda found: -found.size))
    names = {found.where for found in ordered if found.kind == "feature"} | set(measured)
    sizes = {found.where: found.size for found in ordered if found.kind == "feature"}
    return SimpleNamespace(
        epoch=epoch,
        step=epoch,
        accuracy=accuracy,
        support=torch.tensor([[samples // 2, samples // 2]]),
        findings=ordered,
        class_names=CLASSES,
        reliance={name: SimpleNamespace(drop=sizes.get(name, 0.001)) for name in names},
    )


def real_report(**lost):
    """Return a real report of 200 samples, in which ``lost`` are right only with what a set holds."""
    counts = torch.tensor([[[80, 20], [20, 80]]])
    shuffled = {name: torch.tensor([[[20, 0], [number // 2, 80 - number // 2]]] * 2) for name, number in lost.items()}
    reliance = {name: Reliance(outcomes.reshape(2, 2, 2)) for name, outcomes in shuffled.items()}
    return BiasReport(0, 0, counts, CLASSES, reliance=reliance)

"""One trial: a work, a method, a seed, and what is measured after the last step."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from attn_callbacks.capture import AttentionRecorder
from benchmarks.debias.classifier import predict, steps_of
from benchmarks.debias.exchange import exchanged
from benchmarks.debias.method import Method
from benchmarks.debias.work import Samples, Splits, Work, region

__all__ = ["measure", "train"]

SHUFFLES, LOOKED_AT = 5, 256


def train(work: Work, method: Method, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Train a method on a work and return its row of the results.

    Args:
        work: The work.
        method: The method, which fits it.
        seed: Decides the data, the starting weights and the order of the samples.
        steps: Another length than that of the budget, for a quick look.
    """
    splits = work.build(seed)
    pl.seed_everything(seed, verbose=False)
    started = time.process_time()
    module = method.run(work, splits, steps or steps_of(work, len(splits.train)), seed).eval()
    seconds = time.process_time() - started
    return {"work": work.name, "method": method.name, "seed": seed, **measure(work, module, splits), "seconds": seconds}


def measure(work: Work, module: nn.Module, splits: Splits) -> dict[str, float | None]:
    """Return accuracy, worst class or group, macro-F1, reliance and attention mass of a trained module.

    Reliance is the accuracy lost when the spurious tokens are shuffled among samples in which they tell. Attention mass
    is the share that falls on spurious tokens, or, where only those are known, on relevant ones: the mean over layers,
    heads and queries. Both are ``None`` without an annotation.

    Args:
        work: Says whether the worst class or the worst group counts.
        module: What was trained, in evaluation mode.
        splits: Samples.
    """
    predicted, labels = predict(module, splits.test).argmax(dim=1), splits.test.labels
    right = (predicted == labels).double()
    cell = labels if work.worst == "class" else splits.test.parts["group"]
    telling = splits.test if splits.telling is None else splits.telling
    return {
        "accuracy": float(right.mean()),
        "worst": min(float(right[cell == each].mean()) for each in cell.unique()),
        "macro_f1": macro_f1(predicted, labels, len(work.classes)),
        "reliance": reliance(work, module, telling),
        "attention_mass": attention_mass(module, splits.test),
    }


def macro_f1(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Return the mean F1 of the classes that occur in ``labels``."""
    scores = []
    for each in range(classes):
        hit = float(((predicted == each) & (labels == each)).sum())
        either = float((predicted == each).sum() + (labels == each).sum())
        if (labels == each).any():
            scores.append(2 * hit / either)
    return sum(scores) / len(scores)


def reliance(work: Work, module: nn.Module, samples: Samples) -> float | None:
    """Return the accuracy lost when spurious tokens come from another sample, the mean of a few shuffles."""
    mask = region(samples.parts)
    if mask is None:
        return None
    inputs, draw = samples.parts["inputs"], torch.Generator().manual_seed(0)
    changed = [samples.replaced(inputs=exchanged(work, inputs, mask, draw)) for _ in range(SHUFFLES)]
    return _accuracy(module, samples) - sum(_accuracy(module, each) for each in changed) / SHUFFLES


def attention_mass(module: nn.Module, samples: Samples) -> float | None:
    """Return the share of attention on annotated tokens, of the first samples."""
    batch = samples.rows(slice(LOOKED_AT)).parts
    marked = batch.get("spurious", batch.get("relevance"))
    if marked is None:
        return None
    with torch.no_grad(), AttentionRecorder(module) as recorder:
        module(batch)
    valid = batch.get("attention_mask", torch.ones_like(marked)).bool()
    shares = []
    for call in recorder.calls:
        mass = (call.weights() * marked[:, None, None].to(torch.float32)).sum(dim=-1)  # (samples, heads, queries)
        if mass.shape[2] == valid.shape[1]:  # else queries are fewer than tokens, and all of them are real
            mass = mass[valid[:, None].expand_as(mass)]
        shares.append(float(mass.mean()))
    return sum(shares) / len(shares)


def _accuracy(module: nn.Module, samples: Samples) -> float:
    return float((predict(module, samples).argmax(dim=1) == samples.labels).double().mean())

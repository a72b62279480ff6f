"""The tables and lines of a report's summary, each with an empty line before; nothing for what was not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_callbacks.bias._feature_findings import candidate_chance, is_marked
from attn_callbacks.bias._judge import LEVEL_OF_CHANCE
from attn_callbacks.bias._table import MAX_ROWS, chance, lowest_rows, number, table, with_interval

if TYPE_CHECKING:
    from attn_callbacks.bias.report import BiasReport

__all__ = ["attention", "candidates", "cells", "classes", "divergence", "fairness", "groups", "priors", "reliance"]

_HINTS = 5
"""Candidates that are shown where fewer are beyond chance."""


def classes(report: BiasReport) -> Iterator[str]:
    """Yield the table of classes."""
    columns = {
        "support": _count(report.class_support),
        "recall": _rate(report.recall, report.interval("recall")),
        "precision": _plain(report.precision),
        "F1": _plain(report.f1),
        "label prior": _plain(report.label_prior),
        "prediction prior": _plain(report.prediction_prior),
    }
    if report.train_counts is not None:
        columns["training prior"] = _plain(report.training_prior)
    if report.calibration is not None:
        columns["ECE"], columns["loss"] = _plain(report.calibration.class_ece), _plain(report.calibration.class_loss)
    yield from table("class", lowest_rows(report.recall), report.class_names, columns)


def priors(report: BiasReport) -> Iterator[str]:
    """Yield a line on the shift of the class shares."""
    shift = report.prior_shift
    distances = {
        "training to labels": shift.label_distance,
        "training to predictions": shift.prediction_distance,
        "labels to predictions": shift.excess_distance,
    }
    known = [f"{name} {number(value)}" for name, value in distances.items() if value == value]
    if known:
        yield f"\nPrior shift (total variation): {', '.join(known)}."


def groups(report: BiasReport) -> Iterator[str]:
    """Yield the table of groups."""
    columns = {
        "support": _count(report.group_support),
        "accuracy": _rate(report.group_accuracy, report.interval("group_accuracy")),
    }
    if report.calibration is not None:
        columns["ECE"], columns["loss"] = _plain(report.calibration.group_ece), _plain(report.calibration.group_loss)
    yield from table("group", lowest_rows(report.group_accuracy), report.group_names, columns)


def fairness(report: BiasReport) -> Iterator[str]:
    """Yield a line on the disparities between groups."""
    parity, odds = report.demographic_parity, report.equalised_odds
    yield (
        f"\nFairness: demographic parity difference {with_interval(parity.difference, parity.interval)}, ratio "
        f"{number(parity.ratio)}; equalised odds difference {with_interval(odds.difference, odds.interval)}."
    )


def cells(report: BiasReport) -> Iterator[str]:
    """Yield the table of classes within groups."""
    names = [f"{group}, {label}" for group in report.group_names for label in report.class_names]
    recall, interval = report.cell_recall.flatten(), report.interval("cell_recall").flatten(0, 1)
    columns = {"support": _count(report.support.flatten()), "recall": _rate(recall, interval)}
    if report.train_counts is not None:
        columns["training prior"] = _plain(report.train_counts.flatten() / report.train_counts.sum())
    if report.calibration is not None:
        columns["loss"] = _plain(report.calibration.cell_loss.flatten())
    yield from table("group, class", lowest_rows(recall), names, columns)


def attention(report: BiasReport) -> Iterator[str]:
    """Yield a table of the attention on each token set."""
    for name, share in report.attention.items():
        columns: dict[str, Callable[[int], str]] = {
            "samples": _count(share.support),
            "mass": _plain(share.mass),
            "chance": _plain(share.chance),
            "lift": partial(_value, values=share.lift, digits=2),
        }
        if share.outcome_mass is not None:
            columns["mass if wrong"] = _plain(share.outcome_mass[:, 0])
            columns["mass if right"] = _plain(share.outcome_mass[:, 1])
        yield from table(f"attention on {name}", lowest_rows(report.recall), report.class_names, columns)


def divergence(report: BiasReport) -> Iterator[str]:
    """Yield a line on the classes whose attention differs most."""
    if report.divergence is None or len(report.class_names) < 2:
        return
    pairs = report.divergence.triu(diagonal=1).nan_to_num(nan=0.0)
    place = int(pairs.argmax())
    first, second = (report.class_names[index] for index in divmod(place, len(report.class_names)))
    if float(pairs.max()) > 0:
        yield (
            f"\nAttention by position in the sequence differs most between {first} and {second}: Jensen-Shannon "
            f"distance (base 2, less what chance gives) {number(pairs.max())}."
        )


def reliance(report: BiasReport) -> Iterator[str]:
    """Yield the table of what becomes of predictions without a token set."""
    sets = list(report.reliance.values())
    if not sets:
        return
    columns: dict[str, Callable[[int], str]] = {
        "method": lambda i: sets[i].method,
        "samples": lambda i: str(sets[i].support),
        "accuracy": lambda i: number(sets[i].before),
        "without": lambda i: number(sets[i].after),
        "drop": lambda i: with_interval(sets[i].drop, sets[i].interval),
        "p of drop": lambda i: chance(sets[i].p_value),
        "changed": lambda i: with_interval(sets[i].changed, sets[i].changed_interval),
        "p of changed": lambda i: chance(sets[i].changed_p_value),
        "most in": lambda i: _hardest(report, sets[i].class_drop),
    }
    yield from table("reliance on", range(len(sets)), list(report.reliance), columns, ["method", "most in"])
    yield (
        "\nDrop: accuracy lost, tested against none. Changed: share of outcomes that change, tested against one in "
        "ten, which is held to be worth acting on. Neither p is corrected."
    )


def candidates(report: BiasReport) -> Iterator[str]:
    """Yield the table of what may be spurious, the surest first, unless somebody marked what is."""
    corrected = candidate_chance(report)
    order = [int(place) for place in corrected.argsort(stable=True)]
    shown = [place for rank, place in enumerate(order) if rank < _HINTS or corrected[place] < LEVEL_OF_CHANCE]
    if not shown or is_marked(report):
        return
    found, corrected = [report.candidates[place] for place in shown[:MAX_ROWS]], corrected[shown]
    columns: dict[str, Callable[[int], str]] = {
        "tied by": lambda i: found[i].kind,
        "samples": lambda i: str(found[i].support),
        "if wrong": lambda i: number(found[i].wrong),
        "if right": lambda i: number(found[i].right),
        "lift": lambda i: number(found[i].lift, 2),
        "p, corrected": lambda i: chance(corrected[i]),
        "example": lambda i: found[i].examples[0] if found[i].examples else "",
    }
    names = [candidate.name for candidate in found]
    yield from table("candidate", range(len(found)), names, columns, ["tied by", "example"])
    yield (
        "\nAttention: mean of v / (1 + v), with v the attention on an occurrence over uniform attention, so that 0.5 "
        "is chance. Presence: share of samples that hold it. Wrong predictions are compared with right ones of the "
        "same classes."
    )


def _hardest(report: BiasReport, drop: Tensor) -> str:
    known = drop.nan_to_num(nan=-torch.inf)
    label = int(known.argmax())
    return f"{report.class_names[label]} {number(drop[label])}" if float(known[label]) > 0 else ""


def _count(values: Tensor) -> Callable[[int], str]:
    return lambda index: str(int(values[index]))


def _plain(values: Tensor) -> Callable[[int], str]:
    return partial(_value, values=values)


def _value(index: int, values: Tensor, digits: int = 3) -> str:
    return number(values[index], digits)


def _rate(values: Tensor, intervals: Tensor) -> Callable[[int], str]:
    return lambda index: with_interval(values[index], intervals[index])

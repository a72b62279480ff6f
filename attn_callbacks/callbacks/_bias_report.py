"""From the counts of a validation to a BiasReport."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from attn_callbacks.bias import AttentionShare, BiasReport, Calibration, Candidate, Reliance
from attn_callbacks.callbacks._fed import FedCounts
from attn_callbacks.metrics import associations, class_divergence

__all__ = ["build_report"]

_MOST_CANDIDATES = 10
_IN_ALL = 0.9
"""Share of samples from which on a token id is part of the format, such as a class token, and no candidate."""


def build_report(
    epoch: int,
    step: int,
    metrics: Mapping[str, Any],
    *,
    class_names: tuple[str, ...],
    group_names: tuple[str, ...] | None,
    fed: FedCounts,
    min_support: int,
    token_name: Callable[[int], str],
    examples: Callable[[int], Sequence[str]],
    are_places: bool,
) -> BiasReport:
    """Assemble a report; equal counts make equal reports.

    Args:
        epoch: Epoch of training.
        step: Optimiser steps taken.
        metrics: Counts of all processes, by name.
        class_names: Names of the classes.
        group_names: Names of the groups; empty: numbers, as many as were seen; ``None``: there are none.
        fed: What training was fed.
        min_support: Samples below which nothing is concluded.
        token_name: Names a token or a place.
        examples: Returns wrong samples that hold a token.
        are_places: Tokens are places, which all samples have.
    """
    counts = metrics["confusion"].compute().cpu()
    shown = 1 if group_names is None else len(group_names) or _last_used(counts)
    bins, loss = metrics["calibration"].compute()
    attention, found = metrics.get("attention"), metrics.get("association")
    return BiasReport(
        epoch=epoch,
        step=step,
        counts=counts[:shown],
        class_names=class_names,
        group_names=("all",) if group_names is None else group_names or tuple(f"group {n}" for n in range(shown)),
        train_counts=fed.counts(shown, len(class_names)),
        attention={name: _share(metric) for name, metric in _named("mass", metrics)},
        min_support=min_support,
        reliance={name: Reliance(metric.compute()) for name, metric in _named("reliance", metrics)},
        calibration=Calibration(bins[:shown], loss[:shown]),
        divergence=None if attention is None else class_divergence(attention.compute(), min_support),
        candidates=() if found is None else tuple(_candidates(found.compute(), token_name, examples, are_places)),
    )


def _named(kind: str, metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, metric in metrics.items():
        if name.startswith(f"{kind}/"):
            yield name.partition("/")[2], metric


def _share(metric: Any) -> AttentionShare:
    found = metric.compute()
    outcomes = (found.outcome_mass, found.outcome_support, found.outcome_error)
    return AttentionShare(found.mass, found.lift, found.support, found.error, *outcomes)


def _candidates(
    sums: Any, name: Callable[[int], str], examples: Callable[[int], Sequence[str]], are_places: bool
) -> Iterator[Candidate]:
    """Yield what draws more attention in wrong predictions, then what occurs more often in them."""
    sums = type(sums)(*(field.cpu() for field in sums))
    found, samples = associations(sums), sums.samples.sum(dim=0)
    held = found.support.sum(dim=1)
    possible = held > 0 if are_places else (held > 0) & (held < _IN_ALL * samples.sum())
    tests = [found.p_value] if are_places else [found.p_value, found.presence_p_value]
    compared = sum(int((possible & p_value.isfinite()).sum()) for p_value in tests)
    for token in _strongest(found.z, found.p_value, possible):
        yield _candidate(name(token), found.wrong[token], found.right[token], found.p_value[token],
                         held[token], examples(token), compared)  # fmt: skip
    if are_places:
        return
    share = found.support / samples  # (tokens, 2): of wrong and of right predictions, those that hold it
    for token in _strongest(found.presence_z, found.presence_p_value, possible):
        yield _candidate(f"presence of {name(token)}", share[token, 0], share[token, 1],
                         found.presence_p_value[token], held[token], examples(token), compared)  # fmt: skip


def _strongest(z: Tensor, p_value: Tensor, possible: Tensor) -> list[int]:
    """Return the few that go with errors most surely, the surest first; equal ones in their order."""
    (known,) = (possible & (z > 0) & p_value.isfinite()).nonzero(as_tuple=True)
    return [int(token) for token in known[p_value[known].argsort(stable=True)[:_MOST_CANDIDATES]]]


def _candidate(
    name: str, wrong: Tensor, right: Tensor, p_value: Tensor, held: Tensor, examples: Sequence[str], compared: int
) -> Candidate:
    low = float(right)
    lift = float(wrong) / low if low > 0 else float("inf")
    return Candidate(name, lift, float(p_value), float(wrong), low, int(held), tuple(examples), compared)


def _last_used(counts: Tensor) -> int:
    used = counts.sum(dim=(1, 2)).nonzero()
    return int(used.max()) + 1 if len(used) else 1

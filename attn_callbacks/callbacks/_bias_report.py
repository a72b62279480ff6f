"""From the counts of a validation to a BiasReport."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from attn_callbacks.bias import AttentionShare, BiasReport, Calibration, Candidate, Reliance
from attn_callbacks.callbacks._fed import FedCounts
from attn_callbacks.metrics import TokenSums, associations, class_divergence

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
    return AttentionShare(**metric.compute()._asdict())


def _candidates(
    sums: TokenSums, name: Callable[[int], str], examples: Callable[[int], Sequence[str]], are_places: bool
) -> Iterator[Candidate]:
    """Yield what draws more attention in wrong predictions, then what occurs more often in them."""
    found = associations(TokenSums(*(field.cpu() for field in sums)))
    held = found.support.sum(dim=1)
    possible = held > 0 if are_places else (held > 0) & (held < _IN_ALL * sums.samples.sum().cpu())
    ties = [_Tie("attention", found.z, found.p_value, found.wrong_mean, found.right_mean, found.mean_error, found.lift)]
    if not are_places:
        wrong, right = found.wrong_presence, found.right_presence
        z, p_value, error = found.presence_z, found.presence_p_value, found.presence_error
        ties.append(_Tie("presence", z, p_value, wrong, right, error, wrong / right))
    compared = sum(int((possible & tie.p_value.isfinite()).sum()) for tie in ties)
    for tie in ties:
        for token in _strongest(tie, possible):
            yield Candidate(
                name=name(token),
                lift=float(tie.lift[token]),
                p_value=float(tie.p_value[token]),
                wrong=float(tie.wrong[token]),
                right=float(tie.right[token]),
                support=int(held[token]),
                examples=tuple(examples(token)),
                compared=compared,
                kind=tie.kind,
                error=float(tie.error[token]),
            )


class _Tie(NamedTuple):
    """One way in which tokens may go with errors; fields other than the kind are ``(tokens,)``."""

    kind: Literal["attention", "presence"]
    z: Tensor
    p_value: Tensor
    wrong: Tensor
    right: Tensor
    error: Tensor
    lift: Tensor


def _strongest(tie: _Tie, possible: Tensor) -> list[int]:
    """Return the few that go with errors most surely, the surest first; equal ones in their order."""
    (known,) = (possible & (tie.z > 0) & (tie.wrong > tie.right) & tie.p_value.isfinite()).nonzero(as_tuple=True)
    return [int(token) for token in known[tie.p_value[known].argsort(stable=True)[:_MOST_CANDIDATES]]]


def _last_used(counts: Tensor) -> int:
    used = counts.sum(dim=(1, 2)).nonzero()
    return int(used.max()) + 1 if len(used) else 1

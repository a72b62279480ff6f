"""What was found about the heads of a model, in tables to read in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from examples.heads_of_minilm import Found

__all__ = ["analysis_seconds", "place", "report"]

_MOST = 10
_SURE = 0.1  # margin of a label that `HeadRoles` calls sure
_ANALYSIS = ("roles", "gates", "ablation", "interactions")


def report(found: Found, rise: float) -> str:
    """Return all tables; a head is written layer.head, both counted from 0."""
    parts = [
        ("Epoch by epoch", _epochs(found, rise)),
        ("Roles before (in brackets: not sure)", _roles(found, 0)),
        ("Roles after", _roles(found, -1)),
        ("Heads that changed their role", _changes(found)),
        ("Clusters after: heads that look at the same words", _clusters(found)),
        (f"The {_MOST} most important heads after (loss answers to a gate on the head)", _important(found)),
        ("What heads of a role are worth, after: mean over heads", _worth(found)),
        (f"Heads that can go together for {rise:.0%} of the loss", _removable(found)),
        ("Pairs: estimated, then measured exactly on other sentences", _pairs(found)),
        ("Time in seconds, of the last look", _times(found)),
    ]
    return "\n".join(f"\n== {title} ==\n{text}" for title, text in parts)


def analysis_seconds(found: Found) -> tuple[float, float]:
    """Return seconds of one whole analysis of all heads, on the wall and of the processor, without the checks."""
    parts = [value for name, value in found.seconds.items() if name.startswith(_ANALYSIS)]
    return sum(wall for wall, _ in parts), sum(processor for _, processor in parts)


def place(names: Sequence[str], head: tuple[str, int]) -> str:
    """Write a head as layer.head in numbers."""
    return f"{list(names).index(head[0])}.{head[1]}"


def _epochs(found: Found, rise: float) -> str:
    rows = [["epoch", "trained", "loss", "accuracy", "drift of roles", "clusters", "same as before", "can go"]]
    earlier = None
    for number, look in enumerate(found.looks):
        drift = torch.tensor(_numbers(found.roles.timeline[number]["drift"])).nanmean()
        same = "" if earlier is None else f"{look.clusters.agreement(earlier):.2f}"
        what = "classifier" if number == 0 else "all layers"
        can_go = len(look.study.pruning.removable(rise).heads)
        cells = [str(number), what, f"{look.study.importance.loss:.3f}", f"{look.accuracy:.2f}", f"{drift:.3f}"]
        rows.append([*cells, str(look.clusters.clusters), same, str(can_go)])
        earlier = look.clusters
    return _laid_out(rows)


def _numbers(table: list[list[float | None]]) -> list[list[float]]:
    return [[float("nan") if value is None else value for value in row] for row in table]


def _roles(found: Found, which: int) -> str:
    result = found.looks[which].roles
    labels, names, agree = result.labels(), result.names(), result.agreement()
    heads: dict[str, list[tuple[int, int]]] = {}
    for layer, row in enumerate(names):
        for head, name in enumerate(row):
            heads.setdefault(name, []).append((layer, head))
    rows = [["role", "heads", "strength", "margin", "sentences that agree", "which"]]
    for name, own in sorted(heads.items(), key=lambda item: -len(item[1])):
        strength, margin, share = (_median(values, own) for values in (labels.strength, labels.confidence, agree))
        written = [f"{a}.{b}" if labels.confidence[a, b] >= _SURE else f"({a}.{b})" for a, b in own]
        more = f" and {len(own) - 14} more" if len(own) > 14 else ""
        shown = "" if strength != strength else f"{strength:.2f}"
        rows.append([name, str(len(own)), shown, f"{margin:.2f}", f"{share:.0%}", " ".join(written[:14]) + more])
    return _laid_out(rows)


def _median(values: Tensor, heads: list[tuple[int, int]]) -> float:
    return float(torch.stack([values[head] for head in heads]).nanmedian())


def _changes(found: Found) -> str:
    before, after = ([name for row in look.roles.names() for name in row] for look in (found.looks[0], found.looks[-1]))
    moves = Counter(f"{one} -> {other}" for one, other in zip(before, after, strict=True) if one != other)
    counted = ", ".join(f"{move} {count}" for move, count in moves.most_common())
    lines = [f"epoch {change.epoch}: {change}" for change in found.roles.changes]
    more = [f"and {len(lines) - 2 * _MOST} more"] if len(lines) > 2 * _MOST else []
    return "\n".join([f"{moves.total()} in all: {counted}", f"for sure: {len(lines)}", *lines[: 2 * _MOST], *more])


def _clusters(found: Found) -> str:
    clusters, roles = found.looks[-1].clusters, found.looks[-1].roles.names()
    lines = [
        f"{clusters.clusters} clusters, silhouette {clusters.mean_silhouette:.2f} (below 0.25: none stands out), "
        f"stability {clusters.mean_stability:.2f}"
    ]
    for cluster in range(clusters.clusters):
        own = (clusters.labels == cluster).nonzero().tolist()
        kinds = sorted({roles[layer][head] for layer, head in own})
        lines.append(f"  {cluster}: {len(own)} heads ({', '.join(kinds)})")
    near = [f"{a.first[0]}.{a.first[1]} and {a.second[0]}.{a.second[1]} ({a.distance:.2f})" for a in clusters.redundant]
    lines.append(f"pairs that look alike (distance below 0.3): {len(near)}. {', '.join(near[:5])}")
    return "\n".join(lines)


def _important(found: Found) -> str:
    first, last = found.looks[0].study.importance, found.looks[-1].study.importance
    ablation, roles = found.looks[-1].ablation, found.looks[-1].roles.names()
    rows = [["head", "role", "importance", "before", "loss without it (rise)"]]
    for place_ in last.importance.flatten().nan_to_num(-1.0).topk(min(_MOST, last.importance.numel())).indices.tolist():
        at = divmod(place_, last.importance.shape[1])
        values = [_with_error(each.importance[at], each.standard_error[at]) for each in (last, first)]
        rise = _with_error(ablation.change[at], ablation.standard_error[at])
        rows.append([f"{at[0]}.{at[1]}", roles[at[0]][at[1]], *values, rise])
    both = torch.stack([last.change.flatten(), ablation.change.flatten()])
    known = both[:, ~both.isnan().any(dim=0)]
    alike = float(torch.corrcoef(known)[0, 1])
    return f"{_laid_out(rows)}\nthe gradient's estimate of the rise and the measured one correlate by {alike:.2f}"


def _worth(found: Found) -> str:
    look = found.looks[-1]
    rows = [["role", "heads", "importance", "rise of the loss without one"]]
    names = [name for row in look.roles.names() for name in row]
    for name in sorted(set(names), key=names.count, reverse=True):
        own = torch.tensor([each == name for each in names]).view_as(look.ablation.change)
        values = [look.study.importance.importance[own].nanmean(), look.ablation.change[own].nanmean()]
        rows.append([name, str(names.count(name)), *(f"{float(value):+.4f}" for value in values)])
    return _laid_out(rows)


def _removable(found: Found) -> str:
    if found.removed is None:
        return "none"
    curve, (count, rise, error) = found.looks[-1].study.pruning, found.removed_together()
    heads = " ".join(place(curve.layer_names, head) for head in sorted(curve.heads[:count]))
    here = float(curve.change[curve.removed.index(count)])
    return (
        f"{count} heads: {heads}\n"
        f"the loss of {curve.loss:.3f} changes by {here:+.3f} on the sentences that they were chosen on; on others, "
        f"that of {found.removed.loss:.3f} by {rise:+.3f} ± {error:.3f}"
    )


def _pairs(found: Found) -> str:
    names, roles = found.pairs.layer_names, found.looks[-1].roles.names()
    rows = [["pair", "roles", "kind", "estimate", "exact after", "exact before"]]
    before, after = found.again
    for kind, pairs in (("redundant", found.pairs.redundant(5)), ("synergetic", found.pairs.synergetic(5))):
        for pair in pairs:
            at = tuple(found.pairs.heads.index(head) for head in pair[:2])
            shown = [place(names, head) for head in pair[:2]]
            kinds = " + ".join(roles[list(names).index(layer)][head] for layer, head in pair[:2])
            exact = [_with_error(each.interaction[at], each.standard_error[at]) for each in (after, before)]
            estimate = _with_error(pair.interaction, pair.standard_error)
            rows.append([" ".join(shown), kinds, kind, estimate, *exact])
    return _laid_out(rows)


def _times(found: Found) -> str:
    rows = [["", "wall", "processor"]]
    rows += [[name, *(f"{value:.1f}" for value in pair)] for name, pair in found.seconds.items()]
    wall, processor = analysis_seconds(found)
    held = "within a minute" if wall <= 60 else "more than a minute"
    total = f"one whole analysis of {len(found.pairs.heads)} heads: {wall:.0f} s ({processor:.0f} s of the processor)"
    return f"{_laid_out(rows)}\n{total} on {torch.get_num_threads()} thread(s), {held}"


def _with_error(value: Any, error: Any) -> str:
    return f"{float(value):+.4f} ± {float(error):.4f}"


def _laid_out(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

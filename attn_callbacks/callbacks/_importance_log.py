"""A study of heads as pictures, numbers and text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from attn_callbacks.analysis.interaction import HeadInteractions, HeadPair
from attn_callbacks.callbacks._importance_study import HeadStudy
from attn_callbacks.render import Picture, layer_head_grid
from attn_callbacks.render.layers import short_layer_names
from attn_callbacks.render.pairs import pair_matrix

__all__ = ["study_drawings", "study_scalars", "study_text"]

_CAPTION = "above 0 redundant: each covers for the other; below 0 synergetic: one needs the other"
_MOST, _PAIRS = 20, 5  # heads and pairs of a kind named in the text


def study_drawings(study: HeadStudy) -> dict[str, Callable[[], Picture]]:
    """Return what draws each picture, by tag."""
    drawings: dict[str, Callable[[], Picture]] = {}
    for name, values, diverging in _tables(study):
        title = f"{name}, epoch {study.epoch}"
        drawings[f"importance/{name}"] = partial(
            layer_head_grid, values.numpy(), title=title, layer_labels=study.layer_names, diverging=diverging
        )
    if study.interactions is not None:
        drawings["importance/interaction"] = partial(_pairs, study.interactions, study.epoch)
    return drawings


def study_scalars(study: HeadStudy, rise: float) -> dict[str, float]:
    """Return numbers by tag: the mean of each layer, the loss, and how many heads can go."""
    scalars: dict[str, float] = {}
    for name, values, _ in _tables(study):
        for label, mean in zip(study.layer_names, values.nanmean(dim=-1).tolist(), strict=True):
            if mean == mean:  # NaN is not itself
                scalars[f"importance/{name}/{label}"] = mean
    found = study.importance or study.ablation
    if found is not None:
        scalars["importance/loss"] = found.loss
    if study.pruning is not None:
        removable = study.pruning.removable(rise)
        scalars["importance/removable"] = float(len(removable.heads))
        scalars["importance/removable_change"] = removable.change
    return scalars


def study_text(study: HeadStudy, rise: float) -> str:
    """Return what was found in words, as Markdown."""
    return "\n\n".join([*_removable(study, rise), *_interacting(study.interactions), *_unfinished(study)])


def _tables(study: HeadStudy) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield name and values of each picture of all heads, and whether its colours part at zero."""
    if study.importance is not None:
        yield "gate", study.importance.importance, False
        yield "first_order_change", study.importance.change, True
        yield "confidence", study.importance.confidence, False
    if study.ablation is not None:
        yield "ablation", study.ablation.change, True


def _pairs(found: HeadInteractions, epoch: int) -> Picture:
    sizes = [sum(layer == name for layer, _ in found.heads) for name in found.layer_names]
    title = f"interaction of heads ({found.method}), epoch {epoch}"
    names = short_layer_names(found.layer_names)
    return pair_matrix(
        found.interaction.numpy(), title=title, caption=_CAPTION, parts=sizes, part_labels=names, diverging=True
    )


def _removable(study: HeadStudy, rise: float) -> Iterator[str]:
    if study.pruning is None:
        return
    curve, found = study.pruning, study.pruning.removable(rise)
    if not found.heads:
        yield (
            f"No head is surely without a rise of {rise:.1%} of the loss ({curve.loss:.4g}) on these samples. More "
            "`batches`, or a larger `rise`, may show some."
        )
        return
    told = _names(curve.layer_names)
    listed = ", ".join(told(head) for head in found.heads[:_MOST])
    more = "" if len(found.heads) <= _MOST else f" and {len(found.heads) - _MOST} more"
    count = f"{len(found.heads)} head{'s' * (len(found.heads) > 1)}"
    yield (
        f"**{count} can go together**: that changes the loss of {curve.loss:.4g} by {found.change:+.2g} ± "
        f"{found.standard_error:.1g}, on the samples they were chosen on. {listed}{more}."
    )


def _interacting(found: HeadInteractions | None) -> Iterator[str]:
    if found is None:
        return
    rows: list[tuple[str, HeadPair]] = [("redundant", pair) for pair in found.redundant(_PAIRS)]
    rows += [("synergetic", pair) for pair in found.synergetic(_PAIRS)]
    told = _names(found.layer_names)
    lines = [
        f"| {kind} | {told(pair.first)} | {told(pair.second)} | {pair.interaction:+.2g} ± {pair.standard_error:.1g} |"
        for kind, pair in rows
        if abs(pair.interaction) > 2 * pair.standard_error
    ]
    if lines:
        yield "\n".join(["| pair | head | head | interaction |", "|---|---|---|---|", *lines])


def _names(layers: Sequence[str]) -> Callable[[tuple[str, int]], str]:
    """Return what names a head without the path that all layers share."""
    short = dict(zip(layers, short_layer_names(layers), strict=True))
    return lambda head: f"{short[head[0]]} head {head[1]}"


def _unfinished(study: HeadStudy) -> Iterator[str]:
    if study.unfinished:
        cut = ", ".join(study.unfinished)
        yield f"The time was up before all was measured: {cut}. Raise `seconds`, or take fewer `batches`."

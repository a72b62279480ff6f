"""Pictures of an error analysis: effects of all heads, and the maps of samples in those that differ most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._error_gallery import Entry
from attn_callbacks.callbacks._error_result import ErrorAnalysisResult, WrongSample
from attn_callbacks.callbacks._samples import patch_grid, read_samples
from attn_callbacks.render import Picture, attention_heads, layer_head_grid, overlay

__all__ = ["effect_pictures", "error_drawings", "read_entry", "sample_overlay", "sample_picture"]

Array = np.ndarray[Any, Any]

_SHOWN = 1.5
"""Effect of the strongest colour, the same for all statistics and epochs."""


def effect_pictures(result: ErrorAnalysisResult) -> dict[str, Callable[[], Picture]]:
    """Return by tag what draws the effects of a statistic on all heads."""
    pictures: dict[str, Callable[[], Picture]] = {}
    for place, name in enumerate(result.statistics):
        effects = result.outcome.g[..., place].numpy()
        if not np.isnan(effects).all():
            title = f"{name}: wrong less right, in standard deviations, epoch {result.epoch}"
            labels = result.layer_names
            draw = partial(layer_head_grid, effects, title=title, layer_labels=labels, high=_SHOWN, diverging=True)
            pictures[f"errors/{name}"] = draw
    return pictures


def error_drawings(
    result: ErrorAnalysisResult, heads: int, colours: Callable[[Sequence[tuple[str, int]]], Array]
) -> Iterator[tuple[str, Callable[[], Picture], int]]:
    """Yield tag, what draws it, and how many bytes that holds, of every picture.

    Args:
        result: What was found.
        heads: Heads shown of each sample.
        colours: Returns the colours of frames from layer names and numbers of heads.
    """
    for tag, effects in effect_pictures(result).items():
        yield tag, effects, 0
    shown = result.ranking(heads)
    for kind in ("worst", "confident"):
        for place, sample in enumerate(getattr(result, kind)):
            draw, size = sample_picture(result, sample, shown, f"{kind} {place}", colours)
            yield f"errors/{kind}/{place}", draw, size
            over = sample_overlay(result, sample, shown, f"{kind} {place}")
            if over is not None:
                yield f"errors/{kind}/{place}/image", over, size


def sample_picture(
    result: ErrorAnalysisResult,
    sample: WrongSample,
    heads: Sequence[tuple[int, int]],
    name: str,
    colours: Callable[[Sequence[tuple[str, int]]], Array],
) -> tuple[Callable[[], Picture], int]:
    """Return what draws the maps of a sample in some heads, and how many bytes it holds.

    Args:
        result: Knows the layers and classes.
        sample: The sample.
        heads: Layers and heads, the most important first; those whose maps have another shape than the first's, as
            cross-attention has, are left out.
        name: What to call the sample.
        colours: Returns the colours of frames from layer names and numbers of heads.
    """
    maps = [(layer, head, sample.maps[result.layer_names[layer]][head]) for layer, head in heads
            if head < len(sample.maps.get(result.layer_names[layer], ()))]  # fmt: skip
    known = [each for each in maps if each[2].numel()]  # a sample may have no token
    shown = [each for each in known if each[2].shape == known[0][2].shape] or [(0, 0, torch.zeros(1, 1))]
    stacked = torch.stack([each[2] for each in shown]).float().numpy()
    queries, keys = stacked.shape[1:]
    labels = list(sample.labels)
    draw = partial(
        attention_heads,
        stacked,
        row_labels=labels if len(labels) == queries else None,
        column_labels=labels if len(labels) == keys else None,
        colours=colours([(result.layer_names[layer], head) for layer, head, _ in shown]),
        titles=[f"{layer}.{head}" for layer, head, _ in shown],
        title=f"{_title(result, sample, name)} (layer.head)",
        high=min(1.0, 4 / keys**0.5),
    )
    return draw, stacked.nbytes


def sample_overlay(
    result: ErrorAnalysisResult, sample: WrongSample, heads: Sequence[tuple[int, int]], name: str
) -> Callable[[], Picture] | None:
    """Return what lays the attention of a sample's class token in some heads over its image; ``None`` if none fits.

    Without a class token it is the mean over patches. Maps that were pooled lie on no image.
    """
    if sample.image is None:
        return None
    named = [(sample.maps.get(result.layer_names[layer]), head) for layer, head in heads]
    maps = [each[head] for each, head in named if each is not None and head < len(each)]
    square = [each.float() for each in maps if each.shape[0] == each.shape[1] == maps[0].shape[1]]
    grid = patch_grid(len(square[0]), sample.image.shape[1] / sample.image.shape[2]) if square else None
    if grid is None:
        return None
    rows, columns, prefix = grid
    mean = torch.stack(square).mean(dim=0)
    patches = (mean[0] if prefix else mean.mean(dim=0))[prefix:].view(rows, columns)
    picture = read_samples(BatchSchema(), {"pixel_values": sample.image[None]}, None, 1)[0].image
    return None if picture is None else partial(overlay, picture, patches.numpy(), title=_title(result, sample, name))


def read_entry(entry: Entry, layers: Sequence[str], tokenizer: Any) -> WrongSample:
    """Turn what a gallery kept of a sample into something to look at, without padding.

    Args:
        entry: One of `WorstSamples.entries`.
        layers: Names of the layers.
        tokenizer: Names token ids, if there is one.
    """
    maps = {name: _trimmed(entry, name) for name in layers if f"{name}/maps" in entry}
    kept = [name for name in maps if int(entry[f"{name}/sizes"][0])]  # 0: the layer did not run for this sample
    labels: tuple[str, ...] = ()
    if "tokens" in entry and entry["tokens"].ndim == 1:
        own = [entry[f"{name}/keys"] for name in kept if _is_of_tokens(entry, name)]
        texts = read_samples(BatchSchema(), {"input_ids": entry["tokens"][None]}, tokenizer, 1)[0].tokens or ()
        marks = own[0].tolist() if own else [True] * len(texts)
        labels = tuple(text for text, real in zip(texts, marks, strict=False) if real)
    number, target, predicted = (int(entry[name]) for name in ("number", "target", "predicted"))
    image = entry["image"] if "image" in entry and entry["image"].ndim == 3 else None
    return WrongSample(
        number=number,
        loss=float(entry["loss"]),
        confidence=float(entry["confidence"]),
        target=target,
        predicted=predicted,
        labels=labels,
        maps={name: maps[name] for name in kept},
        image=image,
    )


def _trimmed(entry: Entry, name: str) -> Tensor:
    rows, columns, queries, keys = entry[f"{name}/sizes"].tolist()
    shown = _real(entry[f"{name}/queries"][:queries], rows), _real(entry[f"{name}/keys"][:keys], columns)
    return entry[f"{name}/maps"][:, :rows, :columns][:, shown[0]][:, :, shown[1]]


def _is_of_tokens(entry: Entry, name: str) -> bool:
    """The layer attends from the tokens of the batch to themselves."""
    _, _, queries, keys = entry[f"{name}/sizes"].tolist()
    return bool(queries == keys and keys <= len(entry["tokens"]))


def _real(valid: Tensor, buckets: int) -> Tensor:
    """Which of the buckets that the tokens were pooled into hold one that is no padding."""
    if not len(valid):
        return valid
    bucket = torch.arange(len(valid)) * buckets // len(valid)
    return torch.bincount(bucket[valid], minlength=buckets) > 0


def _title(result: ErrorAnalysisResult, sample: WrongSample, name: str) -> str:
    target, predicted = (_class(result, number) for number in (sample.target, sample.predicted))
    told = f"{target}, predicted {predicted} ({sample.confidence:.2f}), loss {sample.loss:.2f}"
    return f"{name}, sample {sample.number}: {told}"


def _class(result: ErrorAnalysisResult, number: int) -> str:
    return result.class_names[number] if number < len(result.class_names) > 1 else str(number)

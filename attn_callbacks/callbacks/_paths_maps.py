"""Maps of a few samples, layer by layer on the host, and which of the layers follow one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from attn_callbacks.callbacks._host import to_host
from attn_callbacks.callbacks._layers import maps_per_sample
from attn_callbacks.capture import AttentionCall
from attn_callbacks.capture.naming import call_name

__all__ = ["LayerMaps", "SampleMaps", "check_size", "one_stack", "read_layer", "sample_maps"]


class LayerMaps(NamedTuple):
    """One call of attention.

    Args:
        name: Its label.
        is_cross: Its queries and keys are different tokens; it has no maps then.
        maps: Of each sample, ``(heads, tokens, tokens)``, without padding.
        gradients: The same of the gradients, if there are any.
        real: Of each sample, which of the sequence's positions are shown, ``(positions,)``.
        is_decoder: Its tokens are a decoder's own, not those of the batch's inputs.
    """

    name: str
    is_cross: bool
    maps: Sequence[Tensor] = ()
    gradients: Sequence[Tensor] = ()
    real: Sequence[Tensor] = ()
    is_decoder: bool = False


@dataclass(frozen=True, eq=False)
class SampleMaps:
    """One sample: the maps of the layers that follow one another, first layer first, and its real positions."""

    maps: list[Tensor]
    gradients: list[Tensor]
    real: Tensor
    is_decoder: bool = False


def read_layer(
    call: AttentionCall, count: int, samples: int | None, most: int, gradients: Tensor | None = None
) -> LayerMaps:
    """Copy what is wanted of a call.

    Args:
        call: A call that knows its padding.
        count: Number of samples wanted, the first ones.
        samples: Samples in the batch of the call.
        most: Longest sequence.
        gradients: ``(batch, heads, queries, keys)``

    Raises:
        ValueError: If the call has several maps a sample, or its sequence is too long.
    """
    if call.is_cross:
        return LayerMaps(call_name(call), is_cross=True)
    check_size(call, samples, most)
    real = [(call.query_valid & call.key_valid)[:count]] if call.shape[2] == call.shape[3] else []
    wanted = [call.select(sample).weights()[0] for sample in range(count)]
    wanted += [] if gradients is None else list(gradients[:count])
    copies = to_host([*wanted, *real])
    shown: Tensor | None = copies.pop() if real else None
    # maps that are not square are left whole, for the one who refuses them
    cut = copies if shown is None else [_without_padding(maps, shown[n % count]) for n, maps in enumerate(copies)]
    rows = () if shown is None else list(shown)
    return LayerMaps(call_name(call), False, cut[:count], cut[count:], rows, call.is_decoder)


def check_size(call: AttentionCall, samples: int | None, most: int) -> None:
    """Raise unless a call of self-attention has one map a sample, of at most ``most`` tokens."""
    batch, _, queries, keys = call.shape
    if maps_per_sample(batch, samples) != 1:
        raise ValueError(
            f"{call_name(call)!r} has {batch} maps for {samples} samples, as in windows or crops, between which "
            "attention has no common path. Name other `layers`."
        )
    if max(queries, keys) > most:
        raise ValueError(
            f"{call_name(call)!r} has {max(queries, keys)} tokens, `max_tokens` is {most}. Raise it: every sample "
            "takes layers x heads x tokens x tokens numbers."
        )


def one_stack(layers: Sequence[LayerMaps], *, chosen: bool) -> list[LayerMaps]:
    """Return the layers of self-attention that follow one another.

    Args:
        layers: All calls of a forward, in their order.
        chosen: The user named them: all count. Else those before the first cross-attention, which is the encoder. The
            decoder's first self-attention is told from it by its name, which has more in common with the cross.
    """
    crosses = [place for place, layer in enumerate(layers) if layer.is_cross]
    if chosen or not crosses:
        return [layer for layer in layers if not layer.is_cross]
    stack = list(layers[: crosses[0]])
    if len(stack) > 1 and _shared(stack[-1].name, layers[crosses[0]].name) > _shared(stack[-1].name, stack[-2].name):
        stack.pop()
    return stack


def sample_maps(stack: Sequence[LayerMaps], place: int) -> SampleMaps:
    """Return the maps of one sample.

    Args:
        stack: The layers that follow one another.
        place: Its place in the batch.

    Raises:
        ValueError: If there are no layers.
    """
    if not stack:
        raise ValueError("No self-attention was seen whose layers follow one another. Name its `layers`.")
    real = stack[0].real[place] if stack[0].real else stack[0].maps[place].new_ones(stack[0].maps[place].shape[-1])
    maps = [layer.maps[place] for layer in stack]
    gradients = [layer.gradients[place] for layer in stack if layer.gradients]
    return SampleMaps(maps, gradients, real.bool(), stack[0].is_decoder)


def _without_padding(maps: Tensor, real: Tensor) -> Tensor:
    kept = real.nonzero()[:, 0]
    return maps[:, kept][:, :, kept]


def _shared(name: str, other: str) -> int:
    """Return how many parts of two paths agree from the start."""
    same = 0
    for part, own in zip(name.split("."), other.split("."), strict=False):
        if part != own:
            break
        same += 1
    return same

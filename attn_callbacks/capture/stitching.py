"""One map from the many small ones of a generation with a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_callbacks.capture.call import AttentionCall

__all__ = ["computed_call", "stitch_calls", "stitch_generation"]


def stitch_generation(calls: Sequence[AttentionCall], beams: Tensor | None = None) -> tuple[AttentionCall, ...]:
    """Stitch the attention of a generation with a key-value cache into one map a layer.

    With a cache a decoder runs once a token, and each run sees one row of the map (the first one: as many as the prompt
    has tokens). This puts the rows of each layer below one another, so that what was made for the maps of a normal
    forward works. Keys that did not exist yet have the weight zero. Builds all maps that it is given: select layers in
    the recorder, where memory matters.

    Args:
        calls: What a recorder saw of one generation, in the order of execution. Calls that ran once, such as those of
            an encoder, are returned as they are. For caches that overwrite keys see :func:`computed_call`.
        beams: Which entry of the batch each token of each sequence came from, as ``beam_indices`` of Hugging Face's
            ``generate``, cut to one column a run; ``-1`` for tokens after the end, whose rows become zero. ``None``:
            entry ``i`` is sequence ``i`` throughout, as without beam search.

    Shape:
        - beams: ``(sequences, runs)``

    Returns:
        One call a layer, with weights ``(batch, heads, T_out, T_total)``: all queries by all keys (in cross-attention:
        by the source). They are in the order in which the layers first ran.

    Raises:
        ValueError: If calls of a layer do not follow on one another, or ``beams`` has other numbers of runs.

    Example:
        >>> past, now = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 1, 4)
        >>> prompt = AttentionCall("layer", query=past, key=past, is_causal=True)
        >>> step = AttentionCall("layer", query=now, key=torch.zeros(1, 1, 3, 4))
        >>> stitch_generation([prompt, step])[0].weights()[0, 0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.3333, 0.3333, 0.3333]])
    """
    return tuple(layer[0] if len(layer) == 1 else stitch_calls(layer, beams) for layer in _layers(calls))


def computed_call(call: AttentionCall) -> AttentionCall:
    """Return a call that holds its weights, computed now, and no longer the queries and keys they come from.

    For a generation whose cache overwrites keys (one of fixed size with a sliding window): what a recorder kept of a
    run is gone by its end. Collect such calls while the model runs.

    Args:
        call: A call, inside ``on_call`` of a recorder.

    Example:
        >>> from attn_callbacks import AttentionRecorder
        >>> model, kept = torch.nn.MultiheadAttention(8, num_heads=2, batch_first=True), []
        >>> tokens = torch.ones(1, 3, 8)
        >>> with AttentionRecorder(model, on_call=lambda call: kept.append(computed_call(call))):
        ...     output, _ = model(tokens, tokens, tokens)
        >>> kept[0].recorded.shape
        torch.Size([1, 2, 3, 3])
    """
    return AttentionCall(
        call.name,
        call.index,
        call.is_cross,
        recorded=call.weights(),
        given_query_valid=call.query_valid,
        given_key_valid=call.key_valid,
    )


def stitch_calls(calls: Sequence[AttentionCall], beams: Tensor | None = None) -> AttentionCall:
    """Stitch the calls of one layer, in the order of execution; see :func:`stitch_generation`.

    Raises:
        ValueError: If there is no call, the calls do not follow on one another, or ``beams`` has another number of
            runs.
    """
    if not calls:
        raise ValueError("`calls` holds no attention call. Record the model while it generates.")
    if beams is not None and (beams.ndim != 2 or beams.shape[1] != len(calls)):
        shape = tuple(beams.shape)
        raise ValueError(f"`beams` must have shape (sequences, {len(calls)}), one column a run, got {shape}.")
    sizes = {call.shape[0] for call in calls}
    if beams is None and len(sizes) > 1:
        raise ValueError(_unfit(calls[0].name, f"their batches have {min(sizes)} to {max(sizes)} entries"))
    calls = [_unpacked(call, calls[0].shape[1]) for call in calls]
    starts = _starts(calls)
    total = max(start + call.shape[3] for start, call in zip(starts, calls, strict=True))
    parts, queries, keys = [], [], []
    for run, (call, start) in enumerate(zip(calls, starts, strict=True)):
        room = start, total - start - call.shape[3]
        own = None if beams is None else beams[:, run].to(call.device)
        parts.append(_chosen(F.pad(call.weights(), room), own))
        keys.append(_chosen(F.pad(call.key_valid, room), own))
        queries.append(_chosen(call.query_valid, own))
    query_valid, key_valid = torch.cat(queries, dim=1), torch.stack(keys).any(dim=0)
    if not calls[0].is_cross:  # a query is a token whose key comes later, or now
        query_valid = query_valid & key_valid[:, _places(calls, starts)]
    return AttentionCall(
        calls[0].name,
        calls[0].index,
        calls[0].is_cross,
        recorded=torch.cat(parts, dim=2),
        given_query_valid=query_valid,
        given_key_valid=key_valid,
    )


def _layers(calls: Sequence[AttentionCall]) -> list[list[AttentionCall]]:
    """Group calls by the layer that made them.

    A recorder of the decoder counts anew in each run: calls of one layer then have the same index, and a layer that
    several places share has several. A recorder of something around it counts on: calls of one layer have them all.
    """
    found: dict[tuple[str, int], list[AttentionCall]] = {}
    for call in calls:
        found.setdefault((call.name, call.index), []).append(call)
    if all(len(layer) == 1 for layer in found.values()):
        found = {}
        for call in calls:
            found.setdefault((call.name, 0), []).append(replace(call, index=0))
    return list(found.values())


def _unpacked(call: AttentionCall, heads: int) -> AttentionCall:
    """Return a call of one row with as many heads as the others have.

    Under grouped-query attention Hugging Face hands the query heads that share a key head to the kernel as that many
    queries of one head, where there is one token and a mask.
    """
    batch, groups, rows, keys = call.shape
    if groups == heads:
        return call
    if groups * rows != heads:
        raise ValueError(_unfit(call.name, f"they have {heads} and {groups} heads"))
    weights = call.weights().reshape(batch, heads, 1, keys)  # head h reads key head h // rows
    return replace(computed_call(call), recorded=weights, given_query_valid=call.query_valid[:, :1])


def _starts(calls: Sequence[AttentionCall]) -> list[int]:
    """Return which key of the whole sequence the first key of each call is."""
    if calls[0].is_cross:
        sizes = {call.shape[3] for call in calls}
        if len(sizes) > 1:
            raise ValueError(_unfit(calls[0].name, f"they have {min(sizes)} to {max(sizes)} keys"))
        return [0] * len(calls)
    starts, rows, keys = [], 0, 0
    for run, call in enumerate(calls):
        _, _, more, seen = call.shape
        if run and more == seen > 1:
            raise ValueError(_unfit(call.name, f"run {run} has no keys but those of its own {more} queries"))
        if run > 1 and seen < keys:
            raise ValueError(_unfit(call.name, f"{keys} keys are followed by {seen}"))
        rows, keys = rows + more, seen
        # a window keeps the latest keys only; a cache of fixed size has room for more than there are
        starts.append(max(0, rows - seen))
    return starts


def _places(calls: Sequence[AttentionCall], starts: list[int]) -> list[int]:
    """Return which key of the whole sequence is the token of each query."""
    is_fixed = len(calls) > 1 and calls[0].shape[3] == calls[1].shape[3] and starts[1] == 0
    places: list[int] = []
    for call, start in zip(calls, starts, strict=True):
        first = len(places) if is_fixed else start + call.shape[3] - call.shape[2]
        places += range(first, first + call.shape[2])
    return places


def _unfit(name: str, why: str) -> str:
    return (
        f"The calls of {name!r} do not follow on one another: {why}. Record one generation with a cache, and the model "
        "that generates itself: AttentionRecorder(model)."
    )


def _chosen(part: Tensor, beam: Tensor | None) -> Tensor:
    """Return the entries of the batch that sequences came from, zero where they had ended."""
    if beam is None:
        return part
    ended = (beam < 0).view(-1, *[1] * (part.ndim - 1))
    return part[beam.clamp_min(0)].masked_fill(ended, 0)

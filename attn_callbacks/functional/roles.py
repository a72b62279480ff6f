"""Roles of attention heads: how well each head fits seventeen known patterns, one value a sample."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from attn_callbacks._checks import at_least, check_axes
from attn_callbacks.functional._frame import Frame
from attn_callbacks.functional._maps import Maps, measured, of_one_head
from attn_callbacks.functional._mixing import check_positions
from attn_callbacks.functional._places import Grid, check_grid
from attn_callbacks.functional._role_targets import Scene
from attn_callbacks.functional._scores import PatternScores

__all__ = ["ROLES", "head_roles"]

ROLES: tuple[str, ...] = (
    "class_gather",
    "previous",
    "next",
    "self",
    "sink",
    "separator",
    "duplicate",
    "induction",
    "column",
    "row",
    "special",
    "diagonal",
    "vertical",
    "local",
    "block",
    "long_range",
    "uniform",
)
"""Names along the last axis of `head_roles`, specific ones first."""

_BUDGET = 2**23  # weights, or marks of expected keys, at a time: 32 MiB
_MARKS = 8  # patterns that are marked pair by pair


def head_roles(
    weights: Tensor,
    tokens: Tensor | None = None,
    *,
    special: Tensor | None = None,
    separator: Tensor | None = None,
    segments: Tensor | None = None,
    grid: Grid | None = None,
    positions: Tensor | None = None,
    allowed: Tensor | None = None,
    valid: Tensor | None = None,
    key_valid: Tensor | None = None,
    window: int = 4,
    long_range: float = 0.25,
    square: bool = True,
) -> PatternScores:
    """Score every head on every sample for each of the roles that attention heads are known to play.

    A score is the mean attention mass on the keys that the role expects, over the rows for which it expects any; beside
    it stands what uniform attention over the allowed keys gets. `label_roles` turns scores into a label.

    | role | keys it expects of query ``i`` | needs |
    |---|---|---|
    | ``class_gather`` | content, read by the class token only: its mass times one minus that of others | ``special`` |
    | ``previous``, ``next``, ``self`` | ``i - 1``, ``i + 1``, ``i`` | |
    | ``sink`` | the sample's first token | |
    | ``separator``, ``special`` | any separator, any special token | ``separator``, ``special`` |
    | ``duplicate`` | other occurrences of the token | ``tokens`` |
    | ``induction`` | the token after each other occurrence | ``tokens`` |
    | ``column``, ``row`` | the other patches of the column, of the row | ``grid`` |
    | ``diagonal`` | ``i - 1``, ``i`` and ``i + 1`` | |
    | ``vertical`` | the one key that stands out most | |
    | ``local`` | keys at most ``window`` away | |
    | ``block`` | the tokens of its segment | ``segments`` or ``separator`` |
    | ``long_range`` | keys farther away than ``long_range`` | |
    | ``uniform`` | overlap with uniform attention, see `uniformity` | |

    ``weights`` is read about six times; all is computed in float32 without gradients, and waits for no device. A mask
    ``allowed`` that is written out for each head takes the heads one by one; one that was expanded does not.

    Args:
        weights: Attention weights, each row summing to one. A row of zeros is no data of its head. Left as they are.
        tokens: Ids of the keys.
        special: ``True`` for special tokens. A special first token is taken for the class token. ``None`` with a
            ``grid``: its prefix.
        separator: ``True`` for separators.
        segments: Number of the segment of each token; ``None``: each separator ends one.
        grid: ``(rows, columns, prefix)`` of an image in raster order behind ``prefix`` class and register tokens.
            Previous, next and diagonal then stay within a row of patches, and distances are Euclidean, in patches.
        positions: Query index of each row, for sampled rows; ``None`` means that row ``i`` is query ``i``.
        allowed: ``True`` where a row may attend; causal attention needs it. ``None`` allows every valid key.
        valid: ``True`` for the rows that count; padded queries are ``False``.
        key_valid: ``True`` for keys that are not padding; ``None`` takes ``valid`` where rows and keys are the same
            tokens, else the keys that any given row may attend to. Give it where ``valid`` leaves out other rows.
        window: Distance up to which a key is near.
        long_range: Distance beyond which a key is far away. Below 1, a share of the sample's valid keys, or of
            ``rows + columns`` of the grid; from 1 on, a number of tokens or patches.
        square: Whether queries and keys are the same tokens. ``False`` (cross-attention) leaves the roles that need one
            sequence NaN: all but sink, separator, special, vertical and uniform.

    Shape:
        - weights: ``(batch, heads, rows, keys)``
        - tokens, special, separator, segments, key_valid: ``(batch, keys)``
        - positions: ``(rows,)`` or ``(batch, rows)``
        - allowed: bool, broadcastable to ``weights``
        - valid: bool ``(batch, rows)`` or ``(batch, heads, rows)``
        - output: each field ``(batch, heads, roles)``, float32, along `ROLES`; NaN where a role is not defined

    Raises:
        ValueError: If a shape does not fit, the grid does not cover the keys, or a number is out of range (of
            ``positions`` checked on the CPU only).

    Example:
        >>> weights = torch.eye(6).roll(-1, dims=-1)[None, None]  # each query on the key before it
        >>> scores = head_roles(weights)
        >>> scores.score[0, 0, ROLES.index("previous")], scores.strength()[0, 0, ROLES.index("next")]
        (tensor(1.), tensor(-0.2000))

    References:
        Clark et al., "What Does BERT Look At?", 2019, section 3 (previous, next, self, special, separator); Xiao et
        al., "Efficient Streaming Language Models with Attention Sinks", 2023, and Gu et al., "When Attention Sink
        Emerges in Language Models", 2024 (sink); Wang et al., "Interpretability in the Wild", 2022 (duplicate); Olsson
        et al., "In-context Learning and Induction Heads", 2022 (induction). Kovaleva et al., "Revealing the Dark
        Secrets of BERT", 2019, name vertical, diagonal and block; their measures here, and all others, are ours.
    """
    check_axes("weights", weights, 4)
    check_grid(grid, weights.shape[-1])
    if key_valid is None and positions is None and square and valid is not None and valid.ndim == 2:
        key_valid = valid
    if square and positions is not None:
        check_positions("positions", positions, weights.shape[-1])
    frame = Frame(positions, of_one_head(allowed, weights.shape[1]), valid, key_valid, long_range, square)
    given = {"tokens": tokens, "special": special, "separator": separator, "segments": segments}
    for name, values in given.items():
        _check_keys(name, values, weights)
    pairs, wanted = frame.pairs(weights), frame.wanted(weights)
    scene = _scene(frame, weights, pairs, given, grid, at_least("window", window, 0))
    return measured(partial(_in_parts, scene=scene), weights, pairs, wanted)


def _scene(
    frame: Frame, weights: Tensor, pairs: Tensor, given: dict[str, Tensor | None], grid: Grid | None, window: int
) -> Scene:
    known = frame.tokens(pairs)
    limit = frame.limit(known)
    special, separator, segments = (given[name] for name in ("special", "separator", "segments"))
    special, separator = (mask if mask is None else mask.bool() for mask in (special, separator))
    if grid is not None:
        if special is None:
            special = (torch.arange(known.shape[-1], device=known.device) < grid[2])[None]
        if frame.long_range < 1:
            limit = torch.full_like(limit, frame.long_range * (grid[0] + grid[1]))
    if segments is None and separator is not None:
        segments = separator.cumsum(dim=1) - separator.long()
    queries, ordered = frame.queries(weights), frame.positions is None
    return Scene(queries, known, limit, given["tokens"], special, separator, segments, grid, window, ordered)


def _in_parts(weights: Tensor, pairs: Tensor, wanted: Tensor, scene: Scene) -> PatternScores:
    """Take as many samples at a time as leave the marks of expected keys small."""
    batch, heads, rows, keys = weights.shape
    step = max(1, _BUDGET // max(1, max(heads, _MARKS) * rows * keys))
    parts = [
        _roles(
            weights[start : start + step],
            pairs[start : start + step] if len(pairs) > 1 else pairs,
            wanted[start : start + step] if len(wanted) > 1 else wanted,
            scene.samples(start, start + step),
        )
        for start in range(0, max(batch, 1), step)
    ]
    return PatternScores(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _roles(weights: Tensor, pairs: Tensor, wanted: Tensor, scene: Scene) -> PatternScores:
    maps = Maps.counted(weights, pairs, wanted)
    found = {"vertical": maps.stripes(), "uniform": maps.overlap()}
    for measure, expected in ((maps.on_keys, scene.keys()), (maps.on_pairs, scene.pairs())):
        if expected:
            found |= _named(expected, measure(_stacked(expected.values())))
    steps = scene.steps()
    if steps:
        index, exists = (_stacked(part) for part in zip(*steps.values(), strict=True))
        found |= _named((*steps, "diagonal"), maps.at_steps(index, exists))
    if "class_reads" in found:
        found["class_gather"] = _gathered(found["class_reads"], found["others_read"])
    nothing = torch.full_like(found["uniform"].score, torch.nan)
    missing = PatternScores(nothing, nothing, torch.zeros_like(nothing))
    each = zip(*(found.get(name, missing) for name in ROLES), strict=True)
    return PatternScores(*(torch.stack(fields, dim=-1) for fields in each))


def _stacked(masks: Iterable[Tensor]) -> Tensor:
    """Stack ``(batch or 1, ...)`` to ``(batch or 1, patterns, ...)``."""
    return torch.stack(torch.broadcast_tensors(*masks), dim=1)


def _named(names: Iterable[str], scores: PatternScores) -> dict[str, PatternScores]:
    """Take scores apart along their last axis."""
    fields = zip(*(field.unbind(dim=-1) for field in scores), strict=True)
    return {name: PatternScores(*each) for name, each in zip(names, fields, strict=True)}


def _gathered(own: PatternScores, others: PatternScores) -> PatternScores:
    """Content that the class token reads and the other tokens do not."""
    score, chance = (a * (1 - b) for a, b in ((own.score, others.score), (own.chance, others.chance)))
    return PatternScores(score, chance, (own.coverage + others.coverage).where(~score.isnan(), 0.0))


def _check_keys(name: str, values: Tensor | None, weights: Tensor) -> None:
    expected = (weights.shape[0], weights.shape[-1])
    if values is not None and values.shape != expected:
        raise ValueError(f"`{name}` must have shape (batch, keys) = {expected}, got {tuple(values.shape)}.")

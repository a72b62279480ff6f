"""What AttentionPaths found: for each sample, what a token came from and the strongest paths to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attn_callbacks._plain import plain
from attn_callbacks.callbacks._paths_maps import SampleMaps
from attn_callbacks.functional.paths import AttentionPath, top_paths
from attn_callbacks.functional.relevance import attention_relevance
from attn_callbacks.functional.rollout import attention_rollout, gradient_rollout, gradient_weights

__all__ = ["AttentionPathsResult", "TracedSample", "trace"]


@dataclass(frozen=True, eq=False)
class TracedSample:
    """One sample.

    Args:
        number: Its place among the samples looked at.
        labels: Text of each token, or its position.
        token: The token that was asked about, counted among real tokens; ``None``: the mean over all.
        target: Class whose logit was differentiated; ``None`` without gradients.
        values: Share or relevance of each input token, ``(tokens,)``.
        paths: The strongest paths to the token. Weights are shares of all paths there are.
    """

    number: int
    labels: tuple[str, ...]
    token: int | None
    target: int | None
    values: Tensor
    paths: tuple[AttentionPath, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        return {
            "number": self.number,
            "labels": list(self.labels),
            "token": self.token,
            "target": self.target,
            "values": plain(self.values),
            "paths": [path.to_dict() for path in self.paths],
        }


@dataclass(frozen=True, eq=False)
class AttentionPathsResult:
    """What `AttentionPaths` found in one validation.

    Args:
        method: How it was found.
        epoch: Epoch of training.
        layer_names: The layers that were followed, first layer first.
        samples: One entry a sample.
    """

    method: str
    epoch: int
    layer_names: tuple[str, ...]
    samples: tuple[TracedSample, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        return {
            "method": self.method,
            "epoch": self.epoch,
            "layer_names": list(self.layer_names),
            "samples": [sample.to_dict() for sample in self.samples],
        }


def trace(sample: SampleMaps, method: str, token: int | None, count: int) -> tuple[Tensor, tuple[AttentionPath, ...]]:
    """Return values of all tokens ``(tokens,)`` for one of them (``None``: the mean), and the paths to that one.

    Args:
        sample: Maps without padding.
        method: ``"rollout"``, ``"gradient_rollout"`` or ``"relevance"``.
        token: Position among the tokens.
        count: Number of paths.

    Raises:
        ValueError: If layers differ in their tokens.
    """
    maps = _batched(sample.maps)
    if method == "rollout":
        rows = attention_rollout(maps)[0]
    else:
        gradients = _batched(sample.gradients)
        rows = (gradient_rollout if method == "gradient_rollout" else attention_relevance)(maps, gradients)[0]
    if token is None:
        return rows.mean(dim=0), ()
    followed = maps if method == "rollout" else gradient_weights(maps, _batched(sample.gradients))
    found = top_paths(followed, token, count=count, normalise=method != "relevance")[0]
    # relevance multiplies I + A, a path (I + A) / 2
    whole = float(rows[token].sum()) / (2 ** len(maps) if method == "relevance" else 1)
    return rows[token], tuple(replace(path, weight=path.weight / whole) for path in found)


def _batched(maps: Sequence[Tensor]) -> list[Tensor]:
    return [own[None] for own in maps]

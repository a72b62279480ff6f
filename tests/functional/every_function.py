"""One call of every function of attention maps, on a batch with padding: what holds for all is tested on all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_callbacks import functional
from attn_callbacks.functional.alignment_shape import alignment_ratios
from attn_callbacks.metrics.alignment import AlignmentMetric

BATCH, HEADS, TOKENS = 3, 2, 6
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
VALID = torch.ones(BATCH, TOKENS, dtype=torch.bool)
VALID[0, 4:] = False  # right
VALID[1, :2] = False  # left: under a causal mask these rows are the softmax of -inf alone
ALLOWED = CAUSAL & VALID[:, None, None] & VALID[:, None, :, None]
MASKS = (
    "valid",
    "allowed",
    "row_valid",
    "query_valid",
    "key_valid",
    "source_valid",
    "target_valid",
    "mask",
    "features",
)


@dataclass(frozen=True)
class Inputs:
    """Maps and gradients of two layers, and what belongs to their tokens."""

    maps: list[Tensor]
    gradients: list[Tensor]
    features: Tensor
    values: Tensor

    @classmethod
    def drawn(cls, seed: int = 0) -> Inputs:
        """Maps of which padding has nothing."""
        source = torch.Generator().manual_seed(seed)
        logits = [torch.randn(BATCH, HEADS, TOKENS, TOKENS, generator=source) for _ in range(2)]
        maps = [one.masked_fill(~ALLOWED, -torch.inf).softmax(-1).nan_to_num(0.0) for one in logits]
        gradients = [torch.randn(one.shape, generator=source) for one in maps]
        shapes = (BATCH, TOKENS), (BATCH, HEADS, TOKENS, 3)
        return cls(maps, gradients, *(torch.randn(shape, generator=source) for shape in shapes))

    def spoiled(self, excluded: Tensor, value: float) -> Inputs:
        """The same with ``value`` in the maps and gradients wherever ``excluded (batch, 1, queries, keys)``."""
        maps, gradients = ([one.masked_fill(excluded, value) for one in each] for each in (self.maps, self.gradients))
        return Inputs(maps, gradients, self.features.masked_fill(~VALID, value), self.values)


ROWS = ~VALID[:, None, :, None].expand(-1, 1, -1, TOKENS)
PAIRS = ROWS | ~VALID[:, None, None]
Call = tuple[Callable[[Inputs], Any], Tensor | None]
TOKEN_IDS = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 4
WORDS = torch.arange(TOKENS).expand(BATCH, -1) // 2
FIRST = torch.arange(TOKENS).expand(BATCH, -1) == VALID.int().argmax(dim=1, keepdim=True)
KNOWN = {"tokens": TOKEN_IDS, "special": FIRST, "separator": TOKEN_IDS == 3}
TARGETS = torch.stack([torch.eye(TOKENS), torch.eye(TOKENS).roll(-1, 1)])[None].bool()
BOTH = {"query_valid": VALID, "key_valid": VALID}
GOLD = torch.eye(TOKENS, dtype=torch.bool).expand(BATCH, -1, -1)


def encoder_decoder(given: Inputs) -> Any:
    layers = (given.maps, given.gradients)
    return functional.encoder_decoder_relevance(layers, layers, layers, source_valid=VALID, target_valid=VALID)


def cross(given: Inputs) -> Tensor:
    """Its mask is one of keys."""
    weights, gradients = given.maps[0], given.gradients[0]
    own = functional.attention_relevance([torch.ones(BATCH, 1, TOKENS, TOKENS)], [torch.ones(BATCH, 1, TOKENS, TOKENS)])
    keys = own.masked_fill(~VALID[:, None] | ~VALID[..., None], float(given.features[0, -1]))
    return functional.cross_relevance(weights, gradients, own, keys, valid=VALID)


def metric(given: Inputs) -> Any:
    measure = AlignmentMetric(1, HEADS)
    measure.update(0, given.maps[0], GOLD, **BOTH)
    return tuple(measure.compute())


CALLS: dict[str, Call] = {
    "head_roles": (lambda x: functional.head_roles(x.maps[0], allowed=ALLOWED, valid=VALID, **KNOWN), ~ALLOWED),
    "pattern_scores": (lambda x: functional.pattern_scores(x.maps[0], TARGETS, allowed=ALLOWED, valid=VALID), ~ALLOWED),
    "uniformity": (lambda x: functional.uniformity(x.maps[0], allowed=ALLOWED, valid=VALID), ~ALLOWED),
    "vertical_mass": (lambda x: functional.vertical_mass(x.maps[0], allowed=ALLOWED, valid=VALID), ~ALLOWED),
    "offset_share": (lambda x: functional.offset_share(x.maps[0], -1, allowed=ALLOWED, valid=VALID), ~ALLOWED),
    "head_vitals": (lambda x: functional.head_vitals(*x.maps, allowed=ALLOWED, valid=VALID), ~ALLOWED),
    "head_distance": (lambda x: functional.head_distance(x.maps, allowed=ALLOWED, valid=VALID), ~ALLOWED),
    "head_drift": (lambda x: functional.head_drift(*x.maps, allowed=ALLOWED, valid=VALID), ~ALLOWED),
    "attention_rollout": (lambda x: functional.attention_rollout(x.maps, valid=VALID), PAIRS),
    "rollout of targets": (lambda x: functional.attention_rollout(x.maps, valid=VALID, targets=[3, 2]), PAIRS),
    "gradient_rollout": (lambda x: functional.gradient_rollout(x.maps, x.gradients, valid=VALID), PAIRS),
    "attention_flow": (lambda x: functional.attention_flow(x.maps, valid=VALID), PAIRS),
    "top_paths": (lambda x: functional.top_paths(x.maps, [3, 5, 5], valid=VALID), PAIRS),
    "attention_relevance": (lambda x: functional.attention_relevance(x.maps, x.gradients, valid=VALID), PAIRS),
    "cross_relevance": (cross, ~VALID[:, None, None]),
    "encoder_decoder_relevance": (encoder_decoder, PAIRS),
    "alignment_links": (lambda x: functional.alignment_links(x.maps[0], method="mutual", **BOTH), PAIRS),
    "coverage_deviation": (lambda x: functional.coverage_deviation(x.maps[0], **BOTH), PAIRS),
    "alignment_ratios": (lambda x: alignment_ratios(x.maps[0], GOLD, **BOTH), PAIRS),
    "AlignmentMetric": (metric, PAIRS),
    "word_maps": (lambda x: functional.word_maps(x.maps[0], WORDS, WORDS, **BOTH), PAIRS),
    "words of real pieces": (lambda x: functional.word_maps(x.maps[0], *[WORDS.where(VALID, -1)] * 2), PAIRS),
    "received_attention": (lambda x: functional.received_attention(x.maps[0], valid=VALID), ROWS),
    "attention_gradient_mass": (
        lambda x: functional.attention_gradient_mass(x.maps[0], x.gradients[0], valid=VALID),
        ROWS,
    ),
    "value_weighted_attention": (
        lambda x: functional.value_weighted_attention(x.maps[0], x.values, torch.eye(6), valid=VALID),
        ROWS,
    ),
    "top_features": (lambda x: functional.top_features(x.features, 0.5, VALID), PAIRS),
    "row_mean": (lambda x: functional.row_mean(x.features, VALID), PAIRS),
    "head_entropy": (lambda x: functional.head_entropy(x.maps[0], ALLOWED), ROWS),
    "head_statistics": (
        lambda x: functional.head_statistics(x.maps[0], x.maps[1], allowed=ALLOWED, valid=VALID),
        ROWS,
    ),
    "attention_mass": (lambda x: functional.attention_mass(x.maps[0], FIRST, VALID, row_valid=VALID), PAIRS),
    "attention_lift": (lambda x: functional.attention_lift(x.maps[0], FIRST, VALID, row_valid=VALID), PAIRS),
    # without a mask, or a mask of what is no number
    "gradient_weights": (lambda x: functional.gradient_weights(x.maps, x.gradients), None),
    "gate_gradient": (lambda x: functional.gate_gradient(x.maps[0], x.gradients[0]), None),
    "value_norm_weights": (lambda x: functional.value_norm_weights(x.maps[0], x.values, torch.eye(6) + 0.3), None),
    "layer_value_norms": (lambda x: functional.layer_value_norms(x.maps[0], x.values, torch.eye(6) + 0.3), None),
    "jensen_shannon": (lambda x: functional.jensen_shannon(x.maps[0] + 0.1, x.maps[1] + 0.1), None),
    "alignment_monotonicity": (lambda x: functional.alignment_monotonicity(long_links()), None),
    "alignment_coverage": (lambda x: functional.alignment_coverage(x.maps[0] > 0.3, VALID), None),
    "alignment_counts": (lambda x: functional.alignment_counts(x.maps[0] > 0.3, GOLD, **BOTH), None),
}


def long_links() -> Tensor:
    """Links to the sources 513, 512, 511 and 510, which half precision does not tell apart."""
    links = torch.zeros(1, 1, 4, 600, dtype=torch.bool)
    links[0, 0, torch.arange(4), 513 - torch.arange(4)] = True
    return links


def masked_functions() -> set[str]:
    """Names of the public functions that take a mask beside numbers."""
    functions = {name: getattr(functional, name) for name in functional.__all__}
    return {
        name
        for name, value in functions.items()
        if inspect.isfunction(value) and set(MASKS) & set(inspect.signature(value).parameters)
    }


def flat(found: Any) -> list[Any]:
    """Tensors and other things in whatever a function returns."""
    return [part for each in found for part in flat(each)] if isinstance(found, (tuple, list)) else [found]


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    """Compare what a function returned, NaN being NaN, and each number as wide as the other."""
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, equal_nan=True, **tolerance)
        else:
            assert one == other

"""Find induction, duplicate-token and previous-token heads by a text that nobody wrote: a random block, twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from attn_callbacks._checks import at_least, one_of
from attn_callbacks._plain import plain
from attn_callbacks.analysis._quiet import undisturbed
from attn_callbacks.capture import AttentionCall, AttentionRecorder
from attn_callbacks.capture.naming import call_name
from attn_callbacks.functional.patterns import PatternScores, pattern_scores

__all__ = ["PROBED", "AttentionPatternProbe", "PatternProbeResult", "ProbedHead"]

PROBED: tuple[str, ...] = ("induction", "duplicate", "previous")
"""Names along the last axis of what the probe finds."""


class ProbedHead(NamedTuple):
    """A head that showed a pattern: its layer, its number, and its strength with standard error."""

    layer: str
    head: int
    strength: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class PatternProbeResult:
    """What `AttentionPatternProbe` found; tensors are ``(layers, heads, patterns)`` along `PROBED`, on the CPU.

    Heads that a layer does not have are NaN.

    Args:
        score: Mean attention mass on the expected key, over the second block of all samples.
        standard_error: Standard error of ``score`` over samples.
        chance: What uniform attention over the allowed keys scores.
        layer_names: Names of the layers, in the order of execution.
        samples: Number of random texts.
    """

    score: Tensor
    standard_error: Tensor
    chance: Tensor
    layer_names: tuple[str, ...]
    samples: int

    @property
    def strength(self) -> Tensor:
        """Score corrected for chance: 0 for uniform attention, 1 for nothing else."""
        return (self.score - self.chance) / (1 - self.chance)

    def heads(self, pattern: str, above: float = 0.5) -> list[ProbedHead]:
        """Return the heads whose strength exceeds ``above``, strongest first.

        Args:
            pattern: One of `PROBED`.
            above: The threshold, a declared heuristic: most of the attention.
        """
        k = PROBED.index(one_of("pattern", pattern, PROBED))
        strength, error = self.strength[..., k], (self.standard_error / (1 - self.chance))[..., k]
        found = [
            ProbedHead(self.layer_names[layer], head, float(strength[layer, head]), float(error[layer, head]))
            for layer, head in (strength > above).nonzero().tolist()
        ]
        return sorted(found, key=lambda head: -head.strength)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        fields = ("score", "standard_error", "chance", "strength")
        tensors = {name: plain(getattr(self, name)) for name in fields}
        return {**tensors, "layer_names": list(self.layer_names), "patterns": list(PROBED), "samples": self.samples}


class AttentionPatternProbe:
    """Show a model a random block of tokens twice, and measure what its heads do in the second one.

    The block means nothing, so that only heads that look for repetition put mass on the token that followed the last
    time (``induction``) or on the token's first occurrence (``duplicate``); ``previous`` is the head that induction
    needs one layer below. No token occurs twice within a block, so that each row of the second block expects one key.
    Of a causal model only the second block can score; in a bidirectional one the first is left out as well.

    Costs one forward of ``samples`` texts in evaluation mode and without gradients, and at each layer the weights of
    ``block`` rows. Weights, modes of the modules and the global random state stay as they are.

    Args:
        vocabulary: Ids to draw from, or their number, for ``0`` to ``vocabulary - 1``. Leave special tokens out.
        block: Tokens of the block; positions up to ``len(prefix) + 2 * block`` must exist in the model.
        samples: Random texts, for the mean and its standard error.
        prefix: Ids in front of both blocks, such as a start token; not drawn.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        batch_size: Texts in one forward.
        seed: Of the texts.

    Raises:
        ValueError: If a number is below 1 (``block``: 2), or there are fewer ids than tokens in a block.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.TransformerEncoderLayer(8, nhead=2, batch_first=True))
        >>> result = AttentionPatternProbe(vocabulary=50, block=10, samples=4).run(model)
        >>> result.layer_names, tuple(result.score.shape), result.heads("induction")
        (('1.self_attn',), (1, 2, 3), [])

    References:
        Olsson et al., "In-context Learning and Induction Heads", 2022 (prefix matching on repeated random tokens).
    """

    def __init__(
        self,
        vocabulary: int | Sequence[int],
        block: int = 32,
        samples: int = 16,
        prefix: Sequence[int] = (),
        layers: Sequence[str] | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        ids = range(at_least("vocabulary", vocabulary, 1)) if isinstance(vocabulary, int) else vocabulary
        self.prefix = tuple(prefix)
        self.vocabulary = torch.tensor(sorted(set(ids) - set(self.prefix)), dtype=torch.int64)
        self.block, self.samples = at_least("block", block, 2), at_least("samples", samples, 1)
        if len(self.vocabulary) < block:
            raise ValueError(f"`vocabulary` must have at least `block` = {block} ids, got {len(self.vocabulary)}.")
        self.layers = layers
        self.batch_size, self.seed = at_least("batch_size", batch_size, 1), seed

    def tokens(self) -> Tensor:
        """Return the texts, ``(samples, len(prefix) + 2 * block)``: the same ones at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(self.samples, len(self.vocabulary), generator=generator).argsort(dim=1)[:, : self.block]
        block = self.vocabulary[order]
        prefix = torch.tensor(self.prefix, dtype=torch.int64).expand(self.samples, -1)
        return torch.cat([prefix, block, block], dim=1)

    def run(self, model: nn.Module, forward: Callable[[nn.Module, Tensor], object] | None = None) -> PatternProbeResult:
        """Run the model on the texts and score all of its self-attention.

        Args:
            model: The model; texts go to the device of its first parameter.
            forward: How to run it on texts ``(batch, tokens)``; ``None``: ``model(tokens)``.

        Raises:
            ValueError: If none of the attention is self-attention over the tokens of the texts.
        """
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        found: dict[str, list[PatternScores]] = {}

        def measure(call: AttentionCall) -> None:
            if not call.is_cross and call.shape[2:] == (self._length, self._length):
                found.setdefault(call_name(call), []).append(self._scores(call))

        with undisturbed(model), AttentionRecorder(model, self.layers, on_call=measure):
            for texts in self.tokens().to(device).split(self.batch_size):
                _ = model(texts) if forward is None else forward(model, texts)
        if not found:
            raise ValueError(
                f"No self-attention over {self._length} tokens was seen. Pass `forward` if the model needs more than "
                "ids, and choose `prefix` and `block` such that nothing is cut off."
            )
        return _result(found, self.samples)

    @property
    def _length(self) -> int:
        return len(self.prefix) + 2 * self.block

    def _scores(self, call: AttentionCall) -> PatternScores:
        rows = torch.arange(self._length - self.block, self._length, device=call.device)
        expected = torch.stack([rows - self.block + 1, rows - self.block, rows - 1])  # (patterns, rows), as in PROBED
        targets = expected[..., None] == torch.arange(self._length, device=call.device)
        allowed = call.allowed(rows).any(dim=1, keepdim=True)  # recorded weights show it head by head
        return pattern_scores(call.weights(rows), targets[None], allowed=allowed)


def _result(found: dict[str, list[PatternScores]], samples: int) -> PatternProbeResult:
    score, chance = (
        pad_sequence(
            [torch.cat([part[field].double() for part in parts]).transpose(0, 1) for parts in found.values()],
            batch_first=True,
            padding_value=torch.nan,
        ).cpu()
        for field in (0, 1)
    )  # (layers, heads, samples, patterns)
    error = score.std(dim=2) / samples**0.5 if samples > 1 else torch.full_like(score[:, :, 0], torch.nan)
    return PatternProbeResult(score.mean(dim=2), error, chance.mean(dim=2), tuple(found), samples)

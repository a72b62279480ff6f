"""What a bias monitor sees of one validation step: the attention on marked tokens, and on every token."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_callbacks.callbacks._layers import drawn_rows, known_tokens
from attn_callbacks.callbacks._regions import on_tokens
from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional import attention_mass, target_share

__all__ = ["BiasStep"]


@dataclass
class BiasStep:
    """One validation step, filled while it runs.

    Args:
        valid: ``False`` on padding, ``(samples, tokens)``.
        sets: Marks by the name of their set.
        probed: Reliance and association are measured on it.
    """

    valid: Tensor | None = None
    sets: dict[str, Tensor] = field(default_factory=dict)
    probed: bool = False
    masses: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    shares: dict[str, Tensor] = field(default_factory=dict)
    received: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)

    def measure(self, call: AttentionCall, rows: int, generator: torch.Generator) -> None:
        """Measure the attention of a call on the marked tokens, and on each token.

        Args:
            call: The call.
            rows: Query rows to look at.
            generator: Draws them.
        """
        call = known_tokens(call, self.valid)
        if call.is_cross:
            return
        batch, _, _, keys = call.shape
        self.seen.add((batch, keys))
        marked = {name: on_tokens(mask, keys) for name, mask in self.sets.items()}
        fitting = {name: mask for name, mask in marked.items() if mask.shape == (batch, keys)}
        if not fitting and not self.probed:
            return
        drawn, real = drawn_rows(call, rows, generator)
        weights = call.weights(drawn)
        for name, mask in fitting.items():
            mass = attention_mass(weights, mask, call.key_valid, row_valid=real)
            self.masses[name].append(mass.nanmean(dim=1))
            self.shares[name] = target_share(mask, call.key_valid)
        if self.probed:
            counted = real.to(weights.dtype)[:, None, :, None]
            total = (weights * counted).sum(dim=2) / counted.sum(dim=2).clamp(min=1)
            self.received.append((total.mean(dim=1), call.key_valid))  # (batch, keys)

    def unfitting(self) -> str | None:
        """Say which marks lie on no attention that was seen."""
        lost = [name for name in self.sets if name not in self.masses]
        if not lost or not self.seen:
            return None
        name = lost[0]
        return (
            f"Attention on {name!r} tokens is not measured: the marks have shape {tuple(self.sets[name].shape)}, but "
            f"attention is over (samples, tokens) = {sorted(self.seen)}. Mark every token as the model sees it, "
            "special tokens and padding included."
        )

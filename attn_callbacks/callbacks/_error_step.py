"""What an error analysis sees of one validation step: the numbers of every head, and calls to draw from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attn_callbacks.callbacks._error_gallery import calls_at
from attn_callbacks.callbacks._layers import drawn_rows, known_tokens, maps_per_sample, samples_of
from attn_callbacks.callbacks._regions import on_tokens
from attn_callbacks.capture import AttentionCall, call_name, sampled_head_statistics
from attn_callbacks.functional import attention_mass

__all__ = ["ErrorStep"]


@dataclass
class ErrorStep:
    """One validation step, filled while it runs.

    Args:
        valid: ``False`` on padding, ``(samples, tokens)``.
        sets: Marks by the name of their set; ``None``: not marked in this batch.
        size: Number of samples.
        keep: Keep the calls, to draw from them once the losses are known.
    """

    valid: Tensor | None = None
    sets: Mapping[str, Tensor | None] = field(default_factory=dict)
    size: int | None = None
    keep: bool = False
    values: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, AttentionCall] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)

    def measure(self, call: AttentionCall, rows: int, generator: torch.Generator) -> None:
        """Measure a call: ``(samples, heads, statistics)`` by the name of its layer.

        Args:
            call: The call.
            rows: Query rows to look at.
            generator: Draws them.
        """
        if not maps_per_sample(call.shape[0], self.size):
            return  # of which sample these maps are cannot be told
        call = known_tokens(call, self.valid)
        drawn, real = drawn_rows(call, rows, generator)
        found = sampled_head_statistics(call, drawn, real)
        if self.sets:
            masses = [self._mass(call, mask, drawn, real) for mask in self.sets.values()]
            found = torch.cat([found, torch.stack(masses, dim=-1).to(found.dtype)], dim=-1)
        name = call_name(call)
        self.values[name] = samples_of(found, call.query_valid.sum(dim=-1), self.size)[0]
        if self.keep:
            self.calls[name] = call

    def maps(self, chosen: Tensor, most: int) -> dict[str, Tensor]:
        """Return the maps of the chosen samples, pooled to at most ``most`` tokens a side, by ``<layer>/<what>``.

        Beside ``maps``, which is float16, ``queries`` and ``keys`` are ``True`` on tokens, and ``sizes`` holds the
        shape of the maps and the number of tokens, which filling up may hide.
        """
        found = {}
        for name, call in self.calls.items():
            own = calls_at(call, chosen * maps_per_sample(call.shape[0], self.size))  # of several, the first
            queries, keys = own.shape[2:]
            shown = min(queries, most), min(keys, most)
            maps = own.weights() if shown == (queries, keys) else own.bucketed_weights(*shown)
            sizes = torch.tensor([*shown, queries, keys])
            found[f"{name}/maps"] = maps.half()
            found[f"{name}/queries"], found[f"{name}/keys"] = own.query_valid, own.key_valid
            found[f"{name}/sizes"] = sizes.to(maps.device, non_blocking=True).expand(len(chosen), -1)
        return found

    def _mass(self, call: AttentionCall, mask: Tensor | None, rows: Tensor | None, real: Tensor) -> Tensor:
        batch, heads, _, keys = call.shape
        mask = None if mask is None else on_tokens(mask, keys).to(call.device)
        if mask is None or mask.shape != (batch, keys) or call.is_cross:
            return torch.full((batch, heads), torch.nan, device=call.device)
        mass = attention_mass(call.weights(rows), mask, call.key_valid, row_valid=real)
        return mass.masked_fill(~(mask & call.key_valid).any(dim=1)[:, None], torch.nan)  # nothing there to look at

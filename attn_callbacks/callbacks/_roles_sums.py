"""Roles of a run's heads, added up by the name of the layer; over processes in one exchange."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_callbacks.callbacks._guard import told
from attn_callbacks.callbacks._host import to_host
from attn_callbacks.callbacks._processes import are_connected, from_all_processes
from attn_callbacks.functional.patterns import PatternScores
from attn_callbacks.metrics.roles import HeadRolesMetric, HeadRolesResult

__all__ = ["RoleSums"]


class RoleSums:
    """Add up scores as they come, and conclude after each validation.

    Args:
        processes: How many processes the run has.
    """

    def __init__(self, processes: int = 1) -> None:
        self._is_distributed = are_connected(processes)
        self._layers: dict[str, HeadRolesMetric] = {}

    def add(self, layer: str, scores: PatternScores) -> None:
        """Add a batch of a layer, each field ``(samples, heads, roles)``."""
        if layer not in self._layers:
            self._layers[layer] = HeadRolesMetric(1, scores.score.shape[1]).to(scores.score.device)
        self._layers[layer].update(0, scores)

    def conclude(
        self, device: torch.device, drift: Mapping[str, Tensor], *, failure: str | None
    ) -> tuple[HeadRolesResult, Tensor] | None:
        """Return what all processes measured together, and start anew. Every process must call it.

        Args:
            device: Where this process computes.
            drift: Drift of the heads of each layer that this process knows, ``(heads,)``, on the CPU.
            failure: Why this process could not measure all of its data, if so.

        Returns:
            Roles, and drift ``(layers, heads)``, NaN where it is not known; the same on all processes, on the CPU.
            ``None`` if none saw a layer.

        Raises:
            RuntimeError: On all processes, if one of them failed: half a result would be taken for a whole one.
        """
        held: dict[str, tuple[Tensor, Tensor]] = {}
        try:
            held = self._taken_out(device)
        except Exception as error:  # noqa: BLE001  # the others wait for this process: it has to come, and say so
            failure = failure or told(error)
        shares = from_all_processes((failure, held, dict(drift)), is_distributed=self._is_distributed)
        failures = [share[0] for share in shares if share[0] is not None]
        if failures:
            raise RuntimeError(f"A process could not measure all of its data. {failures[0]}")
        layers = dict.fromkeys(layer for _, held, _ in shares for layer in held)
        if not layers:
            return None
        found = _together(tuple(layers), [held for _, held, _ in shares])
        return found, _spread({layer: moved for _, _, known in shares for layer, moved in known.items()}, found)

    def _taken_out(self, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Return sums of scores and wins of each layer on the CPU, and start anew."""
        states = [state[0].to(device) for metric in self._layers.values() for state in (metric.moments, metric.wins)]
        own = to_host(states)
        for metric in self._layers.values():
            metric.reset()
        return dict(zip(self._layers, zip(own[::2], own[1::2], strict=True), strict=True))


def _together(layers: tuple[str, ...], shares: list[dict[str, tuple[Tensor, Tensor]]]) -> HeadRolesResult:
    heads = max(len(wins) for held in shares for _, wins in held.values())
    total = HeadRolesMetric(len(layers), heads, layer_names=layers)
    for number, layer in enumerate(layers):
        for moments, wins in (held[layer] for held in shares if layer in held):
            total.writable("moments")[number, : len(moments)] += moments
            total.writable("wins")[number, : len(wins)] += wins
    found: HeadRolesResult = total.merged(total.packed()).compute()
    return found


def _spread(moved: Mapping[str, Tensor], result: HeadRolesResult) -> Tensor:
    """Put the drift of each head at its layer and number."""
    full = torch.full(result.score.shape[:2], torch.nan, dtype=torch.float64)
    for row, layer in zip(full, result.layer_names, strict=True):
        if layer in moved:
            row[: len(moved[layer])] = moved[layer]
    return full

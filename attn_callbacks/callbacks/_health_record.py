"""What training health remembers of every layer, and which alarms it has raised already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_callbacks.functional.health import (
    HealthAlert,
    HealthThresholds,
    dead_alert,
    health_alerts,
    is_whole,
    seems_dead,
)

__all__ = ["HealthRecord"]


class HealthRecord:
    """Remember the first and the last ``looks`` looks that are whole, and tell each event once.

    An event is over when ``looks`` looks in a row found nothing of it; the next one is told again.

    Args:
        thresholds: When to raise an alarm.
    """

    def __init__(self, thresholds: HealthThresholds) -> None:
        self.events = 0
        self._thresholds = thresholds
        self._others = replace(thresholds, dead_looks=None)  # dead heads are counted, which takes no history
        self._first: dict[str, Tensor] = {}
        self._recent: dict[str, Tensor] = {}
        self._runs: dict[str, Tensor] = {}  # (2, heads): looks one after the other in which a head seemed dead
        self._active: dict[tuple[str, str, int], int] = {}  # layer, kind, head: looks since it was last seen

    def add(self, vitals: Mapping[str, Tensor]) -> list[tuple[str, HealthAlert]]:
        """Take in the vitals ``(heads, vitals)`` of each layer, and return what is new about which layer."""
        told = []
        for key in self._active:
            self._active[key] += 1
        for layer, now in vitals.items():
            told += [(layer, alert) for alert in self._alerts(layer, now) if self._is_new(layer, alert)]
        self._active = {key: quiet for key, quiet in self._active.items() if quiet < self._thresholds.looks}
        self.events += sum(alert.kind != "dead" for _, alert in told)  # no reason to stop a run
        return told

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists."""
        layers = {name: [self._first[name].tolist(), self._recent[name].tolist()] for name in self._first}
        active = [[*key, quiet] for key, quiet in self._active.items()]
        runs = {name: counts.tolist() for name, counts in self._runs.items()}
        return {"events": self.events, "layers": layers, "runs": runs, "active": active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another one was."""
        self.events = int(state.get("events", 0))
        self._active = {(layer, kind, head): quiet for layer, kind, head, quiet in state.get("active", ())}
        for name, (first, recent) in state.get("layers", {}).items():
            self._first[name] = torch.tensor(first)
            self._recent[name] = torch.tensor(recent).view(-1, *self._first[name].shape)
            runs = state.get("runs", {}).get(name)  # older checkpoints do not count: counting begins anew
            none = torch.zeros(2, len(first), dtype=torch.long)
            self._runs[name] = none if runs is None else torch.tensor(runs)

    def _alerts(self, layer: str, now: Tensor) -> list[HealthAlert]:
        if not bool(is_whole(now)):  # one overflow must neither hide what was before nor be what all is held against
            return list(health_alerts(now, now[None][:0], now, self._others))
        if layer not in self._first or self._first[layer].shape != now.shape:
            self._first[layer], self._recent[layer] = now, now[None][:0]
            self._runs[layer] = torch.zeros(2, len(now), dtype=torch.long)
        alerts = health_alerts(now, self._recent[layer], self._first[layer], self._others)
        self._recent[layer] = torch.cat([self._recent[layer], now[None]])[-self._thresholds.looks :]
        self._runs[layer] = (self._runs[layer] + 1) * seems_dead(now, self._first[layer], self._thresholds)
        dead = dead_alert(now, self._runs[layer], self._thresholds)
        return [*alerts, *([] if dead is None else [dead])]

    def _is_new(self, layer: str, alert: HealthAlert) -> bool:
        # what is about a layer is one event, whichever of its heads are concerned
        heads = alert.heads if alert.kind in ("dead", "drift") else (-1,)
        keys = [(layer, alert.kind, head) for head in heads]
        new = any(key not in self._active for key in keys)
        self._active |= dict.fromkeys(keys, 0)
        return new

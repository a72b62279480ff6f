"""Losses over groups of samples, known or unknown: the worst one counts."""

from __future__ import annotations

__all__: list[str] = []

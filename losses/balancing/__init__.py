"""Many losses at once: which weight each one gets."""

from __future__ import annotations

__all__: list[str] = []

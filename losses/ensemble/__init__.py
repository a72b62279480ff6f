"""Losses and modules for several models that learn together."""

from __future__ import annotations

__all__: list[str] = []

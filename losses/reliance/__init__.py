"""What a model relies on: penalties on input gradients, rationales and weights."""

from __future__ import annotations

__all__: list[str] = []

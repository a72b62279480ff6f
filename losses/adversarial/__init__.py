"""Perturbations that make a loss worse, and the losses that withstand them."""

from __future__ import annotations

__all__: list[str] = []

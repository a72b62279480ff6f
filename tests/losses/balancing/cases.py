"""The modules of `losses.balancing` in the battery."""

from __future__ import annotations

from tests.losses.cases import Case

CASES: dict[str, Case] = {}

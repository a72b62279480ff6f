"""The modules of `losses.adversarial` in the battery."""

from __future__ import annotations

from tests.losses.cases import Case

CASES: dict[str, Case] = {}

"""The modules of `losses.groups` in the battery."""

from __future__ import annotations

from tests.losses.cases import Case

CASES: dict[str, Case] = {}

"""All methods, in the order of the table."""

from __future__ import annotations

from benchmarks.debias.baselines import BASELINES
from benchmarks.debias.method import Method
from benchmarks.debias.ours import OURS
from benchmarks.debias.two_stage import TWO_STAGE

__all__ = ["CONTROL", "METHODS", "find_method"]

METHODS = {method.name: method for method in (*BASELINES, *TWO_STAGE, *OURS)}
CONTROL = "random-rationale"


def find_method(name: str) -> Method:
    """Return the method of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in METHODS:
        raise ValueError(f"`--methods` must name some of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]

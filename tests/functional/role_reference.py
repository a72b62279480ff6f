"""Role scores written out as loops over single numbers, in float64: what the vectorised code is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

NAMES = (
    *("class_gather", "previous", "next", "self", "sink", "separator", "duplicate", "induction", "column", "row"),
    *("special", "diagonal", "vertical", "local", "block", "long_range", "uniform"),
)


@dataclass
class Sample:
    """One sample of one head: what it attends to, and all that is known of its tokens."""

    weights: np.ndarray  # (rows, keys)
    allowed: np.ndarray  # (rows, keys)
    queries: list[int]  # index of each row
    wanted: list[bool]  # of each row
    known: list[bool]  # of each key
    tokens: list[int] | None = None
    special: list[bool] | None = None
    separator: list[bool] | None = None
    segments: list[int] | None = None
    grid: tuple[int, int, int] | None = None
    window: int = 4
    long_range: float = 0.25
    square: bool = True
    open_keys: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        keys = range(self.weights.shape[1])
        self.open_keys = [[j for j in keys if self.known[j] and row[j]] for row in self.allowed]
        counts = [bool(wanted and mine) for wanted, mine in zip(self.wanted, self.open_keys, strict=True)]
        self.rows = [r for r, counted in enumerate(counts) if counted]
        self.first = self.known.index(True) if any(self.known) else -1
        if self.grid is not None and self.special is None:
            self.special = [j < self.grid[2] for j in keys]
        if self.segments is None and self.separator is not None:
            self.segments = [sum(self.separator[:j]) for j in keys]

    def place(self, j: int) -> tuple[int, int] | None:
        """Line and column, nothing for a token that is not on the grid."""
        if self.grid is None:
            return 0, j
        _, columns, prefix = self.grid
        return None if j < prefix else divmod(j - prefix, columns)

    def expects(self, role: str, i: int, j: int) -> bool:
        """Whether query ``i`` expects key ``j``."""
        if role == "self":
            return i == j
        if role == "diagonal":
            return any(self.expects(part, i, j) for part in ("previous", "self", "next"))
        if role == "sink":
            return j == self.first
        if role in ("special", "separator"):
            return bool((self.special if role == "special" else self.separator)[j])
        if role == "block":
            return self.segments[i] == self.segments[j]
        if role in ("duplicate", "induction"):
            before = j - (role == "induction")
            return before >= 0 and before != i and self._word(before) and self._word(i) and self._same(before, i)
        return self._near(role, i, j)

    def _word(self, j: int) -> bool:
        return self.known[j] and not (self.special is not None and self.special[j])

    def _same(self, i: int, j: int) -> bool:
        return self.tokens[i] == self.tokens[j]

    def _near(self, role: str, i: int, j: int) -> bool:
        here, there = self.place(i), self.place(j)
        if here is None or there is None:
            return False
        down, right = there[0] - here[0], there[1] - here[1]
        if role in ("previous", "next"):
            return down == 0 and right == (-1 if role == "previous" else 1)
        if role in ("column", "row"):
            same, other = (right, down) if role == "column" else (down, right)
            return same == 0 and other != 0
        far = self.long_range
        if far < 1:
            far *= sum(self.known) if self.grid is None else self.grid[0] + self.grid[1]
        distance = math.hypot(down, right)
        return distance <= self.window if role == "local" else distance > far

    def defined(self, role: str) -> bool:
        needs = {
            "class_gather": self.special,
            "special": self.special,
            "separator": self.separator,
            "duplicate": self.tokens,
            "induction": self.tokens,
            "column": self.grid,
            "row": self.grid,
            "block": self.segments,
        }
        positional = role not in ("sink", "special", "separator", "vertical", "uniform")
        return needs.get(role, ()) is not None and (self.square or not positional)


def reference_roles(sample: Sample) -> dict[str, tuple[float, float, float]]:
    """Score, chance and coverage of every role."""
    found = dict.fromkeys(NAMES, (math.nan, math.nan, 0.0))
    for name in NAMES:
        if sample.defined(name):
            found[name] = _SPECIAL.get(name, _mass)(sample, name)
    return found


def _masses(sample: Sample, rows: list[int], expects) -> tuple[float, float, int]:
    """Mean mass, mean chance and number of the rows that expect any key."""
    masses, chances = [], []
    for r in rows:
        mine = [j for j in sample.open_keys[r] if expects(sample.queries[r], j)]
        if mine:
            masses.append(sum(sample.weights[r, j] for j in mine))
            chances.append(len(mine) / len(sample.open_keys[r]))
    return (np.mean(masses), np.mean(chances), len(masses)) if masses else (math.nan, math.nan, 0)


def _mass(sample: Sample, role: str) -> tuple[float, float, float]:
    score, chance, count = _masses(sample, sample.rows, lambda i, j: sample.expects(role, i, j))
    return score, chance, count / len(sample.rows) if sample.rows else 0.0


def _gather(sample: Sample, role: str) -> tuple[float, float, float]:
    if sample.first < 0 or not sample.special[sample.first]:
        return math.nan, math.nan, 0.0
    content = [known and not special for known, special in zip(sample.known, sample.special, strict=True)]
    leading = [r for r in sample.rows if sample.queries[r] == sample.first]
    reading = [r for r in sample.rows if content[sample.queries[r]]]
    own, own_chance, own_rows = _masses(sample, leading, lambda i, j: content[j])
    rest, rest_chance, rest_rows = _masses(sample, reading, lambda i, j: content[j] and i != j)
    if not own_rows or not rest_rows:
        return math.nan, math.nan, 0.0
    return own * (1 - rest), own_chance * (1 - rest_chance), (own_rows + rest_rows) / len(sample.rows)


def _vertical(sample: Sample, role: str) -> tuple[float, float, float]:
    best = (math.nan, math.nan, 0.0)
    strongest = -math.inf
    for j in range(sample.weights.shape[1]):
        seeing = [r for r in sample.rows if j in sample.open_keys[r]]
        if not seeing or 2 * len(seeing) < len(sample.rows):
            continue
        score = np.mean([sample.weights[r, j] for r in seeing])
        chance = np.mean([1 / len(sample.open_keys[r]) for r in seeing])
        if chance <= 0.9 and (score - chance) / (1 - chance) > strongest:
            strongest = (score - chance) / (1 - chance)
            best = score, chance, len(seeing) / len(sample.rows)
    return best


def _uniform(sample: Sample, role: str) -> tuple[float, float, float]:
    if not sample.rows:
        return math.nan, math.nan, 0.0
    levels = [1 / len(sample.open_keys[r]) for r in sample.rows]
    common = [
        sum(min(sample.weights[r, j], level) for j in sample.open_keys[r])
        for r, level in zip(sample.rows, levels, strict=True)
    ]
    return np.mean(common), np.mean(levels), 1.0


_SPECIAL = {"class_gather": _gather, "vertical": _vertical, "uniform": _uniform}

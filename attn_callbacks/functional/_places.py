"""Where the tokens of self-attention lie, along a sequence or on a grid of patches, and how far apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_callbacks._checks import at_least

__all__ = ["Places", "check_grid"]

Grid = tuple[int, int, int]


def check_grid(grid: Grid | None, keys: int) -> None:
    """Raise unless ``grid`` is ``(rows, columns, prefix)`` and covers all ``keys``."""
    if grid is None:
        return
    if len(grid) != 3:
        raise ValueError(f"`grid` must be (rows, columns, prefix), got {grid}.")
    rows, columns, prefix = (at_least("grid", number, low) for number, low in zip(grid, (1, 1, 0), strict=True))
    if prefix + rows * columns != keys:
        raise ValueError(
            f"`grid` must cover the {keys} keys as prefix + rows * columns, got {prefix} + {rows} * {columns} = "
            f"{prefix + rows * columns}. Count class and register tokens as prefix."
        )


@dataclass(frozen=True, eq=False)
class Places:
    """Steps from queries to keys on a grid; a sequence is a grid of one line.

    Args:
        down: Lines from the query to the key, ``(batch or 1, rows, keys)``.
        right: Columns from the query to the key, likewise.
        inside: Whether both lie on the grid; prefix tokens do not.
    """

    down: Tensor
    right: Tensor
    inside: Tensor

    @classmethod
    def between(cls, queries: Tensor, keys: int, grid: Grid | None) -> Places:
        """Place ``queries (batch or 1, rows)``, given by their index, and all ``keys``."""
        _, columns, prefix = grid or (1, keys, 0)
        ends = torch.arange(keys, device=queries.device) - prefix
        starts = (queries - prefix)[..., None]
        down = ends.div(columns, rounding_mode="floor") - starts.div(columns, rounding_mode="floor")
        right = ends % columns - starts % columns
        return cls(down, right, (ends >= 0) & (starts >= 0))

    def column(self) -> Tensor:
        """The other patches of the query's column."""
        return self.inside & (self.right == 0) & (self.down != 0)

    def line(self) -> Tensor:
        """The other patches of the query's row."""
        return self.inside & (self.down == 0) & (self.right != 0)

    def distance(self) -> Tensor:
        """Euclidean distance in tokens or patches, float32; meaningless where not ``inside``."""
        return torch.hypot(self.down.float(), self.right.float())

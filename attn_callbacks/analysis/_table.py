"""The heads of a model in one line, and as a table of layers and heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Head", "HeadTable"]

Head = tuple[str, int]
"""Name of an attention call, as :func:`attn_callbacks.capture.call_name` gives it, and number of the head."""


class HeadTable:
    """Numbers the heads of all layers one after the other.

    Args:
        sizes: Number of heads of each layer, in the order of execution.

    Example:
        >>> table = HeadTable({"layer.0": 2, "layer.1": 1})
        >>> table.heads
        (('layer.0', 0), ('layer.0', 1), ('layer.1', 0))
        >>> table.spread(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [[1.0, 2.0], [3.0, nan]]
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.names = tuple(sizes)
        self.heads: tuple[Head, ...] = tuple((name, head) for name, size in sizes.items() for head in range(size))
        self._numbers = {head: number for number, head in enumerate(self.heads)}
        self._layers = {name: number for number, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.heads)

    def number(self, head: Head) -> int:
        """Return the number of a head.

        Raises:
            ValueError: If there is none such.
        """
        found = self._numbers.get((str(head[0]), int(head[1]))) if _is_head(head) else None
        if found is None:
            known = ", ".join(f"{name!r} with {size}" for name, size in self.sizes.items())
            raise ValueError(f"`{head!r}` is no head: give (layer, head). Layers and their numbers of heads: {known}.")
        return found

    def layer(self, number: int) -> int:
        """Return the number of the layer that a head is in."""
        return self._layers[self.heads[number][0]]

    def by_layer(self, numbers: Iterable[int]) -> dict[str, list[int]]:
        """Return the heads of each layer among ``numbers``."""
        found: dict[str, list[int]] = {}
        for number in sorted(numbers):
            name, head = self.heads[number]
            found.setdefault(name, []).append(head)
        return found

    def spread(self, values: Tensor, missing: float = torch.nan) -> Tensor:
        """Turn ``(all heads, ...)`` into ``(layers, heads, ...)``, with ``missing`` where a layer has fewer heads."""
        rows = values.split(list(self.sizes.values()))
        table = values.new_full((len(rows), max(self.sizes.values()), *values.shape[1:]), missing)
        for line, row in zip(table, rows, strict=True):
            line[: len(row)] = row
        return table

    def gather(self, table: Tensor) -> Tensor:
        """Turn ``(layers, heads)`` into ``(all heads,)``.

        Raises:
            ValueError: If the table has another shape.
        """
        shape = (len(self.names), max(self.sizes.values()))
        if tuple(table.shape) != shape:
            raise ValueError(f"Scores must have shape (layers, heads) = {shape}, got {tuple(table.shape)}.")
        return torch.cat([row[:size] for row, size in zip(table, self.sizes.values(), strict=True)])

    def chosen(self, heads: Sequence[Head] | None) -> list[int]:
        """Return the numbers of ``heads``; ``None`` takes all."""
        return list(range(len(self))) if heads is None else [self.number(head) for head in heads]


def _is_head(head: object) -> bool:
    return isinstance(head, tuple) and len(head) == 2 and isinstance(head[0], str) and isinstance(head[1], int)

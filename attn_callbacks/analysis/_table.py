"""The heads of a model in one line, and as a table of layers and heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

__all__ = ["Head", "HeadLike", "HeadTable"]

Head = tuple[str, int]
"""Name of an attention call, as :func:`attn_callbacks.capture.call_name` gives it, and number of the head."""

HeadLike = Head | tuple[int, int]
"""A head, or the number of its layer in the order of the results and its own; lists will do."""


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

    def __len__(self) -> int:
        return len(self.heads)

    def extended(self, sizes: Mapping[str, int]) -> HeadTable:
        """Return a table with the layers of another run as well, each behind the one it followed there.

        Raises:
            ValueError: If a layer has another number of heads there.
        """
        names, place = list(self.names), 0
        for name, size in sizes.items():
            if self.sizes.get(name, size) != size:
                raise ValueError(f"{name!r} has {self.sizes[name]} heads in one batch and {size} in another.")
            if name not in self.sizes:
                names.insert(place, name)
            place = names.index(name) + 1
        return HeadTable({name: {**sizes, **self.sizes}[name] for name in names})

    def number(self, head: HeadLike) -> int:
        """Return the number of a head.

        Raises:
            ValueError: If there is none such.
        """
        found = self._numbers.get(self._key(head)) if _is_head(head) else None
        if found is None:
            known = ", ".join(f"{name!r} with {size}" for name, size in self.sizes.items())
            raise ValueError(
                f"`{head!r}` is no head: give (layer, head), the layer by name or number. Layers and their numbers of "
                f"heads: {known}."
            )
        return found

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

    def chosen(self, heads: Sequence[HeadLike] | None) -> list[int]:
        """Return the numbers of ``heads``; ``None`` takes all."""
        return list(range(len(self))) if heads is None else [self.number(head) for head in heads]

    def _key(self, head: Any) -> Head:
        layer, number = head
        if not isinstance(layer, str):
            layer = self.names[int(layer)] if 0 <= layer < len(self.names) else ""
        return str(layer), int(number)


def _is_head(head: object) -> bool:
    if not isinstance(head, (tuple, list)) or len(head) != 2:
        return False
    layer, number = head
    return (isinstance(layer, str) or _is_number(layer)) and _is_number(number)


def _is_number(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)

"""An unchanged run of a batch, and where runs with heads off may begin."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from attn_callbacks.analysis._prefix import Prefix

__all__ = ["Recorded"]


class Recorded:
    """An unchanged run, and where runs with heads off may begin.

    Args:
        losses: One a sample.
        prefixes: By layer.
        names: Layers of all calls, in the order in which they came.
    """

    def __init__(self, losses: Tensor, prefixes: Mapping[str, Prefix], names: Sequence[str]) -> None:
        self.losses = losses
        self._prefixes, self._names = prefixes, names

    def start(self, layers: Collection[str]) -> tuple[Prefix | None, tuple[str, ...]]:
        """Return the prefix of the first of ``layers``, and the names of the calls that follow it."""
        prefix = next((self._prefixes[name] for name in self._names if name in layers and name in self._prefixes), None)
        if prefix is None or not prefix.is_intact:
            return None, ()
        return prefix, tuple(name for number, name in enumerate(self._names) if number not in prefix.skipped)

"""How sure heads are of where they look, met in a forward that runs anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.analysis._switches import by_sample
from attn_callbacks.capture import AttentionCall
from attn_callbacks.capture.rows import row_chunks

__all__ = ["Confidence"]


class Confidence:
    """Looks at the calls of one forward: the mean over valid queries of the largest weight."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[Tensor, Tensor]]] = {}  # sums and numbers of rows, (maps, heads)

    def __call__(self, name: str, call: AttentionCall) -> None:
        with torch.no_grad():
            largest = [call.weights(rows).amax(dim=-1) for rows in row_chunks(call.shape, call.device)]
            highest = torch.cat(largest, dim=-1).double()  # (batch, heads, queries)
            valid = call.query_valid[:, None] & (highest > 0)
            sums = highest.where(valid, 0.0).sum(dim=-1), valid.sum(dim=-1).double()
            self._found.setdefault(name, []).append(sums)

    def read(self, sizes: dict[str, int], samples: int) -> Tensor:
        """Return ``(all heads, samples)``, NaN where a sample has no valid query."""
        return torch.cat([self._layer(name, heads, samples) for name, heads in sizes.items()])

    def _layer(self, name: str, heads: int, samples: int) -> Tensor:
        found = self._found.get(name)
        if found is None:
            return torch.full((heads, samples), torch.nan, dtype=torch.float64)
        total = torch.stack([by_sample(name, part, samples) for part, _ in found]).sum(dim=0)
        count = torch.stack([by_sample(name, part, samples) for _, part in found]).sum(dim=0)
        return (total / count).T.cpu()

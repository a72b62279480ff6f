"""The samples of a validation that went most wrong, kept where they are computed: nobody waits to learn which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attn_callbacks.callbacks._processes import from_all_processes
from attn_callbacks.capture import AttentionCall

__all__ = ["WorstSamples", "calls_at", "worst_of_all"]

Entry = dict[str, Tensor]


class WorstSamples:
    """Keep the samples of the highest scores, and whatever belongs to them.

    Memory is that of ``most`` samples; no device is waited for before :meth:`entries`.

    Args:
        most: How many are kept.

    Example:
        >>> worst = WorstSamples(most=2)
        >>> worst.add(torch.tensor([0.1, 3.0]), {"label": torch.tensor([7, 8])})
        >>> worst.add(torch.tensor([2.0, -torch.inf]), {"label": torch.tensor([9, 10])})
        >>> [(entry["score"].item(), entry["label"].item()) for entry in worst.entries()]
        [(3.0, 8), (2.0, 9)]
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._fields: Entry = {}

    def candidates(self, scores: Tensor) -> Tensor:
        """Return the places of those samples of a batch that may be among the worst, the worst first."""
        return scores.topk(min(self.most, len(scores))).indices

    def add(self, scores: Tensor, fields: Mapping[str, Tensor]) -> None:
        """Take in samples.

        Args:
            scores: One a sample, ``(samples,)``; minus infinity for samples that do not belong here.
            fields: What to keep, ``(samples, ...)`` each. Shapes may differ between calls: the smaller is filled up
                with zeros, behind.
        """
        new, old = {"score": scores.double(), **fields}, self._fields
        if not old:
            old = {name: field[:0] for name, field in new.items()}
        held = len(old["score"])
        order = torch.cat([old["score"], new["score"]]).topk(min(self.most, held + len(scores))).indices
        self._fields = {
            name: _stacked(old.get(name), new.get(name), held, len(scores)).index_select(0, order)
            for name in {**old, **new}
        }

    def entries(self) -> list[Entry]:
        """Return what is kept of each sample on the CPU, the worst first."""
        fields = {name: field.cpu() for name, field in self._fields.items()}
        scores = fields["score"].tolist() if fields else []
        return [
            {name: field[place].clone() for name, field in fields.items()}
            for place, score in enumerate(scores)
            if score > -torch.inf
        ]


def worst_of_all(entries: list[Entry], most: int, *, is_distributed: bool) -> list[Entry]:
    """Return the worst entries of all processes, the worst first; only those are exchanged. Every process calls it."""
    if not is_distributed:
        return entries
    scores = from_all_processes([float(entry["score"]) for entry in entries], is_distributed=True)
    ranked = sorted((-score, process, place) for process, own in enumerate(scores) for place, score in enumerate(own))
    mine = torch.distributed.get_rank()
    chosen = [entries[place] for _, process, place in ranked[:most] if process == mine]
    shares = from_all_processes(chosen, is_distributed=True)
    return sorted((entry for share in shares for entry in share), key=lambda entry: -float(entry["score"]))


def calls_at(call: AttentionCall, index: Tensor) -> AttentionCall:
    """Return the call for some entries of the batch axis, ``index`` being on the device.

    Of a FlexAttention call, whose functions count samples by number, the weights are handed on.
    """
    if call.score_mod is not None or call.mask_mod is not None:
        valid = (call.query_valid[index], call.key_valid[index])
        twin = AttentionCall(call.name, call.index, call.is_cross, recorded=call.weights().index_select(0, index))
        return twin.with_valid(*valid)
    batch = call.shape[0]
    held = {known.name: getattr(call, known.name) for known in fields_of(call)}
    own: dict[str, Any] = {
        name: tensor.index_select(0, index)
        for name, tensor in held.items()
        if isinstance(tensor, Tensor) and len(tensor) == batch
    }
    return replace(call, **own)


def _stacked(old: Tensor | None, new: Tensor | None, held: int, added: int) -> Tensor:
    known = old if new is None else new
    if known is None:
        raise ValueError("A field must come with the samples that are kept or with those that are added.")
    old = known.new_zeros(held, *known.shape[1:]) if old is None else old
    new = known.new_zeros(added, *known.shape[1:]) if new is None else new
    sizes = [max(pair) for pair in zip(old.shape[1:], new.shape[1:], strict=True)]
    return torch.cat([_filled(old, sizes), _filled(new, sizes)])


def _filled(field: Tensor, sizes: list[int]) -> Tensor:
    missing = [pad for size, own in zip(sizes, field.shape[1:], strict=True) for pad in (size - own, 0)]
    return F.pad(field, missing[::-1]) if any(missing) else field

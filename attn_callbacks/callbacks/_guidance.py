"""Add the loss term of an AttentionGuidance to every training step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._steps import StepTap
from attn_callbacks.capture import AttentionRecorder
from attn_callbacks.feedback import AttentionGuidance

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

__all__ = ["GuidedStep"]


class GuidedStep:
    """Let a guidance see the attention of each training step and add its term.

    Args:
        module: The module whose steps are guided.
        guidance: Turns attention into a loss term.
        schema: Where a batch has what.
    """

    def __init__(self, module: nn.Module, guidance: AttentionGuidance, schema: BatchSchema) -> None:
        self.tap = StepTap(context=self._around, term=self._term)
        self._guidance = guidance
        self._schema = schema
        self._module = module
        self._recorder: AttentionRecorder | None = None  # of the present step: it holds the step's graph
        self._sum: Tensor | float = 0.0
        self._steps = 0

    def mean(self, strategy: Strategy) -> float | None:
        """Return the mean term since the last call, over all processes; each of them must call it.

        Terms are not logged step by step: a process whose batches have no marked tokens would not take part.
        """
        own = torch.tensor([float(self._sum), self._steps], dtype=torch.float32, device=strategy.root_device)
        self._sum, self._steps = 0.0, 0
        total, steps = strategy.reduce(own, reduce_op="sum").tolist()
        return total / steps if steps else None

    def _around(self, batch: Any) -> AbstractContextManager[Any]:
        self._recorder = None
        marked = any(self._schema.read(name, batch) is not None for name in ("relevance", "spurious"))
        if not self._guidance.active or not marked:
            return nullcontext()
        self._recorder = AttentionRecorder(self._module, self._guidance.layers)
        return self._recorder

    def _term(self, batch: Any) -> Tensor | None:
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return None
        relevance, spurious, valid = (self._schema.flags(name, batch) for name in ("relevance", "spurious", "valid"))
        extra = self._guidance.loss_term(recorder.calls, relevance, spurious, valid)
        if extra is not None:
            self._sum, self._steps = self._sum + extra.detach().float(), self._steps + 1
        return extra

"""Add the loss term of an AttentionGuidance to every training step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attn_callbacks._lightning import MisconfigurationException
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
        self._steps = self._guided_steps = 0

    def mean(self, strategy: Strategy) -> float | None:
        """Return the mean term since the last call, over all processes; each of them must call it.

        Terms are not logged step by step: a process whose batches have no marked tokens would not take part.

        Raises:
            MisconfigurationException: If guidance was active and no step of any process had marked tokens.
        """
        counted = [float(self._sum), self._guided_steps, self._steps]
        self._sum, self._guided_steps, self._steps = 0.0, 0, 0
        own = torch.tensor(counted, dtype=torch.float32, device=strategy.root_device)
        total, guided, steps = strategy.reduce(own, reduce_op="sum").tolist()
        if steps and not guided:
            raise MisconfigurationException(
                f"`AttentionGuidance` saw no `relevance` or `spurious` in {steps:.0f} training steps, so it guided "
                "nothing. Say where training batches have them: BatchSchema(relevance=...)."
            )
        return total / guided if guided else None

    def _around(self, batch: Any) -> AbstractContextManager[Any]:
        self._recorder = None
        if not self._guidance.active:
            return nullcontext()
        self._steps += 1
        if all(self._schema.read(name, batch) is None for name in ("relevance", "spurious")):
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
            self._sum, self._guided_steps = self._sum + extra.detach().float(), self._guided_steps + 1
        return extra

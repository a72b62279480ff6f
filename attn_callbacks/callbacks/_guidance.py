"""Add the loss term of an AttentionGuidance to every training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._steps import StepTap, tap_step
from attn_callbacks.capture import AttentionRecorder
from attn_callbacks.feedback import AttentionGuidance

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

__all__ = ["tap_guidance"]


def tap_guidance(module: LightningModule, guidance: AttentionGuidance, schema: BatchSchema) -> Callable[[], None]:
    """Let ``guidance`` see the attention of each training step and add its term; the result undoes it."""
    recorders: list[AttentionRecorder] = []

    def around(batch: Any) -> AbstractContextManager[Any]:
        recorders.clear()
        marked = any(schema.read(name, batch) is not None for name in ("relevance", "spurious"))
        if not guidance.active or not marked:
            return nullcontext()
        recorders.append(AttentionRecorder(module, guidance.layers))
        return recorders[0]

    def term(batch: Any) -> Tensor | None:
        if not recorders:
            return None
        relevance, spurious, valid = (schema.flags(name, batch) for name in ("relevance", "spurious", "valid"))
        calls = recorders.pop().calls
        extra = guidance.loss_term(calls, relevance, spurious, valid)
        if extra is not None:
            size = schema.size(batch)
            module.log("bias/guidance", extra.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return extra

    return tap_step(module, "training_step", StepTap(context=around, term=term))

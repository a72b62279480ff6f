"""How attention is seen: at the call, under any kernel, without changing the model."""

from __future__ import annotations

from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.recorder import AttentionNotFoundError, AttentionRecorder, record

__all__ = ["AttentionCall", "AttentionNotFoundError", "AttentionRecorder", "record"]

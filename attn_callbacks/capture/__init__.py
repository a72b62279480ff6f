"""How attention is seen: at the call, under any kernel, without changing the model."""

from __future__ import annotations

from attn_callbacks.capture.answers import CallSummary, RowStatistic
from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.exact.head_statistics import exact_head_statistics
from attn_callbacks.capture.intervention import HeadIntervention, gate_heads
from attn_callbacks.capture.naming import call_name
from attn_callbacks.capture.recorder import AttentionRecorder, record
from attn_callbacks.capture.sampled import sampled_head_statistics
from attn_callbacks.capture.selection import AttentionNotFoundError
from attn_callbacks.capture.stitching import stitch_calls, stitch_generation

__all__ = [
    "AttentionCall",
    "AttentionNotFoundError",
    "AttentionRecorder",
    "CallSummary",
    "HeadIntervention",
    "RowStatistic",
    "call_name",
    "exact_head_statistics",
    "gate_heads",
    "record",
    "sampled_head_statistics",
    "stitch_calls",
    "stitch_generation",
]

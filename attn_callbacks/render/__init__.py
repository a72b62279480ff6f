"""Pictures of attention: numpy arrays in, pixels and PNG files out. No torch, no Lightning, no matplotlib."""

from __future__ import annotations

from attn_callbacks.render.confusion import confusion_picture
from attn_callbacks.render.heads import attention_heads
from attn_callbacks.render.layers import layer_head_grid
from attn_callbacks.render.overlay import overlay
from attn_callbacks.render.palettes import diverging, head_colours, sequential
from attn_callbacks.render.picture import Picture
from attn_callbacks.render.pooling import pool

__all__ = [
    "Picture",
    "attention_heads",
    "confusion_picture",
    "diverging",
    "head_colours",
    "layer_head_grid",
    "overlay",
    "pool",
    "sequential",
]

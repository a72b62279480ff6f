"""Pictures of attention: numpy arrays in, pixels, PNG files and HTML out. No torch, no Lightning, no matplotlib."""

from __future__ import annotations

from attn_callbacks.render.alignment import alignment_picture
from attn_callbacks.render.clusters import cluster_colours, cluster_layout, cluster_matrix
from attn_callbacks.render.confusion import confusion_picture
from attn_callbacks.render.heads import attention_heads
from attn_callbacks.render.layers import layer_head_grid
from attn_callbacks.render.overlay import overlay
from attn_callbacks.render.pairs import pair_matrix
from attn_callbacks.render.palettes import diverging, head_colours, sequential
from attn_callbacks.render.paths import token_paths
from attn_callbacks.render.picture import Picture
from attn_callbacks.render.pooling import pool
from attn_callbacks.render.roles import role_colours, role_grid, role_timeline
from attn_callbacks.render.strip import token_strip
from attn_callbacks.render.token_colours import token_html

__all__ = [
    "Picture",
    "alignment_picture",
    "attention_heads",
    "cluster_colours",
    "cluster_layout",
    "cluster_matrix",
    "confusion_picture",
    "diverging",
    "head_colours",
    "layer_head_grid",
    "overlay",
    "pair_matrix",
    "pool",
    "role_colours",
    "role_grid",
    "role_timeline",
    "sequential",
    "token_html",
    "token_paths",
    "token_strip",
]

"""The name of a call among all calls of a forward."""

from __future__ import annotations

from attn_callbacks.capture.call import AttentionCall

__all__ = ["call_name"]


def call_name(call: AttentionCall) -> str:
    """Return the name of the module; a module called again in the same forward gets its count added.

    Args:
        call: A call, as a recorder gives it.

    Example:
        >>> import torch
        >>> weights = torch.eye(2)[None, None]
        >>> [call_name(AttentionCall("encoder.0", index=index, recorded=weights)) for index in (0, 1)]
        ['encoder.0', 'encoder.0#1']
    """
    return call.name if call.index == 0 else f"{call.name}#{call.index}"

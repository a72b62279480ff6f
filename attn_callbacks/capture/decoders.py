"""Which self-attention belongs to a decoder behind an encoder, and so is over tokens of its own."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from attn_callbacks.capture.call import AttentionCall

__all__ = ["Decoders"]


class Decoders:
    """Looks at the calls of forwards in their order: what is causal after something that is not is a decoder's.

    A decoder alone is none here: its tokens are those of the batch. Decoders whose causal mask is written out (T5) are
    known by what their modules say of themselves.

    Args:
        model: The model whose calls are looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._named: dict[str, bool] = {}
        self._follows_encoder = False

    def told(self, call: AttentionCall) -> AttentionCall:
        """Return the call, marked if it is of a decoder."""
        if call.is_cross:
            self._follows_encoder = True
            return call
        decodes = call.is_causal or self._is_named(call.name)
        if decodes and self._follows_encoder:
            return replace(call, is_decoder=True)
        self._follows_encoder = self._follows_encoder or not decodes
        return call

    def _is_named(self, name: str) -> bool:
        """Tell whether a module on the way to this one says that it is part of a decoder."""
        if name not in self._named:
            module, self._named[name] = self._model, False
            for part in name.split("."):
                child = getattr(module, part, None)
                if not isinstance(child, nn.Module):
                    break
                module = child
                if isinstance(module, nn.TransformerDecoderLayer) or getattr(module, "is_decoder", False) is True:
                    self._named[name] = True
        return self._named[name]

"""Numbers of tokens or places, to count by, and their names, to tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._samples import patch_grid

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

__all__ = ["PLACES", "TokenNames", "token_numbers"]

PLACES = 4097
"""Room for the places of inputs that are no token ids."""
_MOST_IDS = 262_144
_MOST_WRONG, _EXAMPLES, _SHOWN = 200, 3, 24


class TokenNames:
    """Knows how many token ids a module has room for, and what ids and places are called.

    Args:
        vocabulary: Number of token ids.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        self._vocabulary = vocabulary
        self._grid: tuple[int, int, int] | None = None
        self._wrong: list[tuple[int, list[int]]] = []

    @classmethod
    def of(cls, module: nn.Module) -> TokenNames:
        """Read the number of token ids off the largest embedding."""
        sizes = [part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)]
        return cls(min(max(sizes, default=0), _MOST_IDS))

    def room(self, places: bool) -> int:
        """Return how many numbers there are: of places, or of token ids."""
        return PLACES if places or not self._vocabulary else self._vocabulary + (self._vocabulary == PLACES)

    def see(self, image: Any, keys: int) -> None:
        """Learn how the places lie on a picture, if there is one."""
        if isinstance(image, Tensor) and image.dim() == 4:
            self._grid = patch_grid(keys, image.shape[2] / image.shape[3])

    def share(self, strategy: Strategy) -> None:
        """Take over what the first process saw, so that all tell the same. Every process must call it."""
        self._grid, self._wrong = strategy.broadcast((self._grid, self._wrong), src=0)

    def note(self, tokens: Tensor, valid: Tensor, wrong: Tensor, first: int) -> None:
        """Keep some samples that were predicted wrong, as examples.

        Args:
            tokens: Token ids, ``(samples, tokens)``.
            valid: ``False`` on padding.
            wrong: ``True`` for what was predicted wrong, ``(samples,)``.
            first: Number of the first sample in the validation data.
        """
        for row in wrong.nonzero()[: _MOST_WRONG - len(self._wrong), 0].tolist():
            self._wrong.append((first + row, tokens[row][valid[row]].tolist()))

    def examples(self, tokenizer: Any) -> Callable[[int], list[str]]:
        """Return what finds wrong samples that hold a token: their numbers and, with a tokenizer, their tokens."""
        readable = hasattr(tokenizer, "convert_ids_to_tokens")

        def told(number: int, ids: list[int]) -> str:
            text = " ".join(map(str, tokenizer.convert_ids_to_tokens(ids[:_SHOWN]))) if readable else ""
            return f"sample {number}" + (f": {text}" if text else "")

        def find(token: int) -> list[str]:
            return [told(number, ids) for number, ids in self._wrong if token in ids][:_EXAMPLES]

        return find

    def namer(self, tokenizer: Any, room: int) -> Callable[[int], str]:
        """Return what names a number.

        Args:
            tokenizer: Anything with ``convert_ids_to_tokens``, or ``None``.
            room: How many numbers there are.
        """
        if room == PLACES:
            return self._place
        if hasattr(tokenizer, "convert_ids_to_tokens"):
            return lambda number: f"token {tokenizer.convert_ids_to_tokens([number])[0]!r}"
        return lambda number: f"token {number}"

    def _place(self, number: int) -> str:
        if self._grid is None:
            return f"place {number}"
        _, columns, prefix = self._grid
        if number < prefix:
            return "class token" if number == 0 else f"extra token {number}"
        row, column = divmod(number - prefix, columns)
        return f"patch in row {row}, column {column}"


def token_numbers(schema: BatchSchema, batch: Any, received: Tensor, room: int) -> Tensor | None:
    """Return the token ids of a batch where attention ``(samples, keys)`` is about them; ``None`` for other inputs."""
    tokens = schema.read("tokens", batch)
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.shape != received.shape:
        return None
    return tokens.to(received.device).clamp(max=room - 1)

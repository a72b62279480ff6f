"""Which keys a head would attend to if it looked for repeated tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes

__all__ = ["duplicate_pairs", "induction_pairs"]


def duplicate_pairs(tokens: Tensor, matches: Tensor | None = None) -> Tensor:
    """Mark the other occurrences of each token: what a duplicate-token head attends to.

    Occurrences on both sides; under a causal mask those that remain are the earlier ones, the published pattern.

    Args:
        tokens: Ids of the tokens.
        matches: ``True`` for the tokens that can match; leave out padding and special tokens. ``None``: all.

    Shape:
        - tokens: int ``(batch, tokens)``
        - matches: bool ``(batch, tokens)``
        - output: bool ``(batch, queries, keys)``

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> duplicate_pairs(torch.tensor([[7, 8, 7]]))[0].int()
        tensor([[0, 0, 1],
                [0, 0, 0],
                [1, 0, 0]], dtype=torch.int32)

    References:
        Wang et al., "Interpretability in the Wild", 2022, section 3.1 (duplicate-token heads).
    """
    check_axes("tokens", tokens, 2)
    if matches is not None and matches.shape != tokens.shape:
        raise ValueError(
            f"`matches` must have the shape of `tokens` {tuple(tokens.shape)}, got {tuple(matches.shape)}."
        )
    own = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
    pairs = (tokens[:, :, None] == tokens[:, None]) & ~own
    return pairs if matches is None else pairs & (matches[:, :, None] & matches[:, None])


def induction_pairs(tokens: Tensor, matches: Tensor | None = None) -> Tensor:
    """Mark the token after each other occurrence: what an induction head attends to, to copy what came next before.

    `duplicate_pairs` moved by one key to the right. Under a causal mask this is the published pattern, with the
    diagonal where a token is repeated at once.

    Args:
        tokens: Ids of the tokens.
        matches: ``True`` for the tokens that can match; ``None``: all.

    Shape:
        - tokens: int ``(batch, tokens)``
        - matches: bool ``(batch, tokens)``
        - output: bool ``(batch, queries, keys)``

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> induction_pairs(torch.tensor([[7, 8, 7]]))[0].int()
        tensor([[0, 0, 0],
                [0, 0, 0],
                [0, 1, 0]], dtype=torch.int32)

    References:
        Olsson et al., "In-context Learning and Induction Heads", 2022 (prefix matching).
    """
    pairs = duplicate_pairs(tokens, matches).roll(1, dims=-1)
    pairs[..., 0] = False
    return pairs

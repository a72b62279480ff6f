"""Where a set of tokens lies on the inputs of a network: on ids and embeddings as it is, on pictures patch by patch."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_callbacks.callbacks._samples import patch_grid

__all__ = ["on_tokens", "region_on"]


def region_on(mask: Tensor, inputs: Tensor) -> Tensor:
    """Return a token mask with the axes of ``inputs``, those of features or channels left out.

    Args:
        mask: ``True`` on the tokens of the set, or already on the pixels of a picture.
        inputs: Token ids, features or pictures.

    Shape:
        - mask: ``(samples, tokens)``, ``(samples, height, width)`` or ``(samples, features)``
        - inputs: ``(samples, tokens)``, ``(samples, tokens, features)`` or ``(samples, channels, height, width)``
        - output: ``(samples, tokens)`` or ``(samples, height, width)``

    Raises:
        ValueError: If the mask does not lie on the inputs.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[False, True, False, False, False]])  # a class token, then 2 x 2 patches
        >>> region_on(mask, torch.zeros(1, 3, 4, 4))[0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 0, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    mask = mask.to(inputs.device)
    expected = (inputs.shape[0], *inputs.shape[2:]) if inputs.dim() == 4 else tuple(inputs.shape[:2])
    if tuple(mask.shape) == expected:
        return mask
    if inputs.dim() == 4 and mask.dim() == 2 and len(mask) == len(inputs):
        spread = _over_patches(mask, *inputs.shape[2:])
        if spread is not None:
            return spread
    raise ValueError(
        f"A token set of shape {tuple(mask.shape)} does not lie on inputs of shape {tuple(inputs.shape)}: expected "
        f"{expected}" + (", or one entry a patch and one for each token before them." if inputs.dim() == 4 else ".")
    )


def on_tokens(mask: Tensor, tokens: int) -> Tensor:
    """Return which tokens a mask marks; of a mask on pixels, the patches that lie in it as a whole.

    Args:
        mask: ``True`` on tokens, ``(samples, tokens)``, or on pixels, ``(samples, height, width)``.
        tokens: Number of tokens that a network makes of a picture.

    Returns:
        ``(samples, tokens)``; a mask that does not lie on them comes back as it is.

    Example:
        >>> import torch
        >>> pixels = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> pixels[0, :2, :3] = True
        >>> on_tokens(pixels, 5)  # a class token, then 2 x 2 patches
        tensor([[False,  True, False, False, False]])
    """
    if mask.dim() != 3:
        return mask
    height, width = mask.shape[1:]
    grid = patch_grid(tokens, height / width)
    if grid is None or height % grid[0] or width % grid[1]:
        return mask
    rows, columns, prefix = grid
    patches = mask.reshape(len(mask), rows, height // rows, columns, width // columns).all(dim=4).all(dim=2)
    return torch.nn.functional.pad(patches.flatten(1), (prefix, 0))


def _over_patches(mask: Tensor, height: int, width: int) -> Tensor | None:
    """Spread the tokens of a vision transformer over their patches; tokens before the patches lie nowhere."""
    grid = patch_grid(mask.shape[1], height / width)
    if grid is None or height % grid[0] or width % grid[1]:
        return None
    rows, columns, prefix = grid
    patches = mask[:, prefix:].reshape(len(mask), rows, columns)
    return patches.repeat_interleave(height // rows, dim=1).repeat_interleave(width // columns, dim=2)

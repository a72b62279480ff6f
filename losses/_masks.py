"""How a mask over inputs lies on them: the one rule that everything here shares."""

from __future__ import annotations

from torch import Tensor

from losses._checks import check_tensor

__all__ = ["aligned_mask", "feature_axis"]


def feature_axis(inputs: Tensor) -> int:
    """Return the axis that holds the values of one token or pixel: the last, or channels where there are 4 axes."""
    return 1 if inputs.dim() > 3 else inputs.dim() - 1


def aligned_mask(name: str, mask: Tensor, inputs: Tensor) -> Tensor:
    """Return ``mask`` with the axes of ``inputs``, each as long as there or of size one.

    A mask may leave out the axis of features: the last of ``(samples, tokens, features)``, the second of
    ``(samples, channels, height, width)`` or of anything with more axes. The number of axes alone decides, never their
    sizes, so a square picture is read as any other.

    Args:
        name: What an error calls the mask.
        mask: Any dtype.
        inputs: What the mask lies on.

    Shape:
        - inputs: ``(samples, features)``, ``(samples, tokens, features)`` or ``(samples, channels, positions...)``
        - mask: that shape, or that shape without features (channels); size one repeats the mask along an axis
        - output: the axes of ``inputs``

    Raises:
        ValueError: If the shape does not fit.
        TypeError: If ``mask`` is no tensor.
    """
    check_tensor(name, mask)
    aligned = mask
    if mask.dim() == inputs.dim() - 1 and inputs.dim() > 2:
        aligned = mask.unsqueeze(feature_axis(inputs))
    fits = aligned.dim() == inputs.dim()
    if not fits or any(size not in (1, full) for size, full in zip(aligned.shape, inputs.shape, strict=True)):
        without = [size for axis, size in enumerate(inputs.shape) if axis != feature_axis(inputs)]
        other = f" or {tuple(without)}, without the axis of features," if inputs.dim() > 2 else ""
        raise ValueError(
            f"`{name}` must have the shape of `inputs`, {tuple(inputs.shape)},{other} got {tuple(mask.shape)}. An axis "
            "of size one repeats the mask."
        )
    return aligned

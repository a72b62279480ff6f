"""Label smoothing as class probabilities, for every loss that takes soft targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from losses._checks import at_least, check_within, in_range

__all__ = ["LabelSmoothing", "smooth_labels"]


def smooth_labels(target: Tensor, num_classes: int, smoothing: float = 0.1) -> Tensor:
    r"""Turn class indices into class probabilities that keep a share for every class.

    .. math::
        t_{n, c} = (1 - \epsilon) [c = y_n] + \frac{\epsilon}{C}

    Use it with losses that take soft targets but have no ``label_smoothing`` of their own, such as :func:`focal_loss`,
    or before mixing samples. Where a loss has the argument, that is cheaper: this writes one number per class.

    Args:
        target: Class indices. An index to be ignored has no probabilities: drop such samples, or give them a
            ``sample_weight`` of zero and any class.
        num_classes: Number of classes.
        smoothing: Share that is spread evenly over all classes, from 0 to 1.

    Shape:
        - target: ``(samples, positions...)`` integer
        - output: ``(samples, num_classes, positions...)``, in torch's default dtype

    Raises:
        ValueError: If an argument is out of its range, ``target`` has no axis or (checked on the CPU only) an index
            that is no class.
        TypeError: If ``target`` does not hold integers.

    Example:
        >>> import torch
        >>> smooth_labels(torch.tensor([2, 0]), 3, smoothing=0.3)
        tensor([[0.1000, 0.1000, 0.8000],
                [0.8000, 0.1000, 0.1000]])

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, Section 7.
    """
    at_least("num_classes", num_classes, 1)
    in_range("smoothing", smoothing, 0, 1)
    if target.dtype == torch.bool or target.is_floating_point():
        raise TypeError(f"`target` must hold integer class indices, got {target.dtype}.")
    if target.dim() == 0:
        raise ValueError("`target` must have shape (samples, positions...), got ().")
    target = target.long()
    check_within("target", target, 0, num_classes - 1)
    shape = (target.shape[0], num_classes, *target.shape[1:])
    even = torch.full(shape, smoothing / num_classes, device=target.device)
    return even.scatter_(1, target.unsqueeze(1), 1 - smoothing + smoothing / num_classes)


class LabelSmoothing(nn.Module):
    """Turn class indices into smoothed class probabilities; see :func:`smooth_labels`.

    Args:
        num_classes: Number of classes.
        smoothing: Share that is spread evenly over all classes, from 0 to 1.

    Shape:
        - forward: as :func:`smooth_labels`

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from losses.classification import FocalLoss
        >>> smooth, criterion = LabelSmoothing(3), FocalLoss()
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> criterion(logits, smooth(torch.tensor([2, 0]))).backward()
    """

    def __init__(self, num_classes: int, smoothing: float = 0.1) -> None:
        super().__init__()
        self.num_classes = at_least("num_classes", num_classes, 1)
        self.smoothing = in_range("smoothing", smoothing, 0, 1)

    def forward(self, target: Tensor) -> Tensor:
        """Return the class probabilities of the class indices ``target``."""
        return smooth_labels(target, self.num_classes, self.smoothing)

    def extra_repr(self) -> str:
        """Show how to build the module again."""
        return f"{self.num_classes}, smoothing={self.smoothing}"

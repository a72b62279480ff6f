"""The fast gradient method: one step of length epsilon along the gradient."""

from __future__ import annotations

from torch import Tensor, nn

from losses._checks import in_range, one_of
from losses.adversarial._ascent import NORMS
from losses.adversarial._inputs import Forward
from losses.adversarial.pgd import pgd_perturbation

__all__ = ["FGM", "fgm_perturbation"]


def fgm_perturbation(
    forward_loss: Forward,
    inputs: Tensor,
    *,
    epsilon: float = 1.0,
    norm: str = "l2",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Perturb inputs by one step along the gradient of the loss.

    .. math::
        \delta = \epsilon \frac{g}{\lVert g \rVert_2} \text{ or } \epsilon \operatorname{sign} g, \qquad
        g = \nabla_x L(x)

    with the norm over the whole of a sample: of a text, the paper normalises the embeddings of all tokens together. The
    second form is the fast gradient sign method. Where word embeddings are not normalised, ``epsilon`` is in their
    units: compare it with their length. Costs a forward and a backward to the inputs; random numbers, modes and batch
    normalisation are as :func:`losses.pgd_perturbation` says, of which this is one step from zero.

    Args:
        forward_loss: Returns the loss of perturbed inputs, a scalar.
        inputs: Clean inputs, floating. What they were computed from is left alone.
        epsilon: Length of the perturbation in ``norm``, in units of the inputs.
        norm: ``"l2"`` for the Euclidean length of a sample, ``"linf"`` for its largest entry.
        mask: ``True`` where the inputs may change, elsewhere the perturbation is exactly zero; ``None`` allows every
            entry. Leave out padding.

    Shape:
        - inputs: ``(samples, ...)``
        - mask: the shape of ``inputs``, or that without the feature or channel axis, as in
          :func:`losses.pgd_perturbation`
        - output: the shape and dtype of ``inputs``, detached

    Raises:
        ValueError: If an argument is out of its range, ``mask`` does not fit, or the loss is not a scalar or does not
            depend on its argument.
        TypeError: If ``inputs`` are not floating, or the loss or ``mask`` is no tensor.
        RuntimeError: In ``torch.inference_mode``.

    Example:
        >>> import torch
        >>> weight = torch.tensor([3.0, -4.0])
        >>> fgm_perturbation(lambda x: (x @ weight).sum(), torch.zeros(1, 2))
        tensor([[ 0.6000, -0.8000]])

    References:
        Miyato, Dai and Goodfellow, "Adversarial Training Methods for Semi-Supervised Text Classification", ICLR 2017.
        Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015 (sign).
    """
    return pgd_perturbation(forward_loss, inputs, epsilon=epsilon, step_size=epsilon, steps=1, norm=norm, mask=mask)


class FGM(nn.Module):
    """Loss at inputs one gradient step away; see :func:`fgm_perturbation`.

    Call it in the training step with a closure, and add the result to the clean loss. One backward trains both; the
    perturbation itself is a constant there. Costs two forwards, of which one is kept for the backward. Where gradients
    are off, the attack turns them on for itself, and the loss has no graph.

    Args:
        epsilon: Length of the perturbation in ``norm``, in units of the inputs.
        norm: ``"l2"`` or ``"linf"``, over the whole of a sample.

    Shape:
        - inputs, mask: as :func:`fgm_perturbation`
        - output: scalar, what the closure returns

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> embedding, model = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2)
        >>> tokens, target = torch.tensor([[1, 2, 0], [5, 0, 0]]), torch.tensor([0, 1])
        >>> def criterion(embeddings):
        ...     return torch.nn.functional.cross_entropy(model(embeddings.mean(dim=1)), target)
        >>> adversarial = FGM(epsilon=1.0)
        >>> embeddings = embedding(tokens)
        >>> loss = criterion(embeddings) + adversarial(criterion, embeddings, mask=tokens != 0)
        >>> loss.backward()
        >>> bool(embedding.weight.grad.ne(0).any())
        True
    """

    def __init__(self, epsilon: float = 1.0, norm: str = "l2") -> None:
        super().__init__()
        self.epsilon = in_range("epsilon", epsilon, 0)
        self.norm = one_of("norm", norm, NORMS)

    def forward(self, forward_loss: Forward, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``forward_loss`` of the perturbed ``inputs``."""
        return forward_loss(
            inputs + fgm_perturbation(forward_loss, inputs, epsilon=self.epsilon, norm=self.norm, mask=mask)
        )

    def extra_repr(self) -> str:
        """Show how to build the module again."""
        return f"epsilon={self.epsilon}, norm={self.norm!r}"

"""Projected gradient descent: the strongest attack in a ball that a few small steps find."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from losses._checks import accumulation_dtype, at_least, check_within, in_range, one_of
from losses.adversarial._ascent import NORMS, ascent_gradient, gaussian, per_sample, project, steepest, unit
from losses.adversarial._inputs import Forward, allowed_entries

__all__ = ["PGD", "pgd_perturbation"]


def pgd_perturbation(
    forward_loss: Forward,
    inputs: Tensor,
    *,
    epsilon: float = 1.0,
    step_size: float = 0.3,
    steps: int = 3,
    norm: str = "l2",
    random_start: bool = False,
    bounds: tuple[float, float] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Find a perturbation in a ball that raises the loss, by ``steps`` of projected gradient ascent.

    .. math::
        \delta_{t+1} = \Pi_{\lVert \delta \rVert \le \epsilon} \left( \delta_t + \alpha \, d_t \right), \qquad
        d_t = \frac{g_t}{\lVert g_t \rVert_2} \text{ or } \operatorname{sign} g_t, \qquad
        g_t = \nabla_x L(x + \delta_t)

    with norms over the whole of a sample: all tokens and features, all channels and pixels. The defaults are those in
    use for word embeddings; for pixels in ``[0, 1]`` take ``epsilon=8 / 255, step_size=2 / 255, steps=10, norm="linf",
    random_start=True, bounds=(0, 1)``. A sample with a zero gradient or an empty mask stays as it is.

    Each step costs a forward and a backward to the inputs. Every forward draws the random numbers (dropout masks) that
    the first one drew, and a forward after the call draws them once more, so the loss of ``inputs`` plus the result
    meets the network that was attacked. Modules stay in their mode; batch normalisation in training mode counts each
    forward as a batch.

    Args:
        forward_loss: Returns the loss of perturbed inputs, a scalar.
        inputs: Clean inputs, floating. What they were computed from is left alone.
        epsilon: Radius of the ball, in units of the inputs.
        step_size: Length of a step in ``norm``.
        steps: Number of steps.
        norm: ``"l2"`` for the Euclidean length of a sample, ``"linf"`` for its largest entry.
        random_start: Whether to start at a random point of the ball instead of at zero.
        bounds: Smallest and largest value of perturbed inputs; ``None`` means none.
        mask: ``True`` where the inputs may change, elsewhere the perturbation is exactly zero; ``None`` allows every
            entry. Leave out padding.

    Shape:
        - inputs: ``(samples, ...)``
        - mask: the shape of ``inputs``; or without the feature axis, ``(samples, tokens)`` for ``(samples, tokens,
          features)``; or without the channel axis, ``(samples, height, width)`` for ``(samples, channels, height,
          width)``. An axis of size one repeats the mask.
        - output: the shape and dtype of ``inputs``, detached

    Raises:
        ValueError: If an argument is out of its range, ``mask`` does not fit, the loss is not a scalar or does not
            depend on its argument, or (checked on the CPU only) ``inputs`` lie outside ``bounds``.
        TypeError: If ``inputs`` are not floating, or the loss or ``mask`` is no tensor.
        RuntimeError: In ``torch.inference_mode``.

    Example:
        >>> import torch
        >>> weight = torch.tensor([3.0, -4.0])
        >>> pgd_perturbation(lambda x: (x @ weight).sum(), torch.zeros(1, 2), epsilon=0.5, step_size=0.2)
        tensor([[ 0.3000, -0.4000]])

    References:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, equation 2.1.
    """
    _check_settings(epsilon, step_size, steps, norm, bounds)
    allowed = allowed_entries(inputs, mask)
    clean = inputs.detach()
    if bounds is not None:
        check_within("inputs", clean, *bounds)
    perturbation = torch.zeros_like(clean, dtype=accumulation_dtype(clean))
    if random_start:
        perturbation = _clamped(_random_start(clean, allowed, epsilon, norm), clean, allowed, bounds)
    for _ in range(steps):
        _, gradient = ascent_gradient(forward_loss, clean, perturbation, allowed)
        perturbation = project(perturbation + step_size * steepest(gradient, norm), epsilon, norm)
        perturbation = _clamped(perturbation, clean, allowed, bounds)
    return perturbation.to(inputs.dtype)


class PGD(nn.Module):
    """Loss at the perturbation that projected gradient ascent finds; see :func:`pgd_perturbation`.

    Call it in the training step with a closure, and add the result to the clean loss or take it alone. One backward
    trains both; the perturbation itself is a constant there. Costs ``steps + 1`` forwards, of which one is kept for
    the backward. Where gradients are off, the attack turns them on for itself, and the loss has no graph.

    Args:
        epsilon: Radius of the ball, in units of the inputs.
        step_size: Length of a step in ``norm``.
        steps: Number of steps.
        norm: ``"l2"`` or ``"linf"``, over the whole of a sample.
        random_start: Whether to start at a random point of the ball instead of at zero.
        bounds: Smallest and largest value of perturbed inputs; ``None`` means none.

    Shape:
        - inputs, mask: as :func:`pgd_perturbation`
        - output: scalar, what the closure returns

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> images, target = torch.rand(3, 4), torch.tensor([0, 1, 1])
        >>> adversarial = PGD(8 / 255, 2 / 255, 10, norm="linf", random_start=True, bounds=(0, 1))
        >>> loss = adversarial(lambda x: torch.nn.functional.cross_entropy(model(x), target), images)
        >>> loss.backward()
        >>> bool(model.weight.grad.ne(0).any())
        True
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        step_size: float = 0.3,
        steps: int = 3,
        norm: str = "l2",
        random_start: bool = False,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        _check_settings(epsilon, step_size, steps, norm, bounds)
        self.epsilon = epsilon
        self.step_size = step_size
        self.steps = steps
        self.norm = norm
        self.random_start = random_start
        self.bounds = None if bounds is None else (bounds[0], bounds[1])

    def forward(self, forward_loss: Forward, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``forward_loss`` of the perturbed ``inputs``."""
        return forward_loss(inputs + pgd_perturbation(forward_loss, inputs, mask=mask, **self._settings()))

    def extra_repr(self) -> str:
        """Show how to build the module again."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def _settings(self) -> dict[str, Any]:
        names = ("epsilon", "step_size", "steps", "norm", "random_start", "bounds")
        return {name: getattr(self, name) for name in names}


def _check_settings(
    epsilon: float, step_size: float, steps: int, norm: str, bounds: tuple[float, float] | None
) -> None:
    in_range("epsilon", epsilon, 0)
    in_range("step_size", step_size, 0)
    at_least("steps", steps, 1)
    one_of("norm", norm, NORMS)
    if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
        raise ValueError(f"`bounds` must be the smallest and the largest value of the inputs, got {bounds!r}.")


def _random_start(clean: Tensor, allowed: Tensor, epsilon: float, norm: str) -> Tensor:
    """Return a uniformly distributed point of the ball, zero where not ``allowed``."""
    if norm == "linf":
        start = torch.empty_like(clean, dtype=accumulation_dtype(clean)).uniform_(-epsilon, epsilon)
        return torch.where(allowed, start, 0.0)
    direction = unit(gaussian(clean, allowed))
    dimensions = allowed.flatten(1).sum(dim=1).clamp(min=1)
    radius = torch.rand(len(clean), dtype=direction.dtype, device=clean.device) ** (1 / dimensions)
    return direction * epsilon * per_sample(radius, direction)


def _clamped(perturbation: Tensor, clean: Tensor, allowed: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Return the perturbation with which the inputs stay within ``bounds``."""
    if bounds is None:
        return perturbation
    return torch.where(allowed, (clean + perturbation).clamp(*bounds) - clean, 0.0)

"""Counter-examples: the same sample with other values where the model must not look. The control to beat."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from losses._checks import accumulation_dtype, at_least, one_of
from losses._masks import aligned_mask, feature_axis

__all__ = ["MaskRandomization", "randomize_masked"]

MODES = ("shuffle", "uniform")


def randomize_masked(
    inputs: Tensor,
    mask: Tensor,
    *,
    mode: str = "shuffle",
    num_tokens: int | None = None,
    protected: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Replace masked values by random ones, so that they no longer say anything about the label.

    .. math::
        \tilde{x}_{n, d} = (1 - A_{n, d}) \, x_{n, d} + A_{n, d} \, \epsilon_{n, d}

    with ``A`` the mask. Train on the result with the labels as they are. The cheapest way to be right for the right
    reasons (no second pass), often as good as a penalty on gradients with the same masks: compare any such loss with it
    before keeping the loss.

    - ``"shuffle"`` takes the values of another sample of the batch at the same positions, one other sample each, so
      that values stay plausible and belong together. Every sample gives once and takes once. A batch of one has no
      other sample: it comes back as it is, with a warning.
    - ``"uniform"`` draws floating values between the batch's least and greatest value of that feature (the last axis)
      or channel, integers below ``num_tokens``: token ids, or 256 for bytes of a picture.

    Args:
        inputs: Pictures, embeddings or token ids; float or integer.
        mask: Nonzero where the model must not look.
        mode: ``"shuffle"`` or ``"uniform"``.
        num_tokens: Number of token ids; needed for integers in ``"uniform"``.
        protected: Token ids such as padding, start and separator: where they stand they stay, and they are never drawn.
            Where the other sample of ``"shuffle"`` has one, a random unprotected token of the batch steps in. Integers
            only.
        generator: Source of the random numbers, on any device; ``None`` takes torch's global one.

    Shape:
        - inputs: ``(samples, tokens)``, ``(samples, tokens, features)`` or ``(samples, channels, height, width)``
        - mask: the shape of ``inputs``, or that shape without features or channels where ``inputs`` has at least three
          axes. An axis of size one repeats the mask.
        - output: the shape, dtype and device of ``inputs``. Gradients reach the values that were kept, and no others.

    Raises:
        ValueError: If a shape does not fit, ``mode`` is unknown, ``num_tokens`` is missing or leaves nothing to draw,
            or ``protected`` is given for floating inputs.
        TypeError: If ``mask`` is no tensor.

    Example:
        >>> import torch
        >>> inputs = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
        >>> mask = torch.tensor([[True, False, False], [False, True, False]])
        >>> mixed = randomize_masked(inputs, mask)
        >>> mixed
        tensor([[4., 2., 3.],
                [4., 2., 6.]], grad_fn=<WhereBackward0>)
        >>> mixed.sum().backward()
        >>> inputs.grad
        tensor([[0., 1., 1.],
                [1., 0., 1.]])

    References:
        Teso and Kersting, "Explanatory Interactive Machine Learning", AIES 2019: corrections as counter-examples.
    """
    one_of("mode", mode, MODES)
    chosen = aligned_mask("mask", mask, inputs) != 0
    if protected:
        if inputs.is_floating_point():
            raise ValueError(f"`protected` must be empty unless `inputs` holds token ids, got {inputs.dtype} inputs.")
        chosen = chosen & ~_among(inputs, protected)
    values = inputs.detach()
    if values.numel() == 0:
        return inputs
    if mode == "shuffle":
        drawn = _from_others(values, protected, generator)
    elif inputs.is_floating_point():
        drawn = _between_extremes(values, generator)
    else:
        drawn = _random_ids(values, num_tokens, protected, generator)
    return torch.where(chosen, drawn, inputs)


class MaskRandomization(nn.Module):
    """Replace masked values by random ones while training; see :func:`randomize_masked`.

    In evaluation mode the inputs pass through untouched. To measure reliance instead, call the function on evaluation
    data: the accuracy that is lost is what the model owed to the region.

    Args:
        mode: ``"shuffle"`` or ``"uniform"``.
        num_tokens: Number of token ids; needed for integers in ``"uniform"``.
        protected: Token ids that stay where they are and are never drawn.

    Shape:
        - forward: as :func:`randomize_masked`

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> randomize = MaskRandomization("uniform", num_tokens=100, protected=(0, 1))
        >>> tokens = torch.tensor([[0, 7, 8, 1]])
        >>> mixed = randomize(tokens, torch.tensor([[True, True, False, True]]))
        >>> mixed[0, [0, 2, 3]]
        tensor([0, 8, 1])
        >>> randomize.eval()(tokens, torch.ones(1, 4)) is tokens
        True
        >>> embeddings = torch.randn(2, 3, 4, requires_grad=True)
        >>> MaskRandomization()(embeddings, torch.tensor([[1, 0, 0]])).sum().backward()
        >>> embeddings.grad[0, :, 0]
        tensor([0., 1., 1.])
    """

    def __init__(self, mode: str = "shuffle", *, num_tokens: int | None = None, protected: Sequence[int] = ()) -> None:
        super().__init__()
        self.mode = one_of("mode", mode, MODES)
        self.num_tokens = None if num_tokens is None else at_least("num_tokens", num_tokens, 1)
        self.protected = tuple(int(token) for token in protected)

    def forward(self, inputs: Tensor, mask: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return ``inputs`` with other values where ``mask`` is set; ``inputs`` itself in evaluation mode."""
        if not self.training:
            return inputs
        return randomize_masked(
            inputs,
            mask,
            mode=self.mode,
            num_tokens=self.num_tokens,
            protected=self.protected,
            generator=generator,
        )

    def extra_repr(self) -> str:
        """Show how to build the transform again."""
        return f"{self.mode!r}, num_tokens={self.num_tokens}, protected={self.protected}"


def _from_others(values: Tensor, protected: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Return each sample's other sample: the next one on a random round trip through the batch."""
    if len(values) < 2:
        if not torch.compiler.is_compiling():
            warnings.warn("A batch of one has no other sample to take values from: nothing is replaced.", stacklevel=3)
        return values
    order = torch.randperm(len(values), **_source(values, generator)).to(values.device)
    other = values[torch.empty_like(order).scatter_(0, order, order.roll(1))]
    if not protected:
        return other
    pool = values.flatten()
    unfit = _among(pool, protected)
    noise = torch.rand(pool.shape, **_source(values, generator)).to(values.device)
    order = (noise + unfit).argsort()  # unprotected tokens first, in random order
    fit = (~unfit).sum().clamp(min=1)
    stand_in = pool[order[torch.arange(len(pool), device=pool.device) % fit]].reshape(values.shape)
    return torch.where(_among(other, protected), stand_in, other)


def _between_extremes(values: Tensor, generator: torch.Generator | None) -> Tensor:
    axes = [axis for axis in range(values.dim()) if axis != feature_axis(values)]
    low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
    dtype = accumulation_dtype(values)
    share = torch.rand(values.shape, dtype=dtype, **_source(values, generator)).to(values.device)
    return torch.lerp(low.to(dtype), high.to(dtype), share).to(values.dtype)


def _random_ids(
    values: Tensor, num_tokens: int | None, protected: Sequence[int], generator: torch.Generator | None
) -> Tensor:
    if num_tokens is None:
        raise ValueError('`num_tokens` must be given to draw integers in mode "uniform": the size of the vocabulary.')
    barred = sorted(token for token in set(protected) if 0 <= token < num_tokens)
    if len(barred) >= at_least("num_tokens", num_tokens, 1):
        raise ValueError(f"`num_tokens` must leave an id that is not protected, got {num_tokens} and {barred}.")
    drawn = torch.randint(num_tokens - len(barred), values.shape, **_source(values, generator)).to(values.device)
    for token in barred:
        drawn = drawn + (drawn >= token)  # ascending: steps over each protected id once
    return drawn.to(values.dtype)


def _among(values: Tensor, tokens: Sequence[int]) -> Tensor:
    return torch.isin(values, torch.tensor(tuple(tokens), dtype=values.dtype, device=values.device))


def _source(values: Tensor, generator: torch.Generator | None) -> dict[str, Any]:
    """Return where to draw: on the generator's own device, else next to the values."""
    return {"generator": generator, "device": values.device if generator is None else generator.device}

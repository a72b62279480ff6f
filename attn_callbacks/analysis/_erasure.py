"""Inputs without some of their features, and how sure a model is of a class then."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from attn_callbacks.analysis._quiet import same_draws

__all__ = ["Eraser", "Logits"]

Logits = Callable[[nn.Module, Tensor, Tensor | None], Tensor]


class Eraser:
    """Runs a model on inputs whose features were partly removed.

    Args:
        model: The model.
        logits: Returns ``(samples, classes)`` of the model for inputs and their ``valid``.
        inputs: Token ids, embeddings or pictures.
        valid: ``True`` on tokens; ``None``: all.
        replacement: What takes the place of a feature; ``None``: the token is marked as no token.
        grid: Rows and columns of patches, for pictures.
        batch_size: Samples in one run.

    Raises:
        ValueError: If something does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        logits: Logits,
        inputs: Tensor,
        valid: Tensor | None,
        replacement: float | Tensor | None,
        grid: tuple[int, int] | None,
        batch_size: int,
    ) -> None:
        self.inputs, self.valid = inputs, None if valid is None else valid.bool()
        self.model, self._logits, self._replacement = model, logits, replacement
        self._grid, self._batch_size = grid, batch_size
        self.features = _count(inputs, grid)
        if not len(inputs):
            raise ValueError("`inputs` holds no sample.")
        if self.valid is not None and (grid is not None or tuple(self.valid.shape) != (len(inputs), self.features)):
            raise ValueError(
                f"`valid` must have shape (samples, tokens) = {(len(inputs), self.features)} and belongs to tokens, "
                f"got {tuple(self.valid.shape)}."
            )
        if replacement is None and grid is not None:
            raise ValueError("`replacement` must say what takes the place of a patch, such as 0.0 or the mean colour.")

    def run(self, inputs: Tensor, valid: Tensor | None) -> Tensor:
        """Return the logits of inputs as they are.

        Raises:
            ValueError: If they have another shape.
        """
        with same_draws(self.model):
            found = self._logits(self.model, inputs, valid)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(inputs):
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"`logits` must return (samples, classes) for {len(inputs)} samples, got {got}.")
        return found

    def parts(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the inputs and their ``valid``, at most ``batch_size`` samples at a time."""
        for rows in torch.arange(len(self.inputs)).split(self._batch_size):
            own = slice(int(rows[0]), int(rows[-1]) + 1)
            yield self.inputs[own], None if self.valid is None else self.valid[own]

    def log_probabilities(self, samples: Tensor, removed: Tensor, target: Tensor) -> Tensor:
        """Return the log-probability of each sample's class with features removed, float64 on the CPU.

        Args:
            samples: Numbers of the samples to run, ``(runs,)``.
            removed: ``True`` on what each run lacks, ``(runs, features)``.
            target: Class of each sample, ``(samples,)``.
        """
        found = []
        for own, lacking in zip(samples.split(self._batch_size), removed.split(self._batch_size), strict=True):
            scores = self.run(*self._without(own, lacking)).double().log_softmax(dim=1)
            found.append(scores.gather(1, target[own].to(scores.device)[:, None])[:, 0].cpu())
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def _without(self, samples: Tensor, removed: Tensor) -> tuple[Tensor, Tensor | None]:
        index, gone = samples.to(self.inputs.device), removed.to(self.inputs.device)
        inputs = self.inputs[index]
        valid = None if self.valid is None else self.valid.to(self.inputs.device)[index]
        if self._replacement is None:
            return inputs, ~gone if valid is None else valid & ~gone
        if self._grid is not None:
            rows, columns = self._grid
            height, width = inputs.shape[2] // rows, inputs.shape[3] // columns
            gone = gone.view(-1, 1, rows, columns).repeat_interleave(height, 2).repeat_interleave(width, 3)
        elif inputs.ndim == 3:
            gone = gone[..., None]
        other = torch.as_tensor(self._replacement, dtype=inputs.dtype, device=inputs.device)
        if inputs.ndim == 4 and other.shape == inputs.shape[1:2]:  # a colour
            other = other[:, None, None]
        return torch.where(gone, other, inputs), valid


def _count(inputs: Tensor, grid: tuple[int, int] | None) -> int:
    """Return the number of features of a sample."""
    if inputs.ndim == 4:
        if grid is None or len(grid) != 2 or inputs.shape[2] % grid[0] or inputs.shape[3] % grid[1]:
            raise ValueError(
                f"`grid` must give rows and columns of patches that divide the picture, {tuple(inputs.shape[2:])}, "
                f"got {grid}."
            )
        return grid[0] * grid[1]
    if inputs.ndim not in (2, 3) or grid is not None:
        raise ValueError(
            "`inputs` must be token ids (samples, tokens), embeddings (samples, tokens, width), or with `grid` "
            f"pictures (samples, channels, height, width), got {tuple(inputs.shape)}."
        )
    return inputs.shape[1]

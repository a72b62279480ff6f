"""When an experiment can say nothing about any head, and what is said then."""

from __future__ import annotations

from torch import Tensor

from attn_callbacks.analysis._budget import Budget
from attn_callbacks.analysis._experiment import HeadExperiment

__all__ = ["ALL_NAN", "NoLossError", "check_heads", "check_reached"]

ALL_NAN = (
    "The loss of every sample is NaN, which stands for those that do not count, so nothing can be said about any head."
)
_NO_CHANGE = (
    "The loss of every sample stays as it is with all heads off, so nothing can be said about single ones. Let `loss` "
    "run `model` on the batch, and check that what it returns depends on the attention that `layers` selects."
)
_NO_GRADIENT = (
    "No gradient of the loss reaches a head, so nothing can be said about any. Let `loss` run `model` on the batch, "
    "and check that what it returns depends on the attention that `layers` selects."
)
_MARGIN = 4.0  # all heads off have to change losses by that many times what two unchanged runs differ by
_AGAIN = 2  # more unchanged runs, where two differ


class NoLossError(ValueError):
    """No sample counts: every loss is NaN."""


def check_heads(experiment: HeadExperiment, budget: Budget, first: Tensor | None = None) -> None:
    """Check that heads matter, and more than chance does.

    Args:
        experiment: Runs the model; heads were found.
        budget: Says when to stop looking.
        first: Losses of another unchanged run of the first batch, if they are known.

    Raises:
        RuntimeError: If the losses with all heads off are those without, or unchanged runs differ as much.
        ValueError: If all losses are NaN.
    """
    everything, is_known = range(len(experiment.table)), False
    for number, batch in enumerate(experiment.batches):
        if number and budget.is_spent:
            return
        unchanged = experiment.losses(batch) if number or experiment.unchanged is None else experiment.unchanged
        is_known = is_known or not bool(unchanged.isnan().all())
        moved = _distance(experiment.losses(batch, everything), unchanged)
        if moved == 0:
            continue
        noise = _distance(unchanged, experiment.losses(batch) if number or first is None else first)
        if noise > 0:
            noise = max(noise, *(_distance(unchanged, experiment.losses(batch)) for _ in range(_AGAIN)))
        if moved <= _MARGIN * noise:
            raise RuntimeError(_noise(noise, moved))
        return
    raise RuntimeError(_NO_CHANGE) if is_known else NoLossError(ALL_NAN)


def check_reached(gradients: Tensor) -> None:
    """Check that some head has a gradient.

    Raises:
        RuntimeError: If all are 0 or NaN.
    """
    if not bool(gradients.nan_to_num().any()):
        raise RuntimeError(_NO_GRADIENT)


def _distance(losses: Tensor, others: Tensor) -> float:
    """Return the mean distance of two losses of each sample; infinite where only one of them is a number."""
    same = (losses == others) | (losses.isnan() & others.isnan())
    apart = (losses - others).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(apart.masked_fill(same, 0.0).mean())


def _noise(noise: float, moved: float) -> str:
    return (
        f"Two runs of the unchanged model differ by {noise:.2g} a sample, and all heads off change {moved:.2g}, so "
        "nothing can be said about single ones. Let `loss` depend on the model and the batch alone, not on random "
        "numbers of a generator of its own (the global ones are the same in each run) or a state that moves on."
    )

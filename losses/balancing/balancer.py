"""Name the losses of a training step, weigh them, and tell a log how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from losses._checks import accumulation_dtype, in_range
from losses.balancing._base import EqualWeighting, LossWeighting, check_scalar

__all__ = ["LossBalancer"]


class LossBalancer(nn.Module):
    r"""Add up named losses, each times its weight, once.

    .. math::
        L = \sum_{k \in \text{tasks}} w_k L_k + \sum_{j \in \text{fixed}} \lambda_j L_j

    Weights are applied here and nowhere else: pass losses unweighted. A strategy takes them in the order of ``tasks``.
    Penalties and regularisers belong into ``fixed``: a strategy sees a loss that is hard to lower, or easy, and would
    weigh them away or raise them without bound. Costs nothing beside the strategy.

    Args:
        tasks: Names of the losses that the strategy weighs.
        strategy: How to weigh them: :class:`~losses.balancing.uncertainty.UncertaintyWeighting`,
            :class:`~losses.balancing.dynamic_average.DynamicWeightAverage`,
            :class:`~losses.balancing.gradnorm.GradNorm`,
            :class:`~losses.balancing.random_weighting.RandomLossWeighting`, or a module with the same methods. ``None``
            weighs all with one. Its state is part of the state dict, and a run resumes exactly.
        fixed: Constant coefficients of further terms, by name.

    Shape:
        - forward: scalars by name to a scalar

    Raises:
        ValueError: If there is no task, a name occurs twice, the strategy is for another number of tasks, or a
            coefficient is negative or not finite.
        TypeError: If ``tasks`` is one string, or the strategy does not tell its weights.

    Example:
        >>> import torch
        >>> balancer = LossBalancer(["label", "rationale"], fixed={"sparsity": 0.1})
        >>> losses = {name: torch.tensor(2.0, requires_grad=True) for name in ("label", "rationale", "sparsity")}
        >>> total = balancer(losses)
        >>> total.backward()
        >>> total
        tensor(4.2000, grad_fn=<AddBackward0>)
        >>> {f"balance/{name}": round(weight.item(), 2) for name, weight in balancer.weights().items()}
        {'balance/label': 1.0, 'balance/rationale': 1.0, 'balance/sparsity': 0.1}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        strategy: nn.Module | None = None,
        *,
        fixed: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(tasks, str):
            raise TypeError(f"`tasks` must be a sequence of names, got one string: pass [{tasks!r}].")
        self.tasks = tuple(tasks)
        self.fixed = {name: in_range(f"fixed[{name!r}]", value, 0) for name, value in (fixed or {}).items()}
        self.strategy = EqualWeighting(len(self.tasks)) if strategy is None else strategy
        self._check_names()
        self._check_strategy()

    def forward(self, losses: Mapping[str, Tensor], **arguments: Any) -> Tensor:
        """Return the total.

        Args:
            losses: Exactly the ``tasks`` and the ``fixed`` terms, in any order.
            **arguments: Further arguments of the strategy, such as ``shared`` of ``GradNorm``.

        Raises:
            ValueError: If a name is missing or unknown, or a loss is no scalar.
            TypeError: If ``losses`` is no mapping, or a loss no tensor.
        """
        self._check_losses(losses)
        total: Tensor = self.strategy([losses[name] for name in self.tasks], **arguments)
        for name, coefficient in self.fixed.items():
            total = total + coefficient * losses[name].to(accumulation_dtype(losses[name]))
        return total

    def weights(self) -> dict[str, Tensor]:
        """Return by name the weights that the last call in training used, copied; for a log."""
        values = cast("LossWeighting", self.strategy).weights()
        return dict(zip(self.tasks, values, strict=True)) | {
            name: torch.as_tensor(value, dtype=values.dtype, device=values.device) for name, value in self.fixed.items()
        }

    def step(self) -> None:
        """End a training epoch, for strategies that compare epochs; the others do nothing then."""
        cast("LossWeighting", self.strategy).step()

    def extra_repr(self) -> str:
        """Show how to build the balancer again, the strategy beside it."""
        return f"{list(self.tasks)}, fixed={self.fixed}"

    def _check_names(self) -> None:
        names = [*self.tasks, *self.fixed]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"Names in `tasks` and `fixed` must differ, got {repeated} more than once.")

    def _check_strategy(self) -> None:
        for method in ("weights", "step"):
            if not callable(getattr(self.strategy, method, None)):
                raise TypeError(f"`strategy` must have a method `{method}()`, {type(self.strategy).__name__} has none.")
        count = getattr(self.strategy, "num_tasks", len(self.tasks))
        if count != len(self.tasks):
            raise ValueError(f"`strategy` weighs {count} losses, but `tasks` names {len(self.tasks)}.")

    def _check_losses(self, losses: Mapping[str, Tensor]) -> None:
        if not isinstance(losses, Mapping):
            raise TypeError(f"`losses` must be a mapping of names to scalars, got {type(losses).__name__}.")
        names = [*self.tasks, *self.fixed]
        missing, unknown = [n for n in names if n not in losses], [n for n in losses if n not in names]
        if missing or unknown:
            raise ValueError(f"`losses` must name exactly {names}: missing {missing}, unknown {unknown}.")
        for name in names:
            check_scalar(f"losses[{name!r}]", losses[name])

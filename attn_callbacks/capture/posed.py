"""A call as a problem for kernels, and what was found out about it before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_callbacks.capture.exact import distribution
from attn_callbacks.capture.exact.problem import Problem, cut, in_parts

__all__ = ["Posed", "parts_of"]


class Posed(ABC):
    """What a call has to say about itself, and its memory."""

    is_cross: bool

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, queries, keys)``."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the tensors are."""

    @property
    @abstractmethod
    def requires_grad(self) -> bool:
        """It has a graph."""

    @property
    @abstractmethod
    def query_valid(self) -> Tensor:
        """``(batch, queries)``."""

    @property
    @abstractmethod
    def key_valid(self) -> Tensor:
        """``(batch, keys)``."""

    @abstractmethod
    def allowed(self, rows: Tensor | Sequence[int] | None = None) -> Tensor:
        """Where a query may attend."""

    @abstractmethod
    def logits(self, rows: Tensor | Sequence[int] | None = None) -> Tensor | None:
        """Scores of some rows."""

    @abstractmethod
    def weights(self, rows: Tensor | Sequence[int] | None = None) -> Tensor:
        """Weights of some rows."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """What the call is made of."""

    @abstractmethod
    def _problem(self, keeps_half: bool) -> Problem | None:
        """What a kernel can compute, and whether it may do so in half precision."""

    @property
    @abstractmethod
    def _has_matrix(self) -> bool:
        """The model made the whole matrix itself."""

    def _posed(self, uses_logsumexp: bool, keeps_half: bool = False) -> Problem | None:
        """Return what a kernel has to compute, with the log-sum-exp that several statistics are made of."""
        problem = self._read(keeps_half)
        if problem is None or distribution.is_live(problem):
            return problem
        known, dtype = self._known(), problem.query.dtype
        if uses_logsumexp and dtype not in known:
            known[dtype] = parts_of(problem, distribution.logsumexp)
        return replace(problem, known_logsumexp=known.get(dtype))

    def _read(self, keeps_half: bool) -> Problem | None:
        """Return the problem; reading a mask of pairs takes a while."""
        # a problem read without gradients has none; the precision is a choice on a GPU only
        key = ("problem", keeps_half and self.device.type == "cuda", torch.is_grad_enabled())
        problem: Problem | None = self._remembered(key, lambda: self._problem(keeps_half))
        return problem

    def _counted(self, problem: Problem) -> Tensor:
        """Valid queries with a key to attend to, ``(batch, heads | 1, queries)``."""
        counted: Tensor = self._remembered("counted", lambda: self.query_valid[:, None] & (problem.choices() > 0))
        return counted

    def _remembered(self, key: Hashable, make: Callable[[], Any]) -> Any:
        known = self._known()
        if key not in known:
            known[key] = make()
        return known[key]

    def _known(self) -> dict[Hashable, Any]:
        """What was found out about this call.

        Forgotten when a tensor of it is changed in place (which inference tensors do not tell), when one begins or
        ceases to need a gradient, and between inference mode and the rest, whose tensors do not fit each other.
        """
        tensors = self._tensors().values()
        versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        state = (versions, tuple(tensor.requires_grad for tensor in tensors), torch.is_inference_mode_enabled())
        if vars(self).get("_memory", ((), {}))[0] != state:
            vars(self)["_memory"] = (state, {})
        known: dict[Hashable, Any] = vars(self)["_memory"][1]
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_memory"}


def parts_of(problem: Problem, exact: Callable[..., Tensor], *tensors: Tensor, width: int = 0) -> Tensor:
    """Compute for some samples and heads at a time; ``tensors (batch | 1, heads | 1, ...)`` are cut alike."""

    def compute(part: Problem, batch: slice, heads: slice) -> tuple[Tensor]:
        return (exact(part, *(cut(tensor, batch, heads) for tensor in tensors)),)

    return in_parts(problem, width, compute)[0]

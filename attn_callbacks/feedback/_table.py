"""Feedback that writes a table of the module's loss: weights of classes, or shifts of their logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attn_callbacks._checks import one_of
from attn_callbacks.feedback._bound import BoundFeedback
from attn_callbacks.feedback.criterion import (
    BUFFER,
    SHIFT,
    find_weighted_loss,
    holds_table,
    release_weights,
    weight_table,
)

__all__ = ["TableFeedback", "numbers"]


class TableFeedback(BoundFeedback):
    """Base of what steers ``class_weight`` or ``adjustment`` of a loss, and gives it back as it was.

    A subclass decides on log weights and hands them to :meth:`_steer`. As weights they replace the table; as margins
    they are subtracted from it: the shift is there in training only, so a class that is to be helped is made *harder*
    to predict there, and its plain logit learns to be the higher for it.

    From the first time it acts, the table is kept in its state and no longer in the module's state dict. When it stops
    to act the loss gets back the values it started from.

    Args:
        criterion: Dotted path of the loss in the LightningModule.
        act: ``"weight"``, ``"margin"``, or ``"auto"``: as margin where the loss has shifts.

    Raises:
        ValueError: If ``act`` is unknown; in `bind`, if there is no such loss, its table does not fit, or a saved state
            belongs to another one.
    """

    def __init__(self, criterion: str, act: str) -> None:
        self.criterion = criterion
        self.act = one_of("act", act, ("auto", "weight", "margin"))
        self._buffer = ""  # until it is bound, or a state was loaded
        self._start: tuple[float, ...] | None = None
        self._shape: tuple[int, ...] = ()
        self._log_weight: tuple[float, ...] | None = None  # nothing decided yet
        self._updates = 0
        self._kept = False  # it has acted: the table is its own

    @property
    def weights(self) -> Tensor | None:
        """The weights it decided on, acting or not, in float64; as margins they stand for shifts of minus their log."""
        if self._log_weight is None:
            return None
        return torch.tensor(self._log_weight, dtype=torch.float64).exp().reshape(self._shape)

    def state_dict(self) -> dict[str, object]:
        """Return log weights, the table it started from, and the number of reports seen."""
        state: dict[str, object] = {**super().state_dict(), "updates": self._updates, "kept": self._kept}
        if self._start is not None:
            state |= {"buffer": self._buffer, "start": self._tensor(self._start)}
        if self._log_weight is not None:
            state["log_weight"] = self._tensor(self._log_weight)
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; once bound, the table is written at once.

        Args:
            state: What :meth:`state_dict` returned.
        """
        start, log_weight, updates = state.get("start"), state.get("log_weight"), state.get("updates")
        if isinstance(start, Tensor):
            buffer = str(state["buffer"])
            self._check_saved(buffer, tuple(start.shape))
            self._start, self._shape, self._buffer = numbers(start), tuple(start.shape), buffer
            self._log_weight = numbers(log_weight) if isinstance(log_weight, Tensor) else None
        self._updates = updates if isinstance(updates, int) else self._updates
        self._kept = bool(state.get("kept", self._kept))
        super().load_state_dict(state)
        self._sync()

    def _look_into(self, module: nn.Module) -> None:
        buffer = self._choose(module)
        table = weight_table(find_weighted_loss(module, self.criterion, buffer), buffer)
        self._check_table(table, f"{self.criterion}.{buffer}")
        values = table.detach().cpu().double().flatten()
        if not bool(values.isfinite().all() if buffer == SHIFT else (values.isfinite() & (values > 0)).all()):
            sort = "finite" if buffer == SHIFT else "positive and finite"
            raise ValueError(f"`{self.criterion}.{buffer}` must be {sort} to start from, got {values.tolist()}.")
        if self._reference is None or self._module is module:
            self._check_saved(buffer, tuple(table.shape), saved=True)

    def _start_anew(self) -> None:
        self._start, self._shape, self._buffer, self._log_weight = None, (), "", None
        self._updates, self._kept = 0, False

    def _take_up(self, module: nn.Module) -> None:
        if self._start is None:
            self._buffer = self._choose(module)
            table = weight_table(find_weighted_loss(module, self.criterion, self._buffer), self._buffer)
            self._start, self._shape = numbers(table), tuple(table.shape)
        self._sync()

    def _choose(self, module: nn.Module) -> str:
        """Return which buffer is steered."""
        if self.act == "auto":
            return SHIFT if holds_table(module, self.criterion, SHIFT) else BUFFER
        return SHIFT if self.act == "margin" else BUFFER

    def _check_table(self, table: Tensor, where: str) -> None:
        """Raise if the table has other axes than are needed."""

    def _check_saved(self, buffer: str, shape: tuple[int, ...], *, saved: bool = False) -> None:
        """Refuse a state of another table; ``saved`` tells that the state is here and the table comes."""
        if self._start is None or (self._buffer, self._shape) == (buffer, shape):
            return
        here, there = (self._buffer, self._shape), (buffer, shape)
        (old, old_shape), (new, new_shape) = (here, there) if saved else (there, here)
        if old != new:
            raise ValueError(f"The saved state is of `{old}`, but `{new}` is steered now. Resume with the same `act`.")
        raise ValueError(
            f"The saved weights have shape {old_shape}, but `{self.criterion}.{new}` has {new_shape}. Resume with the "
            "same classes, groups and `by`."
        )

    def _bound_shape(self) -> tuple[int, ...]:
        if self._start is None or self._module is None:
            name = type(self).__name__
            raise ValueError(f"`{name}` has no loss to change. Call `bind(module)` first and keep the module.")
        return self._shape

    def _initial(self) -> tuple[float, ...]:
        """Return the log weights of the table before anything was decided."""
        start = self._start or ()
        return (0.0,) * len(start) if self._buffer == SHIFT else tuple(map(math.log, start))

    def _entries(self) -> tuple[float, ...]:
        """Return what the table holds while it acts."""
        start = self._start or ()
        if self._log_weight is None:
            return start
        if self._buffer == SHIFT:
            return tuple(shift - value for shift, value in zip(start, self._log_weight, strict=True))
        return tuple(map(math.exp, self._log_weight))

    def _steer(self, log_weight: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Take new log weights, write them if acting, and return the entries of the table before and after."""
        old, new = self._entries(), tuple(log_weight)
        if self._log_weight is not None or new != self._initial():  # else the table stays what it was, to the last bit
            self._log_weight = new
        if self.acting:  # else whoever changes the table meanwhile is left in peace
            self._sync()
        return old, self._entries()

    def _acting_changed(self) -> None:
        self._sync()

    @torch.no_grad()
    def _sync(self) -> None:
        """Make the table what it has to be: steered while acting, as it was after that, untouched before."""
        if self._module is None or self._start is None or not (self.acting or self._kept):
            return
        loss = find_weighted_loss(self._module, self.criterion, self._buffer)
        if self.acting:
            release_weights(loss, self._buffer)
            self._kept = True
        values = self._entries() if self.acting else self._start
        weight_table(loss, self._buffer).copy_(self._tensor(values))  # in place: compiled steps and replicas see it

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).reshape(self._shape)

    @property
    def _quantity(self) -> str:
        """What an entry is called."""
        return "shift" if self._buffer == SHIFT else "weight"


def numbers(values: Tensor) -> tuple[float, ...]:
    """Return the values in one row, in float64."""
    return tuple(values.detach().cpu().double().flatten().tolist())

"""Class weights, or margins, that follow what validation shows of each class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from attn_callbacks._checks import at_least, in_range, one_of
from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback._f1 import F1Rates, f1_rates
from attn_callbacks.feedback._table import TableFeedback, numbers
from attn_callbacks.feedback._table_cells import Cells, changes, read_cells
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.controller import ControllerSettings, ControllerState, control_step, f1_step
from attn_callbacks.feedback.criterion import BUFFER, SHIFT, check_table, holds_table
from attn_callbacks.feedback.weight_policies import centre_rows, difficulty_weights, effective_number_weights

__all__ = ["ClassReweighting"]

_POLICIES = ("recall", "f1", "difficulty", "effective_number", "deferred")


class ClassReweighting(TableFeedback):
    """Give classes, or classes within groups, that are recognised less often than the rest more say in the loss.

    After each validation pass the weights are decided anew by a policy, and written in place into the loss. The
    feedback's state keeps them, and the module's state dict no longer does: its checkpoints load into a module with a
    plain criterion.

    - ``"recall"``: one step of a controller with averaged recalls, a dead band, bounds, no move against the present
      recalls, and a normalisation that keeps the scale of the loss
      (:func:`attn_callbacks.feedback.controller.control_step`). It starts from what the loss has.
    - ``"f1"``: the same controller on F1 scores, for macro-F1, where equal recalls cost too much precision: the classes
      whose F1 is below the mean get more say while predicted too rarely, less while predicted too often
      (:func:`attn_callbacks.feedback.controller.f1_step`). F1 is that of the classes' shares in what training is fed.
    - ``"difficulty"``: ``(1 - recall) ** tau`` of the averaged recalls, as in class-wise difficulty-balanced loss.
    - ``"effective_number"``: inverse effective number of the samples that training was fed in an epoch.
    - ``"deferred"``: the same, but only after ``warm_up`` reports: deferred reweighting.

    They act as **weight** in the buffer ``class_weight``, such as that of ``losses.WeightedCrossEntropyLoss``, or as
    **margin** in the buffer ``adjustment`` of ``losses.LogitAdjustedLoss``: training sees ``logits + adjustment - log
    w``, prediction the plain logits. Prefer margins: weights lose their effect once training accuracy reaches 1.
    Margins by group follow the recall of each class in each group against the mean of all, but act only within a group,
    through the differences between its classes: they cannot help a group against another one.
    Policies from counts on top of a loss that holds the log prior correct the same imbalance twice: give that loss
    ``tau=0``.

    Changes training. Answers class bias, and with ``by="group"`` group bias; it cannot cure reliance on a spurious
    feature. It looks at validation data: keep a split of its own to select models on. Costs nothing per step.

    Args:
        criterion: Dotted path of the loss in the LightningModule.
        by: ``"class"`` for one weight a class, ``"group"`` for one a class and group; the latter needs groups in the
            batch schema, a table with one row a group, and a training step that passes ``group=`` to the loss.
        act: ``"weight"``, ``"margin"``, or ``"auto"``: as margin where the loss has an ``adjustment``; by group as
            weight, if it is only the weights that have a row a group.
        policy: ``"recall"``, ``"f1"`` (by class only), ``"difficulty"``, ``"effective_number"`` or ``"deferred"``.
        step_size: Change of the log weight per validation for each unit of recall missing. Over dozens of validations
            0.5 to 8 act much alike; over fewer than ten, less is slow and more overshoots.
        smoothing: Share of the old average recall in the new one, after many reports; from 0 to below 1.
        limit: Weights stay between ``1 / limit`` and ``limit`` before normalisation, so no two of them differ by more
            than a factor of ``limit ** 2``. Keep it small if labels are noisy.
        min_support: Least number of validation samples behind a recall that counts; below it, a weight rests.
        dead_band: Deviations of recall up to this, or up to their standard error, are left alone by the controller.
        warm_up: Number of reports that are averaged only.
        tau: Exponent of the difficulty, from 0 to 10.
        beta: Of the effective number, between 0 (all classes alike) and 1 (inverse frequency).

    Raises:
        ValueError: If an argument is out of its range; in `bind`, if there is no such loss or its table does not fit
            ``by``; in `apply`, if the report does not fit the table.
        TypeError: If a setting is not a number.

    Example:
        >>> import torch
        >>> from losses import WeightedCrossEntropyLoss
        >>> module = torch.nn.Module()
        >>> module.criterion = WeightedCrossEntropyLoss(2)
        >>> feedback = ClassReweighting()
        >>> feedback.bind(module)
        >>> report = BiasReport(0, 0, torch.tensor([[[90, 10], [50, 50]]]), ("negative", "positive"))
        >>> for action in feedback.apply(report):
        ...     print(action)
        negative: weight 1.00 -> 0.62 (recall 0.90)
        positive: weight 1.00 -> 1.38 (recall 0.50)
        >>> module.criterion.class_weight
        tensor([0.6201, 1.3799])

    References:
        Sinha, Ohashi and Nakamura, "Class-Wise Difficulty-Balanced Loss for Solving Class-Imbalance", ACCV 2020.
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019 (deferred).
        Menon et al., "Long-Tail Learning via Logit Adjustment", ICLR 2021 (margins).
    """

    def __init__(
        self,
        criterion: str = "criterion",
        by: str = "class",
        *,
        act: str = "auto",
        policy: str = "recall",
        step_size: float = 2.0,
        smoothing: float = 0.7,
        limit: float = 10.0,
        min_support: int = 20,
        dead_band: float = 0.02,
        warm_up: int = 0,
        tau: float = 1.0,
        beta: float = 0.9999,
    ) -> None:
        super().__init__(criterion, act)
        self.by = one_of("by", by, ("class", "group"))
        self.policy = one_of("policy", policy, _POLICIES)
        if by == "group" and policy == "f1":
            raise ValueError("policy='f1' needs by='class': F1 is that of a class over all groups.")
        self.answers = frozenset({"class"} if by == "class" else {"class", "group"})
        self.settings = ControllerSettings(step_size, smoothing, limit, min_support, dead_band)
        self.warm_up = at_least("warm_up", warm_up, 0)
        if {"deferred": warm_up == 0, "effective_number": warm_up > 0}.get(policy, False):
            raise ValueError(
                f"policy={policy!r} with warm_up={warm_up}: pass policy='effective_number' to weigh from the first "
                "report on, or policy='deferred' with a `warm_up` of at least 1."
            )
        self.tau = in_range("tau", tau, 0, 10)
        self.beta = in_range("beta", beta, 0, 1)
        self._average: tuple[float, ...] | None = None
        self._excess: tuple[float, ...] = ()
        self._settled: tuple[float, ...] = ()

    @property
    def corrects(self) -> bool:
        """The loss favours some classes or cells without it: its table did not start out even."""
        return len(set(self._start or ())) > 1

    def apply(self, report: BiasReport) -> Sequence[Action]:
        """Decide on the weights, and write them.

        Args:
            report: What the last validation pass showed.
        """
        shape = self._bound_shape()
        by = "class" if self.by == "class" else "cell"
        cells = read_cells(report, by, shape, f"{self.criterion}.{self._buffer}", called=self.by)
        old = ControllerState(
            self._initial() if self._log_weight is None else self._log_weight,
            (math.nan,) * math.prod(shape) if self._average is None else self._average,
            self._excess,
            self._settled,
        )
        rates = f1_rates(report.counts.sum(dim=0).tolist(), cells.prior) if self.policy == "f1" else None
        act = self._updates >= self.warm_up
        new = self._decide(old, cells, act) if rates is None else self._decide_by_f1(old, rates, cells, act)
        self._updates += 1
        self._average, self._excess, self._settled = new.average, new.excess, new.settled
        before, after = self._steer(new.log_weight)
        return changes(report, cells, self._quantity, before, after, self._notes(cells, rates, new))

    def state_dict(self) -> dict[str, object]:
        """Return log weights, averages, the table it started from, and the number of reports seen."""
        state = super().state_dict()
        for name in ("average", "excess", "settled"):
            if values := getattr(self, f"_{name}"):
                state[name] = self._tensor(values)
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; once bound, the weights are written at once.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        if "average" in state and ("excess" in state) == (self.policy == "f1"):  # averages of recall are none of F1
            saved = (state.get(name) for name in ("average", "excess", "settled"))
            self._average, self._excess, self._settled = (numbers(v) if isinstance(v, Tensor) else () for v in saved)

    def __repr__(self) -> str:
        chosen = self.settings
        return (
            f"ClassReweighting({self.criterion!r}, {self.by!r}, act={self.act!r}, policy={self.policy!r}, "
            f"step_size={chosen.step_size}, smoothing={chosen.smoothing}, limit={chosen.limit}, "
            f"min_support={chosen.min_support}, dead_band={chosen.dead_band}, warm_up={self.warm_up}, tau={self.tau}, "
            f"beta={self.beta})"
        )

    @property
    def _width(self) -> int | None:
        """Cells in a row where only differences within it act: a shift of all logits of a sample changes nothing."""
        return self._shape[-1] if self.by == "group" and self._buffer == SHIFT else None

    def _decide_by_f1(self, old: ControllerState, rates: F1Rates, cells: Cells, act: bool) -> ControllerState:
        return f1_step(old, rates, cells.support, cells.prior, self.settings, act=act)

    def _decide(self, old: ControllerState, cells: Cells, act: bool) -> ControllerState:
        """Return averages and log weights by the policy; a weight of which it knows nothing rests."""
        steer, width = act and self.policy == "recall", self._width
        moved = control_step(old, cells.recall, cells.support, cells.prior, self.settings, act=steer, width=width)
        if steer or not act:
            return moved
        new = self._published(moved.average, cells, width or len(cells.prior))
        known = [not math.isnan(value) for value in new]
        kept = [value if use else rest for rest, value, use in zip(old.log_weight, new, known, strict=True)]
        return replace(moved, log_weight=tuple(kept) if width is None else centre_rows(kept, width, known))

    def _published(self, average: Sequence[float], cells: Cells, width: int) -> list[float]:
        """Return the log weights of a published rule for each row of cells; NaN where it knows nothing."""
        new: list[float] = []
        for start in range(0, len(average), width):
            row, limit = slice(start, start + width), self.settings.limit
            if self.policy == "difficulty":
                new += difficulty_weights(average[row], cells.prior[row], tau=self.tau, limit=limit)
            else:
                new += effective_number_weights(cells.counts[row], cells.prior[row], beta=self.beta, limit=limit)
        return new

    def _notes(self, cells: Cells, rates: F1Rates | None, new: ControllerState) -> list[str]:
        if rates is not None:
            scores = zip(rates.f1, new.average, rates.recall, rates.precision, strict=True)
            return [f"{_text('F1', *pair)}, recall {_shown(r)}, precision {_shown(p)}" for *pair, r, p in scores]
        if self.policy in ("recall", "difficulty"):
            return [_text("recall", *pair) for pair in zip(cells.recall, new.average, strict=True)]
        return [f"{count:.0f} samples an epoch" for count in cells.counts]

    def _choose(self, module: nn.Module) -> str:
        by_group = (holds_table(module, self.criterion, buffer, axes=2) for buffer in (SHIFT, BUFFER))
        if self.act == "auto" and self.by == "group" and tuple(by_group) == (False, True):
            return BUFFER
        return super()._choose(module)

    def _check_table(self, table: Tensor, where: str) -> None:
        check_table(table, self.by, where)

    def _start_anew(self) -> None:
        super()._start_anew()
        self._average, self._excess, self._settled = None, (), ()


def _text(name: str, value: float, average: float) -> str:
    """Name the last value and, where it reads otherwise, the average, which is what the weight follows."""
    last, mean = _shown(value), _shown(average)
    return f"{name} {last}" if last == mean else f"{name} {last}, average {mean}"


def _shown(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.2f}"

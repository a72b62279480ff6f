"""Class weights that follow the recalls seen in validation."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from attn_callbacks._checks import at_least, one_of
from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback.base import Feedback
from attn_callbacks.feedback.controller import ControllerSettings, ControllerState, control_step
from attn_callbacks.feedback.criterion import BUFFER, find_weighted_loss, release_weights, weight_table

__all__ = ["ClassReweighting"]

_WORTH_SAYING = 0.005  # relative change of a weight
_MAX_SENTENCES = 12


class ClassReweighting(Feedback):
    """Raise the loss weight of classes, or of classes within groups, that are recognised less often than the rest.

    After each validation pass the weights take one step of a controller: averaged recalls, a dead band, bounds, and a
    normalisation that keeps the scale of the loss (:func:`attn_callbacks.feedback.controller.control_step`). They are
    written in place into the buffer ``class_weight`` of the module's loss, such as
    ``losses.WeightedCrossEntropyLoss``; they start from what that buffer holds. The callback's state keeps them, and
    the module's state dict no longer does: its checkpoints load into a module with a plain criterion.

    Changes training. Answers class bias, and with ``by="group"`` group bias; it cannot cure reliance on a spurious
    feature, and loses its effect once training accuracy reaches 1 (so stop early or regularise). It looks at validation
    data: keep a split of its own to select models on. Costs nothing per step.

    Args:
        criterion: Dotted path of the loss in the LightningModule.
        by: ``"class"`` for one weight a class, ``"group"`` for one a class and group; the latter needs groups in the
            batch schema and a training step that passes ``group=`` to the loss.
        step_size: Change of the log weight per validation for each unit of recall missing. Over dozens of validations
            0.5 to 8 act much alike; over fewer than ten, less is slow and more overshoots.
        smoothing: Share of the old average in the new one, from 0 to below 1.
        limit: Weights stay between ``1 / limit`` and ``limit`` before normalisation, so no two of them differ by more
            than a factor of ``limit ** 2``. Keep it small if labels are noisy.
        min_support: Least number of validation samples behind a recall that counts; below it, a weight rests.
        dead_band: Deviations of recall up to this, or up to their standard error, are left alone.
        warm_up: Number of reports that are averaged only.

    Raises:
        ValueError: If an argument is out of its range; in `bind`, if there is no such loss or its table does not fit
            ``by``; in `apply`, if the report does not fit the table.
        TypeError: If a setting is not a number.

    Example:
        >>> from losses import WeightedCrossEntropyLoss
        >>> module = nn.Module()
        >>> module.criterion = WeightedCrossEntropyLoss(2)
        >>> feedback = ClassReweighting()
        >>> feedback.bind(module)
        >>> feedback.apply(BiasReport(0, 0, torch.tensor([[[90, 10], [50, 50]]]), ("negative", "positive")))
        ('negative: weight 1.00 -> 0.62 (recall 0.90)', 'positive: weight 1.00 -> 1.38 (recall 0.50)')
        >>> module.criterion.class_weight
        tensor([0.6201, 1.3799])
    """

    def __init__(
        self,
        criterion: str = "criterion",
        by: str = "class",
        *,
        step_size: float = 2.0,
        smoothing: float = 0.7,
        limit: float = 10.0,
        min_support: int = 20,
        dead_band: float = 0.02,
        warm_up: int = 0,
    ) -> None:
        self.criterion = criterion
        self.by = one_of("by", by, ("class", "group"))
        self.answers = frozenset({"class"} if by == "class" else {"class", "group"})
        self.settings = ControllerSettings(step_size, smoothing, limit, min_support, dead_band)
        self.warm_up = at_least("warm_up", warm_up, 0)
        self._reference: weakref.ref[nn.Module] | None = None
        self._state: ControllerState | None = None
        self._shape: tuple[int, ...] = ()
        self._updates = 0

    def bind(self, module: nn.Module) -> None:
        """Find the loss, and write restored weights into it; a module other than the last one starts anew.

        Args:
            module: The LightningModule.
        """
        table = self._table(module)
        release_weights(find_weighted_loss(module, self.criterion))
        if self._reference is not None and self._module is not module:
            self._state, self._updates = None, 0
        if self._state is None:
            self._state, self._shape = _start(table, self.criterion), tuple(table.shape)
        self._check_shape(table)
        self._reference = weakref.ref(module)
        self._write()

    def apply(self, report: BiasReport) -> tuple[str, ...]:
        """Take one step of the controller and write the weights.

        Args:
            report: What the last validation pass showed.
        """
        if self._state is None or self._module is None:
            raise ValueError("`ClassReweighting` has no loss to change. Call `bind(module)` first and keep the module.")
        old, shape = self._state, self._shape
        recall, support = self._measured(report)
        recalls = _fit(recall, shape, math.nan).flatten().tolist()
        supports = _fit(support, shape, 0).flatten().tolist()
        prior = _fit(self._prior(report), shape, 0.0).flatten().tolist()
        act = self._updates >= self.warm_up
        self._state = control_step(old, recalls, supports, prior, self.settings, act=act)
        self._updates += 1
        self._write()
        return _sentences(self._names(report), old, self._state, recalls)

    def state_dict(self) -> dict[str, object]:
        """Return log weights, averages and the number of reports seen."""
        state: dict[str, object] = {"updates": self._updates}
        if self._state is not None:
            state["log_weight"] = torch.tensor(self._state.log_weight, dtype=torch.float64).reshape(self._shape)
            state["average"] = torch.tensor(self._state.average, dtype=torch.float64).reshape(self._shape)
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; once bound, the weights are written at once.

        Args:
            state: What :meth:`state_dict` returned.
        """
        log_weight, average, updates = state.get("log_weight"), state.get("average"), state.get("updates")
        if isinstance(log_weight, Tensor) and isinstance(average, Tensor):
            self._state = ControllerState(_numbers(log_weight), _numbers(average))
            self._shape = tuple(log_weight.shape)
        if isinstance(updates, int):
            self._updates = updates
        if self._module is not None and self._state is not None:
            self._check_shape(self._table(self._module))
            self._write()

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_reference": None}  # a copy in another process binds to the module there

    def __repr__(self) -> str:
        chosen = self.settings
        return (
            f"ClassReweighting({self.criterion!r}, {self.by!r}, step_size={chosen.step_size}, "
            f"smoothing={chosen.smoothing}, limit={chosen.limit}, min_support={chosen.min_support}, "
            f"dead_band={chosen.dead_band}, warm_up={self.warm_up})"
        )

    @property
    def _module(self) -> nn.Module | None:
        return None if self._reference is None else self._reference()

    def _table(self, module: nn.Module) -> Tensor:
        table = weight_table(find_weighted_loss(module, self.criterion))
        axes, way = {
            "class": ("(classes,)", "pass by='group', or build the loss with one weight a class"),
            "group": ("(groups, classes)", "build the loss with one row a group (`num_groups=`), or pass by='class'"),
        }[self.by]
        if table.dim() != (1 if self.by == "class" else 2):
            raise ValueError(
                f"by={self.by!r} needs `{self.criterion}.{BUFFER}` of shape {axes}, got {tuple(table.shape)}: {way}."
            )
        return table

    def _check_shape(self, table: Tensor) -> None:
        if tuple(table.shape) != self._shape:
            raise ValueError(
                f"The saved weights have shape {self._shape}, but `{self.criterion}.{BUFFER}` has "
                f"{tuple(table.shape)}. Resume with the same classes, groups and `by`."
            )

    @torch.no_grad()
    def _write(self) -> None:
        if self._state is not None and self._module is not None:
            weight = torch.tensor(self._state.weight, dtype=torch.float64).reshape(self._shape)
            self._table(self._module).copy_(weight)  # in place: compiled steps and distributed copies see it

    def _measured(self, report: BiasReport) -> tuple[Tensor, Tensor]:
        """Return recalls and support in the axes of the table, after checking that they fit it."""
        if self.by == "group" and not report.has_groups:
            raise ValueError("by='group' needs groups in the report, got none. Give the batch schema a `group`.")
        measured = (report.cell_recall, report.support) if self.by == "group" else (report.recall, report.class_support)
        seen = tuple(measured[1].shape)
        if seen[-1] != self._shape[-1] or seen[0] > self._shape[0]:
            raise ValueError(
                f"`{self.criterion}.{BUFFER}` has shape {self._shape}, but the report counts {seen}. Build the loss "
                "for as many classes and groups as validation has."
            )
        return measured

    def _prior(self, report: BiasReport) -> Tensor:
        """Return the share of each cell in what training was fed, or without that in validation."""
        fed = report.train_counts
        counts = report.support if fed is None or int(fed.sum()) == 0 else fed
        counts = counts.sum(dim=0) if self.by == "class" else counts
        return counts.double() / counts.sum().clamp(min=1)

    def _names(self, report: BiasReport) -> list[str]:
        if self.by == "class":
            return list(report.class_names)
        return [f"{group}, {label}" for group in report.group_names for label in report.class_names]


def _start(table: Tensor, criterion: str) -> ControllerState:
    weight = table.detach().cpu().double().flatten()
    if not bool((weight.isfinite() & (weight > 0)).all()):
        raise ValueError(f"`{criterion}.{BUFFER}` must be positive and finite to start from, got {weight.tolist()}.")
    return ControllerState(tuple(map(math.log, weight.tolist())), (math.nan,) * weight.numel())


def _fit(values: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    """Fill up the groups that validation has not shown yet."""
    filled = values.new_full(shape, fill)
    filled[: len(values)] = values
    return filled


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().flatten().tolist())


def _sentences(
    names: Sequence[str], old: ControllerState, new: ControllerState, recall: Sequence[float]
) -> tuple[str, ...]:
    """Say which weights changed noticeably; of many, the largest changes."""
    changes = {index: abs(new.log_weight[index] - old.log_weight[index]) for index in range(len(names))}
    told = sorted((index for index in changes if changes[index] > _WORTH_SAYING), key=lambda index: -changes[index])
    lines = [
        f"{names[index]}: weight {old.weight[index]:.2f} -> {new.weight[index]:.2f} "
        f"({_recall_text(recall[index], new.average[index])})"
        for index in told[:_MAX_SENTENCES]
    ]
    if len(told) > _MAX_SENTENCES:
        lines.append(f"{len(told) - _MAX_SENTENCES} other weights changed less")
    return tuple(lines)


def _recall_text(recall: float, average: float) -> str:
    """Name the last recall and, where it reads otherwise, the average, which is what the weight follows."""
    last, mean = ("not measured" if math.isnan(value) else f"{value:.2f}" for value in (recall, average))
    return f"recall {last}" if last == mean else f"recall {last}, average {mean}"

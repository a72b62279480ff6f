"""Sampling that makes up for classes and groups that are rare, or not recognised."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attn_callbacks._checks import at_least, in_range, one_of
from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback._bound import BoundFeedback
from attn_callbacks.feedback._correlated import cramers_v
from attn_callbacks.feedback._shares import limited_shares, measured_cells, share_actions
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.controller import ControllerSettings, ControllerState, control_step
from attn_callbacks.feedback.sampler import DynamicDistributedSampler

__all__ = ["Resampling"]

_TELLING = 0.5
"""Cramér's V from which on groups are drawn evenly before any report: a large effect (Cohen 1988, w)."""


class Resampling(BoundFeedback):
    r"""Draw rare or badly recognised cells more often: classes, or classes within groups.

    Group-balanced sampling is the first answer to group bias, which class weights cannot cure. It steers the
    ``DynamicDistributedSampler`` of the training loader: after each validation the share of every cell in the next
    epoch moves from its natural share :math:`\pi` to

    .. math::
        p = \pi + \text{strength} \cdot \min(1, \text{reports} / \text{anneal}) \cdot (p^* - \pi)

    where :math:`p^*` is the same for all cells that training has (``"balanced"``), or :math:`\pi w` with weights
    :math:`w` that follow the recalls (``"recall"``, :func:`attn_callbacks.feedback.controller.control_step`).

    Changes training. Answers class bias, and with ``by="group"`` group bias. Its effect fades once training accuracy
    reaches 1: stop early or regularise. Do not correct the same thing by loss weights or logit adjustment too. Costs
    nothing per step; what is drawn more often is seen more often, and learned by heart sooner.

    Args:
        by: ``"class"``, or ``"group"`` for the classes within groups, which the sampler has to know.
        policy: ``"balanced"`` or ``"recall"``.
        sampler: The sampler of the training loader, where the loader hides it or worker processes fetch before the
            first epoch begins; ``None`` takes it from the loader.
        strength: How far to go, from 0 (nothing) to 1.
        anneal: Reports over which it gets there; 0: at once.
        when: ``"biased"``: from the first report on that has a finding it answers, and by group from the first step on
            where training data let groups tell classes (Cramér's V of at least 0.5): what is learned first is hard to
            unlearn. ``"always"``: from the first step on.
        limit: No cell is drawn more than this many times as often as naturally; what that leaves goes to the others.
            For ``"recall"`` also the bound on weights, up and down. Keep it small if labels are noisy.
        step_size: For ``"recall"``: change of the log weight for each unit of recall missing.
        smoothing: For ``"recall"``: share of the old average recall in the new one, from 0 to below 1.
        min_support: For ``"recall"``: least number of validation samples behind a recall that counts.
        dead_band: For ``"recall"``: deviations of recall up to this, or their standard error, are left alone.

    Raises:
        ValueError: If an argument is out of its range; in `bind_sampler`, if the loader has another sampler, or ``by``
            needs groups that the sampler does not know; in `apply`, if no sampler came.
        TypeError: If a setting is not a number, or ``sampler`` not a `DynamicDistributedSampler`.

    Example:
        >>> feedback = Resampling()
        >>> feedback.bind_sampler(DynamicDistributedSampler([0] * 90 + [1] * 10))
        >>> report = BiasReport(0, 0, torch.tensor([[[90, 10], [50, 50]]]), ("negative", "positive"))
        >>> [str(action) for action in feedback.apply(report)]
        ['positive: share of draws 0.100 -> 0.500', 'negative: share of draws 0.900 -> 0.500']

    References:
        - Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020
          (progressively-balanced sampling).
        - Idrissi et al., Simple data balancing achieves competitive worst-group-accuracy, CLeaR 2022.
    """

    def __init__(
        self,
        by: str = "class",
        policy: str = "balanced",
        sampler: DynamicDistributedSampler | None = None,
        *,
        strength: float = 1.0,
        anneal: int = 0,
        when: str = "biased",
        limit: float = 50.0,
        step_size: float = 2.0,
        smoothing: float = 0.7,
        min_support: int = 20,
        dead_band: float = 0.02,
    ) -> None:
        self.by = one_of("by", by, ("class", "group"))
        self.policy = one_of("policy", policy, ("balanced", "recall"))
        self.answers = frozenset({"class"} if by == "class" else {"class", "group"})
        self.strength = in_range("strength", strength, 0, 1)
        self.anneal = at_least("anneal", anneal, 0)
        self.when = one_of("when", when, ("biased", "always"))
        self.settings = ControllerSettings(step_size, smoothing, limit, min_support, dead_band)
        if sampler is not None and not isinstance(sampler, DynamicDistributedSampler):
            raise TypeError(f"`sampler` must be a `DynamicDistributedSampler`, got {sampler!r}.")
        self.sampler = sampler
        self._bound: DynamicDistributedSampler | None = None
        self._started, self._reports = self.when == "always", 0
        self._early = "always" if self.when == "always" else None
        self._is_resumed = False  # whether it had started is known
        self._state: ControllerState | None = None
        if sampler is not None:
            self._take(sampler)

    @property
    def early(self) -> str | None:
        """Why shares have not been natural since the first step; ``None``: they were."""
        changes = self.policy == "balanced" and self.strength > 0 and self.anneal == 0
        return self._early if changes else None

    def bind_sampler(self, sampler: object) -> None:
        """Take the sampler of the training loader, perhaps a new one, and write the weights.

        Args:
            sampler: Whatever draws the indices of the training data.
        """
        if self.sampler is None:
            if not isinstance(sampler, DynamicDistributedSampler):
                raise ValueError(_advice(sampler, self.by))
            self._take(sampler)
        elif isinstance(sampler, DynamicDistributedSampler) and sampler is not self.sampler:
            raise ValueError(
                "The training loader draws from another `DynamicDistributedSampler` than `sampler=`. Leave `sampler` "
                "out, or give the loader the same one."
            )
        self._write()

    def apply(self, report: BiasReport) -> tuple[Action, ...]:
        """Set the shares of the next epoch.

        Args:
            report: What the last validation pass showed.
        """
        if self._bound is None:
            raise ValueError("`Resampling` has no sampler to change. Call `bind_sampler(sampler)` first.")
        groups, classes = self._bound.natural_shares.shape
        natural = self._natural(self._bound)
        before = self._shares(natural)
        measured = measured_cells(report, self.by, (groups, classes)) if self.policy == "recall" else ()
        self._started = self._started or bool(self.answered(report))
        self._reports += self._started
        if measured:
            self._control(natural, *measured)
        self._write()
        return share_actions(report, self.by, (groups, classes), before.tolist(), self._shares(natural).tolist())

    def state_dict(self) -> dict[str, object]:
        """Return how far it is, and for ``"recall"`` log weights and averages."""
        state: dict[str, object] = {**super().state_dict(), "started": self._started, "reports": self._reports}
        if self._early is not None:
            state["early"] = self._early
        if self._state is not None:
            for name in ("log_weight", "average", "settled"):
                state[name] = torch.tensor(getattr(self._state, name), dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; a sampler that is known is written at once.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        if "started" in state:
            self._started, self._is_resumed = bool(state["started"]), True
        self._early = str(state["early"]) if state.get("early") else None
        names = ("reports", "log_weight", "average", "settled")
        reports, log_weight, average, settled = (state.get(name) for name in names)
        self._reports = reports if isinstance(reports, int) else self._reports
        if isinstance(log_weight, Tensor) and isinstance(average, Tensor):
            known = tuple(settled.tolist()) if isinstance(settled, Tensor) else ()
            self._state = ControllerState(tuple(log_weight.tolist()), tuple(average.tolist()), settled=known)
        self._write()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_bound": self.sampler}  # another process has a loader of its own

    def __repr__(self) -> str:
        return (
            f"Resampling({self.by!r}, {self.policy!r}, strength={self.strength}, anneal={self.anneal}, "
            f"when={self.when!r}, limit={self.settings.limit})"
        )

    def _take(self, sampler: DynamicDistributedSampler) -> None:
        if self.by == "group" and not sampler.has_groups:
            raise ValueError(
                "by='group' needs a sampler that knows the groups, got one without. Write "
                "`DynamicDistributedSampler(labels, groups=groups)`."
            )
        if sampler is not self._bound and not self._is_resumed:
            told = cramers_v(sampler.counts, self.settings.min_support) if self.by == "group" else 0.0
            if self.when == "biased" and told >= _TELLING and self._reports == 0:
                self._started = True
                self._early = f"groups tell classes in training data: Cramér's V {told:.2f}"
        self._bound = sampler

    def _start_anew(self) -> None:
        self._started, self._reports, self._state = self.when == "always", 0, None
        self._early, self._is_resumed = "always" if self._started else None, False
        self._write()
        self._bound = None  # another module may have other data
        if self.sampler is not None:
            self._take(self.sampler)

    def _take_up(self, module: nn.Module) -> None:
        self._write()

    def _acting_changed(self) -> None:
        self._write()

    def _write(self) -> None:
        """Give the sampler its weights: shares over natural shares; 1 while not acting."""
        if self._bound is None:
            return
        cells, natural = self._bound.cell_weights, self._natural(self._bound)
        weights = torch.ones_like(natural)
        if self.acting:
            weights = (self._shares(natural) / natural).where(natural > 0, 1.0)
        self._bound.set_cell_weights(weights.expand_as(cells) if self.by == "class" else weights.reshape(cells.shape))

    def _natural(self, sampler: DynamicDistributedSampler) -> Tensor:
        """Return the natural share of each cell, ``(cells,)``."""
        shares = sampler.natural_shares
        return shares.sum(dim=0) if self.by == "class" else shares.flatten()

    def _shares(self, natural: Tensor) -> Tensor:
        """Return the share of each cell that was decided on, acting or not, ``(cells,)``."""
        wanted = torch.ones_like(natural)  # what training lacks gets none of it: the limit is 0 there
        if self.policy == "recall":
            wanted = natural * torch.tensor(self._controlled(natural).log_weight, dtype=torch.float64).exp()
        part = self.strength * (min(1.0, self._reports / self.anneal) if self.anneal else float(self._started))
        return natural + part * (limited_shares(wanted, natural, self.settings.limit) - natural)

    def _control(self, natural: Tensor, recall: Tensor, support: Tensor) -> None:
        support = support.where(natural > 0, 0)  # what training lacks cannot be drawn, and must not move the others
        self._state = control_step(
            self._controlled(natural),
            recall.tolist(),
            support.tolist(),
            natural.tolist(),
            self.settings,
            act=self._started,
        )

    def _controlled(self, natural: Tensor) -> ControllerState:
        cells = len(natural)
        state = self._state or ControllerState((0.0,) * cells, (math.nan,) * cells)
        if len(state.log_weight) != cells:
            raise ValueError(
                f"The saved weights are those of {len(state.log_weight)} cells, but the sampler has {cells}. Resume "
                "with the same classes, groups and `by`."
            )
        return state


def _advice(sampler: object, by: str) -> str:
    """Say what to write instead of a sampler that cannot be steered."""
    name = type(sampler).__name__
    groups = ", groups=groups" if by == "group" else ""
    why = {
        "DistributedSamplerWrapper": " Lightning wraps other samplers for several processes; this one it leaves alone.",
        "SequentialSampler": " `overfit_batches` puts a `SequentialSampler` in its place: leave that out.",
        "_InfiniteConstantSampler": " An iterable data set cannot be resampled.",
    }.get(name, "")
    return (
        f"`Resampling` needs a training loader with a `DynamicDistributedSampler`, got {name}. Write "
        f"`DataLoader(train, batch_size, sampler=DynamicDistributedSampler(labels{groups}))`.{why}"
    )

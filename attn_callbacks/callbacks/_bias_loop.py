"""The loop that BiasMonitor closes: feedback bound to a run, asked after each report, judged, and remembered."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attn_callbacks._lightning import MisconfigurationException, rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.bias import BiasReport
from attn_callbacks.callbacks._corrected import corrected_twice
from attn_callbacks.callbacks._fed_failures import FedFailures
from attn_callbacks.callbacks._fed_steps import FedSteps
from attn_callbacks.callbacks._guard import message
from attn_callbacks.callbacks._steps import tap_step
from attn_callbacks.callbacks._training_loader import restart_loader, training_sampler
from attn_callbacks.feedback import (
    Action,
    ClassReweighting,
    DynamicDistributedSampler,
    Feedback,
    Resampling,
    StepFeedback,
)
from attn_callbacks.feedback.ledger import Ledger, feedback_names

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["BiasLoop", "misconfigured"]


class BiasLoop:
    """Feedback of one monitor over a run.

    Args:
        feedback: What answers reports.
        schema: Where a batch has what.
        patience: Validations after which feedback that has not helped is withdrawn; ``None``: never.
        dry_run: Decide everything and do nothing.
        automatic: Choose among the feedback once the sampler is known.
    """

    def __init__(
        self,
        feedback: Sequence[Feedback],
        schema: BatchSchema,
        patience: int | None,
        dry_run: bool,
        automatic: bool = False,
    ) -> None:
        self.feedback, self.ledger, self._automatic = tuple(feedback), Ledger(patience), automatic
        self._schema, self._patience, self._dry_run = schema, patience, dry_run
        self._names = feedback_names(self.feedback)
        self._steps: FedSteps | None = None
        self._module: weakref.ref[LightningModule] | None = None
        self._seed: int | None = None
        self._place = (0, 0)
        self._sampler: Any = None
        self._is_first_epoch = True
        self._is_told = False
        self._left_out: list[Feedback] = []  # of automatic feedback, for this training data
        self._marks: set[str] = set()  # token sets that validation has

    @property
    def _samples(self) -> list[Feedback]:
        """Feedback that steers the sampler, unless it was withdrawn or left out."""
        found = [each for each in self.feedback if type(each).bind_sampler is not Feedback.bind_sampler]
        return [each for each in found if not each.withdrawn and each not in self._left_out]

    def _choose(self, trainer: Trainer) -> None:
        """Correct shares once: by the sampler, where the data has one that knows groups, else in the loss.

        What already corrects classes in the loss goes on doing so: even cells would correct them a second time.
        """
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        in_loss = [feedback for feedback in self.feedback if isinstance(feedback, ClassReweighting)]
        samples = isinstance(sampler, DynamicDistributedSampler) and sampler.has_groups
        samples = samples and not any(feedback.corrects for feedback in in_loss)
        choice = [*in_loss, *(feedback for feedback in self.feedback if isinstance(feedback, Resampling))]
        self._left_out = [feedback for feedback in choice if isinstance(feedback, Resampling) != samples]
        for feedback in choice:
            feedback.hold(self._dry_run or feedback in self._left_out)

    def start(self, trainer: Trainer, module: LightningModule, seed: int) -> list[Callable[[], None]]:
        """Bind the feedback for a new run, and return what ends its part in training steps.

        A further run of the module of the last one continues it: ledger, trials and withdrawals stay.

        Args:
            trainer: The Trainer.
            module: The module that trains.
            seed: Of the random numbers of this run, the same on all processes.

        Raises:
            MisconfigurationException: If a feedback does not find what it needs.
        """
        self._seed, self._sampler, self._is_told, self._left_out = seed, None, False, []
        if self.feedback and not module.automatic_optimization:
            raise MisconfigurationException(
                "`BiasMonitor` with feedback needs automatic optimization. Use the losses in your own "
                "`training_step` instead."
            )
        continues = self.knows(module)
        if not continues:
            self.ledger = Ledger(self._patience)
        for feedback in self.feedback:
            feedback.hold(self._dry_run)  # first: a module that is only looked at stays as it is
            if not continues:
                feedback.reinstate()
        if len(self._samples) > 1:
            raise MisconfigurationException(
                "Two feedbacks steer one sampler and would undo each other: keep one `Resampling`."
            )
        for feedback in self.feedback:
            with misconfigured():
                feedback.bind(module)
        self._module = weakref.ref(module)
        taking_part = [feedback for feedback in self.feedback if isinstance(feedback, StepFeedback)]
        self._steps = None
        if not taking_part:
            return []
        rank = trainer.global_rank
        failures = FedFailures(self._enter, self._automatic, trainer.world_size, self._expects)
        seeds = lambda: (self._seed or 0, rank)  # noqa: E731
        self._steps = FedSteps(module, taking_part, self._schema, lambda: self._place, seeds, failures)
        return [tap_step(module, "training_step", self._steps.tap)]

    def knows(self, module: LightningModule) -> bool:
        """Whether the last run trained this very module."""
        return self._module is not None and self._module() is module

    def start_training(self, trainer: Trainer) -> None:
        """Hand over the optimisers and the sampler, once there are any."""
        for feedback in self.feedback:
            with misconfigured():
                feedback.bind_optimizers(trainer.optimizers)
        self._is_first_epoch = True
        loop = trainer.fit_loop
        if loop.restarted_mid_epoch or getattr(loop, "restarted_on_epoch_end", False):
            self.start_epoch(trainer)  # Lightning leaves the hook of this epoch's start out

    def start_epoch(self, trainer: Trainer) -> None:
        """Hand over the sampler; a Trainer may have built its loader anew."""
        if not self.feedback:
            return
        with misconfigured():
            if self._automatic:
                self._choose(trainer)
            # where none is steered it is looked at only: a sampler of one's own corrects as well
            steered = self._samples
            self._sampler = training_sampler(trainer) if steered else getattr(trainer.train_dataloader, "sampler", None)
            for feedback in steered:
                feedback.bind_sampler(self._sampler)
        if self._is_first_epoch and not self._dry_run:
            restart_loader(trainer)
        self._is_first_epoch = False

    def start_step(self, step: int, batch_index: int) -> None:
        """Say which step comes next."""
        self._place = (step, batch_index)

    def answer(
        self, report: BiasReport, measured: Mapping[str, float], *, act: bool, note: str | None
    ) -> dict[str, list[Action]]:
        """Ask every feedback, judge it, and enter it into the ledger.

        Args:
            report: What was found; the same on all processes.
            measured: What models are selected by.
            act: ``False`` enters the report alone.
            note: What the reader should know of this validation.

        Returns:
            What each feedback did, by its name.
        """
        self._marks |= {*report.reliance, *report.attention}
        actions: dict[str, list[Action]] = {}
        for name, feedback in zip(self._names, self.feedback, strict=True):
            if not act or feedback.withdrawn or feedback in self._left_out:
                continue
            # nobody has to read of what waits for marks that there are not
            is_idle = self._automatic and isinstance(feedback, StepFeedback) and not self._expects(feedback)
            first = [] if is_idle else self.ledger.first_action(name, feedback)
            made = [*first, *_applied(feedback, report)]
            useless = None if self._dry_run else self.ledger.useless(name, feedback, report)
            if useless is not None:
                feedback.withdraw()
                made = [useless]
            if made:
                actions[name] = made
        twice = self._corrected_twice(report) if actions else None
        if twice is not None and not self._is_told:
            self._is_told = True
            rank_zero_warn(twice)
        notes = " ".join(text for text in (note, twice) if text) or None
        self.ledger.add(report, measured, actions, dry_run=self._dry_run, time=time.time(), note=notes)
        return actions

    def _expects(self, feedback: StepFeedback) -> bool:
        """Tell whether validation has the marks that it acts on, so that training should have them as well."""
        return bool(self._marks) if feedback.region is None else feedback.region in self._marks

    def _enter(self, feedback: Feedback, text: str) -> None:
        self.ledger.add_between(self._names[self.feedback.index(feedback)], Action(text))

    def _corrected_twice(self, report: BiasReport) -> str | None:
        module = self._module() if self._module else None
        return None if module is None else corrected_twice(self._sampler, module, report)

    def mean_terms(self, trainer: Trainer) -> dict[str, float]:
        """Return the mean loss term of each feedback since the last call; every process must call it."""
        return {} if self._steps is None else self._steps.means(trainer.strategy, trainer.is_last_batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the feedback, the ledger and the seed."""
        states = [feedback.state_dict() for feedback in self.feedback]
        return {"feedback": states, "ledger": self.ledger.state_dict(), "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a checkpoint left off."""
        states = state.get("feedback", ())
        if len(states) != len(self.feedback):
            rank_zero_warn(
                f"`BiasMonitor` has {len(self.feedback)} feedback, the checkpoint the state of {len(states)}."
            )
        for feedback, own in zip(self.feedback, states, strict=False):
            feedback.load_state_dict(own)
        ledger = state.get("ledger", {})
        self.ledger.load_state_dict(ledger if isinstance(ledger, Mapping) else {"entries": ledger})
        self._seed = state.get("seed", self._seed)


@contextmanager
def misconfigured() -> Iterator[None]:
    """Name what is wrong with the set-up as the Trainer's users know it."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise MisconfigurationException(message(error)) from error


def _applied(feedback: Feedback, report: BiasReport) -> list[Action]:
    made: Any = feedback.apply(report)
    if not isinstance(made, Sequence) or isinstance(made, str):
        raise MisconfigurationException(
            f"`{type(feedback).__name__}.apply` must return a list of `Action`, empty without one, got {made!r}."
        )
    return list(made)

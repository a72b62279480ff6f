"""BiasMonitor: measure bias at each validation, hand it to feedback, measure what that changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from attn_callbacks._checks import at_least
from attn_callbacks._lightning import Callback, MisconfigurationException, rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.bias import BiasReport
from attn_callbacks.callbacks._arguments import ArgumentsOnly
from attn_callbacks.callbacks._bias_log import log_report
from attn_callbacks.callbacks._bias_sensor import BiasSensor, MissingPartError
from attn_callbacks.callbacks._guidance import tap_guidance
from attn_callbacks.callbacks._loggers import run_folder
from attn_callbacks.callbacks._steps import StepTap, tap_step
from attn_callbacks.feedback import AttentionGuidance, Feedback

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["BiasMonitor"]


class BiasMonitor(ArgumentsOnly, Callback):
    """Find out after each validation which classes and groups a model fails, and let ``feedback`` act on it.

    Without feedback an observer: training is bit-identical with and without it. **With feedback it changes training.**

    Counts predictions for each class and, where the schema has groups, for each group; measures how much attention
    falls on ``relevance`` and ``spurious`` tokens. From that it makes a :class:`~attn_callbacks.bias.BiasReport`
    (:attr:`report`), logs ``bias/worst_class_recall``, ``bias/worst_group_accuracy``, ``bias/gap`` and
    ``bias/accuracy`` so that ``ModelCheckpoint`` can monitor them, a confusion picture and a text summary, and adds a
    line to ``attention/bias.jsonl`` in the run's folder. Then each feedback gets the report; what it did is in
    :attr:`ledger`. The state of the feedback is part of a checkpoint.

    Reads the first validation loader. Validation steps run eagerly while attention is measured or logits are missing
    from their output.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches.
        feedback: What to do about bias, such as ``ClassReweighting()`` and ``AttentionGuidance(loss)``.
        classes: Names of the classes.
        groups: Names of the groups, in the order of their numbers.
        layers: Attention modules whose mass is measured; ``None`` takes all.
        rows: Query rows looked at in each sequence.
        min_support: Samples below which nothing is concluded about a class or group.

    Raises:
        ValueError: If a number is below 1.
        MisconfigurationException: In ``setup``, if a feedback does not find what it needs in the module or the module
            optimises manually; in validation, if logits or labels are missing and there is feedback.

    Example:
        >>> from attn_callbacks import ClassReweighting
        >>> BiasMonitor(feedback=[ClassReweighting()], classes=("ham", "spam")).feedback
        (ClassReweighting(criterion='criterion', by='class'),)
    """

    def __init__(
        self,
        schema: BatchSchema | None = None,
        feedback: Sequence[Feedback] = (),
        classes: Sequence[str] = (),
        groups: Sequence[str] = (),
        layers: Sequence[str] | None = None,
        rows: int = 64,
        min_support: int = 20,
    ) -> None:
        self.schema = schema or BatchSchema()
        self.feedback = tuple(feedback)
        self.classes, self.groups = tuple(classes), tuple(groups)
        self.layers = None if layers is None else tuple(layers)
        self.rows = at_least("rows", rows, 1)
        self.min_support = at_least("min_support", min_support, 1)
        self.report: BiasReport | None = None
        self.ledger: list[dict[str, Any]] = []
        self._removes: list[Callable[[], None]] = []
        self._watching = self._fitting = False
        self._sensor = self._new_sensor()

    @property
    def state_key(self) -> str:
        """Tell monitors with different feedback apart."""
        return f"BiasMonitor[feedback={[type(feedback).__name__ for feedback in self.feedback]}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what the feedback needs and listen to the steps."""
        self._detach()
        self._fitting = stage == "fit"
        if self._fitting:
            self.report, self.ledger, self._sensor = None, [], self._new_sensor()
            self._bind(pl_module)
        if stage in ("fit", "validate"):
            self._attach(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what training was fed."""
        self._sensor.fed.add(self.schema, batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up what all processes were fed, so that the checkpoint of an epoch has all of it."""
        self._sensor.fed.gather(trainer.strategy)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._watching = bool(self._removes) and not trainer.sanity_checking
        self._sensor.reset(seed=trainer.global_step)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        if self._watching and dataloader_idx == 0:
            self._count(outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Conclude, feed back, log."""
        if self._watching:
            self._conclude(trainer)
        self._watching = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening; ``teardown`` does not run after an exception."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the feedback, what training was fed, and the ledger."""
        states = [feedback.state_dict() for feedback in self.feedback]
        return {"feedback": states, "fed": self._sensor.fed.state(), "ledger": self.ledger}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint left off."""
        for feedback, state in zip(self.feedback, state_dict.get("feedback", ()), strict=False):
            feedback.load_state_dict(state)
        if "fed" in state_dict:
            self._sensor.fed.load(state_dict["fed"])
        self.ledger = list(state_dict.get("ledger", ()))

    def _new_sensor(self) -> BiasSensor:
        return BiasSensor(self.schema, self.classes, self.groups, self.layers, self.rows, self.min_support)

    def _bind(self, module: LightningModule) -> None:
        if self.feedback and not module.automatic_optimization:
            raise MisconfigurationException(
                "`BiasMonitor` with feedback needs automatic optimization. Use the losses in your own "
                "`training_step` instead."
            )
        for feedback in self.feedback:
            try:
                feedback.bind(module)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from error
            if isinstance(feedback, AttentionGuidance):
                self._removes.append(tap_guidance(module, feedback, self.schema))

    def _attach(self, module: LightningModule) -> None:
        def around(batch: Any) -> AbstractContextManager[Any]:
            return self._sensor.watch(module, batch) if self._watching else nullcontext()

        self._removes.append(tap_step(module, "validation_step", StepTap(context=around)))

    def _detach(self) -> None:
        for remove in self._removes:
            remove()
        self._removes, self._watching = [], False

    def _count(self, outputs: Any, batch: Any) -> None:
        try:
            self._sensor.add(outputs, batch)
        except MissingPartError as error:
            if self.feedback:
                raise MisconfigurationException(str(error)) from error
            self._watching = False
            rank_zero_warn(f"`BiasMonitor` stays inert. {error}")

    def _conclude(self, trainer: Trainer) -> None:
        folder = run_folder(trainer)
        report = self._sensor.report(trainer.current_epoch, trainer.global_step, trainer.strategy)
        if report is None:
            return
        self.report = report
        acting = self.feedback if self._fitting else ()
        actions = [action for feedback in acting for action in feedback.apply(report)]
        self.ledger.append(_entry(report, actions))
        for name, value in _monitored(report):
            self.log(f"bias/{name}", value)
        if trainer.is_global_zero:
            log_report(trainer, report, actions, folder)


def _monitored(report: BiasReport) -> list[tuple[str, float]]:
    """What a user selects models by; always the same names."""
    values = [
        ("accuracy", report.accuracy),
        ("gap", report.gap),
        ("worst_class_recall", report.worst_class_recall),
    ]
    return [*values, ("worst_group_accuracy", report.worst_group_accuracy)] if report.has_groups else values


def _entry(report: BiasReport, actions: Sequence[str]) -> dict[str, Any]:
    values = {name: float(value) for name, value in _monitored(report)}
    return {"epoch": report.epoch, "step": report.step, **values, "actions": list(actions)}

"""BiasMonitor: measure bias at each validation, hand it to feedback, measure what that changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from attn_callbacks._checks import at_least, name_list
from attn_callbacks._lightning import MisconfigurationException, rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.bias import BiasReport
from attn_callbacks.callbacks._agreed import log_agreed, log_monitored
from attn_callbacks.callbacks._bias_log import log_report
from attn_callbacks.callbacks._bias_sensor import BiasSensor
from attn_callbacks.callbacks._guard import Guard, message
from attn_callbacks.callbacks._guidance import GuidedStep
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._steps import tap_step
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.feedback import AttentionGuidance, Feedback

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["BiasMonitor"]

_MONITORED = ("accuracy", "gap", "worst_class_recall", "worst_group_accuracy")


class BiasMonitor(ValidationObserver):
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
        TypeError: If ``classes``, ``groups`` or ``layers`` is a single string.
        MisconfigurationException: In ``setup``, if a feedback does not find what it needs in the module or the module
            optimises manually; in validation, if logits or labels are missing and there is feedback.

    Example:
        >>> from attn_callbacks import ClassReweighting
        >>> monitor = BiasMonitor(feedback=[ClassReweighting()], classes=("ham", "spam"))
        >>> monitor.classes, monitor.report is None
        (('ham', 'spam'), True)
    """

    _needs_logger = False  # the report and the feedback are there without one

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
        super().__init__(schema)
        self.feedback = _feedback_list(feedback)
        self.classes, self.groups = name_list("classes", classes), name_list("groups", groups)
        self.layers = None if layers is None else name_list("layers", layers)
        self.rows = at_least("rows", rows, 1)
        self.min_support = at_least("min_support", min_support, 1)
        self.report: BiasReport | None = None
        self.ledger: list[dict[str, Any]] = []
        self._recorder: QuietRecorder | None = None
        self._guided: list[GuidedStep] = []
        self._sensor = self._new_sensor()

    @property
    def state_key(self) -> str:
        """Tell monitors with different feedback apart."""
        return f"BiasMonitor[feedback={[type(feedback).__name__ for feedback in self.feedback]}]"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse feedback that would never come."""
        if self.feedback and not trainer.enable_validation:
            raise MisconfigurationException(
                "`BiasMonitor` with feedback needs validation, and this run has none. Give `fit` a validation loader, "
                "the module a `validation_step`, and leave `limit_val_batches` above 0."
            )
        super().on_fit_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what training was fed."""
        if not self._guard.off:
            with self._guarded():
                self._sensor.fed.add(self.schema, batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up over processes, so that the checkpoint of an epoch has all of what was fed."""
        self._sensor.fed.gather(trainer.strategy)
        self._log_guidance(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the feedback, what training was fed, and the ledger."""
        states = [feedback.state_dict() for feedback in self.feedback]
        return {"feedback": states, "fed": self._sensor.fed.state(), "ledger": self.ledger}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint left off."""
        states = state_dict.get("feedback", ())
        if len(states) != len(self.feedback):
            rank_zero_warn(
                f"`BiasMonitor` has {len(self.feedback)} feedback, the checkpoint the state of {len(states)}."
            )
        for feedback, state in zip(self.feedback, states, strict=False):
            feedback.load_state_dict(state)
        if "fed" in state_dict:
            self._sensor.fed.load(state_dict["fed"])
        self.ledger = list(state_dict.get("ledger", ()))

    def _new_sensor(self) -> BiasSensor:
        return BiasSensor(self.schema, self.classes, self.groups, self.rows, self.min_support)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._fitting:
            self.report, self.ledger, self._sensor = None, [], self._new_sensor()
            self._bind(module)
        self._writer = BackgroundWriter(Guard("The log of `BiasMonitor`"))  # feedback goes on without it
        self._monitored = dict.fromkeys((f"bias/{name}" for name in _MONITORED), float("nan"))
        self._recorder = QuietRecorder(
            module, self.layers, self._sensor.measure, Guard("The attention mass of `BiasMonitor`")
        )

    def _bind(self, module: LightningModule) -> None:
        if self.feedback and not module.automatic_optimization:
            raise MisconfigurationException(
                "`BiasMonitor` with feedback needs automatic optimization. Use the losses in your own "
                "`training_step` instead."
            )
        for feedback in self.feedback:
            with _misconfigured():
                feedback.bind(module)
            if isinstance(feedback, AttentionGuidance):
                self._guided.append(GuidedStep(module, feedback, self.schema))
                self._removes.append(tap_step(module, "training_step", self._guided[-1].tap))

    def _detach(self) -> None:
        super()._detach()
        self._recorder, self._guided = None, []
        self._sensor.reset()

    def _is_due(self, trainer: Trainer) -> bool:
        return True  # in the sanity check too: what is missing had better be known before an epoch of training

    def _begin(self, trainer: Trainer) -> None:
        self._sensor.reset(seed=trainer.global_step)

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        self._sensor.begin(batch)
        return self._sensor.listen(self._recorder) if self._recorder else nullcontext()

    def _add(self, outputs: Any, batch: Any) -> None:
        with self._guarded():
            self._sensor.add(outputs, batch)

    def _guarded(self) -> AbstractContextManager[None]:
        # with feedback, training would go on with feedback that knows nothing
        return _misconfigured() if self._fitting and self.feedback else super()._guarded()

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        report = None
        with self._guarded():
            report = self._sensor.report(
                trainer.current_epoch, trainer.global_step, trainer.strategy, failed=self._guard.off
            )
            if report is not None:
                self._conclude(report, trainer, module)
            elif not self._guard.off:
                rank_zero_warn("`BiasMonitor` concludes nothing: no validation batch was counted.")
        is_unwritten = report is not None and (self._writer.off or not self._fitting)
        log_monitored(trainer, module, self._monitored, logger=is_unwritten)

    def _conclude(self, report: BiasReport, trainer: Trainer, module: LightningModule) -> None:
        acting = self.feedback if self._fitting and not self._sensor.broken else ()
        actions = [action for feedback in acting for action in feedback.apply(report)]
        if self._sensor.broken:
            actions = [f"Nothing: {self._sensor.broken} samples have logits that are not finite and were left out."]
        self.report = report
        self.ledger.append(_entry(report, actions))
        self._monitored = {f"bias/{name}": value for name, value in _monitored(report).items()}
        if trainer.is_global_zero and not self._writer.off:
            # in `trainer.validate` Lightning writes them: what it returns is what it logs
            written = self._monitored if self._fitting else {}
            log_report(trainer, self._writer, self._folder, report, actions, written)

    def _log_guidance(self, trainer: Trainer, module: LightningModule) -> None:
        for number, guided in enumerate(self._guided):
            mean = guided.mean(trainer.strategy)
            if mean is not None:
                log_agreed(module, f"bias/guidance_{number}" if number else "bias/guidance", mean, logger=True)


def _feedback_list(feedback: Sequence[Feedback]) -> tuple[Feedback, ...]:
    if isinstance(feedback, Feedback):
        raise TypeError(f"`feedback` must be a list, got {feedback!r}. Pass [{feedback!r}].")
    for entry in feedback:
        if not isinstance(entry, Feedback):
            raise TypeError(
                "`feedback` must hold feedback such as `ClassReweighting()` or `AttentionGuidance(loss)`, "
                f"got {entry!r}."
            )
    return tuple(feedback)


@contextmanager
def _misconfigured() -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError) as error:
        raise MisconfigurationException(message(error)) from error


def _monitored(report: BiasReport) -> dict[str, float]:
    """What a user selects models by; always the same names."""
    names = _MONITORED if report.has_groups else _MONITORED[:-1]
    return {name: float(getattr(report, name)) for name in names}


def _entry(report: BiasReport, actions: Sequence[str]) -> dict[str, Any]:
    return {"epoch": report.epoch, "step": report.step, **_monitored(report), "actions": list(actions)}

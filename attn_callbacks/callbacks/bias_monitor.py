"""BiasMonitor: measure bias at each validation, hand it to feedback, measure what that changed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from attn_callbacks._checks import at_least, name_list
from attn_callbacks._lightning import MisconfigurationException, rank_zero_warn
from attn_callbacks.batch import BatchSchema
from attn_callbacks.bias import BiasReport
from attn_callbacks.callbacks._agreed import log_agreed, log_monitored
from attn_callbacks.callbacks._bias_log import log_report
from attn_callbacks.callbacks._bias_loop import BiasLoop, misconfigured
from attn_callbacks.callbacks._bias_names import MONITORED, feedback_list, is_sharded, monitored
from attn_callbacks.callbacks._bias_sensor import BiasSensor
from attn_callbacks.callbacks._guard import Guard
from attn_callbacks.callbacks._loggers import log_numbers
from attn_callbacks.callbacks._observer import ValidationObserver
from attn_callbacks.callbacks._watch import QuietRecorder
from attn_callbacks.callbacks._writer import BackgroundWriter
from attn_callbacks.feedback import Feedback, automatic_feedback

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["BiasMonitor"]


class BiasMonitor(ValidationObserver):
    """Find out after each validation which bias a model has, let ``feedback`` act on it, and measure what that did.

    Without feedback an observer: training is bit-identical with and without it. **With feedback it changes training.**

    Counts predictions for each class and, where the schema has groups, for each group; measures how much attention
    falls on ``relevance``, ``spurious`` and further token sets, what changes when a set holds what it holds in
    other samples (reliance), and which tokens or regions are looked at where the model is wrong. From that it makes
    a :class:`~attn_callbacks.bias.BiasReport` (:attr:`report`) with findings: class, group, feature or attention.
    It logs ``bias/worst_class_recall``, ``bias/worst_group_accuracy``, ``bias/gap`` and ``bias/accuracy`` so that
    ``ModelCheckpoint`` can monitor them, a confusion picture and a text summary, and adds a line to
    ``attention/bias.jsonl`` in the run's folder.

    Then each feedback gets the report and acts on findings of its kinds. Every decision is in :attr:`ledger`, and in
    ``attention/ledger.jsonl``, with its effect on the finding one validation later. What does not help within
    ``patience`` validations is withdrawn. The state of all that is part of a checkpoint.

    Reads one validation loader: keep another one to select models on, since feedback fits training to what it sees.
    Validation steps run eagerly while attention is measured or logits are missing from their output.

    Args:
        schema: Where a batch has what; the default reads ``(x, y)`` and Hugging Face batches.
        feedback: What to do about bias, such as ``[ClassReweighting(), MaskRandomization()]``; or ``"automatic"``: all
            that the module and the schema have the means for, see :func:`attn_callbacks.feedback.automatic_feedback`.
        classes: Names of the classes.
        groups: Names of the groups, in the order of their numbers.
        layers: Attention modules whose mass is measured; ``None`` takes all.
        rows: Query rows looked at in each sequence.
        min_support: Samples below which nothing is concluded about a class or group.
        patience: Validations after which feedback that has not helped is withdrawn; ``None``: never.
        dry_run: Decide everything, tell it, and do nothing: training is as without feedback.
        dataloader: Validation loader to read, by its index or, where loaders are a dict, by its name. That of any but
            the first is part of what is logged: ``bias/<dataloader>/accuracy``.
        reliance_batches: Validation batches, spread evenly, on which reliance is measured and unmarked tokens are
            looked at; the network runs on them twice, and once more for each token set. 0: none.
        tokenizer: Names the tokens that go along with errors; any object with ``convert_ids_to_tokens``.

    Raises:
        ValueError: If a number is out of its range.
        TypeError: If ``classes``, ``groups`` or ``layers`` is a single string, or ``feedback`` holds something else.
        MisconfigurationException: In ``setup``, if a feedback does not find what it needs in the module or the module
            optimises manually; in validation, if logits or labels are missing and there is feedback.

    Example:
        >>> from attn_callbacks import ClassReweighting
        >>> monitor = BiasMonitor(feedback=[ClassReweighting()], classes=("ham", "spam"))
        >>> monitor.classes, monitor.report is None, monitor.ledger
        (('ham', 'spam'), True, [])
    """

    _needs_logger = False  # the report and the feedback are there without one

    def __init__(
        self,
        schema: BatchSchema | None = None,
        feedback: Sequence[Feedback] | str = (),
        classes: Sequence[str] = (),
        groups: Sequence[str] = (),
        layers: Sequence[str] | None = None,
        rows: int = 64,
        min_support: int = 20,
        patience: int | None = 10,
        dry_run: bool = False,
        dataloader: int | str = 0,
        reliance_batches: int = 8,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(schema, dataloader=dataloader)
        self.feedback = "automatic" if feedback == "automatic" else feedback_list(feedback)
        self.classes, self.groups = name_list("classes", classes), name_list("groups", groups)
        self.layers = None if layers is None else name_list("layers", layers)
        self.rows = at_least("rows", rows, 1)
        self.min_support = at_least("min_support", min_support, 1)
        self.patience = None if patience is None else at_least("patience", patience, 1)
        self.dry_run = bool(dry_run)
        self.reliance_batches = at_least("reliance_batches", reliance_batches, 0)
        self.tokenizer = tokenizer
        self.report: BiasReport | None = None
        self._recorder: QuietRecorder | None = None
        self._sensor = self._new_sensor()
        self._loop = self._new_loop(() if isinstance(self.feedback, str) else self.feedback)

    @property
    def state_key(self) -> str:
        """Tell monitors of different loaders and with different feedback apart."""
        names = "automatic" if self.feedback == "automatic" else [type(each).__name__ for each in self.feedback]
        return f"BiasMonitor[dataloader={self.dataloader!r}, feedback={names}]"

    @property
    def _prefix(self) -> str:
        """What names of logged values begin with: those of several monitors differ."""
        return "bias" if self.dataloader == 0 else f"bias/{self.dataloader}"

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """One entry a validation: what was measured, and each decision with its finding and its effect."""
        return self._loop.ledger.entries

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse feedback that would never come."""
        if self._loop.feedback and not trainer.enable_validation:
            raise MisconfigurationException(
                "`BiasMonitor` with feedback needs validation, and this run has none. Give `fit` a validation loader, "
                "the module a `validation_step`, and leave `limit_val_batches` above 0."
            )
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand over optimisers and sampler."""
        self._loop.start_training(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand over the sampler: the loader may be new."""
        self._loop.start_epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say which step comes next."""
        self._loop.start_step(trainer.global_step, batch_idx)

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
        for name, mean in self._loop.mean_terms(trainer).items():
            log_agreed(pl_module, f"{self._prefix}/term/{name}", mean, logger=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the feedback, what training was fed, and the ledger."""
        return {**self._loop.state_dict(), "fed": self._sensor.fed.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint left off."""
        self._loop.load_state_dict(state_dict)
        if "fed" in state_dict:
            self._sensor.fed.load(state_dict["fed"])

    def _new_sensor(self) -> BiasSensor:
        return BiasSensor(
            self.schema, self.classes, self.groups, self.rows, self.min_support, self.reliance_batches, self.tokenizer
        )

    def _new_loop(self, feedback: Sequence[Feedback]) -> BiasLoop:
        automatic = self.feedback == "automatic"
        return BiasLoop(feedback, self.schema, self.patience, self.dry_run, automatic)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._fitting:
            self.report, self._sensor = None, self._new_sensor()
            if self.feedback == "automatic" and not self._loop.knows(module):
                self._loop = self._new_loop(automatic_feedback(module))
            seed = trainer.strategy.broadcast(torch.initial_seed())
            self._removes += self._loop.start(trainer, module, seed)
        self._writer = BackgroundWriter(Guard("The log of `BiasMonitor`"))  # feedback goes on without it
        self._monitored = dict.fromkeys((f"{self._prefix}/{name}" for name in MONITORED), float("nan"))
        self._recorder = QuietRecorder(
            module, self.layers, self._sensor.measure, Guard("The attention mass of `BiasMonitor`")
        )

    def _detach(self) -> None:
        super()._detach()
        self._recorder = None
        self._sensor.reset()

    def _is_due(self, trainer: Trainer) -> bool:
        return True  # in the sanity check too: what is missing had better be known before an epoch of training

    def _begin(self, trainer: Trainer) -> None:
        self._sensor.reset(seed=trainer.global_step)
        self._sensor.expect(trainer.lightning_module, self._batches(trainer), is_sharded(trainer))

    def _watch(self, batch: Any) -> AbstractContextManager[Any]:
        self._sensor.begin(batch)
        return self._sensor.listen(self._recorder, batch) if self._recorder else nullcontext()

    def _add(self, outputs: Any, batch: Any) -> None:
        with self._guarded():
            self._sensor.add(outputs, batch)

    def _guarded(self) -> AbstractContextManager[None]:
        # with feedback, training would go on with feedback that knows nothing
        return misconfigured() if self._fitting and self._loop.feedback else super()._guarded()

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._sensor.reset()
            return
        report, was_off = None, self._writer.off
        with self._guarded():
            report = self._sensor.report(trainer, failed=self._guard.off)
            if report is not None:
                self._conclude(report, trainer)
            elif not self._guard.off:
                rank_zero_warn("`BiasMonitor` concludes nothing: no validation batch was counted.")
        self._sensor.reset()  # sums, and batches kept to be run again
        # in a fit, Lightning would end the run if it were asked to write them in one validation and not in another
        log_monitored(trainer, module, self._monitored, logger=report is not None and not self._fitting)
        if report is not None and self._fitting and was_off and trainer.is_global_zero:
            log_numbers(trainer, self._monitored)

    def _conclude(self, report: BiasReport, trainer: Trainer) -> None:
        broken, note = self._sensor.broken, None
        if broken:
            note = f"Nothing was decided: {broken} samples have logits that are not finite and were left out."
        self.report = report
        measured = monitored(report)
        actions = self._loop.answer(report, measured, act=self._fitting and not broken, note=note)
        self._monitored = {f"{self._prefix}/{name}": value for name, value in measured.items()}
        if trainer.is_global_zero and not self._writer.off:
            # in `trainer.validate` Lightning writes them: what it returns is what it logs
            written = self._monitored if self._fitting else {}
            log_report(trainer, self._writer, self._folder, report, self._loop.ledger, actions, written, self._prefix)

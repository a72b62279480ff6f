"""Bad input: an observer says so once and the run goes on; feedback refuses what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import losses
from attn_callbacks import AttentionGuidance, AttentionHeatmaps, BatchSchema, BiasMonitor, ClassReweighting
from attn_callbacks._lightning import MisconfigurationException
from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback import Feedback
from tests.callbacks.models import Bert, Classifier, Texts, csv_logger, fit, pair_loader, quiet_trainer


class Changed(Texts):
    """Sentences with one field changed; ``None`` removes it."""

    def __init__(self, field: str, change: Callable[[Tensor], Any] | None, **options: Any) -> None:
        super().__init__(**options)
        self.field, self.change = field, change

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        value = row.pop(self.field)
        return row if self.change is None else {**row, self.field: self.change(value)}


class Plain(Classifier):
    """Does not care about groups."""

    def loss(self, batch: Any) -> Tensor:
        target = batch["labels"] if isinstance(batch, dict) else batch[1]
        return self.criterion(self(batch), target, class_weight=torch.ones(2))


def _guided() -> BiasMonitor:
    return BiasMonitor(feedback=[AttentionGuidance(losses.AttentionGuidedLoss())])


@pytest.mark.parametrize("change", [lambda group: group[None], lambda group: "north"], ids=["two axes", "strings"])
def test_groups_that_are_no_indices_switch_an_observer_off_once(
    tmp_path: Path, change: Callable[[Tensor], Any]
) -> None:
    trainer = quiet_trainer(tmp_path, [BiasMonitor()], max_epochs=1)
    data = DataLoader(Changed("group", change), 8)
    with pytest.warns(UserWarning, match="`BiasMonitor` is switched off.*`group`") as warned:
        fit(Plain(), trainer, data, data)
    assert trainer.global_step == 4
    assert sum("switched off" in str(w.message) for w in warned) == 1


def test_schema_function_that_fails_on_training_batches_switches_an_observer_off(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [BiasMonitor(BatchSchema(group=lambda batch: batch.group))], max_epochs=1)
    with pytest.warns(UserWarning, match="`BiasMonitor` is switched off.*AttributeError"):
        fit(Plain(), trainer, pair_loader(), pair_loader())
    assert trainer.global_step > 0


def test_guidance_without_marks_in_training_is_refused(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [_guided()], max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"saw no `relevance` or `spurious` in 4 training steps"):
        fit(Plain(), trainer, DataLoader(Changed("relevance", None), 8), DataLoader(Texts(), 8))


def test_guidance_with_marks_in_some_batches_goes_on(tmp_path: Path) -> None:
    class Some(Texts):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = super().__getitem__(index)
            return row if index < 8 else {name: value for name, value in row.items() if name != "relevance"}

    trainer = quiet_trainer(tmp_path, [_guided()], max_epochs=1)
    fit(Plain(), trainer, DataLoader(Some(), 8), DataLoader(Texts(), 8))
    assert trainer.callback_metrics["bias/term/AttentionGuidance"] > 0


def test_feedback_without_validation_is_refused(tmp_path: Path) -> None:
    monitor = BiasMonitor(feedback=[ClassReweighting(by="group")])
    trainer = quiet_trainer(tmp_path, [monitor], limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match="needs validation, and this run has none"):
        fit(Plain(), trainer)


def test_observer_without_validation_says_so(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [AttentionHeatmaps()], limit_val_batches=0, logger=csv_logger(tmp_path))
    with pytest.warns(UserWarning, match="`AttentionHeatmaps` looks at validation, of which this run has none"):
        fit(Plain(), trainer)


def test_logits_that_are_not_finite_are_no_predictions_and_nothing_is_fed_back(tmp_path: Path) -> None:
    class Diverging(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            logits = self(batch).detach().clone()
            logits[:3] = torch.nan
            return {"logits": logits}

    class Counting(Feedback):
        applied = 0

        def apply(self, report: BiasReport) -> tuple[str, ...]:
            self.applied += 1
            return ("acted",)

    feedback = Counting()
    monitor = BiasMonitor(feedback=[feedback])
    data = DataLoader(Texts(), 8), DataLoader(Texts(16), 8)
    fit(Classifier(), quiet_trainer(tmp_path, [BiasMonitor(feedback=[feedback])]), *data)
    assert feedback.applied == 1
    fit(Diverging(), quiet_trainer(tmp_path, [monitor]), *data)
    assert feedback.applied == 1
    assert monitor.report is not None
    assert int(monitor.report.support.sum()) == 10
    assert monitor.ledger[-1]["decisions"] == []
    assert "6 samples have logits that are not finite" in monitor.ledger[-1]["note"]


def test_heat_maps_of_batches_of_unknown_size_say_what_to_do(tmp_path: Path) -> None:
    def own_keys(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"feat": torch.stack([row[0] for row in rows]), "klass": torch.stack([row[1] for row in rows])}

    class OwnKeys(Classifier):
        def loss(self, batch: Any) -> Tensor:
            return self.criterion(self((batch["feat"],)), batch["klass"], class_weight=torch.ones(2))

    loader = DataLoader(pair_loader().dataset, 8, collate_fn=own_keys)
    with pytest.warns(UserWarning, match=r"number of samples in the batch is not known.*BatchSchema\(inputs"):
        fit(OwnKeys(), quiet_trainer(tmp_path, [AttentionHeatmaps()], logger=csv_logger(tmp_path)), loader, loader)


def test_arguments_of_a_wrong_kind_are_told_at_once() -> None:
    with pytest.raises(TypeError, match="`schema` must be a `BatchSchema`, got 'labels'"):
        BiasMonitor(schema="labels")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`feedback` must be a list"):
        BiasMonitor(feedback=ClassReweighting())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`feedback` must hold feedback such as `ClassReweighting\(\)`"):
        BiasMonitor(feedback=[losses.AttentionGuidedLoss()])  # type: ignore[list-item]


def test_state_of_other_feedback_is_noticed() -> None:
    monitor = BiasMonitor(feedback=[ClassReweighting()])
    with pytest.warns(UserWarning, match="`BiasMonitor` has 1 feedback, the checkpoint the state of 0"):
        monitor.load_state_dict({"feedback": [], "ledger": []})


def test_long_padded_text_is_pooled_without_its_padding(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    class Spy(AttentionHeatmaps):
        def _map(self, call: Any, sample: Any) -> Any:
            found = super()._map(call, sample)
            shapes.append(found[0].shape)
            assert found[0].sum(-1).min() > 0.99  # padding would be rows of zeros
            return found

    class HalfPadded(Texts):
        def __init__(self) -> None:
            super().__init__(8)
            self.attention_mask[:, 5:] = 0

    data = DataLoader(HalfPadded(), 8)
    trainer = quiet_trainer(tmp_path, [Spy(samples=1, max_tokens=4)], logger=csv_logger(tmp_path))
    fit(Classifier(Bert()), trainer, data, data)
    assert set(shapes) == {(2, 2, 2)}  # 5 of 10 tokens fill 2 of 4 buckets

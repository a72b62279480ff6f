"""A validation that says nothing is left out, and the next one is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attn_callbacks import ErrorAnalysis, HeadImportance
from tests.callbacks.models import Bert, Classifier, Texts, csv_logger, fit, quiet_trainer


class BrokenAtFirst(Classifier):
    """Gives NaN for every sample in epoch 0."""

    def forward(self, batch: Any) -> Any:
        return super().forward(batch) * (float("nan") if self.current_epoch == 0 and not self.training else 1.0)


def test_importance_goes_on_after_a_validation_without_a_loss(tmp_path: Path) -> None:
    importance = HeadImportance(batches=1)
    with pytest.warns(UserWarning, match="leaves this validation out. The loss of every sample is NaN"):
        fit(BrokenAtFirst(), quiet_trainer(tmp_path, [importance], logger=csv_logger(tmp_path), max_epochs=2))
    assert importance.result is not None
    assert importance.result.epoch == 1


def test_errors_go_on_after_a_validation_without_an_answer(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    errors = ErrorAnalysis(samples=1)
    fit(BrokenAtFirst(), quiet_trainer(tmp_path, [errors], logger=csv_logger(tmp_path), max_epochs=2))
    assert not [each for each in recwarn if "switched off" in str(each.message)]
    assert errors.result is not None
    assert errors.result.epoch == 1
    assert int(errors.result.samples.sum()) == 16


def test_a_sample_without_tokens_may_be_the_worst(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    texts = Texts(16, seed=1)
    texts.attention_mask[::2] = 0
    errors = ErrorAnalysis(samples=16)
    data = torch.utils.data.DataLoader(texts, 8)
    fit(Classifier(Bert()), quiet_trainer(tmp_path, [errors], logger=csv_logger(tmp_path)), validation=data)
    assert not [each for each in recwarn if "switched off" in str(each.message)]
    assert len(errors.result.worst) == 16

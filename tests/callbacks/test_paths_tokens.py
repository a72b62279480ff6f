"""Whose tokens a path is about: those of the batch, or those of a decoder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from attn_callbacks import AttentionPaths
from tests.callbacks.models import Classifier, csv_logger, loader, pl, quiet_trainer
from tests.callbacks.test_attention_paths import NextToken, NextTokenSteps


class Translator(pl.LightningModule):
    """Reads six source words and six words of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.net = nn.Embedding(30, 16), nn.Transformer(16, 2, 2, 2, 32, batch_first=True, dropout=0.0)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        later = nn.Transformer.generate_square_subsequent_mask(6)
        states = self.net(self.embed(batch["input_ids"]), self.embed(batch["read"]), tgt_mask=later, tgt_is_causal=True)
        return {"logits": F.linear(states, self.embed.weight)[:, -1]}


def batches() -> DataLoader[Any]:
    rows = [{"input_ids": torch.arange(6) + 10, "read": torch.arange(6) + 20, "labels": 0} for _ in range(2)]
    return DataLoader(rows, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "labels"),
    [(["net.encoder.*"], ["10", "11", "12"]), (["net.decoder.layers.*.self_attn"], ["0", "1", "2"])],
)
def test_a_decoder_has_no_words_of_the_source(layers: list[str], labels: list[str], tmp_path: Path) -> None:
    paths = AttentionPaths(samples=1, layers=layers, token=-1)
    trainer = quiet_trainer(tmp_path, [paths], logger=csv_logger(tmp_path))
    trainer.validate(Translator(), batches(), verbose=False)
    assert list(paths.result.samples[0].labels[:3]) == labels


@pytest.mark.parametrize(("token", "told"), [(0, 1), (-1, 0), (None, 0)])
def test_a_token_that_sees_itself_alone_is_told_once(token: int | None, told: int, tmp_path: Path) -> None:
    paths = AttentionPaths(samples=2, token=token)
    trainer = quiet_trainer(tmp_path, [paths], logger=csv_logger(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(NextTokenSteps(NextToken()), loader(8), verbose=False)
    assert len([each for each in caught if "sees itself alone" in str(each.message)]) == told
    assert paths.result is not None


def test_a_token_that_sees_others_is_not_told(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    quiet_trainer(tmp_path, [AttentionPaths(samples=2)]).validate(Classifier(), loader(8), verbose=False)
    assert not [each for each in recwarn if "sees itself alone" in str(each.message)]

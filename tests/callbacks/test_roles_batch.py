"""Which rows, tokens and masks a head is scored by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_callbacks import BatchSchema
from attn_callbacks.callbacks._roles_batch import RoleReader
from attn_callbacks.callbacks.head_roles import HeadRoles
from attn_callbacks.capture import AttentionCall
from attn_callbacks.functional.roles import ROLES
from tests.callbacks.models import HEADS, LAYERS, Bert, Classifier, fit, loader, quiet_trainer

TOKENS = torch.tensor([[3, 4, 3, 4, 3, 4, 3, 4]] * 2)


def reader(rows: int = 128) -> RoleReader:
    found = RoleReader(BatchSchema(), (), (), None, rows)
    assert found.read({"input_ids": TOKENS}, 0) == 2
    return found


def recorded(**options: Any) -> AttentionCall:
    weights = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return AttentionCall("layer", recorded=weights / weights.sum(dim=-1, keepdim=True), **options)


def has_duplicates(own: RoleReader, call: AttentionCall) -> bool:
    score: Tensor = own.scores(call, own.maps(call)).score
    return not bool(score[..., ROLES.index("duplicate")].isnan().all())


def test_the_rows_are_the_same_every_time(tmp_path: Path) -> None:
    roles = HeadRoles(rows=4, clusters=False)
    fit(Classifier(Bert(), lr=0.0), quiet_trainer(tmp_path, [roles], max_epochs=2), loader(8), loader(16, seed=1))
    assert torch.equal(roles.drift, torch.zeros(LAYERS, HEADS, dtype=torch.float64))


def test_all_layers_show_the_same_rows() -> None:
    own = reader(rows=3)
    first, second = own.maps(recorded()), own.maps(recorded())
    assert first.positions.shape == (2, 3)
    assert torch.equal(first.positions, second.positions)


def test_a_decoder_alone_reads_the_tokens_of_the_batch() -> None:
    assert has_duplicates(reader(), recorded(is_causal=True))
    assert has_duplicates(reader(), recorded())


def test_a_decoder_behind_an_encoder_has_tokens_of_its_own() -> None:
    assert not has_duplicates(reader(), recorded(is_causal=True, is_decoder=True))


def test_a_key_counts_that_any_head_may_see() -> None:
    """Recorded weights show their mask by what is above zero, head by head."""
    weights = torch.zeros(1, 2, 4, 4)
    weights[:, 0, :, 0], weights[:, 1, :, :2] = 1.0, 0.5
    own = RoleReader(BatchSchema(), (), (), None, 128)
    own.read({"input_ids": TOKENS[:1, :4]}, 0)
    found = own.maps(AttentionCall("layer", recorded=weights))
    assert found.allowed.shape == (1, 1, 4, 4)
    assert found.allowed[0, 0].tolist() == [[True, True, False, False]] * 4

"""AttentionHeatmaps: which samples, which maps, which labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_callbacks import AttentionCall, AttentionHeatmaps, BatchSchema
from attn_callbacks.callbacks import attention_heatmaps
from attn_callbacks.callbacks._layers import known_tokens, maps_per_sample, samples_of
from attn_callbacks.callbacks._samples import Sample, patch_grid, read_samples
from tests.callbacks.models import (
    HEADS,
    LAYERS,
    LENGTH,
    Bert,
    Classifier,
    Texts,
    Vit,
    csv_logger,
    fit,
    loader,
    pair_loader,
    pl,
    quiet_trainer,
)

NAME = "net.bert.bert.encoder.layer.{}.attention.self"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was handed to the renderer."""
    calls: list[dict[str, Any]] = []
    render = attention_heatmaps.attention_heads

    def spy(maps: np.ndarray, **options: Any) -> Any:
        calls.append({"maps": maps, **options})
        return render(maps, **options)

    monkeypatch.setattr(attention_heatmaps, "attention_heads", spy)
    return calls


class Words:
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{number}" for number in ids]


def test_maps_are_the_models_own_without_padding(drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    module = Classifier(Bert(dropout=0.3), lr=0.05)
    module.tokenizer = Words()
    trainer = quiet_trainer(tmp_path, [AttentionHeatmaps(samples=10)], logger=csv_logger(tmp_path), max_epochs=1)
    fit(module, trainer, validation=loader(32, seed=1, batch_size=8))
    assert len(drawn) == 10 * LAYERS

    eager = Bert("eager")
    eager.load_state_dict(module.net.state_dict())
    data = Texts(32, seed=1)
    with torch.no_grad():
        maps = eager.eval().bert.bert(data.input_ids[:10], data.attention_mask[:10], output_attentions=True).attentions
    shown = {entry["title"]: entry for entry in drawn}
    assert data.attention_mask[:10].min() == 0
    for sample in range(10):
        tokens = int(data.attention_mask[sample].sum())
        words = [f"w{number}" for number in data.input_ids[sample, :tokens].tolist()]
        for layer in range(LAYERS):
            entry = shown[f"{NAME.format(layer)}, sample {sample}, epoch 0"]
            np.testing.assert_allclose(entry["maps"], maps[layer][sample, :, :tokens, :tokens], atol=1e-5)
            assert entry["row_labels"] == entry["column_labels"] == words


def test_a_layer_copies_once_to_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copied: list[int] = []
    inside: list[int] = []
    copy = torch.Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        copied.append(tensor.numel())
        with torch._C.DisableTorchFunction():  # the mode that listens would call this once more
            return copy(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)

    class Look(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            inside.extend(copied)  # what follows is Lightning taking down the model

    callbacks = [AttentionHeatmaps(samples=3, max_tokens=4), Look()]
    fit(Classifier(Bert()), quiet_trainer(tmp_path, callbacks, logger=csv_logger(tmp_path)))
    assert inside == [3 * (HEADS * 4 * 4 + 2 * LENGTH)] * LAYERS  # what is drawn, and which tokens are padding


def test_samples_and_colour_scale_are_the_same_in_every_epoch(drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [AttentionHeatmaps(samples=2)], logger=csv_logger(tmp_path), max_epochs=3)
    fit(Classifier(lr=0.1), trainer)
    labels = [entry["row_labels"] for entry in drawn if "layers.0" in entry["title"]]
    assert labels[0] == labels[2] == labels[4]
    assert labels[1] == labels[3] == labels[5] != labels[0]
    assert {entry["high"] for entry in drawn} == {1.0}  # sixteen keys or fewer
    peaks = [entry["maps"].max() for entry in drawn]
    assert max(peaks) > 1.2 * min(peaks)  # a scale of their own would have shown them alike


def test_long_sequences_are_pooled_and_keep_their_sums(drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [AttentionHeatmaps(samples=1, max_tokens=4)], logger=csv_logger(tmp_path))
    fit(Classifier(Bert()), trainer)
    assert [entry["maps"].shape for entry in drawn] == [(HEADS, 4, 4)] * LAYERS
    assert drawn[0]["row_labels"] is None
    sums = drawn[0]["maps"].sum(-1)
    np.testing.assert_allclose(sums[:, :3], 1.0, atol=1e-5)  # the last bucket may be all padding


def test_class_token_is_laid_over_the_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[np.ndarray, np.ndarray, str]] = []
    render = attention_heatmaps.overlay

    def keep(image: np.ndarray, map: np.ndarray, title: str) -> Any:
        seen.append((image, map, title))
        return render(image, map, title=title)

    monkeypatch.setattr(attention_heatmaps, "overlay", keep)
    module = Classifier(Vit())
    trainer = quiet_trainer(tmp_path, [AttentionHeatmaps(samples=1)], logger=csv_logger(tmp_path))
    fit(module, trainer, pair_loader(16, images=True), pair_loader(8, seed=1, images=True))
    image, relevance, title = seen[-1]
    assert title == "net.encoder.layers.1.self_attn, sample 0, epoch 0"
    assert image.shape == (16, 16, 3)
    assert (image.min(), image.max()) == (0.0, 1.0)
    assert relevance.shape == (4, 4)
    assert 0 < relevance.sum() < 1  # the class token keeps some attention for itself


def test_fewer_samples_than_asked_for(drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [AttentionHeatmaps(samples=50, layers=["*.1.*"])], logger=csv_logger(tmp_path))
    fit(Classifier(), trainer, validation=loader(12, seed=1))
    assert [entry["title"].split(", ")[1] for entry in drawn] == [f"sample {number}" for number in range(12)]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(197, (14, 14, 1)), (196, (14, 14, 0)), (198, (14, 14, 2)), (201, (14, 14, 5)), (7, None)],
)
def test_patch_grid(tokens: int, expected: tuple[int, int, int] | None) -> None:
    assert patch_grid(tokens, 1.0) == expected


def test_patch_grid_of_an_image_that_is_not_square() -> None:
    assert patch_grid(1 + 8 * 14, 8 / 14) == (8, 14, 1)


def test_read_samples_reads_text_as_it_comes() -> None:
    batch = {"tokens": [["a", "b"], ["c"]], "labels": torch.tensor([0, 1])}
    samples = read_samples(BatchSchema(tokens="tokens"), batch, None, 5)
    assert [sample.tokens for sample in samples] == [("a", "b"), ("c",)]
    assert samples[0].labels(torch.tensor([False, True])) == ["b"]
    assert samples[0].labels(torch.tensor([True] * 7)) is None


def test_grey_images_are_stretched_to_colours() -> None:
    images = torch.tensor([-2.0, 2.0]).view(1, 1, 1, 2)
    (sample,) = read_samples(BatchSchema(), {"pixel_values": images}, None, 1)
    assert sample.image.tolist() == [[[0.0] * 3, [1.0] * 3]]
    assert sample.numbered(3) == Sample(3, None, sample.image)


def call(valid: Tensor | None = None, **options: Any) -> AttentionCall:
    tokens = torch.zeros(2, 1, 3, 4)
    mask = None if valid is None else valid[:, None, None]
    return AttentionCall("attention", query=tokens, key=tokens, mask=mask, **options)


def test_known_padding_joins_what_the_mask_shows() -> None:
    batch = torch.tensor([[True, True, False], [True, True, True]])
    mask = torch.tensor([[True, True, True], [False, True, True]])
    assert known_tokens(call(mask), batch).key_valid.tolist() == [[True, True, False], [False, True, True]]
    assert known_tokens(call(mask), batch).query_valid.tolist() == [[True, True, False], [False, True, True]]
    assert known_tokens(call(mask), None).key_valid.tolist() == mask.tolist()


@pytest.mark.parametrize("options", [{"is_cross": True}, {"is_decoder": True, "is_causal": True}])
def test_known_padding_is_not_that_of_a_decoder(options: dict[str, bool]) -> None:
    batch = torch.tensor([[True, True, False], [True, True, True]])
    assert known_tokens(call(**options), batch).key_valid.all()


def test_known_padding_counts_in_a_decoder_alone() -> None:
    batch = torch.tensor([[True, True, False], [True, True, True]])
    assert known_tokens(call(is_causal=True), batch).key_valid.tolist() == batch.tolist()


def test_known_padding_of_another_length_is_ignored() -> None:
    assert known_tokens(call(), torch.zeros(2, 5, dtype=torch.bool)).key_valid.all()


@pytest.mark.parametrize(("batch", "samples", "expected"), [(8, 8, 1), (8, 2, 4), (8, 3, 0), (2, 8, 0), (8, None, 0)])
def test_maps_per_sample(batch: int, samples: int | None, expected: int) -> None:
    assert maps_per_sample(batch, samples) == expected


def test_windows_of_a_sample_are_averaged() -> None:
    values = torch.tensor([[1.0], [torch.nan], [3.0], [5.0]])
    mean, weight = samples_of(values, torch.tensor([1, 2, 3, 4]), 2)
    assert (mean.tolist(), weight.tolist()) == ([[1.0], [4.0]], [3, 7])
    assert samples_of(values, torch.arange(4), 3)[0] is values

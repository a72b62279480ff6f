"""HeadStatistics against plain numpy on the eager attention of a Hugging Face model, over a padded validation set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attn_callbacks import HeadStatistics
from attn_callbacks.functional import STATISTICS
from tests.callbacks.models import (
    HEADS,
    LAYERS,
    LENGTH,
    Bert,
    Classifier,
    TextEncoder,
    csv_logger,
    fit,
    loader,
    quiet_trainer,
)

SAMPLES = 26  # the last batch is smaller


def sample_statistics(weights: np.ndarray, scores: np.ndarray, tokens: int) -> dict[str, float]:
    """The statistics of one head on one sample, row by row, from the definitions."""
    rows: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for i in range(tokens):
        row = weights[i, :tokens]
        entropy = -sum(p * np.log(p) for p in row if p > 0)
        rows["entropy"].append(entropy)
        rows["entropy_normalised"].append(entropy / np.log(tokens))
        rows["confidence"].append(row.max())
        rows["distance"].append(sum(p * abs(i - j) for j, p in enumerate(row)))
        rows["long_range_mass"].append(sum(p for j, p in enumerate(row) if abs(i - j) > 0.25 * tokens))
        rows["self_mass"].append(row[i])
        rows["first_mass"].append(row[0])
        rows["max_logit"].append(scores[i, :tokens].max())
        if i > 0:
            rows["previous_mass"].append(row[i - 1])
        if i < tokens - 1:
            rows["next_mass"].append(row[i + 1])
    return {name: max(values) if name == "max_logit" else np.mean(values) for name, values in rows.items()}


@torch.no_grad()
def reference(state: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Statistics ``(samples, layers, heads, statistics)`` and number of tokens of each sample."""
    eager = Bert("eager")
    eager.load_state_dict(state)
    eager.eval()
    found, lengths = [], []
    for batch in loader(SAMPLES, seed=1, batch_size=SAMPLES):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        output = eager.bert.bert(ids, mask, output_attentions=True, output_hidden_states=True)
        for sample in range(SAMPLES):
            lengths.append(int(mask[sample].sum()))
            per_layer = []
            for layer in range(LAYERS):
                attention = eager.bert.bert.encoder.layer[layer].attention.self
                hidden = output.hidden_states[layer][sample]
                query = attention.query(hidden).view(LENGTH, HEADS, -1).transpose(0, 1)
                key = attention.key(hidden).view(LENGTH, HEADS, -1).transpose(0, 1)
                scores = (query @ key.mT / query.shape[-1] ** 0.5).double().numpy()
                weights = output.attentions[layer][sample].double().numpy()
                heads = [sample_statistics(weights[h], scores[h], lengths[-1]) for h in range(HEADS)]
                per_layer.append([[head[name] for name in STATISTICS] for head in heads])
            found.append(per_layer)
    return np.array(found), np.array(lengths)


@pytest.fixture(scope="module")
def run_of_three(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[tuple[HeadStatistics, HeadStatistics, HeadStatistics], np.ndarray, np.ndarray]:
    """Of all rows, from some rows, and exact beside some rows; what they should be."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    statistics = HeadStatistics(), HeadStatistics(rows=4), HeadStatistics(rows=4, mode="exact")
    module = Classifier(Bert(dropout=0.1), lr=0.05)  # attention that is not uniform any more
    fit(module, quiet_trainer(folder, statistics, logger=csv_logger(folder)), validation=loader(SAMPLES, seed=1))
    return statistics, *reference(module.net.state_dict())


@pytest.fixture(scope="module")
def measured(run_of_three: Any) -> tuple[HeadStatistics, np.ndarray, np.ndarray]:
    (statistics, _, _), values, lengths = run_of_three
    return statistics, values, lengths


def test_means_are_those_over_all_rows(measured: tuple[HeadStatistics, np.ndarray, np.ndarray]) -> None:
    statistics, values, lengths = measured
    assert lengths.min() < LENGTH  # there is padding
    expected = np.average(values, axis=0, weights=lengths)
    expected[..., -1] = values[..., -1].max(axis=0)
    np.testing.assert_allclose(statistics.result.mean.numpy(), expected, rtol=2e-5, atol=2e-6)
    assert (statistics.result.samples == SAMPLES).all()
    assert statistics.layer_names == tuple(f"net.bert.bert.encoder.layer.{n}.attention.self" for n in range(LAYERS))


def test_exact_mode_takes_all_rows(run_of_three: Any) -> None:
    (whole, sampled, exact), values, lengths = run_of_three
    expected = np.average(values, axis=0, weights=lengths)
    expected[..., -1] = values[..., -1].max(axis=0)
    np.testing.assert_allclose(exact.result.mean.numpy(), expected, rtol=2e-5, atol=2e-6)
    assert not torch.allclose(sampled.result.mean, whole.result.mean, rtol=1e-3)
    errors = exact.result.standard_error.numpy(), whole.result.standard_error.numpy()
    np.testing.assert_allclose(*errors, rtol=1e-3, atol=1e-6)


def test_standard_errors_take_samples_as_independent(measured: tuple[HeadStatistics, np.ndarray, np.ndarray]) -> None:
    statistics, values, lengths = measured
    mean = np.average(values, axis=0, weights=lengths)
    weight = lengths[:, None, None, None]
    spread = (weight**2 * (values - mean) ** 2).sum(axis=0) / weight.sum() ** 2
    expected = np.sqrt(SAMPLES / (SAMPLES - 1) * spread)
    expected[..., -1] = np.nan
    np.testing.assert_allclose(statistics.result.standard_error.numpy(), expected, rtol=1e-3, atol=1e-6)


def test_medians_are_within_a_bin(measured: tuple[HeadStatistics, np.ndarray, np.ndarray]) -> None:
    statistics, values, _ = measured
    np.testing.assert_allclose(statistics.result.median.numpy(), np.median(values, axis=0), rtol=0.05, atol=0.01)


def run(folder: Path, **options: Any) -> HeadStatistics:
    torch.manual_seed(0)
    statistics = HeadStatistics(**options)
    fit(Classifier(), quiet_trainer(folder, [statistics], logger=csv_logger(folder)), validation=loader(32, seed=1))
    return statistics


def test_sampled_rows_estimate_all_rows(tmp_path: Path) -> None:
    exact, sampled = run(tmp_path / "exact"), run(tmp_path / "sampled", rows=4)
    other = run(tmp_path / "other", rows=4, seed=1)
    index = [STATISTICS.index(name) for name in ("entropy", "confidence", "distance", "self_mass")]
    difference = (exact.result.mean - sampled.result.mean)[..., index].abs()
    assert difference.max() > 0
    assert not torch.equal(sampled.result.mean, other.result.mean)
    # four of at most ten rows of 32 samples: the error of sampling is of the order of the standard error
    assert (difference < 6 * exact.result.standard_error[..., index] + 0.05 * exact.result.mean[..., index].abs()).all()
    assert torch.equal(exact.result.samples, sampled.result.samples)


class Diagonal(TextEncoder):
    """Every token looks at itself."""

    def hidden(self, tokens: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        own = 30 * torch.eye(LENGTH).expand(len(tokens), 1, -1, -1)
        torch.nn.functional.scaled_dot_product_attention(own, own, own)
        return self.embed(tokens)


def test_sampled_rows_keep_their_positions(tmp_path: Path) -> None:
    statistics = HeadStatistics(rows=4)
    fit(Classifier(Diagonal()), quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path)))
    found = dict(zip(STATISTICS, statistics.result.mean[0, 0].tolist(), strict=True))
    expected = {"self_mass": 1.0, "confidence": 1.0, "distance": 0.0, "entropy": 0.0, "previous_mass": 0.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_every_n_batches_looks_at_every_nth(tmp_path: Path) -> None:
    assert int(run(tmp_path, every_n_batches=3).result.samples.max()) == 16  # batches 0 and 3 of 4


def test_layers_are_selected(tmp_path: Path) -> None:
    statistics = run(tmp_path, layers=["net.encoder.layers.1"])
    assert statistics.layer_names == ("net.encoder.layers.1.self_attn",)
    assert statistics.result.mean.shape == (1, HEADS, len(STATISTICS))


@pytest.mark.parametrize(("epochs", "every", "expected"), [(3, 2, ["1"]), (4, 2, ["1", "3"]), (3, 1, ["0", "1", "2"])])
def test_every_n_epochs(epochs: int, every: int, expected: list[str], tmp_path: Path) -> None:
    statistics = HeadStatistics(every_n_epochs=every)
    trainer = quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path), max_epochs=epochs)
    fit(Classifier(), trainer, loader(8), loader(8))
    lines = (tmp_path / "run" / "attention" / "head_statistics.csv").read_text().splitlines()[1:]
    assert sorted({line.split(",")[0] for line in lines}) == expected
    assert int(statistics.result.samples.max()) == 8  # each validation counts for itself


def test_standalone_validation_is_always_looked_at(tmp_path: Path) -> None:
    statistics = HeadStatistics(every_n_epochs=5)
    trainer = quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path))
    trainer.validate(Classifier(), loader(8), verbose=False)
    assert statistics.result is not None


def test_a_layer_that_first_runs_later_is_counted(tmp_path: Path) -> None:
    class Growing(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch)
            if batch_idx:
                self(batch)  # a second forward of the module starts counting anew
                self.net(batch)  # one inside it does not

    statistics = HeadStatistics()
    fit(Growing(), quiet_trainer(tmp_path, [statistics], logger=csv_logger(tmp_path)), validation=loader(32, seed=1))
    names = [f"net.encoder.layers.{layer}.self_attn" for layer in range(LAYERS)]
    assert statistics.layer_names == (*names, *(f"{name}#1" for name in names))
    assert statistics.result.samples[:, 0, 0].tolist() == [32 + 24, 32 + 24, 24, 24]


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="`mode` must be 'sampled' or 'exact', got 'fast'"):
        HeadStatistics(mode="fast")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "`rows` must be at least 1, got 0"),
        ({"every_n_batches": 0}, "`every_n_batches` must be at least 1"),
        ({"every_n_epochs": 0}, "`every_n_epochs` must be at least 1"),
    ],
)
def test_numbers_below_one_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadStatistics(**options)


def test_a_single_string_is_no_list_of_layers() -> None:
    with pytest.raises(TypeError, match=r"`layers` must be a list of names, got 'encoder'. Pass \['encoder'\]"):
        HeadStatistics(layers="encoder")

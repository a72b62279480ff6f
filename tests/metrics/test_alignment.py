"""Alignment added up over batches and processes against loops, and without a look at any value."""

from __future__ import annotations

import copy
import json
import pickle
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_callbacks import AttentionRecorder
from attn_callbacks.functional.alignment_shape import ALIGNMENT_QUANTITIES
from attn_callbacks.metrics.alignment import AlignmentMetric, alignment_result
from tests.functional import alignment_reference as reference
from tests.functional.test_alignment import BATCH, HEADS, sample
from tests.metrics.merging import assert_equal, reduced
from tests.metrics.test_no_wait import layout


def filled(*seeds: int, method: str = "argmax") -> AlignmentMetric:
    metric = AlignmentMetric(2, HEADS + 1, method)
    for seed in seeds:
        weights, sure, possible, rows, columns = sample(seed)
        metric.update(1, weights, sure, possible, query_valid=rows, key_valid=columns)
    return metric


def loops(*seeds: int) -> np.ndarray:
    """``(samples, heads, quantities, 2)``"""
    found = []
    for seed in seeds:
        weights, *rest = sample(seed)
        for number in range(BATCH):
            others = [part[number].numpy() for part in rest]
            heads = [reference.ratios(weights[number, head].double().numpy(), *others) for head in range(HEADS)]
            found.append([list(head.values()) for head in heads])
    return np.array(found)


def test_sums_are_divided_at_the_end() -> None:
    result, expected = filled(0, 1, 2).compute(), loops(0, 1, 2)
    x, y = expected.sum(axis=0)[..., 0], expected.sum(axis=0)[..., 1]
    np.testing.assert_allclose(result.mean[1, :HEADS], x / y, rtol=1e-6)
    assert (result.samples[1, :HEADS].numpy() == (expected[..., 1] > 0).sum(axis=0)).all()
    assert result.mean[0].isnan().all()
    assert result.mean[1, HEADS].isnan().all()


def test_standard_errors_take_samples_as_independent() -> None:
    result, expected = filled(0, 1).compute(), loops(0, 1)
    x, y = expected[..., 0], expected[..., 1]
    ratio, count = x.sum(axis=0) / y.sum(axis=0), (y > 0).sum(axis=0)
    variance = ((x - ratio * y) ** 2).sum(axis=0) / y.sum(axis=0) ** 2 * count / (count - 1)
    np.testing.assert_allclose(result.standard_error[1, :HEADS], np.sqrt(variance), rtol=1e-5)
    assert alignment_result(AlignmentMetric(1, 1).moments).standard_error.isnan().all()


def test_standard_error_covers_the_true_rate_in_repeated_experiments() -> None:
    heads, samples, words = 1000, 30, 6  # every head is an experiment of its own
    right = torch.rand(samples, heads, words) < torch.rand(samples, heads, 1)  # words of a sample resemble one another
    weights = torch.stack([right, ~right], dim=-1).float()
    sure = torch.tensor([True, False]).expand(samples, words, 2)
    metric = AlignmentMetric(1, heads)
    metric.update(0, weights, sure)
    result = metric.compute()
    inside = (result.quantity("error_rate")[0] - 0.5).abs() < 1.96 * result.standard_error[0, :, 0]
    assert 0.9 < inside.double().mean() < 0.97


def test_two_processes_equal_one_on_the_union() -> None:
    parts = [filled(0, 2), filled(1)]
    whole = list(filled(0, 2, 1).compute()[:3])
    exact = [
        number for number, name in enumerate(ALIGNMENT_QUANTITIES) if name not in ("coverage_deviation", "confidence")
    ]
    for field, expected in zip(reduced(*parts).compute()[:3], whole, strict=True):
        assert_equal(field[..., exact], expected[..., exact])
        torch.testing.assert_close(field, expected, equal_nan=True, rtol=1e-12, atol=0)
    total = sum(part.packed(number, 2) for number, part in enumerate(parts))
    assert_equal(parts[0].merged(total, 2).compute()[0][..., exact], whole[0][..., exact])


def test_updates_read_no_value() -> None:
    metric = AlignmentMetric(2, HEADS).to("meta")
    before = layout(metric)
    arguments = [tensor.to("meta") for tensor in sample()]
    metric.update(1, *arguments[:3], query_valid=arguments[3], key_valid=arguments[4])
    assert layout(metric) == before


def test_best_head_has_the_lowest_error_rate() -> None:
    metric = AlignmentMetric(2, 2)
    eye, wrong = torch.eye(4), torch.eye(4).flip(0)
    sure = torch.eye(4, dtype=torch.bool)[None]
    metric.update(0, torch.stack([wrong, wrong])[None], sure)
    metric.update(1, torch.stack([wrong, 0.9 * eye + 0.025])[None], sure)
    result = metric.compute()
    assert result.best_head() == (1, 1)
    assert result.best_layer_error() == pytest.approx(0.5)
    assert alignment_result(AlignmentMetric(1, 1).moments).best_head() is None


def test_without_gold_the_most_confident_head_is_best() -> None:
    metric = AlignmentMetric(1, 2)
    metric.update(0, torch.stack([torch.full((3, 3), 1 / 3), torch.eye(3).flip(0)])[None])
    result = metric.compute()
    assert result.best_head() == (0, 1)
    assert result.quantity("error_rate").isnan().all()
    assert np.isnan(result.best_layer_error())
    assert result.quantity("confidence")[0].tolist() == pytest.approx([1 / 3, 1.0])


def test_result_is_plain_numbers() -> None:
    result = alignment_result(filled(0).moments, ("a", "b"))
    told = json.loads(json.dumps(result.to_dict()))
    assert told["layer_names"] == ["a", "b"]
    assert told["quantities"][0] == "error_rate"
    with pytest.raises(ValueError, match="`name` must be one of 'error_rate'"):
        result.quantity("loss")


def test_mutual_links_are_fewer() -> None:
    every, mutual = filled(0).compute(), filled(0, method="mutual").compute()
    recall = ALIGNMENT_QUANTITIES.index("recall")
    assert (mutual.mean[1, :HEADS, recall] < every.mean[1, :HEADS, recall]).any()


def test_inference_mode_pickling_and_reset() -> None:
    metric = AlignmentMetric(1, HEADS)
    with torch.inference_mode():
        metric.update(0, *sample(0)[:2])
        metric.reset()
    metric.update(0, *sample(1)[:2])
    for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
        assert_equal(twin.compute()[:3], metric.compute()[:3])
    assert metric.state_dict() == {}


def test_refusals() -> None:
    metric = AlignmentMetric(1, 2)
    with pytest.raises(ValueError, match="`layer` must lie between 0 and 0, got 1"):
        metric.update(1, torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match="`weights` must have at most 2 heads, got 3"):
        metric.update(0, torch.zeros(1, 3, 3, 3))
    with pytest.raises(ValueError, match="`method` must be one of"):
        AlignmentMetric(1, 1, "best")
    with pytest.raises(ValueError, match="`heads` must be at least 1"):
        AlignmentMetric(1, 0)


REACTIONS = {
    "CC(=O)Cl.NCC>>CC(=O)NCC": [0, 1, 2, 4, 5, 6],
    "CCCBr.OCC>>CCCOCC": [0, 1, 2, 4, 5, 6],
    "CC(C)(C)OC(=O)NCCO>>NCCO": [7, 8, 9, 10],
    "CC(=O)OCC.NC>>CC(=O)NC": [0, 1, 2, 6, 7],
}
"""Reactions, and the atom of the educts that each atom of the product is."""


def reaction_parts(reaction: str, origins: list[int]) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, which of them are atoms of the product and of the educts, and gold links."""
    tokens = ["[CLS]", *re.findall(r">>|Br|Cl|\S", reaction), "[SEP]"]
    atoms = [place for place, token in enumerate(tokens) if token.isalpha()]
    educts = [place for place in atoms if place < tokens.index(">>")]
    product = [place for place in atoms if place > tokens.index(">>")]
    rows, columns = torch.zeros(2, 1, len(tokens), dtype=torch.bool)
    rows[0, product] = columns[0, educts] = True
    sure = torch.zeros(1, len(tokens), len(tokens), dtype=torch.bool)
    sure[0, product, [educts[origin] for origin in origins]] = True
    return tokens, rows, columns, sure


def test_a_pretrained_model_of_reactions_knows_where_atoms_came_from() -> None:
    """ALBERT learned reactions as text; one of its heads maps atoms (Schwaller et al., Science Advances, 2021)."""
    transformers = pytest.importorskip("transformers")
    try:
        folder = distribution("rxnmapper").locate_file("rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k")
    except PackageNotFoundError:
        pytest.skip("the package `rxnmapper`, which carries the model, is not installed")
    vocabulary = (Path(str(folder)) / "vocab.txt").read_text("utf-8").splitlines()
    model = transformers.AlbertForMaskedLM.from_pretrained(folder, local_files_only=True).eval()
    metric = AlignmentMetric(12, 8)
    for reaction, origins in REACTIONS.items():
        tokens, rows, columns, sure = reaction_parts(reaction, origins)
        with torch.no_grad(), AttentionRecorder(model) as recorder:
            model(input_ids=torch.tensor([[vocabulary.index(token) for token in tokens]]))
        for layer, call in enumerate(recorder.calls):
            metric.update(layer, call.weights(), sure, query_valid=rows, key_valid=columns)
    result = metric.compute()
    error = result.quantity("error_rate")
    assert result.best_head()[1] == 5
    assert error[2:7, 5].max() < 0.05  # measured: 0
    assert error.median() > 0.7  # measured: 0.90
    assert error[2:7, 5].max() + 0.2 < error[:, [0, 1, 2, 3, 4, 6, 7]].min()

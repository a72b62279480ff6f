"""Roles added up over samples against a loop, over processes, and on a pretrained model."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch

from attn_callbacks.capture import AttentionRecorder
from attn_callbacks.functional.patterns import PatternScores
from attn_callbacks.functional.role_labels import ROLE_LABELS, label_roles
from attn_callbacks.functional.roles import ROLES, head_roles
from attn_callbacks.metrics.roles import HeadRolesMetric, HeadRolesResult
from tests.metrics.merging import reduced
from tests.metrics.test_no_wait import assert_updated_in_place


def batch(seed: int, samples: int = 6, heads: int = 3) -> PatternScores:
    """Scores in which some roles of some samples are undefined."""
    generator = torch.Generator().manual_seed(seed)
    score, chance, coverage = torch.rand(3, samples, heads, len(ROLES), generator=generator)
    undefined = torch.rand(score.shape, generator=generator) < 0.2
    score, chance = (field.masked_fill(undefined, torch.nan) for field in (score, chance / 2))
    return PatternScores(score, chance, coverage.masked_fill(undefined, 0.0))


def filled(*seeds: int, layers: int = 2, layer: int = 1) -> HeadRolesMetric:
    metric = HeadRolesMetric(layers, 3)
    for seed in seeds:
        metric.update(layer, batch(seed))
    return metric


def test_means_and_errors_match_a_loop() -> None:
    result = filled(0, 1, 2).compute()
    fields = [np.concatenate([batch(seed)[k].double().numpy() for seed in range(3)]) for k in range(3)]
    for h, r in np.ndindex(3, len(ROLES)):
        score, chance, coverage = (field[:, h, r] for field in fields)
        kept = ~np.isnan(score)
        score, chance, n = score[kept], chance[kept], kept.sum()
        strength = (score.mean() - chance.mean()) / (1 - chance.mean())
        rest = (score - chance) - strength * (1 - chance)
        expected = {
            "score": score.mean(),
            "standard_error": score.std(ddof=1) / np.sqrt(n),
            "chance": chance.mean(),
            "strength": strength,
            "strength_error": np.sqrt((rest**2).sum() / (n - 1) / n) / (1 - chance.mean()),
            "coverage": coverage.mean(),
            "samples": n,
        }
        found = {name: float(getattr(result, name)[1, h, r]) for name in expected}
        assert found == pytest.approx(expected, rel=1e-9)
    assert result.score[0].isnan().all()
    assert (result.labels().label[0] == -1).all()


def test_wins_are_the_labels_of_the_samples() -> None:
    metric = filled(0, 1)
    labels = torch.cat([label_roles(batch(seed)).label for seed in (0, 1)])
    expected = [[int((labels[:, h] == k).sum()) for k in range(len(ROLE_LABELS))] for h in range(3)]
    result = metric.compute()
    assert result.wins[1].tolist() == expected
    own = result.labels().label[1]
    assert result.agreement()[1].tolist() == pytest.approx([expected[h][own[h]] / 12 for h in range(3)])


def test_error_of_the_strength_covers_it_in_repeated_experiments() -> None:
    heads = 1000  # every head is an experiment of its own
    chance = torch.rand(30, heads, 1).expand(-1, -1, len(ROLES)) / 2
    score = chance + (1 - chance) * 0.4 + 0.1 * torch.randn(30, heads, len(ROLES))
    metric = HeadRolesMetric(1, heads)
    metric.update(0, PatternScores(score, chance, torch.ones_like(score)))
    result = metric.compute()
    inside = (result.strength - 0.4).abs() < 2.045 * result.strength_error
    assert 0.93 < inside.double().mean() < 0.97


def test_two_processes_equal_one_on_the_union() -> None:
    parts = reduced(filled(0, 2), filled(1, 3)).compute()
    union = filled(0, 1, 2, 3).compute()
    for name, field in union._asdict().items():
        if isinstance(field, torch.Tensor):
            torch.testing.assert_close(getattr(parts, name), field, rtol=1e-12, atol=1e-13, equal_nan=True)


def test_packed_states_are_the_union() -> None:
    shares = filled(0), filled(1)
    total = sum(metric.packed(process, 2) for process, metric in enumerate(shares))
    merged, union = shares[0].merged(total, 2).compute(), filled(0, 1).compute()
    torch.testing.assert_close(merged[:8], union[:8], rtol=1e-12, atol=1e-13, equal_nan=True)


def test_updates_inside_and_outside_of_inference_mode() -> None:
    metric = filled(0)
    with torch.inference_mode():
        metric.update(1, batch(1))
        metric.reset()
    metric.update(1, batch(2))
    torch.testing.assert_close(metric.compute()[:8], filled(2).compute()[:8], equal_nan=True)


def test_update_reads_no_value() -> None:
    fields = torch.ones(3, 4, 3, len(ROLES), device="meta")
    assert_updated_in_place(HeadRolesMetric(2, 3).to("meta"), 1, PatternScores(*fields))


def result_of(**arguments: object) -> HeadRolesResult:
    """A previous-token head, a uniform one and a missing one."""
    maps = torch.stack([torch.eye(9).roll(-1, dims=-1), torch.full((9, 9), 1 / 9)])
    metric = HeadRolesMetric(1, 3, **arguments)
    metric.update(0, head_roles(maps.expand(4, 2, 9, 9)))
    return metric.compute()


def test_description_shows_what_a_label_rests_on() -> None:
    result = result_of(layer_names=["encoder.0"])
    assert result.names() == [["previous", "uniform", ""]]
    assert result.describe() == [
        f"encoder.0 head {what}, 100% of 4 samples agree"
        for what in (
            "0: previous, strength 1.00 ± 0.00 (above 0.50), 89% of rows, margin 0.50",
            "1: uniform, strength 1.00 ± 0.00 (above 0.75), 100% of rows, margin 0.25",
        )
    ]
    assert "(above 0.60)" in result_of(thresholds={"previous": 0.6}).describe()[0]


def test_dict_is_plain() -> None:
    plain = json.loads(json.dumps(result_of().to_dict(), allow_nan=False))
    assert plain["labels"] == [["previous", "uniform", ""]]
    assert plain["thresholds"]["sink"] == 0.3
    assert plain["agreement"] == [[1.0, 1.0, None]]


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (2, (4, 3, len(ROLES)), "`layer` must lie between 0 and 1, got 2"),
        (0, (4, 4, len(ROLES)), "`scores` must have at most 3 heads, got 4. Raise `heads`"),
        (0, (4, 3), "`scores` must have 3 axes"),
        (0, (4, 3, 5), "`scores` must hold the 17 of `ROLES`, got 5"),
    ],
)
def test_what_does_not_fit_is_refused(layer: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadRolesMetric(2, 3).update(layer, PatternScores(*torch.ones(3, *shape)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "`layers` must be at least 1"),
        ({"layer_names": ("a", "b")}, "`layer_names` must name 1 layers, got 2"),
        ({"thresholds": {"x": 0.1}}, "`thresholds` must name roles, got 'x'"),
    ],
)
def test_wrong_argument_raises(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadRolesMetric(**{"layers": 1, "heads": 1, **arguments})


def measured(model, tokenizer, texts: list[str]) -> HeadRolesResult:
    metric = HeadRolesMetric(6, 12)
    texts = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    ids, valid = texts["input_ids"], texts["attention_mask"].bool()
    separator = ids == tokenizer.sep_token_id
    special = separator | (ids == tokenizer.cls_token_id)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(**texts)
    for layer, call in enumerate(recorder.calls):
        metric.update(layer, head_roles(call.weights(), ids, special=special, separator=separator, valid=valid))
    return metric.compute()


@pytest.mark.slow
def test_pretrained_model_has_well_known_heads_and_stable_labels() -> None:
    transformers = pytest.importorskip("transformers")
    data = pytest.importorskip("examples.sentiment_data")
    try:
        path, sentences = data.minilm(), [each.text for each in data.sentence_splits().test[:96]]
    except (FileNotFoundError, PackageNotFoundError):
        pytest.skip("MiniLM or the sentences are not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True).eval()
    halves = [measured(model, tokenizer, sentences[k::2]) for k in range(2)]
    for result in halves:
        assert result.names()[0][2] == "previous"
        assert result.strength[0, 2, ROLES.index("previous")] > 0.99
        assert result.names()[1][8] == "next"
        resting = result.strength[..., ROLES.index("special")] > 0.5  # on [CLS] and [SEP]
        assert resting.sum() >= 12
        assert not resting[0].any()  # only above the first layer
        assert (result.labels().label == ROLE_LABELS.index("sink")).sum() >= 30
    first, second = (result.labels() for result in halves)
    same = first.label == second.label
    assert same.double().mean() > 0.85
    clear = first.confidence > 0.1
    assert clear.sum() >= 10
    assert same[clear].all()  # a clear margin means a stable label

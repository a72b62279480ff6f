"""Clusters of heads: planted ones are found, whatever the order; chance is called chance."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from attn_callbacks.analysis._hierarchy import best_cut, cut, tree
from attn_callbacks.analysis.clusters import HeadClusters, cluster_heads
from attn_callbacks.analysis.head_distances import head_distances
from attn_callbacks.analysis.partitions import adjusted_rand_index
from attn_callbacks.functional.head_distance import head_distance

KINDS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
"""Which of three patterns each of eight planted heads has."""


def planted(samples: int = 6, tokens: int = 8, noise: float = 0.3, seed: int = 0) -> torch.Tensor:
    """Weights of heads that look at the token before, at themselves or at the first one, each with noise."""
    eye = torch.eye(tokens)
    patterns = torch.stack([eye.roll(-1, dims=-1), eye, torch.zeros_like(eye)])
    patterns[2, :, 0] = 1
    generator = torch.Generator().manual_seed(seed)
    blur = torch.rand(samples, len(KINDS), tokens, tokens, generator=generator)
    weights = patterns[KINDS] + noise * blur / blur.sum(dim=-1, keepdim=True)
    return weights / weights.sum(dim=-1, keepdim=True)


def on_a_line(*places: float) -> torch.Tensor:
    line = torch.tensor(places)
    return (line[:, None] - line).abs()


@pytest.mark.parametrize("method", ["ward", "average", "complete", "single"])
def test_planted_clusters_are_found(method: str) -> None:
    found = cluster_heads(head_distance(planted()), heads_per_layer=[3, 5], method=method)
    assert found.clusters == 3
    assert adjusted_rand_index(found.row_labels().numpy(), KINDS.numpy()) == 1
    assert found.labels.tolist()[0][3:] == [-1, -1]
    assert found.silhouette[0, 3:].isnan().all()
    assert found.mean_silhouette == pytest.approx(max(found.mean_silhouettes))
    assert found.mean_silhouette > 0.5
    assert found.mean_stability == 1
    assert found.heads[:4] == ((0, 0), (0, 1), (0, 2), (1, 0))
    assert found.labels[1, 0] == 0  # the largest cluster


def test_a_head_and_its_copy_are_redundant() -> None:
    weights = planted()
    weights[:, 4] = weights[:, 1]
    found = cluster_heads(head_distance(weights), redundant=0.01)
    (pair,) = found.redundant
    assert (pair.first, pair.second, pair.distance, pair.standard_error) == ((0, 1), (0, 4), 0.0, 0.0)
    assert found.labels[0, 1] == found.labels[0, 4]


def test_pairs_come_nearest_first_with_their_standard_error() -> None:
    distances = head_distance(planted())
    found = cluster_heads(distances, redundant=0.9)
    values = [pair.distance for pair in found.redundant]
    assert values == sorted(values)
    known = found.distances.triu(1)
    assert len(values) == ((known > 0) & (known < 0.9)).sum() > 3
    pair = found.redundant[0]
    squares = distances[:, pair.first[1], pair.second[1]].double().numpy() ** 2
    assert pair.distance == pytest.approx(squares.mean() ** 0.5)
    assert pair.standard_error == pytest.approx(squares.std(ddof=1) / 6**0.5 / 2 / squares.mean() ** 0.5)


def test_order_of_heads_does_not_matter() -> None:
    distances = head_distance(planted(noise=2.0))
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    found, shuffled = cluster_heads(distances), cluster_heads(distances[:, order][:, :, order])
    assert shuffled.clusters == found.clusters
    assert adjusted_rand_index(shuffled.labels[0].numpy(), found.labels[0, order].numpy()) == 1
    np.testing.assert_allclose(shuffled.mean_silhouettes, found.mean_silhouettes, rtol=1e-6)
    places, others = found.layout[0, order], shuffled.layout[0]
    torch.testing.assert_close(torch.cdist(others, others), torch.cdist(places, places), atol=1e-6, rtol=1e-5)


def test_the_tree_is_scipys_and_leaves_of_a_cluster_stand_together() -> None:
    from scipy.cluster.hierarchy import fcluster, is_valid_linkage

    found = cluster_heads(head_distance(planted()))
    linkage, labels = found.linkage.numpy(), found.row_labels().numpy()
    assert is_valid_linkage(linkage)
    assert adjusted_rand_index(fcluster(linkage, 3, "maxclust"), labels) == 1
    below = labels[found.order.numpy()]
    assert (np.diff(below) != 0).sum() == found.clusters - 1


def test_a_cut_makes_as_many_clusters_as_asked_also_of_ties() -> None:
    distances = 1 - np.eye(6)
    linkage, _ = tree(distances, "average")
    for clusters in range(1, 7):
        assert len(np.unique(cut(linkage, clusters))) == clusters
    assert best_cut(linkage, distances, 5)[0] == 1  # all as far apart as any: no cluster


def test_the_number_of_clusters_may_be_given() -> None:
    found = cluster_heads(on_a_line(0, 0.1, 0.5, 0.6, 1.0), clusters=2)
    assert (found.clusters, found.labels.max().item()) == (2, 1)
    one = cluster_heads(on_a_line(0, 0.1, 0.5), clusters=1)
    assert one.silhouette.isnan().all()
    assert np.isnan(one.mean_silhouette)


def test_one_matrix_knows_no_samples() -> None:
    found = cluster_heads(on_a_line(0, 0.1, 0.9, 1.0))
    assert np.isnan(found.mean_stability)
    assert found.standard_error.isnan().all()
    assert found.layout_share == pytest.approx(1)
    np.testing.assert_allclose(found.layout[0, :, 0].abs(), [0.5, 0.4, 0.4, 0.5], atol=1e-6)


def test_clusters_of_chance_are_unstable() -> None:
    logits = torch.randn(6, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    chance = cluster_heads(head_distance(logits.softmax(dim=-1)), clusters=4)
    assert chance.mean_stability < 0.7
    assert chance.mean_silhouette < 0.25
    again = cluster_heads(head_distance(logits.softmax(dim=-1)), clusters=4)
    assert torch.equal(again.stability, chance.stability)


def test_a_head_without_distances_is_left_out() -> None:
    distances = head_distance(planted())
    distances[:, 2] = distances[:, :, 2] = torch.nan
    distances[:, 2, 2] = 0
    found = cluster_heads(distances, heads_per_layer=[4, 4], layer_names=["a", "b"])
    assert found.labels[0, 2] == -1
    assert (0, 2) not in found.heads
    assert found.distances.shape == (7, 7)
    assert not found.distances.isnan().any()


def test_samples_that_miss_a_pair_do_not_hide_it() -> None:
    distances = head_distance(planted())
    distances[:5, 0, 1] = distances[:5, 1, 0] = torch.nan
    found = cluster_heads(distances)
    assert found.distances[0, 1].item() == pytest.approx(distances[5, 0, 1].item())
    assert found.standard_error[0, 1].isnan()


def test_agreement_of_two_epochs() -> None:
    first, second = (cluster_heads(head_distance(planted(seed=seed))) for seed in (0, 1))
    assert first.agreement(second) == 1
    apart = cluster_heads(on_a_line(*torch.linspace(0, 1, 8).tolist()), clusters=3)
    assert first.agreement(apart) < 0.5
    fewer = cluster_heads(head_distance(planted()[:, :5]))
    assert first.agreement(fewer) == 1


def test_a_dict_is_plain() -> None:
    found = cluster_heads(head_distance(planted()), heads_per_layer=[3, 5], layer_names=["a", "b"], redundant=0.9)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["layer_names"] == ["a", "b"]
    assert values["silhouette"][0][3] is None
    assert values["redundant"][0]["first"] == list(found.redundant[0].first)
    assert values["clusters"] == 3


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.cluster", None)
    with pytest.raises(ImportError, match=r"needs scipy. Install it with `attn-callbacks\[analysis\]`"):
        cluster_heads(on_a_line(0, 0.5, 1))


@pytest.mark.parametrize(
    ("distances", "options", "message"),
    [
        (torch.zeros(3, 4), {}, "must have shape"),
        (torch.zeros(0, 0), {}, "must have shape"),
        (torch.tensor([[0.0, 1.0], [0.5, 0.0]]), {}, "must be symmetric"),
        (-on_a_line(0, 1), {}, "at least 0"),
        (torch.full((3, 3), torch.nan), {}, "at least two of them"),
        (torch.tensor([[0.0, 1, 1], [1, 0, torch.nan], [1, torch.nan, 0]]), {}, "from every other in some sample"),
        (on_a_line(0, 1, 2), {"layer_names": ["a", "b"]}, "do not divide evenly"),
        (on_a_line(0, 1, 2), {"heads_per_layer": [1, 1]}, "add up to the 3 heads"),
        (on_a_line(0, 1, 2), {"clusters": 4}, "between 1 and the 3 known heads, got 4"),
        (on_a_line(0, 1, 2), {"method": "median"}, "`method` must be one of"),
        (on_a_line(0, 1, 2), {"most_clusters": 1}, "`most_clusters` must be at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(distances: torch.Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_heads(distances, **options)


@pytest.mark.slow
def test_heads_of_a_pretrained_model() -> None:
    transformers, data = pytest.importorskip("transformers"), pytest.importorskip("examples.sentiment_data")
    try:
        path, sentences = data.minilm(), [each.text for each in data.sentence_splits().test[:48]]
    except (FileNotFoundError, PackageNotFoundError):
        pytest.skip("MiniLM or the sentences are not installed")
    from attn_callbacks.capture import AttentionRecorder, call_name

    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True).eval()
    found: list[HeadClusters] = []
    for half in (sentences[:24], sentences[24:]):
        with AttentionRecorder(model) as recorder, torch.no_grad():
            model(**tokenizer(half, return_tensors="pt", padding=True))
        names = [call_name(call) for call in recorder.calls]
        found.append(cluster_heads(head_distances(recorder.calls), layer_names=names, clusters=6))
    assert found[0].labels.shape == (6, 12)
    assert found[0].agreement(found[1]) > 0.5  # other sentences, much the same clusters
    torch.testing.assert_close(found[0].distances, found[1].distances, atol=0.08, rtol=0)
    assert found[0].standard_error.max() < 0.03


def test_infinite_distances_are_refused() -> None:
    with pytest.raises(ValueError, match="`distances` must be finite"):
        cluster_heads(torch.full((2, 4, 4), torch.inf).tril(-1) + torch.full((2, 4, 4), torch.inf).triu(1))
    with pytest.raises(ValueError, match="`distances` must be finite"):
        cluster_heads(torch.full((4, 4), torch.inf))

"""The sampler: what it draws, alike in all processes, and what it keeps."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler

from attn_callbacks.feedback._drawing import draw_evenly, draw_independently
from attn_callbacks.feedback.sampler import DynamicDistributedSampler
from tests.feedback.checkpoint import saved
from tests.feedback.sampler_script import LABELS, SEED, train

LABEL = [0] * 12 + [1] * 6 + [2] * 2
GROUP = [0, 1, 1] * 6 + [0, 1]


def drawn(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def generator(seed):
    made = torch.Generator()
    made.manual_seed(seed)
    return made


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("size", "replicas"), [(20, 1), (20, 2), (20, 3), (2, 5), (7, 4)])
def test_equal_weights_give_an_ordinary_epoch(size, replicas, drop_last, shuffle):
    for rank in range(replicas):
        place = {"num_replicas": replicas, "rank": rank, "shuffle": shuffle, "seed": 4, "drop_last": drop_last}
        ours, torchs = DynamicDistributedSampler([0, 1] * size, **place), DistributedSampler(range(2 * size), **place)
        assert len(ours) == len(torchs)
        for epoch in (0, 1, 7):
            torchs.set_epoch(epoch)
            assert drawn(ours, epoch) == list(torchs)


@pytest.mark.parametrize("change", ["class", "cell", "sample", "rounding"])
def test_weights_that_are_all_alike_change_nothing(change):
    sampler = DynamicDistributedSampler(LABEL, groups=GROUP)
    before = drawn(sampler, 3)
    if change == "class":
        sampler.set_class_weights([0.3, 0.3, 0.3])
    elif change == "cell":
        sampler.set_cell_weights([[7.0, 7.0, 7.0], [7.0, 7.0, 7.0]])
    elif change == "sample":
        sampler.set_sample_weights([0.1] * len(LABEL))
    else:
        sampler.set_class_weights([1.0, 1.0 + 1e-15, 1.0])
    assert drawn(sampler, 3) == before


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("replicas", [2, 3, 7])
def test_the_shares_of_all_processes_are_the_draw_of_one(replicas, drop_last, replacement):
    def build(**place):
        sampler = DynamicDistributedSampler(
            LABEL, groups=GROUP, seed=2, drop_last=drop_last, replacement=replacement, **place
        )
        sampler.set_cell_weights([[1.0, 2.0, 3.0], [0.0, 0.5, 9.0]])
        return sampler

    shares = [drawn(build(num_replicas=replicas, rank=rank), 5) for rank in range(replicas)]
    assert len({len(share) for share in shares}) == 1
    together = [index for row in zip(*shares, strict=True) for index in row]
    whole = drawn(build(), 5)
    assert len(whole) == 20
    repeated = (whole + whole)[: len(together)]  # what does not divide evenly is dropped, or filled up from the front
    assert together == repeated
    assert len(together) == (20 // replicas if drop_last else math.ceil(20 / replicas)) * replicas


def test_independent_draws_are_those_of_numpy():
    weights = torch.tensor([0.0, 3.0, 0.5, 0.0, 2.0, 0.0])
    points = torch.rand(1000, dtype=torch.float64, generator=generator(9)).numpy()
    edges = np.cumsum(weights.double().numpy())
    expected = [next(i for i, edge in enumerate(edges) if edge > point * edges[-1]) for point in points]
    assert draw_independently(weights.double(), 1000, generator(9)).tolist() == expected


@pytest.mark.parametrize("replacement", [True, False])
def test_cells_are_drawn_by_their_weights(replacement):
    weights = np.array([[1.0, 2.0, 20.0], [0.0, 3.0, 5.0]])
    sampler = DynamicDistributedSampler(LABEL, groups=GROUP, num_samples=20_000, replacement=replacement)
    sampler.set_cell_weights(weights.tolist())
    each = np.array([weights[group, label] for group, label in zip(GROUP, LABEL, strict=True)])
    expected = 20_000 * each / each.sum()
    counts = np.bincount(drawn(sampler), minlength=len(LABEL))
    if replacement:
        some = expected > 0
        chi2 = ((counts - expected)[some] ** 2 / expected[some]).sum()
        assert chi2 < 35  # 13 degrees of freedom: p = 0.001
        assert chi2 > 3.0  # nor suspiciously even
    else:
        assert (np.abs(counts - expected) < 1).all()
    assert counts[expected == 0].sum() == 0
    np.testing.assert_allclose(sampler.weights.numpy(), each)
    shares = np.array([[each[(np.array(GROUP) == g) & (np.array(LABEL) == c)].sum() for c in range(3)] for g in (0, 1)])
    np.testing.assert_allclose(sampler.shares.numpy(), shares / each.sum())


def test_own_weights_of_samples_multiply_those_of_cells():
    sampler = DynamicDistributedSampler([0, 0, 1, 1], num_samples=8000)
    sampler.set_sample_weights([1.0, 3.0, 2.0, 0.0])
    assert sampler.natural_shares.tolist() == [[4 / 6, 2 / 6]]
    sampler.set_class_weights([1.0, 4.0])
    assert sampler.weights.tolist() == [1.0, 3.0, 8.0, 0.0]
    assert sampler.natural_shares.tolist() == [[4 / 6, 2 / 6]]
    assert sampler.shares.tolist() == [[4 / 12, 8 / 12]]
    counts = np.bincount(drawn(sampler), minlength=4)
    np.testing.assert_allclose(counts / 8000, np.array([1, 3, 8, 0]) / 12, atol=0.02)
    sampler.reset()
    assert drawn(sampler, 1) == drawn(DynamicDistributedSampler([0, 0, 1, 1], num_samples=8000), 1)


def test_class_weights_hold_in_all_groups():
    sampler = DynamicDistributedSampler(LABEL, groups=GROUP)
    sampler.set_class_weights(torch.tensor([1.0, 2.0, 3.0]))
    assert sampler.cell_weights.tolist() == [[1.0, 2.0, 3.0]] * 2
    assert sampler.counts.tolist() == [[4, 2, 1], [8, 4, 1]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=12).filter(lambda weights: sum(weights) > 0.1),
    st.integers(1, 40),
    st.integers(0, 10**6),
)
def test_even_draws_come_as_often_as_expected_rounded_up_or_down(weights, draws, seed):
    drawn = draw_evenly(torch.tensor(weights, dtype=torch.float64), draws, generator(seed))
    assert len(drawn) == draws
    expected = draws * np.array(weights) / math.fsum(weights)
    counts = np.bincount(drawn, minlength=len(weights))
    assert (counts >= np.floor(expected - 1e-6)).all()
    assert (counts <= np.ceil(expected + 1e-6)).all()


def test_even_draws_are_not_biased_by_position():
    weights = torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    counts = sum(draw_evenly(weights, 2, generator(seed)).bincount(minlength=4) for seed in range(1000))
    np.testing.assert_allclose(counts / 1000, [1 / 3, 1 / 3, 1 / 3, 1], atol=0.05)
    first = torch.stack([draw_evenly(weights, 6, generator(seed))[0] for seed in range(1000)]).bincount(minlength=4)
    np.testing.assert_allclose(first / 1000, [1 / 6, 1 / 6, 1 / 6, 1 / 2], atol=0.05)


@pytest.mark.parametrize("replacement", [True, False])
def test_a_point_at_the_very_end_draws_no_sample_of_weight_0(replacement, monkeypatch):
    def ones(*size, **arguments):
        return torch.full(size, 1.0, dtype=torch.float64)  # beyond what torch.rand gives: what rounding may make of it

    monkeypatch.setattr(torch, "rand", ones)
    draw = draw_independently if replacement else draw_evenly
    assert draw(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), 3, generator(0)).max() == 1


@pytest.mark.parametrize("draw", [draw_independently, draw_evenly])
def test_a_point_at_the_very_start_draws_no_sample_of_weight_0(draw, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **arguments: torch.zeros(size, dtype=torch.float64))
    assert draw(torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64), 3, generator(0)).tolist() == [2, 2, 2]


def test_even_draws_pair_any_samples():
    weights = torch.ones(4, dtype=torch.float64)
    pairs = {tuple(draw_evenly(weights, 2, generator(seed)).sort().values.tolist()) for seed in range(100)}
    assert len(pairs) == 6  # in their own order they would lie two apart


def test_more_samples_than_multinomial_can_draw_from():
    weights = torch.zeros(2**24 + 10, dtype=torch.float64)
    weights[-3:] = 1.0
    weights[5] = 1.0
    with pytest.raises(RuntimeError):
        weights.multinomial(1)
    drawn = draw_independently(weights, 400, generator(0))
    assert set(drawn.tolist()) == {5, 2**24 + 7, 2**24 + 8, 2**24 + 9}


def test_new_weights_act_from_the_next_epoch_on():
    sampler = DynamicDistributedSampler([0, 1] * 8, num_replicas=1, rank=0)
    ordinary = drawn(sampler)
    running = iter(sampler)
    begun = [next(running) for _ in range(3)]
    sampler.set_class_weights([0.0, 1.0])
    assert begun + list(running) == ordinary
    assert {index % 2 for index in sampler} == {1}


def test_epochs_and_seeds_differ():
    sampler = DynamicDistributedSampler([0, 1] * 50)
    sampler.set_class_weights([1.0, 2.0])
    other = DynamicDistributedSampler([0, 1] * 50, seed=100)
    other.set_class_weights([1.0, 2.0])
    draws = [drawn(sampler, 0), drawn(sampler, 1), drawn(other, 0)]
    assert all(draws[i] != draws[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    assert drawn(sampler, 0) == draws[0]
    assert torch.random.get_rng_state().equal(torch.manual_seed(0).get_state())  # nobody else's numbers are used


@pytest.mark.parametrize(("count", "size"), [(5, 5), (23, 23), (45, 45)])
def test_number_of_samples(count, size):
    sampler = DynamicDistributedSampler(LABEL, num_samples=count)
    ordinary = drawn(sampler)
    assert len(ordinary) == len(sampler) == size
    assert np.ptp(np.bincount(ordinary, minlength=20)) <= 1  # whole rounds, and part of one
    sampler.set_class_weights([1.0, 1.0, 9.0])
    assert len(drawn(sampler)) == size
    halves = [DynamicDistributedSampler(LABEL, num_samples=count, num_replicas=2, rank=rank) for rank in (0, 1)]
    assert [len(half) for half in halves] == [math.ceil(count / 2)] * 2


def test_processes_are_looked_up_anew(monkeypatch):
    sampler = DynamicDistributedSampler(LABEL)
    whole = drawn(sampler)
    assert (len(sampler), sampler.num_replicas, sampler.rank) == (20, 1, 0)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(distributed, "get_rank", lambda: 3)
    assert len(sampler) == 5
    assert list(sampler) == whole[3::4]
    fixed = DynamicDistributedSampler(LABEL, num_replicas=2, rank=1)
    assert list(fixed) == whole[1::2]
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    assert list(sampler) == whole


@pytest.mark.parametrize("own", [True, False])
def test_a_resumed_sampler_draws_the_same(own):
    def build():
        return DynamicDistributedSampler(LABEL, groups=GROUP, seed=5)

    straight, first, second = build(), build(), build()
    draws = []
    for sampler in (straight, first):
        sampler.set_cell_weights([[0.1, 1 / 3, 2.0], [1.0, 1e-3, 5.0]])
        if own:
            sampler.set_sample_weights(np.linspace(0.1, 2, 20))
    for epoch in range(4):
        draws.append(drawn(straight, epoch))
    drawn(first, 1)
    second.set_sample_weights([1.0] * 19 + [2.0])
    second.seed = 9
    second.load_state_dict(saved({"sampler": first.state_dict()})["sampler"])
    assert second.epoch == 1
    assert [drawn(second, epoch) for epoch in range(1, 4)] == draws[1:]
    assert torch.equal(second.weights, straight.weights)
    second.load_state_dict({})
    assert drawn(second, 3) == draws[3]


def test_a_copy_is_its_own():
    sampler = DynamicDistributedSampler(LABEL)
    sampler.set_class_weights([1.0, 2.0, 3.0])
    copied = pickle.loads(pickle.dumps(sampler))
    assert list(copied) == list(sampler)
    copied.set_class_weights([1.0, 0.0, 0.0])
    assert sampler.cell_weights.tolist() == [[1.0, 2.0, 3.0]]
    sampler.cell_weights.zero_()
    own = torch.ones(len(LABEL), dtype=torch.float64)
    sampler.set_sample_weights(own)
    own.zero_()
    assert float(sampler.weights.sum()) == 30
    state = sampler.state_dict()
    sampler.set_class_weights([1.0, 1.0, 1.0])
    assert state["cell_weights"].tolist() == [[1.0, 2.0, 3.0]]


def test_loader_without_lightning():
    sampler = DynamicDistributedSampler(torch.tensor(LABEL), num_replicas=2, rank=1)
    loader = DataLoader(torch.arange(20), 3, sampler=sampler, num_workers=0)
    assert len(loader) == 4
    assert torch.cat(list(loader)).tolist() == list(sampler)


def test_repr_says_what_is_in_it():
    assert repr(DynamicDistributedSampler(LABEL, groups=GROUP)) == (
        "DynamicDistributedSampler(20 samples, 2 groups x 3 classes, seed=0, drop_last=False, replacement=True, "
        "shuffle=True)"
    )


@pytest.mark.parametrize(
    ("labels", "arguments", "error", "text"),
    [
        ([], {}, ValueError, "`labels` must have one number a sample, got shape (0,)"),
        ([[0, 1]], {}, ValueError, "`labels` must have one number a sample, got shape (1, 2)"),
        ([0, -100], {}, ValueError, "`labels` must not be negative, got -100"),
        ([0.0, 1.0], {}, TypeError, "`labels` must hold integers, got torch.float32"),
        ([0, 1], {"groups": [0]}, ValueError, "`groups` must have one number a sample, got 1 for 2 `labels`"),
        ([0, 1], {"groups": [0, -1]}, ValueError, "`groups` must not be negative"),
        ([0, 1], {"num_samples": 0}, ValueError, "`num_samples` must be at least 1"),
        ([0, 1], {"num_replicas": 2, "rank": 2}, ValueError, "between 0 and `num_replicas` - 1 = 1, got 2"),
        ([0, 1], {"rank": 1}, ValueError, "`rank` must lie between"),
        ([0, 1], {"seed": 0.5}, TypeError, "`seed` must be an integer"),
    ],
)  # fmt: skip
def test_wrong_arguments(labels, arguments, error, text):
    with pytest.raises(error) as raised:
        DynamicDistributedSampler(labels, **arguments)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("method", "weights", "text"),
    [
        ("set_class_weights", [1.0, 1.0], "`weights` must have shape (classes,) = (3,), got (2,)"),
        ("set_cell_weights", [[1.0, 1.0, 1.0]], "`weights` must have shape (groups, classes) = (2, 3), got (1, 3)"),
        ("set_sample_weights", [1.0], "`weights` must have shape (samples,) = (20,), got (1,)"),
        ("set_class_weights", [1.0, -1.0, 1.0], "must be finite and not negative"),
        ("set_class_weights", [1.0, math.nan, 1.0], "must be finite and not negative"),
        ("set_class_weights", [1.0, math.inf, 1.0], "must be finite and not negative"),
        ("set_class_weights", [0.0, 0.0, 0.0], "nothing could be drawn"),
        ("load_state_dict", {"cell_weights": torch.ones(1, 3)}, "`cell_weights` must have shape"),
    ],
)
def test_wrong_weights_change_nothing(method, weights, text):
    sampler = DynamicDistributedSampler(LABEL, groups=GROUP)
    sampler.set_class_weights([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="weight") as raised:
        getattr(sampler, method)(weights)
    assert text in str(raised.value)
    assert sampler.cell_weights.tolist() == [[1.0, 2.0, 3.0]] * 2


def reference(replicas, rank):
    """What each epoch of the script has to be fed."""
    sampler = DynamicDistributedSampler(LABELS, seed=SEED, num_replicas=replicas, rank=rank)
    epochs = [drawn(sampler, 0)]
    for epoch in (1, 2):
        sampler.set_class_weights([1.0, 1.0 + epoch])
        epochs.append(drawn(sampler, epoch))
    return epochs


def test_lightning_keeps_it_and_tells_it_the_epoch(tmp_path):
    module = train(tmp_path, 1)
    assert module.kept == [True] * 3
    assert module.fed == reference(1, 0)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_under_lightning_are_fed_what_one_is(tmp_path):
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-m", "tests.feedback.sampler_script", str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=120,
        capture_output=True,
    )
    seen = [json.loads((tmp_path / f"2_{rank}.json").read_text()) for rank in (0, 1)]
    for rank in (0, 1):
        assert seen[rank]["kept"] == [True] * 3
        assert seen[rank]["fed"] == reference(2, rank)
    for epoch, whole in enumerate(reference(1, 0)):
        pairs = zip(seen[0]["fed"][epoch], seen[1]["fed"][epoch], strict=True)
        assert [index for pair in pairs for index in pair] == (whole + whole)[:38]

"""Stratified rows: every stratum is hit, nothing is preferred, and nobody else's random numbers move."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.functional import stratified_rows


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def left_padded(counts: list[int], queries: int) -> torch.Tensor:
    return torch.arange(queries) >= queries - torch.tensor(counts)[:, None]


def test_rows_one_from_every_stratum():
    valid = left_padded([64, 100, 17], 100)
    indices, taken = stratified_rows(valid, 16, seeded())
    assert indices.dtype == torch.int64
    assert indices.shape == taken.shape == (3, 16)
    assert taken.all()
    for rows, count in zip(indices.numpy(), (64, 100, 17), strict=True):
        rank = rows - (100 - count)  # among the valid queries
        edges = np.arange(17) * count / 16
        assert (rank >= np.floor(edges[:-1])).all()
        assert (rank < np.ceil(edges[1:])).all()


def test_rows_short_samples_give_each_query_once():
    valid = torch.tensor([[False, True, False, True, True], [True] * 5, [False] * 5])
    indices, taken = stratified_rows(valid, 5, seeded())
    assert indices[0, taken[0]].tolist() == [1, 3, 4]
    assert indices[1, taken[1]].tolist() == [0, 1, 2, 3, 4]
    assert not taken[2].any()
    assert (indices[~taken] == 0).all()


def test_rows_more_slots_than_queries():
    indices, taken = stratified_rows(torch.ones(1, 2, dtype=torch.bool), 4, seeded())
    assert indices[0, taken[0]].tolist() == [0, 1]
    assert taken.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("queries", [9, 13, 16, 50])
def test_rows_every_valid_query_is_equally_likely(queries):
    valid = torch.ones(20_000, queries, dtype=torch.bool)
    valid[:, 3] = False
    indices, taken = stratified_rows(valid, 8, seeded())
    assert taken.all()
    frequency = torch.bincount(indices.flatten(), minlength=queries) / len(valid)
    expected = 8 / (queries - 1)
    assert frequency[3] == 0
    kept = torch.arange(queries) != 3
    assert (frequency[kept] - expected).abs().max() < 5 * (expected / len(valid)) ** 0.5


def test_rows_estimate_is_unbiased_and_steadier_than_random_rows():
    profile = torch.log1p(torch.arange(200.0))  # entropy of causal attention grows like this
    indices, _ = stratified_rows(torch.ones(4000, 200, dtype=torch.bool), 16, seeded())
    means = profile[indices].mean(dim=1)
    random = profile[torch.randint(200, (4000, 16), generator=seeded(1))].mean(dim=1)
    assert (means.mean() - profile.mean()).abs() < 5 * means.std() / 4000**0.5
    assert means.std() < random.std() / 3


def test_rows_depend_on_the_seed_alone():
    valid = torch.ones(2, 40, dtype=torch.bool)
    first, again, other = (stratified_rows(valid, 8, seeded(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    stratified_rows(torch.ones(2, 40, dtype=torch.bool), 8, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_long_sequence_stays_in_range():
    valid = torch.zeros(1, 70_000, dtype=torch.bool)
    valid[0, 4_000:69_999] = True
    indices, _ = stratified_rows(valid, 64, seeded())
    assert valid[0, indices[0]].all()
    assert (indices[0].diff() > 0).all()


@pytest.mark.parametrize(
    ("valid", "rows", "message"),
    [(torch.ones(3), 2, "`valid` must have 2 axes"), (torch.ones(1, 3), 0, "`rows` must be at least 1, got 0")],
)
def test_rows_wrong_argument_raises(valid, rows, message):
    with pytest.raises(ValueError, match=message):
        stratified_rows(valid, rows, seeded())

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from losses.reliance.mask_randomization import MaskRandomization, randomize_masked


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(2, 6), st.integers(1, 4), st.sampled_from(["float", "bfloat16", "long", "int32"]), st.integers(0, 2**30)
)
def test_shuffle_takes_each_masked_value_from_another_sample_at_its_place(samples, size, dtype, seed):
    torch.manual_seed(seed)
    inputs = torch.arange(samples * size).reshape(samples, size).to(getattr(torch, dtype))  # all values differ
    mask = torch.rand(samples, size) < 0.5
    mixed = randomize_masked(inputs, mask)
    assert mixed.dtype == inputs.dtype
    for sample in range(samples):
        givers = set()
        for place in range(size):
            if not mask[sample, place]:
                assert mixed[sample, place] == inputs[sample, place]
                continue
            givers.add((inputs[:, place] == mixed[sample, place]).nonzero().item())
        assert len(givers) <= 1  # one other sample, so that the values belong together
        assert sample not in givers


def test_shuffle_uses_every_sample_once_and_all_alike():
    inputs, counts = torch.arange(4)[:, None], torch.zeros(4, 4)
    for _ in range(600):
        mixed = randomize_masked(inputs, torch.ones(4, 1))
        assert mixed.flatten().sort().values.tolist() == [0, 1, 2, 3]
        counts[torch.arange(4), mixed[:, 0]] += 1
    assert counts.diagonal().eq(0).all()
    assert (counts[~torch.eye(4, dtype=torch.bool)] / 600 - 1 / 3).abs().max() < 0.08


def test_a_batch_of_one_has_no_other_sample():
    inputs = torch.randn(1, 3)
    with pytest.warns(UserWarning, match="A batch of one has no other sample to take values from: nothing is replaced"):
        mixed = randomize_masked(inputs, torch.ones(1, 3))
    assert torch.equal(mixed, inputs)


@pytest.mark.parametrize("mode", ["shuffle", "uniform"])
def test_no_samples(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert randomize_masked(torch.zeros(0, 3), torch.zeros(0, 3), mode=mode).shape == (0, 3)


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((5, 4, 3), 2), ((5, 3, 4, 4), 1), ((5, 3, 2, 4, 4), 1)])
def test_uniform_stays_between_the_extremes_of_a_feature(shape, axis):
    inputs = torch.rand(shape).movedim(axis, -1) * torch.tensor([1.0, 10.0, 0.0]) + torch.tensor([0.0, 5.0, 7.0])
    inputs = inputs.movedim(-1, axis)
    mixed = randomize_masked(inputs, torch.ones([1] * len(shape)), mode="uniform")
    for feature in range(3):
        before, after = inputs.select(axis, feature), mixed.select(axis, feature)
        assert before.min() <= after.min()
        assert after.max() <= before.max()
    assert mixed.select(axis, 2).eq(7).all()
    assert mixed.select(axis, 0).unique().numel() == inputs.select(axis, 0).numel()


def test_uniform_fills_the_range():
    inputs = torch.tensor([[-1.0], [3.0]]).repeat(2000, 1)
    mixed = randomize_masked(inputs, torch.ones(1, 1), mode="uniform")
    assert abs(mixed.mean() - 1.0) < 0.1
    assert abs(mixed.std() - 4 / 12**0.5) < 0.1


def test_uniform_token_ids_skip_the_protected():
    tokens = torch.randint(2, 10, (50, 40))
    tokens[:, 0], tokens[:, -5:] = 0, 9
    mixed = randomize_masked(tokens, torch.ones(1, 40), mode="uniform", num_tokens=10, protected=(9, 0, 4))
    kept = (tokens == 0) | (tokens == 9) | (tokens == 4)
    assert torch.equal(mixed[kept], tokens[kept])
    counts = mixed[~kept].bincount(minlength=10) / (~kept).sum()
    assert counts[[0, 4, 9]].eq(0).all()
    assert (counts[[1, 2, 3, 5, 6, 7, 8]] - 1 / 7).abs().max() < 0.05


def test_shuffle_never_moves_a_protected_token():
    padded = torch.tensor([[0, 5, 6, 7, 8, 1], [0, 3, 1, 9, 9, 9]])  # 9 is padding, 0 the start, 1 the end
    for _ in range(30):
        mixed = randomize_masked(padded, torch.ones(2, 6), protected=(0, 1, 9))
        kept = (padded == 0) | (padded == 1) | (padded == 9)
        assert torch.equal(mixed[kept], padded[kept])
        assert not (torch.isin(mixed, torch.tensor([0, 1, 9])) & ~kept).any()
        assert mixed[0, 1] == 3  # what the other sample has
    seen = {randomize_masked(padded, torch.ones(2, 6), protected=(0, 1, 9))[0, 3].item() for _ in range(200)}
    assert seen == {3, 5, 6, 7, 8}  # beyond its end, any unprotected token of the batch


def test_only_protected_tokens_stay():
    tokens = torch.zeros(3, 4, dtype=torch.long)
    assert torch.equal(randomize_masked(tokens, torch.ones(3, 4), protected=(0,)), tokens)


def test_gradients_reach_what_was_kept_only():
    for mode in ("shuffle", "uniform"):
        inputs, mask = torch.randn(4, 3, 5, requires_grad=True), torch.rand(4, 3) < 0.5
        randomize_masked(inputs, mask, mode=mode).sum().backward()
        assert torch.equal(inputs.grad, (~mask).float()[:, :, None].expand(4, 3, 5))


def test_a_mask_without_channels():
    inputs, mask = torch.randn(3, 2, 4, 4), torch.rand(3, 4, 4) < 0.5
    torch.manual_seed(1)
    expected = randomize_masked(inputs, mask[:, None].expand(3, 2, 4, 4))
    torch.manual_seed(1)
    assert torch.equal(randomize_masked(inputs, mask), expected)
    assert torch.equal(expected != inputs, mask[:, None].expand(3, 2, 4, 4))


@pytest.mark.parametrize("mode", ["shuffle", "uniform"])
def test_a_generator_decides_alone(mode):
    inputs, state = torch.randint(50, (6, 5)), torch.get_rng_state()
    one, two = (
        randomize_masked(
            inputs,
            torch.ones(6, 5),
            mode=mode,
            num_tokens=50,
            protected=(3,),
            generator=torch.Generator().manual_seed(4),
        )
        for _ in range(2)
    )
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_inputs_stay_as_they_are():
    inputs = torch.randn(4, 3)
    before = inputs.clone()
    randomize_masked(inputs, torch.ones(4, 3))
    assert torch.equal(inputs, before)


def test_evaluation_passes_the_inputs_through():
    transform, inputs = MaskRandomization().eval(), torch.randn(4, 3)
    state = torch.get_rng_state()
    assert transform(inputs, torch.ones(4, 3)) is inputs
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(transform.train()(inputs, torch.ones(4, 3)), inputs)


def test_it_makes_a_model_ignore_the_region():
    data = torch.randn(100, 2)
    target = (data[:, 0] > 0).long()
    data[:, 1] = 2.0 * target - 1

    def weights(transform):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(transform(data, torch.tensor([[0, 1]]))), target).backward()
            optimizer.step()
        return (model.weight[1] - model.weight[0]).abs()

    plain, mixed = weights(MaskRandomization().eval()), weights(MaskRandomization())
    assert plain[1] > plain[0]
    assert mixed[1] < 0.2 * mixed[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "zero"}, r"`mode` must be one of 'shuffle', 'uniform', got 'zero'"),
        ({"mode": "uniform"}, r"`num_tokens` must be given to draw integers in mode \"uniform\": the size of the"),
        ({"mode": "uniform", "num_tokens": 0}, r"`num_tokens` must be at least 1, got 0"),
        ({"mode": "uniform", "num_tokens": 2, "protected": (0, 1, 7)}, r"`num_tokens` must leave an id that is not"),
        (
            {"inputs": torch.zeros(2, 3), "protected": (1,)},
            r"`protected` must be empty unless `inputs` holds token ids",
        ),
        ({"mask": torch.ones(2)}, r"`mask` must have the shape of `inputs`, \(2, 3\), got \(2,\)"),
        ({"mask": torch.ones(2, 4)}, r"`mask` must have the shape of `inputs`, \(2, 3\), got \(2, 4\)"),
    ],
)
def test_call_checks(change, message):
    arguments = {"inputs": torch.zeros(2, 3, dtype=torch.long), "mask": torch.ones(2, 3), **change}
    with pytest.raises(ValueError, match=message):
        randomize_masked(arguments.pop("inputs"), arguments.pop("mask"), **arguments)


def test_construction_checks_and_repr():
    with pytest.raises(ValueError, match="`mode` must be one of"):
        MaskRandomization("mean")
    with pytest.raises(ValueError, match="`num_tokens` must be at least 1, got 0"):
        MaskRandomization(num_tokens=0)
    built = MaskRandomization("uniform", num_tokens=9, protected=[0, 1])
    assert repr(built) == "MaskRandomization('uniform', num_tokens=9, protected=(0, 1))"

"""Dynamic weight average against the paper's loop, losses without a ratio, and a run that is cut anywhere."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.balancing import DynamicWeightAverage, dynamic_average_weights


def reference(epochs, temperature=2.0):
    """Weights of every epoch, and of the one after the last; ``epochs`` holds lists of batches, ``(batch, tasks)``."""
    means, weights = [], []
    for epoch in range(len(epochs) + 1):
        if epoch < 2:
            weights.append(np.ones(len(epochs[0][0])))
        else:
            ratio = means[epoch - 1] / means[epoch - 2]
            weights.append(len(ratio) * np.exp(ratio / temperature) / np.exp(ratio / temperature).sum())
        if epoch < len(epochs):
            means.append(np.mean(epochs[epoch], axis=0))
    return weights


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tasks=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    temperature=st.sampled_from([0.5, 2.0]),
    seed=st.integers(0, 99),
)
def test_against_the_paper(tasks, lengths, temperature, seed):
    draw = np.random.default_rng(seed)
    epochs = [draw.uniform(0.1, 5.0, (length, tasks)) for length in lengths]
    weighting = DynamicWeightAverage(tasks, temperature)
    for batches, expected in zip(epochs, reference(epochs, temperature)[:-1], strict=True):
        np.testing.assert_allclose(weighting.weights(), expected, rtol=1e-5)
        for losses in batches:
            assert weighting(torch.tensor(losses)).item() == pytest.approx(float((expected * losses).sum()), rel=1e-5)
        weighting.step()
    np.testing.assert_allclose(weighting.weights(), reference(epochs, temperature)[-1], rtol=1e-5)


def test_the_slower_task_weighs_more_whatever_the_units():
    latest, previous = torch.tensor([0.5, 0.9]), torch.tensor([1.0, 1.0])
    weight = dynamic_average_weights(latest, previous)
    assert weight[1] > weight[0]
    units = torch.tensor([1000.0, 0.001])
    torch.testing.assert_close(dynamic_average_weights(latest * units, previous * units), weight)
    torch.testing.assert_close(dynamic_average_weights(latest, previous, 1e6), torch.ones(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("undefined", [(0.0, 1.0), (1.0, 0.0), (-1.0, -2.0), (1.0, -1.0), (torch.nan, 1.0)])
def test_a_ratio_that_is_undefined_counts_as_one(undefined):
    latest, previous = torch.tensor([undefined[0], 0.5]), torch.tensor([undefined[1], 1.0])
    expected = dynamic_average_weights(torch.tensor([1.0, 0.5]), torch.ones(2))
    torch.testing.assert_close(dynamic_average_weights(latest, previous), expected)


def test_a_loss_that_is_not_finite_is_left_out_of_the_average():
    weighting, clean = DynamicWeightAverage(2), DynamicWeightAverage(2)
    for weigh in (weighting, clean):
        weigh(torch.tensor([1.0, 2.0]))
    assert weighting(torch.tensor([torch.inf, torch.nan])).isnan()
    for weigh in (weighting, clean):
        weigh.step()
    assert torch.equal(weighting.latest_loss, clean.latest_loss)


def run(weighting, epochs, start=0, stop=None):
    """Return the totals of steps ``start`` to ``stop``, counted over all epochs of three steps."""
    totals = []
    for index, losses in list(enumerate(epochs))[start:stop]:
        totals.append(weighting(losses).item())
        if index % 3 == 2:
            weighting.step()
    return totals


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_run_resumes_exactly_anywhere(cut):
    """``DWA().state_dict()`` of torchjd 0.18 is empty: its weights start again from one."""
    losses = torch.rand(12, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    expected = run(DynamicWeightAverage(3), losses)
    first, second = DynamicWeightAverage(3), DynamicWeightAverage(3)
    totals = run(first, losses, 0, cut)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    totals += run(second, losses, cut)
    assert totals == expected
    assert len(set(expected)) == 12


def test_a_bfloat16_module_adds_up_a_long_epoch():
    """A sum in bfloat16 stops to grow at 256 times its terms."""
    weighting = DynamicWeightAverage(2).bfloat16()
    for _ in range(2000):
        weighting(torch.tensor([1.0, 0.125], dtype=torch.bfloat16))
    assert weighting.loss_sum.tolist() == [2000.0, 250.0]
    weighting.step()
    assert weighting.latest_loss.tolist() == [1.0, 0.125]


def test_a_step_without_losses_changes_nothing():
    weighting = DynamicWeightAverage(2)
    for losses in ([1.0, 1.0], [0.5, 0.9]):
        weighting(torch.tensor(losses))
        weighting.step()
    before = copy.deepcopy(weighting.state_dict())
    weighting.step()
    assert all(torch.equal(value, before[name]) for name, value in weighting.state_dict().items())


def test_an_epoch_may_end_between_forward_and_backward():
    weighting = DynamicWeightAverage(2)
    losses = torch.tensor([1.0, 4.0], requires_grad=True)
    total = weighting(losses) + weighting(losses)
    weighting.step()
    weighting(losses.detach() / torch.tensor([1.0, 8.0]))
    weighting.step()
    total.backward()
    assert losses.grad.tolist() == [2.0, 2.0]
    assert weighting.weights()[0] > 1


def test_buffers_keep_their_place():
    weighting = DynamicWeightAverage(2)
    places = [buffer.data_ptr() for buffer in weighting.buffers()]
    for _ in range(3):
        weighting(torch.rand(2))
        weighting.step()
    assert [buffer.data_ptr() for buffer in weighting.buffers()] == places


def test_checks():
    with pytest.raises(ValueError, match=r"`temperature` must be a finite number, above 0, got 0"):
        DynamicWeightAverage(2, temperature=0)
    with pytest.raises(TypeError, match=r"`temperature` must be a number, got 'cold'"):
        DynamicWeightAverage(2, temperature="cold")
    with pytest.raises(ValueError, match=r"`previous` must have shape \(tasks,\) = \(2,\), got \(3,\)"):
        dynamic_average_weights(torch.ones(2), torch.ones(3))
    assert repr(DynamicWeightAverage(2)) == "DynamicWeightAverage(2, temperature=2.0)"

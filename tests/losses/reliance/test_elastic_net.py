from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from losses.reliance.elastic_net import ElasticNetPenalty, elastic_net


def reference(weight, l1, l2, strength):
    """Sum over the features on axis 1, in loops."""
    total = 0.0
    for feature in range(weight.shape[1]):
        for entry in weight[:, feature].flatten():
            total += strength[feature] * (l1 * abs(entry) + l2 * entry**2)
    return total


def soft(value, threshold, decay):
    """Minimise (u - w)^2 / 2 + threshold |u| + decay u^2 by u."""
    if abs(value) <= threshold:
        return 0.0
    return np.sign(value) * (abs(value) - threshold) / (1 + 2 * decay)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 2**30))
def test_against_loops(shape, seed):
    torch.manual_seed(seed)
    weight, strength = torch.randn(shape), torch.rand(shape[1])
    expected = reference(weight.double().numpy(), 0.3, 0.7, strength.double().numpy())
    given_value = elastic_net(weight, l1=0.3, l2=0.7, feature_strength=strength)
    assert given_value.item() == pytest.approx(expected, rel=1e-4)
    moved = weight.movedim(1, -1)
    again = elastic_net(moved, l1=0.3, l2=0.7, dim=-1, feature_strength=strength)
    torch.testing.assert_close(again, given_value)


def test_its_two_ends():
    weight = torch.randn(3, 5)
    torch.testing.assert_close(elastic_net(weight, l1=2.0, l2=0.0), 2 * weight.abs().sum())
    torch.testing.assert_close(elastic_net(weight, l1=0.0, l2=2.0), 2 * weight.square().sum())


def test_several_weights_share_their_features():
    layer, value = torch.randn(3, 5), torch.randn(2, 5, 2)
    strength = torch.rand(5)
    parts = [elastic_net(part, l1=0.3, l2=0.7, feature_strength=strength) for part in (layer, value)]
    torch.testing.assert_close(elastic_net([layer, value], l1=0.3, l2=0.7, feature_strength=strength), sum(parts))


def test_gradcheck():
    weight = torch.randn(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: elastic_net(w, l1=0.3, l2=0.7, feature_strength=torch.rand(4) * 0 + 2), weight
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    weight = torch.full((400, 400), 2.0, dtype=dtype)  # a sum of 320,000 in the first term
    assert elastic_net(weight, l1=1.0, l2=0.0) == 320_000
    assert elastic_net(weight, l1=0.0, l2=1.0).dtype == torch.float32


@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.0, 0.4), (0.3, 0.4)])
def test_proximal_step_against_loops(l1, l2):
    weight, strength, lr = torch.randn(3, 4), torch.tensor([1.0, 0.0, 2.0, 0.5]), 0.7
    factor = lr * strength.double().numpy()
    expected = [[soft(w, c * l1, c * l2) for w, c in zip(row, factor, strict=True)] for row in weight.double().numpy()]
    penalty = ElasticNetPenalty(l1, l2, feature_strength=strength)
    given_weight = nn.Parameter(weight.clone())
    penalty.proximal_step(given_weight, lr)
    np.testing.assert_allclose(given_weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(given_weight[:, 1], weight[:, 1])  # a strength of zero changes no bit
    again = weight.clone()
    penalty.proximal_step([again, again], torch.tensor(lr))
    torch.testing.assert_close(again, given_weight.detach())  # given twice, shrunk once


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(-2, 2), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_proximal_step_minimises_what_it_should(value, l1, l2, lr):
    weight = torch.tensor([[value]], dtype=torch.float64)
    ElasticNetPenalty(l1, l2).proximal_step(weight, lr)

    def objective(u):
        return (u - value) ** 2 / 2 + lr * (l1 * abs(u) + l2 * u**2)

    best = objective(weight.item())
    assert all(best <= objective(u) + 1e-9 for u in np.linspace(-2, 2, 81))


def test_a_proximal_step_along_other_axes():
    weight, strength = torch.randn(4, 2, 3), torch.tensor([0.0, 5.0, 0.0])
    moved = weight.clone()
    ElasticNetPenalty(1.0, 0.0, dim=-1, feature_strength=strength).proximal_step(moved, 1.0)
    assert torch.equal(moved[..., [0, 2]], weight[..., [0, 2]])
    assert moved[..., 1].eq(0).all()


def test_strengths_are_set_in_place():
    penalty = ElasticNetPenalty(1.0, 0.0, num_features=3)
    address, weight = penalty.feature_strength.data_ptr(), torch.ones(2, 3, requires_grad=True)
    loss = penalty(weight)
    penalty.set_feature_strength([1.0, 5.0, 0.0])
    loss.backward()  # the graph keeps the strengths it was built with
    assert weight.grad.eq(1).all()
    assert penalty(weight) == 12.0
    assert penalty.feature_strength.data_ptr() == address
    assert "feature_strength" in penalty.state_dict()
    with pytest.raises(ValueError, match=r"`strength` must be finite and not negative, got -1\.0"):
        penalty.set_feature_strength([1.0, -1.0, 0.0])
    with pytest.raises(ValueError, match=r"`strength` must have shape \(num_features,\) = \(3,\), got \(2,\)"):
        penalty.set_feature_strength([1.0, 1.0])
    assert penalty.feature_strength.tolist() == [1.0, 5.0, 0.0]
    with pytest.raises(
        RuntimeError, match="ElasticNetPenalty has no strengths by feature: build it with `num_features`"
    ):
        ElasticNetPenalty(1.0, 0.0).set_feature_strength([1.0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"l1": -1.0}, ValueError, "`l1` must be a finite number, at least 0, got -1.0"),
        ({"l2": float("nan")}, ValueError, "`l2` must be a finite number, at least 0, got nan"),
        ({"dim": 2}, ValueError, r"`weight\[0\]` must have an axis 2 of features, got shape \(2, 3\)"),
        ({"weight": []}, ValueError, "`weight` holds no tensor: pass the weights to penalise"),
        (
            {"weight": [torch.ones(2, 3), torch.ones(2, 4)]},
            ValueError,
            r"`weight\[1\]` must have 3 features on axis 1 as",
        ),
        ({"weight": torch.ones(2, 3).long()}, TypeError, r"`weight\[0\]` must be a floating tensor, got torch.int64"),
        ({"weight": [1.0]}, TypeError, r"`weight\[0\]` must be a floating tensor, got <class 'float'>"),
        ({"feature_strength": torch.ones(2)}, ValueError, r"`feature_strength` must have shape \(features,\) = \(3,\)"),
    ],
)
def test_call_checks(change, error, message):
    arguments = {"weight": torch.ones(2, 3), "l1": 1.0, "l2": 1.0, **change}
    with pytest.raises(error, match=message):
        elastic_net(arguments.pop("weight"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l1": -1.0, "l2": 0.0}, "`l1` must be a finite number"),
        ({"l1": 0.0, "l2": -1.0}, "`l2` must be a finite number"),
        ({"l1": 0.0, "l2": 0.0, "num_features": 0}, "`num_features` must be at least 1, got 0"),
        ({"l1": 0.0, "l2": 0.0, "num_features": 2, "feature_strength": [1.0]}, r"`strength` must have shape"),
        ({"l1": 0.0, "l2": 0.0, "feature_strength": [-1.0]}, "`strength` must be finite and not negative, got -1.0"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        ElasticNetPenalty(**arguments)


def test_repr():
    built = ElasticNetPenalty(0.1, 0.2, feature_strength=[1.0, 2.0])
    assert repr(built) == "ElasticNetPenalty(l1=0.1, l2=0.2, dim=1, num_features=2)"

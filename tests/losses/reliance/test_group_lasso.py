from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from losses.reliance.group_lasso import GroupLassoPenalty, group_lasso


def groups_of(weights, labels, strength):
    """Yield the entries and the mean strength of each group; features lie on axis 1."""
    for label in sorted(set(labels)):
        members = [feature for feature, own in enumerate(labels) if own == label]
        entries = [weight[:, feature].flatten() for weight in weights for feature in members]
        yield members, np.concatenate(entries), np.mean([strength[feature] for feature in members])


def reference(weights, labels, strength):
    return sum(
        factor * np.sqrt(len(entries)) * np.sqrt(np.sum(entries**2))
        for _, entries, factor in groups_of(weights, labels, strength)
    )


def drawn(features, seed):
    torch.manual_seed(seed)
    weights = [torch.randn(3, features), torch.randn(2, features, 2)]
    return weights, torch.randint(features, (features,)), torch.rand(features)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(0, 2**30))
def test_against_loops(features, seed):
    weights, labels, strength = drawn(features, seed)
    arrays = [weight.double().numpy() for weight in weights]
    expected = reference(arrays, labels.tolist(), strength.double().numpy())
    given_value = group_lasso(weights, strength=0.5, feature_strength=strength, groups=labels)
    assert given_value.item() == pytest.approx(0.5 * expected, rel=1e-4)
    plain = reference(arrays[:1], list(range(features)), np.ones(features))
    assert group_lasso(weights[0]).item() == pytest.approx(plain, rel=1e-4)


def test_groups_of_one_weight_are_a_plain_l1():
    weight = torch.randn(1, 5)
    torch.testing.assert_close(group_lasso(weight), weight.abs().sum())


def test_rows_of_an_embedding():
    weight = torch.randn(7, 3)
    torch.testing.assert_close(group_lasso(weight, dim=0), group_lasso(weight.T))
    gates = torch.randn(4)
    torch.testing.assert_close(group_lasso(gates, dim=0), gates.abs().sum())


def test_gradcheck():
    weight = torch.randn(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: group_lasso(w, groups=torch.tensor([0, 1, 1, 3])), weight)


def test_a_group_of_exact_zeros_has_a_finite_gradient():
    weight = torch.randn(3, 4)
    weight[:, 1] = 0.0
    weight.requires_grad_()
    group_lasso(weight).backward()
    assert weight.grad.isfinite().all()
    assert weight.grad[:, 1].eq(0).all()
    assert weight.grad[:, 0].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_squares_in_float32(dtype):
    weight = torch.full((2, 1), 1024.0, dtype=dtype, requires_grad=True)  # the square overflows float16
    loss = group_lasso(weight)
    loss.backward()
    assert loss.item() == pytest.approx(2048.0)
    assert weight.grad.isfinite().all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.floats(0, 1.5), st.integers(0, 2**30))
def test_proximal_step_against_loops(features, lr, seed):
    weights, labels, strength = drawn(features, seed)
    before = [weight.double().numpy() for weight in weights]
    penalty = GroupLassoPenalty(0.6, feature_strength=strength, groups=labels)
    penalty.proximal_step([nn.Parameter(weight) for weight in weights], lr)
    for members, entries, factor in groups_of(before, labels.tolist(), strength.double().numpy()):
        norm = np.sqrt(np.sum(entries**2))
        kept = max(0.0, 1 - lr * 0.6 * factor * np.sqrt(len(entries)) / norm)
        for new, old in zip(weights, before, strict=True):
            np.testing.assert_allclose(new[:, members].numpy(), kept * old[:, members], rtol=1e-4, atol=1e-5)
            if kept == 0:
                assert new[:, members].eq(0).all()


def test_a_step_of_length_zero_changes_no_bit():
    weight = torch.randn(3, 4)
    before = weight.clone()
    GroupLassoPenalty(5.0).proximal_step(weight, 0.0)
    assert torch.equal(weight, before)
    weight[:, 2] = 0.0
    GroupLassoPenalty(5.0).proximal_step(weight, torch.tensor(0.0))
    assert weight.isfinite().all()


def test_groups_follow_the_module_but_are_no_state():
    penalty = GroupLassoPenalty(1.0, groups=[0, 0, 2])
    assert not penalty.state_dict()
    assert penalty.to("meta").groups.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "`strength` must be a finite number, at least 0, got -1.0"),
        ({"groups": torch.tensor([0, 1])}, ValueError, r"`groups` must have shape \(features,\) = \(3,\), got \(2,\)"),
        ({"groups": torch.tensor([0, 1, 3])}, ValueError, "`groups` must lie between 0 and 2, got 3"),
        ({"groups": torch.ones(3)}, TypeError, "`groups` must hold integer labels, got torch.float32"),
        ({"feature_strength": torch.ones(2)}, ValueError, r"`feature_strength` must have shape \(features,\) = \(3,\)"),
        ({"dim": -3}, ValueError, r"`weight\[0\]` must have an axis -3 of features"),
    ],
)
def test_call_checks(change, error, message):
    with pytest.raises(error, match=message):
        group_lasso(torch.ones(2, 3), **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": float("inf")}, "`strength` must be a finite number, at least 0, got inf"),
        ({"strength": 1.0, "num_features": 2, "groups": [0, 1, 1]}, r"`groups` must have shape \(features,\) = \(2,\)"),
        ({"strength": 1.0, "groups": [0, 5]}, "`groups` must lie between 0 and 1, got 5"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupLassoPenalty(**arguments)


def test_repr():
    assert repr(GroupLassoPenalty(0.1, dim=0, num_features=3)) == "GroupLassoPenalty(0.1, dim=0, num_features=3)"
    built = GroupLassoPenalty(0.1, groups=torch.arange(9))
    assert repr(built) == "GroupLassoPenalty(0.1, dim=1, num_features=None, groups=[0, 1, 2, 3, 4, 5, ...])"

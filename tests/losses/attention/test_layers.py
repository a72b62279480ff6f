"""What the attention losses share: layers, rows that count, averages, and sums with gradients of their own."""

from __future__ import annotations

import pytest
import torch

from losses.attention._layers import as_layers, layer_mean, reduce_layers, reduce_samples, widened
from losses.attention._mass import degrees, key_sums, mass, surprise
from losses.attention._row_sums import cross_sums, entropy_sums, joint_sums, square_sums
from losses.attention._rows import allowed_keys, check_query_valid, check_valid, counted_rows, real_rows


def test_one_layer_is_a_list_of_one():
    layer = torch.rand(2, 3, 4, 5)
    assert as_layers(layer)[0] is layer
    assert len(as_layers((layer, layer[:, :1, :2]))) == 2
    with pytest.raises(ValueError, match=r"`first` holds no layer"):
        as_layers([], "first")


def test_valid_is_boolean_whatever_it_came_as():
    layer = torch.rand(1, 1, 2, 3)
    assert check_valid(None, layer) is None
    for valid in (torch.tensor([[1, 0, 1]]), torch.tensor([[1.0, 0.0, 1.0]])):
        assert check_valid(valid, layer).tolist() == [[True, False, True]]


def test_padding_has_rows_in_self_attention_only():
    valid = torch.tensor([[True, False, True]])
    assert real_rows(torch.rand(1, 2, 3, 3), valid, None).tolist() == [[[True, False, True]]]
    assert real_rows(torch.rand(1, 2, 2, 3), valid, None) is None
    assert real_rows(torch.rand(1, 2, 3, 3), None, None) is None
    told = torch.tensor([[False, True, True]])
    assert real_rows(torch.rand(1, 2, 3, 3), valid, told).tolist() == [[[False, True, True]]]


def test_allowed_keys_of_key_masks_and_of_pair_masks():
    layer = torch.rand(2, 1, 3, 3)
    every = allowed_keys(None, None, layer)
    assert every.keys is None
    assert every.number.flatten().tolist() == [3.0]
    by_key = allowed_keys(torch.tensor([[1, 1, 0], [1, 0, 0]]), None, layer)
    assert by_key.number.flatten().tolist() == [2.0, 1.0]
    assert by_key.rows.tolist() == [[[True, True, False]], [[False, False, False]]]
    by_pair = allowed_keys(torch.ones(1, 1, 3, 3).tril(), None, layer)
    assert by_pair.number.tolist() == [[[1.0, 2.0, 3.0]]]
    assert by_pair.rows.tolist() == [[[False, True, True]]]
    assert allowed_keys(torch.tensor([[1, 1, 0], [1, 1, 1]]), None, layer[:, :, :2]).rows.tolist() == [
        [[True]],
        [[True]],
    ]


def test_masks_of_queries_fit_every_layer():
    layers = [torch.rand(1, 1, 2, 3), torch.rand(1, 2, 2, 3)]
    assert check_query_valid(None, layers) is None
    assert check_query_valid(torch.tensor([[1.0, 0.0]]), layers).tolist() == [[True, False]]
    with pytest.raises(
        TypeError, match=r"`query_valid` must be a tensor of shape \(batch, queries\) of `weights\[0\]`"
    ):
        check_query_valid([True, False], layers)


def test_rows_that_count_attend_to_something_or_to_nan():
    total = torch.tensor([[[1.0, 0.0, torch.nan, 0.5]]])
    assert counted_rows(total, None).tolist() == [[[True, False, True, True]]]
    real = torch.tensor([[[True, True, True, False]]])
    assert counted_rows(total, real).tolist() == [[[True, False, True, False]]]
    assert counted_rows(-total, ~real.any(dim=-1, keepdim=True)).any().item() is False  # not judged where not real
    assert counted_rows(total, None, total / 2, total * 0).any()
    for shares in ([total * 2], [total / 2, -total]):
        with pytest.raises(ValueError, match="`weights` must be attention after the softmax"):
            counted_rows(total, None, *shares)
    assert counted_rows(total - 5e-4, None, total + 5e-4).any()  # rounding in half precision


def test_float16_is_widened_with_a_gradient_that_stays_finite():
    layer = torch.rand(1, 1, 2, 3)
    assert widened(layer) is layer
    assert widened(layer.double()).dtype == torch.float64
    slope = torch.tensor([2.0**20, -(2.0**20), 0.5])
    half = layer.half().requires_grad_()
    (widened(half) * slope).sum().backward()
    assert half.grad[0, 0, 0].tolist() == [65504.0, -65504.0, 0.5]
    half.grad = None
    (widened(half) * torch.nan).sum().backward()
    assert half.grad.isnan().all()
    brain = layer.bfloat16().requires_grad_()
    (widened(brain) * slope).sum().backward()
    assert brain.grad[0, 0, 0].tolist() == slope.tolist()


def test_layer_mean_leaves_out_rows_and_weighs_the_others():
    cost = torch.tensor([[[1.0, 2.0, 6.0]], [[4.0, 5.0, 6.0]]])
    counted = torch.tensor([[[True, True, False]], [[False, False, False]]])
    mean, seen = layer_mean(cost, counted)
    assert mean.tolist() == [1.5, 0.0]
    assert seen.tolist() == [True, False]
    weighted, seen = layer_mean(cost, counted, torch.tensor([[[0.1, 0.3, 1.0]]]))
    torch.testing.assert_close(weighted, torch.tensor([1.75, 0.0]))
    assert seen.tolist() == [True, False]
    _, seen = layer_mean(cost, torch.ones_like(counted), torch.tensor([[[0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]]]))
    assert seen.tolist() == [False, True]


def test_layers_without_a_row_do_not_pull_the_mean():
    first = (torch.tensor([1.0, 2.0, 0.0]), torch.tensor([True, True, False]))
    second = (torch.tensor([3.0, 0.0, 0.0]), torch.tensor([True, False, False]))
    assert reduce_layers([first, second], None, "none").tolist() == [2.0, 2.0, 0.0]
    assert reduce_layers([first, second], None, "mean").item() == 2.0
    assert reduce_layers([first, second], torch.tensor([True, False, True]), "sum").item() == 2.0


def test_samples_that_do_not_count_cost_nothing():
    cost, counted = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([True, False, True])
    assert reduce_samples(cost, counted, "none").tolist() == [1.0, 0.0, 3.0]
    assert reduce_samples(cost, counted, "sum").item() == 4.0
    assert reduce_samples(cost, counted, "mean").item() == 2.0
    assert reduce_samples(cost, torch.zeros(3, dtype=torch.bool), "mean").item() == 0.0


def test_mass_is_a_share_of_what_is_real():
    rows = torch.tensor([[[[0.2, 0.2, 0.6], [0.0, 0.0, 0.0]]]])
    keys = degrees("set", torch.tensor([[1, 0, 1]]), torch.tensor([[True, True, False]]), rows)
    (hit,), total = mass(rows, keys.real, keys.member)
    torch.testing.assert_close(hit, torch.tensor([[[0.5, 0.0]]]))
    torch.testing.assert_close(total, torch.tensor([[[0.4, 0.0]]]))


def test_key_sums_take_any_layout():
    rows, column = torch.rand(2, 3, 4, 5).transpose(1, 2), torch.rand(2, 5)
    (given,) = key_sums(rows, column)
    torch.testing.assert_close(given, (rows * column[:, None, None]).sum(-1))


def test_surprise_is_zero_at_one_and_finite_at_zero():
    share = torch.tensor([1.0, 0.0], requires_grad=True)
    given = surprise(share)
    given.sum().backward()
    assert given[0].item() == 0.0
    assert given[1].item() == pytest.approx(13.863, abs=1e-3)
    assert share.grad.isfinite().all()


FLOOR = 2.0**-10
VALID = torch.tensor([[True, True, True, False], [True, True, True, True]])
TARGET = torch.tensor([[0.25, 0.75, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]]).double()


def plain_entropy(rows, valid):
    kept = torch.ones_like(rows) if valid is None else valid[:, None, None].expand_as(rows)
    return (rows * kept).sum(-1), (rows * rows.log() * kept).sum(-1)


def plain_squares(rows, valid):
    kept = torch.ones_like(rows) if valid is None else valid[:, None, None].expand_as(rows)
    return (rows * kept).sum(-1), (rows**2 * kept).sum(-1)


def plain_cross(rows, valid):
    kept = torch.ones_like(rows) if valid is None else valid[:, None, None].expand_as(rows)
    return (rows * kept).sum(-1), (TARGET[:, None, None] * (rows + FLOOR).log()).sum(-1)


def plain_joint(rows, valid):
    kept = torch.ones_like(rows) if valid is None else valid[:, None, None].expand_as(rows)
    smoothed = rows + FLOOR
    size = (smoothed * kept).sum(-1)
    joint = smoothed + size[..., None] * TARGET[:, None, None]
    return size, ((smoothed * smoothed.log() - joint * joint.log()) * kept).sum(-1)


def pairs(valid):
    return None if valid is None else valid[:, None, None]


SUMS = {
    "entropy": (lambda rows, valid: entropy_sums(rows, pairs(valid)), plain_entropy),
    "squares": (lambda rows, valid: square_sums(rows, pairs(valid)), plain_squares),
    "cross": (lambda rows, valid: cross_sums(rows, valid, TARGET, FLOOR), plain_cross),
    "joint": (lambda rows, valid: joint_sums(rows, valid, TARGET, FLOOR), plain_joint),
}


@pytest.mark.parametrize("valid", [None, VALID], ids=["all", "padded"])
@pytest.mark.parametrize("name", SUMS)
def test_sums_and_their_first_and_second_derivatives(name, valid):
    fast, plain = SUMS[name]
    rows = torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    for given, expected in zip(fast(rows, valid), plain(rows, valid), strict=True):
        torch.testing.assert_close(given, expected)
        slope = torch.randn_like(given)
        first = [torch.autograd.grad(sums, rows, slope, create_graph=True)[0] for sums in (given, expected)]
        torch.testing.assert_close(*first)
    assert torch.autograd.gradcheck(lambda values: fast(values, valid), (rows,))
    assert torch.autograd.gradgradcheck(lambda values: fast(values, valid), (rows,))


@pytest.mark.parametrize("name", SUMS)
def test_sums_work_with_function_transforms(name):
    fast, plain = SUMS[name]
    rows = torch.rand(3, 2, 2, 3, 4, dtype=torch.float64)

    def gradient(sums):
        return torch.func.vmap(torch.func.grad(lambda values: sums(values, VALID)[1].sum()))(rows)

    torch.testing.assert_close(gradient(fast), gradient(plain))


def test_entropy_of_exact_zeros_has_a_finite_gradient():
    rows = torch.eye(3)[None, None].clone().requires_grad_()
    _, weighted = entropy_sums(rows)
    weighted.sum().backward()
    assert weighted.eq(0).all()
    assert rows.grad.isfinite().all()

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from losses.reliance.input_gradient import InputGradientPenalty, input_gradient_penalty


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def net(features=4, classes=3, width=8):
    return nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, classes))


def summed_log_probability(model, row):
    scores = model(torch.from_numpy(row)[None]).detach().numpy()[0]
    shifted = scores - scores.max()
    return float(np.sum(shifted - np.log(np.exp(shifted).sum())))


def reference(model, inputs, mask):
    """Return each sample's penalty, the gradient by central differences."""
    costs = []
    for row, degrees in zip(inputs, mask, strict=True):
        cost = 0.0
        for index in np.ndindex(*row.shape):
            step = np.zeros_like(row)
            step[index] = 1e-5
            slope = (summed_log_probability(model, row + step) - summed_log_probability(model, row - step)) / 2e-5
            cost += (degrees[index] * slope) ** 2
        costs.append(cost)
    return costs


def test_against_finite_differences():
    model, inputs = net().double(), randn(5, 4).double()
    mask = torch.tensor([[1, 0, 0, 1], [0, 0.5, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    expected = reference(model, inputs.numpy(), mask.double().numpy())
    inputs.requires_grad_()
    each = input_gradient_penalty(model(inputs), inputs, mask, reduction="none")
    np.testing.assert_allclose(each.detach().numpy(), expected, rtol=1e-6, atol=1e-12)
    mean = input_gradient_penalty(model(inputs), inputs, mask)
    assert mean.item() == pytest.approx(np.sum(expected) / 4, rel=1e-6)  # four samples have a mask
    weight = torch.tensor([0.5, 2.0, 9.0, 0.0, 1.0])
    total = input_gradient_penalty(model(inputs), inputs, mask, sample_weight=weight, reduction="sum")
    assert total.item() == pytest.approx(np.dot(expected, weight.numpy()), rel=1e-6)
    mean = input_gradient_penalty(model(inputs), inputs, mask, sample_weight=weight)
    assert mean.item() == pytest.approx(np.dot(expected, weight.numpy()) / 4, rel=1e-6)


def test_linear_model_in_closed_form():
    weight, inputs = randn(3, 4), randn(2, 4).requires_grad_()
    logits = inputs @ weight.T
    gradient = weight.sum(dim=0) - 3 * logits.softmax(dim=1) @ weight
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    expected = (gradient * mask).square().sum(dim=1)
    torch.testing.assert_close(input_gradient_penalty(logits, inputs, mask, reduction="none"), expected)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**30))
def test_a_mask_may_leave_out_features_or_channels(samples, channels, size, seed):
    torch.manual_seed(seed)
    for shape, axis in (((samples, size, channels), 2), ((samples, channels, size, size + 1), 1)):
        inputs = randn(*shape).requires_grad_()
        logits = inputs.flatten(1).square() @ randn(inputs[0].numel(), 3)
        full = torch.rand(shape).lt(0.5).any(dim=axis, keepdim=True).expand(shape)
        expected = input_gradient_penalty(logits, inputs, full)
        short = full.select(axis, 0)
        torch.testing.assert_close(input_gradient_penalty(logits, inputs, short), expected)
        single = full.narrow(axis, 0, 1)
        torch.testing.assert_close(input_gradient_penalty(logits, inputs, single), expected)


def test_the_number_of_axes_decides_which_one_a_mask_leaves_out():
    inputs = randn(1, 3, 3, 3).requires_grad_()  # channels, height and width of one size
    logits = (inputs * torch.arange(27.0).reshape(3, 3, 3)).flatten(1).cumsum(1)[:, -2:]
    mask = torch.zeros(1, 3, 3)
    mask[0, 0, 1] = 1  # the pixel in row 0, column 1
    expected = input_gradient_penalty(logits, inputs, mask[:, None].expand(1, 3, 3, 3))
    torch.testing.assert_close(input_gradient_penalty(logits, inputs, mask), expected)
    assert expected > 0


def test_embeddings_inside_a_model():
    embedding, head, tokens = nn.Embedding(5, 3), nn.Linear(3, 2), torch.tensor([[1, 2, 3], [4, 0, 0]])
    embedded = embedding(tokens)
    loss = input_gradient_penalty(head(embedded.tanh().mean(1)), embedded, torch.tensor([[0, 1, 0], [0, 0, 0]]))
    loss.backward()
    assert head.weight.grad.ne(0).any()
    assert embedding.weight.grad[2].ne(0).any()


def test_the_base_loss_can_still_be_differentiated():
    model, inputs = net(), randn(3, 4).requires_grad_()
    logits = model(inputs)
    base = F.cross_entropy(logits, torch.tensor([0, 1, 2]))
    penalty = input_gradient_penalty(logits, inputs, torch.ones(3, 4))
    base.backward()
    alone = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logits = model(inputs)
    penalty = input_gradient_penalty(logits, inputs, torch.ones(3, 4))
    (F.cross_entropy(logits, torch.tensor([0, 1, 2])) + penalty).backward()
    assert any(
        not torch.allclose(parameter.grad, old) for parameter, old in zip(model.parameters(), alone, strict=True)
    )


def test_gradcheck():
    inputs = randn(2, 4).double().requires_grad_()
    parameters = [randn(5, 4).double().requires_grad_(), randn(3, 5).double().requires_grad_()]
    mask = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])

    def penalty(values, first, second):
        return input_gradient_penalty((values @ first.T).tanh() @ second.T, values, mask)

    assert torch.autograd.gradcheck(penalty, (inputs, *parameters))


def test_samples_without_a_mask_change_nothing_even_when_broken():
    inputs = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    logits = torch.stack([inputs.sqrt().sum(dim=1), inputs.sum(dim=1)], dim=1)  # infinite slope in the second sample
    mask = torch.tensor([[True, True], [False, False]])
    loss = input_gradient_penalty(logits, inputs, mask)
    alone = inputs.detach()[:1].requires_grad_()
    single = input_gradient_penalty(torch.stack([alone.sqrt().sum(1), alone.sum(1)], dim=1), alone, mask[:1])
    torch.testing.assert_close(loss, single)


def test_no_samples():
    model, inputs = net(), randn(0, 4).requires_grad_()
    loss = input_gradient_penalty(model(inputs), inputs, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0.0


def test_a_huge_penalty_still_has_a_gradient():
    """Public code (XIL, `rr_clipping`) replaces a large penalty by a constant: no gradient just where it is needed."""
    layer, inputs = nn.Linear(3, 2, bias=False), randn(4, 3).mul(1e-4).requires_grad_()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1e4, 2e4, 3e4], [-1e4, -1e4, -1e4]]))
    before = input_gradient_penalty(layer(inputs), inputs, torch.ones(4, 3))
    before.backward()
    assert before > 1e6
    assert layer.weight.grad.ne(0).all()
    with torch.no_grad():
        layer.weight -= 10 * layer.weight.grad / layer.weight.grad.norm()
    assert input_gradient_penalty(layer(inputs), inputs, torch.ones(4, 3)) < before


def test_the_mode_of_the_model_and_the_random_state_stay():
    """Public code (XIL) switches the model to evaluation in the middle of a training step."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    inputs = randn(3, 4).requires_grad_()
    logits = model(inputs)
    state = torch.get_rng_state()
    InputGradientPenalty()(logits, inputs, torch.ones(3, 4), base_loss=logits.square().mean()).backward()
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert inputs.grad is not None


def test_measured_in_validation_it_is_a_constant():
    model, inputs = net(), randn(3, 4).requires_grad_()
    expected = input_gradient_penalty(model(inputs), inputs, torch.ones(3, 4))
    with torch.no_grad():
        with torch.enable_grad():
            logits = model(inputs)
        for _ in range(2):  # the graph stays for whatever else wants it
            loss = input_gradient_penalty(logits, inputs, torch.ones(3, 4))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_close_to_single_precision(dtype):
    model, inputs = net(), randn(16, 4).requires_grad_()
    expected = input_gradient_penalty(model(inputs), inputs, torch.ones(1, 4))
    with torch.autocast("cpu", dtype=dtype):
        loss = input_gradient_penalty(model(inputs), inputs, torch.ones(1, 4))
        loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=3e-2, atol=1e-3)
    assert model[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_alone_what_the_model_computed_in_float32(dtype):
    weight, inputs = randn(3, 4), randn(8, 4).requires_grad_()
    logits = inputs @ weight.T  # in float32, outside
    expected = input_gradient_penalty(logits, inputs, torch.ones(1, 4))
    with torch.autocast("cpu", dtype=dtype):
        loss = input_gradient_penalty(logits, inputs, torch.ones(1, 4))
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("track", [True, False])
def test_a_single_logit_is_a_binary_head(track):
    weight, mask = torch.tensor([[0.5, -2.0, 1.0]], requires_grad=True), torch.tensor([[True, True, False]])
    inputs = torch.tensor([[1.0, 0.3, -0.2], [-0.4, 0.8, 2.0]], requires_grad=True)
    logits = inputs @ weight.T  # (samples, 1)
    z = logits.detach().numpy()[:, 0]
    slope = 1 - 2 / (1 + np.exp(-z))  # of log sigmoid(z) + log sigmoid(-z)
    expected = np.mean(slope**2) * (0.5**2 + 2.0**2)
    with torch.set_grad_enabled(track):
        loss = input_gradient_penalty(logits, inputs, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    if track:
        (found,) = torch.autograd.grad(loss, weight, retain_graph=True)
        both = torch.cat([torch.zeros(2, 1), inputs @ weight.T], dim=1)
        (wanted,) = torch.autograd.grad(input_gradient_penalty(both, inputs, mask), weight)
        torch.testing.assert_close(found, wanted)
        assert found.abs().sum() > 0.1


def test_many_classes_do_not_overflow_half_precision():
    layer = nn.Linear(2, 1000, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0] = 100.0  # sure of the first class: the gradient at its logit is -999, at the inputs -99,900
    inputs = torch.ones(1, 2, requires_grad=True)
    expected = input_gradient_penalty(layer(inputs), inputs, torch.ones(1, 2))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = input_gradient_penalty(layer(inputs), inputs, torch.ones(1, 2))
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


def test_strength_and_default_scale():
    model, inputs, mask = net(), randn(3, 4).requires_grad_(), torch.ones(3, 4)
    plain = input_gradient_penalty(model(inputs), inputs, mask)
    penalty = InputGradientPenalty(0.25)
    with pytest.warns(
        UserWarning, match="InputGradientPenalty has calibrated nothing: its scale is 1. Pass `base_loss`"
    ):
        torch.testing.assert_close(penalty(model(inputs), inputs, mask), 0.25 * plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty(model(inputs), inputs, mask)  # says so once
    assert penalty.steps == 0
    unscaled = InputGradientPenalty(0.25, calibration_steps=0)
    given = unscaled(model(inputs), inputs, mask, base_loss=torch.tensor(7.0))
    torch.testing.assert_close(given, 0.25 * plain)


@pytest.mark.parametrize("case", ["evaluation", "validation", "no calibration", "calibrated", "resumed"])
def test_a_scale_of_one_that_is_meant_gives_no_warning(case):
    model, inputs, mask = net(), randn(3, 4).requires_grad_(), torch.ones(3, 4)
    penalty = InputGradientPenalty(calibration_steps=0 if case == "no calibration" else 5)
    if case in ("calibrated", "resumed"):
        run(penalty, model, [1.0])
    if case == "resumed":
        state, penalty = penalty.state_dict(), InputGradientPenalty(calibration_steps=5)
        penalty.load_state_dict(state)
    logits = model(inputs)
    with warnings.catch_warnings(), torch.set_grad_enabled(case != "validation"):
        warnings.simplefilter("error")
        penalty.train(case != "evaluation")(logits, inputs, mask)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_penalty_that_overflows_while_it_is_measured_is_zero(reduction):
    layer, inputs = nn.Linear(3, 2, bias=False), randn(4, 3).mul(1e-20).requires_grad_()
    with torch.no_grad():
        layer.weight.mul_(1e20)
    penalty, mask = InputGradientPenalty(calibration_steps=2, reduction=reduction), torch.ones(4, 3)
    assert input_gradient_penalty(layer(inputs), inputs, mask).isinf()
    loss = penalty(layer(inputs), inputs, mask, base_loss=torch.tensor(1.0))
    loss.sum().backward()
    assert loss.eq(0).all()
    assert penalty.steps == 0
    assert layer.weight.grad.eq(0).all()


def run(penalty, model, bases, seed=0):
    torch.manual_seed(seed)
    outputs, raw = [], []
    for base in bases:
        inputs = randn(3, 4).requires_grad_()
        outputs.append(penalty(model(inputs), inputs, torch.ones(3, 4), base_loss=torch.tensor(base)).item())
        raw.append(input_gradient_penalty(model(inputs), inputs, torch.ones(3, 4)).item())
    return outputs, raw


def test_the_first_steps_train_plainly_and_measure_the_ratio_of_sums():
    model, penalty = net(), InputGradientPenalty(2.0, calibration_steps=3)
    outputs, raw = run(penalty, model, [1.0, 3.0, 0.5, 100.0, 100.0])
    scale = 4.5 / sum(raw[:3])
    assert outputs[:3] == [0.0, 0.0, 0.0]
    assert outputs[3:] == pytest.approx([2.0 * scale * raw[3], 2.0 * scale * raw[4]], rel=1e-5)
    assert penalty.steps == 3
    assert penalty.scale.item() == pytest.approx(scale, rel=1e-5)


def test_a_term_that_only_measures_leaves_the_gradient_alone():
    model, inputs = net(), randn(3, 4).requires_grad_()
    InputGradientPenalty()(model(inputs), inputs, torch.ones(3, 4), base_loss=torch.tensor(1.0)).backward()
    assert all(parameter.grad is None or parameter.grad.eq(0).all() for parameter in model.parameters())


def test_evaluation_measures_nothing_but_uses_the_scale():
    model, penalty = net(), InputGradientPenalty(calibration_steps=2)
    run(penalty, model, [1.0])
    before = copy.deepcopy(penalty.state_dict())
    outputs, raw = run(penalty.eval(), model, [50.0])
    assert all(torch.equal(before[name], value) for name, value in penalty.state_dict().items())
    assert outputs[0] == pytest.approx(raw[0] * penalty.scale.item(), rel=1e-5)


def test_a_resumed_run_goes_on_with_the_same_scale():
    model, whole, first, second = net(), *(InputGradientPenalty(calibration_steps=4) for _ in range(3))
    expected, _ = run(whole, model, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    torch.manual_seed(0)
    run(first, model, [1.0, 2.0, 3.0])
    state = torch.get_rng_state()
    second.load_state_dict(first.state_dict(), strict=True)
    torch.set_rng_state(state)
    outputs = []
    for base in (4.0, 5.0, 6.0):
        inputs = randn(3, 4).requires_grad_()
        outputs.append(second(model(inputs), inputs, torch.ones(3, 4), base_loss=torch.tensor(base)).item())
    assert outputs == expected[3:]


@pytest.mark.parametrize("base", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_step_that_tells_nothing_does_not_count(base):
    model, penalty = net(), InputGradientPenalty(calibration_steps=2)
    run(penalty, model, [base])
    assert penalty.steps == 0
    assert penalty.scale == 1.0


def test_a_penalty_of_zero_leaves_the_scale_finite():
    model, penalty = net(), InputGradientPenalty(calibration_steps=2)
    inputs = randn(3, 4).requires_grad_()
    for mask in (torch.zeros(3, 4), torch.ones(3, 4)):  # nobody is annotated in the first batch
        with torch.no_grad():
            model[2].weight.zero_()  # a head that starts at zero has no input gradient at all
        loss = penalty(model(inputs), inputs, mask, base_loss=torch.tensor(2.0))
        loss.backward()
        assert loss.item() == 0.0
        assert penalty.scale == 1.0
    with torch.no_grad():
        model[2].weight.normal_(std=1e-12)
    for _ in range(3):
        loss = penalty(model(inputs), inputs, torch.ones(3, 4), base_loss=torch.tensor(2.0))
    loss.backward()
    assert loss.isfinite()
    assert penalty.scale == 1e8  # no more: it will stay when the head has grown
    assert model[2].weight.grad.isfinite().all()


def test_the_scale_has_no_gradient():
    model, inputs, mask = net(), randn(3, 4).requires_grad_(), torch.ones(3, 4)
    penalty, base = InputGradientPenalty(calibration_steps=1), model(inputs).square().mean()
    penalty(model(inputs), inputs, mask, base_loss=base)
    model.zero_grad()
    penalty(model(inputs), inputs, mask, base_loss=base).backward()
    scale = (base / input_gradient_penalty(model(inputs), inputs, mask)).item()
    scaled = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    input_gradient_penalty(model(inputs), inputs, mask).backward()
    plain = [parameter.grad * scale for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(scaled, plain)


def test_two_calls_before_one_backward():
    model, penalty = net(), InputGradientPenalty(calibration_steps=4)
    inputs = randn(3, 4).requires_grad_()
    terms = [penalty(model(inputs), inputs, torch.ones(3, 4), base_loss=torch.tensor(1.0 + i)) for i in range(2)]
    (terms[0] + terms[1]).backward()
    assert penalty.steps == 2


def test_without_reduction_means_are_compared():
    model, inputs = net(), randn(3, 4).requires_grad_()
    penalty = InputGradientPenalty(calibration_steps=1, reduction="none")
    base = torch.tensor([1.0, 2.0, 6.0])
    assert penalty(model(inputs), inputs, torch.ones(3, 4), base_loss=base).eq(0).all()
    each = penalty(model(inputs), inputs, torch.ones(3, 4), base_loss=base)
    assert each.shape == (3,)
    torch.testing.assert_close(each.mean(), torch.tensor(3.0))


def test_processes_add_up_their_sums(monkeypatch):
    """Two processes, of which the other one saw a base loss of 5 and a penalty of 1."""
    seen = []

    def other_process(pair, group):
        seen.append(group)
        return pair + torch.tensor([5.0, 1.0])

    monkeypatch.setattr("losses.reliance.input_gradient.sum_over_processes", other_process)
    model, penalty = net(), InputGradientPenalty(calibration_steps=1, process_group="these")
    _, raw = run(penalty, model, [1.0])
    assert seen == ["these"]
    assert penalty.scale.item() == pytest.approx(6.0 / (raw[0] + 1.0), rel=1e-5)


def test_it_makes_a_model_ignore_what_it_must_not_use():
    data = randn(100, 2)
    target = (data[:, 0] > 0).long()
    data[:, 1] = (2.0 * target - 1) + 0.1 * randn(100)  # a shortcut that gives the class away

    def shortcut_share(strength):
        torch.manual_seed(0)
        model, penalty = net(2, 2), InputGradientPenalty(strength, calibration_steps=10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
        for _ in range(120):
            inputs = data.clone().requires_grad_()
            logits = model(inputs)
            base = F.cross_entropy(logits, target)
            loss = base + penalty(logits, inputs, torch.tensor([[0, 1]]), base_loss=base)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        broken = data.clone()
        broken[:, 1] = data[torch.randperm(100), 1]
        return (model(broken).argmax(1) == target).float().mean().item()

    assert shortcut_share(0.0) < 0.8
    assert shortcut_share(1.0) > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inputs": torch.ones(2, 3)},
            r"`inputs` must require a gradient, got a tensor without: call `inputs.requires",
        ),
        ({"inputs": torch.ones(3, 3)}, r"`inputs` must be a tensor of shape \(samples, features...\) with 2 samples"),
        ({"inputs": torch.ones(2, 3, requires_grad=True)}, r"`logits` must be computed from `inputs`, but does not"),
        ({"logits": torch.ones(2, 2)}, r"`logits` must carry the graph that leads to `inputs`, got a tensor without"),
        (
            {"logits": torch.ones(2)},
            r"`logits` must be a tensor of shape \(samples, classes, positions...\), got \(2,\)",
        ),
        ({"target_mask": torch.ones(2)}, r"`target_mask` must have the shape of `inputs`, \(2, 3\), got \(2,\)"),
        ({"target_mask": torch.ones(2, 2)}, r"`target_mask` must have the shape of `inputs`"),
        ({"target_mask": 2 * torch.ones(2, 3)}, r"`target_mask` must lie between 0 and 1, got 2.0"),
        ({"target_mask": torch.full((2, 3), float("nan"))}, r"`target_mask` must lie between 0 and 1, got nan"),
        ({"sample_weight": torch.ones(3)}, r"`sample_weight` must have shape"),
        ({"reduction": "max"}, r"`reduction` must be one of"),
    ],
)
def test_call_checks(change, message):
    inputs = torch.ones(2, 3, requires_grad=True)
    arguments = {"logits": inputs.cumsum(1)[:, :2], "inputs": inputs, "target_mask": torch.ones(2, 3), **change}
    with pytest.raises(ValueError, match=message):
        input_gradient_penalty(**arguments)


def test_the_message_about_a_mask_names_both_shapes():
    inputs = torch.ones(2, 3, 4, 5, requires_grad=True)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\), or \(2, 4, 5\), without the axis of features, got \(2, 3\)"):
        input_gradient_penalty(inputs.flatten(1), inputs, torch.ones(2, 3))
    with pytest.raises(TypeError, match="`target_mask` must be a tensor, got list"):
        input_gradient_penalty(inputs.flatten(1), inputs, [1, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": -1}, ValueError, "`strength` must be a finite number, at least 0, got -1"),
        ({"calibration_steps": -1}, ValueError, "`calibration_steps` must be at least 0, got -1"),
        ({"calibration_steps": 1.5}, TypeError, "`calibration_steps` must be a whole number"),
        ({"reduction": "max"}, ValueError, "`reduction` must be one of"),
    ],
)
def test_construction_checks(arguments, error, message):
    with pytest.raises(error, match=message):
        InputGradientPenalty(**arguments)


def test_repr():
    assert repr(InputGradientPenalty(2.0)) == "InputGradientPenalty(2.0, calibration_steps=100, reduction='mean')"

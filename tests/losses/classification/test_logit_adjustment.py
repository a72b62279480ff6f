"""Logit adjustment and balanced softmax against plain numpy, their equality, and a shift that changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from losses.classification import (
    BalancedSoftmaxLoss,
    LogitAdjustedLoss,
    WeightedCrossEntropyLoss,
    adjust_logits,
    focal_loss,
    ldam_loss,
    log_prior,
    logit_adjusted_loss,
    seesaw_loss,
    weighted_cross_entropy,
)
from losses.classification._shifted import shifted_cross_entropy

GENERATOR = torch.Generator().manual_seed(23)
COUNTS = [500, 40, 3, 1]


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def labels(high, *shape):
    return torch.randint(high, shape, generator=GENERATOR)


def balanced_softmax(logits, target, counts):
    """The paper's probability, each exponential times its count, one at a time in float64."""
    losses = np.zeros(target.shape)
    for where in np.ndindex(*target.shape):
        exponentials = counts * np.exp(logits[(where[0], slice(None), *where[1:])].astype(np.float64))
        losses[where] = -np.log(exponentials[target[where]] / exponentials.sum())
    return losses


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
def test_against_loops(tau, positions):
    logits, target = randn(5, 4, *positions), labels(4, 5, *positions)
    frequency = np.array(COUNTS, dtype=np.float64) / sum(COUNTS)
    expected = balanced_softmax(logits.numpy(), target.numpy(), frequency**tau)
    given = LogitAdjustedLoss(COUNTS, tau, reduction="none")(logits, target)
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert LogitAdjustedLoss(COUNTS, tau)(logits, target).item() == pytest.approx(expected.mean(), rel=1e-4)


def test_balanced_softmax_is_that_of_the_paper_and_logit_adjustment_at_one():
    logits, target = randn(5, 4, 2), labels(4, 5, 2)
    target[0, 0] = 3
    given = BalancedSoftmaxLoss(COUNTS, reduction="none")(logits, target)
    expected = balanced_softmax(logits.numpy(), target.numpy(), np.array(COUNTS, dtype=np.float64))
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(given, LogitAdjustedLoss(COUNTS, tau=1.0, reduction="none")(logits, target))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_tau_zero_or_equal_counts_are_cross_entropy(smoothing, reduction, soft):
    logits = randn(6, 4, 3)
    target = randn(6, 4, 3).softmax(1) if soft else labels(4, 6, 3)
    if not soft:
        target[0] = -100
    settings = {"label_smoothing": smoothing, "reduction": reduction}
    expected = F.cross_entropy(logits, target, **settings)
    torch.testing.assert_close(LogitAdjustedLoss(COUNTS, 0.0, **settings)(logits, target), expected)
    torch.testing.assert_close(BalancedSoftmaxLoss([7, 7, 7, 7], **settings)(logits, target), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_cross_entropy_of_shifted_logits(smoothing):
    logits, target, table, group = randn(6, 4, 2), labels(4, 6, 2), torch.rand(2, 4), labels(2, 6)
    target[0, 1] = -100
    weight, adjustment = torch.rand(6), randn(4)
    arguments = {"class_weight": table, "group": group, "sample_weight": weight}
    plain = WeightedCrossEntropyLoss(4, num_groups=2, label_smoothing=smoothing)
    expected = plain(logits + adjustment[:, None], target, **arguments)
    given = logit_adjusted_loss(logits, target, adjustment=adjustment, label_smoothing=smoothing, **arguments)
    torch.testing.assert_close(given, expected)


def test_first_and_second_derivatives():
    logits, target = randn(4, 3, 2).double().requires_grad_(), labels(3, 4, 2)
    target[0] = -100
    soft, adjustment = randn(4, 3, 2).double().softmax(1), log_prior([9, 3, 1]).double()
    weight = torch.rand(3).double()
    for labels_or_soft in (target, soft):

        def loss(scores, labels_or_soft=labels_or_soft):
            return logit_adjusted_loss(scores, labels_or_soft, adjustment=adjustment, class_weight=weight)

        assert torch.autograd.gradcheck(loss, (logits,))
        assert torch.autograd.gradgradcheck(loss, (logits,))


def test_a_learned_adjustment_gets_its_gradient():
    logits, target, adjustment = randn(4, 3).double(), labels(3, 4), randn(3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: logit_adjusted_loss(logits, target, adjustment=a), (adjustment,))


def test_an_empty_class_has_a_finite_prior_and_changes_no_other():
    """The log of its count would be minus infinity: NaN as soon as it is a target, or is smoothed."""
    torch.testing.assert_close(log_prior([90, 0, 10]), torch.tensor([0.9, 0.01, 0.1]).log())
    torch.testing.assert_close(log_prior([0.9, 0.0, 0.1]), torch.tensor([0.9, 0.1, 0.1]).log())  # shares
    logits = randn(2, 3).requires_grad_()
    for criterion in (LogitAdjustedLoss([90, 0, 10], label_smoothing=0.1), BalancedSoftmaxLoss([90, 0, 10])):
        loss = criterion(logits, torch.tensor([0, 1]))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("positions", [(), (2,)])
def test_post_hoc_adjustment_divides_by_the_prior(positions):
    logits = randn(5, 4, *positions)
    probabilities = logits.softmax(1).numpy() / (np.array(COUNTS) ** 1.5).reshape(4, *[1] * len(positions))
    expected = probabilities / probabilities.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(adjust_logits(logits, COUNTS, 1.5).softmax(1).numpy(), expected, rtol=1e-4)
    torch.testing.assert_close(adjust_logits(logits, COUNTS, tau=0.0), logits)


def test_the_loss_undoes_the_post_hoc_adjustment():
    logits, target = randn(5, 4), labels(4, 5)
    loss = LogitAdjustedLoss(COUNTS, 0.7)(adjust_logits(logits, COUNTS, 0.7), target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))


def test_a_controller_of_margins_sets_the_adjustment_in_place():
    criterion, logits, target = LogitAdjustedLoss(COUNTS), randn(6, 4).requires_grad_(), labels(4, 6)
    address = criterion.adjustment.data_ptr()
    loss = criterion(logits, target)
    with torch.inference_mode():  # where a validation hook runs
        criterion.set_adjustment((log_prior(COUNTS) - torch.tensor([1.0, 2.0, 3.0, 4.0]).log()).tolist())
    loss.backward()
    assert criterion.adjustment.data_ptr() == address
    weights = torch.tensor(COUNTS) / torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = balanced_softmax(logits.detach().numpy(), target.numpy(), weights.numpy()).mean()
    assert criterion(logits, target).item() == pytest.approx(expected, rel=1e-4)
    other = LogitAdjustedLoss([1, 1, 1, 1])
    other.load_state_dict(criterion.state_dict())
    torch.testing.assert_close(other(logits, target), criterion(logits, target))


def test_a_new_adjustment_compiles_nothing_anew():
    torch.compiler.reset()
    counter, criterion = CompileCounter(), LogitAdjustedLoss(COUNTS)
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    logits, target = randn(6, 4), labels(4, 6)
    before = compiled(logits, target)
    criterion.set_adjustment([0.0, 1.0, -1.0, 2.0])
    torch.testing.assert_close(compiled(logits, target), criterion(logits, target))
    assert compiled(logits, target) != before
    assert counter.frame_count == 1


PER_SAMPLE = {
    "weighted": lambda z, y: weighted_cross_entropy(z, y, class_weight=torch.tensor([1.0, 2.0, 0.5, 4.0])),
    "focal": lambda z, y: focal_loss(z, y, gamma=2.0),
    "logit-adjusted": lambda z, y: logit_adjusted_loss(z, y, adjustment=log_prior(COUNTS)),
    "LDAM": lambda z, y: ldam_loss(z, y, margins=torch.tensor([0.1, 0.2, 0.3, 0.5]), scale=3.0),
    "Seesaw": lambda z, y: seesaw_loss(z, y, class_counts=COUNTS),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("name", PER_SAMPLE)
def test_gradients_by_sample(name, positions):
    """``vmap`` of ``grad``, as for differential privacy or influence, against one backward pass a sample."""
    loss, layer = PER_SAMPLE[name], randn(5, 4)
    data, target = randn(6, 5, *positions), labels(4, 6, *positions)

    def one(weight, sample, label):
        return loss(torch.einsum("f...,fc->c...", sample, weight).unsqueeze(0), label.unsqueeze(0))

    given = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(layer, data, target)
    for row, sample, label in zip(given, data, target, strict=True):
        leaf = layer.clone().requires_grad_()
        one(leaf, sample, label).backward()
        torch.testing.assert_close(row, leaf.grad)


@pytest.mark.parametrize("mapped", ["logits", "target", "shift", "margin", "all"])
def test_the_fast_pass_under_vmap(mapped):
    shapes = {"logits": (6, 2, 4, 3), "target": (6, 2, 3), "shift": (4, 2, 1), "margin": (6, 2, 3)}  # calls on axis 1
    values = {name: labels(4, *shape) if name == "target" else randn(*shape) for name, shape in shapes.items()}
    dims = {name: 1 if mapped in (name, "all") else None for name in values}
    given = {name: value if dims[name] else value[:, 0] for name, value in values.items()}
    given["logits"] = given["logits"].clone().requires_grad_()

    def loss(logits, target, shift, margin):
        return shifted_cross_entropy(logits, target, 2.0, shift, margin)

    losses = torch.func.vmap(loss, in_dims=tuple(dims.values()))(*given.values())
    (gradient,) = torch.autograd.grad(losses.square().sum(), given["logits"])
    calls = [[value[:, call] if dims[name] else value for name, value in given.items()] for call in range(2)]
    expected = torch.stack([loss(*arguments) for arguments in calls])
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), given["logits"])[0])


# --- by group ----------------------------------------------------------------------------------------------------

TABLE = [[500, 40, 3, 1], [1, 30, 600, 0], [0, 0, 0, 0]]


def test_each_row_is_normalised_by_itself():
    prior = log_prior(TABLE)
    for row, counts in zip(prior[:2], TABLE[:2], strict=True):
        torch.testing.assert_close(row, log_prior(counts))
    assert prior[2].tolist() == [0.0] * 4  # nothing is known of it
    torch.testing.assert_close(log_prior([[0.9, 0.1, 0.0], [5, 0, 5]])[1], torch.tensor([0.5, 0.1, 0.5]).log())
    torch.testing.assert_close(log_prior([[0.9, 0.1, 0.0], [5, 0, 5]])[0], torch.tensor([0.9, 0.1, 0.1]).log())


@pytest.mark.parametrize("tau", [0.5, 1.0])
@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
def test_group_rows_against_loops(tau, positions):
    logits, target, group = randn(8, 4, *positions), labels(4, 8, *positions), labels(3, 8)
    counts = np.array([[500, 40, 3, 1], [1, 30, 600, 1], [1, 1, 1, 1]], dtype=np.float64)
    expected = np.zeros(target.shape)
    for sample, row in enumerate(group.tolist()):
        share = (counts[row] / counts[row].sum()) ** tau
        one = slice(sample, sample + 1)
        expected[one] = balanced_softmax(logits[one].numpy(), target[one].numpy(), share)
    criterion = LogitAdjustedLoss(TABLE, tau, reduction="none")
    np.testing.assert_allclose(criterion(logits, target, group=group).numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_group_is_the_loss_by_class_to_the_last_bit(soft, smoothing):
    logits = randn(6, 4, 2)
    target = randn(6, 4, 2).softmax(1) if soft else labels(4, 6, 2)
    group = torch.ones(6, dtype=torch.int32)
    table, plain = (LogitAdjustedLoss(counts, label_smoothing=smoothing) for counts in (TABLE, TABLE[1]))
    assert torch.equal(table(logits, target, group=group), plain(logits, target))


def test_group_rows_under_weights_and_ignored_positions():
    logits, target, group = randn(6, 4, 2), labels(4, 6, 2), labels(3, 6)
    target[0, 1] = -100
    adjustment, arguments = randn(3, 4), {"class_weight": torch.rand(3, 4), "sample_weight": torch.rand(6)}
    expected = weighted_cross_entropy(logits + adjustment[group][:, :, None], target, group=group, **arguments)
    given = logit_adjusted_loss(logits, target, adjustment=adjustment, group=group, **arguments)
    torch.testing.assert_close(given, expected)


def test_derivatives_by_group():
    logits, target, group = randn(4, 3, 2).double().requires_grad_(), labels(3, 4, 2), torch.tensor([0, 1, 1, 0])
    target[0, 0] = -100
    fixed, learned = randn(2, 3).double(), randn(2, 3).double().requires_grad_()
    for labels_or_soft in (target, randn(4, 3, 2).double().softmax(1)):

        def loss(scores, table, labels_or_soft=labels_or_soft):
            return logit_adjusted_loss(scores, labels_or_soft, adjustment=table, group=group)

        assert torch.autograd.gradcheck(lambda scores: loss(scores, fixed), (logits,))
        assert torch.autograd.gradgradcheck(lambda scores: loss(scores, fixed), (logits,))
        assert torch.autograd.gradcheck(loss, (logits, learned))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_by_sample_and_group():
    layer, data, target, group = randn(5, 4), randn(6, 5), labels(4, 6), labels(3, 6)

    def one(weight, sample, label, row):
        parts = (sample @ weight).unsqueeze(0), label.unsqueeze(0)
        return logit_adjusted_loss(*parts, adjustment=log_prior(TABLE), group=row.unsqueeze(0))

    given = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0, 0))(layer, data, target, group)
    for found, *parts in zip(given, data, target, group, strict=True):
        leaf = layer.clone().requires_grad_()
        one(leaf, *parts).backward()
        torch.testing.assert_close(found, leaf.grad)


def test_a_new_table_compiles_nothing_anew():
    torch.compiler.reset()
    counter, criterion = CompileCounter(), LogitAdjustedLoss(TABLE)
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    logits, target, group = randn(6, 4), labels(4, 6), torch.tensor([0, 1, 2, 0, 1, 2])
    before, address = compiled(logits, target, group=group), criterion.adjustment.data_ptr()
    criterion.set_adjustment(randn(3, 4).tolist())
    torch.testing.assert_close(compiled(logits, target, group=group), criterion(logits, target, group=group))
    assert compiled(logits, target, group=group) != before
    assert counter.frame_count == 1
    assert criterion.adjustment.data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_by_group_computes_in_float32(dtype):
    logits, target, group = randn(6, 4).to(dtype), labels(4, 6), labels(3, 6)
    loss = LogitAdjustedLoss(TABLE)(logits, target, group=group)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LogitAdjustedLoss(TABLE)(logits.float(), target, group=group))


def test_refusals_by_group():
    criterion, logits, target = LogitAdjustedLoss(TABLE), randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"one row for each of 3 groups, but `group` is missing: pass `group=`"):
        criterion(logits, target)
    for bad in (3, -1):
        with pytest.raises(ValueError, match=rf"`group` must lie between 0 and 2, got {bad}. Groups are counted"):
            criterion(logits, target, group=torch.tensor([0, bad]))
    with pytest.raises(TypeError, match=r"`group` must hold integer group indices, got torch.float32"):
        criterion(logits, target, group=torch.zeros(2))
    with pytest.raises(ValueError, match=r"`group` must have shape \(samples,\) = \(2,\), got \(3,\)"):
        criterion(logits, target, group=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"`adjustment` must have shape \(groups, classes\) = \(3, 5\), got \(3, 4\)"):
        criterion(randn(2, 5), target, group=target)
    with pytest.raises(ValueError, match=r"`values` must have shape \(groups, classes\) = \(3, 4\), got \(4,\)"):
        criterion.set_adjustment([0.0] * 4)
    with pytest.raises(ValueError, match=r"`adjustment` must lie between .*, got nan"):
        logit_adjusted_loss(logits, target, adjustment=torch.full((3, 4), torch.nan), group=target)
    with pytest.raises(ValueError, match=r"`class_counts` must be finite and not negative, got -1"):
        LogitAdjustedLoss([[1, -1], [1, 1]])
    with pytest.raises(ValueError, match="`class_counts` must have a class with samples"):
        LogitAdjustedLoss([[0, 0], [0, 0]])
    with pytest.raises(ValueError, match=r"`class_counts` must have shape \(classes,\) = \(4,\), got \(3, 4\)"):
        adjust_logits(logits, TABLE)


def test_refused_values_leave_the_old_ones():
    criterion = LogitAdjustedLoss([1, 1])
    with pytest.raises(ValueError, match=r"`values` must be finite, got -inf"):
        criterion.set_adjustment([1.0, -float("inf")])
    with pytest.raises(ValueError, match=r"`values` must have shape \(classes,\) = \(2,\), got \(3,\)"):
        criterion.set_adjustment([1.0, 2.0, 3.0])
    assert criterion.adjustment.tolist() == pytest.approx([np.log(0.5)] * 2)


def test_class_weights_start_at_one_and_multiply():
    criterion, logits, target = BalancedSoftmaxLoss(COUNTS), randn(6, 4), labels(4, 6)
    plain = criterion(logits, target)
    criterion.set_class_weight([3.0, 3.0, 3.0, 3.0])
    torch.testing.assert_close(criterion(logits, target), 3 * plain)


def test_repr_builds_it_again():
    expected = "LogitAdjustedLoss([3, 1], tau=0.5, label_smoothing=0.0, reduction='mean', ignore_index=-100)"
    assert repr(LogitAdjustedLoss([3, 1], tau=0.5)) == expected
    expected = "LogitAdjustedLoss([[3, 1], [0, 2]], tau=1.0, label_smoothing=0.0, reduction='mean', ignore_index=-100)"
    assert repr(LogitAdjustedLoss([[3, 1], [0, 2]])) == expected
    expected = "BalancedSoftmaxLoss([3, 1], label_smoothing=0.0, reduction='mean', ignore_index=-100)"
    assert repr(BalancedSoftmaxLoss([3, 1])) == expected
    expected = "BalancedSoftmaxLoss([[3, 1], [0, 2]], label_smoothing=0.0, reduction='mean', ignore_index=-100)"
    assert repr(BalancedSoftmaxLoss([[3, 1], [0, 2]])) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": -1.0}, r"`tau` must be a finite number, at least 0, got -1.0"),
        ({"class_counts": [0, 0]}, r"`class_counts` must have a class with samples, got zeros only"),
        ({"label_smoothing": 1.5}, r"`label_smoothing` must be a finite number, between 0 and 1, got 1.5"),
    ],
)
def test_construction_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        LogitAdjustedLoss(**{"class_counts": [9, 1], **arguments})


def test_call_checks():
    logits, target = torch.zeros(1, 3), torch.tensor([0])
    with pytest.raises(ValueError, match=r"`adjustment` must have shape \(classes,\) = \(3,\), got \(2,\)"):
        logit_adjusted_loss(logits, target, adjustment=torch.zeros(2))
    for bad in (torch.nan, -torch.inf):
        with pytest.raises(ValueError, match=rf"`adjustment` must lie between .*, got {bad}. `log_prior` is finite"):
            logit_adjusted_loss(logits, target, adjustment=torch.tensor([0.0, bad, 0.0]))
    with pytest.raises(ValueError, match=r"`class_counts` must have shape \(classes,\) = \(3,\), got \(2,\)"):
        adjust_logits(logits, [1, 2])
    with pytest.raises(ValueError, match=r"`target` must lie between 0 and 2, got -1"):
        logit_adjusted_loss(logits, torch.tensor([-1]), adjustment=torch.zeros(3))
    with pytest.raises(ValueError, match=r"`label_smoothing` must be a finite number, between 0 and 1, got -1"):
        logit_adjusted_loss(logits, target, adjustment=torch.zeros(3), label_smoothing=-1)

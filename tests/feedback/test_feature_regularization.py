"""Feature regularisation: strengths that follow reliance, applied after each step of the optimiser."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import losses
from attn_callbacks.feedback.feature_regularization import FeatureRegularization
from tests.feedback.checkpoint import saved
from tests.feedback.feature_steps import finding, real_report, report

SETS = {"border": (0, 3), "names": (1,)}


def module(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def penalty(strength=0.05, **arguments):
    return losses.GroupLassoPenalty(strength, num_features=5, **arguments)


def new(**arguments):
    return FeatureRegularization(penalty(), "0.weight", SETS, **arguments)


def bound(feedback, model, build=torch.optim.SGD):
    optimizer = build(model.parameters(), lr=0.1)
    feedback.bind(model)
    feedback.bind_optimizers([optimizer])
    return optimizer


def train(model, optimizer, steps=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(16, 5, generator=random)
        F.cross_entropy(model(inputs), (inputs[:, 0] > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_strengths_follow_reliance():
    feedback = new(strength=2.0, memory=0.0)
    feedback.bind(module())
    (action,) = feedback.apply(report(finding(where="border", size=0.3), finding("class", "names"), measured=["names"]))
    assert feedback.penalty.feature_strength.tolist() == pytest.approx([0.6, 0, 0, 0.6, 0])
    assert str(action) == "border: strength 0.00 -> 0.60 (outcomes changed without it 0.30)"
    assert (action.finding, action.old, action.new) == (("feature", "border"), 0.0, pytest.approx(0.6))
    feedback.apply(report(finding(where="names", size=0.1)))  # the border was not measured: it keeps its strength
    assert feedback.penalty.feature_strength.tolist() == pytest.approx([0.6, 0.2, 0, 0.6, 0])
    feedback.apply(report(measured=["border"]))
    assert feedback.penalty.feature_strength.tolist() == pytest.approx([0, 0.2, 0, 0, 0])


def test_real_report():
    feedback = new(memory=0.0)
    feedback.bind(module())
    feedback.apply(real_report(border=60, names=2))
    assert feedback.penalty.feature_strength.tolist() == pytest.approx([0.3, 0, 0, 0.3, 0])
    feedback.apply(real_report(names=60))
    assert feedback.penalty.feature_strength.tolist() == pytest.approx([0.3, 0.3, 0, 0.3, 0])
    feedback.apply(real_report(border=2))
    assert feedback.penalty.feature_strength.tolist() == pytest.approx([0, 0.3, 0, 0, 0])


def test_feature_in_two_sets_takes_the_stronger():
    feedback = FeatureRegularization(penalty(), "0.weight", {"border": (0, 3), "corner": (3,)})
    feedback.bind(module())
    feedback.apply(report(finding(where="border", size=0.4), finding(where="corner", size=0.1)))
    assert feedback.penalty.feature_strength.tolist() == pytest.approx([0.4, 0, 0, 0.4, 0])


def test_memory_lets_go_slowly_and_then_wholly():
    feedback = new(memory=0.5)
    feedback.bind(module())
    feedback.apply(report(finding(where="names", size=0.4)))
    seen = []
    for _ in range(9):
        feedback.apply(report(measured=["names"]))
        seen.append(float(feedback.penalty.feature_strength[1]))
    assert seen[:3] == pytest.approx([0.2, 0.1, 0.05])
    assert seen[-1] == 0


def test_answers_its_own_sets_alone():
    found = report(finding(where="border"), finding(where="other"), finding("class", "names"))
    assert [each.where for each in new().answered(found)] == ["border"]


@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", ["group", "elastic"])
def test_each_step_ends_with_the_proximal_step(build, kind):
    def make():
        if kind == "group":
            return losses.GroupLassoPenalty(0.05, num_features=5)
        return losses.ElasticNetPenalty(0.05, 0.01, num_features=5)

    fed, plain = module(), module()
    feedback = FeatureRegularization(make(), "0.weight", SETS)
    optimizer = bound(feedback, fed, build)
    feedback.apply(report(finding(where="border", size=0.8)))
    reference, other = make(), build(plain.parameters(), lr=0.1)
    reference.set_feature_strength([0.8, 0, 0, 0.8, 0])
    reference.attach(other, plain[0].weight)
    train(fed, optimizer, 20)
    train(plain, other, 20)
    assert same_weights(fed, plain)
    untouched = module()
    train(untouched, build(untouched.parameters(), lr=0.1), 20)
    assert fed[0].weight[:, 0].norm() < untouched[0].weight[:, 0].norm()


def test_strong_reliance_ends_in_exact_zeros():
    model, feedback = module(), FeatureRegularization(penalty(1.0), "0.weight", SETS)
    optimizer = bound(feedback, model, torch.optim.AdamW)
    feedback.apply(report(finding(where="border", size=1.0)))
    train(model, optimizer, 30)
    assert model[0].weight[:, [0, 3]].eq(0).all()
    assert model[0].weight[:, [1, 2, 4]].ne(0).all()


def test_nothing_found_changes_nothing():
    fed, plain = module(), module()
    feedback = new()
    optimizer = bound(feedback, fed)
    feedback.apply(report(measured=SETS))
    train(fed, optimizer)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    assert same_weights(fed, plain)
    assert not feedback.penalty.attached


def test_hold_and_withdraw_change_nothing_and_yet_decide():
    fed, plain = module(), module()
    feedback = new(memory=0.0)
    feedback.hold(True)
    optimizer = bound(feedback, fed)
    (action,) = feedback.apply(report(finding(where="border", size=0.5)))
    assert action.new == 0.5
    assert not feedback.penalty.feature_strength.any()
    assert not feedback.penalty.attached
    train(fed, optimizer)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    assert same_weights(fed, plain)
    feedback.hold(False)
    assert feedback.penalty.attached
    assert feedback.penalty.feature_strength.tolist() == [0.5, 0, 0, 0.5, 0]
    feedback.withdraw()
    assert not feedback.penalty.attached
    assert not feedback.penalty.feature_strength.any()


@pytest.mark.parametrize("order", ["load, bind", "bind, load"])
def test_resume_is_bitwise(order):
    whole, feedback = module(), new()
    optimizer = bound(feedback, whole)
    feedback.apply(report(finding(where="border", size=0.37)))
    train(whole, optimizer, 2)
    resumed, again = copy.deepcopy(whole), new()
    state = saved(feedback.state_dict())
    if order == "load, bind":
        again.load_state_dict(state)
    other = bound(again, resumed)
    again.load_state_dict(state)
    again.load_state_dict({})
    assert again.state_dict() == feedback.state_dict()
    for each in (feedback, again):
        each.apply(report(measured=SETS))
    train(whole, optimizer, 3, seed=1)
    train(resumed, other, 3, seed=1)
    assert same_weights(whole, resumed)


def test_next_run_of_the_module_shrinks_once_a_step():
    model, feedback = module(), new()
    first = bound(feedback, model)
    feedback.apply(report(finding(where="border")))
    second = bound(feedback, model)
    feedback.bind_optimizers([second])
    assert len(first._optimizer_step_post_hooks) == 0
    assert len(second._optimizer_step_post_hooks) == 1


def test_another_module_starts_anew():
    model, other = module(), module(1)
    feedback = new()
    optimizers = [bound(feedback, model)]
    feedback.apply(report(finding(where="border")))
    twin, state = pickle.loads(pickle.dumps(feedback)), feedback.state_dict()
    assert not twin.penalty.attached
    optimizers.append(bound(twin, other))
    assert twin.penalty.attached
    feedback.bind(other)
    assert not feedback.penalty.feature_strength.any()
    feedback.load_state_dict(state)  # before there is an optimizer of this run
    assert not feedback.penalty.attached
    feedback.bind_optimizers(optimizers)
    assert feedback.penalty.attached
    assert len(optimizers[0]._optimizer_step_post_hooks) == 0


def test_several_weights_and_several_optimizers():
    model = nn.ModuleDict({"left": nn.Linear(5, 2), "right": nn.Linear(5, 3), "head": nn.Linear(2, 2)})
    feedback = FeatureRegularization(penalty(), ["left.weight", "right.weight"], SETS)
    feedback.bind(model)
    head = torch.optim.SGD(model["head"].parameters(), lr=0.1)
    both = torch.optim.SGD([*model["left"].parameters(), *model["right"].parameters()], lr=0.1)
    feedback.bind_optimizers([head, both])
    feedback.apply(report(finding(where="border")))
    assert len(both._optimizer_step_post_hooks) == 1
    with pytest.raises(ValueError, match=r"holds all of \['left.weight', 'right.weight'\], got 1 of which none does"):
        feedback.bind_optimizers([head])


def test_rows_of_an_embedding():
    model = nn.Sequential(nn.Embedding(5, 3))
    feedback = FeatureRegularization(penalty(dim=0), "0.weight", SETS)
    bound(feedback, model)
    with pytest.raises(ValueError, match=r"`0.weight` must have 5 features along axis 1 .* got shape \(5, 3\)"):
        FeatureRegularization(penalty(), "0.weight", SETS).bind(model)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("head.weight", "Expected a parameter at `head.weight` of Sequential, got no such attribute"),
        ("0", "Expected a parameter at `0` of Sequential, got Linear"),
        ("2.weight", r"must have 5 features along axis 1 .* got shape \(2, 4\)"),
    ],
)
def test_wrong_paths_are_refused(path, message):
    with pytest.raises(ValueError, match=message):
        FeatureRegularization(penalty(), path, SETS).bind(module())


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"penalty": print}, "`penalty` must be a module such as"),
        (ValueError, {"penalty": nn.Identity()}, "`penalty` must have strengths by feature"),
        (ValueError, {"penalty": losses.GroupLassoPenalty(0.1)}, "`penalty` must have strengths by feature"),
        (TypeError, {"features": ["border"]}, "`features` must map the name of each set"),
        (ValueError, {"features": {"border": (0, 5)}}, "must name some of the 5 features by 0 to 4"),
        (ValueError, {"features": {"border": ()}}, "must name some of the 5 features"),
        (TypeError, {"features": {"border": (0.5,)}}, "must be an integer"),
        (ValueError, {"strength": 0}, "`strength` must be above 0 and finite, got 0"),
        (ValueError, {"memory": 2}, "`memory` must lie between 0 and 1, got 2"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        FeatureRegularization(**{"penalty": penalty(), "weights": "0.weight", "features": SETS, **arguments})


def test_without_a_module_it_says_so():
    with pytest.raises(ValueError, match=r"Call `bind\(module\)` first"):
        new().bind_optimizers([torch.optim.SGD(module().parameters(), lr=0.1)])

"""Which checkpoints a loss with state loads: its own, and those that lack some or all of its state."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from losses import LogitAdjustedLoss, WeightedCrossEntropyLoss
from losses._state import allow_missing_state


class Keeper(nn.Module):
    """A loss with a buffer, a parameter, a buffer that no checkpoint holds, and whatever children it is given."""

    def __init__(self, **children):
        super().__init__()
        self.register_buffer("running", torch.zeros(2))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        self.scale = nn.Parameter(torch.ones(1))
        for name, child in children.items():
            self.add_module(name, child)
        allow_missing_state(self)

    @torch.no_grad()
    def set(self, value):
        self.running.fill_(value)
        self.scale.fill_(value)
        return self

    def values(self):
        return [self.running[0].item(), self.scale.item()]


class Model(nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.layer, self.criterion = nn.Linear(2, 2), criterion


def plain():
    return Model(nn.CrossEntropyLoss()).state_dict()


def test_a_checkpoint_without_the_loss_loads_and_says_so():
    model, saved = Model(Keeper().set(3)), plain()
    names = list(saved)
    with pytest.warns(UserWarning, match=r"lacks state of Keeper \(criterion.scale, criterion.running\)") as caught:
        result = model.load_state_dict(saved)
    assert len(caught) == 1
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(model.layer.weight, saved["layer.weight"])
    assert model.criterion.values() == [3, 3]
    assert list(saved) == names


def test_its_own_state_loads_silently():
    model = Model(Keeper())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(Model(Keeper().set(3)).state_dict())
    assert model.criterion.values() == [3, 3]


@pytest.mark.parametrize(("lost", "values"), [("running", [5, 3]), ("scale", [3, 5])])
def test_a_part_that_is_missing_stays_and_the_rest_loads(lost, values):
    saved = Model(Keeper().set(3)).state_dict()
    del saved[f"criterion.{lost}"]
    model = Model(Keeper().set(5))
    with pytest.warns(UserWarning, match=rf"lacks state of Keeper \(criterion.{lost}\)"):
        model.load_state_dict(saved)
    assert model.criterion.values() == values


def test_the_state_of_another_loss_is_refused():
    saved = {**plain(), "criterion.class_weight": torch.ones(2)}
    with pytest.warns(UserWarning, match="lacks state"), pytest.raises(RuntimeError, match="Unexpected key"):
        Model(Keeper()).load_state_dict(saved)


def test_children_without_the_permission_are_still_required():
    model = Model(Keeper(gate=nn.Linear(1, 1)))
    with (
        pytest.warns(UserWarning, match="lacks state"),
        pytest.raises(RuntimeError, match=r'Missing key.*"criterion.gate.weight"'),
    ):
        model.load_state_dict(plain())


def test_losses_inside_losses_keep_their_states():
    model = Model(Keeper(first=Keeper().set(1), second=Keeper().set(2)).set(3))
    with pytest.warns(UserWarning, match="lacks state") as caught:
        model.load_state_dict(plain())
    assert len(caught) == 3
    assert "(criterion.second.scale, criterion.second.running)" in str(caught[2].message)
    parts = (model.criterion, model.criterion.first, model.criterion.second)
    assert [part.values() for part in parts] == [[3, 3], [1, 1], [2, 2]]


def test_a_loss_added_beside_another_keeps_its_state():
    saved = nn.ModuleDict({"old": Keeper().set(3)}).state_dict()
    both = nn.ModuleDict({"old": Keeper(), "older": Keeper().set(5)})
    with pytest.warns(UserWarning, match=r"\(older.scale, older.running\)"):
        both.load_state_dict(saved)
    assert both["old"].values() == [3, 3]
    assert both["older"].values() == [5, 5]


def test_parameter_dicts_may_be_missing_too():
    weights = nn.ParameterDict({"task": nn.Parameter(torch.full((1,), 4.0))})
    allow_missing_state(weights)
    model = Model(Keeper(weights=weights))
    with pytest.warns(UserWarning, match="lacks state") as caught:
        model.load_state_dict(plain())
    assert "ParameterDict (criterion.weights.task)" in str(caught[1].message)
    assert model.criterion.weights["task"].item() == 4.0


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "0.model."])
def test_prefixes_of_wrappers(prefix):
    model = Model(Keeper().set(3))
    outer = model
    for name in reversed(prefix.split(".")[:-1]):
        wrapper = nn.Module()
        wrapper.add_module(name, outer)
        outer = wrapper
    with pytest.warns(UserWarning, match=rf"\({prefix}criterion.scale, {prefix}criterion.running\)"):
        outer.load_state_dict({prefix + name: value for name, value in plain().items()})
    assert model.criterion.values() == [3, 3]


def test_a_loss_alone_loads_nothing():
    loss = Keeper().set(3)
    with pytest.warns(UserWarning, match=r"\(scale, running\)"):
        loss.load_state_dict(nn.CrossEntropyLoss().state_dict())
    assert loss.values() == [3, 3]


def test_loading_by_assignment_keeps_what_can_be_trained():
    model = Model(Keeper().set(3))
    with pytest.warns(UserWarning, match="lacks state"):
        model.load_state_dict(plain(), assign=True)
    assert model.criterion.values() == [3, 3]
    assert isinstance(model.criterion.scale, nn.Parameter)
    assert model.criterion.scale.requires_grad
    model.criterion.set(4)
    assert model.criterion.values() == [4, 4]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_fills_in_its_own_state(way):
    model = Model(Keeper().set(3))
    other = way(model)
    other.criterion.set(5)
    with pytest.warns(UserWarning, match="criterion.running"):
        other.load_state_dict(plain())
    assert other.criterion.values() == [5, 5]
    assert model.criterion.values() == [3, 3]
    del model
    with pytest.warns(UserWarning, match="criterion.running"):
        other.load_state_dict(plain())  # its hook does not hang on the original


def test_two_permissions_are_one():
    loss = Keeper().set(3)
    allow_missing_state(loss)
    with pytest.warns(UserWarning, match="lacks state") as caught:
        loss.load_state_dict({})
    assert len(caught) == 1


def test_a_loss_without_state_is_silent():
    criterion = nn.CrossEntropyLoss()
    allow_missing_state(criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Model(criterion).load_state_dict(plain())


@pytest.mark.parametrize(
    "way", [lambda loss: loss.bfloat16(), lambda loss: loss.half(), lambda loss: loss.to(torch.half)]
)
def test_buffers_do_not_pass_through_half_precision(way):
    loss = WeightedCrossEntropyLoss(3, [1e5, 1.001, 1e-7])
    before = loss.class_weight.clone()
    assert torch.equal(way(loss).class_weight, before)
    assert loss.class_weight.dtype == torch.float32


def test_other_dtypes_are_taken():
    assert WeightedCrossEntropyLoss(3).double().class_weight.dtype == torch.float64


@pytest.mark.parametrize("way", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_released_state_is_left_out_and_still_loads(way):
    model = Model(LogitAdjustedLoss([90, 10]))
    before = copy.deepcopy(model.state_dict())
    before["criterion.class_weight"].fill_(3.0)
    model.criterion.release_state("class_weight")
    model = way(model)
    assert [name for name in model.state_dict() if "criterion" in name] == ["criterion.adjustment"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())
        assert model.criterion.class_weight.tolist() == [1.0, 1.0]
        model.load_state_dict(before)
    assert model.criterion.class_weight.tolist() == [3.0, 3.0]

"""Which loss is found, and what is said where there is none. Through the feedback: `test_class_reweighting`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attn_callbacks.feedback.criterion import (
    check_table,
    find_weighted_loss,
    holds_table,
    release_weights,
    weight_table,
)
from losses import GroupDROLoss, LogitAdjustedLoss, WeightedCrossEntropyLoss


def holder(criterion):
    module = nn.Module()
    module.criterion = criterion
    return module


def test_both_tables_of_one_loss():
    loss = LogitAdjustedLoss([3, 1])
    module = holder(nn.ModuleList([loss]))
    for name in ("class_weight", "adjustment"):
        assert find_weighted_loss(module, "criterion", name) is loss
        assert weight_table(loss, name) is loss.get_buffer(name)
        assert holds_table(module, "criterion", name)


def test_tables_are_told_by_the_buffer():
    module = holder(WeightedCrossEntropyLoss(2))
    assert not holds_table(module, "criterion", "adjustment")
    assert not holds_table(module, "nothing", "adjustment")
    assert not holds_table(holder(GroupDROLoss(2)), "criterion", "adjustment")  # a number of its own by that name
    assert not holds_table(holder(GroupDROLoss(2)), "criterion", "class_weight")  # built without


def test_tables_are_told_by_their_axes():
    module = holder(LogitAdjustedLoss([[3, 1], [1, 3]]))
    assert holds_table(module, "criterion", "adjustment", axes=2)
    assert not holds_table(module, "criterion", "adjustment", axes=1)
    assert not holds_table(module, "criterion", "class_weight", axes=2)


def test_advice_is_that_of_the_table():
    for name, rows, one in (("adjustment", "`class_counts=` by group", "shift"), ("class_weight", "`num_g", "weight")):
        with pytest.raises(ValueError, match=rf"build the loss with one row a group \({rows}"):
            check_table(torch.ones(2), "group", f"loss.{name}")
        with pytest.raises(ValueError, match=f"pass by='group', or build the loss with one {one} a class"):
            check_table(torch.ones(2, 2), "class", f"loss.{name}")


def test_advice_names_a_loss_that_has_the_table():
    with pytest.raises(ValueError, match=r"buffer `adjustment` at .*for example `losses.LogitAdjustedLoss\("):
        find_weighted_loss(holder(nn.CrossEntropyLoss()), "criterion", "adjustment")
    with pytest.raises(ValueError, match=r"buffer `class_weight` at .*`losses.WeightedCrossEntropyLoss\("):
        find_weighted_loss(holder(nn.CrossEntropyLoss()), "criterion")
    with pytest.raises(ValueError, match=r"Pass `criterion=` one of these paths, which have it: 'criterion.0'"):
        find_weighted_loss(holder(nn.ModuleList([LogitAdjustedLoss([1, 1])])), "loss", "adjustment")


def test_only_the_released_table_leaves_the_state_dict():
    loss = LogitAdjustedLoss([3, 1])
    release_weights(loss, "adjustment")
    assert list(loss.state_dict()) == ["class_weight"]
    release_weights(nn.Linear(2, 2), "adjustment")


@pytest.mark.parametrize(
    ("by", "shape", "fits"),
    [
        ("class", (2,), True),
        ("class", (2, 2), False),
        ("group", (2, 2), True),
        ("group", (2,), False),
        ("cell", (3, 2), True),
        ("cell", (3,), False),
    ],
)
def test_axes_of_the_table(by, shape, fits):
    if fits:
        check_table(torch.ones(shape), by, "loss.class_weight")
        return
    with pytest.raises(
        ValueError, match=rf"by='{by}' needs `loss.class_weight` of shape \((classes,|groups, classes)\)"
    ):
        check_table(torch.ones(shape), by, "loss.class_weight")

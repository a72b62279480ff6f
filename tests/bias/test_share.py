"""Attention shares: what belongs together, and which error counts."""

from __future__ import annotations

import math

import pytest
import torch

from attn_callbacks.bias import AttentionShare


def test_attention_share_of_unequal_shapes_is_refused():
    with pytest.raises(ValueError, match=r"must all have shape \(classes,\)"):
        AttentionShare(torch.ones(2), torch.ones(3), torch.ones(2))


def test_attention_share_holds_outcomes_and_errors():
    mass = torch.tensor([0.3, math.nan])
    share = AttentionShare(mass, mass / 0.1, torch.tensor([80, 0]), error=torch.tensor([0.02, math.nan]))
    assert float(share.mass_error[0]) == pytest.approx(0.02)
    without = AttentionShare(mass, mass / 0.1, torch.tensor([80, 0]))
    assert float(without.mass_error[0]) == pytest.approx(math.sqrt(25 / 82 * 57 / 82 / 82))  # the bound
    assert set(share.to_dict()) == {
        *("mass", "lift", "support", "error", "share", "outcome_mass", "outcome_support", "outcome_error")
    }
    assert share.to_dict()["outcome_mass"] is None


def test_chance_of_a_set_without_attention_is_its_share():
    zero, support = torch.zeros(2), torch.tensor([80, 80])
    share = AttentionShare(zero, zero, support, error=zero, share=torch.tensor([0.3, 0.2]))
    assert share.chance.tolist() == pytest.approx([0.3, 0.2])
    assert share.mass_error.tolist() == pytest.approx([math.sqrt(1 / 82 * 81 / 82 / 82)] * 2)  # equal is not certain
    assert share.to_dict()["share"] == share.share.tolist()
    assert AttentionShare(zero, zero, support).chance.isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error": torch.ones(3)}, r"`error` must have shape \(2,\), got \(3,\)"),
        ({"share": torch.ones(3)}, r"`share` must have shape \(2,\), got \(3,\)"),
        ({"outcome_mass": torch.ones(2, 2)}, r"go together, got \['outcome_mass'\]"),
        (
            {name: torch.ones(2, 3) for name in ("outcome_mass", "outcome_support", "outcome_error")},
            r"`outcome_mass` must have shape \(2, 2\), got \(2, 3\)",
        ),
    ],
)
def test_optional_parts_of_a_share_have_to_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionShare(torch.ones(2), torch.ones(2), torch.ones(2), **arguments)

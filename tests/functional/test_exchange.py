"""Exchanging what regions hold, against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_callbacks.functional.exchange import join_contents, paste_region, region_contents


def looped(inputs: Tensor, mask: Tensor, donor: Tensor, source: Tensor, source_mask: Tensor) -> Tensor:
    """Paste place by place: ``(samples, places, features)``."""
    result = inputs.clone()
    for sample in range(len(inputs)):
        given = [source[donor[sample], p] for p in range(source.shape[1]) if source_mask[donor[sample], p]]
        places = [p for p in range(inputs.shape[1]) if mask[sample, p]]
        for number, place in enumerate(places):
            if given:
                result[sample, place] = given[number % len(given)]
    return result


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.rand(6, 8) < 0.4
    mask[2] = False
    return torch.randn(6, 8, 3), mask, torch.tensor([3, 0, 1, 2, 5, 4])


def test_contents_go_into_the_region_in_reading_order(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs, mask, donor = drawn
    pasted = paste_region(inputs, mask, region_contents(inputs, mask), donor)
    assert torch.equal(pasted, looped(inputs, mask, donor, inputs, mask))
    assert torch.equal(pasted[3], inputs[3])  # its donor has no region
    assert not torch.equal(pasted[0], inputs[0])


def test_pictures_and_ids_are_treated_as_features_of_places(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs, mask, donor = drawn
    pictures, square = inputs.mT.reshape(6, 3, 2, 4), mask.reshape(6, 2, 4)
    pasted = paste_region(pictures, square, region_contents(pictures, square), donor)
    assert torch.equal(pasted.flatten(2).mT, looped(inputs, mask, donor, inputs, mask))
    ids = torch.randint(0, 50, (6, 8))
    pasted = paste_region(ids, mask, region_contents(ids, mask), donor)
    assert pasted.dtype == torch.int64
    assert torch.equal(pasted, looped(ids[..., None], mask, donor, ids[..., None], mask)[..., 0])


def test_contents_of_several_batches_join(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs, mask, _ = drawn
    longer, full = torch.randn(2, 11, 3), torch.ones(2, 11, dtype=torch.bool)
    pool = join_contents([region_contents(inputs, mask), region_contents(longer, full)])
    donor = torch.tensor([6, 7, 6, 7, 6, 7])
    assert torch.equal(paste_region(inputs, mask, pool, donor), looped(inputs, mask, donor - 6, longer, full))


def test_an_empty_region_changes_nothing(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    inputs, mask, donor = drawn
    nothing = torch.zeros_like(mask)
    assert torch.equal(paste_region(inputs, nothing, region_contents(inputs, nothing), donor), inputs)


def test_a_mask_that_does_not_lie_on_the_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`mask` must have shape \(2, 4, 4\)"):
        region_contents(torch.zeros(2, 3, 4, 4), torch.zeros(2, 16))

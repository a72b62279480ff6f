"""Value-norm weights against the vectors themselves, built one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attn_callbacks.functional.value_norms import layer_value_norms, value_norm_weights

BATCH, HEADS, GROUPS, QUERIES, KEYS, SIZE, WIDTH = 2, 4, 2, 3, 5, 3, 7
SOURCE = torch.Generator().manual_seed(0)
MAPS = torch.randn(BATCH, HEADS, QUERIES, KEYS, generator=SOURCE).softmax(-1)
VALUE = torch.randn(BATCH, HEADS, KEYS, SIZE, generator=SOURCE)
SHARED = torch.randn(BATCH, GROUPS, KEYS, SIZE, generator=SOURCE)
PROJECTION = torch.randn(WIDTH, HEADS * SIZE, generator=SOURCE)


def vectors(value: torch.Tensor, projection: torch.Tensor | None) -> np.ndarray:
    """What key j gives to query i through head h, in float64: ``(batch, heads, queries, keys, channels)``."""
    groups = value.shape[1]
    rows = []
    for b, h, i, j in np.ndindex(BATCH, HEADS, QUERIES, KEYS):
        own = value[b, h // (HEADS // groups), j].double().numpy()
        if projection is None:
            carried = np.zeros(HEADS * SIZE)
            carried[h * SIZE : (h + 1) * SIZE] = own
        else:
            carried = projection[:, h * SIZE : (h + 1) * SIZE].double().numpy() @ own
        rows.append(MAPS[b, h, i, j].item() * carried)
    return np.array(rows).reshape(BATCH, HEADS, QUERIES, KEYS, -1)


@pytest.mark.parametrize("value", [VALUE, SHARED], ids=["own values", "shared values"])
@pytest.mark.parametrize("projection", [PROJECTION, None], ids=["projected", "bare"])
def test_equals_the_lengths_of_the_vectors(value: torch.Tensor, projection: torch.Tensor | None) -> None:
    expected = vectors(value, projection)
    found = value_norm_weights(MAPS, value, projection)
    np.testing.assert_allclose(found, np.linalg.norm(expected, axis=-1), rtol=1e-5)
    layer = layer_value_norms(MAPS, value, projection)
    np.testing.assert_allclose(layer, np.linalg.norm(expected.sum(1), axis=-1), rtol=1e-5, atol=1e-7)


def test_a_layer_is_at_most_its_heads_together() -> None:
    together = value_norm_weights(MAPS, VALUE, PROJECTION).sum(1)
    assert (layer_value_norms(MAPS, VALUE, PROJECTION) <= together + 1e-6).all()


def test_heads_that_cancel_leave_a_layer_nothing() -> None:
    value = torch.randn(1, 1, 4, 3).expand(1, 2, 4, 3)
    projection = torch.randn(6, 3)
    layer = layer_value_norms(torch.full((1, 2, 2, 4), 0.25), value, torch.cat([projection, -projection], dim=1))
    assert layer.max() < 1e-6


def test_vectors_add_up_to_the_output_of_attention() -> None:
    """Of a single key, whose weight is one, the length is that of what the module returns, less its bias."""
    model = nn.MultiheadAttention(HEADS * SIZE, HEADS, batch_first=True)
    token = torch.randn(1, 1, HEADS * SIZE)
    output, weights = model(token, token, token, average_attn_weights=False)
    _, _, value = nn.functional.linear(token, model.in_proj_weight, model.in_proj_bias).chunk(3, dim=-1)
    by_head = value.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
    found = layer_value_norms(weights, by_head, model.out_proj.weight)
    torch.testing.assert_close(found[0, 0, 0], (output - model.out_proj.bias).norm().detach())


def test_a_zero_value_carries_nothing_and_half_precision_is_widened() -> None:
    value = VALUE.clone()
    value[:, :, 2] = 0.0
    found = value_norm_weights(MAPS.bfloat16(), value.bfloat16(), PROJECTION.bfloat16())
    assert found.dtype == torch.float32
    assert not found[..., 2].any()


def test_a_batch_is_its_samples_one_by_one() -> None:
    for function in (value_norm_weights, layer_value_norms):
        whole = function(MAPS, SHARED, PROJECTION)
        for sample in range(BATCH):
            own = slice(sample, sample + 1)
            torch.testing.assert_close(whole[own], function(MAPS[own], SHARED[own], PROJECTION))


@pytest.mark.parametrize("shape", [(BATCH, 3, KEYS, SIZE), (1, HEADS, KEYS, SIZE), (BATCH, HEADS, KEYS + 1, SIZE)])
def test_values_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"`value` must have shape.*divides 4"):
        value_norm_weights(MAPS, torch.ones(shape))


def test_projections_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`projection` must have shape.*12.*transpose"):
        layer_value_norms(MAPS, VALUE, PROJECTION.mT)

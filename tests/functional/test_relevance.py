"""Relevance by hand, in loops, and where the published code divides by nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_callbacks.functional.relevance import (
    attention_relevance,
    cross_relevance,
    encoder_decoder_relevance,
)
from tests.functional.test_rollout import random_gradients, random_maps

WEIGHTS = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]])
GRADIENT = torch.tensor([[[[1.0, -1.0], [2.0, 0.0]]]])

Layers = tuple[list[Tensor], list[Tensor]]


def pair(*shape: int, layers: int = 2, seed: int = 0) -> Layers:
    """Weights and gradients of a stack of layers."""
    source = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=source).softmax(-1) for _ in range(layers)]
    return weights, random_gradients(weights, seed + 1)


def mean_map(weights: Tensor, gradients: Tensor) -> np.ndarray:
    """Of one sample: the positive part head by head, then the mean over heads."""
    heads = [
        np.maximum(own.double().numpy() * slopes.double().numpy(), 0.0)
        for own, slopes in zip(weights, gradients, strict=True)
    ]
    return sum(heads) / len(heads)


def normalised(relevance: np.ndarray) -> np.ndarray:
    output = np.eye(len(relevance))
    for i, row in enumerate(relevance - np.eye(len(relevance))):
        if row.sum() > 0:
            output[i] += row / row.sum()
    return output


def test_one_head_by_hand() -> None:
    assert attention_relevance([WEIGHTS], [GRADIENT]).tolist() == [[[1.5, 0.0], [0.5, 1.0]]]


def test_two_layers_by_hand() -> None:
    """R = (I + A)(I + A), A = [[.5, 0], [.5, 0]]."""
    found = attention_relevance([WEIGHTS] * 2, [GRADIENT] * 2)
    torch.testing.assert_close(found, torch.tensor([[[2.25, 0.0], [1.25, 1.0]]]))


def test_equals_loops() -> None:
    maps = random_maps(4)
    gradients = random_gradients(maps)
    found = attention_relevance(maps, gradients)
    for sample in range(2):
        relevance = np.eye(6)
        for own, slopes in zip(maps, gradients, strict=True):
            relevance = relevance + mean_map(own[sample], slopes[sample]) @ relevance
        np.testing.assert_allclose(found[sample], relevance, rtol=1e-5)


def test_no_gradient_leaves_the_identity() -> None:
    maps = random_maps()
    found = attention_relevance(maps, [torch.zeros_like(own) for own in maps])
    assert torch.equal(found, torch.eye(6).expand(2, 6, 6))


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_scaling_the_output_scales_what_a_layer_adds(factor: float) -> None:
    maps = random_maps(1)
    gradients = random_gradients(maps)
    added = attention_relevance(maps, gradients) - torch.eye(6)
    scaled = attention_relevance(maps, [factor * gradients[0]]) - torch.eye(6)
    torch.testing.assert_close(scaled, factor * added)


def test_negative_gradients_take_nothing_away() -> None:
    maps = random_maps()
    gradients = random_gradients(maps)
    positive = [own.clamp_min(0.0) for own in gradients]
    torch.testing.assert_close(attention_relevance(maps, gradients), attention_relevance(maps, positive))


def test_negative_parts_are_cut_before_the_heads_are_averaged() -> None:
    weights, gradients = torch.full((1, 2, 1, 1), 0.5), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    assert attention_relevance([weights], [gradients]).item() == 1.25


def test_padding_neither_gives_nor_receives() -> None:
    maps, lengths = random_maps(), torch.tensor([4, 6])
    gradients, valid = random_gradients(maps), torch.arange(6) < lengths[:, None]
    found = attention_relevance(maps, gradients, valid=valid)
    alone = attention_relevance(*([own[:1, :, :4, :4] for own in layers] for layers in (maps, gradients)))
    torch.testing.assert_close(found[:1, :4, :4], alone)
    assert not found[0, 4:].any()
    assert not found[0, :, 4:].any()


def test_a_batch_is_its_samples_one_by_one() -> None:
    maps = random_maps()
    gradients = random_gradients(maps)
    whole = attention_relevance(maps, gradients)
    for sample in range(2):
        own = slice(sample, sample + 1)
        alone = attention_relevance([m[own] for m in maps], [g[own] for g in gradients])
        torch.testing.assert_close(whole[own], alone)


# --- cross-attention ---------------------------------------------------------------------------------------------


def test_cross_by_hand() -> None:
    """norm(Rq) = I where nothing was added; norm(Rk) = [[1, 1], [0, 1]]; Abar = [[.5, 0]]."""
    keys = torch.tensor([[[1.0, 3.0], [0.0, 1.0]]])
    found = cross_relevance(WEIGHTS[:, :, :1], GRADIENT[:, :, :1], torch.ones(1, 1, 1), keys)
    assert found.tolist() == [[[0.5, 0.5]]]


def test_rows_to_which_nothing_was_added_are_not_divided() -> None:
    (weights, gradients), identity = pair(1, 3, 4, 5, layers=1), torch.eye(5)[None]
    found = cross_relevance(weights[0], gradients[0], torch.eye(4)[None], identity)
    assert found.isfinite().all()
    np.testing.assert_allclose(found[0], mean_map(weights[0][0], gradients[0][0]), rtol=1e-6)


def test_cross_equals_loops() -> None:
    weights, gradients = pair(2, 3, 4, 5, layers=1)
    queries = attention_relevance(*pair(2, 2, 4, 4, seed=3))
    keys = attention_relevance(*pair(2, 2, 5, 5, seed=7))
    found = cross_relevance(weights[0], gradients[0], queries, keys)
    for sample in range(2):
        own = mean_map(weights[0][sample], gradients[0][sample])
        expected = normalised(queries[sample].double().numpy()).T @ own @ normalised(keys[sample].double().numpy())
        np.testing.assert_allclose(found[sample], expected, rtol=1e-4, atol=1e-7)


def test_padding_of_keys_gives_nothing_to_queries() -> None:
    weights, gradients = pair(1, 3, 4, 5, layers=1)
    valid = torch.tensor([[True, True, True, False, False]])
    encoder = pair(1, 2, 5, 5, seed=7)
    keys = attention_relevance(*encoder, valid=valid)  # empty rows where there is padding
    found = cross_relevance(weights[0], gradients[0], torch.eye(4)[None], keys, valid=valid)
    shorter = attention_relevance(*([own[..., :3, :3] for own in layers] for layers in encoder))
    alone = cross_relevance(weights[0][..., :3], gradients[0][..., :3], torch.eye(4)[None], shorter)
    torch.testing.assert_close(found[..., :3], alone)
    assert not found[..., 3:].any()


def encoder_decoder_loops(encoder: Layers, decoder: Layers, cross: Layers, sample: int) -> np.ndarray:
    """Encoder first; then block by block self- before cross-attention."""
    source = np.eye(encoder[0][0].shape[-1])
    for own, slopes in zip(*encoder, strict=True):
        source = source + mean_map(own[sample], slopes[sample]) @ source
    target = np.eye(decoder[0][0].shape[-1])
    between = np.zeros((len(target), len(source)))
    for layer in range(len(decoder[0])):
        own = mean_map(decoder[0][layer][sample], decoder[1][layer][sample])
        target, between = target + own @ target, between + own @ between
        over = mean_map(cross[0][layer][sample], cross[1][layer][sample])
        between = between + normalised(target).T @ over @ normalised(source)
    return between


def test_encoder_decoder_equals_loops() -> None:
    encoder, decoder, cross = pair(2, 3, 5, 5), pair(2, 2, 4, 4, layers=3, seed=4), pair(2, 2, 4, 5, layers=3, seed=9)
    found = encoder_decoder_relevance(encoder, decoder, cross)
    torch.testing.assert_close(found.encoder, attention_relevance(*encoder))
    torch.testing.assert_close(found.decoder, attention_relevance(*decoder))
    for sample in range(2):
        expected = encoder_decoder_loops(encoder, decoder, cross, sample)
        np.testing.assert_allclose(found.cross[sample], expected, rtol=1e-4, atol=1e-6)


def test_encoder_decoder_without_padding_is_the_shorter_one() -> None:
    encoder, decoder, cross = pair(1, 3, 5, 5), pair(1, 2, 4, 4, seed=4), pair(1, 2, 4, 5, seed=9)
    source, target = torch.arange(5)[None] < 3, torch.arange(4)[None] < 2
    found = encoder_decoder_relevance(encoder, decoder, cross, source_valid=source, target_valid=target)
    cut = [
        tuple([own[..., :rows, :columns] for own in part] for part in layers)
        for layers, rows, columns in ((encoder, 3, 3), (decoder, 2, 2), (cross, 2, 3))
    ]
    alone = encoder_decoder_relevance(*cut)
    torch.testing.assert_close(found.cross[:, :2, :3], alone.cross)
    assert not found.cross[:, 2:].any()
    assert not found.cross[..., 3:].any()
    assert not found.decoder[:, 2:].any()


def test_no_gradient_between_the_two_gives_no_relevance() -> None:
    encoder, decoder, cross = pair(1, 3, 5, 5), pair(1, 2, 4, 4), pair(1, 2, 4, 5)
    nothing = [torch.zeros_like(own) for own in cross[1]]
    assert not encoder_decoder_relevance(encoder, decoder, (cross[0], nothing)).cross.any()


# --- what is refused ---------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_refused() -> None:
    weights, gradients = pair(1, 2, 4, 5, layers=1)
    with pytest.raises(ValueError, match="must be square"):
        attention_relevance(weights, gradients)
    with pytest.raises(ValueError, match=r"`keys` must have shape \(1, 5, 5\), got \(1, 4, 4\)"):
        cross_relevance(weights[0], gradients[0], torch.eye(4)[None], torch.eye(4)[None])
    with pytest.raises(ValueError, match=r"`valid` must have shape \(batch, keys\)"):
        cross_relevance(weights[0], gradients[0], torch.eye(4)[None], torch.eye(5)[None], valid=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"`cross` must hold one layer a decoder layer \(2\), got 1"):
        encoder_decoder_relevance(pair(1, 2, 5, 5), pair(1, 2, 4, 4), (weights, gradients))
    with pytest.raises(ValueError, match=r"`decoder\[0\]` must be square"):
        encoder_decoder_relevance(pair(1, 2, 5, 5), pair(1, 2, 4, 5), (weights, gradients))

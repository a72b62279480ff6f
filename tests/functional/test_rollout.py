"""Rollout against closed forms, against loops, and against the faults of code that is around."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_callbacks.functional.rollout import attention_rollout, gradient_rollout, gradient_weights

CAUSAL = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])


def random_maps(layers: int = 3, batch: int = 2, heads: int = 3, tokens: int = 6, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, tokens, generator=source).mul(2).softmax(-1) for _ in range(layers)]


def random_gradients(maps: list[Tensor], seed: int = 1) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(own.shape, generator=source) for own in maps]


def loops(maps: list[Tensor], lengths: list[int], residual: float = 0.5) -> np.ndarray:
    """One sample, one entry after the other, on tokens without padding."""
    batch, _, tokens, _ = maps[0].shape
    output = np.zeros((batch, tokens, tokens))
    for b, n in enumerate(lengths):
        rolled = np.eye(n)
        for layer in maps:
            own = layer[b].double().numpy()
            mixed = np.zeros((n, n))
            for i in range(n):
                for j in range(n):
                    heads = [own[h, i, j] for h in range(own.shape[0])]
                    mixed[i, j] = (1 - residual) * sum(heads) / len(heads) + residual * (i == j)
                mixed[i] /= mixed[i].sum()
            rolled = mixed @ rolled
        output[b, :n, :n] = rolled
    return output


def test_two_causal_layers_by_hand() -> None:
    expected = torch.tensor([[[1.0, 0.0], [0.234375, 0.765625]]])
    torch.testing.assert_close(attention_rollout([CAUSAL, CAUSAL]), expected)


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_uniform_layers_have_a_closed_form(layers: int) -> None:
    uniform = torch.full((1, 4, 5, 5), 0.2, dtype=torch.float64)
    share = 2.0**-layers
    expected = (1 - share) * uniform[:, 0] + share * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(attention_rollout([uniform] * layers), expected)


@pytest.mark.parametrize("residual", [0.0, 0.3, 0.5, 1.0])
def test_equals_loops_with_padding(residual: float) -> None:
    maps, lengths = random_maps(), [4, 6]
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    found = attention_rollout(maps, valid=valid, residual=residual)
    np.testing.assert_allclose(found, loops(maps, lengths, residual), atol=1e-6)


def test_left_padding_is_right_padding_moved() -> None:
    maps, valid = random_maps(batch=1), torch.tensor([[True, True, True, True, False, False]])
    moved = attention_rollout([own.roll((2, 2), (-2, -1)) for own in maps], valid=valid.roll(2, 1))
    torch.testing.assert_close(moved, attention_rollout(maps, valid=valid).roll((2, 2), (-2, -1)))


@pytest.mark.parametrize("fill", [0.0, 1.0, torch.nan])
def test_padding_neither_gives_nor_receives_whatever_it_holds(fill: float) -> None:
    maps, valid = random_maps(), torch.tensor([[True, True, True, False, False, False], [True] * 6])
    spoilt = [own.clone() for own in maps]
    for own in spoilt:
        own[0, :, 3:], own[0, :, :, 3:] = fill, fill
    found = attention_rollout(spoilt, valid=valid)
    torch.testing.assert_close(found, attention_rollout(maps, valid=valid))
    assert not found[0, 3:].any()
    assert not found[0, :, 3:].any()
    torch.testing.assert_close(found.sum(-1), valid.float())


def test_rows_sum_to_one_also_of_weights_after_dropout() -> None:
    maps = [torch.nn.functional.dropout(own, 0.5) for own in random_maps(12)]
    torch.testing.assert_close(attention_rollout(maps).sum(-1), torch.ones(2, 6))


def test_a_row_that_may_attend_to_nothing_keeps_its_token() -> None:
    empty = CAUSAL.clone()
    empty[..., 0, :] = 0.0
    torch.testing.assert_close(attention_rollout([empty])[0, 0], torch.tensor([1.0, 0.0]))
    assert not attention_rollout([empty], residual=0.0)[0, 0].any()


def test_layers_are_multiplied_from_the_last_to_the_first() -> None:
    first, last = random_maps(2)
    forward, backward = attention_rollout([first, last]), attention_rollout([last, first])
    assert (forward - backward).abs().max() > 0.01
    top = attention_rollout([last])
    torch.testing.assert_close(forward, top @ attention_rollout([first]))


@pytest.mark.parametrize("valid", [None, torch.tensor([[True] * 4 + [False] * 2, [True] * 6])])
@pytest.mark.parametrize("targets", [[0], torch.tensor([5, 1]), torch.tensor([[5], [2]])])
def test_rows_of_targets_are_those_of_the_whole(valid: Tensor | None, targets: Tensor | list[int]) -> None:
    maps = random_maps()
    whole = attention_rollout(maps, valid=valid)
    rows = torch.as_tensor(targets).expand(2, -1)
    expected = torch.stack([own[places] for own, places in zip(whole, rows, strict=True)])
    torch.testing.assert_close(attention_rollout(maps, valid=valid, targets=targets), expected)


@pytest.mark.parametrize("function", [attention_rollout, gradient_rollout])
def test_a_batch_is_its_samples_one_by_one(function: object) -> None:
    maps = random_maps(batch=4)
    lists = [maps] if function is attention_rollout else [maps, random_gradients(maps)]
    whole = function(*lists)
    for sample in range(4):
        alone = function(*([own[sample : sample + 1] for own in layers] for layers in lists))
        torch.testing.assert_close(whole[sample : sample + 1], alone)


def test_layers_may_differ_in_heads_and_precision() -> None:
    maps = [random_maps(1, heads=2)[0], random_maps(1, heads=5, seed=3)[0].bfloat16()]
    found = attention_rollout(maps)
    assert found.dtype == torch.float32
    expected = attention_rollout([maps[1].float()]) @ attention_rollout([maps[0]])
    torch.testing.assert_close(found, expected)


def test_no_graph_and_no_change_of_what_came_in() -> None:
    maps = [own.requires_grad_() for own in random_maps()]
    before = [own.detach().clone() for own in maps]
    assert not attention_rollout(maps).requires_grad
    assert not gradient_rollout(maps, random_gradients(maps)).requires_grad
    for own, old in zip(maps, before, strict=True):
        assert torch.equal(own, old)


# --- gradient rollout, and the faults of vit-explain -------------------------------------------------------------


def gradient_loops(maps: list[Tensor], gradients: list[Tensor]) -> np.ndarray:
    """One sample, in the order of the layers, negative parts cut head by head, rows divided by their own sums."""
    tokens = maps[0].shape[-1]
    rolled = np.eye(tokens)
    for layer, slopes in zip(maps, gradients, strict=True):
        heads = [np.maximum(a.double().numpy() * g.double().numpy(), 0) for a, g in zip(layer[0], slopes[0])]  # noqa: B905
        mixed = (sum(heads) / len(heads) + np.eye(tokens)) / 2
        for row in range(tokens):
            mixed[row] = mixed[row] / mixed[row].sum()
        rolled = mixed @ rolled
    return rolled


def test_gradient_rollout_equals_loops() -> None:
    maps = random_maps(4, batch=1)
    gradients = random_gradients(maps)
    found = gradient_rollout(maps, gradients)
    np.testing.assert_allclose(found[0], gradient_loops(maps, gradients), atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-6)  # columns divided by other rows' sums gave 0.80 to 1.16


def test_gradients_belong_to_their_own_layer() -> None:
    """Backward hooks fire for the last layer first; a list in their order gives another result."""
    maps = random_maps(3)
    gradients = random_gradients(maps)
    swapped = gradient_rollout(maps, gradients[::-1])
    assert (gradient_rollout(maps, gradients) - swapped).abs().max() > 0.01


def test_negative_parts_are_cut_head_by_head() -> None:
    maps = torch.full((1, 2, 2, 2), 0.5)
    gradients = torch.tensor([[[[0.0, 2.0], [0.0, 0.0]], [[0.0, -2.0], [0.0, 0.0]]]])  # two heads that cancel in a mean
    found = gradient_rollout([maps], [gradients])
    torch.testing.assert_close(found[0, 0], torch.tensor([2 / 3, 1 / 3]))


def test_two_calls_do_not_know_of_each_other() -> None:
    one, other = random_maps(seed=5), random_maps(seed=6)
    gradients = random_gradients(one)
    first = gradient_rollout(one, gradients)
    gradient_rollout(other, gradients)
    assert torch.equal(gradient_rollout(one, gradients), first)


def test_no_gradient_leaves_every_token_to_itself() -> None:
    maps = random_maps()
    found = gradient_rollout(maps, [torch.zeros_like(own) for own in maps])
    torch.testing.assert_close(found, torch.eye(6).expand(2, 6, 6))


def test_gradient_weights_by_hand() -> None:
    weights, gradient = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]]), torch.tensor([[[[1.0, -1.0], [2.0, 0.0]]]])
    assert gradient_weights([weights], [gradient])[0].tolist() == [[[[0.5, 0.0], [0.5, 0.0]]]]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_cross_attention_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"`weights\[1\]` must be square.*got 3 queries x 5 keys.*encoder_decoder"):
        attention_rollout([torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 5)])


def test_merged_tokens_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"`weights\[2\]` must have the 1 samples and 4 tokens.*got 1 and 2.*merge"):
        attention_rollout([*[torch.ones(1, 1, 4, 4)] * 2, torch.ones(1, 1, 2, 2)])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(1, 1, 2, 2),), {}, TypeError, r"one a layer.*Pass \[weights\]"),
        (([],), {}, ValueError, "at least one layer, got none"),
        (([torch.ones(1, 2, 2)],), {}, ValueError, "must have axes"),
        (([CAUSAL],), {"residual": 1.5}, ValueError, "`residual` must lie between"),
        (([CAUSAL],), {"valid": torch.ones(1, 3)}, ValueError, r"\(batch, tokens\) = \(1, 2\), got \(1, 3\)"),
        (([CAUSAL],), {"targets": [2]}, ValueError, "`targets` must lie between 0 and 1, got 2"),
        (([CAUSAL],), {"targets": [-1]}, ValueError, "between 0 and 1, got -1"),
        (([CAUSAL],), {"targets": torch.zeros(3, 1).long()}, ValueError, "with 1 samples"),
        (([CAUSAL],), {"targets": torch.zeros(1)}, ValueError, "must be positions"),
    ],
)
def test_other_arguments_are_refused(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_rollout(*arguments, **options)


@pytest.mark.parametrize(
    ("gradients", "error", "message"),
    [
        (torch.ones(1, 1, 2, 2), TypeError, r"Pass \[gradients\]"),
        ([], ValueError, r"one tensor a layer \(1\), got 0"),
        ([torch.ones(1, 2, 2, 2)], ValueError, r"`gradients\[0\]` must have the shape of its weights"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(gradients: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gradient_rollout([CAUSAL], gradients)

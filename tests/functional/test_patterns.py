"""Patterns against numbers computed by hand and closed forms, and what reference code has got wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attn_callbacks.functional._maps import of_one_head
from attn_callbacks.functional.map_patterns import offset_share, uniformity, vertical_mass
from attn_callbacks.functional.patterns import pattern_scores
from attn_callbacks.functional.roles import ROLES, head_roles
from attn_callbacks.functional.token_patterns import duplicate_pairs, induction_pairs
from tests.functional.reference import random_case

CAUSAL = torch.ones(2, 2, dtype=torch.bool).tril()
FIXTURE = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])


def uniform(allowed: torch.Tensor) -> torch.Tensor:
    return (allowed / allowed.sum(-1, keepdim=True))[None, None]


def harmonic(n: int) -> float:
    return sum(1 / k for k in range(1, n + 1))


def test_hand_computed_fixture() -> None:
    found = head_roles(FIXTURE, allowed=CAUSAL)
    score, chance = (dict(zip(ROLES, field[0, 0].tolist(), strict=True)) for field in found[:2])
    assert (score["sink"], score["self"], score["previous"]) == (0.625, 0.875, 0.25)
    assert (chance["sink"], chance["self"], chance["previous"]) == (0.75, 0.75, 0.5)
    assert math.isnan(score["next"])
    strength = dict(zip(ROLES, found.strength()[0, 0].tolist(), strict=True))
    assert (strength["sink"], strength["self"], strength["previous"]) == (-0.5, 0.5, -0.5)
    assert uniformity(FIXTURE, allowed=CAUSAL).score.item() == 0.875  # 1, and 1/4 + 1/2


@pytest.mark.parametrize("tokens", [6, 40])
def test_uniform_attention_has_its_closed_form(tokens: int) -> None:
    score = head_roles(torch.full((1, 1, tokens, tokens), 1 / tokens), window=2).score[0, 0]
    expected = {"sink": 1 / tokens, "previous": 1 / tokens, "next": 1 / tokens, "self": 1 / tokens, "uniform": 1.0}
    expected |= {"local": (tokens * 5 - 6) / tokens**2, "vertical": 1 / tokens}
    assert {name: float(score[ROLES.index(name)]) for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens", [6, 40])
def test_causal_uniform_attention_has_its_closed_form(tokens: int) -> None:
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    score = head_roles(uniform(allowed), allowed=allowed, window=2).score[0, 0]
    expected = {
        "sink": harmonic(tokens) / tokens,
        "previous": (harmonic(tokens) - 1) / (tokens - 1),
        "local": np.mean([min(3, k) / k for k in range(1, tokens + 1)]),
        "uniform": 1.0,
    }
    assert {name: float(score[ROLES.index(name)]) for name in expected} == pytest.approx(expected, rel=1e-5)


def test_caller_keeps_his_maps() -> None:
    """TransformerLens zeroes the current and the first token in the caller's own cache."""
    weights = torch.rand(2, 3, 6, 6).softmax(dim=-1)
    before = weights.clone()
    targets = torch.eye(6, dtype=torch.bool)[None, None]
    once = pattern_scores(weights, targets, allowed=torch.ones(6, 6).tril())
    for measure in (uniformity, vertical_mass, head_roles):
        measure(weights)
    offset_share(weights, -1)
    assert torch.equal(weights, before)
    torch.testing.assert_close(tuple(pattern_scores(weights, targets, allowed=torch.ones(6, 6).tril())), tuple(once))


def test_rows_without_a_target_do_not_dilute() -> None:
    """They stay in TransformerLens' denominator, where a perfect head on two of six rows scores 1/3."""
    tokens = torch.tensor([[5, 6, 7, 8, 5, 6]])
    weights = torch.full((1, 1, 6, 6), 1 / 6)
    weights[0, 0, 4:] = torch.eye(6)[:2]
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    found = pattern_scores(weights, duplicate_pairs(tokens)[:, None], allowed=allowed)
    assert (found.score.item(), found.coverage.item()) == pytest.approx((1.0, 1 / 3))


def test_pattern_that_expects_nearly_everything_has_no_strength() -> None:
    weights = torch.zeros(1, 1, 20, 20)
    weights[..., 0] = 1.0
    targets = torch.ones(1, 2, 20, 20, dtype=torch.bool)
    targets[..., 19:], targets[:, 1, :, 17:] = False, False
    found = pattern_scores(weights, targets)
    assert found.score.tolist() == [[[1.0, 1.0]]]
    assert found.chance[0, 0].tolist() == pytest.approx([0.95, 0.85])
    assert found.strength()[0, 0].isnan().tolist() == [True, False]


def test_padded_queries_do_not_count() -> None:
    weights = torch.eye(4).roll(-1, dims=-1)[None, None].clone()
    weights[..., 2:, :] = 0.25
    valid = torch.tensor([[True, True, False, False]])
    targets = torch.eye(4, dtype=torch.bool).roll(-1, dims=-1)[None, None]
    assert pattern_scores(weights, targets, valid=valid).score.item() == 1.0
    assert head_roles(weights, valid=valid, key_valid=valid).score[0, 0, ROLES.index("previous")] == 1.0
    assert offset_share(weights, -1, valid=valid).item() == 1.0


MEASURES = {
    "pattern_scores": lambda weights, **masks: pattern_scores(weights, duplicate_pairs(TOKENS)[:, None], **masks),
    "uniformity": uniformity,
    "vertical_mass": vertical_mass,
    "head_roles": lambda weights, **masks: head_roles(
        weights, TOKENS, special=TOKENS == 0, separator=TOKENS == 1, **masks
    ),
    "offset_share": lambda weights, **masks: (offset_share(weights, -1, **masks),),
}
TOKENS = torch.tensor([[0, 2, 3, 2, 1, 3], [0, 3, 3, 1, 2, 1]])


@pytest.mark.parametrize("name", MEASURES)
def test_a_mask_of_heads_is_taken_however_it_is_given(name: str) -> None:
    """The same for all heads, expanded or written out, or another one for each: a head has the score of its own."""
    measure, weights = MEASURES[name], torch.rand(2, 3, 6, 6).softmax(dim=-1)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = measure(weights, allowed=causal)
    for same in (causal.expand(2, 3, 6, 6), causal.expand(3, 6, 6), causal.expand(2, 3, 6, 6).clone()):
        torch.testing.assert_close(tuple(measure(weights, allowed=same)), tuple(expected), equal_nan=True)
    other = torch.stack([causal, causal.flip(-1), torch.ones_like(causal)])
    rows = torch.rand(2, 3, 6) < 0.7
    found = measure(weights, allowed=other, valid=rows)
    for head in range(3):
        alone = measure(weights[:, head, None], allowed=other[head], valid=rows[:, head, None])
        for one, field in zip(found, alone, strict=True):
            torch.testing.assert_close(one[:, head, None], field, equal_nan=True)


def test_only_a_mask_that_was_expanded_is_cut_to_one_head() -> None:
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    assert of_one_head(mask.expand(2, 3, 6, 6), 3).shape == (2, 1, 6, 6)
    assert of_one_head(mask[0].expand(3, 6, 6), 3).shape == (1, 6, 6)
    for other in (mask.repeat(1, 3, 1, 1), mask[0, 0], mask.expand(2, 4, 6, 6)):  # the last does not fit
        assert of_one_head(other, 3) is other


@pytest.mark.parametrize("name", MEASURES)
def test_the_score_of_a_head_does_not_depend_on_the_others(name: str) -> None:
    """A row of zeros is no data of its head, and leaves the others theirs."""
    measure, weights = MEASURES[name], torch.rand(2, 3, 6, 6).softmax(dim=-1)
    weights[:, 1, 4], weights[0, 2] = 0.0, 0.0
    found = measure(weights)
    for head in range(3):
        for one, alone in zip(found, measure(weights[:, head, None]), strict=True):
            torch.testing.assert_close(one[:, head, None], alone, equal_nan=True)


def test_induction_is_the_published_pattern_under_a_causal_mask() -> None:
    tokens = torch.tensor([[3, 4, 3, 3, 4, 9]])
    expected = torch.zeros(6, 6, dtype=torch.bool)
    for i in range(6):
        for j in range(i):
            expected[i, j + 1] |= bool(tokens[0, i] == tokens[0, j])  # the token after an earlier occurrence
    found = induction_pairs(tokens)[0].tril()
    assert torch.equal(found, expected.tril())
    assert found[3, 3]  # repeated at once: the next token after the earlier one is this one


def test_tokens_that_do_not_match_have_no_pairs() -> None:
    tokens, matches = torch.tensor([[1, 5, 1, 5]]), torch.tensor([[False, True, True, True]])
    assert duplicate_pairs(tokens, matches)[0].nonzero().tolist() == [[1, 3], [3, 1]]
    assert induction_pairs(tokens, matches)[0].nonzero().tolist() == [[3, 2]]  # nothing follows the last one


def test_vertical_finds_the_key_that_half_of_the_rows_see() -> None:
    allowed = torch.ones(8, 8, dtype=torch.bool).tril()
    weights = uniform(allowed).clone()
    weights[0, 0, 3:] = torch.eye(8)[3]
    weights[0, 0, 7] = torch.eye(8)[7]  # the last key has all of the only row that sees it
    found = vertical_mass(weights, allowed=allowed)
    assert (found.score.item(), found.coverage.item()) == pytest.approx((4 / 5, 5 / 8))


def test_vertical_is_undefined_in_a_narrow_band() -> None:
    index = torch.arange(9)
    allowed = (index[:, None] - index).abs() <= 1
    assert vertical_mass(uniform(allowed), allowed=allowed).score.isnan().all()


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("tokens", [8, 512])
def test_uniformity_over_a_part_of_the_keys_is_that_part_at_every_length(tokens: int, share: float) -> None:
    row = torch.zeros(1, 1, 1, tokens)
    row[..., : int(share * tokens)] = 1 / (share * tokens)
    assert uniformity(row).score.item() == pytest.approx(share)


def test_offset_share_of_random_maps_matches_a_loop() -> None:
    weights, _, _, allowed, valid, _ = random_case("right", causal=True, tokens=9)
    weights = np.round(weights, 1)  # ties
    found = offset_share(torch.tensor(weights), -1, allowed=torch.tensor(allowed), valid=torch.tensor(valid))
    for b, h in np.ndindex(3, 2):
        hits = []
        for i in range(1, 9):
            if valid[b, i] and allowed[b, h, i, i - 1] and weights[b, 0, i].any():
                row = weights[b, h, i]
                hits.append(row[i - 1] == row.max() and (row == row.max()).sum() == 1)
        assert float(found[b, h]) == pytest.approx(np.mean(hits), nan_ok=True)


def test_uniform_rows_are_not_positional() -> None:
    assert offset_share(torch.full((1, 1, 4, 4), 0.25), -1).item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": torch.ones(3, 3)}, "`targets` must have 4 axes"),
        ({"targets": torch.ones(1, 1, 4, 3)}, r"`targets` must have shape .* = \(2 or 1, patterns, 3, 3\), got"),
        ({"targets": torch.ones(3, 1, 3, 3)}, "`targets` must have shape"),
        ({"allowed": torch.ones(1, 3, 3, 3)}, "`allowed` must be broadcastable to `weights`"),
        ({"allowed": torch.ones(1, 1, 3, 3).expand(1, 3, 3, 3)}, "`allowed` must be broadcastable to `weights`"),
        ({"valid": torch.ones(2, 3, 3)}, "`valid` must have shape"),
    ],
)
def test_wrong_argument_raises(arguments: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pattern_scores(**{"weights": torch.ones(2, 2, 3, 3), "targets": torch.ones(1, 1, 3, 3), **arguments})


def test_wrong_masks_and_offsets_raise() -> None:
    with pytest.raises(ValueError, match="`matches` must have the shape of `tokens`"):
        duplicate_pairs(torch.ones(1, 3), torch.ones(1, 4))
    with pytest.raises(ValueError, match="`positions` must say"):
        offset_share(torch.ones(1, 1, 2, 3), -1)
    with pytest.raises(TypeError, match="`offset` must be an integer"):
        offset_share(torch.ones(1, 1, 3, 3), 0.5)

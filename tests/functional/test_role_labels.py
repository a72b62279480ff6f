"""Labels of heads that play exactly one role, and of heads between two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_callbacks.functional.patterns import PatternScores
from attn_callbacks.functional.role_labels import ROLE_LABELS, THRESHOLDS, label_roles
from attn_callbacks.functional.roles import ROLES, head_roles
from tests.functional.role_reference import Sample

TOKENS = 36
GRID = (7, 5, 1)
TEXT = {"tokens": [0, *(3 + np.random.default_rng(0).permutation(17)).tolist(), 1] * 2}
TEXT["tokens"] = TEXT["tokens"][:TOKENS]
TEXT["separator"] = [j in (11, 23, 35) for j in range(TOKENS)]
TEXT["special"] = [j in (0, 11, 17, 23, 30, 35) for j in range(TOKENS)]


def exact_map(role: str, allowed: np.ndarray, known: dict) -> np.ndarray:
    """Attention that does nothing but play ``role``; rows without an expected key attend uniformly."""
    sample = Sample(allowed.astype(float), allowed, list(range(TOKENS)), [True] * TOKENS, [True] * TOKENS, **known)
    weights = np.zeros((TOKENS, TOKENS))
    for i, mine in enumerate(sample.open_keys):
        if role == "vertical":
            wanted = [5]
        elif role == "class_gather":
            wanted = [j for j in mine if not sample.special[j]] if i == 0 else [i]
        else:
            wanted = mine if role == "uniform" else [j for j in mine if sample.expects(role, i, j)]
        wanted = [j for j in wanted if j in mine] or mine
        weights[i, wanted] = 1 / len(wanted)
    return weights


def scores_of(weights: np.ndarray, allowed: np.ndarray, known: dict) -> PatternScores:
    given = {name: torch.tensor(value)[None] if isinstance(value, list) else value for name, value in known.items()}
    return head_roles(torch.tensor(weights)[None, None], allowed=torch.tensor(allowed), **given)


def label_of(scores: PatternScores) -> str:
    return ROLE_LABELS[int(label_roles(scores).label[0, 0])]


BIDIRECTIONAL = [(role, TEXT, False) for role in ROLES if role not in ("column", "row")]
CAUSAL = [(role, TEXT, True) for role in ROLES if role not in ("column", "row", "next", "class_gather")]
IMAGES = [
    (role, {"grid": GRID, "window": 2}, False)
    for role in ("class_gather", "column", "row", "previous", "next", "self", "sink", "vertical", "diagonal", "uniform")
]


@pytest.mark.parametrize(("role", "known", "causal"), BIDIRECTIONAL + CAUSAL + IMAGES)
def test_head_that_plays_one_role_gets_its_label(role, known, causal) -> None:
    allowed = np.ones((TOKENS, TOKENS), dtype=bool)
    allowed = np.tril(allowed) if causal else allowed
    scores = scores_of(exact_map(role, allowed, known), allowed, known)
    k = ROLES.index(role)
    assert float(scores.score[0, 0, k]) == pytest.approx(1.0, abs=1e-6)
    labels = label_roles(scores)
    assert label_of(scores) == role
    assert float(labels.strength[0, 0]) == pytest.approx(1.0, abs=1e-5)
    assert float(labels.confidence[0, 0]) > 0.01
    assert labels.coverage[0, 0] == scores.coverage[0, 0, k]


@pytest.mark.parametrize("tokens", [4, 8, 12, 100])
def test_causal_uniform_head_is_uniform_at_every_length(tokens: int) -> None:
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = head_roles((allowed / allowed.sum(-1, keepdim=True))[None, None], allowed=allowed)
    assert label_of(scores) == "uniform"
    others = scores.strength()[0, 0, : ROLES.index("uniform")]
    torch.testing.assert_close(others.nan_to_num(0.0), torch.zeros(len(ROLES) - 1), atol=1e-5, rtol=0)


def test_plain_sink_score_alone_would_have_called_a_short_uniform_head_a_sink() -> None:
    allowed = torch.ones(8, 8, dtype=torch.bool).tril()
    scores = head_roles((allowed / allowed.sum(-1, keepdim=True))[None, None], allowed=allowed)
    assert scores.score[0, 0, ROLES.index("sink")] > THRESHOLDS["sink"]


def test_a_role_that_is_no_candidate_takes_no_margin_away() -> None:
    scores = made(previous=0.9, induction=0.95)
    scores.coverage[..., ROLES.index("induction")] = 0.05
    found = label_roles(scores)
    assert ROLE_LABELS[int(found.label)] == "previous"
    assert float(found.confidence) == pytest.approx(0.4)  # above its threshold, with no rival
    found = label_roles(scores, min_coverage=0.05)
    assert (ROLE_LABELS[int(found.label)], float(found.confidence)) == ("induction", pytest.approx(0.05))


def made(coverage: float = 1.0, **strengths: float) -> PatternScores:
    """Scores of one head with these strengths and none of the others."""
    score = torch.tensor([strengths.get(name, 0.0) for name in ROLES], dtype=torch.float64)[None, None]
    return PatternScores(score, torch.zeros_like(score), torch.full_like(score, coverage))


@pytest.mark.parametrize(
    ("strengths", "label", "margin"),
    [
        ({"previous": 0.6, "diagonal": 0.7, "local": 0.95}, "previous", 0.1),  # a case of the other two
        ({"previous": 0.4, "diagonal": 0.7, "local": 0.95}, "diagonal", 0.2),  # of which the first is no candidate
        ({"sink": 0.35, "local": 0.6}, "local", 0.1),  # two different things
        ({"sink": 0.65, "local": 0.6}, "sink", 0.05),  # the rival, not the threshold, is near
        ({"sink": 0.35, "local": 0.45}, "sink", 0.0),  # the rival is stronger, but no candidate
        ({"sink": 0.35, "vertical": 0.9}, "vertical", 0.6),  # another key is the stripe
        ({"sink": 0.5, "vertical": 0.9}, "sink", 0.2),
        ({"separator": 0.51, "special": 0.9, "sink": 0.39}, "separator", 0.01),
        ({"next": 0.7, "uniform": 0.9}, "uniform", 0.15),
        ({"duplicate": 0.79, "induction": 0.8}, "duplicate", 0.0),  # a tie: the earlier of the two
        ({"previous": 0.5}, "heterogeneous", 0.0),  # not above
        ({"uniform": 0.7, "self": 0.4, "sink": 0.2}, "heterogeneous", 0.05),
    ],
)
def test_rules(strengths: dict[str, float], label: str, margin: float) -> None:
    scores = made(**strengths)
    assert label_of(scores) == label
    assert float(label_roles(scores).confidence) == pytest.approx(margin)


def test_threshold_can_be_set() -> None:
    scores = made(self=0.45)
    assert label_of(scores) == "heterogeneous"
    assert ROLE_LABELS[int(label_roles(scores, {"self": 0.4}).label)] == "self"


def test_role_that_hardly_any_row_can_play_is_no_candidate() -> None:
    scores = made(coverage=0.05, duplicate=0.9)
    assert label_of(scores) == "heterogeneous"
    assert ROLE_LABELS[int(label_roles(scores, min_coverage=0.01).label)] == "duplicate"


def test_nothing_defined_has_no_label() -> None:
    nothing = torch.full((2, 3, len(ROLES)), torch.nan)
    labels = label_roles(PatternScores(nothing, nothing, nothing))
    assert (labels.label == -1).all()
    assert all(field.isnan().all() for field in labels[1:])


def test_no_value_is_read() -> None:
    field: Tensor = torch.ones(2, 3, len(ROLES), device="meta")
    assert label_roles(PatternScores(field, field, field)).label.shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresholds": {"prev": 0.5}}, "`thresholds` must name roles, got 'prev'. Known: 'class_gather', 'previous'"),
        ({"thresholds": {"sink": 1.5}}, r"`thresholds\['sink'\]` must lie between 0.0 and 1.0, got 1.5"),
        ({"min_coverage": -1.0}, "`min_coverage` must lie between"),
        ({"scores": PatternScores(*torch.ones(3, 1, 1, 4))}, "`scores` must hold the 17 of `ROLES`, got 4"),
    ],
)
def test_wrong_argument_raises(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_roles(**{"scores": made(), **arguments})

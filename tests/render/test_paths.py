"""Paths as lines: where they run, in which colour, and how thick."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.render import head_colours
from attn_callbacks.render.canvas import GREY
from attn_callbacks.render.paths import ROW, STEP, _plan, token_paths
from tests.render.decoding import decoded

WORDS = ["[CLS]", "the", "film", "[SEP]"]
TOKENS, HEADS, WEIGHTS = np.array([[0, 2, 2], [0, 0, 3]]), np.array([[1, -1], [-1, 4]]), np.array([0.3, 0.1])


def drawn(**options):
    arguments = {"tokens": TOKENS, "heads": HEADS, "weights": WEIGHTS, "labels": WORDS, "count": 4, **options}
    return decoded(token_paths(**arguments))


def middle(pixels, plan, column, below, above):
    """The pixel half way along a step, from the inputs' side ``column``."""
    y = plan.top + (below + above) * ROW // 2 + ROW // 2
    return pixels[y, plan.left + column * STEP + STEP // 2].astype(int)


def test_every_step_runs_where_it_should_in_the_colour_of_its_head():
    pixels, plan = drawn(), _plan(WORDS, 3, "")
    colours = head_colours(5).astype(int)
    for column, below, above, expected in (
        (1, 2, 0, colours[1]),  # the last layer's head 1, from film to [CLS]
        (0, 2, 2, np.array(GREY)),
        (1, 0, 0, np.array(GREY)),
        (0, 3, 0, colours[4]),
    ):
        found = middle(pixels, plan, column, below, above)
        assert np.abs(found - (0.85 * expected + 0.15 * 255)).max() <= 2
    assert (middle(pixels, plan, 0, 1, 1) == 255).all()  # no path


def test_a_stronger_path_is_thicker_and_shared_steps_add_up():
    plan = _plan(WORDS, 3, "")

    def thickness(weights, heads):
        """Of the last layer's step from the first token to itself."""
        pixels = drawn(weights=np.array(weights), tokens=np.array([[0, 0, 2], [3, 3, 3]]), heads=np.array(heads))
        x = plan.left + STEP + 10
        return float((255 - pixels[plan.top : plan.top + ROW // 2 + 6, x].astype(float)).sum())

    weak, strong = (thickness([weight, 1 - weight], [[-1, 1], [-1, -1]]) for weight in (0.05, 0.8))
    assert strong > 1.5 * weak
    pair = {"tokens": np.array([[0, 0, 2], [0, 0, 3]]), "weights": np.array([0.05, 0.8])}
    shared = drawn(heads=np.array([[-1, 1], [-1, 1]]), **pair)
    column = shared[plan.top : plan.top + ROW // 2 + 6, plan.left + STEP + 10].astype(float)
    assert float((255 - column).sum()) > strong  # both take that step: all of the weight


def test_many_tokens_show_those_on_a_path_only():
    few = drawn(labels=None)
    many = drawn(labels=[f"w{number}" for number in range(500)], count=500)
    assert many.shape[0] < few.shape[0] + 2 * ROW


def test_labels_are_numbers_where_there_is_no_text():
    assert drawn(labels=None).shape == drawn(labels=["0", "1", "2", "3"]).shape
    assert np.array_equal(drawn(labels=None), drawn(labels=["0", "1", "2", "3"]))


def test_one_residual_path_alone():
    assert drawn(tokens=np.zeros((1, 4), int), heads=np.full((1, 3), -1), weights=np.ones(1)).shape[2] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": HEADS[:, :1]}, "`heads` and `weights` must have shapes"),
        ({"weights": WEIGHTS[:1]}, "`heads` and `weights` must have shapes"),
        ({"tokens": TOKENS[0]}, "`tokens` must have 2 axes"),
        ({"tokens": TOKENS[:0], "heads": HEADS[:0], "weights": WEIGHTS[:0]}, "at least one path"),
        ({"count": 3}, "must be about 3 tokens"),
        ({"labels": WORDS[:3]}, "must be about 4 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        drawn(**options)

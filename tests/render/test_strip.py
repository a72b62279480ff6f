"""A text in colours: every token in its own, long ones wrapped, the token asked about framed."""

from __future__ import annotations

import numpy as np
import pytest

from attn_callbacks.render import sequential
from attn_callbacks.render.strip import FRAME, PAGE_WIDTH, token_strip
from tests.render.decoding import decoded, has

WORDS = ["[CLS]", "a", "film", "[SEP]"]


def test_every_token_has_the_colour_of_its_value():
    values = np.array([0.0, 0.25, 1.0, 0.5])
    picture, palette = token_strip(values, WORDS), sequential()
    for value in values:
        assert has(picture, palette[int(np.rint(np.sqrt(value) * 255))])


def test_the_target_is_framed_and_does_not_set_the_scale():
    values = np.array([9.0, 0.1, 0.2, 0.4])
    picture, brightest = token_strip(values, WORDS, target=0), sequential()[-1]
    assert has(picture, FRAME)
    assert not has(token_strip(values, WORDS), FRAME)
    half = sequential()[int(np.rint(np.sqrt(0.5) * 255))]
    assert has(picture, brightest)
    assert has(picture, half)  # 0.2 of 0.4, not of 9


def test_the_scale_may_be_given():
    values = np.full(4, 0.25)
    assert has(token_strip(values, WORDS, high=1.0), sequential()[int(np.rint(0.5 * 255))])


def test_long_texts_wrap():
    one, many = (decoded(token_strip(np.ones(count), ["word"] * count)) for count in (3, 300))
    assert many.shape[1] <= PAGE_WIDTH + 40
    assert many.shape[0] > 5 * one.shape[0]


def test_nan_counts_as_zero_and_all_zeros_are_drawn():
    assert np.array_equal(
        decoded(token_strip(np.array([np.nan, 1.0]), ["a", "b"])),
        decoded(token_strip(np.array([0.0, 1.0]), ["a", "b"])),
    )
    assert decoded(token_strip(np.zeros(1), ["a"], target=0)).size > 0


@pytest.mark.parametrize(
    ("values", "labels", "options", "message"),
    [
        (np.ones((1, 2)), ["a", "b"], {}, "`values` must have 1 axes"),
        (np.ones(0), [], {}, "`labels` must hold one text per value"),
        (np.ones(2), ["a"], {}, "`labels` must hold one text per value"),
        (np.ones(2), ["a", "b"], {"target": 2}, "`target` must lie between 0 and 1, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(values, labels, options, message):
    with pytest.raises(ValueError, match=message):
        token_strip(values, labels, **options)

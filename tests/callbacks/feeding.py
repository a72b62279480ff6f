"""Every feedback there is, with a module and data on which it has something to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import losses
from attn_callbacks import (
    AdversarialTraining,
    AttentionGuidance,
    BatchSchema,
    BiasMonitor,
    ClassReweighting,
    DynamicDistributedSampler,
    EnsembleFeedback,
    FeatureRegularization,
    Feedback,
    GroupReweighting,
    InputGradientPenalty,
    LossBalancing,
    MaskRandomization,
    RandomLossWeights,
    RandomRationaleControl,
    Resampling,
    StaticInverseFrequency,
)
from tests.callbacks.models import VOCABULARY, Classifier, Texts, pl, quiet_trainer


class Marked(Texts):
    """Texts whose shortcut word is marked as spurious."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        spurious = torch.zeros(len(self.input_ids[index]), dtype=torch.bool)
        spurious[5] = True
        return {**super().__getitem__(index), "spurious": spurious}


class Shifted(Classifier):
    """Trains on logits with a margin for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = losses.LogitAdjustedLoss([30, 10])

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self(batch), batch["labels"])


class Balanced(Classifier):
    """Adds up two named losses."""

    def __init__(self) -> None:
        super().__init__()
        self.balancer = losses.LossBalancer(["label"], losses.DynamicWeightAverage(1), fixed={"size": 0.01})

    def loss(self, batch: Any) -> Tensor:
        logits = self(batch)
        return self.balancer({"label": nn.functional.cross_entropy(logits, batch["labels"]),
                              "size": logits.square().mean()})  # fmt: skip


class Words(nn.Module):
    """Says how often each word occurs: ``(samples, words)``."""

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.one_hot(ids, VOCABULARY).float().sum(dim=1)


class Ensemble(Classifier):
    """Three linear models on word counts."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.words = Words()
        self.model = losses.DeepEnsemble.of(
            lambda: nn.Linear(VOCABULARY, 2), members=3, masks=torch.ones(3, VOCABULARY)
        )

    def forward(self, batch: Any) -> Tensor:
        return self.model(self.words(batch["input_ids"]))

    def loss(self, batch: Any) -> Tensor:
        logits = self.model.member_logits(self.words(batch["input_ids"]))
        return torch.stack([nn.functional.cross_entropy(each, batch["labels"]) for each in logits]).mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"logits": self(batch)}


class Case(NamedTuple):
    """A feedback and the module it is for."""

    feedback: Callable[[], Feedback]
    module: Callable[[], Any] = Classifier
    resampled: bool = False
    agreement: float = 0.5
    """Of the shortcut with the label in validation: reliance on it shows where it helps."""


SHORTCUT = (4, 5)  # ids of the word that agrees with the label in training
CASES: dict[str, Case] = {
    "ClassReweighting": Case(lambda: ClassReweighting(by="group", min_support=2)),
    "ClassReweighting, margin": Case(lambda: ClassReweighting(min_support=2), Shifted),
    "GroupReweighting": Case(lambda: GroupReweighting(min_support=2)),
    "Resampling": Case(lambda: Resampling("group", when="always", anneal=2, min_support=2), resampled=True),
    "Resampling, recall": Case(lambda: Resampling("group", "recall", min_support=2), resampled=True),
    "AttentionGuidance": Case(lambda: AttentionGuidance(warm_up=3, scale_free=True)),
    "MaskRandomization": Case(lambda: MaskRandomization(share=0.5, when="always")),
    "InputGradientPenalty": Case(
        lambda: InputGradientPenalty(losses.InputGradientPenalty(calibration_steps=3), when="always")
    ),
    "AdversarialTraining": Case(lambda: AdversarialTraining(losses.FGM(0.1), when="always")),
    "FeatureRegularization": Case(
        lambda: FeatureRegularization(
            losses.GroupLassoPenalty(0.5, dim=0, num_features=VOCABULARY), "net.embed.weight", {"spurious": SHORTCUT}
        ),
        lambda: Classifier(lr=0.03),
        agreement=1.0,
    ),
    "LossBalancing": Case(lambda: LossBalancing(terms={"group": "size", "feature": "size"}), Balanced),
    "EnsembleFeedback": Case(lambda: EnsembleFeedback({"spurious": SHORTCUT}), Ensemble, agreement=1.0),
    "RandomRationaleControl": Case(lambda: RandomRationaleControl(AttentionGuidance())),
    "RandomLossWeights": Case(lambda: RandomLossWeights(seed=3)),
    "StaticInverseFrequency": Case(lambda: StaticInverseFrequency(by="group")),
}


class EpochOrder(torch.utils.data.Sampler[int]):
    """An order that depends on the epoch alone."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Data(pl.LightningDataModule):
    """Training data in an order of its own, and a validation loader."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.train, self.resampled = Marked(48, agreement=max(0.9, case.agreement)), case.resampled
        self.validation = Marked(64, seed=1, agreement=case.agreement)

    def train_dataloader(self) -> Any:
        sampler: Any = EpochOrder(len(self.train))
        if self.resampled:
            sampler = DynamicDistributedSampler(self.train.labels, groups=self.train.group)
        return DataLoader(self.train, 8, sampler=sampler)

    def val_dataloader(self) -> Any:
        return DataLoader(self.validation, 16)


class Run(NamedTuple):
    """What a run left."""

    module: Any
    monitor: BiasMonitor
    trainer: Any

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.module.state_dict().items()}


def run(case: Case | None, folder: Path, epochs: int = 4, checkpoint: Path | None = None, **options: Any) -> Run:
    """Train; without a case the plain classifier without a monitor's feedback."""
    case, own = case or Case(lambda: ClassReweighting()), case is not None
    monitor_options = {name: options.pop(name) for name in ("dry_run", "patience", "schema") if name in options}
    torch.manual_seed(0)
    module = case.module()
    schema = monitor_options.pop("schema", None) or BatchSchema()
    settings = {"min_support": 4, "patience": None, **monitor_options}
    monitor = BiasMonitor(schema, feedback=[case.feedback()] if own else [], **settings)
    saved = pl.callbacks.ModelCheckpoint(str(folder), save_last=True)
    options = {"max_epochs": epochs, "enable_checkpointing": True, **options}
    trainer = quiet_trainer(folder, [monitor, saved], **options)
    trainer.fit(module, datamodule=Data(case), ckpt_path=checkpoint, weights_only=True)
    return Run(module, monitor, trainer)

"""Both import names of Lightning: training, command line, errors."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_callbacks import AttentionHeatmaps, BatchSchema, BiasMonitor, HeadStatistics
from attn_callbacks._lightning import Callback, MisconfigurationException
from tests.callbacks.models import (
    REGISTRY,
    ClassifierSteps,
    classifier,
    csv_logger,
    feeding_monitor,
    leftovers,
    loader,
    quiet_trainer,
)

both = pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])


@both
def test_training_under_both_names(name: str, tmp_path: Path) -> None:
    package = importlib.import_module(name)
    module = classifier(package)
    observers = [make() for key, make in REGISTRY.items() if key != "BiasMonitor"]
    trainer = quiet_trainer(
        tmp_path, [*observers, feeding_monitor()], package, logger=csv_logger(tmp_path, package), num_sanity_val_steps=1
    )
    trainer.fit(module, loader(32), loader(16, seed=1))
    drawn = {path.relative_to(tmp_path / "run").parts[0] for path in tmp_path.glob("**/*.png")}
    assert drawn == {"attention", "bias", "errors", "heads", "importance", "paths", "roles"}
    assert "bias/worst_group_accuracy" in trainer.callback_metrics
    assert leftovers(module) == {}


@both
@pytest.mark.parametrize("key", sorted(REGISTRY))
def test_a_single_callback_needs_no_list(name: str, key: str, tmp_path: Path) -> None:
    package, callback = importlib.import_module(name), REGISTRY[key]()
    assert isinstance(callback, package.Callback)
    trainer = package.Trainer(callbacks=callback, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert callback in trainer.callbacks


@both
def test_refusals_are_known_under_both_names(name: str) -> None:
    exceptions = importlib.import_module(f"{name}.utilities.exceptions")
    assert issubclass(MisconfigurationException, exceptions.MisconfigurationException)
    assert issubclass(Callback, importlib.import_module(name).Callback)


YAML = """
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  logger: {{class_path: {name}.loggers.CSVLogger, init_args: {{save_dir: {folder}, name: '', version: run}}}}
  callbacks:
    - class_path: attn_callbacks.AttentionHeatmaps
      init_args:
        samples: 1
        layers: [net.encoder.layers.1]
        schema: {{class_path: attn_callbacks.BatchSchema, init_args: {{tokens: input_ids, valid: attention_mask}}}}
    - class_path: attn_callbacks.HeadStatistics
      init_args: {{rows: 8, every_n_batches: 2, per_head: true}}
    - class_path: attn_callbacks.BiasMonitor
      init_args:
        classes: [bad, good]
        schema:
          class_path: attn_callbacks.BatchSchema
          init_args: {{target: labels, group: tests.test_lightning.read_group}}
        feedback:
          - class_path: attn_callbacks.ClassReweighting
            init_args: {{by: group, min_support: 2}}
          - class_path: attn_callbacks.AttentionGuidance
            init_args:
              loss: {{class_path: losses.AttentionGuidedLoss}}
              coefficient: 0.5
"""


HEADS = """
    - class_path: attn_callbacks.HeadRoles
      init_args: {special: [0], clusters: 2, drift_samples: 4}
    - class_path: attn_callbacks.HeadImportance
      init_args: {method: ablation, batches: 1, layers: ['*.1.*']}
    - class_path: attn_callbacks.AttentionPaths
      init_args: {samples: 1, method: relevance, target: 1}
    - class_path: attn_callbacks.ErrorAnalysis
      init_args: {samples: 1, frames: cluster, classes: [bad, good]}
    - class_path: attn_callbacks.AlignmentMonitor
      init_args: {method: mutual, layers: ['*.1.*'], cross_only: false, source_valid: attention_mask}
    - class_path: attn_callbacks.TrainingHealth
      init_args:
        every_n_steps: 1
        thresholds: {class_path: attn_callbacks.functional.HealthThresholds, init_args: {max_logit: 50.0}}
"""


def read_group(batch: Any) -> torch.Tensor:
    return batch["group"]


def run_cli(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = YAML, save: bool = False) -> Any:
    package, cli = importlib.import_module(name), importlib.import_module(f"{name}.cli")

    class Module(ClassifierSteps, package.LightningModule):
        def __init__(self, lr: float = 1e-2) -> None:
            super().__init__(None, lr)

    class Data(package.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader(16)

        def val_dataloader(self) -> Any:
            return loader(32, seed=1)

    config = folder / "config.yaml"
    config.write_text(text.format(name=name, folder=folder))
    monkeypatch.setattr(sys, "argv", ["fit.py", "fit", "--config", str(config)])
    return cli.LightningCLI(Module, Data, **({} if save else {"save_config_callback": None}))


@both
def test_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks = run_cli(name, tmp_path, monkeypatch).trainer.callbacks
    heatmaps, statistics, monitor = (
        next(callback for callback in callbacks if isinstance(callback, kind))
        for kind in (AttentionHeatmaps, HeadStatistics, BiasMonitor)
    )
    assert heatmaps.schema == BatchSchema(tokens="input_ids", valid="attention_mask")
    assert len(list(tmp_path.glob("run/attention/sample_0/*.png"))) == 1
    assert int(statistics.result.samples.max()) == 16  # every second of four batches
    assert monitor.report.group_names == ("group 0", "group 1", "group 2", "group 3")
    assert [type(feedback).__name__ for feedback in monitor.feedback] == ["ClassReweighting", "AttentionGuidance"]
    assert monitor.feedback[1].coefficient == 0.5


@both
def test_a_saved_configuration_is_that_of_the_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cli(name, tmp_path, monkeypatch, save=True)
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "Unable to serialize" not in saved
    assert "valid: attention_mask" in saved
    assert "group: tests.test_lightning.read_group" in saved


@both
def test_command_line_takes_all_that_looks_at_heads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    pytest.importorskip("scipy")
    begin, _, _ = YAML.partition("    - class_path: attn_callbacks.AttentionHeatmaps")
    trainer = run_cli(
        name, tmp_path, monkeypatch, begin + HEADS.strip("\n").replace("{", "{{").replace("}", "}}")
    ).trainer
    assert not [warning for warning in recwarn if "switched off" in str(warning.message)]
    drawn = {path.relative_to(tmp_path / "run").parts[0] for path in tmp_path.glob("run/**/*.png")}
    assert drawn == {"alignment", "errors", "importance", "paths", "roles"}
    found = {type(callback).__name__: callback for callback in trainer.callbacks}
    assert found["HeadRoles"].head_clusters.clusters == 2
    assert found["TrainingHealth"].thresholds.max_logit == 50.0
    assert found["AttentionPaths"].result.samples[0].target == 1


@both
def test_command_line_refuses_wrong_arguments(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_cli(name, tmp_path, monkeypatch, YAML.replace("samples: 1", "samples: many"))
    assert "samples" in capsys.readouterr().err


ALL_FEEDBACK = """
          - class_path: attn_callbacks.GroupReweighting
            init_args: {{min_support: 2}}
          - class_path: attn_callbacks.MaskRandomization
            init_args: {{transform: {{class_path: losses.MaskRandomization, init_args: {{protected: [0]}}}}}}
          - class_path: attn_callbacks.InputGradientPenalty
            init_args: {{penalty: {{class_path: losses.InputGradientPenalty}}}}
          - class_path: attn_callbacks.AdversarialTraining
            init_args: {{attack: {{class_path: losses.FGM}}}}
          - class_path: attn_callbacks.RandomLossWeights
          - class_path: attn_callbacks.StaticInverseFrequency
            init_args: {{by: group}}
"""


@both
def test_command_line_builds_every_feedback_that_needs_no_object(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = YAML.index("          - class_path: attn_callbacks.ClassReweighting")
    callbacks = run_cli(name, tmp_path, monkeypatch, YAML[:start] + ALL_FEEDBACK.lstrip("\n")).trainer.callbacks
    monitor = next(callback for callback in callbacks if isinstance(callback, BiasMonitor))
    assert [type(feedback).__name__ for feedback in monitor.feedback] == [
        "GroupReweighting", "MaskRandomization", "InputGradientPenalty", "AdversarialTraining",
        "RandomLossWeights", "StaticInverseFrequency",
    ]  # fmt: skip


@both
def test_command_line_takes_automatic_feedback(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = YAML.index("        feedback:")
    callbacks = run_cli(name, tmp_path, monkeypatch, YAML[:start] + "        feedback: automatic\n").trainer.callbacks
    monitor = next(callback for callback in callbacks if isinstance(callback, BiasMonitor))
    assert monitor.feedback == "automatic"
    assert monitor.ledger

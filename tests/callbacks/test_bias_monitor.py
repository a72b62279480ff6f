"""BiasMonitor: what it counts, what it feeds back, and what a checkpoint carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_score, recall_score
from torch import Tensor, nn
from torch.utils.data import DataLoader

import losses
from attn_callbacks import AttentionGuidance, BatchSchema, BiasMonitor, ClassReweighting
from attn_callbacks._lightning import MisconfigurationException
from attn_callbacks.callbacks._fed import FedCounts
from tests.callbacks.models import (
    BagOfWords,
    Bert,
    Classifier,
    Pairs,
    Texts,
    feeding_monitor,
    fit,
    leftovers,
    loader,
    pair_loader,
    quiet_trainer,
)

CLASSES, GROUPS = ("bad", "good"), ("b-", "b+", "g-", "g+")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[BiasMonitor, Classifier, Any]:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("run")
    monitor = BiasMonitor(classes=CLASSES, groups=GROUPS, min_support=2)
    module, trainer = Classifier(Bert(), lr=5e-3), quiet_trainer(folder, [monitor], max_epochs=2)
    fit(module, trainer, validation=DataLoader(Texts(58, 1, agreement=0.7), 8))
    return monitor, module.eval(), trainer


@torch.no_grad()
def test_report_agrees_with_sklearn(run: tuple[BiasMonitor, Classifier, Any]) -> None:
    monitor, module, trainer = run
    report, data = monitor.report, Texts(58, 1, agreement=0.7)
    batch = {"input_ids": data.input_ids, "attention_mask": data.attention_mask}
    predicted, target, group = module(batch).argmax(-1).numpy(), data.labels.numpy(), data.group.numpy()
    assert 0 < predicted.mean() < 1
    for index in range(4):
        inside = group == index
        expected = confusion_matrix(target[inside], predicted[inside], labels=[0, 1])
        assert report.counts[index].tolist() == expected.tolist()
        assert report.group_accuracy[index] == pytest.approx(accuracy_score(target[inside], predicted[inside]))
    assert report.recall.tolist() == pytest.approx(recall_score(target, predicted, average=None).tolist())
    assert report.precision.tolist() == pytest.approx(precision_score(target, predicted, average=None).tolist())
    assert report.accuracy == pytest.approx(accuracy_score(target, predicted))
    assert (report.class_names, report.group_names) == (CLASSES, GROUPS)
    logged = {
        name: trainer.callback_metrics[f"bias/{name}"].item() for name in ("accuracy", "gap", "worst_group_accuracy")
    }
    accuracies = [accuracy_score(target[group == g], predicted[group == g]) for g in range(4) if (group == g).sum() > 1]
    expected = {
        "accuracy": report.accuracy,
        "gap": max(accuracies) - min(accuracies),
        "worst_group_accuracy": min(accuracies),
    }
    assert logged == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_mass_on_relevance_agrees_with_numpy(run: tuple[BiasMonitor, Classifier, Any]) -> None:
    monitor, module, _ = run
    share, data = monitor.report.attention["relevance"], Texts(58, 1, agreement=0.7)
    eager = Bert("eager")
    eager.load_state_dict(module.net.state_dict())
    maps = eager.eval().bert.bert(data.input_ids, data.attention_mask, output_attentions=True).attentions
    lengths, masses = data.attention_mask.sum(1).numpy(), []
    for sample, length in enumerate(lengths):
        heads = [layer[sample, head, :length, 3].double().mean() for layer in maps for head in range(2)]
        masses.append(np.mean(heads))
    for label in range(2):
        own = data.labels.numpy() == label
        assert share.mass[label] == pytest.approx(np.array(masses)[own].mean(), rel=1e-5)
        assert share.lift[label] == pytest.approx(np.array(masses)[own].sum() / (1 / lengths[own]).sum(), rel=1e-5)
        assert share.support[label] == own.sum()
    assert set(monitor.report.attention) == {"relevance"}


def test_training_is_counted_too(run: tuple[BiasMonitor, Classifier, Any]) -> None:
    data = Texts(32)
    expected = np.zeros((4, 2), dtype=int)
    np.add.at(expected, (data.group.numpy(), data.labels.numpy()), 2)  # two epochs
    assert run[0].report.train_counts.tolist() == expected.tolist()


def test_ledger_has_one_entry_a_validation_by_step(tmp_path: Path) -> None:
    monitor = feeding_monitor()
    fit(Classifier(), quiet_trainer(tmp_path, [monitor], max_epochs=2, val_check_interval=0.5))
    assert [(entry["epoch"], entry["step"]) for entry in monitor.ledger] == [(0, 2), (0, 4), (1, 6), (1, 8)]
    assert monitor.ledger[-1]["gap"] == monitor.report.gap


def test_standalone_validation_measures_and_feeds_nothing_back(tmp_path: Path) -> None:
    monitor, module = feeding_monitor(), Classifier()
    trainer = quiet_trainer(tmp_path, [monitor])
    fit(module, trainer)
    before, entries = module.criterion.class_weight.clone(), len(monitor.ledger)
    trainer.validate(module, loader(40, seed=7), verbose=False)
    assert int(monitor.report.support.sum()) == 40
    assert torch.equal(module.criterion.class_weight, before)
    assert len(monitor.ledger) == entries + 1
    assert monitor.ledger[-1]["decisions"] == []


class WithOutput(Classifier):
    """Returns ``output(logits)`` from its validation step; its forward hides what it returns."""

    def __init__(self, output: Any, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.output = output

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.output(self(batch))


@pytest.mark.parametrize(
    ("output", "schema"),
    [
        (lambda logits: {"logits": logits}, {}),
        (lambda logits: {"loss": logits.sum(), "scores": logits}, {"logits": "scores"}),
        (lambda logits: {"deep": [logits]}, {"logits": lambda output: output["deep"][0]}),
        (lambda logits: {"logits": logits[:, 1] - logits[:, 0]}, {}),
        (lambda logits: {"logits": logits[:, 1:] - logits[:, :1]}, {}),
        (lambda logits: None, {}),
    ],
    ids=["logits", "named", "function", "one logit", "one column", "forward"],
)
def test_logits_are_found(output: Any, schema: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    monitor, module = BiasMonitor(BatchSchema(**schema)), WithOutput(output)
    quiet_trainer(tmp_path, [monitor]).validate(module, loader(32, seed=1), verbose=False)
    data = Texts(32, seed=1)
    with torch.no_grad():
        predicted = module.eval()({"input_ids": data.input_ids, "attention_mask": data.attention_mask}).argmax(-1)
    assert monitor.report.counts.sum(0).tolist() == confusion_matrix(data.labels, predicted).tolist()


def hidden(logits: Tensor) -> dict[str, Tensor]:
    return {"wrapped": logits}


class Hiding(BagOfWords):
    def forward(self, batch: Any) -> Any:
        return hidden(super().forward(batch))


class HidingClassifier(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch)["wrapped"], batch[1])


def test_without_logits_an_observer_warns_and_goes_on(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [BiasMonitor()], max_epochs=2)
    with pytest.warns(UserWarning, match="`BiasMonitor` is switched off.*No `logits` were found") as caught:
        fit(HidingClassifier(Hiding()), trainer, pair_loader(8), pair_loader(8))
    assert len([w for w in caught if "switched off" in str(w.message)]) == 1
    assert trainer.current_epoch == 2
    assert trainer.callback_metrics["bias/gap"].isnan()  # there, so that who monitors it does not raise


def test_without_logits_feedback_refuses_before_training(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [BiasMonitor(feedback=[ClassReweighting(by="group")])], num_sanity_val_steps=1)
    module = HidingClassifier(Hiding())
    with pytest.raises(MisconfigurationException, match=r"say where they are: BatchSchema\(logits="):
        fit(module, trainer, pair_loader(8), pair_loader(8))
    assert trainer.global_step == 0
    assert leftovers(module) == {}


def test_labels_beyond_the_names_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`classes` must name all 2 classes of the logits, got \\('only',\\)"):
        quiet_trainer(tmp_path, [BiasMonitor(classes=("only",))]).validate(Classifier(), loader(8), verbose=False)
    with pytest.warns(UserWarning, match="`group` must lie between 0 and 1.*got 3"):
        quiet_trainer(tmp_path, [BiasMonitor(groups=("a", "b"))]).validate(Classifier(), loader(32), verbose=False)


def test_feedback_needs_automatic_optimization(tmp_path: Path) -> None:
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="needs automatic optimization"):
        fit(module, quiet_trainer(tmp_path, [feeding_monitor()]))
    assert leftovers(module) == {}


def test_feedback_that_finds_no_criterion_says_so(tmp_path: Path) -> None:
    module = Classifier()
    module.criterion = nn.CrossEntropyLoss()
    with pytest.raises(MisconfigurationException, match="Expected a loss with a buffer `class_weight`"):
        fit(module, quiet_trainer(tmp_path, [feeding_monitor()]))


def test_annotation_without_attention_loses_the_mass_and_nothing_else(tmp_path: Path) -> None:
    class Words(BagOfWords):
        def forward(self, batch: Any) -> Tensor:
            return super().forward((batch["input_ids"],))

    monitor = BiasMonitor(feedback=[ClassReweighting(by="group")])
    with pytest.warns(UserWarning, match="attention mass of `BiasMonitor` is switched off.*No attention was seen"):
        fit(Classifier(Words()), quiet_trainer(tmp_path, [monitor]))
    assert monitor.report.attention == {}
    assert int(monitor.report.support.sum()) == 16


def test_unnamed_groups_are_numbered_as_far_as_seen(tmp_path: Path) -> None:
    monitor = BiasMonitor()
    quiet_trainer(tmp_path, [monitor]).validate(Classifier(), loader(32), verbose=False)
    assert monitor.report.group_names == ("group 0", "group 1", "group 2", "group 3")
    quiet_trainer(tmp_path, [monitor]).validate(Classifier(BagOfWords()), pair_loader(8), verbose=False)
    assert not monitor.report.has_groups


def batch_of(labels: list[int], groups: list[int] | None = None) -> dict[str, Tensor]:
    batch = {"labels": torch.tensor(labels)}
    return batch if groups is None else {**batch, "group": torch.tensor(groups)}


class OneProcess:
    root_device = torch.device("cpu")

    def reduce(self, tensor: Tensor, reduce_op: str) -> Tensor:
        return tensor


def test_fed_counts() -> None:
    fed = FedCounts()
    assert fed.counts(2, 3) is None
    fed.add(BatchSchema(), batch_of([0, 2, -100, 1], [1, 1, 1, 0]))
    fed.gather(OneProcess())
    fed.add(BatchSchema(), batch_of([2], [1]))
    assert fed.counts(2, 3).tolist() == [[0, 1, 0], [1, 0, 2]]
    again = FedCounts()
    again.load(fed.state())
    assert again.counts(2, 3).tolist() == [[0, 1, 0], [1, 0, 2]]
    assert fed.state().shape == (2, 3)


def test_fed_counts_claim_no_groups_that_training_does_not_know() -> None:
    fed = FedCounts()
    fed.add(BatchSchema(group="domain"), batch_of([0, 1, 1]))
    assert fed.counts(2, 2) is None
    assert fed.counts(1, 2).tolist() == [[1, 2]]


def test_fed_counts_leave_out_what_are_no_class_labels() -> None:
    fed = FedCounts()
    fed.add(BatchSchema(), {"labels": torch.rand(3)})
    fed.add(BatchSchema(), {"labels": torch.zeros(3, 5, dtype=torch.long)})
    fed.add(BatchSchema(target="nowhere"), batch_of([1]))
    fed.add(BatchSchema(), batch_of([5000]))
    assert fed.counts(1, 2) is None


# --- the loop ----------------------------------------------------------------------------------------------------


def biased_run(feedback: list[Any], folder: Path, epochs: int = 4) -> tuple[BiasMonitor, Classifier, list[Tensor]]:
    """Train on data where a shortcut agrees with the label, validate where it does not."""
    torch.manual_seed(0)
    weights: list[Tensor] = []
    module = Classifier(lr=2e-3)

    class Spy(BiasMonitor):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_epoch_end(trainer, pl_module)
            weights.append(pl_module.criterion.class_weight.clone())

    monitor = Spy(feedback=feedback, groups=GROUPS, classes=CLASSES)
    train, validation = Texts(256, seed=0, agreement=0.95), Texts(200, seed=1, agreement=0.5)
    fit(module, quiet_trainer(folder, [monitor], max_epochs=epochs), DataLoader(train, 16), DataLoader(validation, 100))
    return monitor, module, weights


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> BiasMonitor:
    return biased_run([], tmp_path_factory.mktemp("plain"))[0]


def test_weights_move_from_the_first_validation_on_and_lift_the_worst_group(
    baseline: BiasMonitor, tmp_path: Path
) -> None:
    monitor, _, weights = biased_run([ClassReweighting(by="group", step_size=4.0)], tmp_path)
    first = monitor.ledger[0]
    assert first["decisions"]
    assert not torch.equal(weights[0], torch.ones(4, 2))
    # groups 1 and 2 are those in which the shortcut is wrong; each group has one class
    assert weights[-1][1, 0] > 1.5 * weights[-1][0, 0]
    assert weights[-1][2, 1] > 1.5 * weights[-1][3, 1]
    assert monitor.ledger[-1]["worst_group_accuracy"] > baseline.ledger[-1]["worst_group_accuracy"] + 0.1


def test_guidance_draws_attention_to_relevant_words(baseline: BiasMonitor, tmp_path: Path) -> None:
    guidance = AttentionGuidance(losses.AttentionGuidedLoss(), coefficient=5.0)
    monitor, _, _ = biased_run([guidance], tmp_path)
    plain, guided = baseline.report.attention["relevance"], monitor.report.attention["relevance"]
    assert (guided.mass > plain.mass + 0.1).all()


def test_guidance_is_logged_as_the_mean_over_the_steps_of_an_epoch(tmp_path: Path) -> None:
    class Counting(nn.Module):
        steps = 0

        def forward(self, weights: Any, *args: Any, **kwargs: Any) -> Tensor:
            self.steps += 1
            return weights[0].mean() * 0 + self.steps

    monitor = BiasMonitor(feedback=[AttentionGuidance(Counting(), 0.5), AttentionGuidance(Counting(), 2.0)])
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
    fit(Classifier(), trainer)
    assert trainer.callback_metrics["bias/term/AttentionGuidance"] == 0.5 * (5 + 6 + 7 + 8) / 4
    assert trainer.callback_metrics["bias/term/AttentionGuidance_1"] == 2.0 * (5 + 6 + 7 + 8) / 4


def test_guidance_waits_until_a_bias_was_found(tmp_path: Path) -> None:
    guidance = AttentionGuidance(losses.AttentionGuidedLoss(), when="biased")
    monitor, trainer = BiasMonitor(feedback=[guidance]), quiet_trainer(tmp_path)
    trainer.callbacks.append(monitor)
    fit(Classifier(BagOfWords()), trainer, DataLoader(Pairs(8), 8), DataLoader(Pairs(8), 8))
    assert "bias/term/AttentionGuidance" not in trainer.callback_metrics
    assert not guidance.active

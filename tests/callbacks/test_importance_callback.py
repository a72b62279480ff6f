"""HeadImportance: the numbers of the functions, what it logs, and nothing of the run changed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_callbacks import BatchSchema
from attn_callbacks.analysis.ablation import ablate_heads
from attn_callbacks.analysis.head_importance import head_importance
from attn_callbacks.analysis.interaction import head_interactions
from attn_callbacks.analysis.pruning import pruning_curve
from attn_callbacks.callbacks.head_importance import HeadImportance
from tests.callbacks.board import events
from tests.callbacks.models import (
    HEADS,
    LAYERS,
    BagOfWords,
    Bert,
    Classifier,
    EncoderDecoder,
    TextEncoder,
    Texts,
    Vit,
    board_logger,
    csv_logger,
    fit,
    leftovers,
    loader,
    pair_loader,
    quiet_trainer,
)

METHODS = ("gate", "ablation")
every_method = pytest.mark.parametrize("method", METHODS)


def validated(module: Any, folder: Path, data: Any = None, **options: Any) -> HeadImportance:
    callback = HeadImportance(**options)
    trainer = quiet_trainer(folder, [callback], logger=csv_logger(folder))
    trainer.validate(module, data or loader(32, seed=1), verbose=False)
    assert leftovers(module) == {}
    return callback


def entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch), batch["labels"], reduction="none")


@every_method
@pytest.mark.parametrize("net", [Bert, TextEncoder])
def test_it_finds_what_the_functions_find(method: str, net: type[nn.Module], tmp_path: Path) -> None:
    module = Classifier(net(dropout=0.3))
    found = validated(module, tmp_path, method=method, batches=2, interactions=True).result
    batches = list(loader(32, seed=1))[:2]
    if method == "gate":
        expected: Any = head_importance(module.net, batches, entropy)
        torch.testing.assert_close(found.importance.importance, expected.importance, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.importance.confidence, expected.confidence, rtol=1e-4, atol=1e-7)
        curve = pruning_curve(module.net, batches, entropy, expected.importance)
    else:
        expected = ablate_heads(module.net, batches, entropy)
        torch.testing.assert_close(found.ablation.change, expected.change, rtol=1e-4, atol=1e-6)
        curve = pruning_curve(module.net, batches, entropy, expected.change)
    assert found.layer_names == tuple(f"net.{name}" for name in expected.layer_names)
    assert [head[1] for head in found.pruning.heads] == [head[1] for head in curve.heads]
    torch.testing.assert_close(found.pruning.change, curve.change, rtol=1e-4, atol=1e-6)
    pairs = head_interactions(module.net, batches, entropy)
    torch.testing.assert_close(found.interactions.interaction, pairs.interaction, rtol=1e-3, atol=1e-6, equal_nan=True)
    assert all(part.is_complete for part in (found.pruning, found.interactions))


def test_images_and_cross_attention(tmp_path: Path) -> None:
    vit = validated(Classifier(Vit()), tmp_path / "vit", pair_loader(8, images=True)).result
    assert (vit.importance.importance > 0).all()
    both = validated(Classifier(EncoderDecoder()), tmp_path / "both", pair_loader(8)).result
    assert [name.rpartition(".")[2] for name in both.layer_names] == ["self_attn", "self_attn", "multihead_attn"]


def test_one_logit_and_labels_that_do_not_count(tmp_path: Path) -> None:
    class One(TextEncoder):
        def forward(self, batch: Any) -> Tensor:
            logits = super().forward(batch)
            return logits[:, 1] - logits[:, 0]

    class Steps(Classifier):
        def loss(self, batch: Any) -> Tensor:
            return F.binary_cross_entropy_with_logits(self(batch), batch["labels"].float())

    def labels(batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"].where(torch.arange(len(batch["labels"])) != 2, -100)

    module = Steps(One())
    found = validated(module, tmp_path, batches=1, schema=BatchSchema(target=labels)).result.importance
    batch = next(iter(loader(32, seed=1)))
    kept = {name: value[torch.arange(8) != 2] for name, value in batch.items()}

    def binary(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch), batch["labels"].float(), reduction="none")

    expected = head_importance(module.net, [kept], binary)
    torch.testing.assert_close(found.importance, expected.importance, rtol=1e-4, atol=1e-7)
    assert found.samples == 7


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    def loss(module: Any, batch: dict[str, Tensor]) -> Tensor:
        return 3 * entropy(module.net, batch)

    module = Classifier(Bert())
    own = validated(module, tmp_path / "own", loss=loss, schema=BatchSchema(target=lambda batch: None)).result
    usual = validated(module, tmp_path / "usual").result
    torch.testing.assert_close(own.importance.signed, 3 * usual.importance.signed, rtol=1e-4, atol=1e-7)


@every_method
def test_training_is_the_same_with_and_without(method: str, tmp_path: Path) -> None:
    weights = []
    for name, callbacks in (("without", []), ("with", [HeadImportance(method=method, interactions=True)])):
        torch.manual_seed(5)
        module = Classifier(Norming())
        trainer = quiet_trainer(tmp_path / name, callbacks, logger=csv_logger(tmp_path / name), max_epochs=3)
        fit(module, trainer, loader(32, shuffle=True), loader(16, seed=1, shuffle=True))
        weights.append((torch.random.get_rng_state(), module.state_dict()))
        assert leftovers(module) == {}
    assert torch.equal(weights[0][0], weights[1][0])
    for name, value in weights[0][1].items():
        assert torch.equal(value, weights[1][1][name]), name


class Norming(TextEncoder):
    """Dropout, and statistics of batches."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, batch: Any) -> Tensor:
        return self.norm(super().forward(batch))


class Watching(Classifier):
    """Notices gradients and flags after validation."""

    def on_validation_end(self) -> None:
        self.touched = [name for name, parameter in self.named_parameters() if parameter.grad is not None]
        self.flags = {part.training for part in self.modules()}


def test_no_parameter_gets_a_gradient(tmp_path: Path) -> None:
    module = Watching()
    validated(module, tmp_path)
    assert (module.touched, module.flags) == ([], {False})


@every_method
def test_what_tensorboard_gets(method: str, tmp_path: Path) -> None:
    callback = HeadImportance(method=method, interactions=True, rise=10.0)
    fit(Classifier(Bert()), quiet_trainer(tmp_path, [callback], logger=board_logger(tmp_path), max_epochs=2))
    board = events(tmp_path / "board")
    pictures = {"gate": ("gate", "first_order_change", "confidence"), "ablation": ("ablation",)}[method]
    assert set(board.Tags()["images"]) == {f"importance/{name}" for name in (*pictures, "interaction")}
    assert all(len(board.Images(tag)) == 2 for tag in board.Tags()["images"])
    scalars = {tag for tag in board.Tags()["scalars"] if tag.startswith("importance/")}
    layers = [f"net.bert.bert.encoder.layer.{layer}.attention.self" for layer in range(LAYERS)]
    named = {f"importance/{name}/{layer}" for name in pictures for layer in layers}
    assert scalars == named | {"importance/loss", "importance/removable", "importance/removable_change"}
    removed = board.Scalars("importance/removable")[-1].value
    assert removed == len(callback.result.pruning.removable(10.0).heads) == LAYERS * HEADS
    text = board.Tensors("importance/summary/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert f"**{LAYERS * HEADS} heads can go together**" in text
    assert callback.result.epoch == 1


def test_result_without_a_logger_and_as_a_dict(tmp_path: Path) -> None:
    callback = HeadImportance()
    fit(Classifier(), quiet_trainer(tmp_path, [callback], max_epochs=2))
    found = callback.result.to_dict()
    assert (found["epoch"], found["ablation"], found["interactions"]) == (1, None, None)
    assert len(found["importance"]["importance"]) == LAYERS
    assert not callback.result.importance.importance.is_inference()
    assert not list(tmp_path.iterdir())


def test_every_n_epochs_and_layers(tmp_path: Path) -> None:
    callback = HeadImportance(every_n_epochs=2, layers=["*.layer.1.*"])
    trainer = quiet_trainer(tmp_path, [callback], logger=csv_logger(tmp_path), max_epochs=4)
    fit(Classifier(Bert()), trainer)
    assert len(list(tmp_path.glob("**/gate_step*.png"))) == 2
    assert callback.result.layer_names == ("net.bert.bert.encoder.layer.1.attention.self",)


def test_the_time_is_up(tmp_path: Path) -> None:
    callback = validated(Classifier(Bert()), tmp_path, seconds=1e-6, method="ablation", interactions=True)
    found = callback.result
    assert found.ablation.change.isnan().all()
    assert (found.pruning, found.interactions) == (None, None)
    short = HeadImportance(seconds=1e-6)
    fit(Classifier(Bert()), quiet_trainer(tmp_path, [short], logger=board_logger(tmp_path)))
    text = events(tmp_path / "board").Tensors("importance/summary/text_summary")[-1]
    assert "The time was up before all was measured: importance, pruning." in text.tensor_proto.string_val[0].decode()


def test_what_cannot_be_done_is_told_and_training_goes_on(tmp_path: Path) -> None:
    def run(module: Any, match: str, *data: Any, **options: Any) -> None:
        callback = HeadImportance(**options)
        with pytest.warns(UserWarning, match=match):
            fit(module, quiet_trainer(tmp_path, [callback]), *data)
        assert leftovers(module) == {}
        assert callback.result is None

    words = "switched off for the rest of this run. AttentionNotFoundError"
    run(Classifier(BagOfWords()), words, pair_loader(), pair_loader())
    run(Classifier(), "Cross entropy needs `inputs` that are a tensor", schema=BatchSchema(target=lambda batch: None))
    run(Copying(), "No call of the module, or of a network directly below it, got the `inputs`")
    run(Classifier(Bert()), "one loss per sample", loss=lambda module, batch: module.loss(batch))


class Copying(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return super().loss({name: value.clone() for name, value in batch.items()})


def test_arguments() -> None:
    for name in ("seconds", "rise"):
        with pytest.raises(ValueError, match=f"`{name}` must be above 0, got 0"):
            HeadImportance(**{name: 0})
    with pytest.raises(ValueError, match="`method` must be one of 'gate', 'ablation', got 'taylor'"):
        HeadImportance(method="taylor")
    with pytest.raises(ValueError, match="`batches` must be at least 1"):
        HeadImportance(batches=0)
    with pytest.raises(TypeError, match="`layers` must be a list of names"):
        HeadImportance(layers="encoder")
    with pytest.raises(TypeError, match="`loss` must be a function"):
        HeadImportance(loss="mse")
    twin = pickle.loads(pickle.dumps(HeadImportance(method="ablation", layers=["a"])))
    assert repr(twin) == "HeadImportance(method='ablation', layers=('a',))"


def test_batches_are_the_first_ones(tmp_path: Path) -> None:
    data = Texts(32, seed=1)
    found = validated(Classifier(Bert()), tmp_path, batches=3).result
    assert found.importance.samples == 24 < len(data)

"""ErrorAnalysis on models of which it is known which head attends elsewhere on mistakes, and on one where none does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attn_callbacks import record
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._error_gallery import WorstSamples, worst_of_all
from attn_callbacks.callbacks._error_sums import ErrorSums
from attn_callbacks.callbacks._error_text import error_text
from attn_callbacks.callbacks.error_analysis import ErrorAnalysis
from attn_callbacks.functional.effect_size import effect_size, moments
from tests.callbacks.models import (
    Bert,
    Classifier,
    EncoderDecoder,
    Vit,
    board_logger,
    csv_logger,
    fit,
    leftovers,
    loader,
    pair_loader,
    pl,
    quiet_trainer,
)

SAMPLES, TOKENS, HEADS = 240, 6, 3
LAYER = "net.layer.1"


class Planted(nn.Module):
    """Two layers of three random heads; in layer 1, head 2 rests on the first token where the sample says so."""

    def __init__(self, bends: bool) -> None:
        super().__init__()
        self.bends, self.scale = bends, nn.Parameter(torch.ones(()))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        noise = batch["noise"]  # (batch, layers, heads, tokens, tokens)
        for layer in range(2):
            scores = noise[:, layer].clone()
            if layer == 1 and self.bends:
                scores[:, 2, :, 0] += 3.0 * batch["hard"].float()[:, None]
            record(f"layer.{layer}", scores.softmax(dim=-1))
        return batch["scores"] * self.scale


def planted_data(seed: int = 0) -> tuple[DataLoader[Any], dict[str, Tensor]]:
    """Every fourth sample is predicted wrong, of either class."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (SAMPLES,), generator=source)
    hard = torch.rand(SAMPLES, generator=source) < 0.25
    sure = torch.rand(SAMPLES, generator=source) * 3 + 0.5
    predicted = torch.where(hard, 1 - labels, labels)
    columns = {
        "labels": labels,
        "hard": hard,
        "scores": nn.functional.one_hot(predicted, 2) * sure[:, None],
        "noise": torch.randn(SAMPLES, 2, HEADS, TOKENS, TOKENS, generator=source),
        "input_ids": torch.arange(SAMPLES * TOKENS).view(SAMPLES, TOKENS),
        "first": torch.arange(TOKENS).eq(0).expand(SAMPLES, -1),
    }
    rows = [{name: column[n] for name, column in columns.items()} for n in range(SAMPLES)]
    return DataLoader(rows, 32), columns  # type: ignore[arg-type]


class Fixed(pl.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"logits": self.net(batch)}


def analysed(folder: Path, *, bends: bool, seed: int = 0, **options: Any) -> tuple[ErrorAnalysis, dict[str, Tensor]]:
    analysis = ErrorAnalysis(BatchSchema(sets={"first": "first"}), **options)
    data, columns = planted_data(seed)
    trainer = quiet_trainer(folder, [analysis])
    trainer.validate(Fixed(Planted(bends)), data, verbose=False)
    return analysis, columns


def test_finds_the_head_that_attends_elsewhere_on_mistakes(tmp_path: Path) -> None:
    analysis, columns = analysed(tmp_path, bends=True)
    result = analysis.result
    assert result is not None
    found = result.differences()
    assert {(each.layer, each.head) for each in found} == {(LAYER, 2)}
    assert {"first_mass", "mass/first", "confidence", "entropy"} <= {each.statistic for each in found}
    assert result.ranking(1) == [(1, 2)]
    first = next(each for each in found if each.statistic == "mass/first")
    weights = (columns["noise"][:, 1, 2] + 3.0 * columns["hard"][:, None, None] * columns["first"][0]).softmax(dim=-1)
    mass = weights[..., 0].mean(dim=-1)
    expected = effect_size(moments(mass[columns["hard"]]), moments(mass[~columns["hard"]]))
    assert first.g == pytest.approx(float(expected.g), rel=1e-4)
    assert first.wrong == pytest.approx(float(mass[columns["hard"]].mean()), rel=1e-5)
    assert first.within == pytest.approx(first.g, rel=0.2)  # mistakes are as frequent in both classes
    assert f"| {LAYER} | 2 | mass/first |" in error_text(result)
    assert result.samples.sum(dim=0).tolist() == [int(columns["hard"].sum()), int((~columns["hard"]).sum())]


@pytest.mark.parametrize("seed", range(4))
def test_finds_none_where_there_is_none(seed: int, tmp_path: Path) -> None:
    result = analysed(tmp_path, bends=False, seed=seed, samples=0)[0].result
    assert result is not None
    assert result.differences() == ()
    assert "No head attends differently" in error_text(result)
    assert result.worst == result.confident == ()
    assert float(result.outcome.p_value.min()) < 0.2  # there was something to correct


def test_differences_of_classes_are_told_from_those_of_mistakes(tmp_path: Path) -> None:
    """The head bends on class 1, where mistakes are frequent, and not on mistakes."""
    data, columns = planted_data()
    hard = columns["hard"].clone()
    for row in data.dataset:
        row["hard"] = row["labels"].bool()
        wrong = torch.rand(()) < (0.6 if row["labels"] else 0.1)
        row["scores"] = nn.functional.one_hot(row["labels"] ^ wrong, 2).float()
    analysis = ErrorAnalysis(samples=0)
    quiet_trainer(tmp_path, [analysis]).validate(Fixed(Planted(True)), data, verbose=False)
    result, place = analysis.result, None
    assert result is not None
    place = (1, 2, result.statistics.index("first_mass"))
    assert float(result.outcome_p[place]) < 1e-6
    assert abs(float(result.adjusted[place])) < 3 * float(result.adjusted_error[place])
    assert float(result.by_class_p[(*place, 1)]) < 1e-20
    assert float(result.by_class.g[(*place, 1)]) == pytest.approx(-float(result.by_class.g[(*place, 0)]))
    assert len(hard) == SAMPLES


def test_gallery_keeps_the_true_worst(tmp_path: Path) -> None:
    analysis, columns = analysed(tmp_path, bends=True, samples=5)
    losses = nn.functional.cross_entropy(columns["scores"], columns["labels"], reduction="none")
    sure = columns["scores"].softmax(dim=1).amax(dim=1) * columns["hard"]
    result = analysis.result
    assert result is not None
    assert [sample.number for sample in result.worst] == losses.topk(5).indices.tolist()
    assert [sample.number for sample in result.confident] == sure.topk(5).indices.tolist()
    for sample in result.worst:
        assert sample.loss == pytest.approx(float(losses[sample.number]), rel=1e-5)
        assert sample.labels == tuple(str(token) for token in columns["input_ids"][sample.number].tolist())
        weights = columns["noise"][sample.number, 0].softmax(dim=-1)
        torch.testing.assert_close(sample.maps[LAYER.replace("1", "0")].float(), weights, atol=1e-3, rtol=0)


def test_worst_samples_of_growing_shapes() -> None:
    source, worst = torch.Generator().manual_seed(0), WorstSamples(4)
    scores = torch.rand(6, 5, generator=source)
    for number, batch in enumerate(scores):
        fields = {"ids": torch.full((5, number + 1), number + 1)}
        worst.add(batch, fields | ({"late": torch.ones(5)} if number > 2 else {}))
    entries = worst.entries()
    assert [float(entry["score"]) for entry in entries] == scores.flatten().topk(4).values.tolist()
    for entry, place in zip(entries, scores.flatten().topk(4).indices.tolist(), strict=True):
        number = place // 5 + 1
        assert entry["ids"].tolist()[:number] == [number] * number
        assert not any(entry["ids"].tolist()[number:])
        assert float(entry["late"]) == float(number > 3)


@pytest.mark.parametrize("kind", ["text", "bert", "image", "cross"])
def test_models_and_pictures(kind: str, tmp_path: Path) -> None:
    net = {"text": lambda: None, "bert": Bert, "image": Vit, "cross": EncoderDecoder}[kind]()
    pairs = pair_loader(24, images=kind == "image") if kind in ("image", "cross") else None
    analysis = ErrorAnalysis(samples=2, max_tokens=20)
    trainer = quiet_trainer(tmp_path, [analysis], logger=csv_logger(tmp_path))
    module = Classifier(net)
    fit(module, trainer, pairs or loader(16), pairs or loader(24, seed=1))
    assert analysis.result is not None
    assert leftovers(module) == {}
    assert analysis.result.samples.sum() == 24
    assert analysis.result.to_dict()["samples"] == analysis.result.samples.tolist()
    drawn = {str(path.relative_to(tmp_path / "run")) for path in tmp_path.glob("run/**/*.png")}
    assert any(path.startswith("errors/worst/0") for path in drawn)
    assert any(path.startswith("errors/worst/0/image") for path in drawn) == (kind == "image")
    if kind == "bert":  # padding is cut off
        sizes = [len(sample.labels) for sample in analysis.result.worst]
        assert [next(iter(sample.maps.values())).shape[-1] for sample in analysis.result.worst] == sizes


def test_long_maps_are_pooled(tmp_path: Path) -> None:
    analysis = ErrorAnalysis(samples=1, max_tokens=4)
    quiet_trainer(tmp_path, [analysis]).validate(Classifier(), pair_loader(8), verbose=False)
    assert analysis.result is not None
    maps = next(iter(analysis.result.worst[0].maps.values()))
    assert maps.shape[1:] == (4, 4)
    torch.testing.assert_close(maps.float().sum(dim=-1), torch.ones(maps.shape[:2]), atol=5e-3, rtol=0)


def test_board_gets_scalars_and_text(tmp_path: Path) -> None:
    from tests.callbacks.board import events

    trainer = quiet_trainer(tmp_path, [ErrorAnalysis(samples=1)], logger=board_logger(tmp_path))
    trainer.validate(Classifier(), loader(16), verbose=False)
    found = events(tmp_path / "board")
    assert {"errors/rate", "errors/heads", "errors/largest_effect"} <= set(found.Tags()["scalars"])
    assert "errors/differences/text_summary" in found.Tags()["tensors"]
    assert "errors/entropy" in found.Tags()["images"]


def test_training_is_bit_identical(tmp_path: Path) -> None:
    def trained(callbacks: list[Any], folder: Path) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = Classifier(Bert(dropout=0.1))
        trainer = quiet_trainer(folder, callbacks, max_epochs=2, val_check_interval=0.5)
        return dict(fit(module, trainer).state_dict())

    plain, analysis = trained([], tmp_path / "plain"), ErrorAnalysis(samples=2)
    watched = trained([analysis], tmp_path / "watched")
    assert analysis.result is not None
    assert {name for name, value in plain.items() if not torch.equal(value, watched[name])} == set()


def test_text_is_escaped(tmp_path: Path) -> None:
    analysis = ErrorAnalysis(classes=["<script>", "a|b"], samples=1)
    quiet_trainer(tmp_path, [analysis]).validate(Classifier(), loader(16), verbose=False)
    assert analysis.result is not None
    assert "<script>" not in error_text(analysis.result)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    analysis = ErrorAnalysis(classes=["one"])
    with pytest.warns(UserWarning, match="`classes` must name the 2 classes"):
        quiet_trainer(tmp_path, [analysis]).validate(Classifier(), loader(8), verbose=False)
    assert analysis.result is None
    with pytest.raises(ValueError, match="`samples` must be at least 0, got -1"):
        ErrorAnalysis(samples=-1)


def _share(rank: int, folder: str) -> None:
    """What one of two processes does: its half of the samples, in batches of its own."""
    from torch import distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sums, worst = _filled(range(rank, 6, 2), is_distributed=True)
    layers, found = sums.conclude(torch.device("cpu"), failure=None) or ((), None)
    entries = worst_of_all(worst.entries(), 3, is_distributed=True)
    failing = ErrorSums(is_distributed=True)
    told = ""
    try:
        failing.conclude(torch.device("cpu"), failure="ValueError: no" if rank == 1 else None)
    except RuntimeError as error:
        told = str(error)
    scores = [(float(entry["score"]), int(entry["batch"])) for entry in entries]
    torch.save((layers, found, scores, told), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _filled(batches: Any, *, is_distributed: bool) -> tuple[ErrorSums, WorstSamples]:
    sums, worst = ErrorSums(is_distributed=is_distributed), WorstSamples(3)
    for number in batches:
        source = torch.Generator().manual_seed(number)
        values, scores = torch.randn(8, 2, 4, generator=source), torch.rand(8, generator=source)
        sums.add("both", values, torch.arange(8) % 2, values[:, 0, 0] > 0, 2)
        if number == 5:  # a layer that one process alone sees
            sums.add("late", values[:, :1], torch.arange(8) % 2, values[:, 0, 0] > 0, 2)
        worst.add(scores, {"batch": torch.full((8,), number)})
    return sums, worst


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_share, (str(tmp_path),), nprocs=2)
    sums, worst = _filled(range(6), is_distributed=False)
    layers, expected = sums.conclude(torch.device("cpu"), failure=None) or ((), None)
    assert expected is not None
    for rank in range(2):
        names, found, scores, told = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert names == layers == ("both", "late")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert scores == [(float(entry["score"]), int(entry["batch"])) for entry in worst.entries()]
        assert told == "A process could not measure all of its data. ValueError: no"


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from examples.sentiment_data import minilm

    try:
        folder = minilm()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    places, animals = ("chair", "old red sofa", "floor <b>"), ("cat", "dog", "bank", "fund")
    texts = [f"the {animal} lay on the {place}" for animal in animals for place in places]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor([0] * 6 + [1] * 6)
    batch["labels"][0] = 1  # a wrong label

    class Probe(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
            self.tokenizer = tokenizer
            ids = tokenizer(["an animal, a pet", "money and banks"], padding=True, return_tensors="pt")
            with torch.no_grad():
                self.topics = self.pooled(ids["input_ids"], ids["attention_mask"])

        def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"logits": 10 * self.pooled(batch["input_ids"], batch["attention_mask"]) @ self.topics.T}

    rows = [{name: column[n] for name, column in batch.items()} for n in range(len(texts))]
    analysis = ErrorAnalysis(samples=2, classes=["pet", "money"])
    trainer = quiet_trainer(tmp_path, [analysis], logger=csv_logger(tmp_path))
    trainer.validate(Probe(), DataLoader(rows, 5), verbose=False)  # type: ignore[arg-type]
    result = analysis.result
    assert result is not None
    assert result.outcome.g.shape[:2] == (6, 12)
    assert result.confident[0].number == 0
    assert result.confident[0].labels == ("[CLS]", "the", "cat", "lay", "on", "the", "chair", "[SEP]")
    assert all(maps.shape == (12, 8, 8) for maps in result.confident[0].maps.values())
    assert len(list(tmp_path.glob("run/errors/worst/*.png"))) == 2

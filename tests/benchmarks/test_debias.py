"""The bias benchmark: its data has the bias it says, its figures are what they are called, a run can be taken up."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from benchmarks.debias import __main__ as command
from benchmarks.debias import two_stage
from benchmarks.debias.classifier import Classifier, predict, steps_of
from benchmarks.debias.decoy_digits import WORK as DECOY
from benchmarks.debias.exchange import marked_elsewhere
from benchmarks.debias.method import Method, balanced_sampler, cells, inverse_frequency
from benchmarks.debias.methods import CONTROL, METHODS, find_method
from benchmarks.debias.photo_digits import WORK as PHOTO
from benchmarks.debias.summary import effect, mean_and_error, table
from benchmarks.debias.trial import attention_mass, macro_f1, measure, reliance
from benchmarks.debias.work import Samples, find_work, region

needs_photos = pytest.mark.skipif(bool(PHOTO.missing()), reason=PHOTO.missing())


@pytest.fixture(scope="module")
def decoys():
    return DECOY.build(3)


class DecoyReader(nn.Module):
    """Knows the digit from the brightness of its corner, and nothing else."""

    def forward(self, batch):
        brightest = (batch["inputs"] * region(batch)).amax(dim=(1, 2, 3))
        return -((1 - torch.arange(10) / 10 - brightest[:, None]) ** 2)


def decoy_values(samples):
    """Brightness of the four pixels of each decoy, by hand."""
    found = []
    for image, marked in zip(samples.parts["inputs"], samples.parts["spurious"], strict=True):
        (token,) = marked.nonzero()[:, 0].tolist()
        row, column = divmod(token - 1, 6)
        found.append(image[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten())
    return torch.stack(found)


def test_decoys_tell_the_digit_in_all_but_the_test(decoys):
    for samples, tells in ((decoys.train, True), (decoys.monitor, True), (decoys.telling, True), (decoys.test, False)):
        told = ((1 - decoy_values(samples)) * 10).round().long()
        assert (told == told[:, :1]).all()  # one brightness each
        share = (told[:, 0] == samples.labels).float().mean()
        assert share == 1 if tells else 0.02 < share < 0.2


def test_no_test_digit_is_known_before(decoys):
    train, monitor, test = (split.parts["inputs"][:, 0, 2:10, 2:10].flatten(1) for split in decoys[:3])
    assert len(torch.cat([train, test]).unique(dim=0)) == 1200 + 597
    assert len(torch.cat([train, monitor]).unique(dim=0)) == 1200
    assert not torch.equal(decoys.train.parts["inputs"][:400], decoys.monitor.parts["inputs"])  # other corners


def test_decoys_are_those_of_the_seed(decoys):
    again, other = DECOY.build(3), DECOY.build(4)
    assert torch.equal(again.train.parts["inputs"], decoys.train.parts["inputs"])
    assert not torch.equal(other.train.parts["inputs"], decoys.train.parts["inputs"])
    assert torch.equal(other.test.labels, decoys.test.labels)


def test_relevant_tokens_of_decoy_digits_are_those_with_ink(decoys):
    image, relevance = decoys.test.parts["inputs"][5, 0].clone(), decoys.test.parts["relevance"][5]
    image[region(decoys.test.parts)[5, 0]] = 0
    inked = [(image[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] > 0).any() for r in range(6) for c in range(6)]
    wanted = [False, *map(bool, inked)]
    assert relevance.tolist() == wanted


@needs_photos
def test_photographs_follow_the_class_in_training_only():
    splits = PHOTO.build(1)
    agreeing = [((part.group % 2) == part.labels).float().mean().item() for part in splits]
    assert agreeing == pytest.approx([0.95, 0.5, 0.5, 0.95], abs=0.005)
    assert [len(part) for part in splits] == [1404, 200, 396, 396]
    assert (splits.train.group // 2 == splits.train.labels).all()
    green, red = (splits.test.parts["inputs"][:, channel] for channel in (1, 0))
    shade = (red - green).flatten(1).median(dim=1).values  # the flower's leaves are greener than the buildings
    flower = splits.test.group % 2 == 1
    assert shade[flower].mean() < shade[~flower].mean()


@needs_photos
def test_spurious_patches_of_photographs_have_no_ink():
    part = PHOTO.build(0).test
    spurious, relevance = part.parts["spurious"], part.parts["relevance"]
    assert torch.equal(spurious[:, 1:], ~relevance[:, 1:])
    assert not (spurious | relevance)[:, 0].any()
    in_patches = region({name: part.parts[name] for name in ("inputs", "spurious")})
    assert not (in_patches & ~region(part.parts)).any()
    darkest = part.parts["inputs"].amin(dim=1)[~part.parts["spurious_pixels"]]
    assert darkest.min() >= 0.3 - 0.5  # ink is white
    assert 0.2 < relevance.float().mean() < 0.5


def test_region_spreads_tokens_over_patches():
    marked = torch.rand(2, 1 + 9, generator=torch.Generator().manual_seed(0)) < 0.5
    spread = region({"inputs": torch.zeros(2, 3, 12, 12), "spurious": marked})
    for sample in range(2):
        for row in range(12):
            for column in range(12):
                assert spread[sample, 0, row, column] == marked[sample, 1 + 3 * (row // 4) + column // 4]
    text = {"inputs": torch.zeros(2, 10, dtype=torch.long), "spurious": marked}
    assert torch.equal(region(text), marked)
    assert region({"inputs": torch.zeros(2, 10)}) is None


def test_exchanged_values_come_from_samples_that_are_marked_there_too():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.arange(6 * 2 * 3 * 3).reshape(6, 2, 3, 3).float()
    mask = (torch.rand(6, 1, 3, 3, generator=draw) < 0.6).expand_as(inputs)
    changed = marked_elsewhere(inputs, mask, draw)
    assert torch.equal(changed[~mask], inputs[~mask])
    for place in torch.cartesian_prod(*map(torch.arange, (2, 3, 3))).tolist():
        at = (slice(None), *place)
        own, new = inputs[at][mask[at]].tolist(), changed[at][mask[at]].tolist()
        assert sorted(own) == sorted(new)  # every marked sample gives once and takes once
        assert len(own) < 2 or all(before != after for before, after in zip(own, new, strict=True))


def test_samples_refuse_unequal_lengths_and_missing_labels():
    with pytest.raises(ValueError, match="equally long"):
        Samples({"inputs": torch.zeros(3, 2), "labels": torch.zeros(2)})
    with pytest.raises(ValueError, match="'labels'"):
        Samples({"inputs": torch.zeros(3, 2)})


def test_cells_are_classes_in_groups_and_count_alike():
    labels, group = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 2, 0, 0, 0])
    samples = Samples({"inputs": torch.zeros(6, 1), "labels": labels, "group": group})
    assert cells(samples).tolist() == [0, 0, 2, 1, 1, 1]  # 0 of group 0, 1 of group 0, 0 of group 2
    weight = inverse_frequency(samples)
    assert weight.tolist() == pytest.approx([1, 1, 2, 2 / 3, 2 / 3, 2 / 3])
    assert weight.mean() == pytest.approx(1)
    classes = Samples({"inputs": torch.zeros(6, 1), "labels": labels})
    assert cells(classes).tolist() == labels.tolist()


def test_balanced_sampler_draws_rare_cells_as_often():
    samples = Samples({"inputs": torch.zeros(1000, 1), "labels": (torch.arange(1000) < 50).long()})
    torch.manual_seed(0)
    drawn = samples.labels[torch.tensor(list(balanced_sampler(samples)))]
    assert len(drawn) == 1000
    assert 0.45 < drawn.float().mean() < 0.55


def test_reliance_is_what_shuffling_the_decoy_takes(decoys):
    assert reliance(DECOY, DecoyReader(), decoys.telling) > 0.6
    plain = Samples({"inputs": torch.zeros(2, 3), "labels": torch.zeros(2)})
    assert reliance(DECOY, DecoyReader(), plain) is None


def test_measured_figures_are_those_of_a_model_that_knows_the_decoy(decoys):
    class Uniform(nn.Module):  # its attention does not look at what it reads
        def forward(self, batch):
            token = torch.zeros(len(batch["inputs"]), 2, 37, 4)
            nn.functional.scaled_dot_product_attention(token, token, token)
            return DecoyReader()(batch)

    figures = measure(DECOY, Uniform(), decoys)
    told = ((1 - decoy_values(decoys.test)[:, 0]) * 10).round().long()
    right = (told == decoys.test.labels).numpy()
    by_class = [right[decoys.test.labels.numpy() == digit].mean() for digit in range(10)]
    assert figures["accuracy"] == pytest.approx(right.mean())
    assert figures["worst"] == pytest.approx(min(by_class))
    assert figures["attention_mass"] == pytest.approx(1 / 37, abs=1e-6)


def test_attention_mass_leaves_out_the_rows_of_padding():
    class First(nn.Module):  # every token looks at the first, padding at the last
        def forward(self, batch):
            query = torch.zeros(2, 1, 3, 2)
            query[:, :, :2, 0], query[:, :, 2, 1] = 99.0, 99.0
            key = torch.zeros(2, 1, 3, 2)
            key[:, :, 0, 0], key[:, :, 2, 1] = 1.0, 1.0
            return nn.functional.scaled_dot_product_attention(query, key, key)

    parts = {
        "inputs": torch.zeros(2, 3),
        "labels": torch.zeros(2),
        "spurious": torch.tensor([[True, False, False]] * 2),
    }
    assert attention_mass(First(), Samples(parts)) == pytest.approx(2 / 3, abs=1e-4)
    parts["attention_mask"] = torch.tensor([[1, 1, 0]] * 2)
    assert attention_mass(First(), Samples(parts)) == pytest.approx(1, abs=1e-4)


def test_macro_f1_equals_that_of_scikit_learn():
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(0)
    labels, predicted = draw.integers(0, 4, (2, 200))
    ours = macro_f1(torch.tensor(predicted), torch.tensor(labels), 5)
    assert ours == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_head_is_retrained_for_balanced_cells(monkeypatch):
    """A head that reads the wrong feature learns the right one from balanced samples."""
    monkeypatch.setattr(two_stage, "REFITS", 2)
    monkeypatch.setattr(two_stage, "STRENGTHS", (0.01,))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, batch):
            return self.head(batch["inputs"])

    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (400,), generator=draw)
    agrees = torch.rand(400, generator=draw) < 0.9
    attribute = torch.where(agrees, labels, 1 - labels)
    features = torch.stack([labels + 0.4 * torch.randn(400, generator=draw), 9.0 * attribute], dim=1)
    samples, net = Samples({"inputs": features, "labels": labels, "group": 2 * labels + attribute}), Net()
    torch.manual_seed(0)
    two_stage.retrain_head(net, samples)
    right = predict(net, samples).argmax(dim=1) == labels
    assert min(right[samples.group == group].float().mean() for group in range(4)) > 0.75


def test_figures_have_a_standard_error():
    mean, error = mean_and_error([0.1, 0.2, 0.6])
    assert (mean, error) == pytest.approx((0.3, np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3)))
    assert math.isnan(mean_and_error([0.5])[1])


def test_effects_are_paired_by_seed():
    rows = [row("ours", 0, 0.9), row("ours", 1, 0.5), row(CONTROL, 1, 0.4), row(CONTROL, 0, 0.8), row("ours", 2, 0.0)]
    assert effect(rows, "ours", CONTROL, "worst") == pytest.approx((0.1, 0.0), abs=1e-9)
    assert effect(rows, "absent", CONTROL, "worst") is None


def test_table_shows_cost_against_plain_training():
    rows = [row("erm", 0, 0.5, seconds=2.0), row("ours", 0, 0.75, seconds=5.0)]
    line = table(rows, CONTROL).splitlines()[-1]
    assert line.startswith("| ours | 1 |")
    assert "| 0.750 |" in line
    assert "| 2.5 |" in line


def row(method, seed, worst, seconds=1.0):
    figures = {"accuracy": worst, "macro_f1": worst, "reliance": None, "attention_mass": 0.1}
    return {"work": "toy", "method": method, "seed": seed, "worst": worst, "seconds": seconds, **figures}


def test_budget_counts_the_last_batch():
    assert steps_of(dataclasses.replace(DECOY, epochs=3, batch_size=32), 65) == 9


def test_learning_rate_falls_to_zero_with_a_cosine():
    work = dataclasses.replace(DECOY, cosine=True)
    module = Classifier(work, nn.Linear(1, 1), nn.CrossEntropyLoss(), steps=40)
    made = module.configure_optimizers()
    rates = []
    for _ in range(40):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert max(rates) == pytest.approx(work.learning_rate)
    assert rates[-1] < 0.01 * work.learning_rate < rates[0]


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_has_a_reason_where_it_does_not_apply(name):
    bare = Samples({"inputs": torch.zeros(2, 3, dtype=torch.long), "labels": torch.zeros(2)})
    method = METHODS[name]
    assert bool(method.unfit(DECOY, bare)) == bool(method.needs or method.floating)


def test_absent_data_is_skipped_with_a_sentence(capsys, tmp_path, monkeypatch):
    absent = dataclasses.replace(DECOY, packages=("no-such-package==1.0",))
    monkeypatch.setattr(command, "find_work", lambda name: absent)
    assert command.main(["--work", "decoy-digits", "--methods", "erm", "--quick", "--out", str(tmp_path)]) == 0
    assert "its data comes with no-such-package==1.0" in capsys.readouterr().out


def test_a_run_is_taken_up_where_it_ended(capsys, tmp_path, monkeypatch):
    ran = []

    def train(work, method, seed, steps=None):
        ran.append((method.name, seed))
        return {**row(method.name, seed, 0.5), "work": work.name}

    monkeypatch.setattr(command, "train", train)
    arguments = ["--work", "decoy-digits", "--methods", "erm,focal", "--seeds", "2", "--out", str(tmp_path)]
    command.main(arguments)
    assert ran == [("erm", 0), ("focal", 0), ("erm", 1), ("focal", 1)]  # in turns
    written = json.loads((tmp_path / "debias.json").read_text())
    assert [set(each) >= {"work", "method", "seed", "accuracy", "worst", "seconds"} for each in written] == [True] * 4
    command.main([*arguments[:-4], "--seeds", "3", "--out", str(tmp_path)])
    assert ran[4:] == [("erm", 2), ("focal", 2)]
    assert "### decoy-digits" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["static-weights", "rrr", "mask-randomisation", "jtt", "ours-attention", "ours"])
def test_methods_train(name, decoys):
    small = decoys._replace(train=decoys.train.rows(slice(64)), monitor=decoys.monitor.rows(slice(40)))
    torch.manual_seed(0)
    module = find_method(name).run(DECOY, small, 2, 0)
    assert predict(module, small.monitor).isfinite().all()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="`--work` must name"):
        find_work("nothing")
    with pytest.raises(ValueError, match="`--methods` must name"):
        find_method("nothing")


def test_methods_are_told_by_what_they_need():
    method = Method("toy", lambda *_: nn.Identity(), needs=("group",))
    assert method.unfit(DECOY, DECOY.build(0).train) == "Skipped toy on decoy-digits: its data has no group."

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from torch.utils.data import default_collate

from attn_callbacks import AttentionPaths
from examples import vision, vision_data
from examples.vision import DigitClassifier, digit_share, look, mean_distance, share_table
from examples.vision_data import (
    CELL,
    GAP,
    PATCH,
    PIXEL,
    SIDE,
    TITLE,
    TOP,
    DigitsOnPhotos,
    Shown,
    area_of_patches,
    draw_page,
    made_up_digits,
    read_digits,
)


@pytest.fixture
def batch():
    held_out = DigitsOnPhotos(made_up_digits(6), seed=0)
    return default_collate([held_out[index] for index in range(6)])


def test_mask_is_the_digit_and_nothing_else():
    digits = made_up_digits(8)._replace(images=torch.zeros(8, 28, 28))
    plain, shown = (DigitsOnPhotos(each, seed=3) for each in (digits, made_up_digits(8)))
    for index in range(8):
        changed = (plain[index]["image"] != shown[index]["image"]).any(dim=0)
        sample = shown[index]
        assert torch.equal(sample["digit"] & changed, changed)
        assert (sample["image"][:, sample["digit"]] == 0.5).all()
        assert sample["digit"].sum() == 80


def test_tokens_of_the_digit_are_its_patches_and_not_the_class_token(batch):
    for digit, tokens in zip(batch["digit"].numpy(), batch["relevance"].numpy(), strict=True):
        expected = [False]
        for row in range(0, SIDE, PATCH):
            expected += [bool(digit[row : row + PATCH, left : left + PATCH].any()) for left in range(0, SIDE, PATCH)]
        assert tokens.tolist() == expected


def test_test_images_stay_and_training_images_change():
    digits = made_up_digits(4)
    fixed, fresh = DigitsOnPhotos(digits, seed=0), DigitsOnPhotos(digits)
    assert torch.equal(fixed[1]["image"], fixed[1]["image"])
    assert torch.equal(fixed[1]["image"], DigitsOnPhotos(digits, seed=0)[1]["image"])
    assert not torch.equal(fixed[1]["image"], DigitsOnPhotos(digits, seed=1)[1]["image"])
    assert not torch.equal(fresh[1]["image"], fresh[1]["image"])


def test_share_on_the_digit_counts_pixels_of_a_planted_map(batch):
    values = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    found = digit_share(values, area_of_patches(batch["digit"]))
    for sample in range(6):
        pixels = np.zeros((SIDE, SIDE))
        for row, column in np.ndindex(SIDE, SIDE):
            pixels[row, column] = max(0, values[sample, row // PATCH * 8 + column // PATCH].item())
        expected = pixels[batch["digit"][sample].numpy()].sum() / pixels.sum()
        assert found[sample].item() == pytest.approx(expected, rel=1e-5)


def test_uniform_map_has_the_share_of_the_area(batch):
    area = area_of_patches(batch["digit"])
    found = digit_share(torch.full_like(area, 0.2), area)
    assert torch.allclose(found, batch["digit"].float().mean(dim=(1, 2)))


def test_table_leaves_out_samples_without_a_positive_value(batch):
    area, right = area_of_patches(batch["digit"]), torch.tensor([True, True, True, False, False, False])
    nothing = torch.ones_like(area)
    nothing[0] = -1
    rows = share_table({"planted": torch.ones_like(area), "nothing": nothing}, area, right).splitlines()
    assert rows[2] == f"| planted | 7.8% | 1.00 | 7.8% | 7.8% | {rows[2].split(' | ')[-1]}"
    assert "nan" not in rows[3].split(" | ")[1:5]


def test_distance_is_counted_in_patches_on_the_grid():
    weights = torch.rand(2, 3, 65, 65, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    found = mean_distance(weights)
    for sample, head in np.ndindex(2, 3):
        lengths = []
        for query in range(64):
            row = weights[sample, head, query + 1, 1:].numpy()
            away = [np.hypot(query // 8 - key // 8, query % 8 - key % 8) for key in range(64)]
            lengths.append((row * away).sum() / row.sum())
        assert found[sample, head].item() == pytest.approx(np.mean(lengths), rel=1e-4)


def test_looks_are_those_of_the_stock_layers(batch):
    torch.manual_seed(0)
    module = DigitClassifier().eval()
    found = look(module, batch)
    tokens = module.patches(batch["image"]).flatten(2).transpose(1, 2)
    tokens = torch.nn.functional.pad(tokens, (0, 0, 1, 0)) + module.positions
    layer = module.encoder.layers[0]
    normed = layer.norm1(tokens)
    weights = layer.self_attn(normed, normed, normed, average_attn_weights=False)[1]
    assert torch.allclose(found.heads[:, 0], weights[:, :, 0, 1:], atol=1e-5)
    assert torch.equal(found.right, found.predicted == batch["labels"])
    assert found.values["relevance"].shape == (6, 64)


def test_page_shows_values_on_the_right_patch():
    picture, digit = torch.full((3, SIDE, SIDE), -0.5), torch.zeros(SIDE, SIDE, dtype=torch.bool)
    heads, values = torch.zeros(2, 3, 64), torch.zeros(64)
    values[2 * 8 + 5] = 1  # row 2, column 5
    heads[1, 2, 3 * 8 + 1] = vision_data.STRONGEST
    page = draw_page([[Shown("a sample", picture, digit, heads, {"planted": values})]], "a page").rgb().astype(int)
    panel, cell = SIDE * PIXEL + GAP, 8 * CELL + GAP
    top, left, size = TOP + TITLE, 12 + panel, PATCH * PIXEL
    light = page[top : top + SIDE * PIXEL, left : left + SIDE * PIXEL].sum(axis=-1)
    assert _brightest(light, size) == (2, 5)
    top, left = top + cell, left + panel + 2 * cell
    light = page[top : top + 8 * CELL, left : left + 8 * CELL].sum(axis=-1)
    assert _brightest(light, CELL) == (3, 1)


def test_outline_lies_on_the_digit():
    digit = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    digit[4:9, 20:24] = True
    rim = vision_data._outline(digit)
    assert not rim[~digit.numpy().repeat(PIXEL, 0).repeat(PIXEL, 1)].any()
    rows, columns = np.nonzero(rim)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 44, 100, 119)


def test_small_digits_stand_in_for_missing_ones(monkeypatch):
    def absent(name):
        raise vision_data.PackageNotFoundError(name)

    monkeypatch.setattr(vision_data, "distribution", absent)
    digits = read_digits.__wrapped__()
    assert digits.source == "scikit-learn's digits"
    assert digits.images.shape == (1797, 28, 28)
    assert digits.images.amax() <= 1
    assert digits.images[0].amax() > 0.9


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vision, "RUNS", tmp_path)
    monkeypatch.setattr(vision, "MASKED", 4)
    kept = []
    monkeypatch.setattr(vision, "look", lambda module, batch: kept.append((module, look(module, batch))) or kept[0][1])
    vision.main(["--data", "made-up", "--epochs", "1", "--test", "12"])
    printed = capsys.readouterr().out
    for part in ("Accuracy", "| rollout |", "| masking, 4 images |", "| 2.3 |", "Wrong against right answers"):
        assert part in printed
    assert (tmp_path / "heads.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "digits").glob("events*"))
    module, looks = kept[0]
    paths = next(each for each in module.trainer.callbacks if isinstance(each, AttentionPaths)).result
    for sample in paths.samples:  # what the callback found in training is what the functions find afterwards
        assert sample.target == looks.predicted[sample.number]
        assert torch.allclose(sample.values[1:], looks.values["relevance"][sample.number], atol=1e-4)


@pytest.mark.slow
def test_digit_is_looked_at_and_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vision, "RUNS", tmp_path)
    vision.main([])
    printed = capsys.readouterr().out
    accuracy = float(printed.split("Accuracy ")[1].split("%")[0])
    assert accuracy > 60
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines()]
    lift = {row[0]: float(row[2]) for row in cells if row[0] in ("relevance", "rollout")}
    assert lift["relevance"] > 2
    assert lift["rollout"] > 2
    assert (tmp_path / "heads.png").stat().st_size < 400_000


def _brightest(light, size):
    rows, columns = (side // size for side in light.shape)
    blocks = light.reshape(rows, size, columns, size).mean(axis=(1, 3))
    return tuple(int(place) for place in np.unravel_index(blocks.argmax(), blocks.shape))

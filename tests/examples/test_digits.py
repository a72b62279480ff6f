from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from examples import digits
from examples.digits import DecoyDigits


def test_telling_decoy_gives_the_digit_away():
    data = DecoyDigits(0, 50, honest=False)
    for image, label, spurious in zip(data.images[:, 0], data.labels, data.spurious, strict=True):
        patches = image.unfold(0, 2, 2).unfold(1, 2, 2).flatten(0, 1).flatten(1)  # (patches, pixels)
        assert torch.allclose(patches[spurious[1:]], 1 - 0.1 * label.float())


def test_honest_decoy_is_another_one_and_digits_stay():
    telling, honest = DecoyDigits(0, 200, honest=False), DecoyDigits(0, 200, honest=True)
    assert torch.equal(telling.images[:, :, 2:10, 2:10], honest.images[:, :, 2:10, 2:10])
    assert not torch.equal(telling.images, honest.images)


def test_one_patch_is_marked_and_never_the_class_token():
    spurious = DecoyDigits(0, 50, honest=False).spurious
    assert spurious.shape == (50, 37)
    assert (spurious.sum(dim=1) == 1).all()
    assert not spurious[:, 0].any()


def test_demo_runs_and_writes_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, "EPOCHS", 1)
    monkeypatch.setattr(digits, "RUNS", tmp_path)
    digits.main()
    assert "Test accuracy where the decoy says nothing" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists()
    assert list((tmp_path / "suite").glob("seed_0/events*"))

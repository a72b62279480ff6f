from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from examples import losses_alone
from examples.unfair_digits import coloured, decoyed, long_tail, read_digits


def test_the_tail_is_long_and_its_test_has_other_images():
    digits = read_digits()
    data, test, counts = long_tail(digits, seed=0)
    assert (min(counts), max(counts), len(counts)) == (4, 100, 10)
    assert torch.bincount(data.target).tolist() == counts
    assert len(data.target) + len(test.target) <= len(digits.target)


def test_the_colour_tells_in_the_given_share():
    data = coloured(read_digits(), 0.97, seed=0)
    colour = data.images.flatten(2).sum(dim=2).argmax(dim=1)
    assert 0.95 < (colour == data.target).float().mean() < 0.99
    assert torch.equal(data.group, 2 * data.target + colour)


def test_the_decoy_tells_only_where_it_is_not_honest():
    digits = read_digits().rows(slice(0, 300))
    for honest in (False, True):
        data = decoyed(digits, honest, seed=0)
        assert data.mask.flatten(1).sum(dim=1).eq(4).all()
        brightness = data.images[data.mask].reshape(-1, 4)
        telling = torch.isclose(brightness, 1 - 0.1 * digits.target[:, None].float()).all(dim=1)
        assert telling.all() if not honest else telling.float().mean() < 0.2
        assert torch.equal(data.images[:, :, 2:10, 2:10], digits.images)


@pytest.mark.slow
def test_each_loss_beats_plain_cross_entropy_where_it_fails(capsys):
    for worst in losses_alone.main().values():
        plain, *others = worst.values()
        assert min(others) > plain
        assert max(value for name, value in worst.items() if "control" not in name) > plain + 0.05
    assert "LogitAdjustedLoss" in capsys.readouterr().out

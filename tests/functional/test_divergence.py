"""Jensen-Shannon distance against scipy, and where rounding or zeros could spoil it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attn_callbacks.functional.divergence import jensen_shannon, pairwise_jensen_shannon

distance = pytest.importorskip("scipy.spatial.distance")


def distributions(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights that do not sum to one, a third of them zero."""
    generator = np.random.default_rng(seed)
    return generator.gamma(0.5, size=shape) * (generator.random(shape) > 1 / 3) + np.eye(*shape[-2:]) * 1e-3


def test_distance_matches_scipy_with_zeros_and_any_scale():
    p, q = distributions(4, 5, 9), distributions(4, 5, 9, seed=1)
    result = jensen_shannon(torch.tensor(p), torch.tensor(q))
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result, distance.jensenshannon(p, q, base=2, axis=-1), rtol=1e-12)


def test_distance_broadcasts_and_works_in_float64_on_single_precision():
    p, q = (torch.tensor(distributions(3, 6, seed=seed)).float() for seed in (2, 3))
    result = jensen_shannon(p[:, None], q)
    assert (result.shape, result.dtype) == ((3, 3), torch.float64)
    expected = distance.jensenshannon(p[1].double().numpy(), q[2].double().numpy(), base=2)
    assert result[1, 2].item() == pytest.approx(expected, rel=1e-12)


def test_ends_of_the_range_are_exact():
    p = torch.tensor([[0.0, 0.25, 0.75, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert jensen_shannon(p, p).tolist() == [0.0, 0.0]
    assert jensen_shannon(p[0], p[1]).item() == 1.0
    assert jensen_shannon(p, 3 * p).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9])
def test_small_distances_keep_their_digits(step):
    """To first order the divergence is ``sum (p - q) ** 2 / p / 8``, which a sum of logarithms loses below 1e-8."""
    p = torch.tensor([0.43, 0.31, 0.26], dtype=torch.float64)
    q = p + step * torch.tensor([0.7, -0.4, -0.3], dtype=torch.float64)
    expected = (((p - q) ** 2 / p).sum() / (8 * np.log(2))).sqrt()
    assert jensen_shannon(p, q).item() == pytest.approx(expected.item(), rel=3 * step + 1e-6)


def test_nothing_and_nan_have_no_distance():
    p = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [0.5, 0.5]])
    assert jensen_shannon(p, torch.tensor([0.5, 0.5])).isnan().tolist() == [True, True, False]


def test_pairs_match_scipy_and_are_symmetric():
    rows = distributions(5, 7)
    rows[3] = 0.0
    result = pairwise_jensen_shannon(torch.tensor(rows))
    for i in range(5):
        for j in range(5):
            if 3 in (i, j):
                assert result[i, j].isnan()
            else:
                expected = distance.jensenshannon(rows[i], rows[j], base=2)
                assert result[i, j].item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(result.nan_to_num(2.0), result.mT.nan_to_num(2.0))
    assert pairwise_jensen_shannon(torch.zeros(0, 4)).shape == (0, 0)


def test_wrong_shapes_raise():
    with pytest.raises(ValueError, match=r"`p` and `q` must have as many bins .* got shapes \(2, 3\) and \(4,\)"):
        jensen_shannon(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match="`distributions` must have 2 axes"):
        pairwise_jensen_shannon(torch.ones(2))

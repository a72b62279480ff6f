"""Project gradients so that they conflict with no task, by scipy: torchjd would take a solver under the GPL."""

from __future__ import annotations

import torch
from scipy.optimize import nnls
from torch import Tensor

__all__ = ["project_weights"]

_RIDGE = 1e-6  # what float32 leaves of a Gramian may be singular, or worse


def project_weights(weights: Tensor, gramian: Tensor) -> Tensor:
    r"""Return, for each row ``u``, the smallest combination of gradients with weights of at least ``u``.

    .. math::
        \operatorname{argmin}_{v \ge u} v^\top G v

    Then :math:`J^\top v` is the projection of :math:`J^\top u` onto the vectors that have no negative inner product
    with any row of :math:`J`, where :math:`G = J J^\top`. Computed on the CPU in float64, so it waits for the device.
    A Gramian that is not finite, as loss scaling provokes, gives weights of NaN.

    Shape:
        - weights: ``(rows, tasks)``
        - gramian: ``(tasks, tasks)``
        - output: ``(rows, tasks)``
    """
    exact = gramian.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(exact).all()):
        return torch.full_like(weights, torch.nan)
    norms = exact.diagonal().clamp(min=0).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)  # rows of any length are alike to the solver
    values, vectors = torch.linalg.eigh(exact / (norms * norms[:, None]))
    root = (values.clamp(min=0) + _RIDGE).sqrt()[:, None] * vectors.T  # root' root is the matrix of cosines
    lowest = weights.detach().to("cpu", torch.float64) * norms
    additions = [torch.from_numpy(nnls(root.numpy(), -(root @ row).numpy())[0]) for row in lowest]
    return ((lowest + torch.stack(additions)) / norms).to(weights)

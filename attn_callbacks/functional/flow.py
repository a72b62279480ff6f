"""Attention flow: how much may pass from an input token to a token of the last layer, every layer a set of pipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attn_callbacks._checks import in_range
from attn_callbacks.functional._mixing import checked_maps, residual_mix, target_rows

__all__ = ["attention_flow"]

_UNIT = 2**30
"""Of an integer capacity; the largest flow, out of a row that sums to one, then still fits into 32 bits."""


def attention_flow(
    weights: Sequence[Tensor],
    *,
    valid: Tensor | None = None,
    targets: Tensor | Sequence[int] | None = None,
    residual: float = 0.5,
) -> Tensor:
    r"""Measure the maximum flow from every target token of the last layer to every input token.

    A graph of layers: token ``i`` of a layer is joined to token ``j`` of the one below by a pipe of the capacity
    :math:`\bar A_l[i, j]` that `attention_rollout` multiplies. Unlike a product, a flow uses a pipe once, so what
    passes is never more than the narrowest place on the way. With one layer it is the capacity itself. Rows do not sum
    to one.

    For small inputs: one maximum-flow problem for every target and source, on ``layers * tokens`` nodes and
    ``layers * tokens ** 2`` pipes, on the CPU. Ask for few ``targets``.

    The solver takes whole numbers: capacities are rounded to multiples of ``2 ** -30``, and a flow is off by at most
    ``2 ** -31`` for every pipe of a cut (in practice below 1e-7).

    Args:
        weights: Attention of every layer, first layer first.
        valid: ``True`` for tokens, ``False`` for padding, which then neither gives nor receives; ``None``: all.
        targets: Queries whose rows are wanted; ``None``: all.
        residual: Share of the residual connection.

    Shape:
        - weights: ``(batch, heads, tokens, tokens)`` a layer
        - valid: ``(batch, tokens)``
        - targets: ``(targets,)``, or ``(batch, targets)``
        - output: ``(batch, targets or tokens, tokens)``, float64 in [0, 1], on the CPU

    Raises:
        ValueError: As `attention_rollout`, and if attention between valid tokens is not finite.
        ImportError: If scipy is not installed.

    Example:
        >>> layer = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
        >>> attention_flow([layer, layer])
        tensor([[[1.0000, 0.0000],
                 [0.2500, 0.8750]]], dtype=torch.float64)

    References:
        Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020, section 3.
    """
    batch, tokens = checked_maps(weights, valid)
    in_range("residual", residual, 0.0, 1.0)
    rows = target_rows(range(tokens) if targets is None else targets, batch, tokens, torch.device("cpu"))
    layers = [_pipes(maps, valid, residual, number) for number, maps in enumerate(weights)]
    real = torch.ones(batch, tokens, dtype=torch.bool) if valid is None else valid.cpu().bool()
    flows = torch.zeros(batch, rows.shape[1], tokens, dtype=torch.float64)
    for sample in range(batch):
        graph = _graph([mixed[sample] for mixed in layers])
        sources = real[sample].nonzero()[:, 0].tolist()
        for place, target in enumerate(rows[sample].tolist()):
            if real[sample, target]:
                flows[sample, place, sources] = _flows(graph, len(layers) * tokens + target, sources)
    return flows


def _pipes(maps: Tensor, valid: Tensor | None, residual: float, layer: int) -> Tensor:
    """Return the capacities of a layer, ``(batch, tokens, tokens)``; whole numbers would turn NaN into no pipe."""
    mixed = residual_mix(maps.cpu().double(), valid if valid is None else valid.cpu(), residual)
    if not mixed.isfinite().all():
        raise ValueError(
            f"`weights[{layer}]` must be finite between valid tokens. Give `valid` where there is padding."
        )
    return mixed


def _graph(layers: list[Tensor]) -> Any:
    """Return the pipes as a sparse matrix; node ``l * tokens + i`` is token ``i`` above layer ``l``, 0 the inputs."""
    sparse, _ = _scipy()
    tokens = layers[0].shape[-1]
    capacities = torch.stack(layers).mul(_UNIT).round().int()  # (layers, tokens, tokens)
    layer, query, key = capacities.nonzero().unbind(dim=1)
    above, below = (layer + 1) * tokens + query, layer * tokens + key
    nodes = (len(layers) + 1) * tokens
    values = capacities[layer, query, key].numpy()
    return sparse.csr_matrix((values, (above.int().numpy(), below.int().numpy())), shape=(nodes, nodes))


def _flows(graph: Any, target: int, sources: list[int]) -> Tensor:
    _, maximum_flow = _scipy()
    flows = [int(maximum_flow(graph, target, source).flow_value) for source in sources]
    return torch.tensor(flows, dtype=torch.float64) / _UNIT


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import sparse
        from scipy.sparse.csgraph import maximum_flow
    except ImportError:
        raise ImportError("`attention_flow` needs scipy. Install it with `attn-callbacks[analysis]`.") from None
    return sparse, maximum_flow

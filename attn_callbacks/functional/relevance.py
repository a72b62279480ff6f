"""Relevance of tokens for one output, from attention and its gradients, through self- and cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import check_axes
from attn_callbacks.functional._mixing import checked_maps, masked, positive_means
from attn_callbacks.functional._precision import full_precision

__all__ = ["EncoderDecoderRelevance", "attention_relevance", "cross_relevance", "encoder_decoder_relevance"]

Maps = Sequence[Tensor]


class EncoderDecoderRelevance(NamedTuple):
    """What `encoder_decoder_relevance` computes.

    Args:
        encoder: Of source tokens for source tokens, ``(batch, source, source)``.
        decoder: Of target tokens for target tokens, ``(batch, target, target)``.
        cross: Of source tokens for target tokens, ``(batch, target, source)``.
    """

    encoder: Tensor
    decoder: Tensor
    cross: Tensor


def attention_relevance(weights: Maps, gradients: Maps, *, valid: Tensor | None = None) -> Tensor:
    r"""Add up, layer by layer, how tokens matter to each other for one output.

    .. math:: \bar A_l = \operatorname{mean}_h (A_l \odot \partial y / \partial A_l)^+, \qquad
        R \leftarrow R + \bar A_l R, \quad R_0 = I

    Read the row of the token that the output is read from (a class token); its own entry begins at one. Costs what
    `attention_rollout` costs, beside one backward for the gradients
    (:func:`attn_callbacks.analysis.attention_gradients`).

    Args:
        weights: Attention of every layer, first layer first. Heads may differ in number between layers.
        gradients: Gradient of the output (a class' logit) with respect to each layer's weights, in the same order.
        valid: ``True`` for tokens, ``False`` for padding, which then neither gives nor receives; ``None``: all.

    Shape:
        - weights, gradients: ``(batch, heads, tokens, tokens)`` a layer
        - valid: ``(batch, tokens)``
        - output: ``(batch, tokens, tokens)``, float32 or wider, at least zero; rows of padding are zero

    Raises:
        ValueError: If maps are not square, layers have other samples or tokens, or a shape does not fit.
        TypeError: If ``weights`` or ``gradients`` is one tensor.

    Example:
        >>> layer, gradient = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]]), torch.tensor([[[[1.0, -1.0], [2.0, 0.0]]]])
        >>> attention_relevance([layer], [gradient])
        tensor([[[1.5000, 0.0000],
                 [0.5000, 1.0000]]])

    References:
        Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
        Transformers", 2021, equations 5 and 6.
    """
    checked_maps(weights, valid)
    with full_precision(weights[0].device):
        return masked(_self(positive_means(weights, gradients), valid), valid)


def cross_relevance(
    weights: Tensor, gradients: Tensor, queries: Tensor, keys: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    r"""Compute what one layer of cross-attention adds to the relevance of its keys for its queries.

    .. math:: \operatorname{norm}(R_{qq})^\top \bar A \operatorname{norm}(R_{kk})

    where norm scales the rows of :math:`R - I` to one, leaves empty ones empty, and adds :math:`I` again. The transpose
    is that of the publication: below a causal mask it lets earlier queries receive from later ones, so read the last.
    A network of two streams adds ``Abar @ R_kq`` to ``R_qq`` as well (equation 11), which is one product of
    the mean over heads of `gradient_weights`.

    Args:
        weights: Cross-attention of one layer.
        gradients: Gradient of the output with respect to ``weights``.
        queries: Relevance of query tokens for query tokens so far.
        keys: Relevance of key tokens for key tokens so far.
        valid: ``True`` where a key is a token and not padding; ``None``: all.

    Shape:
        - weights, gradients: ``(batch, heads, queries, keys)``
        - queries: ``(batch, queries, queries)``
        - keys: ``(batch, keys, keys)``
        - valid: ``(batch, keys)``
        - output: ``(batch, queries, keys)``, to be added to what earlier layers gave

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> weights, gradients = torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[[[1.0, -1.0]]]])
        >>> cross_relevance(weights, gradients, torch.eye(1)[None], torch.tensor([[[1.0, 3.0], [0.0, 1.0]]]))
        tensor([[[0.5000, 0.5000]]])

    References:
        Chefer, Gur and Wolf, 2021, equations 8 to 11.
    """
    return _cross(weights, gradients, queries, keys, None, valid)


def encoder_decoder_relevance(
    encoder: tuple[Maps, Maps],
    decoder: tuple[Maps, Maps],
    cross: tuple[Maps, Maps],
    *,
    source_valid: Tensor | None = None,
    target_valid: Tensor | None = None,
) -> EncoderDecoderRelevance:
    r"""Add up relevance through an encoder and, block by block, the self- and cross-attention of a decoder.

    The encoder as in `attention_relevance`. Then in every block of the decoder first self-attention,
    :math:`R_{tt} \mathrel{+}= \bar A R_{tt}` and :math:`R_{ts} \mathrel{+}= \bar A R_{ts}`, then cross-attention, which
    adds `cross_relevance` to :math:`R_{ts}`.

    Args:
        encoder: Weights and gradients of the encoder's layers, first layer first.
        decoder: Those of the decoder's self-attention.
        cross: Those of the decoder's cross-attention, one a layer.
        source_valid: ``True`` where a source token is no padding; ``None``: all.
        target_valid: The same of target tokens.

    Shape:
        - encoder: ``(batch, heads, source, source)`` a layer
        - decoder: ``(batch, heads, target, target)`` a layer
        - cross: ``(batch, heads, target, source)`` a layer
        - source_valid: ``(batch, source)``
        - target_valid: ``(batch, target)``

    Raises:
        ValueError: If a shape or a number of layers does not fit.

    Example:
        >>> weights, gradients = [torch.full((1, 1, 2, 2), 0.5)], [torch.ones(1, 1, 2, 2)]
        >>> last = ([torch.full((1, 1, 2, 2), 0.5)], [torch.tensor([[[[0.0, 0.0], [0.0, 2.0]]]])])
        >>> encoder_decoder_relevance((weights, gradients), (weights, gradients), last).cross
        tensor([[[0.2500, 0.7500],
                 [0.7500, 2.2500]]])

    References:
        Chefer, Gur and Wolf, 2021, section 3.
    """
    checked_maps(encoder[0], source_valid, "encoder")
    batch, tokens = checked_maps(decoder[0], target_valid, "decoder")
    if len(decoder[0]) != len(cross[0]):
        raise ValueError(f"`cross` must hold one layer a decoder layer ({len(decoder[0])}), got {len(cross[0])}.")
    with full_precision(decoder[0][0].device):
        source = _self(positive_means(*encoder), source_valid)
        own = [masked(mean, target_valid) for mean in positive_means(*decoder)]
        target = _identity(own[0])
        between = own[0].new_zeros(batch, tokens, source.shape[-1])
        for mean, maps, slopes in zip(own, *cross, strict=True):
            target, between = target + mean @ target, between + mean @ between
            between = between + _cross(maps, slopes, target, source, target_valid, source_valid)
    if source_valid is not None:
        between = between.where(source_valid.to(between.device, torch.bool)[:, None], 0.0)
    return EncoderDecoderRelevance(masked(source, source_valid), masked(target, target_valid), between)


def _cross(
    weights: Tensor,
    gradients: Tensor,
    queries: Tensor,
    keys: Tensor,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
) -> Tensor:
    """Do what `cross_relevance` does; queries that are padding receive nothing."""
    check_axes("weights", weights, 4)
    batch, _, rows, columns = weights.shape
    wanted = {"queries": (queries, (batch, rows, rows)), "keys": (keys, (batch, columns, columns))}
    for name, (relevance, shape) in wanted.items():
        if tuple(relevance.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(relevance.shape)}.")
    if key_valid is not None and tuple(key_valid.shape) != (batch, columns):
        raise ValueError(f"`valid` must have shape (batch, keys) = {(batch, columns)}, got {tuple(key_valid.shape)}.")
    mean = positive_means([weights], [gradients])[0]
    for valid, axis in ((query_valid, 2), (key_valid, 1)):
        if valid is not None:
            mean = mean.where(valid.to(mean.device, torch.bool).unsqueeze(axis), 0.0)
    with full_precision(mean.device):
        return _normalised(queries.to(mean)).mT @ mean @ _normalised(masked(keys.to(mean), key_valid))


def _self(means: list[Tensor], valid: Tensor | None) -> Tensor:
    """Run through self-attention; padding keeps to itself."""
    relevance = _identity(means[0])
    for mean in means:
        relevance = relevance + masked(mean, valid) @ relevance
    return relevance


def _identity(mean: Tensor) -> Tensor:
    return torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device).expand_as(mean)


def _normalised(relevance: Tensor) -> Tensor:
    """Scale the rows of ``R - I`` to one; where nothing was added yet, nothing is divided."""
    identity = _identity(relevance)
    added = (relevance - identity).clamp_min(0.0)
    total = added.sum(dim=-1, keepdim=True)
    return added / total.where(total > 0, 1.0) + identity

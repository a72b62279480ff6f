"""From sums over tokens to those tied to the error, with classes compared within themselves."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attn_callbacks._checks import at_least
from attn_callbacks.metrics.association import TokenSums

__all__ = ["Associations", "associations"]

_LEAST_VARIANCE = 1e-14  # attention in single precision differs by as much between equal samples


class Associations(NamedTuple):
    """How each token is tied to the error; every field is ``(tokens,)`` unless it says otherwise, and float64.

    Args:
        wrong: Typical attention on an occurrence of the token in samples that are predicted wrong, relative to uniform
            attention: 1 is chance.
        right: The same in samples of the same classes that are predicted right.
        lift: ``wrong / right``.
        z: Standard score of the difference between the two; positive where errors go with more attention.
        p_value: Two-sided probability of such a score by chance, for one token; correct it for the number of tokens.
        odds_ratio: Odds of an error with the token present over those without it, in samples of the same class.
        presence_z: Standard score of the number of errors with the token present; positive where errors go with it.
        presence_p_value: Two-sided probability of such a score by chance, for one token.
        support: Number of wrong and of right samples that hold the token, ``(tokens, 2)``, int64.
        wrong_mean: Mean of :func:`~attn_callbacks.metrics.association.token_attention`, from 0 to 1 with one half for
            chance, in samples that are predicted wrong: what is compared.
        right_mean: The same in samples of the same classes that are predicted right.
        mean_error: Standard error of ``wrong_mean - right_mean``, which over it is ``z``.
        wrong_presence: Share of the wrong predictions that hold the token, had they the classes that the test weighs.
        right_presence: The same of right predictions; the difference is the risk difference of Mantel and Haenszel.
        presence_error: Standard error of ``wrong_presence - right_presence``, which over it is ``presence_z``.
    """

    wrong: Tensor
    right: Tensor
    lift: Tensor
    z: Tensor
    p_value: Tensor
    odds_ratio: Tensor
    presence_z: Tensor
    presence_p_value: Tensor
    support: Tensor
    wrong_mean: Tensor
    right_mean: Tensor
    mean_error: Tensor
    wrong_presence: Tensor
    right_presence: Tensor
    presence_error: Tensor


class _Compared(NamedTuple):
    """Two figures, of wrong and of right predictions, and how sure their difference is; ``(tokens,)`` each."""

    wrong: Tensor
    right: Tensor
    error: Tensor
    z: Tensor

    def where(self, known: Tensor) -> _Compared:
        return _Compared(*(field.where(known, torch.nan) for field in self))


def associations(state: TokenSums, min_support: int = 10) -> Associations:
    r"""Compare wrong with right predictions, token by token, within the classes.

    Attention: means of :func:`~attn_callbacks.metrics.association.token_attention` are compared class by class and
    averaged with weights ``n_wrong n_right / (n_wrong + n_right)``; the variance of each outcome is that about the
    means of the classes. With one class it is Welch's test. Its t is turned into the standard score of equal
    probability. Means are shown as ``mean / (1 - mean)``, which brings them back to multiples of chance.

    Presence: the Cochran-Mantel-Haenszel test of the error against presence, given the totals of each class, with its
    continuity correction and a correction for skewness: with few expected errors the plain score would be far too sure
    of itself, and thousands of tokens are looked at. The shares of wrong and right predictions that hold the token are
    averaged over classes with the same weights as the means, so that their difference has the sign of the score: over
    all classes at once it may have the other.

    A token that is only found by its presence may simply be hard to read; one that is found by attention as well is
    where the model looks when it errs. Neither says that the model relies on it: randomise it and measure.

    Args:
        state: What `TokenAssociation` computed.
        min_support: Least wrong and least right samples that hold a token, to compare its attention; least samples with
            and without it, to compare errors. At least 2; below, figures are NaN.

    Raises:
        ValueError: If ``min_support`` is below 2.

    Example:
        >>> held = torch.tensor([[[[40.0, 32.0, 25.9]], [[40.0, 20.0, 10.3]]]])  # one class, one token
        >>> found = associations(TokenSums(held.double(), torch.tensor([[50, 150]])))
        >>> found.wrong.item(), found.right.item(), found.z.item()
        (4.0..., 1.0, 10.3...)
        >>> found.odds_ratio.item(), found.presence_z.item()
        (11.0, 6.2...)

    References:
        Welch, "The generalization of 'Student's' problem when several different population variances are involved",
        1947. Wallace, "Bounds on normal approximations to Student's and the chi-square distributions", 1959. Mantel and
        Haenszel, "Statistical aspects of the analysis of data from retrospective studies of disease", 1959. Wilson and
        Hilferty, "The distribution of chi-square", 1931.
    """
    at_least("min_support", min_support, 2)
    counts = state.sums[..., 0]  # (strata, 2, tokens)
    support = counts.sum(dim=0)
    attention = _compare_attention(*state.sums.unbind(dim=-1)).where((support >= min_support).all(dim=0))
    held = support.sum(dim=0)
    known = (held >= min_support) & (state.samples.sum() - held >= min_support)
    presence = _compare_presence(counts, state.samples.double()).where(known)
    odds = _odds_ratio(counts, state.samples.double()).where(known, torch.nan)
    wrong, right = (mean / (1 - mean) for mean in attention[:2])
    return Associations(
        *(wrong, right, wrong / right, attention.z, _two_sided(attention.z)),
        *(odds, presence.z, _two_sided(presence.z), support.mT.long()),
        *(*attention[:3], *presence[:3]),
    )


def _compare_attention(count: Tensor, first: Tensor, second: Tensor) -> _Compared:
    """Compare the means of wrong and right over strata weighted alike; all arguments are ``(strata, 2, tokens)``."""
    mean = first / count.clamp_min(1.0)
    both = (count > 0).all(dim=1, keepdim=True)
    weight = (count.prod(dim=1) / count.sum(dim=1).clamp_min(1.0))[:, None]
    weight = weight / weight.sum(dim=0)
    means = (weight * mean).sum(dim=0)
    freedom = (count - 1).clamp_min(0.0).where(both, 0.0).sum(dim=0)  # (2, tokens)
    about = (second - count * mean**2).clamp_min(0.0).where(both, 0.0).sum(dim=0)
    variance = (about / freedom).clamp_min(_LEAST_VARIANCE)
    parts = variance * (weight**2 / count.clamp_min(1.0)).sum(dim=0)
    squared = parts.sum(dim=0)
    z = _score_of_t((means[0] - means[1]) / squared.sqrt(), squared**2 / (parts**2 / freedom).sum(dim=0))
    return _Compared(means[0], means[1], _error_of(means[0] - means[1], z, squared.sqrt()), z)


def _score_of_t(t: Tensor, freedom: Tensor) -> Tensor:
    """Return the standard score as improbable as a Student's t."""
    size = (freedom * (t**2 / freedom).log1p()).sqrt()
    return t.sign() * (8 * freedom + 1) / (8 * freedom + 3) * size


def _odds_ratio(count: Tensor, samples: Tensor) -> Tensor:
    """Return the common odds ratio of an error, ``(tokens,)``; arguments as below."""
    absent, size = samples[..., None] - count, samples.sum(dim=1, keepdim=True).clamp_min(1.0)
    return (count[:, 0] * absent[:, 1] / size).sum(dim=0) / (count[:, 1] * absent[:, 0] / size).sum(dim=0)


def _compare_presence(count: Tensor, samples: Tensor) -> _Compared:
    """Compare the shares of wrong and right samples that hold the token, over strata weighted alike.

    ``count`` is ``(strata, 2, tokens)``, ``samples`` ``(strata, 2)``. Given its margins, a table is hypergeometric.
    """
    total = samples.sum(dim=1, keepdim=True)  # (strata, 1)
    present, errors = count.sum(dim=1), samples[:, :1]
    size = total.clamp_min(1.0)
    weight = samples.prod(dim=1) / size[:, 0]
    shares = torch.einsum("s,sot->ot", weight / weight.sum(), count / samples.clamp_min(1.0)[..., None])
    excess = (count[:, 0] - present * errors / size).sum(dim=0)
    spread = present * errors * (total - present) * (total - errors) / (size**2 * (total - 1).clamp_min(1.0))
    skew = spread * (total - 2 * errors) * (total - 2 * present) / (size * (total - 2).clamp_min(1.0))
    deviation = spread.sum(dim=0).sqrt()
    excess = excess.sign() * (excess.abs() - 0.5).clamp_min(0.0)
    z = _score_of_skewed(excess / deviation, skew.sum(dim=0) / deviation**3)
    return _Compared(shares[0], shares[1], _error_of(shares[0] - shares[1], z, deviation / weight.sum()), z)


def _error_of(difference: Tensor, z: Tensor, plain: Tensor) -> Tensor:
    """Return the standard error of which the difference is ``z``; the plain one where both are about zero."""
    fitting = difference / z
    return fitting.where(fitting > 0, plain)


def _score_of_skewed(x: Tensor, skewness: Tensor) -> Tensor:
    """Return the standard score as improbable as ``x`` under a gamma distribution of this skewness, variance 1."""
    slope = skewness.where(skewness.abs() > 1e-6, 1e-6) / 2
    return 3 / slope * ((slope * x + 1).clamp_min(0.0) ** (1 / 3) - 1) + slope / 3


def _two_sided(z: Tensor) -> Tensor:
    return torch.erfc(z.abs() / math.sqrt(2))

"""Which tokens or patches matter: what attention says, and what happens when they are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attn_callbacks._checks import at_least, one_of
from attn_callbacks._plain import plain
from attn_callbacks.analysis._attention_scores import attention_scores
from attn_callbacks.analysis._batches import outside_inference
from attn_callbacks.analysis._erasure import Eraser, Logits
from attn_callbacks.analysis._features import (
    CONTROL,
    check_masking,
    checked_rankings,
    checked_shares,
    checked_target,
    maskable,
)
from attn_callbacks.analysis._quiet import undisturbed
from attn_callbacks.capture.selection import checked_layers, checked_model
from attn_callbacks.functional.feature_importance import top_features

__all__ = ["FeatureImportance", "feature_importance"]


@dataclass(frozen=True, eq=False)
class FeatureImportance:
    """What `feature_importance` found; tensors are on the CPU.

    Args:
        scores: Of each method, and of `rankings`, ``(samples, features)``; NaN where a place is no feature.
        target: Class that was explained, ``(samples,)``.
        probability: Its probability for the inputs as they are, ``(samples,)``. float64.
        measure: What ``masking`` is the change of.
        shares: Shares of the features that were masked, or kept, together.
        comprehensiveness: Of each method, and of features drawn at random, by how much the probability falls when the
            highest are masked, ``(samples, shares)``: high where they were needed.
        sufficiency: Likewise, when all but the highest are masked: low where they were enough.
        layer_names: Layers that the attention scores come from.
    """

    scores: dict[str, Tensor]
    target: Tensor
    probability: Tensor
    measure: str
    shares: tuple[float, ...]
    comprehensiveness: dict[str, Tensor]
    sufficiency: dict[str, Tensor]
    layer_names: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and strings; NaN becomes ``None``."""
        return {name: plain(value) for name, value in vars(self).items()}

    def summary(self) -> str:
        """Return comprehensiveness and sufficiency of every method as a table, with standard errors over samples.

        A sample whose value is not known is left out, and those that count are counted.
        """
        lines = ["| ranked by | comprehensiveness | sufficiency |", "|---|---:|---:|"]
        for name in self.comprehensiveness:
            cells = (_mean_and_error(part[name].mean(dim=1)) for part in (self.comprehensiveness, self.sufficiency))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def table(self, sample: int, labels: Sequence[str] | None = None, most: int = 10) -> str:
        """Return the features of a sample that masking says matter most, with their other scores, as a table.

        Args:
            sample: Number of the sample.
            labels: Text of each feature; ``None`` numbers them.
            most: Rows.

        Raises:
            ValueError: If there is no such sample or ``labels`` has another length.
        """
        samples, features = self.scores["masking"].shape
        if not 0 <= sample < samples:
            raise ValueError(f"`sample` must lie between 0 and {samples - 1}, got {sample}.")
        if labels is not None and len(labels) != features:
            raise ValueError(f"`labels` must hold one text per feature ({features}), got {len(labels)}.")
        own = {name: values[sample].tolist() for name, values in self.scores.items()}
        known = [place for place in range(features) if own["masking"][place] == own["masking"][place]]
        ranked = sorted(known, key=lambda place: -own["masking"][place])[: at_least("most", most, 1)]
        lines = [f"| feature | {' | '.join(own)} |", f"|---|{'---:|' * len(own)}"]
        for place in ranked:
            text = str(place) if labels is None else " ".join(labels[place].split()).replace("|", "\\|")
            lines.append(f"| {text} | {' | '.join(f'{values[place]:+.4f}' for values in own.values())} |")
        return "\n".join(lines)


def feature_importance(
    model: nn.Module,
    inputs: Tensor,
    logits: Logits,
    *,
    target: Tensor | None = None,
    valid: Tensor | None = None,
    features: Tensor | None = None,
    replacement: float | Tensor | None = None,
    grid: tuple[int, int] | None = None,
    query: int | None = None,
    layers: Sequence[str] | None = None,
    rankings: Mapping[str, Tensor] | None = None,
    measure: Literal["probability", "loss"] = "probability",
    shares: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.5),
    batch_size: int = 64,
    seed: int = 0,
) -> FeatureImportance:
    """Score every token or patch by attention, and check it by masking.

    Four scores: the attention that a feature receives (mean over layers, heads and queries), attention times gradient
    (sum over them), attention times the length of values, and the fall of the class' probability when the feature alone
    is masked. Each ranking is then put to the same test: mask the highest shares of the features together
    (comprehensiveness), or all others (sufficiency), and compare with features drawn at random. What attention ranks
    high and masking does not was looked at, and not used.

    Costs one forward and one backward, one forward a feature, and ``10 * len(shares)`` forwards; on a few samples,
    not in training. The model is put into evaluation and given back as it was.

    Args:
        model: The model.
        inputs: Token ids, embeddings, or pictures.
        logits: ``logits(model, inputs, valid)`` runs the model and returns ``(samples, classes)``.
        target: Class of each sample to explain; ``None``: the one that is predicted.
        valid: ``True`` on tokens, ``False`` on padding; handed to ``logits``.
        features: ``True`` on what may be masked; leave out special tokens. ``None``: all that is valid.
        replacement: What takes the place of a masked feature: the id of a mask token, an embedding, a colour. ``None``
            tells ``logits`` in ``valid`` that it is no token, so that nobody attends to it.
        grid: Rows and columns of patches, for pictures. Tokens before the patches are left out of the scores.
        query: Position of the only query whose attention counts, such as 0 for a class token; ``None``: all.
        layers: Names or glob patterns of attention modules; ``None`` takes all self-attention over the features.
        rankings: Further scores by name that are put to the same test, such as rollout or relevance.
        measure: What masking one feature changes: ``"probability"`` of the class, or ``"loss"``, its cross-entropy.
        shares: Shares of the features masked together, rounded up to whole features.
        batch_size: Samples in one forward.
        seed: Draws the features that rankings are compared with.

    Shape:
        - inputs: ``(samples, tokens)``, ``(samples, tokens, width)`` or ``(samples, channels, height, width)``
        - target: ``(samples,)``
        - valid: ``(samples, tokens)``
        - features, rankings: ``(samples, tokens)``, or ``(samples, rows * columns)``
        - replacement: a number, ``(width,)`` of embeddings, ``(channels,)`` of pictures

    Raises:
        ValueError: If a shape, a share, a class or a word does not fit, there is no sample, no self-attention over the
            features was seen, or the model has no number for a sample, such as one without any token.
        RuntimeError: If masking every feature changes nothing.

    Example:
        >>> class Sum(nn.Module):  # class 1 if the second token is large
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mix = nn.MultiheadAttention(4, 1, batch_first=True)
        ...
        ...     def forward(self, x):
        ...         scores = x[:, 1].sum(dim=1) + 0 * self.mix(x, x, x)[0].sum(dim=(1, 2))
        ...         return torch.stack([-scores, scores], dim=1)
        >>> found = feature_importance(Sum(), torch.ones(1, 3, 4), lambda model, x, valid: model(x), replacement=0.0)
        >>> found.scores["masking"]
        tensor([[0.0000, 0.4997, 0.0000]])

    References:
        DeYoung et al., "ERASER: A Benchmark to Evaluate Rationalized NLP Models", 2020, section 4 (comprehensiveness,
        sufficiency, and the shares).
    """
    checked_model(model)
    one_of("measure", measure, ("probability", "loss"))
    with torch.inference_mode(False):  # tensors that were made in it bear no gradient
        inputs, valid = outside_inference(inputs), outside_inference(valid)
    eraser = Eraser(model, logits, inputs, valid, replacement, grid, at_least("batch_size", batch_size, 1))
    places, tested_shares = maskable(eraser, features), checked_shares(shares)
    own = checked_rankings(rankings, places)
    with undisturbed(model):
        full = torch.cat([eraser.run(*part).detach() for part in eraser.parts()]).cpu()
        chosen = checked_target(full, target)
        before = full.double().log_softmax(dim=1).gather(1, chosen[:, None])[:, 0]
        check_masking(eraser, places, chosen, before, max(tested_shares))
        names, scores = attention_scores(eraser, chosen, query, checked_layers(layers))
        scores["masking"] = _masked_one_by_one(eraser, places, chosen, before, measure)
        scores |= own
        scores = {name: values.float().cpu().where(places, torch.nan) for name, values in scores.items()}
        control = torch.rand(places.shape, generator=torch.Generator().manual_seed(seed))
        ranked = {**scores, CONTROL: control}
        tested = {
            name: _tested(eraser, places, values, chosen, before, tested_shares) for name, values in ranked.items()
        }
    return FeatureImportance(
        scores, chosen, before.exp(), measure, tested_shares,
        {name: pair[0] for name, pair in tested.items()}, {name: pair[1] for name, pair in tested.items()}, names,
    )  # fmt: skip


def _masked_one_by_one(eraser: Eraser, places: Tensor, target: Tensor, before: Tensor, measure: str) -> Tensor:
    samples, feature = places.nonzero(as_tuple=True)
    removed = nn.functional.one_hot(feature, places.shape[1]).bool()
    after = eraser.log_probabilities(samples, removed, target)
    change = before[samples] - after if measure == "loss" else before[samples].exp() - after.exp()
    found = torch.full(places.shape, torch.nan, dtype=torch.float64)
    found[samples, feature] = change
    return found


def _tested(
    eraser: Eraser, places: Tensor, scores: Tensor, target: Tensor, before: Tensor, shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return comprehensiveness and sufficiency, ``(samples, shares)`` each."""
    samples = torch.arange(len(places))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for share in shares:
        top = top_features(scores, share, places)
        for kept, removed in zip(found, (top, places & ~top), strict=True):
            kept.append(before.exp() - eraser.log_probabilities(samples, removed, target).exp())
    return torch.stack(found[0], dim=1), torch.stack(found[1], dim=1)


def _mean_and_error(values: Tensor) -> str:
    known = values[~values.isnan()]
    count = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    if len(known) < 2:
        return f"{float(known.mean()):+.3f}{count}"
    return f"{float(known.mean()):+.3f} ± {float(known.std() / len(known) ** 0.5):.3f}{count}"

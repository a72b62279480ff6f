"""How the samples of a step came out: right or wrong, with which loss and how sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._class_labels import class_labels
from attn_callbacks.callbacks._reliance_probe import class_scores

__all__ = ["Outcome", "read_outcome", "sample_fields"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Outcome of each sample, ``(samples,)`` each, on the device.

    Args:
        classes: Number of classes.
        target: Class; negative for samples that do not count.
        predicted: The class of the largest logit.
        loss: Cross-entropy, minus infinity for samples that do not count.
        confidence: Probability of the class predicted.
        strangers: What is known of labels that are no class, ``(3,)``; see `class_labels`.
    """

    classes: int
    target: Tensor
    predicted: Tensor
    loss: Tensor
    confidence: Tensor
    strangers: Tensor

    @property
    def right(self) -> Tensor:
        """Predicted right."""
        return self.predicted == self.target

    @property
    def mistaken_confidence(self) -> Tensor:
        """Confidence of wrong samples, minus infinity for the others."""
        return self.confidence.masked_fill(self.right | (self.target < 0), -torch.inf)

    def fields(self, seen: int) -> dict[str, Tensor]:
        """Return what a gallery keeps of each sample, of which ``seen`` came before."""
        number = torch.arange(seen, seen + len(self.target), device=self.target.device)
        return {
            "number": number,
            "loss": self.loss,
            "confidence": self.confidence,
            "target": self.target,
            "predicted": self.predicted,
        }


def read_outcome(schema: BatchSchema, logits: Tensor | None, batch: Any) -> Outcome:
    """Compare logits with labels.

    Samples whose logits are not finite do not count: of several NaN the largest is class 0. Nor do those whose label is
    no class.

    Args:
        schema: Where a batch has what.
        logits: ``(samples, classes)``, or one a sample for two classes.
        batch: Holds the labels.

    Raises:
        ValueError: If there are no logits or no labels, or their shapes do not fit.
    """
    target = schema.read("target", batch)
    if logits is None or target is None:
        raise ValueError(
            "No `logits` were found in the output of `validation_step`, nor did `forward` return any. Return {'loss': "
            "..., 'logits': ...} from `validation_step`, or say where they are: BatchSchema(logits=...)."
            if logits is None
            else "No `target` was found in the validation batch. Say where it is: BatchSchema(target=...)."
        )
    scores = class_scores(logits).detach().double()
    target = torch.as_tensor(target, device=scores.device)
    if target.shape != scores.shape[:1]:
        raise ValueError(f"`target` must have shape (samples,) = {tuple(scores.shape[:1])}, got {tuple(target.shape)}.")
    target, strangers = class_labels(target, scores.shape[1])
    counted = scores.isfinite().all(dim=1) & (target >= 0)
    logs = scores.log_softmax(dim=1)
    loss = -logs.gather(1, target.clamp_min(0)[:, None])[:, 0]
    best = logs.max(dim=1)
    return Outcome(
        classes=scores.shape[1],
        target=target.where(counted, -1),
        predicted=best.indices,
        loss=loss.masked_fill(~counted, -torch.inf),
        confidence=best.values.exp().nan_to_num(0.0),
        strangers=strangers,
    )


def sample_fields(schema: BatchSchema, batch: Any) -> dict[str, Tensor]:
    """Return the token ids and images of a batch, as far as they are tensors."""
    found = {name: schema.read(name, batch) for name in ("tokens", "image")}
    return {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}

"""The loss of every sample in plain numpy, one sample and position at a time."""

from __future__ import annotations

import numpy as np


def sample_losses(logits, target, class_weight=None, sample_weight=None, group=None, ignore_index=-100):
    """Return each sample's mean loss over its positions that count; ``None`` for a sample without any."""
    logits, target = logits.detach().double().numpy(), target.numpy()
    soft = np.issubdtype(target.dtype, np.floating)
    losses = []
    for n in range(logits.shape[0]):
        positions = []
        for position in np.ndindex(*logits.shape[2:]):
            scores = logits[(n, slice(None), *position)]
            logs = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
            if not soft and target[(n, *position)] == ignore_index:
                continue
            share = target[(n, slice(None), *position)] if soft else np.eye(len(scores))[target[(n, *position)]]
            row = np.ones(len(scores))
            if class_weight is not None:
                row = np.asarray(class_weight) if np.ndim(class_weight) == 1 else np.asarray(class_weight)[group[n]]
            positions.append(-(row * share * logs).sum() * (1.0 if sample_weight is None else float(sample_weight[n])))
        losses.append(np.mean(positions) if positions else None)
    return losses


def group_means(losses, group, num_groups):
    """Return the mean loss of each group, ``None`` for one without a sample that counts."""
    members = [
        [loss for loss, at in zip(losses, group, strict=True) if at == g and loss is not None]
        for g in range(num_groups)
    ]
    return [np.mean(values) if values else None for values in members]

"""Importance, ablation, interaction and pruning of a pretrained model: MiniLM tells related sentences from others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.analysis.ablation import ablate_heads
from attn_callbacks.analysis.head_importance import head_importance
from attn_callbacks.analysis.interaction import head_interactions
from attn_callbacks.analysis.pruning import pruning_curve
from attn_callbacks.analysis.shapley import head_shapley

TRIPLES = [
    ("A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell today."),
    ("The cat sleeps on the sofa.", "A pet is resting at home.", "He repaired the engine of the car."),
    ("She bakes bread every morning.", "Each day she makes a loaf.", "The river flooded the valley."),
    ("The film was long but moving.", "A slow movie that touched me.", "Buy two tickets to Paris."),
    ("It will rain tomorrow.", "The forecast says showers.", "My phone has no battery left."),
    ("He was late for the meeting.", "He missed the start of the talk.", "Apples are cheaper in autumn."),
    ("The doctor examined the child.", "A physician looked at a young patient.", "The bridge is closed for repairs."),
    ("They won the final by one goal.", "The match ended in a narrow victory.", "Plants need water and light."),
]


def told_apart(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Loss of each triple: its first two sentences should be closer than the first and the third."""
    hidden = model(**batch).last_hidden_state
    valid = batch["attention_mask"][..., None]
    pooled = nn.functional.normalize((hidden * valid).sum(1) / valid.sum(1), dim=-1)
    anchor, near, far = pooled.unflatten(0, (-1, 3)).unbind(1)
    return nn.functional.softplus(10 * ((anchor * far).sum(-1) - (anchor * near).sum(-1)))


@pytest.mark.slow
def test_minilm() -> None:
    transformers = pytest.importorskip("transformers")
    from examples.sentiment_data import minilm

    try:
        folder = minilm()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    texts = [[text for triple in half for text in triple] for half in (TRIPLES[:4], TRIPLES[4:])]
    batches = [tokenizer(part, padding=True, return_tensors="pt") for part in texts]

    gates, exact = head_importance(model, batches, told_apart), ablate_heads(model, batches, told_apart)
    assert exact.reused_prefix
    assert (gates.samples, len(exact.layer_names), exact.change.shape[1]) == (8, 6, 12)
    both = torch.stack([gates.change.flatten(), exact.change.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.8
    assert gates.loss == pytest.approx(exact.loss, rel=1e-5)

    curve = pruning_curve(model, batches, told_apart, heads_per_step=12)
    assert curve.change[1] < 0.3 * curve.change[-1]  # a sixth of the heads is worth less than a third of the rise
    pairs = [
        (("encoder.layer.5.attention.self", head), ("encoder.layer.5.attention.self", head + 1)) for head in (0, 4)
    ]
    found = head_interactions(model, batches, told_apart, pairs)
    assert int((~found.interaction.isnan()).sum()) == 4
    players = [("encoder.layer.5.attention.self", head) for head in range(4)]
    shared = head_shapley(model, batches, told_apart, players, permutations=3, truncation=0)
    assert abs(shared.gap) < 1e-9

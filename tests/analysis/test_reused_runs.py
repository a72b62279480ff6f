"""When what a forward computed before is not used again."""

from __future__ import annotations

import torch

from attn_callbacks.analysis._experiment import HeadExperiment
from attn_callbacks.analysis.ablation import ablate_heads
from tests.analysis.test_prefix import DATA, InPlace, Remembering, SometimesInPlace, squared


def test_a_prefix_whose_outputs_changed_in_place_is_not_intact() -> None:
    for model, data, intact in ((InPlace(), DATA, False), (SometimesInPlace(), DATA[:2], True)):
        experiment = HeadExperiment(model, [data], squared, None)
        with experiment.open():
            prefix, _ = experiment.record(data).start(["blocks.1"])
        assert (prefix is not None) == intact


def test_what_modules_keep_shows_in_every_batch() -> None:
    """Only the first batch has been run with heads off before it is checked."""
    model, batches = Remembering(), [DATA, DATA.flip(0) * 1.5 + 0.3]
    both = ablate_heads(model, batches, squared)
    alone = [ablate_heads(model, [batch], squared).change for batch in batches]
    torch.testing.assert_close(both.change, torch.stack(alone).mean(dim=0), rtol=1e-4, atol=1e-5)

"""What it costs to look: one evaluation step, watched in several ways, beside a model that returns its maps.

The eager twin returns maps and no scores, so that its statistics lack the largest logit.

Run: ``python -m benchmarks.capture [--out FOLDER] [--quick]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attn_callbacks.capture import (
    AttentionCall,
    AttentionRecorder,
    exact_head_statistics,
    sampled_head_statistics,
)
from attn_callbacks.functional import head_statistics, stratified_rows
from benchmarks.machine import kernel_of
from benchmarks.runner import main
from benchmarks.table import Block, Goal, Setting, Table

ROWS = 64
LONG_LAYERS = 2  # of four, at 4,096 tokens: a step takes half as long, and ratios stay what they are
BARE, IDLE = "bare", "recorder, nothing asked"
SAMPLED, EXACT = f"statistics of {ROWS} rows", "exact statistics"
RETURNED = "eager maps, the same but max_logit"

Runs = dict[str, Callable[[], object]]


def run(setting: Setting) -> Iterator[Block]:
    """Time every workload."""
    from benchmarks.models import bert, gpt  # transformers takes seconds to import

    workloads: tuple[tuple[str, Any, int, int], ...] = (
        ("BERT", bert, 32, 32),
        ("BERT", bert, 2, 512),
        ("GPT", gpt, 1, 1024),
        ("GPT", gpt, 1, 4096),
    )
    small = {"width": 32, "layers": 2, "heads": 2}
    for name, build, batch, tokens in workloads:
        size = setting.pick((batch, tokens), (2, 80))
        usual = {"layers": LONG_LAYERS} if tokens == 4096 else {}
        yield _block(setting, f"{name} {tokens}", build, *size, **setting.pick(usual, small))


def arms(fused: nn.Module, eager: nn.Module, ids: torch.Tensor) -> Runs:
    """Build the sides to compare."""
    generator = torch.Generator()

    def drawn(call: AttentionCall) -> tuple[torch.Tensor | None, torch.Tensor]:
        whole = ids.shape[1] <= ROWS
        return (None, call.query_valid) if whole else stratified_rows(call.query_valid, ROWS, generator)

    @torch.no_grad()
    def bare() -> object:
        return fused(ids)

    def watched(on_call: Any) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            with AttentionRecorder(fused, on_call=on_call):
                return fused(ids)

        return run

    @torch.no_grad()
    def returned_maps() -> object:
        return [head_statistics(weights) for weights in eager(ids, output_attentions=True).attentions]

    return {
        BARE: bare,
        IDLE: watched(lambda call: None),
        SAMPLED: watched(lambda call: sampled_head_statistics(call, *drawn(call))),
        EXACT: watched(lambda call: exact_head_statistics(call, *drawn(call))),
        RETURNED: returned_maps,
    }


def _block(setting: Setting, key: str, build: Any, batch: int, tokens: int, **sizes: int) -> Block:
    from benchmarks.models import twins

    fused, eager = twins(build, tokens, setting.device, **sizes)
    ids = torch.randint(1000, (batch, tokens), device=setting.device)
    title = f"evaluation step of a model like {key.split()[0]}, {batch} x {tokens} tokens"
    sides = arms(fused, eager, ids)
    kernel = kernel_of(sides[BARE], setting.device)
    return Block(key, title, setting.turns(sides, warm_up=1), kernel=kernel)


def _watched(block: str, predicted: float) -> Goal:
    return Goal(
        "G3",
        f"captured step (statistics of {ROWS} rows) / bare step, {block} tokens",
        bound=1.15,
        on_cuda=1.10,
        predicted=predicted,
        limit="1.004 to 1.01: 64 of N rows of the attention's share of a step",
        between="ten statistics are as many passes over the sampled rows; Python around short calls",
        block=block,
        of=(SAMPLED, BARE),
    )


def _against_maps(block: str, bound: float, predicted: float, of: str, what: str, on_cuda: float) -> Goal:
    return Goal(
        "G4",
        f"captured step ({what}) / eager step that returns maps and the same statistics, {block} tokens",
        bound=bound,
        on_cuda=on_cuda,
        predicted=predicted,
        limit="fused / eager of the attention's part, 0.11 to 0.25, plus the rest of the step, which is the same",
        between="the rest of the step"
        if of == SAMPLED
        else "distance and far mass: two more fused calls for each head",
        block=block,
        of=(of, RETURNED),
    )


TABLE = Table(
    "capture",
    "One evaluation step, watched in several ways",
    (
        _watched("BERT 512", predicted=1.15),
        _watched("GPT 1024", predicted=1.08),
        _watched("GPT 4096", predicted=1.03),
        _against_maps("GPT 1024", 0.6, 0.35, SAMPLED, f"statistics of {ROWS} rows", on_cuda=0.5),
        _against_maps("GPT 4096", 0.3, 0.12, SAMPLED, f"statistics of {ROWS} rows", on_cuda=0.25),
        _against_maps("GPT 1024", 0.6, 0.55, EXACT, "exact statistics", on_cuda=0.5),
        _against_maps("GPT 4096", 0.3, 0.3, EXACT, "exact statistics", on_cuda=0.25),
    ),
    run,
)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))

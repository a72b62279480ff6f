"""What it costs to look: one evaluation step of a BERT, watched in several ways.

The eager twin returns maps and no scores, so that its statistics lack the largest logit.

Run: ``python -m benchmarks.capture [folder for the JSON files]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from attn_callbacks.capture import AttentionCall, AttentionRecorder
from attn_callbacks.capture.scores import softmax_rows
from attn_callbacks.functional import head_statistics, stratified_rows
from benchmarks.paired import compare, report

ROWS = 64


def arms(tokens: int, batch: int) -> dict[str, Callable[[], object]]:
    """Build the sides to compare: one model, and its twin on eager attention."""
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=tokens,
    )
    fused = BertModel._from_config(config, attn_implementation="sdpa").eval()
    eager = BertModel._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(fused.state_dict())
    ids = torch.randint(0, config.vocab_size, (batch, tokens))
    generator = torch.Generator()

    def sampled(call: AttentionCall) -> None:
        whole = tokens <= ROWS
        _statistics(call, *((None, None) if whole else stratified_rows(call.query_valid, ROWS, generator)))

    def exact(call: AttentionCall) -> None:
        _statistics(call, None, None)

    @torch.no_grad()
    def bare() -> object:
        return fused(ids)

    def watched(on_call: Callable[[AttentionCall], None]) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            with AttentionRecorder(fused, on_call=on_call):
                return fused(ids)

        return run

    @torch.no_grad()
    def returned_maps() -> object:
        return [head_statistics(weights) for weights in eager(ids, output_attentions=True).attentions]

    return {
        "bare": bare,
        "recorder, nothing asked": watched(lambda call: None),
        f"recorder, statistics of {ROWS} rows": watched(sampled),
        "recorder, statistics of all rows": watched(exact),
        "eager maps, the same but max_logit": returned_maps,
    }


def _statistics(call: AttentionCall, rows: Tensor | None, drawn: Tensor | None) -> None:
    logits = call.logits(rows)
    if logits is not None:
        weights = softmax_rows(logits)
        head_statistics(weights, logits, positions=rows, allowed=call.allowed(rows), valid=drawn)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/benchmarks")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for tokens, batch in ((32, 32), (128, 8), (512, 2)):
        report(f"capture {batch} x {tokens} tokens", compare(arms(tokens, batch)), folder)


if __name__ == "__main__":
    main()

"""Memory: exact statistics of one layer of twelve heads, beside the attention maps that they replace.

Nothing is timed, so every arm runs in a fresh process on all cores, whatever `--threads` says. Maps grow with the
square of the length and are kept for all layers: they are measured at 1,024 tokens and computed for sizes that would
not fit. Statistics need memory of one layer at a time.

Run: ``python -m benchmarks.memory [--out FOLDER] [--quick] [--long]``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from benchmarks.memory_arm import ARMS, HEADS, LAYERS, MASKED
from benchmarks.paired import Interval
from benchmarks.resident import Memory, fresh_memory
from benchmarks.runner import main
from benchmarks.table import Block, Goal, Setting, Table

ALL, PACKED, MAPS = "all exact statistics", "entropy + 8 features", "returned maps"
EXTRA, SHARE, COMPUTED = "extra MB", "returned maps / extra memory", "MB of returned maps"


def run(setting: Setting) -> Iterator[Block]:
    """Measure maps once, then statistics of growing lengths."""
    tokens = setting.pick(1024, 64)
    maps = {MAPS: fresh_memory(MAPS, tokens, _cores())}
    exact = {COMPUTED: Interval.exact(map_bytes(tokens) / 1e6)}
    yield Block(
        "maps",
        f"{LAYERS} layers of {HEADS} heads, {tokens} tokens, maps returned",
        values=exact,
        columns=_columns(maps),
    )
    every = [name for name in ARMS if name != MAPS and MASKED not in name]
    under_mask = [name for name in ARMS if MASKED in name]
    yield _block("4096", setting.pick(4096, 256), setting.pick(every, [PACKED]), ALL)
    for tokens in (4096, 8192):
        size = setting.pick(tokens, 256)
        found = {arm: fresh_memory(arm, size, _cores()) for arm in setting.pick(under_mask, under_mask[-1:])}
        title = (
            f"one layer of {HEADS} heads, {size} tokens, under a mask of {size**2 / 1e6:.0f} MB that was there before"
        )
        yield Block(f"{tokens}{MASKED}", title, columns=_columns(found))
    yield _block("16384", setting.pick(16384, 256), [PACKED], ALL)
    yield _block("65536", setting.pick(65536, 256), [], PACKED)
    if setting.long:
        yield _block("65536, all", setting.pick(65536, 256), [], ALL)


def map_bytes(tokens: int) -> int:
    """Bytes of the float32 maps of all layers and heads."""
    return LAYERS * HEADS * tokens**2 * 4


def _block(key: str, tokens: int, others: list[str], judged: str) -> Block:
    found = {arm: fresh_memory(arm, tokens, _cores()) for arm in dict.fromkeys([*others, judged])}
    extra = max(found[judged])
    values = {
        EXTRA: Interval.exact(extra / 1e6),
        COMPUTED: Interval.exact(map_bytes(tokens) / 1e6),
        SHARE: Interval.exact(map_bytes(tokens) / extra),
    }
    return Block(key, f"one layer of {HEADS} heads, causal, {tokens} tokens", values=values, columns=_columns(found))


def _columns(found: dict[str, Memory]) -> dict[str, dict[str, float]]:
    return {
        "resident, MB": {name: memory.resident / 1e6 for name, memory in found.items()},
        "tensors, MB": {name: memory.tensors / 1e6 for name, memory in found.items()},
    }


def _cores() -> int:
    return os.cpu_count() or 1


def _saving(tokens: int, bound: float, predicted: float) -> Goal:
    return Goal(
        "G10",
        f"maps of {LAYERS} x {HEADS} heads / extra memory of exact statistics, {tokens} tokens",
        bound=bound,
        predicted=predicted,
        limit="one layer's queries, keys and output at a time, whatever the number of layers",
        between="padded copies of queries and keys; a kernel that took features of another width would need none",
        block=f"{tokens}",
        of=SHARE,
        at_least=True,
    )


def _below(what: str, block: str, predicted: float) -> Goal:
    return Goal(
        "G10",
        f"extra memory of {what} of {HEADS} heads, 65536 tokens",
        bound=256,
        predicted=predicted,
        limit="201 MB for the output of one layer in float32, 17 MB head by head",
        between="how many heads are worked on at once",
        block=block,
        of=EXTRA,
        unit="MB",
    )


TABLE = Table(
    "memory",
    "Memory of exact statistics, each arm in a fresh process",
    (
        _saving(4096, bound=100, predicted=150),
        _saving(16384, bound=500, predicted=600),
        _below("entropy and 8 key features", "65536", predicted=200),
        _below("all exact statistics", "65536, all", predicted=240),
    ),
    run,
)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))

"""What each loss costs: time and memory of forward and backward, beside cross entropy in the same run.

Run: ``python benchmarks/losses.py [--out FOLDER] [--quick]``; ``python -m benchmarks losses`` is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: this one would hide the package `losses`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.allocation import keep_freed_pages, peak_bytes
from benchmarks.loss_arms import TABLES
from benchmarks.runner import main
from benchmarks.table import Block, Setting, Table

PAIRS = 21


def run(setting: Setting) -> Iterator[Block]:
    """Time every family of losses; with ``--quick`` only the smallest one."""
    keep_freed_pages()
    for key in setting.pick(list(TABLES), ["predictions"]):
        arms = TABLES[key](setting.device)
        memory = {"tensors, MB": {name: peak_bytes(arm) / 1e6 for name, arm in arms.items()}}
        columns = {} if setting.device.startswith("cuda") else memory
        yield Block(key, key, setting.turns(arms, warm_up=3, pairs=PAIRS), columns=columns)


TABLE = Table("losses", "Losses, relative to the first line of each block", (), run)

if __name__ == "__main__":
    sys.exit(main([TABLE.name, *sys.argv[1:]]))

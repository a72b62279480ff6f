"""What each loss costs: time and memory of forward and backward, beside cross entropy in the same run.

Run: ``python benchmarks/losses.py [folder for the JSON files] [device] [tables...]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path[0] == str(Path(__file__).resolve().parent):  # run as a file: this one would hide the package `losses`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.allocation import keep_freed_pages, peak_bytes
from benchmarks.loss_arms import TABLES
from benchmarks.paired import compare, report


def main(folder: str = "runs/benchmarks", device: str = "cpu", *tables: str) -> None:
    keep_freed_pages()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for title in tables or TABLES:
        arms = TABLES[title](device)
        memory = {name: peak_bytes(run) for name, run in arms.items()} if device == "cpu" else {}
        report(f"{title} on {device}", compare(arms), Path(folder), memory)


if __name__ == "__main__":
    main(*sys.argv[1:])

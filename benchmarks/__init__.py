"""Side by side with peers in one run; each prints a table and writes JSON."""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # read when torch is imported: else its profiler says when it starts

"""What every test and every docstring example stands on: one thread, fixed seeds, no downloads, nothing left behind.

It lies at the root because the docstring examples of both packages need it too.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

import pytest

# Libraries read these when they are first imported, and they inherit to processes that tests start. One thread is
# repeatable, and faster for models this small when other work shares the machine.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_TRAINER_VARIABLES = (
    *("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "RANK", "WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"),
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, visibly, what this machine cannot run."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test and docstring example from the same seeds; what nobody imported stays unimported."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_trainer_left() -> Iterator[None]:
    """Take back what a Trainer leaves in the process: its environment variables, its rank, its process group."""
    before = {name: os.environ.get(name) for name in _TRAINER_VARIABLES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "lightning_utilities.core.rank_zero" in sys.modules:
        sys.modules["lightning_utilities.core.rank_zero"].rank_zero_only.rank = 0
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()

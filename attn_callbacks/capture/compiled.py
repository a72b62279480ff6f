"""Let compiled models run as they were written, for the time in which somebody looks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from attn_callbacks.capture.shared import Shared

__all__ = ["run_eagerly"]


@contextmanager
def run_eagerly(model: nn.Module) -> Iterator[None]:
    """Run compiled code eagerly for the length of a ``with`` block; graphs compiled before are kept for afterwards."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and the import would take a second
        yield
        return
    is_wrapped = any(hasattr(module, "_orig_mod") for module in model.modules())
    with _EAGER.held(), _QUIET.held() if is_wrapped else nullcontext():
        yield


@contextmanager
def _without_hook_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        # that the wrapper runs a recorder's hooks once more does no harm: it is no module of its own
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        yield


_EAGER = Shared(lambda: torch.compiler.set_stance("force_eager"))
_QUIET = Shared(_without_hook_warning)

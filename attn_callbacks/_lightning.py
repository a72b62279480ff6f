"""The only module that names Lightning: one ``Callback`` for ``lightning`` and ``pytorch_lightning`` alike.

``lightning`` depends on ``pytorch-lightning``, so both names import and each brings classes of its own. A callback must
be an instance of the one its Trainer knows: ours is an instance of both.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

__all__ = ["Callback", "MisconfigurationException", "rank_zero_warn"]

if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback
else:

    def _both(path: str, name: str) -> tuple[type[Any], ...]:
        found = []
        for package in ("lightning.pytorch", "pytorch_lightning"):
            try:
                found.append(getattr(importlib.import_module(package + path), name))
            except ImportError:
                continue
        if not found:
            raise ImportError(
                "`attn_callbacks.callbacks` needs `pytorch-lightning` or `lightning`; install one of them."
            )
        return tuple(dict.fromkeys(found))  # the same class twice would break the bases

    class Callback(*_both("", "Callback")):
        """Base of every callback here, known to the Trainers of both import names."""

    class MisconfigurationException(*_both(".utilities.exceptions", "MisconfigurationException")):
        """A Trainer that cannot do what a callback needs, known under both import names."""

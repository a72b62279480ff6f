"""Find one of several validation loaders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attn_callbacks._lightning import MisconfigurationException

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["loader_index"]


def loader_index(trainer: Trainer, loader: int | str) -> int:
    """Return the index that Lightning gives a validation loader.

    Args:
        trainer: Knows the loaders, once validation has begun.
        loader: Index or name.

    Raises:
        MisconfigurationException: If there is no such loader.
    """
    loaders = trainer.val_dataloaders
    names = list(loaders) if isinstance(loaders, Mapping) else []
    count = len(names) or (len(loaders) if isinstance(loaders, (list, tuple)) else 1)
    if isinstance(loader, str) and loader in names:
        return names.index(loader)
    if isinstance(loader, int) and loader < count:
        return loader
    known = f"they are named {', '.join(map(repr, names))}" if names else f"there are {count}, without names"
    raise MisconfigurationException(f"`dataloader={loader!r}` is none of the validation loaders: {known}.")

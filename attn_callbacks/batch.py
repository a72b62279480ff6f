"""What a batch means: the one place that knows where labels, tokens, images and groups are found in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["BatchSchema"]

# plain values first: what writes a configuration takes the first kind that fits
Reader = int | str | Callable[[Any], Any] | None

_KEYS: dict[str, tuple[str, ...]] = {
    "inputs": ("inputs", "input_ids", "pixel_values", "images", "image", "input_values", "input_features", "x"),
    "target": ("labels", "label", "target", "targets", "y"),
    "logits": ("logits",),
    "valid": ("attention_mask",),
    "tokens": ("input_ids",),
    "image": ("pixel_values", "images", "image"),
    "relevance": ("relevance",),
    "spurious": ("spurious",),
    "group": ("group", "groups"),
}
_POSITIONS = {"inputs": 0, "target": 1}


@dataclass(frozen=True)
class BatchSchema:
    """Say where the parts of a batch are; every callback takes one as ``schema=``.

    Each field is a key of a dict batch, a position of a tuple batch, or a function of the batch, which a configuration
    file gives by its path (``"project.data.read_group"``); ``None`` looks at the usual places: ``(x, y)`` batches and
    the dict batches of Hugging Face tokenizers and image processors.

    Args:
        inputs: What the model receives.
        target: Class labels, ``(samples,)``; negative labels are ignored.
        logits: Key of the step's output (or a function of it) that holds ``(samples, classes)``; ``None`` takes
            ``"logits"`` from the output and else what the module's ``forward`` returned.
        valid: ``True`` (or 1) where a token is not padding, ``(samples, tokens)``.
        tokens: Token ids ``(samples, tokens)``, or a list of strings for each sample.
        image: Pictures, ``(samples, channels, height, width)``.
        relevance: ``True`` on tokens that should decide, ``(samples, tokens)``, or on such pixels, ``(samples, height,
            width)``: of pixels, the patches that lie among them as a whole count. Mark tokens where that loses some.
        spurious: ``True`` on tokens or pixels that must not decide, likewise.
        group: Index of the group of each sample, ``(samples,)``.
        sets: Further token sets by name, each ``True`` on its tokens, ``(samples, tokens)``: names, hashtags, a region.

    Example:
        >>> schema = BatchSchema(target="y", group=lambda batch: batch["y"] % 2)
        >>> batch = {"input_ids": torch.tensor([[5, 6]]), "y": torch.tensor([3])}
        >>> schema.read("tokens", batch), schema.read("target", batch), schema.read("group", batch)
        (tensor([[5, 6]]), tensor([3]), tensor([1]))
        >>> schema.read("relevance", batch) is None
        True
    """

    inputs: Reader = None
    target: Reader = None
    logits: Reader = None
    valid: Reader = None
    tokens: Reader = None
    image: Reader = None
    relevance: Reader = None
    spurious: Reader = None
    group: Reader = None
    sets: Mapping[str, Reader] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.sets, Mapping):
            raise TypeError(f"`sets` must map names to keys or functions of the batch, got {self.sets!r}.")
        taken = sorted(name for name in self.sets if name in _KEYS)
        if taken:
            raise ValueError(f"`sets` must not use the names of other fields, got {taken}.")
        readers = {known.name: getattr(self, known.name) for known in fields(self) if known.name != "sets"}
        for name, reader in {**readers, **self.sets}.items():
            if reader is not None and not isinstance(reader, (str, int)) and not callable(reader):
                raise TypeError(f"`{name}` must be a key, a position or a function of the batch, got {reader!r}.")

    def __repr__(self) -> str:
        given = ((known.name, getattr(self, known.name)) for known in fields(self))
        return f"BatchSchema({', '.join(f'{name}={value!r}' for name, value in given if value not in (None, {}))})"

    @property
    def token_sets(self) -> tuple[str, ...]:
        """Names of all token sets that a batch may mark: ``relevance``, ``spurious`` and :attr:`sets`."""
        return ("relevance", "spurious", *self.sets)

    def read(self, field: str, batch: Any) -> Any:
        """Return what ``field`` names in ``batch``, or ``None`` if it was left to the defaults and is not there.

        Raises:
            KeyError: If the schema names a key or a position that the batch does not have.
        """
        if field not in _KEYS and field not in self.sets:
            known = ", ".join(map(repr, self.token_sets))
            raise KeyError(f"The batch schema has no token set {field!r} ({known}). Name it: BatchSchema(sets=...).")
        reader = _resolved(self.sets[field] if field in self.sets else getattr(self, field))
        if reader is None:
            return None if field in self.sets else _usual(field, batch)
        if callable(reader):
            return reader(batch)
        return _named(field, reader, batch)

    def size(self, batch: Any) -> int | None:
        """Return the number of samples in ``batch``, or ``None`` if nothing in it says so."""
        found = (self.read(field, batch) for field in ("target", "tokens", "image", "inputs"))
        return next((size for part in found if (size := _length(part))), None)

    def flags(self, field: str, batch: Any) -> Tensor | None:
        """Return a token field (``valid``, ``spurious``, one of ``sets``, ...) as bool ``(samples, tokens)``."""
        found = self.read(field, batch)
        return None if found is None else torch.as_tensor(found).bool()

    def step_logits(self, output: Any, forwarded: Sequence[Any] = ()) -> Tensor | None:
        """Find logits ``(samples, classes)`` in a step's output, else among what modules returned, the last first."""
        reader = _resolved(self.logits)
        if callable(reader):
            found = reader(output)
            return found if isinstance(found, Tensor) else None
        if reader is not None:
            return _tensor(_part(output, reader))
        found = _tensor(_part(output, "logits"))
        return self.forward_logits(forwarded) if found is None else found

    def forward_logits(self, forwarded: Sequence[Any]) -> Tensor | None:
        """Find logits ``(samples, classes)`` among what modules returned, the last first."""
        for candidate in reversed(forwarded):
            found = _tensor(_part(candidate, "logits"))
            if found is not None:
                return found
        return next((f for f in reversed(forwarded) if isinstance(f, Tensor) and f.ndim == 2), None)


def _resolved(reader: Reader) -> Reader:
    """Return the function that a dotted path names, which is how a configuration file gives one; else ``reader``."""
    return _function(reader) or reader if isinstance(reader, str) and "." in reader else reader


@cache
def _function(path: str) -> Callable[[Any], Any] | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None
    return found if callable(found) else None


def _named(field: str, reader: int | str, batch: Any) -> Any:
    if isinstance(batch, (tuple, list)) and str(reader).lstrip("-").isdigit():
        if -len(batch) <= int(reader) < len(batch):
            return batch[int(reader)]
        raise KeyError(f"`{field}` reads position {reader} of a batch that has {len(batch)}.")
    found = _part(batch, reader)
    if found is None:
        raise KeyError(f"`{field}` reads {reader!r} of the batch, which has {_contents(batch)}.")
    return found


def _usual(field: str, batch: Any) -> Any:
    if field == "logits":
        raise ValueError("Logits are not read from a batch; call `step_logits` with the output of the step.")
    if isinstance(batch, Mapping):
        return next((batch[key] for key in _KEYS[field] if key in batch), None)
    if isinstance(batch, (tuple, list)):
        inputs = batch[0] if batch else None
        if field in _POSITIONS:
            return batch[_POSITIONS[field]] if len(batch) > _POSITIONS[field] else None
    else:
        inputs = batch
        if field == "inputs":
            return batch
    if isinstance(inputs, Mapping):
        return _usual(field, inputs)
    return inputs if _looks_like(field, inputs) else None


def _looks_like(field: str, inputs: Any) -> bool:
    if not isinstance(inputs, Tensor):
        return False
    if field == "image":
        return inputs.ndim == 4 and inputs.shape[1] in (1, 3) and (inputs.is_floating_point() or _is_bytes(inputs))
    return field == "tokens" and inputs.ndim == 2 and not inputs.is_floating_point()


def _is_bytes(inputs: Tensor) -> bool:
    return inputs.dtype == torch.uint8


def _part(whole: Any, key: Any) -> Any:
    if isinstance(whole, Mapping):
        return whole.get(key)
    return getattr(whole, key, None) if isinstance(key, str) else None


def _length(part: Any) -> int:
    has_length = isinstance(part, list) or (isinstance(part, Tensor) and part.ndim > 0)
    return len(part) if has_length else 0


def _tensor(found: Any) -> Tensor | None:
    return found if isinstance(found, Tensor) else None


def _contents(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return ", ".join(map(repr, batch)) or "no keys"
    return f"no keys (a {type(batch).__name__})"

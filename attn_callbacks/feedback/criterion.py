"""Find, in a training module, the loss whose class weights are to be changed."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["BUFFER", "find_weighted_loss", "release_weights", "weight_table"]

BUFFER = "class_weight"


def find_weighted_loss(module: nn.Module, path: str) -> nn.Module:
    """Return the loss at ``path``, or the only one inside it, that holds class weights.

    Losses are told by their buffer ``class_weight``, not by their type. Compiled and composed losses have it inside.

    Args:
        module: The training module.
        path: Dotted path below it.

    Raises:
        ValueError: If there is no module at ``path``, or not exactly one loss with the buffer in it.
    """
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
    where = f"`{path}` of {type(module).__name__}"
    if not isinstance(found, nn.Module):
        got = "no such attribute" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"Expected a loss with a buffer `{BUFFER}` at {where}, got {got}. {_advice(module)}")
    losses = _weighted(found)
    if not losses:
        raise ValueError(
            f"Expected a loss with a buffer `{BUFFER}` at {where}, got {type(found).__name__} without one. "
            f"{_advice(module)}"
        )
    if len(losses) > 1:
        names = ", ".join(repr(f"{path}.{name}".rstrip(".")) for name in losses)
        raise ValueError(
            f"Expected one loss with a buffer `{BUFFER}` at {where}, got {len(losses)}: pass one of {names}."
        )
    return next(iter(losses.values()))


def weight_table(loss: nn.Module) -> Tensor:
    """Return the buffer of a loss that :func:`find_weighted_loss` found. Never keep it: moving the loss replaces it."""
    return loss.get_buffer(BUFFER)


def release_weights(loss: nn.Module) -> None:
    """Take the buffer out of the state dict of a loss that knows how: whoever steers the weights now keeps them."""
    release = getattr(loss, "release_state", None)
    if release is not None:
        release(BUFFER)


def _weighted(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: part
        for name, part in module.named_modules()
        if any(buffer == BUFFER for buffer, _ in part.named_buffers(recurse=False))
    }


def _advice(module: nn.Module) -> str:
    known = [name for name in _weighted(module) if name]
    if known:
        return f"Pass `criterion=` one of these paths, which have it: {', '.join(map(repr, known))}."
    return (
        "Create one in `__init__`, for example `losses.WeightedCrossEntropyLoss(num_classes)`, and use it as the loss."
    )

"""Find, in a training module, the loss whose class weights, or shifts of the logits, are to be changed."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["BUFFER", "SHIFT", "check_table", "find_weighted_loss", "holds_table", "release_weights", "weight_table"]

BUFFER = "class_weight"
SHIFT = "adjustment"

_EXAMPLES = {
    BUFFER: "`losses.WeightedCrossEntropyLoss(num_classes)`",
    SHIFT: "`losses.LogitAdjustedLoss(class_counts)`",
}
_SHAPES = {
    "class": ("(classes,)", "pass by='group', or build the loss with one {one} a class"),
    "group": ("(groups, classes)", "build the loss with one row a group ({rows}), or pass by='class'"),
    "cell": ("(groups, classes)", "build the loss with one row a group ({rows})"),
}


def find_weighted_loss(module: nn.Module, path: str, buffer: str = BUFFER) -> nn.Module:
    """Return the loss at ``path``, or the only one inside it, that holds class weights or shifts.

    Losses are told by their buffer, not by their type. Compiled and composed losses have it inside.

    Args:
        module: The training module.
        path: Dotted path below it.
        buffer: ``"class_weight"`` for weights, ``"adjustment"`` for shifts of the logits.

    Raises:
        ValueError: If there is no module at ``path``, or not exactly one loss with the buffer in it.
    """
    found = _at(module, path)
    where = f"`{path}` of {type(module).__name__}"
    if not isinstance(found, nn.Module):
        got = "no such attribute" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"Expected a loss with a buffer `{buffer}` at {where}, got {got}. {_advice(module, buffer)}")
    losses = _holders(found, buffer)
    if not losses:
        raise ValueError(
            f"Expected a loss with a buffer `{buffer}` at {where}, got {type(found).__name__} without one. "
            f"{_advice(module, buffer)}"
        )
    if len(losses) > 1:
        names = ", ".join(repr(f"{path}.{name}".rstrip(".")) for name in losses)
        raise ValueError(
            f"Expected one loss with a buffer `{buffer}` at {where}, got {len(losses)}: pass one of {names}."
        )
    return next(iter(losses.values()))


def holds_table(module: nn.Module, path: str, buffer: str, axes: int | None = None) -> bool:
    """Return whether something at ``path``, or inside it, has the buffer; with ``axes``, one of so many axes."""
    found = _at(module, path)
    holders = _holders(found, buffer).values() if isinstance(found, nn.Module) else ()
    return any(axes is None or part.get_buffer(buffer).dim() == axes for part in holders)


def weight_table(loss: nn.Module, buffer: str = BUFFER) -> Tensor:
    """Return the buffer of a loss that :func:`find_weighted_loss` found. Never keep it: moving the loss replaces it."""
    return loss.get_buffer(buffer)


def release_weights(loss: nn.Module, buffer: str = BUFFER) -> None:
    """Take the buffer out of the state dict of a loss that knows how: whoever steers the weights now keeps them."""
    release = getattr(loss, "release_state", None)
    if release is not None:
        release(buffer)


def check_table(table: Tensor, by: str, where: str) -> None:
    """Refuse a table that has another number of axes than ``by`` needs.

    Args:
        table: The buffer of the loss.
        by: ``"class"``, or ``"group"`` or ``"cell"`` for one row a group.
        where: Name of the buffer, for the message.

    Raises:
        ValueError: If it has.
    """
    axes, way = _SHAPES[by]
    one, rows = ("shift", "`class_counts=` by group") if where.endswith(SHIFT) else ("weight", "`num_groups=`")
    if table.dim() != (1 if by == "class" else 2):
        way = way.format(one=one, rows=rows)
        raise ValueError(f"by={by!r} needs `{where}` of shape {axes}, got {tuple(table.shape)}: {way}.")


def _at(module: nn.Module, path: str) -> object:
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _holders(module: nn.Module, buffer: str) -> dict[str, nn.Module]:
    return {
        name: part
        for name, part in module.named_modules()
        if any(known == buffer for known, _ in part.named_buffers(recurse=False))
    }


def _advice(module: nn.Module, buffer: str) -> str:
    known = [name for name in _holders(module, buffer) if name]
    if known:
        return f"Pass `criterion=` one of these paths, which have it: {', '.join(map(repr, known))}."
    return f"Create one in `__init__`, for example {_EXAMPLES[buffer]}, and use it as the loss."

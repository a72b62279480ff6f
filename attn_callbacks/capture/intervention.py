"""Change what heads put out while a model runs: before the output projection, without touching a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from torch import Tensor, nn

from attn_callbacks.capture import listening
from attn_callbacks.capture.call import AttentionCall
from attn_callbacks.capture.compiled import run_eagerly
from attn_callbacks.capture.naming import call_name
from attn_callbacks.capture.scope import ModuleScope
from attn_callbacks.capture.selection import check_found, checked_layers, checked_model, is_selected
from attn_callbacks.capture.sites import AttentionSites

__all__ = ["HeadIntervention", "gate_heads"]


class HeadIntervention:
    """Let a function decide what each attention call of a model returns, for the length of a ``with`` block.

    The function gets every call at the moment it was computed (but those of a batch without samples), and returns what
    the model goes on with in place of the call's ``output``: the heads' outputs before they are merged and projected.
    What it computes has a graph if the forward has one. No weight of the model is touched, and nothing remains
    installed after the block; a compiled model runs eagerly inside it. ``nn.TransformerEncoder`` leaves its native path
    in evaluation, which has no such place: its outputs agree with those of that path up to rounding.

    What activation checkpointing computes again in the backward is not changed; torch refuses it as a recomputation
    that differs. Recorders that are entered inside the block see what was changed, those around it what was computed.

    Args:
        model: The model, or a module around it; paths below it become names.
        change: Called as ``change(call)`` in the order of execution. ``call.output`` has the axes of ``Shape``; where
            the model mixes values by an ``einsum`` of its own, they are its weights, which have keys as the last axis.
            Whether a call is a cross (``is_cross``) is known where the kernel itself shows it. Returns the other
            output in the same shape, or ``None`` to leave it.
        layers: Names or glob patterns of the modules; a name includes everything below it. ``None``: all.

    Shape:
        - call.output, and what ``change`` returns: ``(batch, heads, queries, head_dim)``

    Raises:
        AttentionNotFoundError: On leaving the block, if the model ran and no attention was seen.
        TypeError: If ``model`` is no module, or ``layers`` a single string.
        ValueError: If ``change`` returns another shape; on leaving the block, if ``layers`` has an entry that matched
            no attention.

    Example:
        >>> model = nn.MultiheadAttention(8, num_heads=2, batch_first=True, bias=False)
        >>> import torch
        >>> tokens = torch.ones(1, 3, 8)
        >>> with HeadIntervention(model, lambda call: torch.zeros_like(call.output)):
        ...     output, _ = model(tokens, tokens, tokens)
        >>> float(output.abs().max())
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        change: Callable[[AttentionCall], Tensor | None],
        layers: Sequence[str] | None = None,
    ) -> None:
        self.model, self.layers, self.change = checked_model(model), checked_layers(layers), change
        self._seen: dict[str, None] = {}  # an ordered set
        self._met: dict[str, None] = {}  # likewise, of the selected calls
        self._scope: ModuleScope | None = None
        self._exit: ExitStack | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all attention modules seen so far, selected or not, in the order of execution."""
        return tuple(self._seen)

    def __enter__(self) -> HeadIntervention:
        if self._exit is not None:
            raise RuntimeError("`HeadIntervention` is already active; make a second one to nest.")
        self._seen, self._met = {}, {}
        self._scope = ModuleScope(self.model, lambda order, call: None)
        sites = AttentionSites(self._scope, self._meet, listening.is_paused, changes=True)
        with ExitStack() as stack:
            stack.enter_context(run_eagerly(self.model))
            stack.enter_context(self._scope.open())
            stack.enter_context(sites.open())
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._exit = self._exit, None
        scope, self._scope = self._scope, None
        if stack is not None:
            stack.close()
        if kind is None and scope is not None and scope.entered:
            check_found(self.model, self._seen, self.layers)

    def _meet(self, call: AttentionCall, weights: Tensor | None = None) -> Tensor | None:
        del weights
        named = None if self._scope is None else self._scope.named(call)
        if named is None or named.output is None:
            return None
        self._seen.setdefault(named.name)
        if not is_selected(named.name, self.layers):
            return None
        self._met.setdefault(call_name(named))
        batch, heads, queries, _ = named.shape
        output = named.output
        if not output.numel():
            return None  # a batch without samples: there is nothing to change
        with listening.paused():
            changed = self.change(replace(named, output=output.reshape(batch, heads, queries, -1)))
        if changed is None:
            return None
        expected = (batch, heads, queries, output.numel() // (batch * heads * queries))
        if changed.shape != expected:
            raise ValueError(
                f"`change` must return the shape of `call.output`, {expected}, got {tuple(changed.shape)}."
            )
        return changed.reshape(output.shape).to(output.dtype)


def gate_heads(model: nn.Module, gates: Mapping[str, Tensor], layers: Sequence[str] | None = None) -> HeadIntervention:
    """Multiply what heads put out by gates: 1 leaves a head as it is, 0 takes it away.

    A gate acts before the output projection, whose bias stays. Under grouped-query attention each query head has a gate
    of its own. Gates may have a graph: their gradients are those that
    :func:`attn_callbacks.functional.gate_gradient` computes.

    Args:
        model: The model, or a module around it.
        gates: By :func:`call_name` of each attention call: the attending module itself, not a layer around it. What is
            not named stays as it is.
        layers: As for :class:`HeadIntervention`.

    Shape:
        - gates: ``(heads,)``, or ``(batch, heads)`` for one of each sample

    Raises:
        AttentionNotFoundError: On leaving the block, if the model ran and no attention was seen.
        TypeError: If ``model`` is no module, or ``layers`` a single string.
        ValueError: In the forward, if gates have another shape; on leaving the block, if the model ran and a name is
            that of no attention call (or of one that ``layers`` leaves out), or ``layers`` matched nothing.

    Example:
        >>> model = nn.MultiheadAttention(8, num_heads=2, batch_first=True)
        >>> import torch
        >>> tokens = torch.ones(1, 3, 8)
        >>> with gate_heads(model, {"MultiheadAttention": torch.ones(2)}):
        ...     same, _ = model(tokens, tokens, tokens)
        >>> torch.equal(same, model(tokens, tokens, tokens)[0])
        True

    References:
        Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019, equation 2.
    """
    return _Gating(model, gates, layers)


class _Gating(HeadIntervention):
    """Multiplies outputs, and checks on leaving that every gate was somebody's."""

    def __init__(self, model: nn.Module, gates: Mapping[str, Tensor], layers: Sequence[str] | None) -> None:
        super().__init__(model, self._gated, layers)
        self._gates = dict(gates)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ran = self._scope is not None and self._scope.entered
        super().__exit__(kind, error, trace)
        unused = [name for name in self._gates if name not in self._met]
        if kind is None and ran and unused:
            raise ValueError(
                f"`gates` names no attention call: {', '.join(map(repr, unused))}. "
                f"Known: {', '.join(map(repr, self._met))}."
            )

    def _gated(self, call: AttentionCall) -> Tensor | None:
        gate = self._gates.get(call_name(call))
        return None if gate is None or call.output is None else call.output * _checked(gate, call)[..., None, None]


def _checked(gate: Tensor, call: AttentionCall) -> Tensor:
    batch, heads, _, _ = call.shape
    if gate.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"Gates of {call_name(call)!r} must have shape (heads,) = {(heads,)} or (batch, heads) = {(batch, heads)}, "
            f"got {tuple(gate.shape)}."
        )
    return gate.to(call.device)

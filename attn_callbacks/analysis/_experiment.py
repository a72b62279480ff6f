"""Run a model on batches again and again, with heads off or with gates on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from attn_callbacks.analysis._batches import outside_inference
from attn_callbacks.analysis._budget import Budget
from attn_callbacks.analysis._prefix import Prefix, PrefixRecorder
from attn_callbacks.analysis._quiet import drawing_devices, undisturbed
from attn_callbacks.analysis._recorded import Recorded
from attn_callbacks.analysis._switches import Gates, HeadMeans, Removal, Size
from attn_callbacks.analysis._table import HeadTable
from attn_callbacks.capture import AttentionCall, AttentionNotFoundError, HeadIntervention, call_name
from attn_callbacks.capture.selection import checked_layers, checked_model, is_selected

__all__ = ["HeadExperiment", "Loss"]

Loss = Callable[[nn.Module, Any], Tensor]
Change = Callable[[AttentionCall], Tensor | None]


class HeadExperiment:
    """A model, what it is run on, and its heads. All work happens inside :meth:`open`.

    Args:
        model: The model.
        batches: Read once and kept.
        loss: Returns one loss a sample; NaN for one that does not count.
        layers: Names or glob patterns of attention modules; ``None``: all.

    Raises:
        TypeError: If ``model`` is no module or ``layers`` a single string.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Loss, layers: Sequence[str] | None) -> None:
        self.model, self.layers = checked_model(model), checked_layers(layers)
        self._iterable, self._loss = batches, loss
        self._devices = drawing_devices(model)
        self.batches: tuple[Any, ...] = ()
        self.table = HeadTable({})
        self.unchanged: Tensor | None = None  # losses of the first batch

    @contextmanager
    def open(self, *, find: bool = True) -> Iterator[None]:
        """Put the model into evaluation, read the batches and find the heads.

        Args:
            find: Find them by a run of the first batch; else `gates` does.

        Raises:
            RuntimeError: If ``loss`` does not run the model.
            ValueError: If there is no batch.
        """
        with undisturbed(self.model):
            self.batches = tuple(map(outside_inference, self._iterable))
            if not self.batches:
                raise ValueError("`batches` holds no batch.")
            if find:
                size = Size(self._is_wanted)
                self.unchanged = self._run(self.batches[0], size, self.layers)
                self._found(size.heads)
            yield

    def find_all(self, budget: Budget) -> None:
        """Find the heads of layers that only run in other batches than the first, by a run of each.

        Args:
            budget: Says when to stop looking.
        """
        for batch in self.batches[1:]:
            if budget.is_spent:
                return
            size = Size(self._is_wanted)
            self._run(batch, size)
            self._found(size.heads)

    def losses(
        self,
        batch: Any,
        off: Iterable[int] = (),
        means: Mapping[str, Tensor] | None = None,
        recorded: Recorded | None = None,
    ) -> Tensor:
        """Return the losses ``(samples,)`` of a batch with some heads off, float64 on the CPU.

        Args:
            batch: The batch.
            off: Numbers of heads.
            means: What takes their place; ``None``: zeros.
            recorded: An unchanged run of this batch to begin from.
        """
        by_layer = self.table.by_layer(off)
        prefix, labels = recorded.start(by_layer) if recorded is not None else (None, ())
        if prefix is None:
            return self._run(batch, Removal(by_layer, means))
        return self._replayed(batch, prefix, Removal(by_layer, means, labels))

    def gates(
        self,
        batch: Any,
        off: Iterable[int] = (),
        look: Callable[[str, AttentionCall], None] | None = None,
        *,
        find: bool = False,
        from_off: bool = False,
        recorded: Recorded | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the losses ``(samples,)`` and the gradients of gates on all heads ``(all heads, samples)``.

        Gradients are NaN for layers that none reached, and 0 for heads that are off.

        Args:
            batch: The batch.
            off: Numbers of heads.
            look: Called with each of the calls.
            find: Take in layers that were not known.
            from_off: Only ask heads from the first layer on in which one is off; the others are NaN as well.
            recorded: With that, an unchanged run of this batch to begin from.

        Raises:
            ValueError: If the losses have no graph.
        """
        known, sizes, by_layer = bool(len(self.table)), self.table.sizes, self.table.by_layer(off)
        prefix, labels = recorded.start(by_layer) if recorded is not None else (None, None)
        wanted = (lambda _, call: self._is_wanted(call)) if find else (lambda name, _: name in sizes)
        begin = by_layer if from_off else ()
        gates = Gates(wanted, Removal(by_layer), look, begin, labels if prefix is not None else None)
        with torch.enable_grad(), nullcontext() if prefix is None else prefix.replayed():
            losses = self._raw(batch, gates, None if known else self.layers)
            if find:
                self._found(gates.heads)
            if not losses.requires_grad:
                raise ValueError(
                    "`loss` returned values without a graph, so that heads have no gradient. Let it compute them from "
                    "the model's output in torch, without `no_grad` or `detach`; a loss that has none needs "
                    "`ablate_heads`."
                )
            found = gates.gradients(losses)
        rows = [
            found[name].T if name in found else torch.full((heads, len(losses)), torch.nan, dtype=torch.float64)
            for name, heads in self.table.sizes.items()
        ]
        values = losses.detach().double().cpu()
        return values, torch.cat(rows).masked_fill(values.isnan(), torch.nan)

    def record(self, batch: Any) -> Recorded:
        """Run a batch unchanged, and keep what runs with heads off may take over."""
        recorder = PrefixRecorder(self.model)
        prefixes: dict[str, Prefix] = {}
        names: list[str] = []

        def note(call: AttentionCall) -> None:
            name = call_name(call)
            prefix = recorder.meet(name in self.table.sizes and name not in prefixes)
            names.append(name)
            if prefix is not None:
                prefixes[name] = prefix

        with recorder.watch():
            losses = self._run(batch, note)
        return Recorded(losses, prefixes, names)

    def can_reuse(self, batch: Any, recorded: Recorded, heads: Iterable[int]) -> bool:
        """Tell whether unchanged runs that begin at a layer give the losses of one that begins at the beginning.

        Run something with heads off between `record` and this: what a module keeps of the last run then shows.

        Args:
            batch: The batch.
            recorded: Its unchanged run.
            heads: Heads in whose layers runs shall begin.
        """
        layers = self.table.by_layer(heads)
        for name in [name for name in reversed(self.table.names) if name in layers]:  # what has run is as it was
            prefix, labels = recorded.start([name])
            if prefix is None:
                return False
            size = Size()
            try:
                losses = self._replayed(batch, prefix, size)
            except AttentionNotFoundError:
                return False
            same = torch.allclose(losses, recorded.losses, rtol=1e-5, atol=1e-7, equal_nan=True)
            if not same or size.calls != len(labels):
                return False
        return True

    def means(self, budget: Budget) -> dict[str, Tensor] | None:
        """Return the mean output of every head over all batches, ``(heads, head_dim)`` by layer.

        Args:
            budget: Counts the runs. ``None`` is returned where its time was up before the last one.
        """
        means = HeadMeans()
        for batch in self.batches:
            if budget.is_spent:
                return None
            self._run(batch, means)
            budget.step()
        return means.means()

    def _is_wanted(self, call: AttentionCall) -> bool:
        return is_selected(call.name, self.layers)

    def _found(self, heads: Mapping[str, int]) -> None:
        self.table = self.table.extended(heads)
        if not len(self.table):
            raise RuntimeError("`loss` runs no attention of `model`. Let it run the `model` that it is given.")

    def _replayed(self, batch: Any, prefix: Prefix, change: Change) -> Tensor:
        with prefix.replayed():
            return self._run(batch, change)

    def _run(self, batch: Any, change: Change, layers: Sequence[str] | None = None) -> Tensor:
        return self._raw(batch, change, layers).detach().double().cpu()

    def _raw(self, batch: Any, change: Change, layers: Sequence[str] | None = None) -> Tensor:
        with torch.random.fork_rng(self._devices), HeadIntervention(self.model, change, layers):
            losses = self._loss(self.model, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not len(losses):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"`loss` must return one loss per sample, a tensor of shape (samples,), got {got}.")
        return losses

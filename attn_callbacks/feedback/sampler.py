"""A sampler for one process and for many whose weights can be changed between epochs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, distributed
from torch.utils.data import DistributedSampler

from attn_callbacks._checks import at_least, integer
from attn_callbacks.feedback._drawing import draw_evenly, draw_independently

__all__ = ["DynamicDistributedSampler"]

_CHUNK = 65536  # indices that are Python numbers at one time
_EVEN = 1e-9  # relative spread of weights that rounding explains


class DynamicDistributedSampler(DistributedSampler[int]):
    r"""Draw training samples with weights that may change from epoch to epoch, alike in every process.

    Use it as ``DataLoader(train, batch_size, sampler=DynamicDistributedSampler(labels))``. Being a
    ``DistributedSampler``, it is left alone by Lightning, where any other sampler is wrapped and each process draws an
    order of its own. All processes make the same draw, from ``seed`` and epoch, and each takes its share of it. Without
    ``torch.distributed`` there is one process; that is looked up anew for each epoch, so the sampler may be built
    before processes are started.

    The weight of a sample is that of its cell, a class within a group, times its own. While all are equal an epoch is,
    to the index, that of ``DistributedSampler``: every sample once. New weights act from the next epoch on. An epoch
    costs one pass over the samples.

    Args:
        labels: Class number of every sample of the data set, from 0.
        groups: Group number of every sample, from 0; ``None``: there are no groups.
        num_samples: Samples drawn in an epoch, by all processes together; ``None``: as many as there are. The attribute
            of this name is, as in torch, the number that one process gets.
        num_replicas: Number of processes; ``None``: as many as ``torch.distributed`` has, else 1.
        rank: Number of this process; ``None``: that of ``torch.distributed``, else 0.
        seed: The same in all processes; ``seed_everything`` does not change it.
        drop_last: Drop what does not divide evenly among the processes, instead of repeating the first few.
        replacement: How unequal weights are drawn. ``True``: independently. ``False``: each sample as often as is to be
            expected, rounded up or down at random, so that none comes again before its weight demands it.
        shuffle: ``False`` gives the samples in their order while weights are equal; a weighted draw is always random.

    Shape:
        - labels, groups: ``(samples,)``

    Raises:
        ValueError: If numbers are negative, lengths differ, or ``rank`` is none of ``num_replicas``.
        TypeError: If labels or groups are not integers.

    Example:
        >>> sampler = DynamicDistributedSampler([0, 0, 0, 0, 0, 0, 1, 1])
        >>> sorted(sampler)
        [0, 1, 2, 3, 4, 5, 6, 7]
        >>> sampler.set_class_weights([1.0, 3.0])
        >>> sampler.shares
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
        >>> len(list(sampler))
        8
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        *,
        groups: Tensor | Sequence[int] | None = None,
        num_samples: int | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
        replacement: bool = True,
        shuffle: bool = True,
    ) -> None:
        label = _numbers("labels", labels)
        group = torch.zeros_like(label) if groups is None else _numbers("groups", groups)
        if len(group) != len(label):
            raise ValueError(f"`groups` must have one number a sample, got {len(group)} for {len(label)} `labels`.")
        shape = (int(group.max()) + 1, int(label.max()) + 1)
        self._cell = group * shape[1] + label  # (samples,)
        self._counts = self._cell.bincount(minlength=math.prod(shape)).reshape(shape)
        self._cell_weights = torch.ones(shape, dtype=torch.float64)
        self._sample_weights: Tensor | None = None
        self._draws = len(label) if num_samples is None else at_least("num_samples", num_samples, 1)
        self._place = (num_replicas, rank)
        self.has_groups = groups is not None
        self.replacement = replacement
        integer("seed", seed)
        super().__init__(range(len(label)), 1, 0, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self._take_place()

    @property
    def counts(self) -> Tensor:
        """Number of samples of each group and class, ``(groups, classes)``; one group where there are none."""
        return self._counts.clone()

    @property
    def cell_weights(self) -> Tensor:
        """Weight of each group and class, ``(groups, classes)``; a copy."""
        return self._cell_weights.clone()

    @property
    def weights(self) -> Tensor:
        """Weight of each sample, ``(samples,)``: that of its cell times its own."""
        weights = self._cell_weights.flatten()[self._cell]
        return weights if self._sample_weights is None else weights * self._sample_weights

    @property
    def natural_shares(self) -> Tensor:
        """Share of each group and class in an epoch while cells weigh the same, ``(groups, classes)``."""
        mass = self._mass(self._sample_weights)
        return mass / mass.sum()

    @property
    def shares(self) -> Tensor:
        """Share of each group and class to be expected in the next epoch, ``(groups, classes)``."""
        mass = self._mass(self._sample_weights) * self._cell_weights
        return mass / mass.sum()

    def set_class_weights(self, weights: Tensor | Sequence[float]) -> None:
        """Weigh samples by their class, alike in all groups; own weights of samples stay.

        Args:
            weights: Finite and not negative, ``(classes,)``; their scale does not matter.
        """
        table = _weights("weights", weights, self._cell_weights.shape[1:], "(classes,)")
        self._change(table.expand_as(self._cell_weights), self._sample_weights)

    def set_cell_weights(self, weights: Tensor | Sequence[Sequence[float]]) -> None:
        """Weigh samples by their group and class; own weights of samples stay.

        Args:
            weights: Finite and not negative, ``(groups, classes)``; their scale does not matter.
        """
        table = _weights("weights", weights, self._cell_weights.shape, "(groups, classes)")
        self._change(table, self._sample_weights)

    def set_sample_weights(self, weights: Tensor | Sequence[float] | None) -> None:
        """Give each sample a weight of its own, on top of that of its cell.

        Args:
            weights: Finite and not negative, ``(samples,)``; ``None``: all alike.
        """
        own = None if weights is None else _weights("weights", weights, self._cell.shape, "(samples,)")
        self._change(self._cell_weights, own)

    def reset(self) -> None:
        """Weigh all samples alike: epochs are ordinary ones again."""
        self._change(torch.ones_like(self._cell_weights), None)

    def state_dict(self) -> dict[str, object]:
        """Return weights, epoch and seed."""
        own = torch.empty(0, dtype=torch.float64) if self._sample_weights is None else self._sample_weights.clone()
        return {"cell_weights": self.cell_weights, "sample_weights": own, "epoch": self.epoch, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state; keys that it lacks keep their present value.

        Args:
            state: What :meth:`state_dict` returned, for the same samples.
        """
        cells, own = state.get("cell_weights", self._cell_weights), state.get("sample_weights", self._sample_weights)
        table = _weights("cell_weights", cells, self._cell_weights.shape, "(groups, classes)")
        none = own is None or (isinstance(own, Tensor) and own.numel() == 0)
        self._change(table, None if none else _weights("sample_weights", own, self._cell.shape, "(samples,)"))
        epoch, seed = state.get("epoch"), state.get("seed")
        self.epoch = epoch if isinstance(epoch, int) else self.epoch
        self.seed = seed if isinstance(seed, int) else self.seed

    def __iter__(self) -> Iterator[int]:
        self._take_place()
        drawn = self._draw()
        if len(drawn) < self.total_size:
            drawn = drawn.repeat(math.ceil(self.total_size / len(drawn)))
        share = drawn[self.rank : self.total_size : self.num_replicas]
        return chain.from_iterable(part.tolist() for part in share.split(_CHUNK))

    def __len__(self) -> int:
        self._take_place()
        return self.num_samples

    def __repr__(self) -> str:
        groups, classes = self._counts.shape
        return (
            f"DynamicDistributedSampler({len(self._cell)} samples, {groups} groups x {classes} classes, "
            f"seed={self.seed}, drop_last={self.drop_last}, replacement={self.replacement}, shuffle={self.shuffle})"
        )

    def _take_place(self) -> None:
        """Find out how many processes there are, and which one this is."""
        running = distributed.is_available() and distributed.is_initialized()
        replicas, rank = self._place
        if replicas is None:
            replicas = distributed.get_world_size() if running else 1
        if rank is None:
            rank = distributed.get_rank() if running else 0
        if not 0 <= rank < replicas:
            raise ValueError(f"`rank` must lie between 0 and `num_replicas` - 1 = {replicas - 1}, got {rank}.")
        self.num_replicas, self.rank = replicas, rank
        self.num_samples = self._draws // replicas if self.drop_last else math.ceil(self._draws / replicas)
        self.total_size = self.num_samples * replicas

    def _mass(self, own: Tensor | None) -> Tensor:
        counts = self._cell.bincount(own, minlength=self._counts.numel()) if own is not None else self._counts
        return counts.double().reshape(self._counts.shape)

    def _change(self, cells: Tensor, own: Tensor | None) -> None:
        if not float((self._mass(own) * cells).sum()) > 0:
            raise ValueError("Expected a weight above 0 for at least one sample, got none: nothing could be drawn.")
        self._cell_weights.copy_(cells)
        self._sample_weights = own

    def _draw(self) -> Tensor:
        """Return the samples of an epoch, those of all processes."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        weights = self.weights
        low, high = weights.aminmax()
        if high - low > _EVEN * high:
            return (draw_independently if self.replacement else draw_evenly)(weights, self._draws, generator)
        samples, rounds = len(weights), math.ceil(self._draws / len(weights))
        if not self.shuffle:
            return torch.arange(samples).repeat(rounds)[: self._draws]
        return torch.cat([torch.randperm(samples, generator=generator) for _ in range(rounds)])[: self._draws]


def _numbers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    numbers = torch.as_tensor(values).detach().cpu()
    if numbers.dim() != 1 or not len(numbers):
        raise ValueError(f"`{name}` must have one number a sample, got shape {tuple(numbers.shape)}.")
    if numbers.is_floating_point() or numbers.is_complex():
        raise TypeError(f"`{name}` must hold integers, got {numbers.dtype}.")
    if int(numbers.min()) < 0:
        raise ValueError(f"`{name}` must not be negative, got {int(numbers.min())}. Leave such samples out.")
    return numbers.long()


def _weights(name: str, values: object, shape: tuple[int, ...], axes: str) -> Tensor:
    weights = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if tuple(weights.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have shape {axes} = {tuple(shape)}, got {tuple(weights.shape)}.")
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"`{name}` must be finite and not negative.")
    return weights.clone()

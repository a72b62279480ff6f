"""One training step as the feedback that takes part in it sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._forward import ForwardCall
from attn_callbacks.callbacks._regions import on_tokens, region_on
from attn_callbacks.callbacks._substitute import holds, substitute
from attn_callbacks.capture import AttentionCall, AttentionRecorder

__all__ = ["FedStep", "step_seed"]


def step_seed(*numbers: int) -> int:
    """Mix numbers that tell a step (of a run, of a process) into a seed for random numbers of its own.

    Example:
        >>> step_seed(0, 7, 0) == step_seed(0, 7, 0), step_seed(0, 7, 0) == step_seed(7, 0, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class FedStep:
    """See :class:`attn_callbacks.feedback.TrainingStep`, the promise it keeps.

    Args:
        module: The LightningModule.
        schema: Where a batch has what.
        batch: The batch of the step; changed inputs take their place in it (:attr:`batch`).
        number: Optimiser steps taken before it.
        seed: Of its own random numbers.
    """

    def __init__(self, module: nn.Module, schema: BatchSchema, batch: Any, number: int, seed: int) -> None:
        self.batch, self.number = batch, number
        self.recorder: AttentionRecorder | None = None  # of the feedback whose turn it is
        self.call: ForwardCall | None = None
        self.output: Any = None
        self._module, self._schema, self._seed = module, schema, seed

    @property
    def calls(self) -> Sequence[AttentionCall]:
        """Attention of the step."""
        return () if self.recorder is None else self.recorder.calls

    @property
    def inputs(self) -> Tensor:
        """Floating inputs of the batch, or the embeddings of its token ids."""
        if self.call is None or self.call.continuous is None:
            raise ValueError(
                "No `nn.Embedding` looked up the token ids of the batch, so there is nothing continuous to look at. "
                "Say where the ids are: BatchSchema(inputs=...)."
            )
        return self.call.continuous

    @cached_property
    def logits(self) -> Tensor:
        """Logits of the step."""
        outputs = [] if self.call is None else self.call.outputs
        found = self._schema.step_logits(self.output, outputs)
        if found is None or not found.requires_grad:  # many return logits for a log, detached
            found = self._schema.forward_logits(outputs)
        if found is None:
            raise ValueError(
                "No `logits` were found in the output of `training_step`, nor did `forward` return any. Return "
                "{'loss': ..., 'logits': ...} from `training_step`, or say where they are: BatchSchema(logits=...)."
            )
        return found

    @property
    def loss(self) -> Tensor:
        """The loss that the step returned."""
        loss: Tensor = self.output["loss"] if isinstance(self.output, Mapping) else self.output
        return loss

    @cached_property
    def target(self) -> Tensor | None:
        """Class of each sample."""
        return self._tensor("target")

    @cached_property
    def group(self) -> Tensor | None:
        """Group of each sample."""
        return self._tensor("group")

    @cached_property
    def valid(self) -> Tensor | None:
        """Tokens that are not padding."""
        return self._schema.flags("valid", self.batch)

    @property
    def relevance(self) -> Tensor | None:
        """Tokens that should decide."""
        return self._tokens("relevance")

    @property
    def spurious(self) -> Tensor | None:
        """Tokens that must not decide."""
        return self._tokens("spurious")

    @cached_property
    def generator(self) -> torch.Generator:
        """A source of random numbers of its own."""
        return torch.Generator().manual_seed(self._seed)

    def marks(self, name: str) -> bool:
        """Whether the batch has a token set."""
        return self._schema.flags(name, self.batch) is not None

    def region(self, name: str, inputs: Tensor) -> Tensor | None:
        """Return where a token set lies on ``inputs``."""
        mask = self._schema.flags(name, self.batch)
        return None if mask is None else region_on(mask, inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the network once more from other continuous inputs."""
        if self.call is None:
            raise RuntimeError("The step was not watched: a feedback that calls `forward` must see 'inputs'.")
        logits = self._schema.forward_logits([self.call.from_continuous(inputs)])
        if logits is None or logits.shape != self.logits.shape:
            came = "none" if logits is None else f"{tuple(logits.shape)}"
            raise ValueError(
                f"What gets the `inputs` of the batch must return logits {tuple(self.logits.shape)}, got {came}."
                " Let `forward`, or one network directly below the module, lead from inputs to logits."
            )
        return logits

    def read_inputs(self) -> Tensor:
        """Return the inputs of the batch.

        Raises:
            ValueError: If there are none, or they are no tensor of the batch itself.
        """
        inputs = self._schema.read("inputs", self.batch)
        if not isinstance(inputs, Tensor) or not holds(self.batch, inputs):
            raise ValueError(
                "Feedback that acts on the inputs needs them as one tensor of the batch. Say where it is: "
                f"BatchSchema(inputs=...) must be a key or a position, got {type(inputs).__name__}."
            )
        return inputs

    def put_inputs(self, old: Tensor, new: Tensor) -> None:
        """Let the step start from other inputs."""
        self.batch = substitute(self.batch, old, new)

    def _tokens(self, name: str) -> Tensor | None:
        """Return a token set; pixels become patches where attention shows how many there are."""
        mask = self._schema.flags(name, self.batch)
        if mask is None or mask.dim() != 3 or not self.calls:
            return mask
        return on_tokens(mask, self.calls[0].shape[3])

    def _tensor(self, field: str) -> Tensor | None:
        found = self._schema.read(field, self.batch)
        return None if found is None else torch.as_tensor(found)

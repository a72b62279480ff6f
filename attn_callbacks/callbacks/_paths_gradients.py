"""Attention and its gradients for the first samples of a validation batch, from a forward of their own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attn_callbacks.analysis.attention_gradient import attention_gradients
from attn_callbacks.batch import BatchSchema
from attn_callbacks.callbacks._layers import known_tokens
from attn_callbacks.callbacks._paths_forward import SampleForward, differentiable
from attn_callbacks.callbacks._paths_maps import LayerMaps, check_size, read_layer
from attn_callbacks.capture import AttentionCall, AttentionRecorder

__all__ = ["GradientMaps", "Target", "token_position"]

Target = int | Literal["predicted", "label"]


class GradientMaps:
    """Runs a network again on the first samples of a batch, and differentiates one logit of each by its attention.

    Args:
        module: A LightningModule.
        layers: Names or glob patterns of attention modules; ``None`` takes all.
        schema: Where a batch has what.
        target: Class whose logit is differentiated.
        token: Whose logits, where every token has some, as in a language model.
        most: Longest sequence.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str] | None,
        schema: BatchSchema,
        target: Target,
        token: int | None,
        most: int,
    ) -> None:
        self._module, self._layers, self._schema = module, layers, schema
        self._target, self._token, self._most = target, token, most
        self._forward: SampleForward | None = None

    def watch(self, batch: Any) -> AbstractContextManager[None]:
        """Return what is to be entered around the step of a batch.

        Raises:
            ValueError: If the inputs are no tensor.
        """
        inputs = self._schema.read("inputs", batch)
        if not isinstance(inputs, Tensor):
            raise ValueError("The `inputs` of the batch are no tensor. Say where they are: BatchSchema(inputs=...).")
        self._forward = SampleForward(self._module, inputs)
        return self._forward.watch()

    def read(self, batch: Any, count: int) -> tuple[list[LayerMaps], list[int]]:
        """Return the layers of the first ``count`` samples of the batch that was watched, and the classes.

        Raises:
            ValueError: If there are no logits, or other ones than those of the step.
        """
        forward, self._forward = self._forward, None
        if forward is None:
            return [], []
        before = self._logits(forward.outputs)
        with differentiable(self._module):
            calls, output = self._again(forward, batch, count)
            scores = _class_scores(_same(self._logits([output]), before, count), calls, self._token)
            targets = self._targets(scores, batch)
            own = [call for call in calls if not call.is_cross]
            gradients = iter(attention_gradients(scores.gather(1, targets[:, None]).sum(), own))
        with torch.no_grad():
            layers = [
                read_layer(call.detach(), count, count, self._most, None if call.is_cross else next(gradients))
                for call in calls
            ]
        return layers, targets.tolist()

    def _again(self, forward: SampleForward, batch: Any, count: int) -> tuple[list[AttentionCall], Any]:
        with AttentionRecorder(self._module, self._layers) as recorder:
            output = forward.first(count, self._schema.size(batch) or count)
        valid = self._schema.flags("valid", batch)
        calls = [known_tokens(call, None if valid is None else valid[:count]) for call in recorder.calls]
        for call in calls:
            if not call.is_cross:
                check_size(call, count, self._most)
        return calls, output

    def _logits(self, outputs: Sequence[Any]) -> Tensor:
        found = self._schema.forward_logits(outputs)
        if found is None:
            found = next((output for output in reversed(outputs) if isinstance(output, Tensor)), None)
        if found is None or not 1 <= found.ndim <= 3:
            raise ValueError(
                "The forward returned no `logits` to differentiate. Let it return them, or an output with `.logits`."
            )
        return found

    def _targets(self, scores: Tensor, batch: Any) -> Tensor:
        predicted = scores.argmax(dim=1)
        if self._target == "predicted":
            return predicted
        if self._target == "label":
            labels = self._schema.read("target", batch)
            if labels is None or torch.as_tensor(labels).ndim != 1:
                raise ValueError("`target='label'` needs one class a sample. Say where: BatchSchema(target=...).")
            own = torch.as_tensor(labels, device=scores.device)[: len(scores)].long()
            return own.where((own >= 0) & (own < scores.shape[1]), predicted)
        if int(self._target) >= scores.shape[1]:
            raise ValueError(f"`target` must be one of the {scores.shape[1]} classes, got {self._target}.")
        return torch.full_like(predicted, int(self._target))


def token_position(real: Tensor, token: int) -> int | None:
    """Return the position of the n-th real token, ``None`` if there are fewer; negative numbers count from the last.

    Args:
        real: ``True`` for real tokens, ``(positions,)``.
        token: Its number.
    """
    places: list[int] = real.nonzero()[:, 0].tolist()
    return places[token] if -len(places) <= token < len(places) else None


def _same(logits: Tensor, before: Tensor, count: int) -> Tensor:
    """Return the logits if they are those of the step, up to what another precision or kernel makes of them."""
    # a sample of padding alone may have no logits, and is no reason to believe or refuse the others
    own, expected = (found.detach().float().nan_to_num(0.0, 0.0, 0.0) for found in (logits, before[:count]))
    if own.shape != expected.shape or float((own - expected).abs().max()) > 0.05 * float(expected.abs().max()) + 1e-3:
        raise ValueError(
            "The network gives other logits for the first samples alone than within their batch, so it cannot be "
            "explained on them: samples depend on one another, the step did not run in evaluation, it draws numbers "
            "there, or its forward gets a tensor that has a row for every sample by chance only."
        )
    return logits


def _class_scores(logits: Tensor, calls: Sequence[AttentionCall], token: int | None) -> Tensor:
    """Return ``(samples, classes)``; one logit a sample speaks for class 1 and against class 0."""
    if logits.ndim == 3:
        own = next((call for call in calls if not call.is_cross and call.shape[2] == logits.shape[1]), None)
        if token is None or own is None:
            raise ValueError("Every token has logits. Say with `token` whose are explained.")
        places = [token_position(real, token) or 0 for real in own.query_valid.cpu()]  # who lacks it is left out later
        return logits[torch.arange(len(logits), device=logits.device), places]
    if logits.ndim == 1 or logits.shape[1] == 1:
        positive = logits.reshape(-1, 1)
        return torch.cat([-positive, positive], dim=1)
    return logits

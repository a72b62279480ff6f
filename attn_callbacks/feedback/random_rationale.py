"""A control for attention guidance: the same guidance, towards and away from random tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from attn_callbacks._checks import integer
from attn_callbacks.bias import BiasReport, Finding
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.attention_guidance import AttentionGuidance
from attn_callbacks.feedback.step import StepFeedback, TrainingStep

__all__ = ["RandomRationaleControl", "random_tokens", "sample_keys"]

_FACTORS = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class RandomRationaleControl(StepFeedback):
    """Guide attention with random tokens in place of the annotated ones. A control to compare with, not a cure.

    Whatever guidance gains over it comes from *which* tokens were annotated, and not from a term in the loss; human
    rationales often do no better. Everything else is that of the guidance it wraps: terms, strength and control, when
    it is switched on.

    Each sample has as many random tokens as annotated ones, drawn among its real tokens: spurious ones first, then
    relevant ones among the rest. Its first and its last token (where ``[CLS]`` and ``[SEP]`` sit) are drawn only where
    the annotation marks them. The draw depends on ``seed`` and on the sample's inputs alone, so that a sample keeps its
    tokens in every epoch, batch and process, and after a resume; augmented inputs are new samples.

    Changes training. Answers what the guidance answers. Costs what that costs, and a pass over the inputs.

    Args:
        guidance: The guidance to imitate; it must not be given to the monitor as well.
        seed: Of the draw.

    Raises:
        TypeError: If ``guidance`` is no `AttentionGuidance`, or ``seed`` no integer.
        RuntimeError: In `term`, if the inputs of the step were not seen.

    Example:
        >>> control = RandomRationaleControl(AttentionGuidance(when="biased"), seed=1)
        >>> counts = torch.tensor([[[95, 5], [5, 95]], [[60, 40], [40, 60]]])
        >>> report = BiasReport(0, 100, counts, ("negative", "positive"), ("Amazon", "Tweets"))
        >>> [str(action).partition(" (")[0] for action in control.apply(report)]
        ['random rationales: attention guidance switched on with strength 1']
    """

    sees = frozenset({"attention"})

    def __init__(self, guidance: AttentionGuidance, seed: int = 0) -> None:
        if not isinstance(guidance, AttentionGuidance):
            raise TypeError(f"`guidance` must be an `AttentionGuidance`, got {guidance!r}.")
        self.guidance = guidance
        self.seed = integer("seed", seed)
        self.answers = guidance.answers
        self.layers = guidance.layers
        self._keys: Tensor | None = None  # of the present step

    @property
    def active(self) -> bool:
        """The term is added."""
        return self.acting and self.guidance.active

    @property
    def when(self) -> str:
        """When the guidance acts: ``"always"``, or from a finding on."""
        return self.guidance.when

    @property
    def early(self) -> str | None:
        """As the guidance."""
        return self.guidance.early

    def bind(self, module: nn.Module) -> None:
        """Start anew if the module is another one than last time.

        Args:
            module: The LightningModule.
        """
        self.guidance.bind(module)

    def change_inputs(self, inputs: Tensor, step: TrainingStep) -> None:
        """Look at the inputs of a step, by which samples are told apart, and leave them.

        Args:
            inputs: Token ids, pictures or features.
            step: The step.
        """
        self._keys = sample_keys(inputs, step.valid, self.seed)

    def term(self, step: TrainingStep) -> Tensor | None:
        """Return the term of the guidance for random tokens.

        Args:
            step: The step.
        """
        keys, self._keys = self._keys, None
        if not self.active:
            return None
        if keys is None:
            raise RuntimeError(
                "`RandomRationaleControl` did not see the inputs of the step: call `change_inputs` first."
            )
        spurious, relevance = random_tokens(keys, step.spurious, step.relevance, step.valid)
        return self.guidance.term(cast(TrainingStep, _Redrawn(step, spurious, relevance)))

    def apply(self, report: BiasReport) -> tuple[Action, ...]:
        """Do what the guidance does after a report.

        Args:
            report: What the last validation pass showed.
        """
        return tuple(
            replace(action, text=f"random rationales: {action.text}") for action in self.guidance.apply(report)
        )

    def answered(self, report: BiasReport) -> tuple[Finding, ...]:
        """Return the findings that the guidance answers.

        Args:
            report: What the last validation pass showed.
        """
        return self.guidance.answered(report)

    def state_dict(self) -> dict[str, object]:
        """Return the state of the guidance."""
        return {**super().state_dict(), "guidance": self.guidance.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state.

        Args:
            state: What :meth:`state_dict` returned.
        """
        saved = state.get("guidance")
        if isinstance(saved, Mapping):
            self.guidance.load_state_dict(saved)
        super().load_state_dict(state)

    def __repr__(self) -> str:
        return f"RandomRationaleControl({self.guidance!r}, seed={self.seed})"

    def _acting_changed(self) -> None:
        self.guidance.hold(not self.acting)


def sample_keys(inputs: Tensor, valid: Tensor | None = None, seed: int = 0) -> Tensor:
    """Hash each sample's inputs to an integer: equal inputs, equal integers, wherever they stand in a batch.

    Args:
        inputs: Token ids or floating inputs.
        valid: ``True`` for tokens, ``False`` for padding, which does not count where it has the shape of ``inputs``.
        seed: Another seed, other integers.

    Shape:
        - inputs: ``(batch, ...)``
        - valid: ``(batch, tokens)``
        - output: ``(batch,)``, int64

    Example:
        >>> short, padded = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0]])
        >>> bool(sample_keys(short) == sample_keys(padded, padded > 0))
        True
    """
    contents = inputs.detach().float().view(torch.int32) if inputs.is_floating_point() else inputs
    contents = contents.flatten(1).long()
    real = torch.ones_like(contents) if valid is None or valid.shape != inputs.shape else valid.long()
    place = real.cumsum(dim=1)
    total = (_mixed(contents + _FACTORS[0] * place) * real).sum(dim=1)
    return _mixed(total + _FACTORS[0] * torch.full_like(total, seed))


def random_tokens(
    keys: Tensor, spurious: Tensor | None, relevance: Tensor | None, valid: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Draw as many random tokens of each sample as are annotated, the two sets apart from each other.

    Args:
        keys: What :func:`sample_keys` returned: decides the draw.
        spurious: ``True`` on annotated tokens; ``None`` where there is no such annotation.
        relevance: Likewise.
        valid: ``True`` for tokens, ``False`` for padding, which is never drawn; ``None``: all are tokens.

    Shape:
        - keys: ``(batch,)``
        - spurious, relevance, valid, output: ``(batch, tokens)``
    """
    annotations = [mask for mask in (spurious, relevance) if mask is not None]
    if not annotations:
        return None, None
    marked = torch.stack([mask.bool() for mask in annotations]).any(dim=0)
    real = torch.ones_like(marked) if valid is None else valid.bool()
    place = real.long().cumsum(dim=1)  # 1 at the first token, whatever the padding
    ends = (place == 1) | (place == place[:, -1:])
    open_tokens = real & (marked | ~ends)
    order = _mixed(keys[:, None] + _FACTORS[0] * place) >> 1  # room for those that are never drawn
    order = order.masked_fill(~open_tokens, torch.iinfo(torch.int64).max)
    rank = order.argsort(dim=1).argsort(dim=1)  # (batch, tokens)
    drawn, start = [], torch.zeros_like(rank[:, :1])
    for mask in annotations:
        end = start + (mask.bool() & real).sum(dim=1, keepdim=True)
        drawn.append(open_tokens & (rank >= start) & (rank < end))
        start = end
    return (drawn[0] if spurious is not None else None), (drawn[-1] if relevance is not None else None)


class _Redrawn:
    """A step with other annotations."""

    def __init__(self, step: TrainingStep, spurious: Tensor | None, relevance: Tensor | None) -> None:
        self.spurious, self.relevance = spurious, relevance
        self._step = step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def _mixed(numbers: Tensor) -> Tensor:
    """Mix the bits of each number (SplitMix64 of Steele, Lea and Flood, 2014); overflow is part of it."""
    for shift, factor in ((30, _FACTORS[1]), (27, _FACTORS[2])):
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)

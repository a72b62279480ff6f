"""Adversarial training on continuous inputs, within the region that must not decide or everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn_callbacks._checks import check_number, one_of
from attn_callbacks.feedback._bound import check_loss
from attn_callbacks.feedback._switched import SwitchedFeedback
from attn_callbacks.feedback.step import TrainingStep

__all__ = ["AdversarialTraining"]

Loss = nn.Module | Callable[[Tensor, Tensor], Tensor]


class AdversarialTraining(SwitchedFeedback):
    """Add the loss at inputs that an attack has changed for the worse: pictures, features or word embeddings.

    Within a region that must not decide, it makes the network indifferent to what is there, as far as the attack
    reaches: choose its size about that of what the region holds. Words lie too far apart for most attacks: on token ids
    prefer :class:`~attn_callbacks.feedback.MaskRandomization`. Without a region it makes predictions robust to small
    changes of everything, which singles out no feature, so no finding calls for it.

    Changes training: the loss of steps, which is then that of clean inputs plus ``coefficient`` times that of attacked
    ones; a sample without the region counts as clean in both. Answers reliance on the region (a ``"feature"`` finding).
    Costs as many further passes as the attack takes: two forwards for one gradient step. Batch norm counts each as a
    batch. Random numbers of the attack and of dropout in it are drawn apart: they disturb no others, and a resumed run
    repeats them.

    Args:
        attack: Called as ``attack(closure, inputs, mask=mask)``, such as ``losses.FGM(1.0, norm="linf")``,
            ``losses.PGD()`` or ``losses.FreeLB()``; without learnable parameters.
        loss: Loss of logits and target for the attack; ``None``: cross entropy, the binary one for a single logit.
        coefficient: Factor on the adversarial loss, above 0.
        region: ``"spurious"``, or a token set that the batch schema names; ``None``: all that is not padding.
        closure: What the attack differentiates: ``"loss"`` of the perturbed inputs, or their ``"logits"``, for
            ``losses.VirtualAdversarialLoss()`` and ``losses.SMARTLoss()``, which need no labels.
        when: ``"biased"``: from the first report with a finding on; or ``"always"``.

    Raises:
        ValueError: If an argument is out of its range, ``attack`` has learnable parameters, or ``when="biased"`` has no
            region; in a step, if labels are missing or the attack returns no scalar.
        TypeError: If ``attack`` is no module, ``loss`` cannot be called, or ``coefficient`` is no number.

    Example:
        >>> import losses
        >>> feedback = AdversarialTraining(losses.FGM(1.0, norm="linf"))
        >>> feedback.active  # waits for a report that shows reliance on spurious tokens
        False
        >>> AdversarialTraining(losses.FreeLB(), region=None, when="always").active
        True

    References:
        Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.
        Miyato, Dai and Goodfellow, "Adversarial Training Methods for Semi-Supervised Text Classification", ICLR 2017
        (embeddings).
    """

    sees = frozenset({"inputs"})
    _name = "adversarial training"
    _strength_name = "coefficient"

    def __init__(
        self,
        attack: nn.Module,
        loss: Loss | None = None,
        *,
        coefficient: float = 1.0,
        region: str | None = "spurious",
        closure: str = "loss",
        when: str = "biased",
    ) -> None:
        super().__init__(region, when)
        self.attack = check_loss("attack", attack, "losses.FGM()")
        if loss is not None and not callable(loss):
            raise TypeError(f"`loss` must be called with logits and target, got {loss!r}.")
        check_number("coefficient", coefficient)
        if not 0 < coefficient < math.inf:
            raise ValueError(f"`coefficient` must be above 0 and finite, got {coefficient}.")
        if region is None and when == "biased":
            raise ValueError("`region=None` needs when='always': no finding tells of reliance on everything.")
        self.loss = loss
        self.coefficient = float(coefficient)
        self.closure = one_of("closure", closure, ("loss", "logits"))

    def term(self, step: TrainingStep) -> Tensor | None:
        """Return the adversarial loss; ``None`` while it is not active, or where the region is not marked.

        Args:
            step: The step.
        """
        if not self.active:
            return None
        inputs = step.inputs
        mask = step.region(self.region or "valid", inputs)
        if mask is None and self.region is not None:
            return None
        closure = _logits_of(step) if self.closure == "logits" else self._loss_of(step)
        with _own_randomness(inputs, step.generator):
            term: Tensor = self.attack.to(inputs.device)(closure, inputs, mask=mask)
        if term.dim() > 0:
            raise ValueError(f"`attack` must return a scalar, got shape {tuple(term.shape)}. Use reduction='mean'.")
        return self.coefficient * term

    def __repr__(self) -> str:
        return (
            f"AdversarialTraining({self.attack!r}, {self.loss!r}, coefficient={self.coefficient}, "
            f"region={self.region!r}, closure={self.closure!r}, when={self.when!r})"
        )

    @property
    def _strength(self) -> float:
        return self.coefficient

    def _loss_of(self, step: TrainingStep) -> Callable[[Tensor], Tensor]:
        target = step.target
        if target is None:
            raise ValueError(
                "`AdversarialTraining` needs the label of each sample, got none. Say where training batches have them: "
                "BatchSchema(target=...)."
            )
        loss = _cross_entropy if self.loss is None else self.loss

        def closure(inputs: Tensor) -> Tensor:
            logits = step.forward(inputs)
            return loss(logits, target.to(logits.device))

        return closure


def _is_single(logits: Tensor) -> bool:
    return logits.shape[1:].numel() == 1


def _logits_of(step: TrainingStep) -> Callable[[Tensor], Tensor]:
    """Return the forward pass, with logits of both classes for a binary head: a softmax of one is constant."""

    def closure(inputs: Tensor) -> Tensor:
        logits = step.forward(inputs)
        if not _is_single(logits):
            return logits
        single = logits.reshape(-1, 1)
        return torch.cat([torch.zeros_like(single), single], dim=1)

    return closure


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    if not _is_single(logits):
        return F.cross_entropy(logits, target)
    return F.binary_cross_entropy_with_logits(logits.flatten(), target.to(logits.dtype).flatten())


@contextmanager
def _own_randomness(inputs: Tensor, generator: torch.Generator) -> Iterator[None]:
    """Let torch draw from a seed of the step, and give it back the random numbers that it would have had."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
        torch.default_generator.manual_seed(seed)
        if inputs.is_cuda:
            with torch.cuda.device(inputs.device):
                torch.cuda.manual_seed(seed)
        yield

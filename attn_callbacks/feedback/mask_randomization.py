"""Mask randomisation: train on samples whose spurious tokens come from other samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from attn_callbacks._checks import in_range
from attn_callbacks.bias import Finding
from attn_callbacks.feedback._shuffle import moved, shuffle_region
from attn_callbacks.feedback._switched import SwitchedFeedback
from attn_callbacks.feedback.action import Action
from attn_callbacks.feedback.step import TrainingStep

__all__ = ["MaskRandomization"]

Transform = nn.Module | Callable[..., Tensor]


class MaskRandomization(SwitchedFeedback):
    """Replace what must not decide, in training inputs, by what stands there in other samples; labels stay.

    The region then no longer says anything about the label. The first thing to try against a shortcut, and the one that
    others have to beat: no hyperparameter, no second pass, no gradient; it needs the region marked in training batches.
    What it cannot tell is whether the label really depends on the region: then it takes away information.

    Changes training: the inputs of steps. Answers reliance on the region (a ``"feature"`` finding), not attention to
    it: attention mass is not reliance. While the finding stays, the share of randomised samples is doubled, up to 1.
    Costs one copy of the inputs a step.

    Args:
        transform: Called as ``transform(inputs, mask, generator=generator)``, such as
            ``losses.MaskRandomization("shuffle", protected=(0, 101, 102))``, which leaves special tokens alone.
            ``None`` takes the values of another sample of the batch at the same positions; padding is neither taken nor
            replaced. Where the region is most of the inputs, such as a background, it takes them from samples in which
            the position is in the region too, so that what decides in one sample does not get into another.
        region: ``"spurious"``, or a token set that the batch schema names.
        share: Share of the samples that are randomised, above 0. The rest keep the network used to what is really
            there.
        when: ``"biased"``: from the first report with a finding on; or ``"always"``.

    Raises:
        ValueError: If ``share`` or ``when`` is out of its range.
        TypeError: If ``transform`` cannot be called.

    Example:
        >>> MaskRandomization(when="always").active
        True
        >>> feedback = MaskRandomization(region="hashtags", share=0.5)
        >>> feedback.active  # waits for a report that shows reliance on hashtags
        False

    References:
        Teso and Kersting, "Explanatory Interactive Machine Learning", AIES 2019: corrections as counter-examples.
    """

    _name = "mask randomization"
    _strength_name = "share"

    def __init__(
        self,
        transform: Transform | None = None,
        *,
        region: str = "spurious",
        share: float = 1.0,
        when: str = "biased",
    ) -> None:
        super().__init__(region, when)
        if transform is not None and not callable(transform):
            raise TypeError(
                "`transform` must be called with inputs and mask, such as `losses.MaskRandomization()`, got "
                f"{transform!r}."
            )
        if in_range("share", share, 0, 1) == 0:
            raise ValueError("`share` must be above 0, got 0: nothing would ever be randomised.")
        self.transform = transform
        self.share = float(share)
        self._share = self.share

    def change_inputs(self, inputs: Tensor, step: TrainingStep) -> Tensor | None:
        """Return the inputs with the region randomised; ``None`` where it is not marked.

        Args:
            inputs: Token ids, pictures or features.
            step: The step.
        """
        region = step.region(str(self.region), inputs) if self.active else None
        if region is None:
            return None
        mask = region
        if self._share < 1:
            drawn = torch.rand(len(inputs), generator=step.generator) < self._share
            mask = mask & moved(drawn, mask.device).reshape(-1, *[1] * (mask.dim() - 1))
        if self.transform is not None:
            return self.transform(inputs, mask, generator=step.generator)
        valid = step.region("valid", inputs)
        known = torch.ones_like(mask) if valid is None else valid
        is_small = 2 * (region & known).sum() < known.sum()
        givers = known & (region | is_small)
        return shuffle_region(inputs, mask & known, givers, generator=step.generator)

    def state_dict(self) -> dict[str, object]:
        """Return whether it is switched on, and the share."""
        return {**super().state_dict(), "share": self._share}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up a saved state.

        Args:
            state: What :meth:`state_dict` returned.
        """
        super().load_state_dict(state)
        share = state.get("share")
        if isinstance(share, float):
            self._share = share

    def __repr__(self) -> str:
        return f"MaskRandomization({self.transform!r}, region={self.region!r}, share={self.share}, when={self.when!r})"

    @property
    def _strength(self) -> float:
        return self._share

    def _strengthen(self, finding: Finding) -> Sequence[Action]:
        old, new = self._share, min(1.0, 2 * self._share)
        if new == old:
            return ()
        self._share = new
        return (Action(f"{self.region}: share randomised {old:.2f} -> {new:.2f}", finding.key, old, new),)

    def _start_anew(self) -> None:
        super()._start_anew()
        self._share = self.share

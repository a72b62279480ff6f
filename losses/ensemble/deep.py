"""Several models as one, whose prediction is the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from losses._checks import at_least
from losses.ensemble._masks import Masks, feature_masks, masked_views
from losses.ensemble._members import mean_log_probabilities, stack_members

__all__ = ["DeepEnsemble"]


class DeepEnsemble(nn.Module):
    r"""Average the probabilities of several classifiers; train them one by one, use them as one model.

    Calling the ensemble returns :math:`\log \frac{1}{M} \sum_i p_i`. Its log-softmax is itself, so it goes wherever
    logits go: into a cross entropy, an ``argmax``, a monitor or a calibration.

    Train on the mean of the members' losses, from :meth:`member_logits`, as below or with :class:`EnsembleLoss`. The
    loss of the mean prediction would train them as one model: each then covers for the others, and their
    disagreement tells less about what is uncertain. Costs as many forward passes as there are members.

    Args:
        members: Classifiers with the same classes, best from different initial weights (:meth:`of`). Each returns
            logits, or something with ``.logits`` or ``["logits"]``.
        masks: Features of the first argument that each member sees, such as those of an :class:`EnsembleLoss`; ``None``
            shows all of them. Hidden features are zero. Part of the state dict.

    Shape:
        - masks: ``(members, features...)``, nonzero = sees it; aligned with the last axes of the inputs
        - forward: whatever the members take, to ``(samples, classes, positions...)``

    Raises:
        ValueError: If there is no member, the masks do not fit them, or a mask hides everything.
        TypeError: If a member is no module.

    Example:
        >>> ensemble = DeepEnsemble.of(lambda: nn.Linear(4, 3), members=5)
        >>> inputs, target = torch.randn(8, 4), torch.randint(3, (8,))
        >>> losses = [nn.functional.cross_entropy(logits, target) for logits in ensemble.member_logits(inputs)]
        >>> torch.stack(losses).mean().backward()
        >>> ensemble(inputs).exp().sum(dim=1).detach()
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])

    References:
        Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", NeurIPS
        2017 (five members, random initialisation, every member on all data).
    """

    masks: Tensor | None

    def __init__(self, members: Sequence[nn.Module], *, masks: Masks | None = None) -> None:
        super().__init__()
        for index, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise TypeError(f"`members[{index}]` must be a module, got {type(member).__name__}.")
        if not members:
            raise ValueError("`members` must hold at least one model, got none.")
        self.members = nn.ModuleList(members)
        self.register_buffer("masks", feature_masks(masks, len(self.members)))

    @classmethod
    def of(cls, factory: Callable[[], nn.Module], members: int = 5, *, masks: Masks | None = None) -> DeepEnsemble:
        """Build an ensemble of models that start from different weights.

        Args:
            factory: Returns a new model, with newly drawn weights, at every call.
            members: Number of models.
            masks: As for the class.

        Raises:
            ValueError: If ``members`` is below one, or two models start with the same weights.
            TypeError: If ``members`` is no whole number.
        """
        models = [factory() for _ in range(at_least("members", members, 1))]
        for index, model in enumerate(models[1:], start=1):
            if _same_weights(models[0], model):
                raise ValueError(
                    f"`factory` must draw new weights at every call, but members 0 and {index} start alike. Leave out "
                    "the seed in it, or pass a list of models to `DeepEnsemble` if that is meant."
                )
        return cls(models, masks=masks)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logarithm of the members' mean probabilities, ``(samples, classes, positions...)``."""
        return mean_log_probabilities(self.member_logits(*args, **kwargs))

    def member_logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits of every member, ``(members, samples, classes, positions...)``, to train on.

        Raises:
            ValueError: If the members' logits, or the inputs and the masks, do not fit together.
            TypeError: If a member returns no logits, or there are masks but no positional input to hide features of.
        """
        if self.masks is None:
            outputs = [member(*args, **kwargs) for member in self.members]
        else:
            if not args:
                raise TypeError("With `masks`, the inputs that they hide features of must be the first argument.")
            views = masked_views(args[0], self.masks, len(self.members))
            outputs = [member(view, *args[1:], **kwargs) for member, view in zip(self.members, views, strict=True)]
        return stack_members([_logits(output) for output in outputs])

    def extra_repr(self) -> str:
        """Show the masks; the members follow."""
        return "" if self.masks is None else f"masks=of shape {tuple(self.masks.shape)}"


def _logits(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"A member must return a tensor of logits, or something with `.logits` or `['logits']`, got "
            f"{type(output).__name__}."
        )
    return logits


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Return whether all parameters are equal; not told for those without values yet, lazy or on the meta device."""
    pairs = list(zip(first.parameters(), second.parameters(), strict=False))
    if any(nn.parameter.is_lazy(part) or part.is_meta for pair in pairs for part in pair):
        return False
    return bool(pairs) and all(torch.equal(mine, other) for mine, other in pairs)

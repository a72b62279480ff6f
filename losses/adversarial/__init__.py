"""Perturbations that make a loss worse, and the losses that withstand them.

All of them take a closure from inputs (embeddings, pixels) to a loss or to logits, find a perturbation with
``torch.autograd.grad`` and return one loss, so that a step needs one backward, as Lightning's does: the search leaves
the ``.grad`` of parameters, the optimizer and a gradient scaler alone. The closure runs several times a step: keep
logging out of it, and mind that forward hooks see every run.
"""

from __future__ import annotations

from losses.adversarial.fgm import FGM, fgm_perturbation
from losses.adversarial.freelb import FreeLB, freelb_loss
from losses.adversarial.pgd import PGD, pgd_perturbation
from losses.adversarial.smart import SMARTLoss, smart_loss
from losses.adversarial.virtual_adversarial import VirtualAdversarialLoss, virtual_adversarial_loss

__all__ = [
    "FGM",
    "PGD",
    "FreeLB",
    "SMARTLoss",
    "VirtualAdversarialLoss",
    "fgm_perturbation",
    "freelb_loss",
    "pgd_perturbation",
    "smart_loss",
    "virtual_adversarial_loss",
]

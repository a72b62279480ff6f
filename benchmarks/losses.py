"""What each loss costs: time and memory of forward and backward, all against plain cross entropy in the same run.

Run: ``python -m benchmarks.losses [folder for the JSON files] [device]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import losses
from benchmarks.memory import peak_bytes
from benchmarks.paired import compare, report

Arms = dict[str, Callable[[], object]]

SAMPLES, CLASSES, GROUPS = 4096, 1000, 4
BATCH, HEADS, TOKENS = 8, 12, 256


def classification(device: str) -> Arms:
    """Losses of logits ``(4096, 1000)``, which are cosines: LDAM scales them by 30."""
    logits = (2 * torch.rand(SAMPLES, CLASSES, device=device) - 1).requires_grad_()
    target = torch.randint(CLASSES, (SAMPLES,), device=device)
    group = torch.randint(GROUPS, (SAMPLES,), device=device)
    counts = torch.randint(1, 5000, (CLASSES,)).tolist()
    plain: Mapping[str, nn.Module] = {
        "WeightedCrossEntropyLoss": losses.WeightedCrossEntropyLoss(CLASSES),
        "FocalLoss": losses.FocalLoss(),
        "ClassBalancedLoss": losses.ClassBalancedLoss(counts),
        "LDAMLoss": losses.LDAMLoss(counts),
        "LogitAdjustedLoss": losses.LogitAdjustedLoss(counts),
        "BalancedSoftmaxLoss": losses.BalancedSoftmaxLoss(counts),
        "SeesawLoss": losses.SeesawLoss(CLASSES),
        "CVaRLoss": losses.CVaRLoss(),
    }
    grouped: Mapping[str, nn.Module] = {
        "GroupDROLoss": losses.GroupDROLoss(GROUPS),
        "WorstGroupLoss": losses.WorstGroupLoss(GROUPS),
    }
    multi = F.one_hot(target, CLASSES).float()
    calls: dict[str, Callable[[], Tensor]] = {"F.cross_entropy": lambda: F.cross_entropy(logits, target)}
    calls |= {name: partial(loss.to(device), logits, target) for name, loss in plain.items()}
    calls |= {name: partial(loss.to(device), logits, target, group=group) for name, loss in grouped.items()}
    calls["F.binary_cross_entropy, multi-label"] = lambda: F.binary_cross_entropy_with_logits(logits, multi)
    calls["SigmoidFocalLoss, multi-label"] = partial(losses.SigmoidFocalLoss(), logits, multi)
    return {name: trained(loss, logits) for name, loss in calls.items()}


def attention(device: str) -> Arms:
    """Losses of one layer's weights ``(8, 12, 256, 256)``, beside reading these twice."""
    weights = torch.randn(BATCH, HEADS, TOKENS, TOKENS, device=device).softmax(dim=-1).requires_grad_()
    other = torch.randn(BATCH, HEADS, TOKENS, TOKENS, device=device).softmax(dim=-1)
    mask = torch.rand(BATCH, TOKENS, device=device) < 0.1
    links = torch.rand(BATCH, TOKENS, TOKENS, device=device) < 0.02
    calls: dict[str, Callable[[], Tensor]] = {
        "reading the weights twice": lambda: weights.sum(dim=-1).mean() + weights.sum(dim=-1).mean()
    }
    for form in ("mass", "log", "kl", "js", "iou"):
        calls[f"AttentionGuidedLoss, {form}"] = partial(losses.AttentionGuidedLoss(form), weights, mask)
    calls |= {
        "AttentionSuppressionLoss": lambda: losses.attention_suppression(weights, mask),
        "AttentionEntropyLoss": lambda: losses.attention_entropy(weights),
        "AttentionSparsityLoss": lambda: losses.attention_sparsity(weights),
        "HeadDisagreementLoss": lambda: losses.head_disagreement(weights),
        "GuidedAlignmentLoss": lambda: losses.guided_alignment(weights, links),
        "AttentionConsistencyLoss": lambda: losses.attention_consistency(weights, other),
    }
    logits = torch.randn(SAMPLES, CLASSES, device=device).requires_grad_()
    target = torch.randint(CLASSES, (SAMPLES,), device=device)
    return {
        **{f"{name}: forward": looked_at(loss, weights) for name, loss in calls.items()},
        **{f"{name}: both": trained(loss, weights) for name, loss in calls.items()},
        "F.cross_entropy (4096, 1000): both": trained(lambda: F.cross_entropy(logits, target), logits),
    }


def steps(device: str) -> Arms:
    """Losses that call the model or its gradients, as training steps of an MLP: all against plain cross entropy."""
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    model.to(device)
    inputs = torch.randn(256, 256, device=device).requires_grad_()
    mask = torch.rand(256, 256, device=device) < 0.1
    target = torch.randint(10, (256,), device=device)
    bias_logits = torch.randn(256, 10, device=device)
    penalty, prior = losses.InputGradientPenalty().to(device), losses.LearnedMixinLoss(256).to(device)
    elastic, lasso = losses.ElasticNetPenalty(1e-4, 1e-4), losses.GroupLassoPenalty(1e-4)
    gradnorm = losses.GradNorm(2).to(device)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), target)

    def guarded() -> Tensor:
        logits = model(inputs)
        base = F.cross_entropy(logits, target)
        return base + penalty(logits, inputs, mask, base_loss=base)

    def two() -> list[Tensor]:
        logits = model(inputs)
        return [F.cross_entropy(logits, target), logits.square().mean()]

    calls: dict[str, Callable[[], Tensor]] = {
        "F.cross_entropy": lambda: plain(inputs),
        "InputGradientPenalty": guarded,
        "RationaleMarginLoss": lambda: (
            plain(inputs) + losses.rationale_margin_loss(model(inputs), model(inputs * ~mask), target)
        ),
        "MaskRandomization": lambda: plain(losses.randomize_masked(inputs, mask)),
        "ElasticNetPenalty": lambda: plain(inputs) + elastic(model[0].weight),
        "GroupLassoPenalty": lambda: plain(inputs) + lasso(model[0].weight),
        "FGM": lambda: plain(inputs) + losses.FGM()(plain, inputs),
        "PGD, 3 steps": lambda: plain(inputs) + losses.PGD()(plain, inputs),
        "FreeLB, 3 steps": lambda: losses.FreeLB()(plain, inputs),
        "SMARTLoss": lambda: plain(inputs) + losses.SMARTLoss()(model, inputs),
        "VirtualAdversarialLoss": lambda: plain(inputs) + losses.VirtualAdversarialLoss()(model, inputs),
        "ProductOfExpertsLoss": lambda: losses.product_of_experts_loss(model(inputs), target, bias_logits),
        "LearnedMixinLoss": lambda: prior(model(inputs), target, bias_logits, inputs),
        "two losses, added": lambda: torch.stack(two()).sum(),
        "two losses, GradNorm": lambda: gradnorm(two(), model[2].weight),
    }
    for name in ("UncertaintyWeighting", "DynamicWeightAverage", "RandomLossWeighting"):
        calls[f"two losses, {name}"] = balanced(getattr(losses, name)(2).to(device), two)
    arms: Arms = {name: trained(loss, inputs, *model.parameters()) for name, loss in calls.items()}
    surgery = losses.GradientSurgery("upgrad")
    arms["two losses, GradientSurgery"] = lambda: surgery.backward(two(), model.parameters())
    return arms


def balanced(weighting: nn.Module, losses_of_a_step: Callable[[], list[Tensor]]) -> Callable[[], Tensor]:
    """Return the balanced loss of a step."""
    return lambda: weighting(losses_of_a_step())


def ensembles(device: str) -> Arms:
    """Losses of five members' logits ``(5, 1024, 1000)``: all against the mean of their cross entropies."""
    logits = torch.randn(5, SAMPLES // 4, CLASSES, device=device).requires_grad_()
    target = torch.randint(CLASSES, (SAMPLES // 4,), device=device)
    own = losses.EnsembleLoss([nn.CrossEntropyLoss() for _ in range(5)])
    return {
        "F.cross_entropy of each member": trained(
            lambda: torch.stack([F.cross_entropy(member, target) for member in logits]).mean(), logits
        ),
        "NegativeCorrelationLoss": trained(lambda: losses.negative_correlation_loss(logits, target), logits),
        "EnsembleLoss": trained(lambda: own(logits, target).loss, logits),
    }


def trained(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward once."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()
        _wait(leaves[0])

    return run


def looked_at(loss: Callable[[], object], leaf: Tensor) -> Callable[[], None]:
    """Return a function that runs the forward once, without a graph."""

    @torch.no_grad()
    def run() -> None:
        loss()
        _wait(leaf)

    return run


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/benchmarks")
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for title, build in TABLES.items():
        arms = build(device)
        memory = {name: peak_bytes(run) for name, run in arms.items()} if device == "cpu" else {}
        report(f"{title} on {device}", compare(arms), folder, memory)


TABLES = {"classification": classification, "attention": attention, "training steps": steps, "ensembles": ensembles}

if __name__ == "__main__":
    main()

"""What the benchmark of the losses runs: one function a table, whose first arm is what the others are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import losses

Call = Callable[[], Tensor]
Arms = dict[str, Callable[[], object]]

SAMPLES, CLASSES, GROUPS = 4096, 1000, 4
BATCH, HEADS, TOKENS = 8, 12, 256


def classification(device: str) -> Arms:
    """Losses of logits ``(4096, 1000)``, which are cosines: LDAM scales them by 30."""
    logits, target = scores(device)
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
    smoothing = losses.LabelSmoothing(CLASSES)
    calls: dict[str, Call] = {"F.cross_entropy": lambda: F.cross_entropy(logits, target)}
    calls |= {name: partial(loss.to(device), logits, target) for name, loss in plain.items()}
    calls |= {name: partial(loss.to(device), logits, target, group=group) for name, loss in grouped.items()}
    calls["LabelSmoothing, then F.cross_entropy"] = lambda: F.cross_entropy(logits, smoothing(target))
    return {name: trained(loss, logits) for name, loss in calls.items()}


def multi_label(device: str) -> Arms:
    """Losses of one label for each class of logits ``(4096, 1000)``."""
    logits, target = scores(device)
    labels = F.one_hot(target, CLASSES).float()
    calls: dict[str, Call] = {
        "F.binary_cross_entropy_with_logits": lambda: F.binary_cross_entropy_with_logits(logits, labels),
        "SigmoidFocalLoss": partial(losses.SigmoidFocalLoss(), logits, labels),
        "F.cross_entropy": lambda: F.cross_entropy(logits, target),
    }
    return {name: trained(loss, logits) for name, loss in calls.items()}


def attention_calls(device: str) -> tuple[dict[str, Call], Tensor]:
    """Losses of one layer's weights ``(8, 12, 256, 256)``, beside reading these twice; and the weights."""
    weights = torch.randn(BATCH, HEADS, TOKENS, TOKENS, device=device).softmax(dim=-1).requires_grad_()
    other = torch.randn(BATCH, HEADS, TOKENS, TOKENS, device=device).softmax(dim=-1)
    mask = torch.rand(BATCH, TOKENS, device=device) < 0.1
    links = torch.rand(BATCH, TOKENS, TOKENS, device=device) < 0.02
    calls: dict[str, Call] = {
        "reading the weights twice": lambda: weights.sum(dim=-1).mean() + weights.sum(dim=-1).mean(),
        "AttentionSuppressionLoss": lambda: losses.attention_suppression(weights, mask),
        "AttentionEntropyLoss": lambda: losses.attention_entropy(weights),
        "AttentionSparsityLoss": lambda: losses.attention_sparsity(weights),
        "HeadDisagreementLoss": lambda: losses.head_disagreement(weights),
        "GuidedAlignmentLoss": lambda: losses.guided_alignment(weights, links),
        "AttentionConsistencyLoss": lambda: losses.attention_consistency(weights, other),
    }
    for form in ("mass", "log", "kl", "js", "iou"):
        calls[f"AttentionGuidedLoss, {form}"] = partial(losses.AttentionGuidedLoss(form), weights, mask)
    logits, target = scores(device)
    calls["F.cross_entropy (4096, 1000)"] = lambda: F.cross_entropy(logits, target)
    return calls, weights


def attention_forward(device: str) -> Arms:
    """The forward alone, without a graph."""
    calls, weights = attention_calls(device)
    return {name: looked_at(loss, weights) for name, loss in calls.items()}


def attention(device: str) -> Arms:
    """Forward and backward."""
    calls, weights = attention_calls(device)
    return {name: trained(loss, weights) for name, loss in calls.items()}


def steps(device: str) -> Arms:
    """Losses that call the model or its gradients, as training steps of an MLP."""
    model, inputs, target = problem(device)
    first = model[0].weight
    mask = torch.rand(inputs.shape, device=device) < 0.1
    bias_logits = torch.randn(len(inputs), 10, device=device)
    penalty, prior = losses.InputGradientPenalty(calibration_steps=0), losses.LearnedMixinLoss(256).to(device)
    elastic, lasso = losses.ElasticNetPenalty(1e-4, 1e-4), losses.GroupLassoPenalty(1e-4)

    def plain(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), target)

    def guarded() -> Tensor:
        logits = model(inputs)
        return F.cross_entropy(logits, target) + penalty(logits, inputs, mask)

    def rationale() -> Tensor:
        logits, without = model(inputs), model(inputs * ~mask)
        return F.cross_entropy(logits, target) + losses.rationale_margin_loss(logits, without, target)

    calls: dict[str, Call] = {
        "F.cross_entropy": lambda: plain(inputs),
        "InputGradientPenalty": guarded,
        "RationaleMarginLoss": rationale,
        "MaskRandomization": lambda: plain(losses.randomize_masked(inputs, mask)),
        "ElasticNetPenalty": lambda: plain(inputs) + elastic(first),
        "GroupLassoPenalty": lambda: plain(inputs) + lasso(first),
        "FGM": lambda: plain(inputs) + losses.FGM()(plain, inputs),
        "PGD, 3 steps": lambda: plain(inputs) + losses.PGD()(plain, inputs),
        "FreeLB, 3 steps": lambda: losses.FreeLB()(plain, inputs),
        "SMARTLoss": lambda: plain(inputs) + losses.SMARTLoss()(model, inputs),
        "VirtualAdversarialLoss": lambda: plain(inputs) + losses.VirtualAdversarialLoss()(model, inputs),
        "ProductOfExpertsLoss": lambda: losses.product_of_experts_loss(model(inputs), target, bias_logits),
        "LearnedMixinLoss": lambda: prior(model(inputs), target, bias_logits, inputs),
    }
    return {name: trained(loss, inputs, *model.parameters()) for name, loss in calls.items()}


def optimizer_steps(device: str) -> Arms:
    """A training step with AdamW, and with the proximal step of a penalty after it."""
    arms: Arms = {}
    penalties: dict[str, nn.Module | None] = {
        "F.cross_entropy and AdamW": None,
        "ElasticNetPenalty, attached": losses.ElasticNetPenalty(1e-4, 1e-4),
        "GroupLassoPenalty, attached": losses.GroupLassoPenalty(1e-4),
    }
    for name, penalty in penalties.items():
        model, inputs, target = problem(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if penalty is not None:
            penalty.attach(optimizer, model[0].weight)
        arms[name] = partial(optimizer_step, model, optimizer, inputs, target)
    return arms


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, target: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), target).backward()
    optimizer.step()
    wait(inputs)


def two_losses(device: str) -> Arms:
    """Two losses of one network, combined in several ways."""
    model, inputs, target = problem(device)

    def pair() -> list[Tensor]:
        logits = model(inputs)
        return [F.cross_entropy(logits, target), logits.square().mean()]

    balancer, gradnorm = losses.LossBalancer(["task", "size"]).to(device), losses.GradNorm(2).to(device)
    calls: dict[str, Call] = {
        "two losses, added": lambda: torch.stack(pair()).sum(),
        "LossBalancer": lambda: balancer(dict(zip(("task", "size"), pair(), strict=True))),
        "GradNorm": lambda: gradnorm(pair(), model[2].weight),
        "F.cross_entropy alone": lambda: F.cross_entropy(model(inputs), target),
    }
    for name in ("UncertaintyWeighting", "DynamicWeightAverage", "RandomLossWeighting"):
        calls[name] = balanced(getattr(losses, name)(2).to(device), pair)
    arms: Arms = {name: trained(loss, inputs, *model.parameters()) for name, loss in calls.items()}
    surgery = losses.GradientSurgery("upgrad")
    return {**arms, "GradientSurgery": lambda: surgery.backward(pair(), model.parameters())}


def balanced(weighting: nn.Module, losses_of_a_step: Callable[[], list[Tensor]]) -> Call:
    """Return the balanced loss of a step."""
    return lambda: weighting(losses_of_a_step())


def ensembles(device: str) -> Arms:
    """Losses of five members' logits ``(5, 1024, 1000)``, and five small networks as one."""
    logits = torch.randn(5, SAMPLES // 4, CLASSES, device=device).requires_grad_()
    target = torch.randint(CLASSES, (SAMPLES // 4,), device=device)
    own = losses.EnsembleLoss([nn.CrossEntropyLoss() for _ in range(5)])
    calls: dict[str, Call] = {
        "F.cross_entropy of each member": lambda: torch.stack(
            [F.cross_entropy(each, target) for each in logits]
        ).mean(),
        "NegativeCorrelationLoss": lambda: losses.negative_correlation_loss(logits, target),
        "EnsembleLoss": lambda: own(logits, target).loss,
    }
    return {name: trained(loss, logits) for name, loss in calls.items()}


def predictions(device: str) -> Arms:
    """What five networks as one cost to predict with."""
    models = [problem(device)[0] for _ in range(5)]
    inputs, ensemble = problem(device)[1], losses.DeepEnsemble(models)
    return {
        "five networks": looked_at(lambda: [model(inputs) for model in models], inputs),
        "DeepEnsemble": looked_at(lambda: ensemble(inputs), inputs),
    }


def scores(device: str) -> tuple[Tensor, Tensor]:
    """Return logits ``(4096, 1000)`` in [-1, 1], and their targets."""
    logits = (2 * torch.rand(SAMPLES, CLASSES, device=device) - 1).requires_grad_()
    return logits, torch.randint(CLASSES, (SAMPLES,), device=device)


def problem(device: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a network, inputs ``(256, 256)`` and targets."""
    layers = [nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    inputs = torch.randn(256, 256, device=device).requires_grad_()
    return nn.Sequential(*layers).to(device), inputs, torch.randint(10, (256,), device=device)


def trained(loss: Call, *leaves: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward once."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()
        wait(leaves[0])

    return run


def looked_at(call: Callable[[], object], leaf: Tensor) -> Callable[[], None]:
    """Return a function that runs the forward once, without a graph."""

    @torch.no_grad()
    def run() -> None:
        call()
        wait(leaf)

    return run


def wait(tensor: Tensor) -> None:
    """Let the device finish."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


TABLES: dict[str, Callable[[str], Arms]] = {
    "classification": classification,
    "multi-label": multi_label,
    "attention forward": attention_forward,
    "attention": attention,
    "training steps": steps,
    "optimizer steps": optimizer_steps,
    "two losses": two_losses,
    "ensembles": ensembles,
    "predictions": predictions,
}

"""What all adversarial losses promise: one network per step, nothing left behind, masks, mixed precision, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses.adversarial import (
    FGM,
    PGD,
    FreeLB,
    SMARTLoss,
    VirtualAdversarialLoss,
    fgm_perturbation,
    freelb_loss,
    pgd_perturbation,
    smart_loss,
    virtual_adversarial_loss,
)

ON_LOSS = [
    pytest.param(FGM(), id="FGM"),
    pytest.param(PGD(random_start=True), id="PGD"),
    pytest.param(PGD(0.1, 0.05, 2, "linf", random_start=True), id="PGD-linf"),
    pytest.param(FreeLB(), id="FreeLB"),
]
ON_LOGITS = [
    pytest.param(SMARTLoss(0.1, 0.1, steps=2), id="SMARTLoss"),
    pytest.param(VirtualAdversarialLoss(steps=2), id="VirtualAdversarialLoss"),
]
EVERY = ON_LOSS + ON_LOGITS
FORWARDS = {"FGM": 2, "PGD": 4, "PGD-linf": 3, "FreeLB": 3, "SMARTLoss": 4, "VirtualAdversarialLoss": 4}

TARGET = torch.tensor([0, 2, 1, 1])


class Model(nn.Module):
    """Mean of tokens, dropout, two layers; remembers what it saw."""

    def __init__(self, dropout=0.0, normalise=False):
        super().__init__()
        self.inner = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16) if normalise else nn.Identity()
        self.outer = nn.Linear(16, 3)
        self.dropout = dropout
        self.seen = []

    def forward(self, embeddings):
        keep = F.dropout(torch.ones(4, 16, device=embeddings.device), self.dropout, self.training)
        state = torch.get_rng_state()
        self.seen.append(
            {
                "inputs": embeddings.detach().clone(),
                "keep": keep,
                "state": state,
                "training": self.training,
                "grad": torch.is_grad_enabled(),
                "autocast": torch.is_autocast_enabled(embeddings.device.type),
            }
        )
        return self.outer(self.norm(torch.tanh(self.inner(embeddings.mean(dim=1)))) * keep)


def call(module, model, inputs, mask=None, target=TARGET):
    if isinstance(module, SMARTLoss | VirtualAdversarialLoss):
        return module(model, inputs, mask)
    return module(lambda embeddings: F.cross_entropy(model(embeddings).float(), target), inputs, mask)


def perturbations(model, inputs):
    return [seen["inputs"] - inputs.detach() for seen in model.seen]


@pytest.mark.parametrize("module", EVERY)
def test_all_forwards_meet_the_same_dropout_mask(module, request):
    model = Model(dropout=0.5)
    call(module, model, torch.randn(4, 5, 6))
    assert len(model.seen) == FORWARDS[request.node.callspec.id]
    first = model.seen[0]["keep"]
    assert first.eq(0).any()
    assert all(torch.equal(seen["keep"], first) for seen in model.seen)


@pytest.mark.parametrize("module", EVERY)
def test_the_random_stream_goes_on_as_after_one_forward(module):
    model = Model(dropout=0.5)
    call(module, model, torch.randn(4, 5, 6))
    assert torch.equal(torch.get_rng_state(), model.seen[0]["state"])
    before = model.seen[0]["keep"]
    call(module, model, torch.randn(4, 5, 6))
    assert not torch.equal(model.seen[-1]["keep"], before)


@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_and_batch_statistics_see_every_forward(module, training):
    model = Model(normalise=True).train(training)
    call(module, model, torch.randn(4, 5, 6))
    assert {seen["training"] for seen in model.seen} == {training} == {model.norm.training}
    assert model.norm.num_batches_tracked == (len(model.seen) if training else 0)


@pytest.mark.parametrize("module", EVERY)
def test_the_search_touches_no_gradient(module):
    model, embedding = Model(), nn.Embedding(10, 6)
    weights = [*model.parameters(), *embedding.parameters()]
    for weight in weights:
        weight.grad = torch.full_like(weight, 7.0)
    inputs = embedding(torch.randint(10, (4, 5)))
    inputs.retain_grad()
    call(module, model, inputs)
    assert all(weight.grad.eq(7.0).all() for weight in weights)
    assert inputs.grad is None


@pytest.mark.parametrize("module", EVERY)
def test_one_backward_trains_the_model_and_the_embedding(module):
    model, embedding = Model(dropout=0.2), nn.Embedding(10, 6)
    inputs = embedding(torch.randint(10, (4, 5)))
    loss = F.cross_entropy(model(inputs), TARGET) + call(module, model, inputs)
    loss.backward()
    for weight in (*model.parameters(), *embedding.parameters()):
        assert weight.grad.isfinite().all()
        assert weight.grad.ne(0).any()


@pytest.mark.parametrize("module", EVERY)
def test_plain_pixels_need_no_graph(module):
    model = Model()
    pixels = torch.rand(4, 5, 6)
    call(module, model, pixels).backward()
    assert model.inner.weight.grad.ne(0).any()
    assert not pixels.requires_grad


@pytest.mark.parametrize("module", EVERY)
def test_without_gradients_the_value_is_the_same_and_has_no_graph(module):
    model, inputs = Model(dropout=0.2), torch.randn(4, 5, 6, requires_grad=True)
    torch.manual_seed(1)
    expected = call(module, model, inputs)
    torch.manual_seed(1)
    with torch.no_grad():
        loss = call(module, model, inputs)
    assert not loss.requires_grad
    assert expected.requires_grad
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("module", EVERY)
def test_every_forward_runs_with_gradients_on(module):
    """Autocast keeps the weights that it cast under `no_grad`: later forwards would not train them (pytorch#112583)."""
    model, inputs = Model(), torch.randn(4, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(module, model, inputs)
    loss.backward()
    assert all(seen["grad"] for seen in model.seen)
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("module", EVERY)
def test_inference_mode_is_refused(module):
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Trainer\(inference_mode=False\)"):
        call(module, Model(), torch.randn(4, 5, 6))


@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("kind", ["tokens", "integers", "entries"])
def test_nothing_changes_outside_the_mask(module, kind):
    model, inputs = Model(), torch.randn(4, 5, 6)
    mask = torch.rand(4, 5, 6) < 0.5 if kind == "entries" else torch.rand(4, 5) < 0.5
    mask[1], mask[2, 3] = False, True
    call(module, model, inputs, mask.long() if kind == "integers" else mask)
    outside = ~(mask if kind == "entries" else mask[..., None].expand_as(inputs))
    moved = perturbations(model, inputs)
    assert all(change[outside].eq(0).all() for change in moved)
    assert moved[-1][2].ne(0).any()
    assert moved[-1][1].eq(0).all()


@pytest.mark.parametrize("module", EVERY)
def test_a_mask_of_pixels_spans_the_channels(module):
    images, mask = torch.rand(4, 3, 2, 5), torch.rand(4, 2, 5) < 0.4
    mask[:, 0, 0] = True
    model = Model()

    def flat(images):
        return model(images.transpose(1, 2).flatten(2).unflatten(2, (5, 3)).flatten(1).reshape(4, 5, 6))

    if isinstance(module, SMARTLoss | VirtualAdversarialLoss):
        seen = []
        module(lambda x: (seen.append(x.detach()), flat(x))[1], images, mask)
    else:
        seen = []
        module(lambda x: (seen.append(x.detach()), F.cross_entropy(flat(x), TARGET))[1], images, mask)
    change = seen[-1] - images
    assert change.transpose(0, 1)[:, ~mask].eq(0).all()
    assert change.transpose(0, 1)[:, mask].ne(0).any(dim=0).all()


@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (4, 5, 1), (1, 5, 1), (1, 1, 6)])
def test_an_axis_of_size_one_repeats_the_mask(module, shape):
    model, inputs, mask = Model(), torch.randn(4, 5, 6), torch.rand(shape) < 0.5
    mask.flatten()[0] = True
    full = (mask if mask.dim() == 3 else mask[..., None]).expand(4, 5, 6)
    losses = []
    for each in (mask, full):
        torch.manual_seed(1)
        losses.append(call(module, model, inputs, each))
    assert torch.equal(*losses)


@pytest.mark.parametrize("module", ON_LOSS)
def test_an_empty_mask_gives_the_clean_loss(module):
    model, inputs = Model(), torch.randn(4, 5, 6)
    loss = call(module, model, inputs, torch.zeros(4, 5, dtype=torch.bool))
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(model(inputs), TARGET))
    assert model.inner.weight.grad.isfinite().all()


@pytest.mark.parametrize("module", EVERY)
def test_a_zero_gradient_moves_nothing(module):
    model, inputs = Model(), torch.randn(4, 5, 6)
    nn.init.zeros_(model.inner.weight)
    loss = call(module, model, inputs)
    loss.backward()
    assert loss.isfinite()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    if isinstance(module, FGM | VirtualAdversarialLoss):
        assert perturbations(model, inputs)[-1].eq(0).all()
    if isinstance(module, SMARTLoss | VirtualAdversarialLoss):
        torch.testing.assert_close(loss, torch.tensor(0.0))


@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("samples", [0, 1])
def test_few_samples(module, samples):
    weight = torch.randn(6, 3, requires_grad=True)
    if isinstance(module, SMARTLoss | VirtualAdversarialLoss):
        loss = module(lambda x: x.sum(dim=1) @ weight, torch.randn(samples, 5, 6))
    else:
        loss = module(lambda x: (x.sum(dim=1) @ weight).sum(), torch.randn(samples, 5, 6))
    loss.backward()
    assert loss.isfinite()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_single_precision(module, dtype):
    model, inputs = Model(), torch.randn(4, 5, 6)
    torch.manual_seed(1)
    expected = call(module, model, inputs)
    model.seen.clear()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype):
        loss = call(module, model, inputs)
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=1e-3)
    alone = isinstance(module, SMARTLoss | VirtualAdversarialLoss)
    assert {seen["autocast"] for seen in model.seen} == {not alone}


@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_gets_its_own_dtype(module, dtype):
    model = Model().to(dtype)
    model.forward = lambda x: model.outer(torch.tanh(model.inner(x.mean(dim=1))))
    inputs = torch.randn(4, 5, 6, dtype=dtype, requires_grad=True)
    if isinstance(module, VirtualAdversarialLoss):
        module = VirtualAdversarialLoss(xi=1.0)
    loss = call(module, model, inputs)
    loss.backward()
    assert loss.dtype == torch.float32
    assert inputs.grad.dtype == dtype
    assert all(weight.grad.isfinite().all() for weight in (inputs, *model.parameters()))


@pytest.mark.parametrize("module", EVERY)
def test_a_gradient_scaler_outside_changes_nothing(module):
    model, inputs = Model(), torch.randn(4, 5, 6)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    gradients = []
    for scaled in (False, True):
        optimizer.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = call(module, model, inputs)
        (scaler.scale(loss) if scaled else loss).backward()
        if scaled:
            scaler.unscale_(optimizer)
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for plain, unscaled in zip(*gradients, strict=True):
        torch.testing.assert_close(unscaled, plain, rtol=2e-2, atol=1e-4)
    before = model.inner.weight.clone()
    scaler.step(optimizer)
    assert not torch.equal(model.inner.weight, before)


def direction_in_half(loss_of_logit, factor):
    """Return the largest naive gradient in float16, and the cosines of our direction with the exact one."""
    weight, inputs = torch.randn(6), torch.rand(4, 6) + 0.5

    def loss(x):
        return loss_of_logit((x.half() * weight.half()).sum(dim=1).float()) * factor

    point = inputs.half().requires_grad_()
    naive = torch.autograd.grad(loss(point), point)[0]
    found = fgm_perturbation(loss, inputs.half()).float()
    return naive, F.cosine_similarity(found, weight.expand_as(found).float())


@pytest.mark.parametrize("factor", [1e-9, 1e-6, 1.0, 1e6])
def test_gradients_of_half_precision_neither_underflow_nor_overflow(factor):
    naive, cosine = direction_in_half(torch.Tensor.mean, factor)
    if factor < 1e-8:
        assert naive.eq(0).all()  # what would become no perturbation at all
    if factor > 1e5:
        assert naive.isinf().any()  # what would become NaN
    torch.testing.assert_close(cosine.abs(), torch.ones(4), rtol=1e-3, atol=0)


def test_a_large_batch_of_a_mean_loses_no_small_entries():
    weight = torch.tensor([1.0, 3e-5]).half()
    inputs = torch.ones(2**14, 2).half()
    found = fgm_perturbation(lambda x: (x * weight).sum(dim=1).float().mean(), inputs).float()
    torch.testing.assert_close(found, weight.float().expand(2**14, 2), rtol=1e-2, atol=0)


def test_a_small_loss_in_half_precision():
    weight = torch.tensor([1e-3, -2e-3]).half()
    found = fgm_perturbation(lambda x: (x * weight).sum(), torch.full((3, 2), -0.01).half()).float()
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0]).expand(3, 2) / 5**0.5, rtol=2e-3, atol=0)


def test_the_direction_does_not_depend_on_the_reduction():
    model, inputs = Model().half(), torch.randn(4, 5, 6).half()
    model.forward = lambda x: model.outer(torch.tanh(model.inner(x.mean(dim=1)))).float()
    mean = fgm_perturbation(lambda x: F.cross_entropy(model(x), TARGET), inputs)
    total = fgm_perturbation(lambda x: F.cross_entropy(model(x), TARGET, reduction="sum"), inputs)
    torch.testing.assert_close(mean, total, rtol=2e-2, atol=2e-3)


def test_a_sample_whose_gradient_overflows_stays_as_it_is():
    def overflowing(x):
        x = x * 1
        x.register_hook(lambda gradient: gradient * torch.tensor([[1.0], [torch.inf]]))
        return x.sum()

    found = fgm_perturbation(overflowing, torch.ones(2, 3))
    torch.testing.assert_close(found[0], torch.full((3,), 3**-0.5))
    assert found[1].eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(module, dtype):
    model, embedding = Model(dropout=0.5).cuda(), nn.Embedding(10, 6).cuda()
    weights = [*model.parameters(), *embedding.parameters()]
    optimizer, scaler = torch.optim.SGD(weights, lr=0.1), torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        inputs = embedding(torch.randint(10, (4, 5), device="cuda"))
        loss = call(module, model, inputs, torch.rand(4, 5, device="cuda") < 0.8, TARGET.cuda())
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    first = model.seen[0]["keep"]
    assert first.eq(0).any()
    assert all(torch.equal(seen["keep"], first) for seen in model.seen)
    assert loss.isfinite()
    assert all(weight.isfinite().all() for weight in weights)


LOSS_CALLS = [fgm_perturbation, pgd_perturbation, freelb_loss]
LOGIT_CALLS = [smart_loss, virtual_adversarial_loss]


@pytest.mark.parametrize("function", LOSS_CALLS)
@pytest.mark.parametrize(
    ("forward_loss", "error", "message"),
    [
        (lambda x: x.sum(dim=1), ValueError, r"must return a scalar, got shape \(2,\). Reduce it, for example by"),
        (lambda x: (x.sum(), x), TypeError, r"must return a scalar tensor, got tuple. Return the loss alone"),
        (lambda x: 1.0, TypeError, r"`forward_loss` must return a scalar tensor, got float"),
        (lambda x: torch.ones(()), ValueError, r"`forward_loss` must compute its result from the tensor it is given"),
        (lambda x: x.detach().sum(), ValueError, r"Use the closure's argument instead of the clean inputs, without"),
        (lambda x: torch.ones((), requires_grad=True) * 2, ValueError, r"no gradient reaches that tensor"),
    ],
)
def test_what_a_closure_of_a_loss_must_return(function, forward_loss, error, message):
    with pytest.raises(error, match=message):
        function(forward_loss, torch.zeros(2, 3))


@pytest.mark.parametrize("function", LOGIT_CALLS)
@pytest.mark.parametrize(
    ("forward_logits", "error", "message"),
    [
        (lambda x: x.sum(), ValueError, r"of shape \(samples, classes, positions...\) with 2 samples, got \(\)"),
        (lambda x: x[:1], ValueError, r"with 2 samples, got \(1, 3\)"),
        (lambda x: x[:, :1], ValueError, r"at least 2 classes, got shape \(2, 1\).*torch.cat\(\[torch.zeros_like\(z\)"),
        (lambda x: {"logits": x}, TypeError, r"`forward_logits` must return logits as a tensor, got dict"),
        (lambda x: torch.ones(2, 3), ValueError, r"`forward_logits` must compute its result from the tensor"),
        (lambda x: torch.ones(2, 3, requires_grad=True) * 2, ValueError, r"`forward_logits` .* no gradient reaches"),
    ],
)
def test_what_a_closure_of_logits_must_return(function, forward_logits, error, message):
    with pytest.raises(error, match=message):
        function(forward_logits, torch.zeros(2, 3))


@pytest.mark.parametrize("function", LOSS_CALLS + LOGIT_CALLS)
@pytest.mark.parametrize(
    ("inputs", "mask", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.long), None, TypeError, r"got torch.int64: token ids .* Pass their embeddings"),
        ([[1.0, 2.0]], None, TypeError, r"`inputs` must be a tensor of embeddings or pixels, got list"),
        (torch.zeros(2), None, ValueError, r"`inputs` must have at least 2 axes \(samples, ...\), got shape \(2,\)"),
        (
            torch.zeros(2, 3, 4),
            torch.ones(2, 4),
            ValueError,
            r"or \(2, 3\), without the axis of features, got \(2, 4\)",
        ),
        (torch.zeros(2, 3, 4), torch.ones(3, 4), ValueError, r"shape of `inputs`, \(2, 3, 4\), or \(2, 3\), without"),
        (torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4), ValueError, r"or \(2, 4, 5\), without the axis of features"),
        (torch.zeros(2, 3), torch.ones(2), ValueError, r"got \(2,\). An axis of size one repeats the mask"),
        (torch.zeros(2, 3), [True, False], TypeError, r"`mask` must be a tensor, got list"),
        (
            torch.zeros(2, 3),
            torch.tensor([[0.0], [-torch.inf]]),
            ValueError,
            r"`mask` must lie between 0 and 1, got -inf",
        ),
    ],
)
def test_what_inputs_and_mask_must_be(function, inputs, mask, error, message):
    with pytest.raises(error, match=message):
        function(lambda x: x, inputs, mask=mask)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FGM(-1), r"`epsilon` must be a finite number, at least 0, got -1"),
        (lambda: FGM(norm="l1"), r"`norm` must be one of 'l2', 'linf', got 'l1'"),
        (lambda: PGD(epsilon=float("nan")), r"`epsilon` must be a finite number"),
        (lambda: PGD(step_size=-0.1), r"`step_size` must be a finite number"),
        (lambda: PGD(steps=0), r"`steps` must be at least 1, got 0"),
        (lambda: PGD(norm="max"), r"`norm` must be one of"),
        (
            lambda: PGD(bounds=(1, 0)),
            r"`bounds` must be the smallest and the largest value of the inputs, got \(1, 0\)",
        ),
        (lambda: FreeLB(epsilon=-1), r"`epsilon`"),
        (lambda: FreeLB(step_size=-1), r"`step_size`"),
        (lambda: FreeLB(steps=0), r"`steps` must be at least 1, got 0"),
        (lambda: FreeLB(start_size=-1), r"`start_size`"),
        (lambda: SMARTLoss(epsilon=-1), r"`epsilon`"),
        (lambda: SMARTLoss(step_size=-1), r"`step_size`"),
        (lambda: SMARTLoss(steps=0), r"`steps`"),
        (lambda: SMARTLoss(noise=-1), r"`noise`"),
        (lambda: SMARTLoss(reduction="batchmean"), r"`reduction` must be one of 'none', 'mean', 'sum'"),
        (lambda: VirtualAdversarialLoss(epsilon=-1), r"`epsilon`"),
        (lambda: VirtualAdversarialLoss(xi=-1), r"`xi`"),
        (lambda: VirtualAdversarialLoss(steps=0), r"`steps`"),
        (lambda: VirtualAdversarialLoss(reduction="batchmean"), r"`reduction`"),
    ],
)
def test_construction_checks(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (FGM(2.0), "FGM(epsilon=2.0, norm='l2')"),
        (
            PGD(bounds=[0, 1]),
            "PGD(epsilon=1.0, step_size=0.3, steps=3, norm='l2', random_start=False, bounds=(0, 1))",
        ),
        (FreeLB(), "FreeLB(epsilon=0.4, step_size=0.1, steps=3, start_size=0.3)"),
        (SMARTLoss(), "SMARTLoss(epsilon=0.1, step_size=0.1, steps=1, noise=1e-05, reduction='mean')"),
        (VirtualAdversarialLoss(), "VirtualAdversarialLoss(epsilon=1.0, xi=0.1, steps=1, reduction='mean')"),
    ],
)
def test_the_repr_builds_the_module_again(module, text):
    assert repr(module) == text
    assert repr(eval(text)) == text

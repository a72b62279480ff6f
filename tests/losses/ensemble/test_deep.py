"""A deep ensemble as one model: its mean, its outputs, its life in a training loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses.ensemble import DeepEnsemble, EnsembleLoss

MASKS = [[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]]


class Wrapped(nn.Module):
    """A model that returns its logits inside something."""

    def __init__(self, wrap):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, inputs, scale=1.0):
        return self.wrap(self.linear(inputs) * scale)


def ensemble(members=3, **arguments):
    torch.manual_seed(0)
    return DeepEnsemble.of(lambda: nn.Linear(4, 3), members=members, **arguments)


def test_it_returns_the_logarithm_of_the_mean_probabilities():
    model, inputs = ensemble(), torch.randn(6, 4)
    expected = torch.stack([member(inputs).softmax(dim=1) for member in model.members]).mean(dim=0)
    output = model(inputs)
    torch.testing.assert_close(output.exp(), expected)
    torch.testing.assert_close(output.log_softmax(dim=1), output)
    torch.testing.assert_close(output.softmax(dim=1).sum(dim=1), torch.ones(6))


def test_probabilities_are_averaged_and_not_logits():
    sure, unsure = nn.Linear(4, 2), nn.Linear(4, 2)
    for member, bias in ((sure, [20.0, 0.0]), (unsure, [0.0, 1.0])):
        nn.init.zeros_(member.weight)
        member.bias.data = torch.tensor(bias)
    output = DeepEnsemble([sure, unsure])(torch.zeros(1, 4))
    assert output.exp()[0, 0].item() == pytest.approx((1 + torch.tensor([0.0, 1.0]).softmax(0)[0].item()) / 2)


def test_one_member_is_its_log_softmax():
    model, inputs = ensemble(members=1), torch.randn(6, 4)
    torch.testing.assert_close(model(inputs), model.members[0](inputs).log_softmax(dim=1))


def test_far_apart_logits_stay_finite():
    model = ensemble()
    output = model(1e6 * torch.randn(6, 4))
    assert output.isfinite().all()
    F.cross_entropy(output, torch.zeros(6).long()).backward()
    assert all(part.grad.isfinite().all() for part in model.parameters())


def test_positions():
    model = DeepEnsemble.of(lambda: nn.Conv1d(4, 3, 1), members=2)
    output = model(torch.randn(6, 4, 5))
    assert output.shape == (6, 3, 5)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(6, 5))


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: {"logits": z}, lambda z: SimpleNamespace(logits=z)])
def test_what_members_may_return(wrap):
    model, inputs = DeepEnsemble([Wrapped(wrap), Wrapped(wrap)]), torch.randn(6, 4)
    expected = torch.stack([2 * member.linear(inputs) for member in model.members])
    torch.testing.assert_close(model.member_logits(inputs, scale=2), expected)
    torch.testing.assert_close(model.member_logits(inputs=inputs, scale=2), expected)


@pytest.mark.parametrize("wrap", [lambda z: (z,), lambda z: {"scores": z}, lambda z: None])
def test_a_member_without_logits_is_refused(wrap):
    with pytest.raises(TypeError, match=r"A member must return a tensor of logits, or something with `.logits`"):
        DeepEnsemble([Wrapped(wrap)])(torch.randn(6, 4))


def test_factory_draws_new_weights():
    model = ensemble(members=5)
    assert len(model.members) == 5
    starts = torch.stack([member.weight.flatten() for member in model.members])
    assert torch.pdist(starts).min() > 0


def test_factory_that_repeats_itself_is_refused():
    one = nn.Linear(4, 3)

    def seeded():
        torch.manual_seed(3)
        return nn.Linear(4, 3)

    for factory in (seeded, lambda: one):
        with pytest.raises(
            ValueError, match="`factory` must draw new weights at every call, but members 0 and 1 start"
        ):
            DeepEnsemble.of(factory, members=2)


def test_factory_of_models_without_values_yet():
    assert len(DeepEnsemble.of(lambda: nn.LazyLinear(3), members=2).members) == 2
    with torch.device("meta"):
        assert len(DeepEnsemble.of(lambda: nn.Linear(4, 3), members=2).members) == 2
    assert len(DeepEnsemble.of(nn.Identity, members=2).members) == 2


def test_mean_of_member_losses_keeps_members_independent():
    model, alone = ensemble(), ensemble()
    inputs, target = torch.randn(8, 4), torch.randint(3, (8,))
    torch.stack([F.cross_entropy(logits, target) for logits in model.member_logits(inputs)]).sum().backward()
    for member, other in zip(model.members, alone.members, strict=True):
        F.cross_entropy(other(inputs), target).backward()
        torch.testing.assert_close(member.weight.grad, other.weight.grad)


def test_train_and_eval_reach_every_member():
    model = DeepEnsemble.of(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), members=2)
    inputs = torch.ones(6, 4)
    model.eval()
    assert not any(part.training for part in model.modules())
    torch.testing.assert_close(model(inputs), model(inputs))
    model.train()
    assert all(part.training for part in model.modules())
    assert not torch.equal(model(inputs), model(inputs))


def test_state_round_trip_with_masks():
    used, inputs = ensemble(masks=MASKS), torch.randn(6, 4)
    fresh = DeepEnsemble.of(lambda: nn.Linear(4, 3), members=3, masks=torch.ones(3, 4))
    fresh.load_state_dict(used.state_dict(), strict=True)
    torch.testing.assert_close(fresh(inputs), used(inputs), rtol=0, atol=0)


def test_masks_hide_features_of_the_first_argument():
    criterion, inputs = EnsembleLoss([nn.CrossEntropyLoss()] * 3, masks=MASKS), torch.randn(6, 4)
    model = ensemble(masks=criterion.masks)
    expected = torch.stack(
        [member(inputs * torch.tensor(mask)) for member, mask in zip(model.members, MASKS, strict=True)]
    )
    torch.testing.assert_close(model.member_logits(inputs), expected)
    by_hand = torch.stack([member(view) for member, view in zip(model.members, criterion.views(inputs), strict=True)])
    torch.testing.assert_close(by_hand, expected)
    torch.testing.assert_close(model(inputs).exp(), expected.softmax(dim=2).mean(dim=0))
    assert model.masks.data_ptr() != criterion.masks.data_ptr()
    with pytest.raises(
        TypeError, match="With `masks`, the inputs that they hide features of must be the first argument"
    ):
        model(inputs=inputs)


def test_half_precision_averages_in_float32():
    model = ensemble()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, output = model.member_logits(torch.randn(6, 4)), model(torch.randn(6, 4))
    assert logits.dtype == torch.bfloat16
    assert output.dtype == torch.float32


def test_training_with_its_loss_beats_its_mean_member():
    torch.manual_seed(1)
    inputs = torch.randn(300, 4)
    target = (inputs[:, 0] * inputs[:, 1] > 0).long() + (inputs[:, 2] > 0.5).long()
    train, held = slice(0, 150), slice(150, 300)
    model = DeepEnsemble.of(lambda: nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)), members=4)
    criterion = EnsembleLoss([nn.CrossEntropyLoss()] * 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        criterion(model.member_logits(inputs[train]), target[train]).loss.backward()
        optimizer.step()
    report = criterion(model.member_logits(inputs[held]), target[held])
    assert report.ambiguity > 0.01
    assert F.cross_entropy(model(inputs[held]), target[held]) < report.loss
    assert (model(inputs[held]).argmax(dim=1) == target[held]).float().mean() > 0.7


def test_it_is_the_model_of_a_lightning_module(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.criterion = EnsembleLoss([nn.CrossEntropyLoss()] * 3, masks=MASKS)
            self.model = ensemble(masks=self.criterion.masks)

        def training_step(self, batch, _):
            output = self.criterion(self.model.member_logits(batch[0]), batch[1])
            self.log_dict({"ambiguity": output.ambiguity, "ensemble": output.ensemble_loss})
            return output.loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, data = Module(), torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randint(3, (8,)))
    before = [member.weight.clone() for member in module.model.members]
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert all(not torch.equal(a, b.weight) for a, b in zip(before, module.model.members, strict=True))
    resumed = Module.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    torch.testing.assert_close(resumed.model(data.tensors[0]), module.model(data.tensors[0]))


@pytest.mark.parametrize(
    ("members", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "`members` must hold at least one model, got none"),
        ([torch.relu], {}, TypeError, r"`members\[0\]` must be a module, got builtin_function_or_method"),
        (
            [nn.Linear(4, 3)],
            {"masks": MASKS},
            ValueError,
            r"`masks` must have shape \(members, features...\) = \(1, ...\)",
        ),
    ],
)
def test_checks(members, arguments, error, message):
    with pytest.raises(error, match=message):
        DeepEnsemble(members, **arguments)


def test_checks_of_the_number_of_members():
    with pytest.raises(ValueError, match="`members` must be at least 1, got 0"):
        DeepEnsemble.of(lambda: nn.Linear(4, 3), members=0)
    with pytest.raises(TypeError, match=r"`members` must be a whole number, got 2\.0"):
        DeepEnsemble.of(lambda: nn.Linear(4, 3), members=2.0)


def test_members_with_other_classes_are_refused():
    with pytest.raises(ValueError, match=r"`logits\[1\]` must have shape of `logits\[0\]` = \(6, 3\), got \(6, 2\)"):
        DeepEnsemble([nn.Linear(4, 3), nn.Linear(4, 2)])(torch.randn(6, 4))

"""AttentionPaths: which samples, which layers, the numbers of the functions, and nothing of the run changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attn_callbacks import AttentionCall, AttentionRecorder, BatchSchema
from attn_callbacks.analysis.attention_gradient import attention_gradients
from attn_callbacks.callbacks._paths_forward import differentiable
from attn_callbacks.callbacks._paths_gradients import _same, token_position
from attn_callbacks.callbacks._paths_maps import LayerMaps, one_stack, read_layer
from attn_callbacks.callbacks.attention_paths import AttentionPaths
from attn_callbacks.functional.relevance import attention_relevance
from attn_callbacks.functional.rollout import attention_rollout, gradient_rollout
from tests.callbacks.models import (
    LAYERS,
    LENGTH,
    VOCABULARY,
    WIDTH,
    Bert,
    Classifier,
    EncoderDecoder,
    TextEncoder,
    Texts,
    Vit,
    csv_logger,
    encoder,
    fit,
    leftovers,
    loader,
    pair_loader,
    quiet_trainer,
)

METHODS = ("rollout", "relevance", "gradient_rollout")
every_method = pytest.mark.parametrize("method", METHODS)


class Words:
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{number}" for number in ids]


def validated(module: Any, folder: Path, data: Any = None, **options: Any) -> AttentionPaths:
    callback = AttentionPaths(**options)
    trainer = quiet_trainer(folder, [callback], logger=csv_logger(folder))
    trainer.validate(module, data or loader(16, seed=1), verbose=False)
    assert leftovers(module) == {}
    return callback


def known(net: nn.Module, batch: Any, method: str, classes: Tensor | None = None) -> Tensor:
    """What the functions make of one forward, without the Trainer, ``(samples, tokens, tokens)``."""
    net = net.eval()
    with torch.set_grad_enabled(method != "rollout"), AttentionRecorder(net) as recorder:
        logits = net(batch)
    maps = [call.weights().detach() for call in recorder.calls]
    valid = batch["attention_mask"].bool()
    if method == "rollout":
        return attention_rollout(maps, valid=valid)
    classes = logits.argmax(1) if classes is None else classes
    gradients = attention_gradients(logits.gather(1, classes[:, None]).sum(), recorder.calls)
    return (attention_relevance if method == "relevance" else gradient_rollout)(maps, gradients, valid=valid)


def first(samples: int) -> dict[str, Tensor]:
    data = Texts(16, seed=1)
    return {"input_ids": data.input_ids[:samples], "attention_mask": data.attention_mask[:samples]}


@every_method
@pytest.mark.parametrize("net", [Bert, TextEncoder])
def test_values_are_those_of_the_functions(method: str, net: type[nn.Module], tmp_path: Path) -> None:
    module = Classifier(net(dropout=0.3))
    module.tokenizer = Words()
    callback = validated(module, tmp_path, samples=10, method=method, token=-1)
    expected, batch = known(module.net, first(10), method), first(10)
    assert [sample.number for sample in callback.result.samples] == list(range(10))
    for sample, rows, ids, real in zip(callback.result.samples, expected, *batch.values(), strict=True):
        tokens = int(real.sum())
        torch.testing.assert_close(sample.values, rows[tokens - 1, :tokens], rtol=1e-3, atol=1e-5)
        assert sample.labels == tuple(f"w{number}" for number in ids[:tokens].tolist())
        assert sample.token == tokens - 1
        assert (sample.target is None) == (method == "rollout")
    assert batch["attention_mask"].min() == 0
    assert len(callback.result.layer_names) == LAYERS


@every_method
def test_paths_are_shares_of_what_there_is(method: str, tmp_path: Path) -> None:
    callback = validated(Classifier(), tmp_path, samples=1, method=method, paths=5000)
    (sample,) = callback.result.samples
    into = torch.zeros(len(sample.values), dtype=torch.float64)
    for path in sample.paths:
        into[path.source] += path.weight
        assert path.tokens[0] == 0
    torch.testing.assert_close(into.float(), sample.values / sample.values.sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["predicted", "label", 0, 1])
def test_the_class_is_the_one_that_was_asked_for(target: str | int, tmp_path: Path) -> None:
    module, labels = Classifier(Bert()), Texts(16, seed=1).labels[:6]
    callback = validated(module, tmp_path, samples=6, method="relevance", target=target)
    with torch.no_grad():
        predicted = module.net.eval()(first(6)).argmax(1)
    classes = {"predicted": predicted, "label": labels}.get(target, torch.full((6,), target if target in (0, 1) else 0))
    assert [sample.target for sample in callback.result.samples] == classes.tolist()
    expected = known(module.net, first(6), "relevance", classes)
    for sample, rows in zip(callback.result.samples, expected, strict=True):
        torch.testing.assert_close(sample.values, rows[0, : len(sample.values)], rtol=1e-3, atol=1e-5)


def test_the_mean_over_tokens_has_no_paths(tmp_path: Path) -> None:
    module = Classifier(Bert())
    callback = validated(module, tmp_path, samples=2, token=None)
    expected = known(module.net, first(2), "rollout")
    for sample, rows in zip(callback.result.samples, expected, strict=True):
        tokens = len(sample.values)
        torch.testing.assert_close(sample.values, rows[:tokens, :tokens].mean(0), rtol=1e-4, atol=1e-6)
        assert sample.paths == ()


class OneLogit(TextEncoder):
    """A binary classifier with one logit."""

    def forward(self, batch: Any) -> Tensor:
        logits = super().forward(batch)
        return logits[:, 1] - logits[:, 0]


class OneLogitSteps(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch), batch["labels"].float())


def test_one_logit_speaks_for_one_class_and_against_the_other(tmp_path: Path) -> None:
    module = OneLogitSteps(OneLogit())
    found = {
        target: validated(module, tmp_path / str(target), samples=2, method="relevance", target=target).result.samples
        for target in (0, 1)
    }
    for zero, one in zip(found[0], found[1], strict=True):
        assert not torch.allclose(zero.values, one.values)
        assert min(float(own.values[1:].max()) for own in (zero, one)) > 1e-6


class NextToken(nn.Module):
    """Logits for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.head = nn.Embedding(VOCABULARY, WIDTH), encoder(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, batch: Any) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.head(self.encoder(self.embed(batch["input_ids"]), mask=mask, is_causal=True))


class NextTokenSteps(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch)[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def test_a_language_model_explains_the_logits_of_its_token(tmp_path: Path) -> None:
    module = NextTokenSteps(NextToken())
    callback = validated(
        module, tmp_path, samples=2, method="relevance", token=4, schema=BatchSchema(valid=lambda batch: None)
    )
    with torch.no_grad():
        expected = module.net.eval()(first(2))[:, 4].argmax(-1)
    assert [sample.target for sample in callback.result.samples] == expected.tolist()
    for sample in callback.result.samples:
        assert not sample.values[5:].any()  # nothing comes from later tokens


def test_frozen_layers_have_gradients_and_keep_their_flags(tmp_path: Path) -> None:
    module = Classifier(Bert())
    expected = known(module.net, first(2), "relevance")
    for parameter in module.net.parameters():
        parameter.requires_grad_(False)
    callback = validated(module, tmp_path, samples=2, method="relevance")
    assert not any(parameter.requires_grad for parameter in module.net.parameters())
    for sample, rows in zip(callback.result.samples, expected, strict=True):
        torch.testing.assert_close(sample.values, rows[0, : len(sample.values)], rtol=1e-3, atol=1e-5)


@every_method
def test_pictures_reach_the_logger(method: str, tmp_path: Path) -> None:
    validated(Classifier(), tmp_path, samples=2, method=method)
    names = {str(path.relative_to(tmp_path / "run")) for path in tmp_path.glob("**/*.png")}
    assert names == {f"paths/{method}/sample_{n}/{part}_step0.png" for n in (0, 1) for part in ("tokens", "paths")}


@every_method
def test_patches_are_laid_over_the_image(method: str, tmp_path: Path) -> None:
    data = pair_loader(8, seed=1, images=True)
    callback = validated(Classifier(Vit()), tmp_path, data, samples=1, method=method)
    assert [path.name for path in tmp_path.glob("**/image_*.png")] == ["image_step0.png"]
    assert len(callback.result.samples[0].values) == 17


def test_result_without_a_logger_and_as_a_dict(tmp_path: Path) -> None:
    callback = AttentionPaths(samples=2, method="relevance")
    fit(Classifier(), quiet_trainer(tmp_path, [callback], max_epochs=2))
    found = callback.result.to_dict()
    assert (found["method"], found["epoch"], len(found["layer_names"])) == ("relevance", 1, LAYERS)
    assert sorted(found["samples"][0]) == ["labels", "number", "paths", "target", "token", "values"]
    assert not callback.result.samples[0].values.is_inference()
    assert not list(tmp_path.iterdir())


def test_every_n_epochs(tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path, [AttentionPaths(samples=1, every_n_epochs=2)], logger=csv_logger(tmp_path), max_epochs=4
    )
    fit(Classifier(), trainer)
    assert len(list(tmp_path.glob("**/tokens_*.png"))) == 2


@every_method
def test_training_is_the_same_with_and_without(method: str, tmp_path: Path) -> None:
    weights = []
    for name, callbacks in (("without", []), ("with", [AttentionPaths(samples=3, method=method)])):
        torch.manual_seed(5)
        module = Classifier(Bert(dropout=0.2))
        trainer = quiet_trainer(tmp_path / name, callbacks, logger=csv_logger(tmp_path / name), max_epochs=3)
        fit(module, trainer, loader(32, shuffle=True))
        weights.append((torch.random.get_rng_state(), module.state_dict()))
        assert leftovers(module) == {}
    assert torch.equal(weights[0][0], weights[1][0])
    for name, value in weights[0][1].items():
        assert torch.equal(value, weights[1][1][name]), name


class Drawing(Bert):
    """Draws numbers in evaluation, to no effect."""

    def forward(self, batch: Any) -> Any:
        return super().forward(batch) + 0 * torch.rand(1)


def test_numbers_drawn_in_evaluation_are_given_back(tmp_path: Path) -> None:
    states = []
    for name, callbacks in (("without", []), ("with", [AttentionPaths(samples=3, method="relevance")])):
        torch.manual_seed(5)
        fit(Classifier(Drawing()), quiet_trainer(tmp_path / name, callbacks), loader(32, shuffle=True))
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


class Averaging(Bert):
    """Running statistics, and a counter that also counts in evaluation; stays in training while it is validated."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = nn.BatchNorm1d(2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, batch: Any) -> Any:
        self.count += 1
        return self.normalise(super().forward(batch))


class NeverEvaluated(Classifier):
    def on_validation_model_eval(self) -> None:
        """Leave the modes as they are."""


@pytest.mark.parametrize("steps", [Classifier, NeverEvaluated])
@pytest.mark.filterwarnings("ignore:.*gives other logits")
def test_running_statistics_and_modes_are_given_back(steps: type[Classifier], tmp_path: Path) -> None:
    states = []
    for name, callbacks in (("without", []), ("with", [AttentionPaths(samples=3, method="relevance")])):
        torch.manual_seed(5)
        module = steps(Averaging())
        fit(module, quiet_trainer(tmp_path / name, callbacks, max_epochs=2), loader(32, shuffle=True))
        states.append((module.state_dict(), [part.training for part in module.modules()]))
    assert states[0][1] == states[1][1]
    for name, value in states[0][0].items():
        assert torch.equal(value, states[1][0][name]), name


def test_buffers_come_back_as_the_very_tensors() -> None:
    module = Averaging()
    module.again = module.normalise.running_mean  # not a buffer
    module.register_buffer("shared", module.count)
    before = dict(module.named_buffers(remove_duplicate=False))
    values = {name: value.clone() for name, value in before.items()}
    with differentiable(module):
        assert not module.training
        module.count += 1
        assert module.shared == module.count == 1
        module.normalise.running_mean = torch.ones(2)
    after = dict(module.named_buffers(remove_duplicate=False))
    assert module.training
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert value is before[name], name
        assert torch.equal(value, values[name]), name


class Watching(Classifier):
    """Notices gradients of parameters after validation."""

    def on_validation_epoch_end(self) -> None:
        self.touched = [name for name, parameter in self.named_parameters() if parameter.grad is not None]


def test_no_parameter_gets_a_gradient(tmp_path: Path) -> None:
    module = Watching()
    validated(module, tmp_path, samples=3, method="relevance")
    assert module.touched == []


# --- which layers, and what cannot be followed ---------------------------------------------------------------------


@every_method
def test_of_an_encoder_decoder_the_encoder_is_followed(method: str, tmp_path: Path) -> None:
    callback = validated(Classifier(EncoderDecoder()), tmp_path, pair_loader(8), samples=1, method=method)
    assert callback.result.layer_names == ("net.model.encoder.layers.0.self_attn",)
    module, folder = Classifier(EncoderDecoder()), tmp_path / "named"
    named = validated(module, folder, pair_loader(8), samples=1, method=method, layers=["*.decoder.*"])
    assert named.result.layer_names == ("net.model.decoder.layers.0.self_attn",)
    assert len(named.result.samples[0].values) == 3


def own(name: str, is_cross: bool = False) -> LayerMaps:
    return LayerMaps(name, is_cross)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([own("e.0.s"), own("e.1.s"), own("d.0.s"), own("d.0.c", True), own("d.1.s"), own("d.1.c", True)], 2),
        ([own("e.0.s"), own("e.1.s"), own("pool", True)], 2),
        ([own("e.0.s"), own("d.0.c", True)], 1),
        ([own("e.0.s"), own("e.1.s")], 2),
    ],
)
def test_one_stack(calls: list[LayerMaps], expected: int) -> None:
    assert one_stack(calls, chosen=False) == calls[:expected]
    assert one_stack(calls, chosen=True) == [call for call in calls if not call.is_cross]


def test_windows_are_refused_by_name() -> None:
    tokens = torch.zeros(8, 1, 4, 2)
    with pytest.raises(ValueError, match="'swin' has 8 maps for 2 samples, as in windows"):
        read_layer(AttentionCall("swin", query=tokens, key=tokens), 2, 2, 100)


@every_method
def test_long_sequences_are_refused_with_what_to_do(method: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"switched off.*has 10 tokens, `max_tokens` is 9. Raise it"):
        assert validated(Classifier(), tmp_path, max_tokens=9, method=method).result is None


class Pooling(TextEncoder):
    """Half of the tokens after the first layer."""

    def hidden(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        first, second = self.encoder.layers
        return second(first(self.embed(tokens)).unflatten(1, (-1, 2)).mean(2))


def test_merged_tokens_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"switched off.*10 tokens of the first layer.*got 1 and 5.*merge"):
        validated(Classifier(Pooling()), tmp_path, schema=BatchSchema(valid=lambda batch: None))


class Mixing(TextEncoder):
    """Samples of a batch know of each other."""

    def forward(self, batch: Any) -> Tensor:
        logits = super().forward(batch)
        return logits - 5 * logits.mean(0)


def test_samples_that_know_of_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="gives other logits for the first samples alone than within their batch"):
        assert validated(Classifier(Mixing()), tmp_path, samples=2, method="relevance").result is None
    assert validated(Classifier(Mixing()), tmp_path / "rollout", samples=2).result is not None


class Copying(Classifier):
    def forward(self, batch: Any) -> Any:
        return super().forward({name: value.clone() for name, value in batch.items()})

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.loss({name: value.clone() for name, value in batch.items()}))


def test_inputs_that_are_not_handed_over_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="got the `inputs` of the batch as they are"):
        validated(Copying(), tmp_path, method="relevance")


def test_a_missing_token_is_told_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="leaves out sample 0, and all like it: `token` is 40, and it has") as caught:
        assert validated(Classifier(), tmp_path, token=40).result is None
    assert len([warning for warning in caught if "AttentionPaths" in str(warning.message)]) == 1


def shortened(lengths: dict[int, int]) -> Any:
    data = Texts(16, seed=1)
    data.attention_mask[:] = 1
    for row, tokens in lengths.items():
        data.attention_mask[row] = torch.arange(LENGTH) < tokens
    return DataLoader(data, 4)


class Filled(Bert):
    """Says nothing of a sample without tokens, as many networks do."""

    def forward(self, batch: Any) -> Tensor:
        logits = super().forward(batch)
        return logits.where(batch["attention_mask"].any(1, keepdim=True), torch.nan)


@every_method
@pytest.mark.parametrize(("token", "left_out"), [(0, {2}), (5, {1, 2}), (None, {2}), (-1, {2})])
def test_a_short_sample_is_left_out_alone(method: str, token: int | None, left_out: set[int], tmp_path: Path) -> None:
    lengths = {1: 1, 2: 0}
    with pytest.warns(UserWarning, match=f"leaves out sample {min(left_out)}, and all like it") as caught:
        callback = validated(Classifier(Filled()), tmp_path, shortened(lengths), samples=6, method=method, token=token)
    assert len([warning for warning in caught if "AttentionPaths" in str(warning.message)]) == 1
    assert [sample.number for sample in callback.result.samples] == [n for n in range(6) if n not in left_out]
    for sample in callback.result.samples:
        assert len(sample.values) == lengths.get(sample.number, LENGTH)
        assert sample.values.isfinite().all()


def test_a_language_model_goes_on_without_a_short_sample(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="leaves out sample 1, and all like it: `token` is 4, and it has 2 tokens"):
        callback = validated(
            NextTokenSteps(NextToken()), tmp_path, shortened({1: 2}), samples=3, method="relevance", token=4
        )
    assert [sample.number for sample in callback.result.samples] == [0, 2]


def test_other_logits_are_seen_beside_a_sample_without_any() -> None:
    before = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]])
    assert _same(before.clone(), before, 2).isnan().any()
    with pytest.raises(ValueError, match="gives other logits"):
        _same(before + 1, before, 2)


def test_nothing_is_drawn_for_nobody(tmp_path: Path) -> None:
    callback = AttentionPaths(samples=2)
    submitted: list[Any] = []
    callback._writer.submit = lambda *job: submitted.append(job)
    quiet_trainer(tmp_path, [callback]).validate(Classifier(), loader(16, seed=1), verbose=False)
    assert len(callback.result.samples) == 2
    assert submitted == []


def test_positions_count_real_tokens_only() -> None:
    real = torch.tensor([False, True, True, False, True])
    assert [token_position(real, token) for token in (0, 1, -1, -3, 3, -4)] == [1, 2, 4, 1, None, None]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "flow"}, ValueError, "`method` must be one of 'rollout', 'relevance'"),
        ({"target": "best"}, ValueError, "`target` must be one of 'predicted', 'label'"),
        ({"target": -1}, ValueError, "`target` must be at least 0"),
        ({"token": 0.5}, TypeError, "`token` must be an integer"),
        ({"samples": 0}, ValueError, "`samples` must be at least 1"),
        ({"paths": 0}, ValueError, "`paths` must be at least 1"),
        ({"layers": "encoder"}, TypeError, "`layers` must be a list of names"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AttentionPaths(**options)

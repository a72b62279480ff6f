"""The random-rationale control: how tokens are drawn, and that all else is the guidance it wraps."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from attn_callbacks.bias import BiasReport
from attn_callbacks.bias.reliance import Reliance
from attn_callbacks.feedback.attention_guidance import AttentionGuidance
from attn_callbacks.feedback.random_rationale import RandomRationaleControl, random_tokens, sample_keys
from tests.feedback.checkpoint import saved
from tests.feedback.guided_steps import Step, call

SAMPLES, TOKENS = 200, 12
WIDE = {"queries": TOKENS, "keys": TOKENS, "batch": SAMPLES}
IDS = torch.randint(5, 1000, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
VALID = torch.arange(TOKENS) < torch.randint(8, TOKENS + 1, (SAMPLES, 1), generator=torch.Generator().manual_seed(1))
LAST = VALID.sum(dim=1) - 1
SPURIOUS = (IDS % 5 == 0) & VALID & (torch.arange(TOKENS) > 0) & (torch.arange(TOKENS) < LAST[:, None])
RELEVANCE = (IDS % 5 == 1) & VALID & (torch.arange(TOKENS) > 0) & (torch.arange(TOKENS) < LAST[:, None])
KEYS = sample_keys(IDS, VALID)
BIASED = BiasReport(0, 0, torch.tensor([[[95, 5], [5, 95]], [[60, 40], [40, 60]]]), ("a", "b"), ("x", "y"))
RELIANT = BiasReport(
    0, 0, torch.tensor([[[80, 20], [20, 80]]]), ("a", "b"),
    reliance={"spurious": Reliance(torch.tensor([[[20, 0], [40, 40]], [[20, 0], [0, 80]]]))},
)  # fmt: skip


def test_as_many_as_annotated_real_apart_and_never_the_ends():
    spurious, relevance = random_tokens(KEYS, SPURIOUS, RELEVANCE, VALID)
    assert torch.equal(spurious.sum(dim=1), SPURIOUS.sum(dim=1))
    assert torch.equal(relevance.sum(dim=1), RELEVANCE.sum(dim=1))
    assert not bool((spurious & relevance).any())
    for drawn in (spurious, relevance):
        assert not bool((drawn & ~VALID).any())
        assert not bool(drawn[:, 0].any())
        assert not bool(drawn.gather(1, LAST[:, None]).any())


def test_every_inner_token_is_drawn_about_equally_often():
    """Whether it was annotated or not, and whatever its place."""
    marked = torch.zeros(SAMPLES, TOKENS, dtype=torch.bool)
    marked[:, 1:3] = True
    draws = [random_tokens(sample_keys(IDS, None, seed), marked, None)[0] for seed in range(5)]
    shares = torch.stack(draws).double().mean(dim=(0, 1))
    torch.testing.assert_close(shares[1:-1], torch.full((TOKENS - 2,), 0.2).double(), rtol=0, atol=0.05)
    assert not torch.equal(draws[0], draws[1])


def test_the_same_sample_gets_the_same_tokens_in_every_batch_and_padding():
    whole = random_tokens(KEYS, SPURIOUS, RELEVANCE, VALID)
    order = torch.arange(SAMPLES).flip(0)[:17]
    for left in (False, True):
        ids, marked, relevant, valid = (
            nn.functional.pad(part[order], (3, 0) if left else (0, 3)) for part in (IDS, SPURIOUS, RELEVANCE, VALID)
        )
        ids[~valid] = 999  # whatever stands in the padding
        again = random_tokens(sample_keys(ids, valid), marked, relevant, valid)
        own = slice(3, None) if left else slice(None, -3)
        for drawn, before in zip(again, whole, strict=True):
            assert torch.equal(drawn[:, own], before[order])


def test_keys_tell_samples_and_seeds_apart():
    assert len(KEYS.unique()) == SAMPLES
    assert not bool((sample_keys(IDS, VALID, seed=1) == KEYS).any())
    swapped = IDS.clone()
    swapped[:, [2, 3]] = IDS[:, [3, 2]]
    assert int((sample_keys(swapped) == sample_keys(IDS)).sum()) == int((IDS[:, 2] == IDS[:, 3]).sum())
    assert sample_keys(IDS[:2], None, seed=-(2**62)).dtype == torch.int64


def test_keys_by_hand():
    """SplitMix64 in Python's own integers."""
    word, (gold, first, second) = 2**64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

    def mixed(number):
        number = (number ^ number >> 30) * first % word
        number = (number ^ number >> 27) * second % word
        return number ^ number >> 31

    total = sum(mixed((token + gold * place) % word) for place, token in enumerate([7, 3, 9], 1))
    expected = mixed((total + gold * 4) % word)
    assert int(sample_keys(torch.tensor([[7, 3, 9]]), seed=4)) % word == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_pictures_are_told_apart_as_well(dtype):
    pictures = (torch.rand(50, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 100).to(dtype)
    keys = sample_keys(pictures, torch.ones(50, 5, dtype=torch.bool))
    assert len(keys.unique()) == 50
    assert torch.equal(sample_keys(pictures.flip(0)), keys.flip(0))
    pictures[:, 2, 3, 3] += 1
    assert not bool((sample_keys(pictures) == keys).any())


def test_ends_are_drawn_where_the_annotation_marks_them():
    marked = torch.zeros(SAMPLES, 4, dtype=torch.bool)
    marked[:, :3] = True
    drawn, _ = random_tokens(KEYS, marked, None)
    assert torch.equal(drawn, marked)  # of four tokens the last is not for the taking
    marked[:, 1:3] = False
    assert 0.2 < float(random_tokens(KEYS, marked, None)[0][:, 0].float().mean()) < 0.5


def test_more_annotated_than_may_be_drawn():
    everything = torch.ones(SAMPLES, 4, dtype=torch.bool)
    spurious, relevance = random_tokens(KEYS, everything, everything)
    assert bool(spurious.all())
    assert not bool(relevance.any())


def test_what_is_not_annotated_is_not_drawn():
    assert random_tokens(KEYS, None, None, VALID) == (None, None)
    spurious, none = random_tokens(KEYS, SPURIOUS, None, VALID)
    assert none is None
    assert torch.equal(spurious, random_tokens(KEYS, SPURIOUS, RELEVANCE, VALID)[0])
    none, relevance = random_tokens(KEYS, None, RELEVANCE, VALID)
    assert none is None
    assert torch.equal(relevance.sum(dim=1), RELEVANCE.sum(dim=1))


@pytest.mark.parametrize("arguments", [{"scale_free": False}, {"coefficient": 3.0, "queries": "first", "warm_up": 2}])
def test_term_is_that_of_the_guidance_for_the_drawn_tokens(arguments):
    control, step = (
        RandomRationaleControl(AttentionGuidance(**arguments), seed=7),
        Step([call(**WIDE)], RELEVANCE, SPURIOUS, VALID),
    )
    assert control.change_inputs(IDS, step) is None
    spurious, relevance = random_tokens(sample_keys(IDS, VALID, 7), SPURIOUS, RELEVANCE, VALID)
    expected = AttentionGuidance(**arguments).term(Step(step.calls, relevance, spurious, VALID))
    term = control.term(step)
    torch.testing.assert_close(term, expected, rtol=0, atol=0)
    term.backward()
    assert step.calls[0].query.grad.abs().sum() > 0
    unscaled = {**arguments, "scale_free": False}
    assert term != AttentionGuidance(**unscaled).term(step)


def test_without_annotation_there_is_no_term():
    control, step = RandomRationaleControl(AttentionGuidance()), Step(valid=VALID)
    control.change_inputs(IDS, step)
    assert control.term(step) is None


def test_inputs_of_an_earlier_step_are_not_taken_for_those_of_this_one():
    control, step = (
        RandomRationaleControl(AttentionGuidance()),
        Step([call(**WIDE)], RELEVANCE, SPURIOUS, VALID),
    )
    control.change_inputs(IDS, step)
    control.term(step)
    with pytest.raises(RuntimeError, match="did not see the inputs of the step"):
        control.term(step)


def test_it_decides_as_the_guidance_does():
    control, guidance = RandomRationaleControl(AttentionGuidance(when="biased")), AttentionGuidance(when="biased")
    assert (control.answers, control.layers, control.sees) == (guidance.answers, guidance.layers, guidance.sees)
    for report in (BIASED, RELIANT, RELIANT, RELIANT):
        assert control.active == guidance.active
        told, expected = control.apply(report), guidance.apply(report)
        assert [action.text for action in told] == [f"random rationales: {action.text}" for action in expected]
        assert [(a.finding, a.old, a.new) for a in told] == [(a.finding, a.old, a.new) for a in expected]
    assert control.guidance.strength == 2.25
    control.bind(nn.Linear(2, 2))
    control.bind(nn.Linear(2, 2))
    assert not control.active


def test_held_and_withdrawn():
    control, step = RandomRationaleControl(AttentionGuidance(when="biased", warm_up=5)), Step()
    control.hold(True)
    assert len(control.apply(BIASED)) == 1
    assert control.apply(RELIANT)[0].new == 1.5  # as a guidance that is held back says what it would do
    assert not control.active
    assert control.term(step) is None
    control.hold(False)
    assert control.active
    control.withdraw()
    assert not control.active
    resumed = RandomRationaleControl(AttentionGuidance(when="biased"))
    resumed.load_state_dict(control.state_dict())
    assert resumed.withdrawn
    assert not resumed.active


def test_state_survives_a_checkpoint():
    control = RandomRationaleControl(AttentionGuidance(when="biased", scale_free=True))
    control.apply(BIASED)
    control.apply(RELIANT)
    step = Step([call(**WIDE)], RELEVANCE, SPURIOUS, VALID)
    control.change_inputs(IDS, step)
    control.term(step)
    resumed = RandomRationaleControl(AttentionGuidance(when="biased", scale_free=True))
    resumed.load_state_dict(saved(control.state_dict()))
    resumed.load_state_dict({})
    assert str(resumed.state_dict()) == str(control.state_dict())
    for each in (control, resumed):
        each.change_inputs(IDS, step)
    assert torch.equal(control.term(step), resumed.term(step))


def test_repr_and_pickle():
    control = RandomRationaleControl(AttentionGuidance(), seed=3)
    assert repr(eval(repr(control))) == repr(control) == repr(pickle.loads(pickle.dumps(control)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance": None}, "`guidance` must be an `AttentionGuidance`, got None"),
        ({"guidance": AttentionGuidance(), "seed": 0.5}, "`seed` must be an integer, got 0.5"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        RandomRationaleControl(**arguments)

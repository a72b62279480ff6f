"""Mask randomisation: what takes whose place, how often, and from when on."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from attn_callbacks.feedback._shuffle import moved, shuffle_region
from attn_callbacks.feedback.mask_randomization import MaskRandomization
from losses import MaskRandomization as Transform
from tests.feedback.checkpoint import saved
from tests.feedback.feature_steps import FakeStep, finding, real_report, report

TOKENS = torch.arange(1, 25).reshape(6, 4)
SPURIOUS = torch.tensor([[0, 1, 1, 0]] * 6).bool()
LENGTHS = torch.tensor([4, 2, 4, 1, 3, 4])
VALID = torch.arange(4) < LENGTHS[:, None]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_drawn_numbers_reach_a_gpu_without_a_wait():
    class Drawn:
        pinned = False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            return device, non_blocking

    for name, pinned in (("cuda:1", True), ("cpu", False)):
        drawn, device = Drawn(), torch.device(name)
        result = moved(drawn, device)
        assert drawn.pinned == pinned
        assert result == (device, True) if pinned else result[0] == device
    assert torch.equal(moved(TOKENS, torch.device("cpu")), TOKENS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shuffling_on_a_gpu_never_waits():
    tokens, mask, valid = TOKENS.cuda(), SPURIOUS.cuda(), VALID.cuda()
    moved(torch.zeros(6), tokens.device)  # the first pinned memory has to be made
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = shuffle_region(tokens, mask, valid, generator=generator())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), shuffle_region(TOKENS, SPURIOUS, VALID, generator=generator()))


def donors_of(tokens):
    """Return the row from which each entry comes: entries of `TOKENS` are told by their value."""
    return (tokens - 1) // 4, (tokens - 1) % 4


def by_loop(values, mask, valid, order):
    """Walk the round trip sample by sample and place by place."""
    result, rows = values.copy(), len(values)
    for place, sample in enumerate(order):
        for column in np.ndindex(mask.shape[1:]):
            if not mask[(sample, *column)]:
                continue
            for ahead in range(1, rows + 1):
                other = order[(place + ahead) % rows]
                if valid[(other, *column)]:
                    index = (slice(None), *column) if values.ndim == 4 else column
                    result[(sample, *index)] = values[(other, *index)]
                    break
    return result


def test_values_come_from_one_other_sample_at_the_same_place():
    mixed = shuffle_region(TOKENS, SPURIOUS, generator=generator())
    rows, columns = donors_of(mixed)
    assert torch.equal(columns, torch.arange(4).expand(6, 4))
    assert torch.equal(rows[:, [0, 3]], torch.arange(6)[:, None].expand(6, 2))
    assert torch.equal(rows[:, 1], rows[:, 2])  # they belong together
    assert (rows[:, 1] != torch.arange(6)).all()
    assert sorted(rows[:, 1].tolist()) == list(range(6))  # each gives once


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("features", [(), (3,), "picture"])
def test_equal_to_a_walk_sample_by_sample(seed, features):
    random = torch.Generator().manual_seed(seed)
    places = (4, 5) if features == "picture" else (4,)
    shape = (6, 2, *places) if features == "picture" else (6, *places, *features)
    values = torch.randn(shape, generator=random)
    mask, valid = (torch.rand(6, *places, generator=random) < 0.6 for _ in range(2))
    order = torch.randperm(6, generator=generator(seed)).tolist()
    mixed = shuffle_region(values, mask, valid, generator=generator(seed))
    np.testing.assert_array_equal(mixed.numpy(), by_loop(values.numpy(), mask.numpy(), valid.numpy(), order))
    everything = torch.ones_like(valid)
    mixed = shuffle_region(values, mask, None, generator=generator(seed))
    np.testing.assert_array_equal(mixed.numpy(), by_loop(values.numpy(), mask.numpy(), everything.numpy(), order))


@pytest.mark.parametrize("seed", range(4))
def test_padding_neither_leaks_in_nor_is_replaced(seed):
    tokens = TOKENS * VALID
    mixed = shuffle_region(tokens, VALID, VALID, generator=generator(seed))
    assert torch.equal(mixed == 0, tokens == 0)
    rows, columns = donors_of(mixed)
    assert torch.equal(columns[VALID], torch.arange(4).expand(6, 4)[VALID])
    assert (rows != torch.arange(6)[:, None])[VALID].all()


def test_nobody_else_has_a_token_there():
    valid = torch.tensor([[True, True], [True, False], [True, False]])
    tokens = torch.tensor([[1, 2], [3, 0], [5, 0]])
    mixed = shuffle_region(tokens, valid, valid, generator=generator())
    assert mixed[0, 1] == 2
    assert mixed[1:, 1].tolist() == [0, 0]


def test_one_sample_and_none():
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(shuffle_region(TOKENS[:1], mask), TOKENS[:1])
    assert torch.equal(shuffle_region(TOKENS[:1], mask, mask), TOKENS[:1])
    assert shuffle_region(TOKENS[:0], mask[:0], mask[:0]).shape == (0, 4)


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    feedback = MaskRandomization(share=0.5, when="always")
    feedback.change_inputs(TOKENS, FakeStep(spurious=SPURIOUS, valid=VALID))
    assert torch.equal(torch.get_rng_state(), before)


def test_step_decides_the_draw():
    feedback = MaskRandomization(share=0.5, when="always")
    first, again, other = (feedback.change_inputs(TOKENS, FakeStep(seed=seed, spurious=SPURIOUS)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_share_of_the_samples(share):
    tokens = torch.arange(4000).reshape(1000, 4)
    mask = torch.tensor([[False, True, True, False]]).expand(1000, 4)
    mixed = MaskRandomization(share=share, when="always").change_inputs(tokens, FakeStep(spurious=mask))
    changed = mixed != tokens
    assert torch.equal(changed[:, 1], changed[:, 2])
    assert changed[:, 1].float().mean() == pytest.approx(share, abs=0.05)


def test_padding_of_the_batch_is_known():
    tokens = TOKENS * VALID
    step = FakeStep(spurious=torch.ones(6, 4, dtype=torch.bool), valid=VALID)
    mixed = MaskRandomization(when="always").change_inputs(tokens, step)
    assert torch.equal(mixed == 0, tokens == 0)


def test_transform_gets_inputs_region_and_generator():
    step = FakeStep(names=SPURIOUS)
    feedback = MaskRandomization(Transform("shuffle", protected=(2,)), region="names", when="always")
    mixed = feedback.change_inputs(TOKENS, step)
    assert torch.equal(mixed, Transform("shuffle", protected=(2,))(TOKENS, SPURIOUS, generator=generator()))
    assert mixed[0, 1] == 2
    assert feedback.change_inputs(TOKENS, FakeStep(spurious=SPURIOUS)) is None  # another region


def test_waits_for_reliance_on_its_own_region():
    feedback, step = MaskRandomization(), FakeStep(spurious=SPURIOUS)
    others = (finding("class", "positive"), finding("attention", "spurious"), finding(where="names"))
    assert not feedback.apply(report(*others))
    assert feedback.answered(report(*others)) == ()
    assert not feedback.active
    assert feedback.change_inputs(TOKENS, step) is None
    (action,) = feedback.apply(report(*others, finding()))
    assert feedback.active
    assert (action.finding, action.old, action.new) == (("feature", "spurious"), 0.0, 1.0)
    assert str(action) == "mask randomization switched on with share 1 (Accuracy falls by 0.30 without spurious)"
    assert not torch.equal(feedback.change_inputs(TOKENS, step), TOKENS)
    assert not feedback.apply(report())
    assert feedback.active  # it stays on


def test_real_report():
    feedback = MaskRandomization(region="names")
    assert not feedback.apply(real_report(names=2, spurious=60))  # one in a hundred is chance
    (action,) = feedback.apply(real_report(names=60))
    assert action.finding == ("feature", "names")


def test_candidate_is_for_somebody_to_look_at():
    found = report(finding(where="spurious"))
    found.reliance.clear()
    assert not MaskRandomization().apply(found)


def test_share_rises_while_reliance_stays():
    feedback = MaskRandomization(share=0.3)
    shares = []
    for found in (True, True, False, True, True):
        shares += [(action.old, action.new) for action in feedback.apply(report(*[finding()] * found))]
    assert shares == [(0.0, 0.3), (0.3, 0.6), (0.6, 1.0)]
    tokens = torch.arange(400).reshape(100, 4)
    mixed = feedback.change_inputs(tokens, FakeStep(spurious=SPURIOUS[:1].expand(100, 4)))
    assert (mixed != tokens)[:, 1].all()


def test_held_or_withdrawn_leaves_inputs_and_yet_decides():
    feedback, step = MaskRandomization(share=0.5), FakeStep(spurious=SPURIOUS)
    feedback.hold(True)
    assert [action.new for action in (*feedback.apply(report(finding())), *feedback.apply(report(finding())))] == [
        0.5,
        1,
    ]
    assert not feedback.active
    assert feedback.change_inputs(TOKENS, step) is None
    feedback.hold(False)
    assert feedback.change_inputs(TOKENS, step) is not None
    feedback.withdraw()
    assert feedback.change_inputs(TOKENS, step) is None


def test_state_survives_a_checkpoint():
    feedback = MaskRandomization(share=0.3)
    for _ in range(2):
        feedback.apply(report(finding()))
    resumed = MaskRandomization(share=0.3)
    resumed.load_state_dict(saved(feedback.state_dict()))
    resumed.load_state_dict({})
    assert resumed.active
    assert resumed.state_dict() == feedback.state_dict()
    steps = [FakeStep(seed=3, spurious=SPURIOUS) for _ in range(2)]
    mixed = [each.change_inputs(TOKENS, step) for each, step in zip((feedback, resumed), steps, strict=True)]
    assert torch.equal(*mixed)
    always = MaskRandomization(when="always")
    always.load_state_dict({"on": False})
    assert always.active


def test_another_module_starts_anew():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    feedback = MaskRandomization(share=0.3)
    feedback.bind(first)
    for _ in range(2):
        feedback.apply(report(finding()))
    feedback.bind(first)
    assert feedback.state_dict()["share"] == 0.6
    twin = pickle.loads(pickle.dumps(feedback))
    twin.bind(second)
    assert twin.active
    feedback.bind(second)
    assert not feedback.active
    assert feedback.state_dict()["share"] == 0.3
    assert repr(twin) == "MaskRandomization(None, region='spurious', share=0.3, when='biased')"


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (ValueError, {"share": 0}, "`share` must be above 0, got 0"),
        (ValueError, {"share": 1.5}, "`share` must lie between 0 and 1, got 1.5"),
        (ValueError, {"when": "later"}, "`when` must be one of 'biased', 'always', got 'later'"),
        (TypeError, {"transform": "shuffle"}, "`transform` must be called with inputs and mask"),
    ],
)
def test_wrong_arguments_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        MaskRandomization(**arguments)


def test_a_region_that_is_most_of_the_inputs_takes_from_regions_alone():
    inputs = torch.arange(1.0, 49.0).reshape(6, 8)[:, None, None].expand(6, 1, 1, 8).clone()
    background = torch.rand(6, 8, generator=generator(1)) < 0.8
    step = FakeStep(inputs=inputs, spurious=background)
    step.region = lambda name, _: background[:, None] if name == "spurious" else None
    mixed = MaskRandomization(when="always").change_inputs(inputs, step)[:, 0, 0]
    rows, columns = ((mixed - 1) // 8).long(), ((mixed - 1) % 8).long()
    assert torch.equal(columns, torch.arange(8).expand(6, 8))
    assert background[rows, columns][background].all()  # nothing of what decides elsewhere
    small = torch.zeros_like(background)
    small[:3, 3] = True
    step.region = lambda name, _: small[:, None] if name == "spurious" else None
    mixed = MaskRandomization(when="always").change_inputs(inputs, step)[:, 0, 0]
    assert not small[((mixed - 1) // 8).long(), ((mixed - 1) % 8).long()][small].all()

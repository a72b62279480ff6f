"""Resampling: which shares it wants, what it writes into the sampler, what it remembers, what it refuses."""

from __future__ import annotations

import gc
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from attn_callbacks.bias import BiasReport
from attn_callbacks.feedback._shares import limited_shares
from attn_callbacks.feedback.controller import ControllerSettings, ControllerState, control_step
from attn_callbacks.feedback.resampling import Resampling
from attn_callbacks.feedback.sampler import DynamicDistributedSampler
from tests.feedback.checkpoint import saved

CLASSES = ("negative", "positive")
GROUPS = ("Amazon", "Tweets")
FAIR = torch.tensor([[[90, 10], [10, 90]]])
BIASED = torch.tensor([[[90, 10], [50, 50]]])
BY_GROUP = torch.tensor([[[95, 5], [44, 56]], [[85, 15], [8, 92]]])


MIXED = ((40, 10), (20, 30))  # groups say little about classes: nothing is drawn evenly before a report


def by_class(counts=(90, 10)):
    return DynamicDistributedSampler([label for label, count in enumerate(counts) for _ in range(count)])


def by_group(counts=((48, 2), (10, 40)), **arguments):
    cells = [(g, c) for g, row in enumerate(counts) for c, count in enumerate(row) for _ in range(count)]
    return DynamicDistributedSampler([c for _, c in cells], groups=[g for g, _ in cells], **arguments)


def report(counts=BIASED, **arguments):
    if len(counts) > 1:
        arguments.setdefault("group_names", GROUPS)
    return BiasReport(0, 0, counts, CLASSES, **arguments)


def bound(sampler, *arguments, **keywords):
    feedback = Resampling(*arguments, **keywords)
    feedback.bind_sampler(sampler)
    return feedback


def natural(sampler):
    return sampler.cell_weights.eq(1).all().item()


def told(actions):
    return [(str(action), action.finding) for action in actions]


def noisy(seed, groups=1):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 200, (groups, 2, 2), generator=generator)
    return report(counts)


def test_balanced_by_class():
    sampler = by_class()
    assert told(bound(sampler).apply(report())) == [
        ("positive: share of draws 0.100 -> 0.500", ("class", "positive")),
        ("negative: share of draws 0.900 -> 0.500", None),
    ]
    assert sampler.shares.tolist() == [[pytest.approx(0.5), pytest.approx(0.5)]]
    drawn = np.bincount([index >= 90 for epoch in range(40) for index in (sampler.set_epoch(epoch), *sampler)[1:]])
    np.testing.assert_allclose(drawn / 4000, 0.5, atol=0.03)


def test_balanced_by_group():
    sampler = by_group(MIXED)
    actions = bound(sampler, "group").apply(report(BY_GROUP))
    np.testing.assert_allclose(sampler.shares, 0.25)
    assert told(actions) == [
        ("Amazon, positive: share of draws 0.100 -> 0.250", ("group", "Amazon, positive")),
        ("Amazon, negative: share of draws 0.400 -> 0.250", None),
        ("Tweets, negative: share of draws 0.200 -> 0.250", ("group", "Tweets, negative")),
        ("Tweets, positive: share of draws 0.300 -> 0.250", None),
    ]
    assert (actions[0].old, actions[0].new) == (0.1, 0.25)


def test_by_class_leaves_the_groups_within_a_class_alone():
    sampler = by_group()
    bound(sampler).apply(report(BY_GROUP))
    np.testing.assert_allclose(sampler.shares, [[0.5 * 48 / 58, 0.5 * 2 / 42], [0.5 * 10 / 58, 0.5 * 40 / 42]])


def test_cells_that_training_lacks_get_no_share():
    sampler = by_group(((50, 0), (10, 40)))
    bound(sampler, "group").apply(report(BY_GROUP))
    np.testing.assert_allclose(sampler.shares, [[1 / 3, 0], [1 / 3, 1 / 3]])
    assert sampler.cell_weights[0, 1] == 1


@pytest.mark.parametrize(("strength", "anneal"), [(1.0, 0), (0.5, 0), (1.0, 4), (0.6, 2)])
def test_strength_and_annealing(strength, anneal):
    sampler = by_class()
    feedback = bound(sampler, strength=strength, anneal=anneal)
    for reports in range(1, 7):
        feedback.apply(report())
        part = strength * (min(1, reports / anneal) if anneal else 1)
        expected = (1 - part) * np.array([0.9, 0.1]) + part * np.array([0.5, 0.5])
        np.testing.assert_allclose(sampler.shares[0], expected)


def test_annealing_tells_each_step_and_then_nothing():
    feedback = bound(by_class(), anneal=2)
    shares = [[str(action)[-14:] for action in feedback.apply(report())] for _ in range(3)]
    assert shares == [["0.100 -> 0.300", "0.900 -> 0.700"], ["0.300 -> 0.500", "0.700 -> 0.500"], []]


def test_it_waits_for_a_finding_and_then_goes_on():
    sampler = by_class()
    feedback = bound(sampler, anneal=4)
    ordinary = list(sampler)
    assert feedback.apply(report(FAIR)) == ()
    assert natural(sampler)
    assert list(sampler) == ordinary
    assert len(feedback.apply(report())) == 2
    np.testing.assert_allclose(sampler.shares, [[0.8, 0.2]])
    feedback.apply(report(FAIR))
    np.testing.assert_allclose(sampler.shares, [[0.7, 0.3]])


def test_only_findings_of_its_kind_start_it():
    skewed = torch.tensor([[[180, 20], [80, 120]], [[120, 80], [20, 180]]])
    seen = report(skewed)
    assert {finding.kind for finding in seen.findings} == {"group"}
    assert bound(by_group(), "class").apply(seen) == ()
    assert bound(by_group(MIXED), "group").apply(seen) != ()


def test_always_needs_no_finding():
    sampler = by_class()
    feedback = bound(sampler, when="always")
    np.testing.assert_allclose(sampler.shares, [[0.5, 0.5]])
    assert feedback.early == "always"
    assert feedback.apply(report(FAIR)) == ()
    slow = by_class()
    feedback = bound(slow, when="always", anneal=2)
    assert natural(slow)
    assert feedback.early is None  # nothing has changed yet
    assert len(feedback.apply(report(FAIR))) == 2
    np.testing.assert_allclose(slow.shares, [[0.7, 0.3]])


def test_groups_that_tell_classes_are_drawn_evenly_before_any_report():
    telling, silent = by_group(), by_group(((40, 20), (20, 10)))
    by_classes = by_group(((48, 2), (10, 40)))
    feedback = bound(telling, "group")
    np.testing.assert_allclose(telling.shares, 0.25)
    assert feedback.early == "groups tell classes in training data: Cramér's V 0.77"
    assert feedback.apply(report(BY_GROUP)) == ()  # the ledger says it
    for sampler, by in ((silent, "group"), (by_classes, "class")):
        assert bound(sampler, by).apply(report(FAIR)) == ()
        assert natural(sampler)
    feedback.withdraw()
    assert natural(telling)
    feedback.reinstate()
    np.testing.assert_allclose(telling.shares, 0.25)


def test_an_early_start_is_resumed_and_is_that_of_its_own_data():
    sampler, feedback = by_group(), bound(by_group(), "group")
    resumed = Resampling("group")
    resumed.load_state_dict(saved(feedback.state_dict()))
    resumed.bind_sampler(sampler)
    assert resumed.early == feedback.early
    np.testing.assert_allclose(sampler.shares, 0.25)
    waiting = Resampling("group")
    waiting.load_state_dict({"started": False, "reports": 0})  # of a run that did not begin early
    waiting.bind_sampler(sampler)
    assert natural(sampler)
    feedback.bind(nn.Linear(1, 1))
    first, second = nn.Linear(1, 1), by_group(MIXED)
    feedback.bind(first)
    feedback.bind_sampler(second)
    assert natural(second)
    assert feedback.early is None


def test_few_samples_tell_nothing():
    assert bound(by_group(((3, 0), (0, 3))), "group").early is None


@pytest.mark.parametrize("arguments", [{"policy": "recall"}, {"anneal": 4}, {"strength": 0.0}])
def test_what_leaves_the_first_epoch_alone_is_not_early(arguments):
    feedback = bound(by_group(), "group", **arguments)
    assert feedback.early is None


def test_balanced_data_are_left_as_they_are():
    sampler = by_class((7, 7))
    ordinary = list(sampler)
    assert bound(sampler).apply(report()) == ()
    assert list(sampler) == ordinary


def test_recall_by_hand():
    sampler = by_class()
    feedback = bound(sampler, policy="recall", limit=100.0)
    for _ in range(2):
        feedback.apply(report(torch.tensor([[[900, 100], [500, 500]]])))
    # deviations of -0.2 and 0.2, log weights of -0.4 and 0.4 twice, scaled
    wanted = np.array([0.9, 0.1]) * np.exp([-0.8, 0.8])
    np.testing.assert_allclose(sampler.shares[0], wanted / wanted.sum())


def test_recall_by_group_is_the_controller():
    sampler = by_group()
    feedback = bound(sampler, "group", "recall", step_size=1.0, smoothing=0.2, min_support=5, dead_band=0.0)
    settings = ControllerSettings(1.0, 0.2, 50.0, 5, 0.0)
    state = ControllerState((0.0,) * 4, (math.nan,) * 4)
    shares = np.array([0.48, 0.02, 0.10, 0.40])
    for counts in (BY_GROUP, BY_GROUP.roll(1, 0), BY_GROUP):
        feedback.apply(report(counts))
        recall = [int(counts[g, c, c]) / int(counts[g, c].sum()) for g in (0, 1) for c in (0, 1)]
        state = control_step(state, recall, [100] * 4, shares.tolist(), settings)
        wanted = shares * np.exp(state.log_weight)
        np.testing.assert_allclose(sampler.shares.flatten(), wanted / wanted.sum())


def test_recall_is_averaged_while_it_waits():
    feedback, other = bound(by_class(), policy="recall"), bound(by_class(), policy="recall")
    feedback.apply(report(FAIR))
    feedback.apply(report())
    other.apply(report())
    averages = feedback.state_dict()["average"], other.state_dict()["average"]
    np.testing.assert_allclose(averages[0], [0.9, 0.9 - 0.4 / 1.7])
    np.testing.assert_allclose(averages[1], [0.9, 0.5])


def test_recall_moves_nothing_while_it_waits():
    feedback = bound(by_class(), policy="recall")
    assert feedback.apply(report(min_support=1000)) == ()  # too few for a finding
    assert feedback.state_dict()["log_weight"].tolist() == [0.0, 0.0]


def test_recall_of_a_cell_that_training_lacks_moves_no_other():
    sampler = by_group(((50, 0), (10, 40)))
    feedback = bound(sampler, "group", "recall")
    feedback.apply(report(BY_GROUP))
    expected = control_step(
        ControllerState((0.0,) * 4, (math.nan,) * 4),
        [0.95, math.nan, 0.85, 0.92],
        [100, 0, 100, 100],
        [0.5, 0.0, 0.1, 0.4],
        ControllerSettings(limit=50.0),
    )
    assert feedback.state_dict()["log_weight"].tolist() == list(expected.log_weight)
    assert sampler.shares[0, 1] == 0


def test_cells_that_validation_does_not_have_rest():
    sampler = by_group(((40, 10, 10), (10, 40, 10), (5, 5, 5)))
    feedback = bound(sampler, "group", "recall")
    feedback.apply(report(BY_GROUP))
    ratio = (sampler.shares / sampler.natural_shares).numpy()
    rest = np.concatenate([ratio[:2, 2], ratio[2]])
    np.testing.assert_allclose(rest, rest[0])
    assert ratio[0, 1] > 1.5 * ratio[0, 0]


def test_cells_that_training_does_not_have_move_no_other():
    counts = torch.tensor([[[80, 20, 0], [40, 60, 0], [95, 5, 0]]])
    names = ("a", "b", "c")
    small, whole = by_class((90, 10)), by_class((90, 10))
    bound(small, policy="recall").apply(BiasReport(0, 0, counts, names))
    bound(whole, policy="recall").apply(report(counts[:, :2, :2]))
    assert torch.equal(small.shares, whole.shares)
    names_only = bound(by_class((90, 10, 20)), when="always", anneal=1).apply(report(FAIR))
    assert [str(action).split(":")[0] for action in names_only] == [
        "positive",
        "negative",
        "2",
    ]


def test_the_limit_bounds_how_often_a_cell_is_drawn():
    sampler = by_class((980, 15, 5))
    bound(sampler, limit=10.0, when="always")
    np.testing.assert_allclose(sampler.shares, [[0.80, 0.15, 0.05]])
    recall = by_class((990, 10))
    feedback = bound(recall, policy="recall", limit=3.0, step_size=50.0, smoothing=0.0)
    for _ in range(4):
        feedback.apply(report())
    assert recall.shares[0, 1] <= 0.0300001


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(1e-3, 10)), min_size=1, max_size=8), st.floats(1.01, 100))
def test_limited_shares(cells, limit):
    shares = torch.tensor([count for count, _ in cells], dtype=torch.float64)
    shares /= shares.sum()
    wanted = torch.tensor([wish for _, wish in cells], dtype=torch.float64)
    got = limited_shares(wanted, shares, limit)
    assert float(got.sum()) == pytest.approx(1)
    assert (got <= limit * shares * (1 + 1e-9)).all()
    free = got < limit * shares * (1 - 1e-9)
    scale = (got / wanted)[free]
    if len(scale):  # in proportion where there is room, and what is full would get at least as much
        np.testing.assert_allclose(scale, scale[0])
        assert (got[~free] <= wanted[~free] * scale[0] * (1 + 1e-6)).all()


def test_own_weights_of_samples_count_as_natural():
    sampler = DynamicDistributedSampler([0, 0, 0, 1])
    sampler.set_sample_weights([1.0, 1.0, 2.0, 1.0])
    actions = bound(sampler).apply(report())
    assert str(actions[0]) == "positive: share of draws 0.200 -> 0.500"
    np.testing.assert_allclose(sampler.shares, [[0.5, 0.5]])
    np.testing.assert_allclose(sampler.weights / sampler.weights.sum(), [1 / 8, 1 / 8, 1 / 4, 1 / 2])


def test_of_many_shares_the_largest_changes_are_told():
    sampler = by_class(range(1, 31))
    names = tuple(f"class {index}" for index in range(30))
    counts = (torch.eye(30, dtype=torch.int64) * 100)[None]
    actions = bound(sampler, when="always", anneal=1).apply(BiasReport(0, 0, counts, names))
    assert len(actions) == 13
    assert str(actions[0]).startswith("class 0: share of draws 0.002 -> 0.033")
    assert str(actions[-1]) == "18 other shares of draws changed less"


def test_an_action_answers_the_closest_finding():
    feedback = bound(by_group(((48, 2), (40, 10))), "group")
    group_only = torch.tensor([[[180, 20], [20, 180]], [[140, 60], [60, 140]]])
    found = {action.text.split(":")[0]: action.finding for action in feedback.apply(report(group_only))}
    assert found["Tweets, positive"][0] == "group"
    assert found["Amazon, positive"] is None
    class_only = torch.tensor([[[180, 20], [90, 110]], [[180, 20], [90, 110]]])
    seen = report(class_only)
    assert {finding.key for finding in seen.findings} == {("class", "positive")}
    feedback = bound(by_group(((48, 2), (40, 10))), "group")
    found = {action.text.split(":")[0]: action.finding for action in feedback.apply(seen)}
    assert found["Amazon, positive"] == found["Tweets, positive"] == ("class", "positive")


@pytest.mark.parametrize("end", ["hold", "withdraw"])
@pytest.mark.parametrize("policy", ["balanced", "recall"])
def test_what_does_not_act_changes_nothing_but_says_what_it_would(end, policy):
    sampler, acting = by_class(), by_class()
    ordinary = list(sampler)
    feedback, free = bound(sampler, policy=policy, anneal=3), bound(acting, policy=policy, anneal=3)
    feedback.apply(report())
    free.apply(report())
    feedback.hold(True) if end == "hold" else feedback.withdraw()
    assert natural(sampler)
    assert list(sampler) == ordinary
    for seed in range(2):
        assert told(feedback.apply(noisy(seed))) == told(free.apply(noisy(seed)))
        assert natural(sampler)
    feedback.bind_sampler(sampler)
    assert natural(sampler)
    feedback.hold(False)
    assert natural(sampler) == (end == "withdraw")
    assert torch.equal(sampler.shares, acting.shares) == (end == "hold")


def test_a_dry_run_from_the_start():
    sampler = by_class()
    feedback = Resampling(when="always")
    feedback.hold(True)
    feedback.bind_sampler(sampler)
    feedback.apply(report())
    assert natural(sampler)


@pytest.mark.parametrize("policy", ["balanced", "recall"])
@pytest.mark.parametrize("by", ["class", "group"])
def test_resumed_is_uninterrupted(policy, by):
    def build():
        sampler = by_group(seed=8)
        return sampler, bound(sampler, by, policy, anneal=6, strength=0.9)

    def train(sampler, feedback, epochs):
        for epoch in epochs:
            feedback.bind_sampler(sampler)
            sampler.set_epoch(epoch)
            yield list(sampler)
            feedback.apply(noisy(epoch, groups=2))

    sampler, feedback = build()
    whole = list(train(sampler, feedback, range(10)))
    early, first = build()
    late, second = build()
    parts = list(train(early, first, range(5)))
    second.load_state_dict(saved(first.state_dict()))
    second.load_state_dict(saved(first.state_dict()))
    second.bind(nn.Linear(1, 1))
    assert torch.equal(late.cell_weights, early.cell_weights)
    parts += train(late, second, range(5, 10))
    assert parts == whole
    assert torch.equal(late.cell_weights, sampler.cell_weights)
    assert not natural(late)


def test_withdrawal_is_resumed():
    feedback = bound(by_class())
    feedback.apply(report())
    feedback.withdraw()
    sampler = by_class()
    other = bound(sampler)
    other.load_state_dict(saved(feedback.state_dict()))
    assert other.withdrawn
    assert natural(sampler)
    state = saved(feedback.state_dict())
    assert state == {"withdrawn": True, "started": True, "reports": 1}


def test_a_state_of_other_cells_is_refused():
    feedback = bound(by_class(), policy="recall")
    feedback.apply(report())
    other = bound(by_group(), "group", "recall")
    with pytest.raises(ValueError, match="The saved weights are those of 2 cells, but the sampler has 4"):
        other.load_state_dict(saved(feedback.state_dict()))


def test_a_new_loader_gets_the_weights():
    first, second = by_class(), by_class()
    feedback = bound(first)
    feedback.apply(report())
    feedback.bind_sampler(second)
    assert torch.equal(first.cell_weights, second.cell_weights)
    assert not natural(second)
    stale = by_class()
    stale.set_class_weights([1.0, 77.0])  # what a run before left
    bound(stale)
    assert natural(stale)


def test_a_new_module_starts_anew():
    sampler, module, other = by_class(), nn.Linear(1, 1), nn.Linear(1, 1)
    feedback = bound(sampler)
    feedback.bind(module)
    feedback.apply(report())
    feedback.bind(module)
    assert not natural(sampler)
    feedback.bind(other)
    assert natural(sampler)
    del module, other
    gc.collect()
    feedback.bind_sampler(sampler)
    assert feedback.apply(report()) != ()


def test_a_sampler_given_is_steered_before_the_loader_is_there():
    sampler = by_class()
    feedback = Resampling(sampler=sampler, when="always")
    feedback.bind(nn.Linear(1, 1))
    np.testing.assert_allclose(sampler.shares, [[0.5, 0.5]])
    feedback.bind_sampler(SequentialSampler(range(100)))  # a loader with a batch sampler says this
    feedback.bind_sampler(sampler)
    with pytest.raises(ValueError, match="another `DynamicDistributedSampler` than `sampler=`"):
        feedback.bind_sampler(by_class())
    state = bound(by_class())
    state.apply(report())
    late = by_class()
    Resampling(sampler=late).load_state_dict(saved(state.state_dict()))
    assert not natural(late)


def test_pickling_leaves_the_sampler_of_the_loader_behind():
    sampler = by_class()
    feedback = bound(sampler, policy="recall")
    feedback.bind(nn.Linear(1, 1))
    feedback.apply(report())
    copied = pickle.loads(pickle.dumps(feedback))
    with pytest.raises(ValueError, match="has no sampler to change"):
        copied.apply(report())
    fresh = by_class()
    copied.bind_sampler(fresh)
    assert torch.equal(fresh.cell_weights, sampler.cell_weights)
    given, kept = pickle.loads(pickle.dumps((feedback := Resampling(sampler=sampler), sampler)))
    assert given.sampler is kept


def test_answers_and_repr():
    assert Resampling().answers == {"class"}
    assert Resampling("group").answers == {"class", "group"}
    assert repr(Resampling("group", "recall", anneal=3)) == (
        "Resampling('group', 'recall', strength=1.0, anneal=3, when='biased', limit=50.0)"
    )


class DistributedSamplerWrapper(DistributedSampler):
    """Named as Lightning's."""


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


WRITE = "Write `DataLoader(train, batch_size, sampler=DynamicDistributedSampler(labels"


@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        (RandomSampler(range(3)), f"got RandomSampler. {WRITE}))`."),
        (None, f"got NoneType. {WRITE}))`."),
        (SequentialSampler(range(3)), f"got SequentialSampler. {WRITE}))`. `overfit_batches` puts"),
        (
            DistributedSamplerWrapper(range(3), 1, 0),
            f"got DistributedSamplerWrapper. {WRITE}))`. Lightning wraps other samplers",
        ),
        (torch.utils.data.DataLoader(Stream()).sampler, "An iterable data set cannot be resampled."),
    ],
)
def test_other_samplers_are_refused(sampler, text):
    with pytest.raises(ValueError, match="needs a training loader with a `DynamicDistributedSampler`") as raised:
        Resampling().bind_sampler(sampler)
    assert text in str(raised.value)


def test_groups_are_needed_for_groups():
    with pytest.raises(ValueError, match="by='group' needs a sampler that knows the groups"):
        Resampling("group").bind_sampler(by_class())
    with pytest.raises(ValueError, match="by='group' needs a sampler that knows the groups"):
        Resampling("group", sampler=by_class())
    with pytest.raises(ValueError, match=r"labels, groups=groups\)"):
        Resampling("group").bind_sampler(None)
    feedback = bound(by_group(), "group", "recall")
    with pytest.raises(ValueError, match="by='group' needs groups in the report, got none"):
        feedback.apply(report())
    assert bound(by_group(MIXED), "group").apply(report())[0].text.startswith("0, positive: share of draws 0.100 -> ")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"by": "sample"}, ValueError, "`by` must be one of"),
        ({"policy": "loss"}, ValueError, "`policy` must be one of"),
        ({"when": "never"}, ValueError, "`when` must be one of"),
        ({"strength": 1.5}, ValueError, "`strength` must lie between 0 and 1"),
        ({"anneal": -1}, ValueError, "`anneal` must be at least 0"),
        ({"limit": 1.0}, ValueError, "`limit` must be above 1"),
        ({"step_size": 0.0}, ValueError, "`step_size` must be above 0"),
        ({"sampler": RandomSampler(range(3))}, TypeError, "`sampler` must be a `DynamicDistributedSampler`"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        Resampling(**arguments)


def test_apply_needs_a_sampler():
    with pytest.raises(ValueError, match="has no sampler to change"):
        Resampling().apply(report())

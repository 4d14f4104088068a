"""Laws of the mixture: a pure function of the index, exact shares, each sequence once per
epoch, also across phases.
"""

import collections
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies

from jaxpt import config
from jaxpt.data import mixture
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.spec import UserError

N_SEQUENCES = {"code": 101, "prose": 307, "wiki": 53}


def mixing(*phases, n_sequences=N_SEQUENCES, batch_size=7, seed=0) -> MixtureSchedule:
    return MixtureSchedule(config.MixtureConfig(phases=phases, seed=seed), n_sequences, batch_size)


@settings(deadline=None, max_examples=15)
@example(
    shares=[3, 1, 5, 1, 1, 5, 5, 5]
)  # always serving the source that is furthest behind breaks the law here
@given(shares=strategies.lists(strategies.floats(0.01, 1.0), min_size=1, max_size=9))
def test_after_any_number_of_sequences_every_source_has_its_share_to_within_one_sequence(shares):
    names = [f"s{i}" for i in range(len(shares))]
    mix = mixing((0, dict(zip(names, shares, strict=True))), n_sequences=dict.fromkeys(names, 1000))
    n = 1500
    taken = np.array([[mix.sequence_at(i)[0] == name for name in names] for i in range(n)]).cumsum(
        0
    )
    counts = np.array(mix.tables[0].round.counts)
    slots = counts / counts.sum()
    ideal = np.arange(1, n + 1)[:, None] * slots
    assert np.abs(taken - ideal).max() < 1
    assert np.abs(slots / (np.array(shares) / sum(shares)) - 1).max() < 0.02, (
        "a share here is at least 5 slots of 4,096"
    )
    assert [mix.count_uses(k) for k in (1, 17, n)] == [taken[k - 1].tolist() for k in (1, 17, n)]


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ((0.75, 0.25), (3, 1)),
        ((0.9, 0.05, 0.05), (18, 1, 1)),
        ((1, 2), (1, 2)),
        ((5, 0), (1, 0)),
        ((0.7, 0.2, 0.1), (7, 2, 1)),
    ],
)
def test_simple_fractions_are_exact(shares, counts):
    assert tuple(mixture.count_slots(shares)) == counts


def test_no_phases_mean_shares_in_proportion_to_the_sequences():
    mix = mixing()
    assert mix.compute_epochs(sum(N_SEQUENCES.values())) == pytest.approx(
        dict.fromkeys(N_SEQUENCES, 1.0)
    )
    assert mix.tables[0].round.counts == [N_SEQUENCES[name] for name in mix.names]


SIZES = strategies.one_of(strategies.integers(1, 9), strategies.integers(1, 30_000))


@settings(deadline=None, max_examples=25)
@example(sizes=[1, 60_000])
@example(sizes=[3, 70_001, 20_003])
@example(sizes=[1] * 1000 + [50_000, 70_001])
@example(sizes=[*range(1, 300), 50_000, 70_001])
@example(sizes=[1 + int(30_000 / (i + 1)) for i in range(2000)])
@example(sizes=[1, *[20_000] * 5])
@given(sizes=strategies.lists(SIZES, min_size=2, max_size=40))
def test_one_pass_over_sources_of_any_sizes_reads_each_sequence_once_and_in_proportion(sizes):
    names = [f"s{i:04d}" for i in range(len(sizes))]
    n_sequences = dict(zip(names, sizes, strict=True))
    mix = mixing(n_sequences=n_sequences)
    n = sum(sizes)
    order = [mix.tables[0].round.source_at(i) for i in range(n // math.gcd(*sizes))]
    order = np.array(order * math.gcd(*sizes))[:, 0]
    places = [np.flatnonzero(order == k) for k in range(len(sizes))]
    assert list(map(len, places)) == sizes, "one pass"
    bound = 1 if mix.tables[0].round.n_blocks == 1 else 2
    for size, at in zip(sizes, places, strict=True):
        uses = np.arange(size)
        assert (uses + 1 - (at + 1) * size / n).max() < bound, "just read"
        assert (at * size / n - uses).max() < bound, "before it is read"
    for index in (0, 1, n // 3, n - 1, n + 5, 7 * n + 4096):
        name, sequence = mix.sequence_at(index)
        assert names[order[index % n]] == name and 0 <= sequence < n_sequences[name]
        uses = np.bincount(order[: index % n], minlength=len(sizes)) + index // n * np.array(sizes)
        assert mix.count_uses(index) == uses.tolist()


def test_a_source_of_few_sequences_is_read_once_in_a_pass_over_millions():
    sizes = {"web": 50_000_017, "wiki": 3_000_001, **{f"tiny{i:04d}": 1 + i for i in range(3000)}}
    mix = mixing(n_sequences=sizes)
    n = sum(sizes.values())
    assert set(mix.compute_epochs(n).values()) == {1.0}
    halves = np.array([sizes[name] / 2 for name in mix.names])
    assert np.abs(mix.count_uses(n // 2) - halves).max() <= 1
    mix.check_max_epochs(n, (("all", 1.0),))


def test_every_epoch_reads_each_sequence_once_and_in_another_order():
    mix = mixing((0, {"code": 0.25, "prose": 0.75}))
    order = collections.defaultdict(list)
    for i in range(1700):
        name, index = mix.sequence_at(i)
        order[name].append(index)
    for name, n in (("code", 101), ("prose", 307)):
        epochs = [order[name][k * n : (k + 1) * n] for k in range(len(order[name]) // n)]
        assert len(epochs) >= 4
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        assert epochs[0] != list(range(n))


def test_uses_are_counted_across_phases():
    """The k-th use of a source is the same sequence whatever the shares were, so that phases
    neither repeat nor skip.
    """
    plain = mixing((0, {"code": 1.0}))
    order = [plain.sequence_at(i)[1] for i in range(400)]
    mix = mixing(
        (0, {"prose": 1.0}),
        (3, {"code": 0.3, "prose": 0.7}),
        (11, {"code": 1.0}),
        (20, {"prose": 0.5, "code": 0.1, "wiki": 0.4}),
    )
    seen = [mix.sequence_at(i) for i in range(60 * 7)]
    assert [index for name, index in seen if name == "code"] == order[
        : sum(name == "code" for name, _ in seen)
    ]
    assert {name for name, _ in seen[: 3 * 7]} == {"prose"}, (
        "phases start at steps; sequences are steps x batch_size"
    )
    assert {name for name, _ in seen[11 * 7 : 20 * 7]} == {"code"}
    for n in (0, 1, 3 * 7, 3 * 7 + 5, 11 * 7, 60 * 7):
        taken = collections.Counter(name for name, _ in seen[:n])
        assert mix.compute_epochs(n) == {
            name: taken[name] / N_SEQUENCES[name] for name in mix.names
        }


def test_any_index_takes_the_same_work():
    mix = mixing((0, {"code": 0.3, "prose": 0.7}), (1000, {"wiki": 0.123, "prose": 0.877}))

    def n_calls(index):
        calls = []
        sys.setprofile(lambda frame, event, argument: calls.append(event))
        try:
            mix.sequence_at(index)
        finally:
            sys.setprofile(None)
        return len(calls)

    assert n_calls(10**12) == n_calls(0) < 50
    assert n_calls(10**18) == n_calls(10**6)


def test_the_order_is_a_pure_function_of_seed_and_index():
    one, again, other = mixing(), mixing(), mixing(seed=1)
    indices = [5, 10**12, 3, 0, 10**6, 3]
    assert [one.sequence_at(i) for i in indices] == [
        again.sequence_at(i) for i in reversed(indices)
    ][::-1]
    assert [one.sequence_at(i)[0] for i in range(99)] == [
        other.sequence_at(i)[0] for i in range(99)
    ]
    assert [one.sequence_at(i) for i in range(99)] != [other.sequence_at(i) for i in range(99)]
    # an order on disk, so that a new release of a dependency cannot change the data of a
    # half-trained run in silence
    assert [one.sequence_at(i) for i in (0, 1, 2, 10**12 + 1)] == GOLDEN


GOLDEN = [("prose", 212), ("prose", 296), ("code", 73), ("code", 60)]


def test_a_shuffle_has_no_order_left():
    """Neighbours in the file are not neighbours in the epoch: their distances are those of random
    numbers.
    """
    n = 10_007
    mix = mixing(n_sequences={"only": n})
    indices = np.array([mix.sequence_at(i)[1] for i in range(n)])
    assert abs(np.corrcoef(indices[1:], indices[:-1])[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(indices))) == pytest.approx(n / 3, rel=0.05)
    second = np.array([mix.sequence_at(n + i)[1] for i in range(n)])
    assert abs(np.corrcoef(indices, second)[0, 1]) < 0.05


def test_a_source_that_runs_out_is_named_before_the_run():
    mix = mixing((0, {"code": 0.5, "prose": 0.5}))
    mix.check_max_epochs(n_sequences=202, max_epochs=(("all", 1),))
    mix.check_max_epochs(n_sequences=10**9, max_epochs=())
    mix.check_max_epochs(n_sequences=350, max_epochs=(("all", 1), ("code", 1.8)))
    with pytest.raises(
        UserError, match=r"code is read 1\.73 times by step 50 \(it lasts until 28\), 1 allowed"
    ) as error:
        mix.check_max_epochs(n_sequences=350, max_epochs=(("all", 1),))
    assert "prose" not in str(error.value)
    with pytest.raises(UserError, match=r"no packed source is called 'cod'"):
        mix.check_max_epochs(n_sequences=350, max_epochs=(("cod", 1),))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (((0, {"cod": 1.0}),), "did you mean code"),
        (((0, {"code": -0.5, "prose": 1.0}),), "expected a share of at least 0"),
        (((0, {"code": float("nan")}),), "expected a share of at least 0"),
        (((0, {"code": "much"}),), "expected a share of at least 0"),
        (((0, {"code": 0.0}),), "sum to nothing"),
        (((0, {}),), "sum to nothing"),
        (((5, {"code": 1.0}),), "start at 0 and rise"),
        (((0, {"code": 1.0}), (9, {"prose": 1.0}), (9, {"code": 1.0})), "start at 0 and rise"),
        (((0, {"code": 1.0, "empty": 1.0}),), "empty has no sequences"),
        (((0, {"code": 1.0, "prose": 1e-5}),), "at least 1/4,096"),
    ],
)
def test_phases_that_cannot_be_run_are_refused_on_one_line(phases, message):
    with pytest.raises(UserError, match=message) as error:
        mixing(*phases, n_sequences={**N_SEQUENCES, "empty": 0})
    assert "\n" not in str(error.value)


def test_a_source_without_a_share_is_not_read():
    mix = mixing((0, {"code": 1.0, "wiki": 0.0}))
    assert {mix.sequence_at(i)[0] for i in range(50)} == {"code"}


SHARES = strategies.fixed_dictionaries(
    {name: strategies.integers(1, 9) for name in N_SEQUENCES}
)  # small tables, quickly made


@settings(deadline=None, max_examples=12)
@given(
    first=SHARES,
    changes=strategies.lists(
        strategies.tuples(strategies.integers(0, 40), strategies.integers(1, 13), SHARES),
        max_size=4,
    ),
)
def test_other_shares_or_another_batch_in_mid_run_repeat_no_sequence_and_skip_none(first, changes):
    """A run is resumed several times, each time with other settings; only the data history knows
    the former ones; what it has read of a source is the beginning of that source's order.
    """
    batch_size, n_done, n_read, shares = 7, 0, 0, first
    mix, seen = mixing((0, first)), []
    for n_steps, *then in [*changes, (9, 5, first)]:
        seen += [mix.sequence_at(i) for i in range(n_read, n_read + n_steps * batch_size)]
        n_done, n_read = n_done + n_steps, n_read + n_steps * batch_size
        batch_size, shares = then
        history = [
            mixture.MixturePhase.from_json(json.loads(json.dumps(phase.to_json())))
            for phase in mix.data_history(n_read)
        ]
        before = [mix.count_uses(n) for n in range(0, n_read + 1, 5)]
        mix = MixtureSchedule(
            config.MixtureConfig(phases=((0, shares),)),
            N_SEQUENCES,
            batch_size,
            history,
            n_done,
            n_read,
        )
        assert [mix.count_uses(n) for n in range(0, n_read + 1, 5)] == before
        assert [mix.sequence_at(i) for i in range(n_read)] == seen
        assert mix.phases[-1].shares == shares and mix.phases[-1].batch_size == batch_size
    for name in N_SEQUENCES:
        alone = mixing((0, {name: 1.0}))
        taken = [index for source, index in seen if source == name]
        assert taken == [alone.sequence_at(i)[1] for i in range(len(taken))]


def test_a_configured_phase_begins_at_its_step_whatever_the_batch_was_before():
    settings_of_phases = config.MixtureConfig(
        phases=((0, {"code": 1.0}), (10, {"prose": 1.0}), (20, {"wiki": 1.0}))
    )
    mix = MixtureSchedule(settings_of_phases, N_SEQUENCES, 7)
    assert [(each.step, each.sequence) for each in mix.phases] == [(0, 0), (10, 70), (20, 140)]
    wider = MixtureSchedule(
        settings_of_phases, N_SEQUENCES, 100, mix.data_history(12 * 7), 12, 12 * 7
    )
    assert [(each.step, each.sequence, each.batch_size) for each in wider.phases] == [
        (0, 0, 7),
        (10, 70, 7),
        (12, 84, 100),
        (20, 884, 100),
    ]
    assert [wider.sequence_at(i) for i in range(140)] == [mix.sequence_at(i) for i in range(140)], (
        "only the batch size differs: the same sequences follow"
    )
    assert {wider.sequence_at(i)[0] for i in range(884, 900)} == {"wiki"}
    again = mixture.schedule_from_history(wider.phases, N_SEQUENCES, 0)
    assert again.phases == wider.phases and again.sequence_at(890) == wider.sequence_at(890)
    assert wider.phase_at(883).step_at(883) == 19


def test_a_ramp_is_steps_of_constant_shares():
    phases = config.ramp_phases(100, 180, {"prose": 3}, {"prose": 1, "code": 1}, n=4)
    assert [step for step, _ in phases] == [100, 120, 140, 160, 180]
    assert [shares["code"] for _, shares in phases] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    assert all(sum(shares.values()) == pytest.approx(1) for _, shares in phases)
    mix = mixing((0, {"prose": 1.0}), *phases)
    taken = [
        sum(mix.sequence_at(i)[0] == "code" for i in range(7 * a, 7 * (a + 20))) / 140
        for a in (80, 100, 120, 140, 160, 180)
    ]
    assert taken == pytest.approx([0, 0, 0.125, 0.25, 0.375, 0.5], abs=1 / 140)
    assert len(config.ramp_phases(5, 8, {"a": 1}, {"b": 1})) == 4, "no two phases at one step"


def test_of_a_thousand_sources_a_refusal_names_the_worst_three():
    sizes = {f"source_{i:04d}": 10 + i % 7 for i in range(1000)} | {"worst": 2}
    phases = ((0, dict.fromkeys(sizes, 1.0)),)
    schedule = MixtureSchedule(config.MixtureConfig(phases=phases), sizes, 32)
    with pytest.raises(UserError, match=r"worst is read 25 times .* and so of 998 more") as refused:
        schedule.check_max_epochs(50_050, (("all", 1.0),))
    assert len(str(refused.value)) < 500
    with pytest.raises(
        UserError, match=r"no packed source is called 'wurst'.* and 977 more"
    ) as said:
        schedule.check_max_epochs(50_050, (("wurst", 1.0),))
    assert len(str(said.value)) < 600

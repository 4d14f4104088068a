"""Decide which sequence of which source a run reads at each global index, in constant time.

The order is a pure function of the seed, the phases and the index, so that resuming needs one
integer. A phase gives each source a whole number of slots in a round, laid out so that the share
after any number of sequences is within one sequence of the ideal, or two in rounds of more than
MAX_SLOTS. Use k of a source is sequence k of its shuffled order, and every epoch is another
shuffle. Uses are counted across phases, so no sequence comes twice in an epoch. Changing the shares
or the batch size from some step on adds a phase to a run's data history, which later settings do
not change.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import functools
import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from jaxpt import config
from jaxpt.spec import Record, UserError
from jaxpt.text import name_some

MAX_NAMED = 3  # sources that a sentence names
MAX_SLOTS = 4096  # of a round for shares that are fractions, and laid out at once
MAX_EXACT_SLOTS = 2**31  # of a round for whole numbers: products of two counts fit 63 bits
N_CACHED_BLOCKS = 16


@dataclasses.dataclass(frozen=True)
class MixturePhase(Record):
    """Consecutive sequences that a run reads with one mixture, batch size and data set.

    Attributes:
        step: steps done before it.
        sequence: sequences read before it, over all sources.
        batch_size: global, in packed sequences.
        shares: source -> share, of any sum.
        fingerprint: of the packed sequences.
    """

    step: int
    sequence: int
    batch_size: int
    shares: dict[str, float]
    fingerprint: str = ""

    def step_at(self, sequence: int) -> int:
        """Return the steps done before the one that reads a global sequence index."""
        return self.step + (sequence - self.sequence) // self.batch_size


@dataclasses.dataclass(frozen=True)
class SlotTable:
    """The order of sources while the shares stay the same.

    Attributes:
        start: its first global sequence index.
        n_used: sequences read before it, per source.
        round: the slots that repeat.
    """

    start: int
    n_used: list[int]
    round: Round


class MixtureSchedule:
    """The order of all sequences of a run."""

    def __init__(
        self,
        mixture: config.MixtureConfig,
        n_sequences: Mapping[str, int],
        batch_size: int,
        past: Sequence[MixturePhase] = (),
        step: int = 0,
        sequence: int = 0,
        fingerprint: str = "",
        batch_sizes: Sequence[tuple[int, int]] = (),
    ):
        """Build the slot tables.

        Args:
            mixture: phases and seed; without phases the shares are in proportion to the sequences.
            n_sequences: sequences per source.
            batch_size: global, in sequences; turns steps into sequences.
            past: data history of a resumed run, which `mixture` does not change.
            step: steps done so far.
            sequence: sequences read so far.
            fingerprint: of the packed sequences, for the data history.
            batch_sizes: ((from step, batch size), ...), where it changes as the run goes on;
                they come before batch_size.

        Raises:
            UserError: phases that cannot be run.
        """
        check_phase_sources(mixture.phases, n_sequences)
        requested = mixture.phases or ((0, dict(n_sequences)),)
        now = MixturePhase(step, sequence, batch_size, {}, fingerprint)
        planned = plan_phases(requested, past, now, batch_sizes)
        self.phases = [*past, *planned]
        # a source that no longer exists keeps its place in the history
        names = set(n_sequences)
        for phase in past:
            names.update(phase.shares)
        self.names = sorted(names)
        self.n_sequences = {name: n_sequences.get(name, 0) for name in self.names}
        self.seed = mixture.seed
        self.tables: list[SlotTable] = []
        self.starts: list[int] = []
        shares = None
        for phase in self.phases:
            if phase.shares != shares:  # else only the batch size differs: the table continues
                shares = phase.shares
                self.add_table(phase)

    def add_table(self, phase: MixturePhase) -> None:
        """Add the slot table of a phase that changes the shares."""
        n_used = self.count_uses(phase.sequence)
        shares = [phase.shares.get(name, 0.0) for name in self.names]
        table = SlotTable(phase.sequence, n_used, Round(count_slots(shares)))
        self.tables.append(table)
        self.starts.append(phase.sequence)

    def sequence_at(self, index: int) -> tuple[str, int]:
        """Return (source, index within the source) of a global sequence index."""
        table, n_rounds, slot = self.locate_slot(index)
        source, rank = table.round.source_at(slot)
        n_before = table.n_used[source] + n_rounds * table.round.counts[source]
        use = n_before + rank
        return self.names[source], self.shuffle_index(source, use)

    def shuffle_index(self, source: int, use: int) -> int:
        """Return the sequence that a use of a source reads: a permutation in every epoch."""
        name = self.names[source]
        n = self.n_sequences[name]
        epoch, position = divmod(use, n)
        key = f"{self.seed}/{name}/{epoch}".encode()
        digest = hashlib.blake2b(key, digest_size=4).digest()
        seed = int.from_bytes(digest)
        return index_shuffle(position, n - 1, seed, 4)

    def locate_slot(self, index: int) -> tuple[SlotTable, int, int]:
        """Return the table of an index, the whole rounds of it before the index, and the slot."""
        if index < 0:
            raise IndexError(f"sequence index: expected 0 or more, got {index}.")
        place = bisect.bisect_right(self.starts, index) - 1
        table = self.tables[place]
        n_rounds, slot = divmod(index - table.start, table.round.n_slots)
        return table, n_rounds, slot

    def count_uses(self, n_sequences: int) -> list[int]:
        """Return how many of the run's first sequences each source gives."""
        if n_sequences == 0:
            return [0] * len(self.names)
        table, n_rounds, slot = self.locate_slot(n_sequences - 1)
        n_used = np.array(table.n_used)
        n_used += n_rounds * np.array(table.round.counts)
        n_used += table.round.count_uses(slot + 1)
        return n_used.tolist()

    def compute_epochs(self, n_sequences: int) -> dict[str, float]:
        """Return how many times the run's first sequences read each source."""
        epochs = {}
        uses = self.count_uses(n_sequences)
        for name, n_used in zip(self.names, uses, strict=True):
            available = max(1, self.n_sequences[name])
            epochs[name] = n_used / available
        return epochs

    def data_history(self, n_sequences: int) -> list[MixturePhase]:
        """Return the phases in which the run's first sequences are read."""
        return [phase for phase in self.phases if phase.sequence < n_sequences]

    def phase_at(self, sequence: int) -> MixturePhase:
        """Return the phase that reads a global sequence index."""
        starts = [phase.sequence for phase in self.phases]
        place = bisect.bisect_right(starts, sequence) - 1
        return self.phases[max(0, place)]

    def sequences_of(self, step: int) -> range:
        """Return the global indices of the sequences of a step, counted from 1."""
        starts = [phase.step for phase in self.phases]
        phase = self.phases[bisect.bisect_left(starts, step) - 1]
        first = phase.sequence + (step - 1 - phase.step) * phase.batch_size
        return range(first, first + phase.batch_size)

    def check_max_epochs(self, n_sequences: int, max_epochs: Sequence[tuple[str, float]]) -> None:
        """Check before a run that no source is read too often.

        Args:
            n_sequences: that the run reads in total.
            max_epochs: (source, epochs); "all" is for the sources that are not named.

        Raises:
            UserError: names every source that is read too often, and the step until which it lasts.
        """
        limits = dict(max_epochs)
        known = {*self.names, "all"}
        unknown = sorted(limits.keys() - known)
        if unknown:
            raise UserError(
                f"mixture.max_epochs: no packed source is called {unknown[0]!r}; "
                f"there are: {name_some(self.names)}, and all."
            )
        default = limits.get("all", math.inf)
        read_epochs = self.compute_epochs(n_sequences)
        excesses = {}
        for name, epochs in read_epochs.items():
            limit = limits.get(name, default)
            if epochs > limit:
                excesses[name] = epochs / limit if limit else math.inf
        if not excesses:
            return
        end = self.step_of(n_sequences)
        sentences = []
        for name in sorted(excesses, key=lambda name: -excesses[name])[:MAX_NAMED]:
            limit = limits.get(name, default)
            last_step = self.step_of(self.find_exhausted(name, limit, n_sequences))
            sentences.append(
                f"{name} is read {read_epochs[name]:.3g} times by step {end:,} "
                f"(it lasts until {last_step:,}), {limit:g} allowed"
            )
        n_more = len(excesses) - len(sentences)
        more = f"; and so of {n_more:,} more sources" if n_more else ""
        raise UserError(
            f"mixture.max_epochs: {'; '.join(sentences)}{more}. "
            "Lower its share or train.steps, pack more, or raise max_epochs."
        )

    def step_of(self, sequence: int) -> int:
        """Return the steps done before a global sequence index."""
        return self.phase_at(sequence).step_at(sequence)

    def find_exhausted(self, name: str, limit: float, n_sequences: int) -> int:
        """Return the most sequences that a run can read without exceeding a source's limit."""

        def count_epochs(n: int) -> float:
            return self.compute_epochs(n)[name]

        candidates = range(n_sequences + 1)
        return bisect.bisect_right(candidates, limit, key=count_epochs) - 1


def plan_phases(
    requested: config.Phases,
    past: Sequence[MixturePhase],
    now: MixturePhase,
    batch_sizes: Sequence[tuple[int, int]] = (),
) -> list[MixturePhase]:
    """Return the phases that begin at a run's position or later.

    Args:
        requested: (first step, shares), as configured.
        past: the run's data history.
        now: the run's position, batch size and data set; its shares are not read.
        batch_sizes: (first step, batch size), where it changes.
    """
    changes: dict[int, dict[str, Any]] = {}
    for start, shares in requested:
        changes.setdefault(start, {})["shares"] = dict(shares)
    for start, batch_size in batch_sizes:
        changes.setdefault(start, {})["batch_size"] = batch_size
    phase, later = now, []
    for start in sorted(changes):
        if start <= now.step:
            now = phase = dataclasses.replace(now, **changes[start])
            continue
        sequence = phase.sequence + (start - phase.step) * phase.batch_size
        same = dataclasses.replace(phase, step=start, sequence=sequence)
        changed = dataclasses.replace(same, **changes[start])
        if changed != same:
            phase = changed
            later.append(phase)
    if past:
        continued = dataclasses.replace(past[-1], step=now.step, sequence=now.sequence)
        if continued == now:
            return later
    return [now, *later]


def schedule_from_history(
    phases: Sequence[MixturePhase], n_sequences: Mapping[str, int], seed: int
) -> MixtureSchedule:
    """Return the schedule of a run from its data history."""
    last = phases[-1]
    mixture = config.MixtureConfig(phases=((0, last.shares),), seed=seed)
    position = (last.step, last.sequence, last.fingerprint)
    return MixtureSchedule(mixture, n_sequences, last.batch_size, phases, *position)


# ---- checks


def check_phase_sources(phases: config.Phases, n_sequences: Mapping[str, int]) -> None:
    """Raise UserError for phases out of order, unknown sources or meaningless shares."""
    starts = [step for step, _ in phases]
    is_rising = starts == sorted(set(starts))
    starts_at_0 = not starts or starts[0] == 0
    if not starts_at_0 or not is_rising:
        raise UserError(f"mixture.phases: expected steps that start at 0 and rise, got {starts}.")
    for step, shares in phases:
        for name, share in shares.items():
            check_share(step, name, share, n_sequences)
        total = sum(shares.values())
        if total <= 0:
            raise UserError(
                f"mixture.phases: the shares from step {step} sum to nothing ({dict(shares)}). "
                "Give at least one source a share above 0."
            )
        for name, share in shares.items():
            frac = share / total
            if 0 < frac < 1 / MAX_SLOTS and not reduce_shares(list(shares.values())):
                raise UserError(
                    f"mixture.phases: {name} from step {step}: expected a share of 0 or at least "
                    f"1/{MAX_SLOTS:,} of the sequences, got {frac:.2g}."
                )


def check_share(step: int, name: str, share: float, n_sequences: Mapping[str, int]) -> None:
    """Raise UserError for an unknown source, a share that is no number, or an empty source."""
    if name not in n_sequences:
        near = difflib.get_close_matches(name, n_sequences, 1)
        hint = f"there are: {name_some(sorted(n_sequences))}."
        if near:
            hint = f"did you mean {near[0]}?"
        raise UserError(
            f"mixture.phases: no packed source is called {name!r} (from step {step}); {hint}"
        )
    is_number = isinstance(share, (int, float)) and math.isfinite(share)
    if not is_number or share < 0:
        raise UserError(
            f"mixture.phases: {name} from step {step}: expected a share of at least 0, "
            f"got {share!r}."
        )
    if share and not n_sequences[name]:
        raise UserError(
            f"mixture.phases: {name} has no sequences to read from step {step}. "
            "Leave it out, or pack more of it."
        )


# ---- rounds of slots


def count_slots(shares: Sequence[float]) -> np.ndarray:
    """Return whole numbers in proportion to the shares: a source's slots in a round.

    Shares that are whole numbers themselves, such as numbers of sequences, are kept exactly. Of
    others, of all such numbers with at most MAX_SLOTS together, those whose largest relative error
    is smallest, and of equals the smallest; every share above 0 gets a slot.
    """
    exact = reduce_shares(shares)
    if exact:
        return np.array(exact, np.int64)
    ideal = np.asarray(shares, np.float64) / np.sum(shares)
    is_present = ideal > 0
    n_slots = np.arange(1, MAX_SLOTS + 1)
    scaled = np.rint(n_slots[:, None] * ideal)
    candidates = np.maximum(scaled, is_present).astype(np.int64)
    fits = candidates.sum(1) <= MAX_SLOTS
    candidates = candidates[fits]
    totals = candidates.sum(1, keepdims=True)
    realized = candidates / totals
    ratios = realized[:, is_present] / ideal[is_present]
    errors = np.abs(ratios - 1).max(1)
    best = np.argmin(errors.round(9))
    return candidates[best]


def reduce_shares(shares: Sequence[float]) -> list[int]:
    """Return whole shares divided by what divides them all; none if they are not whole."""
    if not all(float(share).is_integer() for share in shares):
        return []
    whole = list(map(int, shares))
    divisor = math.gcd(*whole)
    reduced = [share // divisor for share in whole]
    return reduced if sum(reduced) <= MAX_EXACT_SLOTS else []


class SlotBlock(NamedTuple):
    """Up to MAX_SLOTS consecutive slots of a round.

    Attributes:
        groups: the group of each slot.
        ranks: earlier slots of the round with the same group, per slot.
        before: [groups] slots in earlier blocks.
    """

    groups: list[int]
    ranks: list[int]
    before: np.ndarray


class Round:
    """Slots that repeat; after any number of them each source is within one of its share.

    Of several blocks it is within two: `order_slots` keeps its bound in a layout of its own, not
    between given ends. The largest of 6,500 random rounds was 1.39.

    Blocks of MAX_SLOTS are laid out when they are asked for, in any order. What each source has
    had before a block follows from halving: at the middle of a range of blocks each has its share
    of the slots so far, rounded down, or up for those with the largest remainders. Sources with
    equally many slots take turns in those of their group, so that a thousand small ones do not all
    come at once.

    Attributes:
        counts: slots of each source.
        n_slots: of all.
    """

    def __init__(self, counts: np.ndarray):
        """Group the sources.

        Args:
            counts: [sources] int64, slots of each.
        """
        self.counts = counts.tolist()
        self.n_slots = int(counts.sum())
        self.n_blocks = -(-self.n_slots // MAX_SLOTS)  # rounded up
        self.members = [[source] for source in range(len(counts))]
        if self.n_blocks > 1:
            self.members = [np.flatnonzero(counts == n).tolist() for n in np.unique(counts)]
        self.sizes = np.array([counts[members].sum() for members in self.members])
        self.block_at = functools.lru_cache(N_CACHED_BLOCKS)(self.lay_out_block)
        self.block_at(0)

    def source_at(self, slot: int) -> tuple[int, int]:
        """Return the source of a slot and the number of its earlier slots in the round."""
        number, place = divmod(slot, MAX_SLOTS)
        block = self.block_at(number)
        members = self.members[block.groups[place]]
        rank, turn = divmod(block.ranks[place], len(members))
        return members[turn], rank

    def count_uses(self, n_slots: int) -> np.ndarray:
        """Return how many of the round's first slots each source has, [sources]."""
        number = min(n_slots // MAX_SLOTS, self.n_blocks - 1)
        block = self.block_at(number)
        started = block.groups[: n_slots - number * MAX_SLOTS]
        of_groups = block.before + np.bincount(started, minlength=len(self.members))
        uses = np.zeros(len(self.counts), np.int64)
        for members, n in zip(self.members, of_groups.tolist(), strict=True):
            each, n_more = divmod(n, len(members))
            uses[members] = each
            uses[members[:n_more]] += 1
        return uses

    def lay_out_block(self, number: int) -> SlotBlock:
        """Return a block of the round."""
        first, stop = 0, self.n_blocks
        before, after = np.zeros_like(self.sizes), self.sizes
        while stop - first > 1:
            middle = (first + stop) // 2
            at_middle = self.round_shares(middle * MAX_SLOTS, before, after)
            if number < middle:
                stop, after = middle, at_middle
            else:
                first, before = middle, at_middle
        groups = order_slots(self.sizes, before, after)
        by_group = np.argsort(groups, kind="stable")
        n_here = after - before
        firsts = np.cumsum(n_here) - n_here  # where a group's slots begin among these
        ranks = np.empty_like(groups)
        ranks[by_group] = np.arange(len(groups)) - firsts[groups[by_group]]
        ranks += before[groups]
        return SlotBlock(groups.tolist(), ranks.tolist(), before)

    def round_shares(self, n_slots: int, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return whole shares of the round's first slots by largest remainders, [groups].

        Args:
            n_slots: which the shares add up to.
            before: [groups] at least so many.
            after: [groups] at most so many.
        """
        ideal = n_slots * self.sizes  # times self.n_slots
        counts = np.clip(ideal // self.n_slots, before, after)
        while n_left := n_slots - int(counts.sum()):
            step = 1 if n_left > 0 else -1
            is_free = counts < after if n_left > 0 else counts > before
            free = np.flatnonzero(is_free)
            lag = step * (ideal - counts * self.n_slots)
            furthest = np.argsort(-lag[free], kind="stable")[: abs(n_left)]
            counts[free[furthest]] += step
        return counts


def order_slots(counts: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return a source per slot, so that after any slot each source is within one of its share.

    Of the sources that are behind by enough, the one that would first fall behind by one is next.

    Source: Tijdeman 1980, "The chairman assignment problem"; the deviation stays within
    1 - 1 / (2 sources - 2).

    Args:
        counts: [sources] slots in the whole round.
        before: [sources] of these before the first slot that is returned.
        after: [sources] of these up to the last.
    """
    n_present = int(np.count_nonzero(counts))
    n_slots = int(counts.sum())
    margin = max(1, 2 * n_present - 2)
    uses = []  # (first slot, deadline, source): a source's k-th slot lies in its own window
    for source in np.flatnonzero(after > before).tolist():
        count = int(counts[source])
        for k in range(int(before[source]), int(after[source])):
            due = n_slots * (1 + margin * k)
            first = -(-due // (margin * count)) - 1  # rounded up
            uses.append((first, (margin - 1 + margin * k) / count, source))
    uses.sort(reverse=True)
    start = int(before.sum())
    order = np.empty(len(uses), np.int64)
    eligible: list[tuple[float, int]] = []
    for place in range(len(order)):
        while uses and (not eligible or uses[-1][0] <= start + place):
            _, deadline, source = uses.pop()
            heapq.heappush(eligible, (deadline, source))
        _, order[place] = heapq.heappop(eligible)
    return order

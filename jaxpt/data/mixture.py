"""Which row of which source stands at global row index i.

A pure function of seed, phases and i, in constant time.

A phase gives every source a whole number of slots in a table of at most 4,096, laid out so that the
realised share after any n rows
is within one row of the ideal. The k-th use of a source is row k of its order; every epoch is
another shuffle of all its rows. The
uses go on counting over phases, so that no row comes twice in an epoch. There is no state: resuming
is knowing one integer. Other shares
or another batch from some step on are one more stretch in the account of a run, which settings of
today do not change.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from jaxpt import config
from jaxpt.spec import Record, UserError

MAX_SLOTS = 4096  # of a phase; a share is a multiple of 1 / slots


@dataclasses.dataclass(frozen=True)
class MixturePhase(Record):
    """Rows that a run reads under one setting.

    The list of them is the account of what a run has read and will read.

    step, row   steps done and global rows read before it
    batch_size  rows in each of its steps
    shares      {source: share}, of any sum
    packed      fingerprint of the rows
    """

    step: int
    sequence: int
    batch_size: int
    shares: dict[str, float]
    fingerprint: str = ""

    def step_at(self, row: int) -> int:
        """Return the step that reads a global sequence."""
        return self.step + (row - self.sequence) // self.batch_size


class PhasePlan(NamedTuple):
    """Global rows with constant shares.

    start    its first global row
    used     rows taken from each source in earlier phases
    counts   slots of each source in the table
    sources  of each slot, the source
    ranks    of each slot, how many slots before it have the same source
    """

    start: int
    n_used: list[int]
    counts: list[int]
    sources: list[int]
    ranks: list[int]


class MixtureSchedule:
    """The order of all rows of a run.

    asked       phases ((from step, {source: share}), ...) with shares of any sum, none for shares
    in proportion to the rows; and the
                seed of the shuffles
    n_rows      rows in each source
    batch_size  rows in a step: turns the phases' steps into rows
    past        what a run that goes on has read so far, of which `asked` changes nothing; it stands
    at `step`, `row`
    packed      fingerprint of the rows, for the account

    Raises UserError for phases that cannot be run.
    """

    def __init__(
        self,
        asked: config.MixtureConfig,
        n_rows: Mapping[str, int],
        batch_size: int,
        past: Sequence[MixturePhase] = (),
        step: int = 0,
        row: int = 0,
        packed: str = "",
    ):
        check_phase_sources(asked.phases, n_rows)
        self.stretches = [
            *past,
            *extend_history(
                asked.phases or ((0, dict(n_rows)),), batch_size, past, step, row, packed
            ),
        ]
        # a source that is no more keeps its place in the account
        self.names = sorted({*n_rows, *(name for stretch in past for name in stretch.shares)})
        self.n_rows = {name: n_rows.get(name, 0) for name in self.names}
        self.seed = asked.seed
        self.phases: list[PhasePlan] = []
        self.starts: list[int] = []
        shares = None
        for stretch in self.stretches:
            if stretch.shares == shares:  # only the batch is another: the table goes on
                continue
            shares = stretch.shares
            used = self.count_uses(stretch.sequence)
            counts = count_slots([shares.get(name, 0.0) for name in self.names])
            sources = order_slots(counts)
            ranks = np.empty_like(sources)
            for source, count in enumerate(counts):
                ranks[sources == source] = np.arange(count)
            self.phases.append(
                PhasePlan(stretch.sequence, used, counts.tolist(), sources.tolist(), ranks.tolist())
            )
            self.starts.append(stretch.sequence)

    def sequence_at(self, index: int) -> tuple[str, int]:
        """(source, row of it) at a global row index, 0 or more."""
        phase, block, slot = self.locate_slot(index)
        source = phase.sources[slot]
        return self.names[source], self.shuffle_index(
            source, phase.n_used[source] + block * phase.counts[source] + phase.ranks[slot]
        )

    def shuffle_index(self, source: int, use: int) -> int:
        """The row that the use-th reading of a source takes.

        A permutation of its rows in each epoch.
        """
        name = self.names[source]
        epoch, position = divmod(use, self.n_rows[name])
        digest = hashlib.blake2b(f"{self.seed}/{name}/{epoch}".encode(), digest_size=4).digest()
        return index_shuffle(position, self.n_rows[name] - 1, int.from_bytes(digest), 4)

    def locate_slot(self, index: int) -> tuple[PhasePlan, int, int]:
        """The phase that a row index falls into, the whole tables before it in that phase, and its
        slot.
        """
        if index < 0:
            raise IndexError(f"row index {index}: rows are counted from 0")
        phase = self.phases[bisect.bisect_right(self.starts, index) - 1]
        return phase, *divmod(index - phase.start, len(phase.sources))

    def count_uses(self, n_rows: int) -> list[int]:
        """Rows taken from each source by the first n_rows rows of the run."""
        if n_rows == 0:
            return [0] * len(self.names)
        phase, block, slot = self.locate_slot(n_rows - 1)
        begun = np.bincount(phase.sources[: slot + 1], minlength=len(self.names)).tolist()
        return [
            used + block * count + part
            for used, count, part in zip(phase.n_used, phase.counts, begun, strict=True)
        ]

    def compute_epochs(self, n_rows: int) -> dict[str, float]:
        """How often each source was read through by the first n_rows rows of the run."""
        return {
            name: uses / max(1, self.n_rows[name])
            for name, uses in zip(self.names, self.count_uses(n_rows), strict=True)
        }

    def data_history(self, n_rows: int) -> list[MixturePhase]:
        """The stretches that the first n_rows rows of the run were read in."""
        return [stretch for stretch in self.stretches if stretch.sequence < n_rows]

    def phase_at(self, row: int) -> MixturePhase:
        """The stretch that a global row is read in."""
        return self.stretches[
            max(0, bisect.bisect_right([stretch.sequence for stretch in self.stretches], row) - 1)
        ]

    def check_max_epochs(self, n_rows: int, max_epochs: Sequence[tuple[str, float]]) -> None:
        """Before a run of n_rows rows.

        Raises UserError naming every source that it would read more often than max_epochs allows
        it, or allows "all" that are not named.
        """
        most_of = dict(max_epochs)
        if unknown := [name for name in most_of if name not in self.names and name != "all"]:
            raise UserError(
                "mixture.max_epochs: no packed source is called "
                f"{unknown[0]!r}; there are: {', '.join(self.names)}, and all."
            )
        too_often = []
        for name, epochs in self.compute_epochs(n_rows).items():
            most = most_of.get(name, most_of.get("all", math.inf))
            if epochs > most:
                lasts = (
                    bisect.bisect_right(
                        range(n_rows + 1), most, key=lambda n: self.compute_epochs(n)[name]
                    )
                    - 1
                )
                by, until = (self.phase_at(row).step_at(row) for row in (n_rows, lasts))
                too_often.append(
                    f"{name} is read {epochs:.3g} times by step {by:,} (it "
                    f"lasts until {until:,}), {most:g} allowed"
                )
        if too_often:
            raise UserError(
                f"mixture.max_epochs: {'; '.join(too_often)}. Lower its share "
                "or train.steps, pack more, or raise max_epochs."
            )


def extend_history(
    phases: Sequence,
    batch_size: int,
    past: Sequence[MixturePhase],
    step: int,
    row: int,
    packed: str,
) -> list[MixturePhase]:
    """The stretches that begin where a run stands, and later."""
    shares = [shares for start, shares in phases if start <= step][-1]
    now = MixturePhase(step, row, batch_size, dict(shares), packed)
    goes_on = past and dataclasses.replace(past[-1], step=step, sequence=row) == now
    later = [
        MixturePhase(
            start, row + (int(start) - step) * batch_size, batch_size, dict(shares), packed
        )
        for start, shares in phases
        if start > step
    ]
    return [*([] if goes_on else [now]), *later]


def schedule_from_history(
    stretches: Sequence[MixturePhase], n_rows: Mapping[str, int], seed: int
) -> MixtureSchedule:
    """The mixture of a run that has kept its account."""
    *_, last = stretches
    return MixtureSchedule(
        config.MixtureConfig(phases=((0, last.shares),), seed=seed),
        n_rows,
        last.batch_size,
        stretches,
        last.step,
        last.sequence,
        last.fingerprint,
    )


def check_phase_sources(phases: Sequence, n_rows: Mapping[str, int]) -> None:
    """Raises UserError for phases that are out of order, name unknown sources or give no meaningful
    shares.
    """
    steps = [step for step, _ in phases]
    if steps[:1] not in ([], [0]) or any(
        later <= step for step, later in itertools.pairwise(steps)
    ):
        raise UserError(
            f"mixture.phases: start at steps {steps}, expected 0 first and then rising."
        )
    for step, shares in phases:
        for name, share in shares.items():
            if name not in n_rows:
                near = difflib.get_close_matches(name, n_rows, 1)
                hint = (
                    f"did you mean {near[0]}?"
                    if near
                    else f"there are: {', '.join(sorted(n_rows))}."
                )
                raise UserError(
                    f"mixture.phases: no packed source is called {name!r} "
                    f"(from step {step}); {hint}"
                )
            if not isinstance(share, (int, float)) or not math.isfinite(share) or share < 0:
                raise UserError(
                    f"mixture.phases: the share of {name} from step {step} is "
                    f"{share!r}, expected a number of at least 0."
                )
            if share and not n_rows[name]:
                raise UserError(
                    f"mixture.phases: {name} has no rows to take from step "
                    f"{step}. Leave it out, or pack more of it."
                )
        total = sum(shares.values())
        if total <= 0:
            raise UserError(
                f"mixture.phases: the shares from step {step} sum to nothing "
                f"({dict(shares)}). Give at least one source a share above 0."
            )
        for name, share in shares.items():
            if 0 < share / total < 1 / MAX_SLOTS:
                raise UserError(
                    f"mixture.phases: {name} has {share / total:.2g} of the "
                    f"rows from step {step}, expected 0 or at least "
                    f"1/{MAX_SLOTS:,}."
                )


def count_slots(shares: Sequence[float]) -> np.ndarray:
    """Whole numbers in the proportion of the shares, together MAX_SLOTS at most.

    Those whose largest relative error is smallest, the smallest of equals. Every share above 0 gets
    a slot.
    """
    ideal = np.asarray(shares, np.float64) / np.sum(shares)
    candidates = np.maximum(
        np.rint(np.arange(1, MAX_SLOTS + 1)[:, None] * ideal), ideal > 0
    ).astype(np.int64)
    candidates = candidates[candidates.sum(1) <= MAX_SLOTS]
    real, expected = candidates[:, ideal > 0] / candidates.sum(1, keepdims=True), ideal[ideal > 0]
    return candidates[np.argmin(np.abs(real / expected - 1).max(1).round(9))]


def order_slots(counts: np.ndarray) -> np.ndarray:
    """A source for each slot, so that after any number of slots every source has had its share to
    within one slot.

    Among the sources that are behind by enough, the one that would be first to fall behind by one
    goes next.
    Source: Tijdeman 1980, "The chairman assignment problem"; the deviation stays within 1 - 1 / (2
    sources - 2).
    """
    present = np.flatnonzero(counts)
    counts, n_slots, margin = counts[present], counts.sum(), max(1, 2 * len(present) - 2)
    taken, order = np.zeros_like(counts), np.empty(n_slots, np.int64)
    for slot in range(n_slots):
        behind = margin * (
            (slot + 1) * counts - n_slots * taken
        )  # in units of 1 / (margin x n_slots)
        slack = np.where(behind >= n_slots, (n_slots * (margin - 1) - behind) / counts, np.inf)
        order[slot] = np.argmin(slack)
        taken[order[slot]] += 1
    return present[order]

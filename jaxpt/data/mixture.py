"""Which row of which source stands at global row index i: a pure function of seed, phases and i, in constant time.

A phase gives every source a whole number of slots in a table of at most 4,096, laid out so that the realised share after any n rows
is within one row of the ideal. The k-th use of a source is row k of its order; every epoch is another shuffle of all its rows. The
uses go on counting over phases, so that no row comes twice in an epoch. There is no state: resuming is knowing one integer.
"""

from __future__ import annotations

import bisect
import difflib
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from jaxpt import config
from jaxpt.spec import UserError

MAX_SLOTS = 4096  # of a phase; a share is a multiple of 1 / slots


class Phase(NamedTuple):
    """A stretch of rows with constant shares.

    start    its first global row
    used     rows taken from each source in earlier phases
    counts   slots of each source in the table
    sources  of each slot, the source
    ranks    of each slot, how many slots before it have the same source
    """

    start: int
    used: list[int]
    counts: list[int]
    sources: list[int]
    ranks: list[int]


class Mixture:
    """The order of all rows of a run.

    asked       phases ((from step, {source: share}), ...) with shares of any sum, none for shares in proportion to the rows; and the
                seed of the shuffles
    n_rows      rows in each source
    batch_rows  rows in a step: turns the phases' steps into rows

    Raises UserError for phases that cannot be run.
    """

    def __init__(self, asked: config.Mixture, n_rows: Mapping[str, int], batch_rows: int):
        self.names = sorted(n_rows)
        self.n_rows = dict(n_rows)
        self.batch_rows, self.seed = batch_rows, asked.seed
        check_phases(asked.phases, self.n_rows)
        phases = asked.phases or ((0, self.n_rows),)
        self.phases: list[Phase] = []
        self.starts: list[int] = []
        for step, shares in phases:
            start = int(step) * batch_rows
            used = self.uses(start)
            counts = slot_counts([shares.get(name, 0.0) for name in self.names])
            sources = slot_order(counts)
            ranks = np.empty_like(sources)
            for source, count in enumerate(counts):
                ranks[sources == source] = np.arange(count)
            self.phases.append(Phase(start, used, counts.tolist(), sources.tolist(), ranks.tolist()))
            self.starts.append(start)

    def row_at(self, index: int) -> tuple[str, int]:
        """(source, row of it) at a global row index, 0 or more."""
        phase, block, slot = self.place(index)
        source = phase.sources[slot]
        return self.names[source], self.shuffled(source, phase.used[source] + block * phase.counts[source] + phase.ranks[slot])

    def shuffled(self, source: int, use: int) -> int:
        """The row that the use-th reading of a source takes: a permutation of its rows in each epoch."""
        name = self.names[source]
        epoch, position = divmod(use, self.n_rows[name])
        digest = hashlib.blake2b(f"{self.seed}/{name}/{epoch}".encode(), digest_size=4).digest()
        return index_shuffle(position, self.n_rows[name] - 1, int.from_bytes(digest), 4)

    def place(self, index: int) -> tuple[Phase, int, int]:
        """The phase that a row index falls into, the whole tables before it in that phase, and its slot."""
        if index < 0:
            raise IndexError(f"row index {index}: rows are counted from 0")
        phase = self.phases[bisect.bisect_right(self.starts, index) - 1]
        return phase, *divmod(index - phase.start, len(phase.sources))

    def uses(self, n_rows: int) -> list[int]:
        """Rows taken from each source by the first n_rows rows of the run."""
        if n_rows == 0:
            return [0] * len(self.names)
        phase, block, slot = self.place(n_rows - 1)
        begun = np.bincount(phase.sources[: slot + 1], minlength=len(self.names)).tolist()
        return [used + block * count + part for used, count, part in zip(phase.used, phase.counts, begun, strict=True)]

    def epochs(self, n_rows: int) -> dict[str, float]:
        """How often each source was read through by the first n_rows rows of the run."""
        return {name: uses / max(1, self.n_rows[name]) for name, uses in zip(self.names, self.uses(n_rows), strict=True)}

    def check(self, n_rows: int, max_epochs: float) -> None:
        """Before a run of n_rows rows: raises UserError naming every source that it would read more than max_epochs times; 0 allows any."""
        if not max_epochs:
            return
        too_often = []
        for name, epochs in self.epochs(n_rows).items():
            if epochs > max_epochs:
                most = bisect.bisect_right(range(n_rows + 1), max_epochs, key=lambda n: self.epochs(n)[name]) - 1
                too_often.append(
                    f"{name} is read {epochs:.3g} times by step {n_rows // self.batch_rows:,} (it lasts until {most // self.batch_rows:,})"
                )
        if too_often:
            raise UserError(
                f"mixture.max_epochs: {'; '.join(too_often)}; {max_epochs:g} allowed. Lower its share or train.steps, pack more, or raise max_epochs."
            )


def check_phases(phases: Sequence, n_rows: Mapping[str, int]) -> None:
    """Raises UserError for phases that are out of order, name unknown sources or give no meaningful shares."""
    steps = [step for step, _ in phases]
    if steps[:1] not in ([], [0]) or any(later <= step for step, later in itertools.pairwise(steps)):
        raise UserError(f"mixture.phases: start at steps {steps}, wanted 0 first and then rising.")
    for step, shares in phases:
        for name, share in shares.items():
            if name not in n_rows:
                near = difflib.get_close_matches(name, n_rows, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(n_rows))}."
                raise UserError(f"mixture.phases: no packed source is called {name!r} (from step {step}); {hint}")
            if not isinstance(share, (int, float)) or not math.isfinite(share) or share < 0:
                raise UserError(f"mixture.phases: the share of {name} from step {step} is {share!r}, wanted a number of at least 0.")
            if share and not n_rows[name]:
                raise UserError(f"mixture.phases: {name} has no rows to take from step {step}. Leave it out, or pack more of it.")
        total = sum(shares.values())
        if total <= 0:
            raise UserError(f"mixture.phases: the shares from step {step} sum to nothing ({dict(shares)}). Give at least one source a share above 0.")
        for name, share in shares.items():
            if 0 < share / total < 1 / MAX_SLOTS:
                raise UserError(f"mixture.phases: {name} has {share / total:.2g} of the rows from step {step}, wanted 0 or at least 1/{MAX_SLOTS:,}.")


def slot_counts(shares: Sequence[float]) -> np.ndarray:
    """Whole numbers in the proportion of the shares, together MAX_SLOTS at most: those whose largest relative error is smallest, the
    smallest of equals. Every share above 0 gets a slot.
    """
    ideal = np.asarray(shares, np.float64) / np.sum(shares)
    candidates = np.maximum(np.rint(np.arange(1, MAX_SLOTS + 1)[:, None] * ideal), ideal > 0).astype(np.int64)
    candidates = candidates[candidates.sum(1) <= MAX_SLOTS]
    real, wanted = candidates[:, ideal > 0] / candidates.sum(1, keepdims=True), ideal[ideal > 0]
    return candidates[np.argmin(np.abs(real / wanted - 1).max(1).round(9))]


def slot_order(counts: np.ndarray) -> np.ndarray:
    """A source for each slot, so that after any number of slots every source has had its share to within one slot.

    Among the sources that are behind by enough, the one that would be first to fall behind by one goes next.
    Source: Tijdeman 1980, "The chairman assignment problem"; the deviation stays within 1 - 1 / (2 sources - 2).
    """
    present = np.flatnonzero(counts)
    counts, n_slots, margin = counts[present], counts.sum(), max(1, 2 * len(present) - 2)
    taken, order = np.zeros_like(counts), np.empty(n_slots, np.int64)
    for slot in range(n_slots):
        behind = margin * ((slot + 1) * counts - n_slots * taken)  # in units of 1 / (margin x n_slots)
        slack = np.where(behind >= n_slots, (n_slots * (margin - 1) - behind) / counts, np.inf)
        order[slot] = np.argmin(slack)
        taken[order[slot]] += 1
    return present[order]

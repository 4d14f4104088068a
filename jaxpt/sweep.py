"""Train a recipe once for every combination of some knobs' values, and compare the results.

A combination is a run directory below WORKDIR, named after its values, and a run of `jaxpt train`
like any other: it resumes after a kill, and a finished one is passed over. The same command started
on several hosts with a shared WORKDIR divides the work: a run that another process holds is left to
it.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import logging
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from jaxpt import config, io
from jaxpt.spec import UserError
from jaxpt.text import format_table
from jaxpt.train.metrics import stream_metrics
from jaxpt.train.records import HeldoutMetrics

log = logging.getLogger(__name__)

SEEDS = ("initialize.seed", "mixture.seed")  # combinations that differ in these are repeats
# exit statuses of a run after Ctrl-C or SIGTERM; any other signal is a crash of its own
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
LENGTH = "train.steps"  # and in this, budgets of one arm
FORBIDDEN = re.compile(r"[^\w.,=+-]+")  # in a directory's name


@dataclasses.dataclass(frozen=True)
class Axis:
    """Knobs that have the same value, such as optim.peak_lr alone, and the values to try."""

    knobs: tuple[str, ...]
    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A combination of values: knob -> value, as the axes are ordered."""

    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the name of its run directory."""
        parts = [f"{short_name(knob)}={value}" for knob, value in self.values.items()]
        return FORBIDDEN.sub("_", ",".join(parts))

    @property
    def arm(self) -> str:
        """Return what its repeats, of whatever length, have in common, as text."""
        knobs = [knob for knob in self.values if knob not in (*SEEDS, LENGTH)]
        return self.describe(knobs) or "all runs"

    @property
    def seeds(self) -> str:
        """Return the seeds that it sets, as text."""
        return self.describe([knob for knob in self.values if knob in SEEDS])

    def describe(self, knobs: Iterable[str]) -> str:
        """Return some of its values as text."""
        return ", ".join(f"{short_name(knob)}={self.values[knob]}" for knob in knobs)

    @property
    def overrides(self) -> list[str]:
        """Return the flags that set its values."""
        return [f"--config.{knob}={value}" for knob, value in self.values.items()]

    @property
    def group(self) -> tuple[tuple[str, Any], ...]:
        """Return what its repeats with other seeds have in common."""
        return tuple(pair for pair in self.values.items() if pair[0] not in SEEDS)


def short_name(knob: str) -> str:
    """Return a knob's name without its section; a seed's with it."""
    return knob if knob in SEEDS else knob.rpartition(".")[2]


def parse_axis(text: str) -> Axis:
    """Return KNOB=VALUE,VALUE... or KNOB+KNOB=VALUE,VALUE... as an axis.

    Raises:
        UserError: it is none.
    """
    names, equals, values = text.partition("=")
    knobs = tuple(
        name.removeprefix("--config.").removeprefix("config.") for name in names.split("+")
    )
    try:
        parsed = ast.literal_eval(f"({values},)")
    except (SyntaxError, ValueError):
        parsed = tuple(values.split(","))
    if not equals or not all("." in knob for knob in knobs) or "" in parsed:
        raise UserError(
            f"--over {text}: expected SECTION.KNOB=VALUE,VALUE..., such as "
            "optim.peak_lr=1e-3,2e-3,4e-3, or SECTION.KNOB+SECTION.KNOB=VALUE,VALUE..."
        )
    if len(set(map(repr, parsed))) < len(parsed):
        raise UserError(f"--over {text}: names a value twice.")
    return Axis(knobs, parsed)


def list_cells(axes: Sequence[Axis]) -> list[Cell]:
    """Return every combination, the last axis fastest. Raise UserError for a knob twice."""
    names = [knob for axis in axes for knob in axis.knobs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--over {name}: given twice. Put all its values into one.")
    cells = []
    for values in itertools.product(*(axis.values for axis in axes)):
        chosen = zip(axes, values, strict=True)
        cells.append(Cell({knob: value for axis, value in chosen for knob in axis.knobs}))
    return cells


def run_sweep(
    recipe: str, overrides: Sequence[str], axes: Sequence[Axis], workdir: io.Path
) -> list[str]:
    """Train every combination in turn and print the table.

    A failed run does not stop the others.

    Args:
        recipe: file of the recipe.
        overrides: flags for every run.
        axes: what changes between them.
        workdir: their parent; WORKDIR/packed is read unless the recipe names other data.

    Returns:
        The names of the runs that failed.

    Raises:
        UserError: the recipe refuses a combination, before anything runs.
    """
    cells = list_cells(axes)
    runs = {}
    for cell in cells:
        settings = config.load_config(recipe, [*overrides, *cell.overrides])
        runs[cell.name] = {"arm": cell.arm, "seeds": cell.seeds, "n_steps": settings.train.steps}
    shared = list(overrides)
    if not settings.mixture.packed_paths:
        shared.append(f"--config.mixture.packed_paths=('{workdir / 'packed'}',)")
    io.make_directory(workdir)
    record_runs(workdir / "sweep.json", runs)
    failed = []
    for number, cell in enumerate(cells, 1):
        run_dir = workdir / cell.name
        if is_held(run_dir):
            log.info(f"sweep: {number} of {len(cells)}: {cell.name}: another process is at it")
            continue
        log.info(f"sweep: {number} of {len(cells)}: {cell.name}")
        words = ["train", "--config", recipe, "--workdir", str(run_dir), *shared, *cell.overrides]
        status = subprocess.run([sys.executable, "-m", "jaxpt", *words], check=False).returncode
        if status in STOPPED:  # not this run alone is to stop
            raise SystemExit(130)
        if status and is_held(run_dir):
            log.info(f"sweep: {cell.name}: another process was at it first")
        elif status:
            failed.append(cell.name)
            log.warning(f"sweep: {cell.name} failed: jaxpt {shlex.join(words)}")
    print(format_results(cells, workdir))
    return failed


def record_runs(file: io.Path, runs: dict[str, dict[str, Any]]) -> None:
    """Write what `jaxpt report --experiment` reads, after the runs of sweeps before this one."""
    earlier = io.read_json(file)["runs"] if io.exists(file) else {}
    io.write_json(file, {"runs": earlier | runs})


def is_held(run_dir: io.Path) -> bool:
    """Return whether another process holds a run directory."""
    if not io.exists(run_dir):
        return False
    try:
        with io.hold(run_dir):
            return False
    except UserError:
        return True


# ---- results


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to: its last held-out loss, as a mean over sources, and its cost so far."""

    loss: float
    step: int
    n_tokens: int
    is_finished: bool


def read_outcome(run_dir: io.Path) -> Outcome | None:
    """Return a run's outcome; None before its first held-out loss."""
    found = None
    if not io.exists(run_dir / "metrics.jsonl"):
        return None
    for record in stream_metrics(run_dir / "metrics.jsonl"):
        if isinstance(record, HeldoutMetrics):
            found = record
    if found is None:
        return None
    is_finished = io.exists(run_dir / "manifest.json")
    return Outcome(found.mean_loss, found.step, int(found.n_tokens), is_finished)


def format_results(cells: Sequence[Cell], workdir: io.Path) -> str:
    """Return the table: a row for each combination, its seeds together, the lowest loss first."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    rows = []
    for group, members in groups.items():
        outcomes = [read_outcome(workdir / cell.name) for cell in members]
        found = [outcome for outcome in outcomes if outcome]
        finished = [outcome for outcome in found if outcome.is_finished]
        losses = [outcome.loss for outcome in finished or found]
        mean = statistics.mean(losses) if losses else math.inf
        spread = ""
        if len(losses) > 1:
            spread = f"{min(losses):.4f} to {max(losses):.4f}"
        tokens = f"{max(outcome.n_tokens for outcome in found):,}" if found else ""
        values = [str(value) for _, value in group]
        state = f"{len(finished)} of {len(members)}"
        loss = f"{mean:.4f}" if losses else ""
        rows.append((mean, [*values, loss, spread, tokens, state]))
    rows.sort(key=lambda row: row[0])
    names = [short_name(knob) for knob, _ in cells[0].group]
    head = [*names, "held-out loss", "over seeds", "tokens", "finished"]
    return format_table([head, *(cells for _, cells in rows)])

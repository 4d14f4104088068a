"""Fail each call of the system once, in every stage of a small pipeline.

    python benchmarks/faults.py calls [--calls 300]

A library that is loaded before all others (failing_calls.c) counts what a stage and the libraries
in it call on files below its directory: open, read, write, fsync, rename, link, unlink, mkdir,
stat. The nth of them fails, with EIO, EROFS, EACCES, EMFILE or ENOSPC, for many n. The
stage then ends in one sentence with exit 1, or well and equal; the same command ends equal.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pathlib
import subprocess
import sys
from collections import Counter

from faults_pipeline import Commands, Outcome, Stage, Trial, judge

NEVER = 10**9  # as the number of the call that fails
ERRORS = ("EIO", "EROFS", "EACCES", "EMFILE", "ENOSPC")
SOURCE = pathlib.Path(__file__).resolve().parent / "failing_calls.c"


class Control(ctypes.Structure):
    """What all processes of a stage share: `struct control` of failing_calls.c."""

    _fields_ = [
        ("n", ctypes.c_long),
        ("error", ctypes.c_long),
        ("count", ctypes.c_long),
        ("call", ctypes.c_char * 64),
        ("root", ctypes.c_char * os.pathconf("/", "PC_PATH_MAX")),
    ]


class FailingCalls:
    """Starts commands of which a chosen call fails."""

    def __init__(self, scratch: pathlib.Path):
        library = scratch / "failing_calls.so"
        build = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(build, check=True)
        path = scratch / "control"
        path.write_bytes(bytes(ctypes.sizeof(Control)))
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), 0)
        self.control = Control.from_buffer(self.map)
        self.commands = Commands(scratch, LD_PRELOAD=str(library), FAILING_CALLS=str(path))

    def run(self, home: pathlib.Path, stage: Stage, n: int = 0, error: str = "EIO") -> Outcome:
        """Run a stage whose nth call fails; none does if n is 0."""
        control = self.control
        control.root, control.error = str(home).encode(), getattr(errno, error)
        control.count, control.call, control.n = 0, b"", n
        outcome = self.commands.run(home, stage.words)
        control.n = 0
        return outcome


def try_calls(failing: FailingCalls, trial: Trial) -> tuple[str, list[str]]:
    """Fail calls of a stage one by one: of more than n calls, n are drawn, and the error of each.

    Returns:
        What happened, and what was wrong.
    """
    stage = trial.stage
    outcome = failing.run(trial.restore(), stage, NEVER)
    if outcome.status:
        raise SystemExit(f"{stage.name}: {outcome.describe()}")
    n_calls = failing.control.count
    rng = trial.make_rng()
    wrong, ends = [], Counter()
    for n in sorted(rng.sample(range(1, n_calls + 1), min(trial.n, n_calls))):
        error = rng.choice(ERRORS)
        home = trial.restore()
        outcome = failing.run(home, stage, n, error)
        call = failing.control.call.decode()
        problem = judge(outcome)
        if not problem and outcome.status == 0:
            problem = find_silent_differences(outcome, trial, home)
        again = failing.run(home, stage)
        if not problem and (again.status or again.is_hung or again.has_traceback):
            problem = f"the next start: {again.describe()}"
        if not problem:
            problem = "; ".join(trial.find_differences(home)[:3])
        if problem:
            wrong.append(f"{stage.name}: call {n} ({call}, {error}): {problem}")
            print(wrong[-1], file=sys.stderr, flush=True)
        ends["well" if outcome.status == 0 else "sentence"] += not problem
    n_tried = ends.total() + len(wrong)
    found = f"{n_tried:,} of {n_calls:,} calls failed: {ends['sentence']:,} ended in a sentence, "
    return f"{found}{ends['well']:,} well", wrong


def find_silent_differences(outcome: Outcome, trial: Trial, home: pathlib.Path) -> str:
    """Return how a result that a command gave without complaint differs; empty if it does not."""
    said = outcome.printed
    if trial.stage.out.endswith(".html"):
        said += (home / trial.stage.out).read_text("utf-8")  # the page lists what it could not use
    if "could not be" in said:
        return ""
    return "; ".join(trial.find_differences(home)[:3])

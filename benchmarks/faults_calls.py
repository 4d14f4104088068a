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
import random
import shutil
import subprocess
import sys
from collections import Counter

from faults_pipeline import Commands, Outcome, Stage, find_differences, make_reference

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


def try_calls(
    failing: FailingCalls,
    stage: Stage,
    before: dict[str, pathlib.Path],
    scratch: pathlib.Path,
    limit: int,
    seed: int = 0,
) -> tuple[str, list[str]]:
    """Fail calls of a stage one by one.

    Args:
        failing: starts the commands.
        stage: of the pipeline.
        before: of `make_reference`.
        scratch: where to work.
        limit: how many calls are tried; of more, as many are drawn.
        seed: of the drawing, and of which error each call gets.

    Returns:
        What happened, and what was wrong.
    """
    home = scratch / "calls"
    restore(home, before[stage.name])
    never = 10**9
    outcome = failing.run(home, stage, never)
    if outcome.status:
        raise SystemExit(f"{stage.name}: {outcome.describe()}")
    n_calls = failing.control.count
    rng = random.Random(f"{stage.name} {seed}")
    wrong, ends = [], Counter()
    for n in sorted(rng.sample(range(1, n_calls + 1), min(limit, n_calls))):
        error = rng.choice(ERRORS)
        restore(home, before[stage.name])
        outcome = failing.run(home, stage, n, error)
        call = failing.control.call.decode()
        problem = judge(outcome)
        if not problem and outcome.status == 0:
            problem = find_silent_differences(outcome, stage, home, before[""])
        again = failing.run(home, stage)
        if not problem and (again.status or again.is_hung or again.has_traceback):
            problem = f"the next start: {again.describe()}"
        if not problem:
            problem = "; ".join(find_differences(stage, home, before[""])[:3])
        if problem:
            wrong.append(f"{stage.name}: call {n} ({call}, {error}): {problem}")
            print(wrong[-1], file=sys.stderr, flush=True)
        ends["well" if outcome.status == 0 else "sentence"] += not problem
    n_tried = ends.total() + len(wrong)
    found = f"{n_tried:,} of {n_calls:,} calls failed: {ends['sentence']:,} ended in a sentence, "
    return f"{found}{ends['well']:,} well", wrong


def judge(outcome: Outcome) -> str:
    """Return what is wrong with an end; empty if it is a sentence or good."""
    if outcome.is_hung:
        return f"hung: {outcome.describe()}"
    if outcome.has_traceback:
        return f"traceback: {outcome.describe()}"
    if outcome.status and (outcome.status != 1 or not outcome.error):
        return f"no sentence: {outcome.describe()}"
    return ""


def find_silent_differences(
    outcome: Outcome, stage: Stage, home: pathlib.Path, reference: pathlib.Path
) -> str:
    """Return how a result that a command gave without complaint differs; empty if it does not."""
    said = outcome.printed
    if stage.out.endswith(".html"):
        said += (home / stage.out).read_text("utf-8")  # the page lists what it could not use
    if "could not be" in said:
        return ""
    return "; ".join(find_differences(stage, home, reference)[:3])


def restore(home: pathlib.Path, source: pathlib.Path) -> None:
    """Make a directory as it was before a stage."""
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(source, home)

"""Cut the power of every stage of a small pipeline: what its disk holds is all that is left.

    python benchmarks/faults.py power [--cuts 12]

The stage runs on an ext4 image over a loop device. Several times on its way, and once after its
end, all of its processes are stopped, the image is copied (two copies are equal), and they go on.
Each copy is mounted later, which replays its journal, and the same command is run there. Needs
root, mkfs.ext4 and a loop device.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from faults_pipeline import Commands, Outcome, Trial, format_ends, judge

DISK_BYTES = 64_000_000


class Cut(NamedTuple):
    """A copy of a disk."""

    image: pathlib.Path
    has_ended: bool  # the stage had, with exit 0
    steps: list[int]  # checkpoints that could be seen before the cut


def unsupported_reason(scratch: pathlib.Path) -> str:
    """Return why no power can be cut here; empty if it can."""
    if os.getuid():
        return "needs root"
    try:
        image = make_disk(scratch / "try.img")
        with mounted(image, scratch / "try"):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs mkfs.ext4 and a loop device ({error})"


def make_disk(image: pathlib.Path) -> pathlib.Path:
    """Make an ext4 image."""
    with open(image, "wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
    return image


@contextlib.contextmanager
def mounted(image: pathlib.Path, directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Mount an image while the block runs."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, directory], check=True, capture_output=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def copy_disk(image: pathlib.Path, to: pathlib.Path) -> None:
    """Copy what a disk holds at this moment: until two copies are equal."""
    while True:
        shutil.copyfile(image, to)
        if filecmp.cmp(image, to, shallow=False):
            return


def try_power(commands: Commands, trial: Trial) -> tuple[str, list[str]]:
    """Cut the power of a stage n times and after its end. Return what happened, what was wrong."""
    stage, scratch, rng = trial.stage, trial.scratch, trial.make_rng()
    seconds = trial.measure_seconds(commands)
    image = make_disk(scratch / "disk.img")
    cuts, wrong, ends = [], [], Counter()
    with mounted(image, scratch / "disk") as disk:
        home = disk / "home"
        shutil.copytree(trial.before[stage.name], home)
        os.sync()
        group = commands.start(home, stage.words)
        for k in range(trial.n):
            time.sleep(rng.uniform(0, 2 * seconds / trial.n))
            with stopped(group) as is_there:
                if not is_there:
                    break
                cut = Cut(scratch / f"cut{k}.img", False, list_steps(home / stage.out))
                copy_disk(image, cut.image)
                cuts.append(cut)
        outcome = commands.finish()
        if outcome.status:
            raise SystemExit(f"{stage.name}: {outcome.describe()}")
        cuts.append(Cut(scratch / "end.img", True, list_steps(home / stage.out)))
        copy_disk(image, cuts[-1].image)
    for k, cut in enumerate(cuts):
        with mounted(cut.image, scratch / "disk") as disk:
            problem, end = check_cut(commands, trial, disk / "home", cut)
        ends[end] += 1
        if problem:
            wrong.append(f"{stage.name}: cut {k}: {problem}")
        cut.image.unlink()
    return f"{len(cuts)} cuts: {format_ends(ends)}", wrong


@contextlib.contextmanager
def stopped(group: int) -> Iterator[bool]:
    """Stop a process group while the block runs. Yield whether it still runs."""
    try:
        os.killpg(group, signal.SIGSTOP)
    except ProcessLookupError:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(ProcessLookupError):  # it had ended, and was waited for since
            os.killpg(group, signal.SIGCONT)


def list_steps(run: pathlib.Path) -> list[int]:
    """Return the checkpoints of a run that can be seen, the newest last; none of other stages."""
    from jaxpt.weights import checkpoint

    return checkpoint.list_steps(run) if (run / "checkpoints").is_dir() else []


def check_cut(commands: Commands, trial: Trial, home: pathlib.Path, cut: Cut) -> tuple[str, str]:
    """Run the stage again on what a cut left. Return (what is wrong, how it went on)."""
    from jaxpt.weights import checkpoint

    if cut.has_ended:
        differences = trial.find_differences(home)
        if differences:
            return f"after its end: {'; '.join(differences[:3])}", "lost"
    if len(cut.steps) > 1:
        newest = checkpoint.find_newest(home / trial.stage.out)
        # the newest that was seen may have been on its way to the disk, not the one before
        if newest is None or int(newest.name) < cut.steps[-2]:
            return f"checkpoints {cut.steps} were there, {newest} is left", "lost"
    outcome = commands.run(home, trial.stage.words)
    problem = judge(outcome)
    if problem or outcome.status:
        return problem or outcome.describe(), "refused"
    differences = trial.find_differences(home)
    return "; ".join(differences[:3]), describe_start(outcome)


def describe_start(outcome: Outcome) -> str:
    """Return how a start began: finished already, resumed or anew."""
    if "nothing to do" in outcome.printed:
        return "finished already"
    return "resumed" if "resumed" in outcome.printed else "begun or finished by the next start"

"""Start every stage of a small pipeline twice at once in one directory, or interrupt it by Ctrl-C.

    python benchmarks/faults.py starts [--rounds 5]
    python benchmarks/faults.py interrupts [--rounds 5]

One of the two ends well and equal. The other says who holds the directory, or, having come after
its end, that there is nothing to do; commands that write one file may both write it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter

from faults_pipeline import Commands, Trial, format_ends, judge

FILES = ("evaluate", "compare", "report")  # commands that write one file, whole or not at all


def try_starts(pair: tuple[Commands, Commands], trial: Trial) -> tuple[str, list[str]]:
    """Start a stage twice at once, n times. Return what happened, and what was wrong."""
    stage, rng = trial.stage, trial.make_rng()
    wrong, ends = [], Counter()
    for k in range(trial.n):
        home = trial.restore()
        pair[0].start(home, stage.words)
        time.sleep(rng.uniform(0, 0.1) * (k % 2))  # every other time at the same moment
        pair[1].start(home, stage.words)
        outcomes = [commands.finish() for commands in pair]
        problems = list(filter(None, map(judge, outcomes)))
        refused = [outcome for outcome in outcomes if outcome.status]
        for outcome in refused:
            if "in use by process" not in outcome.error:
                problems.append(outcome.describe())
        if len(refused) == 2:
            problems.append("both were refused")
        n_done = sum("nothing to do" in outcome.printed for outcome in outcomes)
        if not refused and not n_done and stage.name not in FILES:
            problems.append("both did the work")
        problems += trial.find_differences(home)
        ends["refused" if refused else "found it finished" if n_done else "wrote it too"] += 1
        if problems:
            wrong.append(f"{stage.name}: round {k}: {'; '.join(problems[:3])}")
    return f"{trial.n} rounds, the second: {format_ends(ends)}", wrong


def try_interrupts(commands: Commands, trial: Trial) -> tuple[str, list[str]]:
    """Press Ctrl-C while a stage works, n times. Return what happened, and what was wrong."""
    stage, rng = trial.stage, trial.make_rng()
    seconds = trial.measure_seconds(commands)
    wrong, ends = [], Counter()
    for k in range(trial.n):
        home = trial.restore()
        group = commands.start(home, stage.words)
        time.sleep(rng.uniform(0.05, max(seconds - 0.5, 0.2)))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(group, signal.SIGINT)
        outcome = commands.finish()
        is_explained = "run the same command again" in outcome.printed
        is_good = outcome.status == 0 or (outcome.status in (130, 143) and is_explained)
        if outcome.has_traceback or outcome.is_hung or not is_good:
            wrong.append(f"{stage.name}: round {k}: {outcome.describe()}")
            continue
        ends[f"exit {outcome.status}"] += 1
        again = commands.run(home, stage.words)
        differences = trial.find_differences(home)
        if again.status or differences:
            wrong.append(f"{stage.name}: round {k}: {again.describe()} {differences[:3]}")
    return f"{trial.n} interrupts: {format_ends(ends)}", wrong

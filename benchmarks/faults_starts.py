"""Start every stage of a small pipeline twice at once, in one directory.

    python benchmarks/faults.py starts [--rounds 5]

One of the two ends well and equal. The other says who holds the directory, or, having come after
its end, that there is nothing to do; commands that write one file may both write it.
"""

from __future__ import annotations

import pathlib
import random
import time
from collections import Counter

from faults_calls import judge, restore
from faults_pipeline import Commands, Stage, find_differences

FILES = ("evaluate", "compare", "report")  # commands that write one file, whole or not at all


def try_starts(
    pair: tuple[Commands, Commands],
    stage: Stage,
    before: dict[str, pathlib.Path],
    scratch: pathlib.Path,
    n_rounds: int,
    seed: int = 0,
) -> tuple[str, list[str]]:
    """Start a stage twice at once, several times. Return what happened, and what was wrong."""
    rng = random.Random(f"{stage.name} {seed}")
    home = scratch / "starts"
    wrong, ends = [], Counter()
    for k in range(n_rounds):
        restore(home, before[stage.name])
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
        problems += find_differences(stage, home, before[""])
        ends["refused" if refused else "found it finished" if n_done else "wrote it too"] += 1
        if problems:
            wrong.append(f"{stage.name}: round {k}: {'; '.join(problems[:3])}")
    counts = [f"{ends[end]} {end}" for end in ends]
    return f"{n_rounds} rounds, the second: {', '.join(counts)}", wrong

"""Damage every file of a finished pipeline, and run the commands that read it.

    python benchmarks/faults.py files [--damages 700]

A file is cut in half, emptied, gets one flipped bit or 4 kB of zeros, at a place drawn by a seed.
Ends are: a sentence (exit 1, or exit 0 with a line that names the file), right (exit 0, and what
is written equals that of undamaged files), silently wrong, a traceback, a hang.
"""

from __future__ import annotations

import pathlib
import random
import re
import shutil
import sys
from collections import Counter
from typing import NamedTuple

from faults_pipeline import BY_NAME, Commands, Outcome, Stage, find_differences, judge, restore

KINDS = ("cut", "emptied", "flipped", "zeroed")
N_ZEROS = 4096
# commands beside the pipeline's own, which only print
TRACE = Stage("trace", "trace --workdir base --step 5", "")
LINEAGE = Stage("lineage", "report --lineage hf --verify", "")
VERIFY = (
    "prepare",
    "train_tokenizer",
    "pack",
    "train",
    "initialize",
    "train the child",
    "export_hf",
)
# where a file lies -> what reads it; "again": the finished stage itself, with --verify
READERS = (
    ("base/corpus/heldout", ("pack", "evaluate", "prepare again")),
    ("base/corpus", ("train_tokenizer", "pack", "prepare again", "report", "lineage")),
    ("base/tokenizer", ("pack", "train", "train_tokenizer again", "compare", "trace", "lineage")),
    ("base/packed", ("train", "train the child", "pack again", "trace", "initialize", "lineage")),
    ("base", ("initialize", "compare", "report", "train again", "trace", "lineage")),
    ("grown", ("train the child", "initialize again", "lineage")),
    ("child/eval", ("report", "evaluate again", "compare again")),
    ("child", ("export_hf", "compare", "report", "train the child again", "lineage")),
    ("hf", ("evaluate", "export_hf again", "lineage")),
)


class Damage(NamedTuple):
    """A damaged file and the command that reads it."""

    file: str  # below the pipeline's directory
    kind: str
    reader: str

    def __str__(self) -> str:
        return f"{self.file} {self.kind}, {self.reader}"


class Reader(NamedTuple):
    """A command, and the state of the pipeline in which it is run."""

    stage: Stage
    home: pathlib.Path


def find_reader(name: str, before: dict[str, pathlib.Path]) -> Reader:
    """Return the command of a reader's name."""
    for stage in (TRACE, LINEAGE):
        if name == stage.name:
            return Reader(stage, before[""])
    stage = BY_NAME[name.removesuffix(" again")]
    if not name.endswith(" again"):
        return Reader(stage, before[stage.name])
    if stage.name in VERIFY:
        stage = stage._replace(line=f"{stage.line} --verify")
    return Reader(stage, before[""])


def list_damages(before: dict[str, pathlib.Path], n: int, seed: int) -> list[Damage]:
    """Return n damages, of all files by all kinds and readers."""
    found = []
    home = before[""]
    for path in sorted(home.rglob("*")):
        file = path.relative_to(home).as_posix()
        if not path.is_file() or not path.stat().st_size or ".lock/" in file:
            continue
        for place, readers in READERS:
            if file.startswith(f"{place}/"):
                found += [
                    Damage(file, kind, reader)
                    for kind in KINDS
                    for reader in readers
                    if (find_reader(reader, before).home / file).is_file()
                ]
                break
    random.Random(seed).shuffle(found)
    # files and kinds evenly, readers as drawn
    found.sort(key=lambda damage, seen=Counter(): count(seen, (damage.file, damage.kind)))
    return found[:n]


def count(seen: Counter, key: tuple[str, str]) -> int:
    """Return how often a key was seen, this time included."""
    seen[key] += 1
    return seen[key]


def make_damage(path: pathlib.Path, kind: str, rng: random.Random) -> None:
    """Damage a file in place."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if kind == "cut":
        del data[len(data) // 2 :]
    elif kind == "emptied":
        data.clear()
    elif kind == "flipped":
        data[at] ^= 1 << rng.randrange(8)
    else:
        at = min(at, max(len(data) - N_ZEROS, 0))
        n = min(N_ZEROS, len(data) - at)
        data[at : at + n] = bytes(n)
    path.write_bytes(data)


def try_files(
    commands: Commands,
    before: dict[str, pathlib.Path],
    scratch: pathlib.Path,
    n: int,
    seed: int = 0,
) -> tuple[str, list[str]]:
    """Damage files and run what reads them. Return what happened, and what was wrong."""
    ends, wrong = Counter(), []
    printed: dict[str, str] = {}
    home = scratch / "files"
    for name in ("trace", "lineage"):
        reader = find_reader(name, before)
        restore(home, reader.home)
        printed[name] = drop_clock(commands.run(home, reader.stage.words).printed)
    for damage in list_damages(before, n, seed):
        reader = find_reader(damage.reader, before)
        restore(home, reader.home)
        make_damage(home / damage.file, damage.kind, random.Random(f"{damage} {seed}"))
        outcome = commands.run(home, reader.stage.words)
        end, problem = classify(outcome, reader.stage, damage, home, before[""], printed)
        ends[end] += 1
        if problem:
            wrong.append(f"{damage}: {end}: {problem}")
            print(wrong[-1], file=sys.stderr, flush=True)
        if ends.total() % 50 == 0:
            print(f"{ends.total()} of {n}: {dict(ends)}", file=sys.stderr, flush=True)
    shutil.rmtree(home)
    counts = [f"{ends[end]} {end}" for end in ("sentence", "right", "silently wrong", "traceback")]
    return f"{', '.join(counts)}, {ends['hang']} hangs", wrong


def classify(
    outcome: Outcome,
    stage: Stage,
    damage: Damage,
    home: pathlib.Path,
    reference: pathlib.Path,
    printed: dict[str, str],
) -> tuple[str, str]:
    """Return (how a command on a damaged file ended, what is wrong with that)."""
    problem = judge(outcome)
    if outcome.is_hung:
        return "hang", problem
    if problem:
        return "traceback", problem
    if outcome.status:
        return "sentence", ""
    if not stage.out:
        is_equal = drop_clock(outcome.printed) == printed[stage.name]
        differences = [] if is_equal else [outcome.printed]
    else:
        differences = find_differences(stage, home, reference)
    if not differences:
        return "right", ""
    name = pathlib.PurePath(damage.file).name
    said = outcome.printed.count(name)
    if stage.out.endswith(".html"):  # the page lists what it could not use
        page = stage.out
        said += (home / page).read_text().count(name) > (reference / page).read_text().count(name)
    if said:
        return "sentence", ""
    return "silently wrong", f"{'; '.join(differences[:3])}\n{outcome.printed[-1500:]}"


def drop_clock(text: str) -> str:
    """Return what a command printed without the times of its log."""
    return re.sub(r"\d\d:\d\d:\d\d ", "", text)

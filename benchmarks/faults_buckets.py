"""The quickstart's whole pipeline in buckets on loopback: timed, killed, and compared with a disk.

    python benchmarks/faults_buckets.py [--kills 10] [--seed 0] [--kinds gs s3] [--small]

Every command of scripts/quickstart.sh runs on a disk and in a bucket of each kind, one after the
other, and once more in a bucket where commands are killed (SIGKILL) at random moments and started
again, through a proxy that answers some requests by 503, loses some answers, and refuses locks by
412. Compared: every file of the data stages, every array of the checkpoints, metrics.jsonl but for
time and speed, the exported models, evaluations and samples. Prints a table of seconds, those of
the processors in brackets, and one of ends; exits 1 if anything differs. --small takes minutes
instead of an hour: less text, a smaller model, fewer steps, no evaluation by transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import buckets
from faults import without_speed

from jaxpt import io
from jaxpt.train.metrics import read_metrics
from jaxpt.weights import checkpoint

SMALL = {
    "prepare.max_mb": 0.3,
    "prepare.heldout_frac": 0.2,
    "tokenizer.vocab_size": 500,
    "pack.seq_len": 64,
    "model.d_model": 24,
    "model.d_ff": 40,
    "model.d_head": 8,
    "model.max_seq_len": 64,
    "train.steps": 60,
    "train.eval_every": 30,
    "train.checkpoint_every": 20,
    "train.eval_sequences": 16,
}
SOURCES = ("prose", "code")
WORKDIR_COMMANDS = ("prepare", "train_tokenizer", "pack", "train")
DATA_STAGES = ("corpus", "tokenizer", "packed")
EXPORTED = ("model.safetensors", "config.json", "tokenizer.json")
N_FAULTS = 40  # requests answered by 503, and as many answers lost, while commands are killed
FAULT_EVERY = 13  # only one of so many
LOCK_FAULT_EVERY = 2


class Command(NamedTuple):
    """A command of the pipeline."""

    name: str
    flags: tuple[str, ...]

    @property
    def label(self) -> str:
        """What tells it from the others."""
        target = "--workdir" if self.name in WORKDIR_COMMANDS else "--to"
        place = self.flags[self.flags.index(target) + 1]
        return f"{self.name} {place.rpartition('runs/')[2]}"


class Duration(NamedTuple):
    """What a command took, in seconds."""

    wall: float
    processor: float


class Place(NamedTuple):
    """Where a pipeline runs.

    Attributes:
        root: of its run directories: a disk's, or a bucket's.
        environment: of its commands.
    """

    root: str
    environment: dict[str, str]


def list_commands(root: str, small: bool) -> list[Command]:
    """Return the commands of scripts/quickstart.sh, with their run directories below `root`."""
    knobs = [f"--config.{name}={value}" for name, value in SMALL.items()] if small else []
    base, child, grown = f"{root}/base", f"{root}/child", f"{root}/grown"
    recipe = ("--config", "configs/quickstart.py", "--workdir", base, *knobs)
    of_child = ("--config", "configs/quickstart.py:child", "--workdir", child, *knobs)
    of_child += (f"--config.mixture.packed_paths=('{base}/packed',)",)
    of_child += (f"--config.initialize.source={grown}",)
    texts = [f"{name}=parquet:{base}/corpus/heldout/{name}-*.parquet#text" for name in SOURCES]
    commands = [Command(name, recipe) for name in ("prepare", "train_tokenizer", "pack", "train")]
    grow = ("--from", base, "--grow", "depth_upscale(m=1)", "--probe", "0", "--to", grown)
    commands += [Command("initialize", grow), Command("train", of_child)]
    for model in (base, child):
        commands.append(Command("export_hf", ("--from", model, "--to", f"{model}/hf")))
        for backend in ("jax",) if small else ("jax", "hf"):
            tasks = [f"bits_per_byte/{text}" for text in texts]
            flags = ("--model", f"{model}/hf", "--backend", backend, "--tasks", *tasks)
            commands.append(Command("evaluate", (*flags, "--to", f"{model}/eval/{backend}.json")))
    models = ("--models", base, child)
    prompts = ("--prompts", "configs/prompts.txt", "--max-new", "16")
    samples, differences = f"{child}/eval/samples.json", f"{child}/eval/differences.json"
    commands.append(Command("compare", (*models, *prompts, "--to", samples)))
    commands.append(Command("compare", (*models, "--differ", *texts, "--to", differences)))
    report = ("--workdir", base, child, "--to", f"{root}/report.html")
    return [*commands, Command("report", report)]


def start(command: Command, place: Place) -> subprocess.Popen[bytes]:
    """Start a command in the clone, as a person does."""
    log = open(pathlib.Path(place.environment["XDG_CACHE_HOME"]) / "log", "ab")
    words = [sys.executable, "-m", "jaxpt", command.name, *command.flags]
    environment = {**os.environ, **place.environment, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)


def finish(command: Command, place: Place) -> Duration:
    """Run a command to its end; exit with its log if it fails."""
    began = time.monotonic()
    process = start(command, place)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        log = pathlib.Path(place.environment["XDG_CACHE_HOME"]) / "log"
        raise SystemExit(f"{command.label} failed\n{log.read_text(errors='replace')[-3000:]}")
    return Duration(time.monotonic() - began, usage.ru_utime + usage.ru_stime)


def kill_and_finish(
    commands: list[Command], seconds: list[float], place: Place, n_kills: int, rng: random.Random
) -> list[str]:
    """Run commands, some of them killed at moments of their time. Return where they were killed.

    Half of the kills are of trainings.
    """
    killed = []
    trainings = [command for command in commands if command.name == "train"]
    struck = [rng.choice(trainings if i % 2 else commands) for i in range(n_kills)]
    for command, duration in zip(commands, seconds, strict=True):
        for _ in range(struck.count(command)):
            moment = rng.uniform(0, duration)
            process = start(command, place)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            if process.poll() is None:
                process.kill()
                killed.append(f"{command.label} {moment:.0f} s")
            process.wait()
        finish(command, place)
    return killed


# ---- comparing


def compare(place: Place, other: Place) -> list[str]:
    """Return how the pipelines in two places differ; nothing if they are equal."""
    here, there = io.path(place.root), io.path(other.root)
    wrong = []
    for stage in DATA_STAGES:
        sums = [hash_files(root / "base" / stage) for root in (here, there)]
        if sums[0] != sums[1]:
            wrong.append(f"base/{stage}")
    for run in ("base", "child", "grown"):
        wrong += checkpoint.diff_checkpoints(here / run, there / run)
    for run in ("base", "child"):
        records = [
            without_speed(read_metrics(root / run / "metrics.jsonl")) for root in (here, there)
        ]
        if records[0] != records[1]:
            wrong.append(f"{run}/metrics.jsonl")
        for name in EXPORTED:
            if io.sha256(here / run / "hf" / name) != io.sha256(there / run / "hf" / name):
                wrong.append(f"{run}/hf/{name}")
        for name in io.list_names(there / run / "eval"):
            results = [read_results(root / run / "eval" / name) for root in (here, there)]
            if results[0] != results[1]:
                wrong.append(f"{run}/eval/{name}")
    if not io.size(here / "report.html"):
        wrong.append("report.html")
    return wrong


def hash_files(directory: io.Path) -> dict[str, str]:
    """Return name -> sha256 of the files of a stage but its manifest."""
    names = [name for name in io.list_files(directory) if name != "manifest.json"]
    return {name: io.sha256(directory / name) for name in names}


def read_results(file: io.Path) -> Any:
    """Return what an evaluation or a comparison found, without places and times."""
    found = io.read_json(file)
    kept = ("results", "n-samples", "prompts", "better", "worse")
    return drop_times({name: found[name] for name in kept if name in found})


def drop_times(value: Any) -> Any:
    """Return a JSON value without what depends on the clock or the place."""
    if isinstance(value, dict):
        times = ("seconds", "tokens_per_second", "model")
        return {key: drop_times(each) for key, each in value.items() if key not in times}
    if isinstance(value, list):
        return [drop_times(each) for each in value]
    return value


# ---- the campaign


@contextlib.contextmanager
def open_places(
    home: pathlib.Path, kinds: list[str]
) -> Iterator[tuple[list[Place], dict[str, Any]]]:
    """Yield the disk and a bucket of each kind, served on loopback, and kind -> its proxy."""
    with contextlib.ExitStack() as stack:
        places = [Place(f"{home}/runs", {})]
        proxies = {}
        for kind in kinds:
            serve, _ = buckets.SERVERS[kind]
            proxies[kind] = stack.enter_context(serve())
            os.environ |= buckets.environment(kind, proxies[kind])
            places.append(Place(f"{kind}://bucket/runs", {}))
        yield [with_cache(place, home) for place in places], proxies


def with_cache(place: Place, home: pathlib.Path) -> Place:
    """Return a place whose commands have a cache directory of their own."""
    cache = home / "caches" / place.root.replace("/", "_")
    cache.mkdir(parents=True)
    return place._replace(environment={"XDG_CACHE_HOME": str(cache)})


def inject(proxy: buckets.Proxy) -> None:
    """Answer some writes to come by 503, of which half were carried out, and some locks by 412."""
    # fake-gcs-server forgets a finished upload session, so its answer must not be lost
    uploads = r"^(PUT|POST)(?!.*upload_id).*(checkpoints|multipart)"
    lost = buckets.Fault(uploads, 503, N_FAULTS, is_answer_lost=True, every=FAULT_EVERY)
    refused = buckets.Fault(r"^(PUT|POST|DELETE)", 503, N_FAULTS, every=FAULT_EVERY)
    locks = r"^(POST .*ifGenerationMatch=0|PUT .*\.lock/\d+\.json)"
    taken = buckets.Fault(locks, 412, N_FAULTS, every=LOCK_FAULT_EVERY)
    proxy.faults += [taken, refused, lost]


def campaign(home: pathlib.Path, kinds: list[str], n_kills: int, seed: int, small: bool) -> bool:
    """Print the tables; return whether every end equals the disk's."""
    with open_places(home, kinds) as (places, proxies):
        os.environ["XDG_CACHE_HOME"] = str(home / "caches/reader")
        disk, *others = places
        plans = [list_commands(place.root, small) for place in places]
        print(f"| command | {' | '.join(['disk', *kinds])} |", flush=True)
        print(f"|---|{'--:|' * len(places)}", flush=True)
        seconds: list[list[Duration]] = []
        for commands in zip(*plans, strict=True):  # side by side, for the machine's other load
            took = [finish(each, place) for each, place in zip(commands, places, strict=True)]
            seconds.append(took)
            cells = " | ".join(f"{each.wall:.1f} s ({each.processor:.1f})" for each in took)
            print(f"| {commands[0].label} | {cells} |", flush=True)
        print(f"| all | {format_totals(seconds)} |\n", flush=True)
        print("| bucket | outcome | end |\n|---|---|---|", flush=True)
        good = True
        for i, (kind, place) in enumerate(zip(kinds, others, strict=True), 1):
            wrong = compare(place, disk)
            good &= not wrong
            print(f"| {kind}:// | not killed | {'; '.join(wrong[:3]) or 'equal'} |", flush=True)
            place = with_cache(Place(f"{kind}://bucket/killed/runs", {}), home)
            inject(proxies[kind])
            took = [row[i].wall for row in seconds]
            commands = list_commands(place.root, small)
            rng = random.Random(seed)
            killed = kill_and_finish(commands, took, place, n_kills, rng)
            wrong = compare(place, disk)
            good &= not wrong
            outcome = f"{len(killed)} kills ({', '.join(killed)}), "
            n_refused = sum(
                N_FAULTS - each.n for each in proxies[kind].faults if each.status == 412
            )
            outcome += f"{proxies[kind].n_injected - n_refused} answers of 503, {n_refused} of 412"
            print(f"| {kind}:// | {outcome} | {'; '.join(wrong[:3]) or 'equal'} |", flush=True)
    return good


def format_totals(seconds: list[list[Duration]]) -> str:
    """Return the totals of each place, and how many times the disk's they are."""
    cells = []
    for column in zip(*seconds, strict=True):
        wall, processor = (sum(each) for each in zip(*column, strict=True))
        cells.append((wall, processor))
    first = cells[0]
    return " | ".join(
        f"{wall:.0f} s ({processor:.0f}), {wall / first[0]:.2f} x ({processor / first[1]:.2f} x)"
        for wall, processor in cells
    )


def main() -> None:
    """Run the campaign in a temporary directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=["gs", "s3"], choices=["gs", "s3"])
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        good = campaign(pathlib.Path(home), asked.kinds, asked.kills, asked.seed, asked.small)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

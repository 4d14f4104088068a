"""Fault injection: kill, stop, starve, damage and cut off small runs in every way below. Compare
their ends with that of an undisturbed one.

    python benchmarks/faults.py                       # all parts, some two hours on two cores
    python benchmarks/faults.py training [--kills 20] [--kills-of-two 10]
    python benchmarks/faults.py power [--cuts 12]     # faults_power.py: ext4 on a loop device
    python benchmarks/faults.py calls [--calls 300]   # faults_calls.py: each call of the system
    python benchmarks/faults.py starts [--rounds 5]   # faults_starts.py: two at once
    python benchmarks/faults.py interrupts            # the same: Ctrl-C
    python benchmarks/faults.py files [--damages 700] # faults_files.py: every file of a pipeline

After each fault the same command is run again. Checkpoints are compared bit by bit, metrics.jsonl
in every field but time, speed, memory and cost, other files by their bytes. Prints a table; exits 1
if anything differs.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # what is started here is of this clone
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import faults_calls
import faults_files
import faults_pipeline
import faults_power
import faults_starts

from jaxpt.train.metrics import read_metrics
from jaxpt.train.records import MetricRecord, ResumeEvent, TrainMetrics
from jaxpt.weights import checkpoint

RECIPE = """
from jaxpt.config import defaults
def get_config():
    c = defaults()
    c.prepare.sources = ("python:prose", "python:code")
    c.prepare.max_mb, c.prepare.heldout_frac = 0.3, 0.2
    c.tokenizer.vocab_size, c.pack.seq_len = 500, 64
    c.model.n_layers, c.model.d_model, c.model.d_ff = 2, 24, 40
    c.model.n_heads, c.model.n_kv_heads, c.model.d_head = 6, 2, 8
    c.model.max_seq_len = 64
    c.mixture.packed_paths = ("data/packed",)
    c.train.batch_size, c.train.log_every = 16, 5
    c.train.eval_every, c.train.eval_sequences = 50, 16
    c.train.checkpoint_every, c.train.max_to_keep = 10, 3
    c.optim.peak_lr, c.optim.warmup_frac = 1e-2, 0.1
    return c
"""
# train.py with gradients that are not finite at two steps
POISONED = """
import runpy
from jaxpt.data import loader
iterate_batches = loader.iterate_batches
def poisoned(dataset, schedule, sharding, batch_size, first, *more):
    batches = iterate_batches(dataset, schedule, sharding, batch_size, first, *more)
    for step, batch in enumerate(batches, first // batch_size + 1):
        if step in (13, 27):
            batch = batch._replace(loss_mask=batch.loss_mask * float("nan"))
        yield batch
loader.iterate_batches = poisoned
runpy.run_path(%r, run_name="__main__")
"""
VARIES = {"tokens_per_second", "step_seconds", "mfu", "memory_bytes", "seconds", "usd"}
VARIES |= {"productive_seconds", "productive_usd", "data_seconds", "start_seconds"}
VARIES |= {"evaluation_seconds", "save_seconds", "lost_seconds", "goodput"}
FILE_LIMIT = 102_400  # the tokenizer fits, a checkpoint does not
HEARTBEAT_TIMEOUT = 60  # seconds, as in jaxpt/train/distributed.py


def prepare(home: pathlib.Path) -> None:
    """Write the recipe, corpus, tokenizer and packed sequences."""
    (home / "small.py").write_text(RECIPE)
    for name in ("prepare", "train_tokenizer", "pack"):
        command = [sys.executable, str(ROOT / f"scripts/{name}.py")]
        command += ["--config", "small.py", "--workdir", "data"]
        subprocess.run(command, cwd=home, check=True, capture_output=True)


class Job:
    """One start of the run: a process, or several joined ones, and their output."""

    def __init__(
        self,
        home: pathlib.Path,
        run: str,
        steps: int,
        *more: str,
        n: int = 1,
        devices: int = 1,
        limit: int | None = None,
        script: str = "",
    ):
        self.home, self.run, self.log = home, home / run, home / f"{run}.log"
        # limit: of each file that it writes, in bytes
        limited = []
        if limit:
            limited = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "limited"]
        command = [
            *limited,
            sys.executable,
            script or str(ROOT / "scripts/train.py"),
            "--config",
            "small.py",
            "--workdir",
            run,
            f"--config.train.steps={steps}",
            *more,
        ]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
        }
        with socket.socket() as free:
            free.bind(("localhost", 0))
            joined = (
                {
                    "JAXPT_COORDINATOR": f"localhost:{free.getsockname()[1]}",
                    "JAXPT_PROCESSES": str(n),
                }
                if n > 1
                else {}
            )
        self.processes = [
            subprocess.Popen(
                command,
                cwd=home,
                stdout=open(self.log, "w" if i == 0 else "a"),
                stderr=subprocess.STDOUT,
                env={**environment, **joined, **({"JAXPT_PROCESS": str(i)} if n > 1 else {})},
            )
            for i in range(n)
        ]

    def wait(self, timeout: float = 600) -> list[int]:
        return [process.wait(timeout) for process in self.processes]

    def ends(self) -> None:
        """Wait for the end; exit with the log if the run failed."""
        if any(self.wait()):
            raise SystemExit(
                f"{self.run}: {self.processes} exited with\n{self.log.read_text()[-3000:]}"
            )

    def step(self) -> int:
        """Return the last step in metrics.jsonl."""
        records = read_metrics(self.run / "metrics.jsonl")
        return records[-1].step if records else 0

    def until(self, step: int) -> None:
        """Wait until the run has logged this step."""
        while self.step() < step:
            if any(process.poll() is not None for process in self.processes):
                raise SystemExit(
                    f"{self.run}: ended before step {step}\n{self.log.read_text()[-3000:]}"
                )
            time.sleep(0.02)

    def end_others(self, patience: float) -> float:
        """Return the seconds until the processes exited by themselves after one was lost.

        Those that have not after `patience` seconds are killed.
        """
        start = time.monotonic()
        while (
            any(process.poll() is None for process in self.processes)
            and time.monotonic() - start < patience
        ):
            time.sleep(0.05)
        took = time.monotonic() - start
        for process in self.processes:
            process.kill()
            process.wait()
        return took


def differences(home: pathlib.Path, run: str, uncut: str, steps: int) -> list[str]:
    """Return how a run differs from the uninterrupted one: arrays, then metrics."""
    found = checkpoint.diff_checkpoints(
        home / uncut / f"checkpoints/{steps}", home / run / f"checkpoints/{steps}"
    )
    here, there = (
        without_speed(read_metrics(home / name / "metrics.jsonl")) for name in (run, uncut)
    )
    return (
        found
        + [f"metrics.jsonl: {a} and {b}" for a, b in zip(here, there, strict=False) if a != b]
        + ["metrics.jsonl: length"] * (len(here) != len(there))
    )


def without_speed(records: list[MetricRecord]) -> list[dict]:
    """Return the records' reproducible fields, without resumes."""
    found = []
    for record in records:
        if not isinstance(record, ResumeEvent):
            fields = record.to_json()
            found.append({name: fields[name] for name in fields if name not in VARIES})
    return found


def copied(home: pathlib.Path, run: str, source: str) -> pathlib.Path:
    """Copy a run as a kill after its last checkpoint leaves it, ready to be damaged."""
    shutil.copytree(home / source, home / run)
    (home / run / "manifest.json").unlink()
    return home / run


# ---- the faults. Each leaves the run finished and returns its outcome for the table.


def kills(
    home: pathlib.Path, run: str, steps: int, n_kills: int, rng: random.Random, **layout
) -> str:
    """SIGKILL a random process; the others must exit by themselves.

    A third of the kills come while the run starts, the others at random steps.
    """
    at, waited = [], 0.0
    for _ in range(n_kills):
        job = Job(home, run, steps, **layout)
        done = job.step()
        if rng.random() < 1 / 3:
            latest = time.monotonic() + rng.uniform(0, 4)
            while (
                time.monotonic() < latest and job.step() < steps - 10
            ):  # a fast machine may be near the end by then
                time.sleep(0.02)
        else:
            job.until(min(done + rng.randrange(1, max(2 * steps // n_kills - 1, 2)), steps - 10))
            time.sleep(rng.uniform(0, 0.1))
        rng.choice(job.processes).kill()
        waited = max(waited, job.end_others(3 * HEARTBEAT_TIMEOUT))
        at.append(job.step())
    assert not (home / run / "manifest.json").exists(), "the run finished before all kills"
    Job(home, run, steps, **layout).ends()
    others = f"; the other process exited within {waited:.0f} s" if len(job.processes) > 1 else ""
    return f"{len(at)} kills, at steps {', '.join(map(str, at))}{others}"


def sigterm(home: pathlib.Path, run: str, steps: int, **layout) -> str:
    """SIGTERM one process: all save at the same step and exit with 143."""
    job = Job(home, run, steps, **layout)
    job.until(steps // 3)
    job.processes[-1].send_signal(signal.SIGTERM)
    status = job.wait()
    step = checkpoint.list_steps(home / run)[-1]
    Job(home, run, steps, **layout).ends()
    return f"saved step {step}, exit {status}"


def hung(home: pathlib.Path, run: str, steps: int, **layout) -> str:
    """SIGSTOP one host: the others give it up and exit, and the next start resumes."""
    job = Job(home, run, steps, **layout)
    job.until(steps // 3)
    stopped = job.processes[-1]
    stopped.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    while job.processes[0].poll() is None and time.monotonic() - start < 5 * HEARTBEAT_TIMEOUT:
        time.sleep(0.1)
    took = time.monotonic() - start
    job.end_others(0)
    Job(home, run, steps, **layout).ends()
    return f"given up after {took:.0f} s"


def full_disk(home: pathlib.Path, run: str, steps: int) -> str:
    """Let no file grow beyond FILE_LIMIT (RLIMIT_FSIZE), as a checkpoint's do.

    The run stops with one message, complete checkpoints stay, and the next start resumes.
    """
    job = Job(home, run, steps, limit=FILE_LIMIT)
    status = job.wait()
    output = job.log.read_text()
    assert status == [1] and "could not be written" in output and "Traceback" not in output, output
    Job(home, run, steps).ends()
    return "exit 1: " + output.strip().splitlines()[-1][:160] + "..."


def full_disk_continue(home: pathlib.Path, run: str, steps: int) -> str:
    """The same with train.on_save_error=continue: failed saves are logged, training continues.

    The last save must succeed, so it stops the run.
    """
    job = Job(home, run, steps, "--config.train.on_save_error=continue", limit=FILE_LIMIT)
    status, output = job.wait(), job.log.read_text()
    n_failed = output.count("The run continues")
    assert status == [1] and n_failed >= 3, output
    Job(home, run, steps).ends()
    return f"{n_failed} failed saves logged"


def small_disk(home: pathlib.Path, run: str, steps: int) -> str:
    """Fill a real disk: a tmpfs of 1 MB as the run directory (root only)."""
    (home / run).mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(home / run)], capture_output=True
    ).returncode:
        (home / run).rmdir()
        return "not tried: mounting needs root"
    try:
        job = Job(home, run, steps)
        status, output, whole = job.wait(), job.log.read_text(), checkpoint.list_steps(home / run)
        assert status == [1] and "could not be written" in output and "Traceback" not in output, (
            output
        )
        subprocess.run(["mount", "-o", "remount,size=64m", str(home / run)], check=True)
        Job(home, run, steps).ends()
        shutil.copytree(home / run, home / f"{run}.out")
    finally:
        subprocess.run(["umount", str(home / run)], check=True)
    (home / run).rmdir()
    (home / f"{run}.out").rename(home / run)
    return f"steps {whole} were complete; resumed with more space"


def not_finite(home: pathlib.Path, run: str, steps: int, rng: random.Random) -> str:
    """Make the loss of two batches NaN: their updates are skipped and counted, killed or not."""
    (home / "poisoned.py").write_text(POISONED % str(ROOT / "scripts/train.py"))
    poisoned = {"script": str(home / "poisoned.py")}
    Job(home, f"{run}_uncut", steps, **poisoned).ends()
    job = Job(home, run, steps, **poisoned)
    job.until(rng.randrange(15, 25))
    job.processes[0].kill()
    job.wait()
    at = job.step()
    Job(home, run, steps, **poisoned).ends()
    records = read_metrics(home / run / "metrics.jsonl")
    n_skipped = [record.n_skipped for record in records if isinstance(record, TrainMetrics)][-1]
    assert n_skipped == 2, n_skipped
    return f"{n_skipped} updates skipped, killed at step {at}"


def damages(directory: pathlib.Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Remove each file of a checkpoint, cut it in half, flip one bit of it."""
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        whole, name = file.read_bytes(), str(file.relative_to(directory))
        yield f"{name} gone", file.unlink
        file.write_bytes(whole)
        if whole:
            yield (
                f"{name} cut",
                lambda file=file, whole=whole: file.write_bytes(whole[: len(whole) // 2]),
            )
            middle = len(whole) // 2
            yield (
                f"{name} flipped",
                lambda file=file, whole=whole, m=middle: file.write_bytes(
                    whole[:m] + bytes([whole[m] ^ 1]) + whole[m + 1 :]
                ),
            )
            file.write_bytes(whole)


def torn(home: pathlib.Path, run: str, source: str, steps: int, rng: random.Random) -> str:
    """Damage the newest checkpoint in every way: the one before is taken.

    From one of them, chosen at random, the run is resumed.
    """
    directory = copied(home, run, source)
    # a stray numeric directory, which Orbax would take for the newest
    (directory / "checkpoints" / "999999").mkdir()
    n = 0
    for name, damage in damages(directory / f"checkpoints/{steps}"):
        damage()
        found = checkpoint.find_newest(directory)
        assert found and found.name != str(steps), f"{name} went unnoticed: {found}"
        n += 1
    name, damage = rng.choice(list(damages(directory / f"checkpoints/{steps}")))
    damage()
    Job(home, run, steps).ends()
    return f"{n} damages detected; resumed with {name}"


def campaign(home: pathlib.Path, n_kills: int, n_kills_of_two: int, seed: int) -> bool:
    """Print the table; return whether every end equals the uninterrupted run's."""
    rng, good = random.Random(seed), True
    prepare(home)
    print("| fault | outcome | end |\n|---|---|---|", flush=True)
    two = {"n": 2, "devices": 2}
    Job(home, "uncut", 400).ends()
    Job(home, "uncut2", 60, **two).ends()

    def row(name: str, run: str, uncut: str, steps: int, work: Callable, *rest, **layout) -> None:
        nonlocal good
        found = (
            work(home, run, *rest, **layout)
            if work is torn
            else work(home, run, steps, *rest, **layout)
        )
        wrong = differences(home, run, uncut, steps) if (home / run).exists() else []
        good &= not wrong
        print(f"| {name} | {found} | {'; '.join(wrong[:3]) or 'equal'} |", flush=True)

    row("SIGKILL, one process", "killed", "uncut", 400, kills, n_kills, rng)
    row(
        "SIGKILL of one of two processes",
        "killed2",
        "uncut2",
        60,
        kills,
        n_kills_of_two,
        rng,
        **two,
    )
    row("SIGTERM", "term", "uncut", 400, sigterm)
    row("SIGTERM to one of two", "term2", "uncut2", 60, sigterm, **two)
    row(
        "newest checkpoint torn, flipped, stray directory",
        "torn",
        "uncut",
        400,
        torn,
        "uncut",
        400,
        rng,
    )
    row("batches that are not finite", "nan", "nan_uncut", 400, not_finite, rng)
    row("disk full (no file above 100 kB)", "full", "uncut", 400, full_disk)
    row("disk full, on_save_error = continue", "full_on", "uncut", 400, full_disk_continue)
    row("disk full (tmpfs of 1 MB)", "tmpfs", "uncut", 400, small_disk)
    row("a hung host of two", "hung2", "uncut2", 60, hung, **two)
    return good


PARTS = ("training", "power", "calls", "starts", "interrupts", "files")


def try_pipeline(scratch: pathlib.Path, part: str, n: int, seed: int) -> bool:
    """Print a row per stage of the small pipeline; return whether every end is as it should be."""
    if part == "calls":
        failing = faults_calls.FailingCalls(scratch)
        commands = failing.commands
    else:
        failing, commands = None, faults_pipeline.Commands(scratch)
    before = faults_pipeline.make_reference(scratch, commands)
    is_good = True

    def row(name: str, found: str, wrong: list[str]) -> None:
        nonlocal is_good
        is_good &= not wrong
        print(f"| {part}: {name} | {found} | {len(wrong) or 'none'} wrong |", flush=True)
        for text in wrong:
            print(text, file=sys.stderr, flush=True)

    if part == "files":
        row("all", *faults_files.try_files(commands, before, scratch, n, seed))
        return is_good
    second = faults_pipeline.Commands(scratch) if part == "starts" else None
    for stage in faults_pipeline.STAGES:
        trial = faults_pipeline.Trial(stage, before, scratch, n, seed)
        if failing:
            tried = faults_calls.try_calls(failing, trial)
        elif second:
            tried = faults_starts.try_starts((commands, second), trial)
        elif part == "interrupts":
            tried = faults_starts.try_interrupts(commands, trial)
        else:
            tried = faults_power.try_power(commands, trial)
        row(stage.name, *tried)
    return is_good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", default=PARTS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-of-two", type=int, default=10)
    parser.add_argument("--cuts", type=int, default=12)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--damages", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    unknown = set(asked.parts) - set(PARTS)
    if unknown:
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(unknown)}")
    n_times = {
        "power": asked.cuts,
        "calls": asked.calls,
        "starts": asked.rounds,
        "interrupts": asked.rounds,
        "files": asked.damages,
    }
    is_good = True
    for part in asked.parts:
        with tempfile.TemporaryDirectory() as name:
            home = pathlib.Path(name)
            if part == "training":
                is_good &= campaign(home, asked.kills, asked.kills_of_two, asked.seed)
                continue
            reason = faults_power.unsupported_reason(home) if part == "power" else ""
            if reason:
                print(f"power: not tried: {reason}")
                continue
            is_good &= try_pipeline(home, part, n_times[part], asked.seed)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()

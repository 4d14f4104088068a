"""A small pipeline for fault injection: its stages, how to run them, how two ends are compared.

`Commands` starts one process that has everything imported and forks for each command, so that a
thousand of them cost a thousand seconds and not an hour. `python faults_pipeline.py` is that one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pathlib
import random
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RECIPE = """
from jaxpt.config import defaults
def get_config(model="base"):
    c = defaults()
    c.prepare.sources = ("sea=text:texts/sea*.txt", "land=jsonl:texts/land*.jsonl#text")
    c.prepare.heldout_frac = 0.2
    c.tokenizer.vocab_size, c.pack.seq_len = 300, 32
    c.model.n_layers, c.model.d_model, c.model.d_ff = 2, 24, 40
    c.model.n_heads, c.model.n_kv_heads, c.model.d_head = 6, 2, 8
    c.model.max_seq_len = 32
    c.train.steps, c.train.batch_size, c.train.log_every = 24, 8, 3
    c.train.eval_every, c.train.eval_sequences = 12, 8
    c.train.checkpoint_every, c.train.max_to_keep = 6, 2
    c.optim.peak_lr, c.optim.warmup_frac = 1e-2, 0.1
    if model == "child":
        c.mixture.packed_paths = ("base/packed",)
        c.initialize.source = "grown"
    return c
"""
CLOCK = re.compile(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00| UTC)?")
WORDS = "the a ship sea captain wind sail harbour rope night star wave gull mast deck crew storm "
WORDS += "land hill lane farmer field barn horse wheat plough rain sun fence gate river mill"


class Stage(NamedTuple):
    """A command of the pipeline and what it writes, below the directory where it is started."""

    name: str
    line: str
    out: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)


HELDOUT = "bits_per_byte/sea=parquet:base/corpus/heldout/sea-*.parquet#text"
GROW = "--grow 'depth_upscale(m=0)' --probe 0"
STAGES = (
    Stage("prepare", "prepare --config small.py --workdir base", "base/corpus"),
    Stage("train_tokenizer", "train_tokenizer --config small.py --workdir base", "base/tokenizer"),
    Stage("pack", "pack --config small.py --workdir base", "base/packed"),
    Stage("train", "train --config small.py --workdir base", "base"),
    Stage("initialize", f"initialize --from base {GROW} --to grown", "grown"),
    Stage("train the child", "train --config small.py:child --workdir child", "child"),
    Stage("export_hf", "export_hf --from child --to hf", "hf"),
    Stage(
        "evaluate",
        f"evaluate --model hf --tasks '{HELDOUT}' --to child/eval/jax.json",
        "child/eval/jax.json",
    ),
    Stage(
        "compare",
        "compare --models base child --prompts prompts.txt --max-new 6 "
        "--to child/eval/samples.json",
        "child/eval/samples.json",
    ),
    Stage("report", "report --workdir base child --to report.html", "report.html"),
)
BY_NAME = {stage.name: stage for stage in STAGES}
# by the process that forks for each command
IMPORTED = """
jaxpt.cli.main jaxpt.data.pack jaxpt.data.prepare jaxpt.data.tokenizer jaxpt.evaluate.attribution
jaxpt.evaluate.compare jaxpt.evaluate.harness jaxpt.export jaxpt.flops jaxpt.lineage
jaxpt.report.live jaxpt.report.page jaxpt.train.initial_run jaxpt.train.loop
plotly.graph_objects pyarrow.dataset pyarrow.parquet sentencepiece tensorboardX tokenizers
transformers
"""
# what differs between equal ends: times, speed, memory, and what is derived from them
VARIES = {"tokens_per_second", "step_seconds", "mfu", "memory_bytes", "seconds", "usd"}
VARIES |= {
    "data_seconds",
    "start_seconds",
    "evaluation_seconds",
    "save_seconds",
    "lost_seconds",
    "goodput",
}
VARIES |= {"productive_seconds", "productive_usd", "created", "started", "checksum"}


def write_inputs(home: pathlib.Path) -> None:
    """Write the recipe, the prompts and the raw text."""
    rng = random.Random(11)
    (home / "small.py").write_text(RECIPE, "utf-8")
    (home / "prompts.txt").write_text("the ship\nthe farmer and the\n", "utf-8")
    texts = home / "texts"
    texts.mkdir()
    words = WORDS.split()

    def make_document() -> str:
        return " ".join(rng.choices(words, k=rng.randrange(30, 90))) + "."

    for k in range(60):
        (texts / f"sea{k:02d}.txt").write_text(make_document(), "utf-8")
    for k in range(2):
        lines = [json.dumps({"text": make_document()}) for _ in range(40)]
        (texts / f"land{k}.jsonl").write_text("\n".join(lines), "utf-8")


# ---- running commands


class Outcome(NamedTuple):
    """How a command ended."""

    status: int  # negative: killed by that signal
    printed: str
    is_hung: bool

    @property
    def error(self) -> str:
        """Its last line, if that is our sentence."""
        lines = self.printed.strip().splitlines()
        return lines[-1] if lines and lines[-1].startswith("error: ") else ""

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.printed or self.status < 0

    def describe(self) -> str:
        return f"exit {self.status}{', hung' * self.is_hung}\n{self.printed[-3000:]}"


def make_environment(home: pathlib.Path, **more: str) -> dict[str, str]:
    """Return the environment of a command: one CPU device, no hub, a compile cache of its own."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        **more,
    }


class Commands:
    """Runs commands one after the other, each in a process forked from one with all imports."""

    def __init__(self, scratch: pathlib.Path, **environment: str):
        self.log = scratch / f"commands-{secrets.token_hex(4)}.log"
        self.process = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).resolve()), str(self.log)],
            env=make_environment(scratch, **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, home: pathlib.Path, words: list[str], timeout: float = 120) -> Outcome:
        """Run `jaxpt WORDS` in a directory to its end; what takes longer is killed and hung."""
        self.start(home, words, timeout)
        return self.finish()

    def start(self, home: pathlib.Path, words: list[str], timeout: float = 120) -> int:
        """Start a command. Return its process group."""
        assert self.process.stdin and self.process.stdout
        asked = {"home": str(home), "words": words, "timeout": timeout}
        self.process.stdin.write(f"{json.dumps(asked)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def finish(self) -> Outcome:
        """Wait for the command that was started."""
        assert self.process.stdout
        answer = json.loads(self.process.stdout.readline())
        printed = self.log.read_text("utf-8", "replace")
        return Outcome(answer["status"], printed, answer["is_hung"])

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(log: str) -> None:
    """Fork for each command that is asked for on stdin; answer how it ended."""
    for name in IMPORTED.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            run_forked(asked, log)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # as the child does: whoever is first
        print(pid, flush=True)
        answer = wait(pid, asked["timeout"])
        print(json.dumps(answer), flush=True)


def run_forked(asked: dict, log: str) -> None:
    """Be the command, to the end of its interpreter."""
    os.setpgid(0, 0)
    os.chdir(asked["home"])
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for handle, to in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(handle, to)
    sys.argv = ["jaxpt", *asked["words"]]
    from jaxpt.cli.main import main

    main()
    sys.exit(0)


def wait(pid: int, timeout: float) -> dict:
    """Wait for a process; kill it and all that it started if it takes too long."""
    latest = time.monotonic() + timeout
    is_hung = False
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() > latest:
            is_hung = True
            os.killpg(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # workers that outlive their parent
    return {"status": os.waitstatus_to_exitcode(status), "is_hung": is_hung}


# ---- trying a stage


class Trial(NamedTuple):
    """A stage that is put through a fault n times, from what `make_reference` left.

    Attributes:
        stage: of the pipeline.
        before: of `make_reference`.
        scratch: a directory to work in.
        n: how many times at most.
        seed: of what is drawn.
    """

    stage: Stage
    before: dict[str, pathlib.Path]
    scratch: pathlib.Path
    n: int
    seed: int = 0

    def make_rng(self) -> random.Random:
        return random.Random(f"{self.stage.name} {self.seed}")

    def restore(self) -> pathlib.Path:
        """Return a directory as it is before the stage."""
        home = self.scratch / "tried"
        restore(home, self.before[self.stage.name])
        return home

    def find_differences(self, home: pathlib.Path) -> list[str]:
        """Return how the stage's end differs from an undisturbed one."""
        return find_differences(self.stage, home, self.before[""])

    def measure_seconds(self, commands: Commands) -> float:
        """Return how long the stage takes undisturbed."""
        home = self.restore()
        start = time.monotonic()
        commands.run(home, self.stage.words)
        return time.monotonic() - start


def restore(home: pathlib.Path, source: pathlib.Path) -> None:
    """Make a directory as it was before a stage."""
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(source, home)


def judge(outcome: Outcome) -> str:
    """Return what is wrong with an end; empty if it is a sentence or good."""
    if outcome.is_hung:
        return f"hung: {outcome.describe()}"
    if outcome.has_traceback:
        return f"traceback: {outcome.describe()}"
    if outcome.status and (outcome.status != 1 or not outcome.error):
        return f"no sentence: {outcome.describe()}"
    return ""


def format_ends(ends: Counter[str]) -> str:
    """Return "2 refused, 1 wrote it too"."""
    return ", ".join(f"{n} {end}" for end, n in ends.items())


# ---- comparing ends


def make_reference(scratch: pathlib.Path, commands: Commands) -> dict[str, pathlib.Path]:
    """Walk the pipeline. Return stage -> a copy of the directory as it was before that stage.

    The key "" is the end.
    """
    home = scratch / "reference"
    home.mkdir()
    write_inputs(home)
    before = {}
    for stage in STAGES:
        before[stage.name] = scratch / "before" / stage.name.replace(" ", "_")
        shutil.copytree(home, before[stage.name])
        outcome = commands.run(home, stage.words)
        if outcome.status:
            raise SystemExit(f"{stage.name}: {outcome.describe()}")
    before[""] = home
    return before


def find_differences(stage: Stage, home: pathlib.Path, reference: pathlib.Path) -> list[str]:
    """Return how the end of a stage differs from that in the reference; damage counts too."""
    from jaxpt import io
    from jaxpt.spec import UserError

    out, expected = home / stage.out, reference / stage.out
    if out.suffix:
        if not out.is_file():
            return [f"{stage.out} is missing"]
        same = normalize(out, home) == normalize(expected, reference)
        return [] if same else [f"{stage.out} differs"]
    try:
        damage = io.find_damage(out, verify=True)
        if damage:
            return [f"{damage.name} {damage.reason}"]
        if stage.words[0] == "train":
            return compare_runs(out, expected)
        return compare_published(stage, home, reference)
    except UserError as error:
        return [str(error)]


def compare_published(stage: Stage, home: pathlib.Path, reference: pathlib.Path) -> list[str]:
    """Return how the files of a stage differ."""
    from jaxpt import io

    out, expected = home / stage.out, reference / stage.out
    here, there = io.read_sealed(out), io.read_sealed(expected)
    found = [f"{name} is in one only" for name in here.keys() ^ there.keys()]
    for name in sorted(here.keys() & there.keys()):
        if normalize(out / name, home) != normalize(expected / name, reference):
            found.append(f"{name} differs")
    # Orbax's names and bytes are not those of another save
    found = [text for text in found if not text.startswith("checkpoints/")]
    if (out / "checkpoints").is_dir():
        found += compare_checkpoints(out, expected)
    return found


def compare_checkpoints(out: pathlib.Path, expected: pathlib.Path) -> list[str]:
    """Return how the newest checkpoints differ, bit by bit."""
    from jaxpt.weights import checkpoint

    found = checkpoint.find_newest(out)
    newest = checkpoint.find_newest(expected)
    if not found or not newest or found.name != newest.name:
        return [f"checkpoint {found} and {newest}"]
    return checkpoint.diff_checkpoints(found, newest)


def compare_runs(out: pathlib.Path, expected: pathlib.Path) -> list[str]:
    """Return how two trained runs differ: checkpoints, steps that are kept, metrics, tokenizer."""
    from jaxpt import io
    from jaxpt.weights import checkpoint

    found = compare_checkpoints(out, expected)
    if checkpoint.list_steps(out) != checkpoint.list_steps(expected):
        found.append(f"steps {checkpoint.list_steps(out)}")
    here, there = read_metrics(out), read_metrics(expected)
    if here != there:
        found.append("metrics.jsonl differs")
    if io.find_damage(out / "tokenizer", verify=True):
        found.append("tokenizer is damaged")
    return found


def read_metrics(run: pathlib.Path) -> list[dict]:
    """Return the reproducible fields of metrics.jsonl, without resumes."""
    records = []
    for line in (run / "metrics.jsonl").read_bytes().splitlines():
        try:
            records.append(drop_times(json.loads(line)))
        except ValueError:
            records.append({"kind": "damaged"})
    return [record for record in records if record.get("kind") != "resume"]


def normalize(file: pathlib.Path, home: pathlib.Path) -> object:
    """Return what equal ends have in common: no place, no clock, JSON without times and speed."""
    data = file.read_bytes().replace(str(home).encode(), b"")
    try:
        return drop_times(json.loads(data))
    except ValueError:
        return CLOCK.sub(b"", data)


def drop_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: drop_times(value[key]) for key in value if key not in VARIES}
    if isinstance(value, list):
        return [drop_times(each) for each in value]
    return value


if __name__ == "__main__":
    serve(sys.argv[1])

"""Seconds from the command to a run's first step: with an empty compile cache, again in another run
directory, and resuming after a kill.

    python benchmarks/start.py [--shapes S M] [--rounds 3]

scripts/train.py is started as a user starts it, on data packed here. A start's time ends when the
log reports that the step is compiled or read from the cache, and at the first step's line.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # what is started here is of this clone
# L, D, F, heads, kv heads, seq_len, batch_size
SHAPES = {"S": (8, 256, 704, 8, 4, 512, 8), "M": (12, 1024, 4096, 32, 8, 512, 1)}

RECIPE = """
from jaxpt.config import defaults
def get_config():
    c = defaults()
    c.prepare.sources, c.prepare.max_mb = ("python:prose",), 1.0
    c.tokenizer.vocab_size, c.pack.seq_len = 2000, {T}
    c.model.n_layers, c.model.d_model, c.model.d_ff = {L}, {D}, {F}
    c.model.n_heads, c.model.n_kv_heads, c.model.d_head = {N}, {K}, {D} // {N}
    c.model.max_seq_len, c.train.batch_size, c.train.eval_sequences = {T}, {B}, {B}
    c.train.log_every, c.train.checkpoint_every = 1, 2
    c.train.eval_every, c.train.steps = 0, 200
    return c
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for shape in arguments.shapes:
        found = [one_round(shape) for _ in range(arguments.rounds)]
        print(
            f"\n| {shape} | ready, s | of the first | first step's line, s | "
            "of the first |\n|---|---|---|---|---|"
        )
        for i, name in enumerate(("first start", "again", "resumed after a kill")):
            cells = [name]
            for which in range(2):
                seconds = [each[i][which] for each in found]
                share = statistics.median(each[i][which] / each[0][which] for each in found)
                cells += [
                    f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
                    f"{share:.2f}",
                ]
            print("| " + " | ".join(cells) + " |", flush=True)


def one_round(shape: str) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        L, D, F, N, K, T, B = SHAPES[shape]
        (home / "recipe.py").write_text(RECIPE.format(L=L, D=D, F=F, N=N, K=K, T=T, B=B))
        for name in ("prepare", "train_tokenizer", "pack"):
            command = [
                sys.executable,
                ROOT / f"scripts/{name}.py",
                "--config",
                "recipe.py",
                "--workdir",
                "data",
            ]
            subprocess.run(command, cwd=home, check=True, capture_output=True)
        return [start(home, run) for run in ("first", "again", "first")]


def start(home: pathlib.Path, run: str) -> tuple[float, float]:
    """Return the seconds to the compiled step and to the first step's line.

    The run is killed once it has saved a checkpoint.
    """
    command = [
        sys.executable,
        ROOT / "scripts/train.py",
        "--config",
        "recipe.py",
        "--workdir",
        run,
        "--config.mixture.packed_paths=('data/packed',)",
    ]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(home / "compiled")}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ready = line_at = None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "train step: ready" in line and ready is None:
            ready = time.perf_counter() - begun
        if re.search(r" step +\d+/\d+  loss ", line) and line_at is None:
            line_at = time.perf_counter() - begun
        if line_at and any((home / run / "checkpoints").glob("[0-9]*")):
            break
    process.kill()
    process.wait()
    if line_at is None:
        sys.exit("".join(lines))
    return ready, line_at


if __name__ == "__main__":
    main()

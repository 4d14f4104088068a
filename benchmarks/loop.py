"""What the loop adds to a bare step: logging, metrics, TensorBoard and started checkpoints.

    python benchmarks/loop.py --shape small --steps 150 --rounds 15
    python benchmarks/loop.py --shape S --steps 45 --rounds 4

In one process, in alternating order: the bare compiled step on one batch over and over, and the
step with everything that loop.py does around it (data from disk, a log line every 10 steps, one
checkpoint started). Prints each round's times, and the median of the overheads.
"""

import argparse
import contextlib
import io
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # what is started here is of this clone
sys.path.insert(0, str(ROOT))

import dataclasses

import jax

from jaxpt import config, sharding
from jaxpt.data import loader
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec
from jaxpt.train import loop, state, step
from jaxpt.train.metrics import read_metrics
from jaxpt.train.records import TrainMetrics

SHAPES = {
    "small": {"L": 4, "D": 128, "F": 352, "N": 4, "K": 2, "T": 128},
    "S": {"L": 8, "D": 256, "F": 704, "N": 8, "K": 4, "T": 512},
}  # of 8 sequences
RECIPE = """
from jaxpt.config import defaults
def get_config():
    c = defaults()
    c.prepare.sources, c.prepare.max_mb = ("python:prose",), 1.0
    c.tokenizer.vocab_size, c.pack.seq_len = 2000, {T}
    c.model.n_layers, c.model.d_model, c.model.d_ff = {L}, {D}, {F}
    c.model.n_heads, c.model.n_kv_heads, c.model.d_head, c.model.max_seq_len = {N}, {K}, 32, {T}
    c.train.batch_size, c.train.log_every, c.train.eval_every, c.train.eval_sequences = 8, 10, 0, 8
    c.optim.warmup_frac = 0.1
    return c
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        (home / "small.py").write_text(RECIPE.format(**SHAPES[arguments.shape]))
        for name in ("prepare", "train_tokenizer", "pack"):
            command = [
                sys.executable,
                ROOT / f"scripts/{name}.py",
                "--config",
                "small.py",
                "--workdir",
                "data",
            ]
            subprocess.run(command, cwd=home, check=True, capture_output=True)
        settings = config.load_config(home / "small.py")
        settings = dataclasses.replace(
            settings,
            mixture=dataclasses.replace(
                settings.mixture, packed_paths=(str(home / "data/packed"),)
            ),
            train=dataclasses.replace(
                settings.train, steps=arguments.steps, checkpoint_every=arguments.steps * 2 // 3
            ),
        )
        bare, whole = [], []
        for i in range(arguments.rounds):
            turns = [(bare, bare_step), (whole, step_in_the_loop)]
            for seconds, turn in turns if i % 2 else reversed(turns):
                seconds.append(turn(settings, home, f"run{i}"))
            print(
                (
                    f"round {i}: bare step {bare[-1] * 1e3:.2f} ms, in the loop "
                    f"{whole[-1] * 1e3:.2f} ms"
                ),
                flush=True,
            )
        ratios = [b / a - 1 for a, b in zip(bare, whole, strict=True)]
        print(
            f"overhead: median {statistics.median(ratios):.1%}, from "
            f"{min(ratios):.1%} to {max(ratios):.1%}"
        )


def step_in_the_loop(settings: config.Config, home: pathlib.Path, run: str) -> float:
    """Return the seconds per step between the first and last line of a run."""
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train_model(settings, home / run)
    records = read_metrics(home / run / "metrics.jsonl")
    first, *_, last = [record for record in records if isinstance(record, TrainMetrics)]
    return (last.seconds - first.seconds) / (last.step - first.step)


def bare_step(settings: config.Config, home: pathlib.Path, run: str) -> float:
    """Return the seconds per step of the compiled step alone."""
    mesh = sharding.make_mesh(settings.mesh)
    rows = loader.open_packed([home / "data/packed"])
    mixture = MixtureSchedule(settings.mixture, rows.n_sequences, settings.train.batch_size)
    batch = next(
        loader.iterate_batches(
            rows, mixture, sharding.make_batch_sharding(mesh), settings.train.batch_size, 0, True
        )
    )
    model = {
        name: getattr(settings.model, name)
        for name in (
            "n_layers",
            "d_model",
            "d_ff",
            "n_heads",
            "n_kv_heads",
            "d_head",
            "max_seq_len",
        )
    }
    spec = ModelSpec(**model, vocab_size=-(-rows.vocab_size // 128) * 128)
    now = state.init_state(transformer.init_params(spec, 0, mesh), spec, settings.optim, mesh)
    step_of = step.build_step(spec, settings.train, settings.optim, settings.pack.seq_len, mesh)
    now, _ = jax.block_until_ready(step_of(now, batch))
    start = time.perf_counter()
    for _ in range(settings.train.steps):
        now, found = step_of(now, batch)
    jax.block_until_ready(found)
    return (time.perf_counter() - start) / settings.train.steps


if __name__ == "__main__":
    main()

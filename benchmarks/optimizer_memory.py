"""Compare optimizers that keep fewer bytes per parameter with float32 AdamW, over several seeds.

    python benchmarks/optimizer_memory.py --text FILE ... [--seeds 3] [--steps 500]

A small model learns the bytes of the text. A seed decides the initial weights and the order of the
data, which are the same for every optimizer. Printed are the held-out loss after the last step; its
difference, at the same seed, from AdamW or Muon with float32 moments, with a 95 % interval; the
spread of AdamW's seeds, bytes per parameter, and the time of a step over AdamW's, side by side.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax
import numpy as np
from growth_runs import paired_interval

from jaxpt import sharding
from jaxpt.config import MeshConfig, OptimConfig, TrainConfig
from jaxpt.evaluate import likelihood
from jaxpt.model import transformer
from jaxpt.plan import roofline
from jaxpt.spec import Batch, ModelSpec
from jaxpt.train import state, step

SPEC = ModelSpec(
    n_layers=2, d_model=64, d_ff=160, n_heads=2, n_kv_heads=2, d_head=32, vocab_size=256
)
BATCH, LENGTH = 16, 64
ARMS = {
    "adamw": {},
    "adamw bfloat16": {"moment_dtype": "bfloat16"},
    "adamw int8": {"moment_dtype": "int8"},
    "muon int8": {"name": "muon", "moment_dtype": "int8"},
    "muon": {"name": "muon"},
    "adafactor": {"name": "adafactor"},
    "adafactor int8": {"name": "adafactor", "moment_dtype": "int8"},
}


def make_batch(text: np.ndarray, starts: np.ndarray) -> Batch:
    """Return windows of the text as a batch."""
    windows = text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
    ones = np.ones((len(starts), LENGTH), np.int32)
    positions = np.arange(LENGTH, dtype=np.int32) * ones
    return Batch(windows[:, :-1], windows[:, 1:], ones, positions, ones.astype(np.float32))


class Arm:
    """An optimizer's compiled step."""

    def __init__(self, changes: dict, steps: int, mesh):
        """Compile it."""
        self.optim = dataclasses.replace(OptimConfig(peak_lr=3e-3, warmup_frac=0.05), **changes)
        train = TrainConfig(steps=steps, batch_size=BATCH)
        self.mesh = mesh
        self.run = step.build_step(SPEC, train, self.optim, LENGTH, mesh)
        self.measure = likelihood.make_loss_step(SPEC, mesh)

    def train(self, text: np.ndarray, heldout: list[Batch], steps: int, seed: int) -> float:
        """Return the held-out loss after a run."""
        rng = np.random.default_rng(seed)
        params = transformer.init_params(SPEC, seed, self.mesh)
        now = state.init_state(params, SPEC, self.optim, self.mesh)
        for _ in range(steps):
            starts = rng.integers(0, len(text) - LENGTH - 1, BATCH)
            now, _ = self.run(now, make_batch(text, starts))
        return likelihood.measure_heldout_loss(self.measure, now.params, heldout)

    def count_bytes(self) -> float:
        """Return the bytes of the optimizer's state per parameter."""
        counted = roofline.count_state_bytes(SPEC, self.optim, "float32")
        return (counted.moments + counted.rest) / transformer.count_params(SPEC)

    def time_steps(self, batch: Batch, n: int = 20) -> float:
        """Return the seconds of n steps."""
        params = transformer.init_params(SPEC, 0, self.mesh)
        now = state.init_state(params, SPEC, self.optim, self.mesh)
        now, _ = jax.block_until_ready(self.run(now, batch))
        start = time.perf_counter()
        for _ in range(n):
            now, _ = self.run(now, batch)
        jax.block_until_ready(now)
        return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", nargs="+", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: expected at least 2")
    text = b"\n\n".join(path.read_bytes() for path in arguments.text)
    whole = np.frombuffer(text, np.uint8)
    n_train = len(whole) * 9 // 10
    train, rest = whole[:n_train], whole[n_train:]
    starts = np.linspace(0, len(rest) - LENGTH - 2, 256).astype(int)
    heldout = [make_batch(rest, part) for part in np.split(starts, 4)]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    arms = {name: Arm(changes, arguments.steps, mesh) for name, changes in ARMS.items()}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(arguments.seeds):
        for name, arm in arms.items():
            losses[name].append(arm.train(train, heldout, arguments.steps, seed))
            print(f"seed {seed} {name}: {losses[name][-1]:.4f}", flush=True)
    batch = make_batch(train, np.arange(BATCH) * LENGTH)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(5):
        for name, arm in arms.items():
            times[name].append(arm.time_steps(batch))
    spread = statistics.stdev(losses["adamw"])
    print(f"\n{arguments.steps} steps, {arguments.seeds} seeds; AdamW's seeds: std {spread:.4f}")
    print("optimizer        bytes  loss    difference from            step time / AdamW's")
    for name, arm in arms.items():
        base = "muon" if name.startswith("muon") else "adamw"
        differences = [a - b for a, b in zip(losses[name], losses[base], strict=True)]
        mean, half, _ = paired_interval(differences) if name != base else (0.0, 0.0, 1.0)
        ratio = statistics.median(a / b for a, b in zip(times[name], times["adamw"], strict=True))
        loss = statistics.mean(losses[name])
        print(
            f"{name:15}  {arm.count_bytes():5.2f}  {loss:.4f}  "
            f"{base:6} {mean:+.4f} +/- {half:.4f}  {ratio:.2f}"
        )


if __name__ == "__main__":
    main()

"""Tokens per second of the quickstart's training step on this machine, with the scan over layers
unrolled and not, in turn.

    python benchmarks/train_step.py [rounds]

Prints the median of each and of their ratio, round by round, so that a machine whose speed drifts
still compares fairly.
"""

import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from jaxpt import config, initialize, sharding
from jaxpt.model import transformer
from jaxpt.spec import Batch
from jaxpt.train import state, step


def main(rounds: int = 10):
    settings = config.load_config(ROOT / "configs/quickstart.py")
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    spec = initialize.make_random_spec(settings.model, settings.tokenizer.vocab_size)
    B, T = settings.train.batch_size, settings.pack.seq_len
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (B, T)).astype(np.int32)
    ones = np.ones_like(tokens)
    batch = Batch(
        tokens,
        np.roll(tokens, -1, 1),
        ones,
        np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        ones.astype(np.float32),
    )
    batch = jax.device_put(batch, sharding.make_batch_sharding(mesh))

    def make(unrolled: bool):
        original = jax.lax.scan
        if not unrolled:
            jax.lax.scan = lambda f, init, xs, unroll=1: original(f, init, xs)
        run = step.build_step(spec, settings.train, settings.optim, settings.pack.seq_len, mesh)
        now, _ = run(
            state.init_state(transformer.init_params(spec, 0, mesh), spec, settings.optim, mesh),
            batch,
        )  # compiled here
        jax.lax.scan = original
        return run, now

    variants = {name: make(name == "unrolled") for name in ("unrolled", "rolled")}
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (run, now) in variants.items():
            start = time.perf_counter()
            for _ in range(3):
                now, metrics = run(now, batch)
            jax.block_until_ready(metrics)
            seconds[name].append((time.perf_counter() - start) / 3)
            variants[name] = run, now
    for name, measured in seconds.items():
        print(
            f"{name:<9} {B * T / statistics.median(measured):8,.0f} tokens/s  (median of {rounds})"
        )
    ratios = [
        rolled / unrolled
        for rolled, unrolled in zip(seconds["rolled"], seconds["unrolled"], strict=True)
    ]
    print(
        f"unrolled is {statistics.median(ratios):.2f} x rolled (from "
        f"{min(ratios):.2f} to {max(ratios):.2f}), {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))

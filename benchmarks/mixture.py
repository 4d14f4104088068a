"""Tokens per second of configs/moe_small.py's mixture on this machine, beside the dense model of
equal active parameters, in turn.

    python benchmarks/mixture.py [rounds]

Prints the median of each, and of the ratio of their steps round by round, so that a machine whose
speed drifts still compares fairly.
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


def make_run(name: str, mesh: jax.sharding.Mesh):
    """Return the compiled step, its state and a batch."""
    settings = config.load_config(f"{ROOT / 'configs/moe_small.py'}:{name}")
    spec = initialize.make_random_spec(settings.model, settings.tokenizer.vocab_size)
    B, T = settings.train.batch_size, settings.pack.seq_len
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (B, T)).astype(np.int32)
    ones = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = Batch(tokens, np.roll(tokens, -1, 1), ones, positions, ones.astype(np.float32))
    batch = jax.device_put(batch, sharding.make_batch_sharding(mesh))
    run = step.build_step(spec, settings.train, settings.optim, T, mesh)
    params = transformer.init_params(spec, 0, mesh)
    now, _ = run(state.init_state(params, spec, settings.optim, mesh), batch)
    return run, now, batch


def main(rounds: int = 20) -> None:
    """Print the medians."""
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    runs = {name: make_run(name, mesh) for name in ("moe", "dense")}
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, now, batch) in runs.items():
            start = time.perf_counter()
            for _ in range(3):
                now, scalars = run(now, batch)
            jax.block_until_ready(scalars)
            seconds[name].append((time.perf_counter() - start) / 3)
            runs[name] = run, now, batch
    for name, measured in seconds.items():
        n_tokens = runs[name][2].tokens.size
        print(f"{name:<5} {n_tokens / statistics.median(measured):8,.0f} tokens/s")
    ratios = [moe / dense for moe, dense in zip(seconds["moe"], seconds["dense"], strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    print(
        f"a step of the mixture takes {quarters[1]:.2f} times the dense one "
        f"(quartiles {quarters[0]:.2f} to {quarters[2]:.2f} of {rounds} rounds), "
        f"by the fastest of each {min(seconds['moe']) / min(seconds['dense']):.2f}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

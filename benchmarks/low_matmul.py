"""Train a small model on the bytes of Python's documentation with matmuls in each dtype, and print
held-out losses as a markdown table.

    python benchmarks/low_matmul.py [--steps 500] [--seeds 3]

All runs of a seed have the same initial values and batches. The interval is Student's, 95 %, of the
differences between a dtype and bfloat16 by seed.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
from pydoc_data import topics

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from jaxpt import sharding
from jaxpt.config import MeshConfig, OptimConfig, TrainConfig
from jaxpt.model import transformer
from jaxpt.spec import Batch, ModelSpec
from jaxpt.train import state, step

SPEC = ModelSpec(
    n_layers=3,
    d_model=64,
    d_ff=192,
    n_heads=4,
    n_kv_heads=2,
    d_head=16,
    vocab_size=256,
    max_seq_len=128,
)
T, B = 64, 16
HELD_OUT_BATCHES = 24
DTYPES = ("compute", "float8", "int8")
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % of n - 1 degrees of freedom


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3, choices=STUDENT)
    args = parser.parse_args()
    losses = {dtype: [] for dtype in DTYPES}
    for seed in range(args.seeds):
        for dtype in DTYPES:
            losses[dtype].append(train(dtype, seed, args.steps))
            print(seed, dtype, f"{losses[dtype][-1]:.4f}", file=sys.stderr, flush=True)
    print("| train.matmul_dtype | held-out nats per byte, mean | minus bfloat16's |")
    print("|---|---|---|")
    for dtype, found in losses.items():
        gaps = [a - b for a, b in zip(found, losses["compute"], strict=True)]
        half = STUDENT[args.seeds] * statistics.stdev(gaps) / args.seeds**0.5
        gap = f"{statistics.mean(gaps):+.4f} ± {half:.4f}"
        print(f"| {dtype} | {statistics.mean(found):.4f} | {gap} |")


def train(dtype, seed, n_steps):
    """Return the held-out loss in nats per byte, measured in bfloat16 as jaxpt does."""
    text = np.frombuffer("".join(topics.topics.values()).encode(), np.uint8)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    knobs = TrainConfig(steps=n_steps, batch_size=B, compute_dtype="bfloat16", matmul_dtype=dtype)
    optim = OptimConfig(peak_lr=4e-3)
    run = step.build_step(SPEC, knobs, optim, T, mesh)
    params = transformer.init_params(SPEC, seed, mesh)
    now = state.init_state(params, SPEC, optim, mesh)
    rng = np.random.default_rng(seed)
    n_train = len(text) * 9 // 10
    for _ in range(n_steps):
        now, _ = run(now, make_batch(text, rng.integers(0, n_train - T - 1, B), mesh))
    plain = dataclasses.replace(knobs, matmul_dtype="compute")
    measure = jax.jit(step.make_gradient_function(SPEC, plain, T, mesh))
    totals = np.zeros(2)
    starts = np.linspace(n_train, len(text) - T - 1, HELD_OUT_BATCHES * B, dtype=int)
    for part in np.split(starts, HELD_OUT_BATCHES):
        _, loss_sum, _ = measure(now.params, make_batch(text, part, mesh))
        totals += float(loss_sum), B * T
    return totals[0] / totals[1]


def make_batch(text, starts, mesh):
    """Return a batch of one document per sequence."""
    places = starts[:, None] + np.arange(T)
    ones = np.ones((B, T), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    tokens, targets = (text[at].astype(np.int32) for at in (places, places + 1))
    batch = Batch(tokens, targets, ones, positions, ones.astype(np.float32))
    return jax.device_put(batch, sharding.make_batch_sharding(mesh))


if __name__ == "__main__":
    main()

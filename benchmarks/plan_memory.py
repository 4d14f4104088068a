"""Measure the peak memory of a train step on this CPU beside the planned one. Linux only.

    python benchmarks/plan_memory.py

Each row has its own process: it compiles the step, makes the state, resets the kernel's
mark of the highest resident memory, and runs three steps. Measured is the mark, less what was
resident before, plus the state. The plan is that of plan.py for one CPU device.
"""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxpt import config

SHAPE = [
    "model.vocab_size=4096",
    "model.n_layers=4",
    "model.d_model=192",
    "model.d_ff=512",
    "model.n_heads=6",
    "model.n_kv_heads=2",
    "model.d_head=32",
]
SHAPE += ["model.tie_embeddings=True", "pack.seq_len=256", "train.batch_size=8"]
VARIANTS = {
    "the quickstart's base": [],
    "8 layers": ["model.n_layers=8"],
    "twice as wide": [
        "model.d_model=384",
        "model.d_ff=1024",
        "model.n_heads=12",
        "model.n_kv_heads=4",
    ],
    "32 sequences": ["train.batch_size=32"],
    "32 sequences in 4 micro-batches": ["train.batch_size=32", "train.grad_accum_steps=4"],
    "32 sequences, remat full": ["train.batch_size=32", "train.remat=full"],
    "sequences of 2,048": ["pack.seq_len=2048"],
}


def main():
    print("| | planned, MiB | measured, MiB | measured / planned |")
    print("|---|---|---|---|", flush=True)
    for name in VARIANTS:
        done = subprocess.run(
            [sys.executable, __file__, "--child", name], capture_output=True, text=True
        )
        print(
            done.stdout.splitlines()[-1]
            if done.returncode == 0
            else f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} |",
            flush=True,
        )


def child(name: str):
    import jax
    import numpy as np

    from jaxpt import hardware, sharding
    from jaxpt.model import transformer
    from jaxpt.plan import compile, cost
    from jaxpt.spec import Batch
    from jaxpt.train import state, step

    settings = config.build_config(
        config.apply_overrides([f"--config.{each}" for each in (*SHAPE, *VARIANTS[name])])
    )
    spec, _ = cost.resolve_model_spec(settings)
    planned = compile.analyze_step(spec, settings, hardware.parse_target("cpu:1")).peak_bytes
    mesh = sharding.make_mesh(settings.mesh)
    abstract_batch = step.make_abstract_batch(
        settings.train.batch_size, settings.pack.seq_len, mesh
    )
    abstract_state = state.make_abstract_state(
        spec, settings.optim, mesh, settings.initialize.param_dtype
    )
    seq_len = settings.pack.seq_len
    built = step.build_step(spec, settings.train, settings.optim, seq_len, mesh)
    run = built.compile(abstract_state, abstract_batch)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, spec.vocab_size, abstract_batch.tokens.shape, np.int32)
    ones, places = (
        np.ones(tokens.shape, np.int32),
        np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
    )
    batch = jax.device_put(
        Batch(tokens, tokens, ones, places, ones.astype(np.float32)),
        sharding.make_batch_sharding(mesh),
    )
    now = jax.block_until_ready(
        state.init_state(transformer.init_params(spec, 0, mesh), spec, settings.optim, mesh)
    )
    there = sum(leaf.nbytes for leaf in jax.tree.leaves((now, batch)))
    before = resident("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    for _ in range(3):
        now, found = run(now, batch)
        jax.block_until_ready(found)
    measured = resident("VmHWM") - before + there
    print(
        f"| {name} | {planned / 2**20:,.0f} | {measured / 2**20:,.0f} | {measured / planned:.2f} |"
    )


def resident(mark: str) -> int:
    """Return bytes of this process as the kernel counts them."""
    return 1024 * int(
        re.search(
            rf"{mark}:\s+(\d+) kB",
            pathlib.Path(f"/proc/{os.getpid()}/status").read_text(encoding="utf-8"),
        )[1]
    )


if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["--child"] else main()

"""Saving and reading one checkpoint on a disk and in buckets on loopback.

    python benchmarks/save_buckets.py [--gb 2.2] [--repeats 2]

A model's float32 parameters and two moments: GB in all. Each repeat saves and restores one in every
place in turn. Prints seconds: that training waits (the copy off the devices), until the checkpoint
is published, and until it is found, verified and restored. Servers and client share the machine,
and moto is a Python program: a store of its own is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import buckets
import jax
import jax.numpy as jnp

from jaxpt import io
from jaxpt.spec import ModelSpec
from jaxpt.weights import checkpoint

SPEC = ModelSpec(n_layers=5, d_model=8, d_ff=40, n_heads=6, n_kv_heads=2, d_head=4, vocab_size=96)
N_ARRAYS = 8


def make_arrays(n_bytes: float) -> dict[str, jax.Array]:
    """Return float32 arrays of so many bytes in all, of random bits."""
    n_rows = int(n_bytes / 4 / N_ARRAYS / 1024)
    keys = jax.random.split(jax.random.key(0), N_ARRAYS)
    arrays = {f"w{i}": jax.random.normal(key, (n_rows, 1024)) for i, key in enumerate(keys)}
    return jax.block_until_ready(arrays)


def measure(run: io.Path, step: int, params: dict, moments: dict) -> list[float]:
    """Save and restore a checkpoint. Return seconds waited, to publication, and to restore."""
    checkpointer = checkpoint.Checkpointer(run, max_to_keep=1)
    began = time.monotonic()
    counts = {"n_sequences": 7}
    checkpointer.save_async(step, params, moments, SPEC, counts=counts, tokenizer=None)
    waited = time.monotonic() - began
    checkpointer.wait_until_saved()
    published = time.monotonic() - began
    began = time.monotonic()
    newest = checkpoint.find_newest(run)
    assert newest is not None
    for name, tree in ((checkpoint.PARAMS, params), (checkpoint.TRAIN_STATE, moments)):
        jax.block_until_ready(checkpoint.restore_tree(newest, name, jax.tree.map(describe, tree)))
    return [waited, published, time.monotonic() - began]


def describe(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def main() -> None:
    """Print a row per place and repeat."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.2)
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    params = make_arrays(asked.gb * 1e9 / 3)
    moments = {"mu": params, "nu": jax.tree.map(jnp.copy, params)}
    with contextlib.ExitStack() as stack:
        home = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        places: dict[str, io.Path] = {"disk": home / "run"}
        for kind in ("gs", "s3"):
            stack.enter_context(buckets.lead_to(kind))
            places[f"{kind}://"] = io.path(f"{kind}://bucket/run")
        print(f"| {asked.gb} GB | waited | published | restored |\n|---|--:|--:|--:|", flush=True)
        for step in range(asked.repeats):
            for name, run in places.items():
                cells = " | ".join(f"{each:.1f} s" for each in measure(run, step, params, moments))
                print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

"""Speed and memory of the train step on the accelerator that is here: 1B parameters, sequences of
4,096 tokens with several documents each, bf16.

    python benchmarks/train_gpu.py [--batch-size 8] [--remat minimal] [--backends auto xla]
    python benchmarks/train_gpu.py --tiny      (a small shape, to see that it works: on a CPU too)

Prints, for each attention backend in a process of its own: MFU, step seconds (median), tokens per
second, peak memory, and loss and gradient norm of the first step, which must agree between backends
to bf16's rounding. MFU counts attention over the whole sequence, as everywhere (docs/plan.md),
though documents are shorter.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BILLION = {
    "n_layers": 16,
    "d_model": 2048,
    "d_ff": 8192,
    "n_heads": 32,
    "n_kv_heads": 8,
    "d_head": 64,
    "vocab_size": 128_256,
    "tie_embeddings": True,
}
TINY = {
    "n_layers": 2,
    "d_model": 48,
    "d_ff": 96,
    "n_heads": 6,
    "n_kv_heads": 2,
    "d_head": 8,
    "vocab_size": 384,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences per step, over all devices"
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="steps measured, after two that are not"
    )
    parser.add_argument("--remat", default="minimal")
    parser.add_argument("--backends", nargs="+", default=["auto", "xla"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measure(args)
    print(
        (
            "| attention | MFU | step, s | tokens/s | peak memory, GiB | first "
            "loss | first gradient norm |\n|---|---|---|---|---|---|---|"
        ),
        flush=True,
    )
    for backend in args.backends:
        # a process of its own: a device's peak memory counts from the start of the process. All of
        # the card may be taken.
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
        failed = subprocess.run(
            [sys.executable, *sys.argv, "--child", backend], env=environment
        ).returncode
        if failed:
            print(f"| {backend} | failed, see above |", flush=True)


def measure(args):
    import jax
    import jax.numpy as jnp

    from jaxpt import config, flops, hardware, initialize, sharding
    from jaxpt.model import transformer
    from jaxpt.model.kernels import select
    from jaxpt.train import state, step
    from jaxpt.train.step import make_attention_request

    platform = jax.devices()[0].platform
    values = config.apply_overrides([])
    values["model"] |= TINY if args.tiny else BILLION
    values["pack"]["seq_len"] = 256 if args.tiny else 4096
    dtype = "float32" if platform == "cpu" else "bfloat16"
    values["train"] |= {
        "batch_size": args.batch_size,
        "attention": args.child,
        "remat": args.remat,
        "compute_dtype": dtype,
    }
    settings = config.build_config(values)
    mesh = sharding.make_mesh(settings.mesh)
    spec = initialize.make_random_spec(settings.model, settings.tokenizer.vocab_size)
    T = settings.pack.seq_len
    sharding.check_mesh_divides(mesh, spec, args.batch_size, 1, T)
    name, why = select.choose_backend(
        spec, make_attention_request(settings.train, settings.pack.seq_len), mesh
    )
    print(
        (
            f"attention: {name} ({why}); {transformer.count_params(spec):,} parameters, "
            f"{args.batch_size} sequences of {T:,}"
        ),
        file=sys.stderr,
    )

    batch = jax.device_put(
        make_packed_batch(args.batch_size, T, spec.vocab_size), sharding.make_batch_sharding(mesh)
    )
    now = state.init_state(
        transformer.init_params(spec, 0, mesh, jnp.dtype(settings.initialize.param_dtype)),
        spec,
        settings.optim,
        mesh,
    )
    run = step.build_step(spec, settings.train, settings.optim, settings.pack.seq_len, mesh)
    now, first = run(now, batch)
    now, metrics = run(now, batch)
    seconds = []
    for _ in range(args.steps):
        jax.block_until_ready(metrics)
        start = time.perf_counter()
        now, metrics = run(now, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    took = statistics.median(seconds)
    tokens_per_second = args.batch_size * T / took
    peak = hardware.get_peak_flops(jax.devices()[0].device_kind, dtype)
    mfu = "unknown"
    if peak:
        model_flops = tokens_per_second * flops.count_flops_per_token(spec, T)
        mfu = f"{model_flops / peak / jax.device_count():.1%}"
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    memory = f"{used / 2**30:.1f}" if used else "unknown"
    print(
        f"| {name} | {mfu} | {took:.3f} | {tokens_per_second:,.0f} | {memory} "
        f"| {first['loss']:.5f} | {first['grad_norm']:.4f} |"
    )


def make_packed_batch(batch_size: int, T: int, vocab_size: int):
    """Return a Batch of random tokens in documents of T/64 to T/2 tokens.

    A sequence ends in up to T/64 of padding.
    """
    import numpy as np

    from jaxpt.spec import Batch

    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocab_size, (batch_size, T)).astype(np.int32)
    segments, positions = np.zeros((batch_size, T), np.int32), np.zeros((batch_size, T), np.int32)
    for row in range(batch_size):
        at, document, full = 0, 0, T - rng.integers(0, T // 64)
        while at < full:
            length, document = min(rng.integers(T // 64, T // 2), full - at), document + 1
            segments[row, at : at + length], positions[row, at : at + length] = (
                document,
                np.arange(length),
            )
            at += length
    same = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
    return Batch(
        tokens,
        np.roll(tokens, -1, 1),
        segments,
        positions,
        (same & (segments > 0)).astype(np.float32),
    )


if __name__ == "__main__":
    main()

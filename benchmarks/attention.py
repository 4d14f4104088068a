"""Attention and the train step on a CPU by the lengths of documents, beside another commit.

    git worktree add BEFORE COMMIT
    python benchmarks/attention.py --beside BEFORE [--rounds 3] [--parts attention step]

Attention alone is forward and backward of 16,384 tokens with 8 heads of 64 and 4 kv heads, float32;
the step is that of 4 layers x 256. Each round starts a process per tree, in turn; a case is the
median of its calls. Prints, as a Markdown table, tokens per second of both and the median, least
and greatest ratio over the rounds, and the same ratio of processor time, which other processes on
the machine disturb less.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

SCRIPT = pathlib.Path(__file__).resolve()
ROOT = SCRIPT.parent.parent
N_TOKENS = 16_384
PARTS = ("attention", "step")
# sequence length, document length, window
CASES = [
    (512, 170, None),
    (512, 512, None),
    (4096, 256, None),
    (4096, 4096, None),
    (8192, 256, None),
    (8192, 1024, None),
    (8192, 8192, None),
    (8192, 8192, 256),
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=pathlib.Path, required=True, help="another clone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3, help="per case and process")
    parser.add_argument("--tokens", type=int, default=N_TOKENS)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[512, 4096, 8192])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return measure(args)
    trees = {"before": args.beside, "here": ROOT}
    found = {name: [] for name in trees}
    for _ in range(args.rounds):
        for name in found:
            found[name].append(run_child(trees[name].resolve()))
    print("| case | before, tokens/s | here | here / before | by processor time |")
    print("|---|---|---|---|---|")
    for case in found["here"][0]:
        speeds = {name: [run[case] for run in runs] for name, runs in found.items()}
        cells = [f"{statistics.median(s for s, _ in each):,.0f}" for each in speeds.values()]
        pairs = list(zip(speeds["here"], speeds["before"], strict=True))
        for i in range(2):
            ratios = [here[i] / before[i] for here, before in pairs]
            cells.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        print(f"| {case} |", " | ".join(cells), "|", flush=True)


def run_child(tree):
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, str(SCRIPT), *sys.argv[1:], "--child"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tree)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(args):
    found = {}
    for T, length, window in CASES:
        if T not in args.seq_lens:
            continue
        n = max(1, args.tokens // T)
        seen = f", window {window}" if window else ""
        name = f"{T:,} a sequence, documents of {length:,}{seen}"
        if "attention" in args.parts:
            found[f"attention: {name}"] = time_calls(
                make_attention(n, T, length, window), args.calls, n * T
            )
        if "step" in args.parts and T in (512, 8192) and not window:
            found[f"step: {name}"] = time_calls(make_step(1, T, length), args.calls, T)
    print(json.dumps(found))


def time_calls(call, n_calls, n_tokens):
    """Return tokens per second of time and of processor time, medians."""
    import jax

    jax.block_until_ready(call())
    seconds, processor = [], []
    for _ in range(n_calls):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return n_tokens / statistics.median(seconds), n_tokens / statistics.median(processor)


def make_segments(n, T, length):
    import numpy as np

    return np.broadcast_to(np.arange(T) // length + 1, (n, T)).astype(np.int32)


def make_attention(n, T, length, window):
    """Return a call that runs attention forward and backward."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpt.model.kernels.select import attend

    rng = np.random.default_rng(0)
    q, k, v, d_out = (
        jnp.asarray(rng.normal(size=(n, T, heads, 64)), jnp.float32) for heads in (8, 4, 4, 8)
    )
    segments = jnp.asarray(make_segments(n, T, length))

    @jax.jit
    def run(q, k, v, d_out):
        out, pullback = jax.vjp(lambda *qkv: attend(*qkv, segments, window), q, k, v)
        return out, pullback(d_out)

    return lambda: run(q, k, v, d_out)


def make_step(n, T, length):
    """Return a call that trains a small model by one step."""
    import jax
    import numpy as np

    from jaxpt import config, initialize, sharding
    from jaxpt.model import transformer
    from jaxpt.spec import Batch
    from jaxpt.train import state, step

    values = config.apply_overrides([])
    shape = {"n_layers": 4, "d_model": 256, "d_ff": 768, "n_heads": 4, "n_kv_heads": 2}
    values["model"] |= {**shape, "d_head": 64, "vocab_size": 2048}
    values["pack"]["seq_len"] = T
    values["train"] |= {"batch_size": n, "compute_dtype": "float32", "remat": "none"}
    settings = config.build_config(values)
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    spec = initialize.make_random_spec(settings.model, 2048)
    tokens = np.random.default_rng(0).integers(0, 2048, (n, T)).astype(np.int32)
    segments = make_segments(n, T, length)
    positions = (np.arange(T) % length + 0 * segments).astype(np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), segments, positions, np.ones((n, T), np.float32))
    batch = jax.device_put(batch, sharding.make_batch_sharding(mesh))
    params = transformer.init_params(spec, 0, mesh)
    now = [state.init_state(params, spec, settings.optim, mesh)]
    run = step.build_step(spec, settings.train, settings.optim, T, mesh)

    def call():
        now[0], metrics = run(now[0], batch)
        return metrics

    return call


if __name__ == "__main__":
    main()

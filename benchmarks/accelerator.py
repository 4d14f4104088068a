"""Measure jaxpt on an accelerator, in under 45 minutes: one command, one table.

    python benchmarks/accelerator.py --out RESULTS                   # every part
    python benchmarks/accelerator.py --out RESULTS --parts train-auto decode
    python benchmarks/accelerator.py --out RESULTS --tiny            # a small model, on a CPU too

Every part is a process of its own of at most 8 minutes. Its result is written to RESULTS/PART.json
as it ends and RESULTS/table.md anew after each, so what a lost machine has measured is kept. A part
that fails or lacks a package has a line that says so, and the others run. Parts that do not fit
into 45 minutes are named and left out.

The model has 1.2B parameters, sequences of 4,096 tokens with several documents each, bfloat16. MFU
counts each sequence as one document, as everywhere (docs/plan.md). benchmarks/accelerator.md lists
the packages.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

SCRIPT = pathlib.Path(__file__).resolve()
ROOT = SCRIPT.parent.parent
sys.path.insert(0, str(ROOT))

PART_SECONDS = 480
ALL_SECONDS = 45 * 60
# L, D, F, N, K, H, V, T, B
BILLION = (16, 2048, 8192, 32, 8, 64, 128_256, 4096, 8)
TINY = (2, 48, 96, 6, 2, 8, 384, 256, 2)
RECIPE = """
from jaxpt.config import defaults
def get_config():
    c = defaults()
    c.prepare.sources, c.prepare.max_mb = ("python:prose",), 1.0
    c.tokenizer.vocab_size, c.pack.seq_len = 1000, 128
    c.model.n_layers, c.model.d_model, c.model.d_ff = 2, 64, 128
    c.model.n_heads, c.model.n_kv_heads, c.model.d_head = 4, 2, 16
    c.model.max_seq_len, c.train.batch_size, c.train.eval_sequences = 128, 8, 8
    c.train.log_every, c.train.checkpoint_every = 1, 4
    c.train.eval_every, c.train.steps = 0, 200
    return c
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of the results")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it works")
    parser.add_argument("--steps", type=int, default=10, help="measured, after two that are not")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        return measure(args)
    start = time.monotonic()
    results = {}
    for part in args.parts:
        left = ALL_SECONDS - (time.monotonic() - start)
        if left < PART_SECONDS:
            results[part] = {"skipped": f"{left:.0f} s of 45 minutes were left"}
        else:
            results[part] = run_part(part, args)
        (args.out / f"{part}.json").write_text(json.dumps(results[part], indent=1) + "\n")
        print(format_table({part: results[part]}).splitlines()[-1], flush=True)
        files = {part: args.out / f"{part}.json" for part in PARTS}  # of earlier starts too
        kept = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
        (args.out / "table.md").write_text(format_table(kept))
    return any("failed" in result for result in results.values())


def run_part(part, args):
    """Return the result of a part from its own process."""
    missing = [name for name in PARTS[part].packages if not importlib.util.find_spec(name)]
    if missing:
        return {"skipped": f"{' and '.join(missing)} not installed"}
    command = [sys.executable, str(SCRIPT), "--child", "--parts", part, "--out", str(args.out)]
    command += ["--steps", str(args.steps), *["--tiny"] * args.tiny]
    start = time.monotonic()
    with open(args.out / f"{part}.log", "w", encoding="utf-8") as log:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            text, _ = child.communicate(timeout=PART_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return {"failed": f"after {PART_SECONDS} s it was stopped"}
    if child.returncode:
        lines = (args.out / f"{part}.log").read_text().strip().splitlines() or ["no message"]
        return {"failed": f"status {child.returncode}: {lines[-1][:200]}"}
    return json.loads(text.splitlines()[-1]) | {"seconds": round(time.monotonic() - start, 1)}


def format_table(results):
    lines = ["| part | result |", "|---|---|"]
    for part, result in results.items():
        cells = [
            f"{name.replace('_', ' ')} {format_value(value)}" for name, value in result.items()
        ]
        lines.append(f"| {part} | {'; '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_value(value):
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_value(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value).replace("|", "/")


def measure(args):
    """Run one part in this process; its last line on stdout is the result."""
    from jaxpt import xla_settings

    (part,) = args.parts
    xla_settings.set_variables()  # as jaxpt train does, before jax is imported
    print(json.dumps(PARTS[part].run(args)))


# ---- parts


def measure_device(args):
    """What `jaxpt doctor` measures."""
    from jaxpt import doctor, xla_settings

    report = doctor.examine_machine(None)
    variables = xla_settings.list_variables(os.environ)
    return {
        "device": report.device_kind,
        "devices": report.n_devices,
        "matmul FLOP/s": report.matmul_flops,
        "of peak": {
            dtype: round(report.matmul_flops[dtype] / peak, 3)
            for dtype, peak in report.peak_flops.items()
        },
        "memory bytes/s": report.memory_bytes,
        "link bytes/s": report.link_bytes,
        "versions": report.versions,
        "environment": xla_settings.format_variables(variables),
    }


def measure_attention(backend, args):
    """Forward and backward of one layer, documents of T/16 and of T; by the formula's FLOPs."""
    import jax
    import jax.numpy as jnp

    from jaxpt.model.kernels.select import KNOB, attend

    device = jax.devices()[0]
    if backend not in (KNOB.plain, KNOB.by_platform.get(device.platform)):
        return {"skipped": f"this is {device.device_kind}"}
    *_, N, K, H, _, T, B = shape_of(args)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (
        jax.random.normal(key, (B, T, n, H), dtype_of())
        for key, n in zip(keys, (N, K, K, N), strict=True)
    )
    found = {}
    for length in (T // 16, T):
        ids = jnp.broadcast_to(jnp.arange(T) // length + 1, (B, T)).astype(jnp.int32)

        @jax.jit
        def run(q, k, v, d_out, ids=ids):
            out, pullback = jax.vjp(lambda *x: attend(*x, ids, None, backend), q, k, v)
            return out, pullback(d_out)

        seconds = time_calls(lambda run=run: run(q, k, v, d_out), args.steps, jax.block_until_ready)
        found[f"ms, documents of {length}"] = 1e3 * seconds
        found[f"TFLOP/s, documents of {length}"] = 7 * B * N * H * T * length / seconds / 1e12
    return found


def measure_torch_attention(args):
    """torch's scaled_dot_product_attention, causal: whole sequences only."""
    import torch

    *_, N, K, H, _, T, B = shape_of(args)
    device, dtype = torch_device()
    q, k, v = (
        torch.randn(B, n, T, H, device=device, dtype=dtype, requires_grad=True) for n in (N, K, K)
    )
    d_out = torch.randn(B, N, T, H, device=device, dtype=dtype)

    def run():
        attend = torch.nn.functional.scaled_dot_product_attention
        attend(q, k, v, is_causal=True, enable_gqa=True).backward(d_out)

    seconds = time_calls(run, args.steps, torch_wait)
    flops = 7 * B * N * H * T * T
    return {
        f"ms, documents of {T}": 1e3 * seconds,
        f"TFLOP/s, documents of {T}": flops / seconds / 1e12,
    }


def measure_train(backend, args, profile=False, matmul_dtype="compute"):
    """The train step: speed, and memory beside what its compiler expects, as `jaxpt plan` does."""
    import jax

    from jaxpt import flops, hardware
    from jaxpt.model.kernels import select
    from jaxpt.plan import compile as plan
    from jaxpt.train import step

    settings, spec, mesh, now, batch = make_run(args, backend, matmul_dtype)
    T, B = settings.pack.seq_len, settings.train.batch_size
    name, why = select.choose_backend(spec, step.make_attention_request(settings.train, T), mesh)
    if backend not in ("auto", name):
        raise SystemExit(f"{backend}: {why}")
    lowered = plan.trace_step(spec, settings, mesh).lower()
    compiled = lowered.compile()
    planned = plan.read_peak_bytes(compiled, jax.devices()[0].platform)
    now, first = compiled(now, batch)
    held = [now]

    def run():
        held[0], metrics = compiled(held[0], batch)
        return metrics

    seconds = time_calls(run, args.steps, jax.block_until_ready)
    if profile:
        with jax.profiler.trace(str(args.out / "profile")):
            for _ in range(3):
                jax.block_until_ready(run())
    speed = B * T / seconds
    peak = hardware.get_peak_flops(jax.devices()[0].device_kind, settings.train.compute_dtype)
    cost = flops.DeviceCost(flops.count_flops_per_token(spec, T), peak)
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "attention": f"{name} ({why})",
        "matmuls": matmul_dtype,
        "tokens/s per device": speed / jax.device_count(),
        "devices": jax.device_count(),
        "MFU": cost.compute_mfu(speed * cost.flops_per_token, jax.device_count()),
        "step s": seconds,
        "peak GiB": used and used / 2**30,
        "compiler's GiB": planned / 2**30,
        "first loss": float(first["loss"]),
        "first gradient norm": float(first["grad_norm"]),
    }


def measure_torch_train(args):
    """transformers' Llama of the same shape: FSDP2, torch.compile, sdpa, fused AdamW.

    Its sequences are one document each and it recomputes nothing, unlike jaxpt's.
    """
    import torch
    import transformers
    from torch.distributed.fsdp import fully_shard

    L, D, F, N, K, H, V, T, B = shape_of(args)
    device, dtype = torch_device()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=0, world_size=1)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=F,
            num_hidden_layers=L,
            num_attention_heads=N,
            num_key_value_heads=K,
            head_dim=H,
            max_position_embeddings=T,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    model.to(device).train()
    if device == "cuda":
        policy = torch.distributed.fsdp.MixedPrecisionPolicy(dtype, torch.float32)
        for layer in model.model.layers:
            layer.compile()
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    else:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, V, (B, T), device=device)

    def run():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = time_calls(run, args.steps, torch_wait)
    torch.distributed.destroy_process_group()
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {
        "tokens/s per device": B * T / seconds,
        "devices": 1,
        "documents": "whole sequences",
        "recomputed": "nothing",
        "step s": seconds,
        "peak GiB": memory,
    }


def measure_decode(args):
    """Greedy continuation of 8 prompts of 128 tokens."""
    import numpy as np

    from jaxpt.model import decode

    _, spec, _, state, _ = make_run(args, "xla")
    n_new = 8 if args.tiny else 256
    spec = spec.replace(eos_ids=())
    prompts = np.random.default_rng(0).integers(1, spec.vocab_size, (8, 128)).tolist()
    generate = functools.partial(
        decode.generate, spec, state.params, prompts, max_new=n_new, dtype=dtype_of()
    )
    seconds = time_calls(generate, 1 if args.tiny else 3, lambda _: None)
    return {"tokens/s": 8 * n_new / seconds, "ms per token of all 8": 1e3 * seconds / n_new}


def measure_evaluate(args):
    """Log-likelihoods of 64 texts of a quarter of a sequence."""
    import numpy as np

    from jaxpt.evaluate import likelihood

    settings, spec, _, state, _ = make_run(args, "xla")
    length = settings.pack.seq_len // 4
    texts = np.random.default_rng(0).integers(1, spec.vocab_size, (64, length)).tolist()
    pairs = [(text[: length // 2], text[length // 2 :]) for text in texts]

    def score():
        compute = likelihood.compute_token_log_likelihoods
        return list(compute(spec, state.params, pairs, dtype=dtype_of()))

    seconds = time_calls(score, 1 if args.tiny else 3, lambda _: None)
    return {"tokens/s": 64 * length / seconds}


def measure_resume(args):
    """A run that is killed and resumed ends with the losses of one that was left alone."""
    home = args.out / "resume"
    shutil.rmtree(home, ignore_errors=True)  # a finished run does nothing when started again
    home.mkdir()
    (home / "recipe.py").write_text(RECIPE)
    jaxpt = [sys.executable, "-m", "jaxpt"]
    flags = ["--config", "recipe.py", "--workdir"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = functools.partial(
        subprocess.run, cwd=home, env=environment, check=True, stdout=sys.stderr
    )
    for name in ("prepare", "train_tokenizer", "pack"):
        start([*jaxpt, name, *flags, "data"])
    data = '--config.mixture.packed_paths=("data/packed",)'
    start([*jaxpt, "train", *flags, "alone", data])
    killed = subprocess.Popen(
        [*jaxpt, "train", *flags, "killed", data], cwd=home, env=environment, stdout=sys.stderr
    )
    while killed.poll() is None and len(read_losses(home / "killed")) < 10:
        time.sleep(0.005)
    killed.kill()
    if killed.wait() != -signal.SIGKILL:
        raise SystemExit(f"the run ended before it was killed, with status {killed.returncode}")
    before = len(read_losses(home / "killed"))
    begin = time.monotonic()
    start([*jaxpt, "train", *flags, "killed", data])
    alone, resumed = (read_losses(home / name) for name in ("alone", "killed"))
    if alone != resumed:
        raise SystemExit("the resumed run has other losses")
    return {
        "killed after step": before,
        "losses equal": len(alone),
        "resume and rest s": time.monotonic() - begin,
    }


def read_losses(run_dir):
    """Return step -> loss of a run; the newest where a step was repeated."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


# ---- shared


def shape_of(args):
    return TINY if args.tiny else BILLION


def dtype_of():
    import jax

    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def time_calls(call, n_calls, wait):
    """Return the median seconds of a call, after two that are not counted."""
    seconds = []
    for _ in range(n_calls + 2):
        start = time.perf_counter()
        wait(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def torch_device():
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    return "cpu", torch.float32


def torch_wait(_):
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_run(args, backend, matmul_dtype="compute"):
    """Return settings, architecture, mesh, initial state and a batch."""
    import jax
    import jax.numpy as jnp

    from jaxpt import config, initialize, sharding
    from jaxpt.model import transformer
    from jaxpt.train import state

    L, D, F, N, K, H, V, T, B = shape_of(args)
    values = config.apply_overrides([])
    values["model"] |= {"n_layers": L, "d_model": D, "d_ff": F, "n_heads": N, "n_kv_heads": K}
    values["model"] |= {"d_head": H, "vocab_size": V, "tie_embeddings": True, "max_seq_len": T}
    values["pack"]["seq_len"] = T
    values["train"] |= {"batch_size": B * jax.device_count(), "attention": backend}
    values["train"] |= {"remat": "minimal", "compute_dtype": dtype_of()}
    values["train"]["matmul_dtype"] = matmul_dtype
    settings = config.build_config(values)
    mesh = sharding.make_mesh(settings.mesh)
    spec = initialize.make_random_spec(settings.model, V)
    params = transformer.init_params(spec, 0, mesh, jnp.dtype(settings.initialize.param_dtype))
    batch = make_packed_batch(settings.train.batch_size, T, V)
    batch = jax.device_put(batch, sharding.make_batch_sharding(mesh))
    return settings, spec, mesh, state.init_state(params, spec, settings.optim, mesh), batch


def make_packed_batch(batch_size, T, vocab_size):
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
            segments[row, at : at + length] = document
            positions[row, at : at + length] = np.arange(length)
            at += length
    same = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
    mask = (same & (segments > 0)).astype(np.float32)
    return Batch(tokens, np.roll(tokens, -1, 1), segments, positions, mask)


class Part:
    """A measurement, and the packages without which it is skipped."""

    def __init__(self, run, *packages):
        self.run, self.packages = run, packages


DATA = ("grain", "pyarrow")
PARTS = {
    "device": Part(measure_device),
    "train-auto": Part(functools.partial(measure_train, "auto", profile=True), *DATA),
    "train-xla": Part(functools.partial(measure_train, "xla"), *DATA),
    "train-float8": Part(functools.partial(measure_train, "auto", matmul_dtype="float8"), *DATA),
    "train-torch": Part(measure_torch_train, "torch", "transformers"),
    "attention-xla": Part(functools.partial(measure_attention, "xla")),
    "attention-cudnn": Part(functools.partial(measure_attention, "cudnn"), "jax_cuda13_plugin"),
    "attention-splash": Part(functools.partial(measure_attention, "splash"), "libtpu"),
    "attention-torch": Part(measure_torch_attention, "torch"),
    "decode": Part(measure_decode),
    "evaluate": Part(measure_evaluate),
    "resume": Part(measure_resume, *DATA, "sentencepiece", "tokenizers"),
}


if __name__ == "__main__":
    sys.exit(main())

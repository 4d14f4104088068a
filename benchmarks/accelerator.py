"""Measure jaxpt on an accelerator, in under 45 minutes: one command, its tables.

    python benchmarks/accelerator.py --out RESULTS                   # every part
    python benchmarks/accelerator.py --out RESULTS --parts train-auto decode
    python benchmarks/accelerator.py --out RESULTS --tiny            # a small model, on a CPU too

Every part is a process of its own of under 8 minutes. Its result is written to RESULTS/PART.json as
it ends and RESULTS/table.md anew after each, so what a lost machine has measured is kept; a second
start replaces a result by a new one, never by a failure. A part that fails, or lacks a package or
the device that it is for, has a line that says so, and the others run. Parts that do not fit into
45 minutes are named and left out.

The model has 1.2B parameters, sequences of 4,096 tokens with several documents each, bfloat16. MFU
counts each sequence as one document, as everywhere (docs/plan.md), and beside it attention within
documents alone. benchmarks/accelerator.md lists the packages.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import math
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

PART_SECONDS = 470
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # which ends the part too
    start = time.monotonic()
    has_failed = False
    for part in args.parts:
        left = ALL_SECONDS - (time.monotonic() - start)
        if left < PART_SECONDS:
            result = {"skipped": f"{left:.0f} s of 45 minutes were left"}
        else:
            result = run_part(part, args)
        has_failed |= "failed" in result
        print(f"{part}: {format_cells(result)}", flush=True)
        keep_result(args.out / f"{part}.json", result)
        (args.out / "table.md").write_text(format_tables(read_results(args.out)), encoding="utf-8")
    return has_failed


def run_part(part, args):
    """Return the result of a part from its own process, which writes it into a file."""
    missing = [name for name in PARTS[part].packages if not importlib.util.find_spec(name)]
    if missing:
        return {"skipped": f"{' and '.join(missing)} not installed"}
    command = [sys.executable, str(SCRIPT), "--child", "--parts", part, "--out", str(args.out)]
    command += ["--steps", str(args.steps), *["--tiny"] * args.tiny]
    found, log_path = args.out / f"{part}.new", args.out / f"{part}.log"
    found.unlink(missing_ok=True)
    start = time.monotonic()
    with open(log_path, "wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            status = child.wait(PART_SECONDS)
        except subprocess.TimeoutExpired:
            return {"failed": f"after {PART_SECONDS} s it was stopped"}
        finally:  # nothing holds the device for the next part
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if status or not found.exists():
        lines = log_path.read_text(errors="replace").strip().splitlines() or ["no message"]
        return {"failed": f"status {status}: {lines[-1][:200]}"}
    result = json.loads(found.read_text())
    found.unlink()
    return result if "skipped" in result else result | describe_measurement(args, start)


def describe_measurement(args, start):
    """Return what a measured result is of."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "size": "tiny" if args.tiny else "1.2B",
    }


def keep_result(path, result):
    """Write a result, unless it is none and an older one is there."""
    if "seconds" not in result and path.exists():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_results(directory):
    """Return part -> result, of earlier starts too."""
    files = {part: directory / f"{part}.json" for part in PARTS}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}


COLUMNS = ("tokens/s per device", "MFU", "MFU of documents", "step s", "peak GiB", "compiler's GiB")


def format_tables(results):
    """Return a table of the train steps, and one of what else was measured."""
    trains = {part: result for part, result in results.items() if COLUMNS[0] in result}
    lines = []
    if trains:
        lines.append(f"| train step | {' | '.join(COLUMNS)} | with | measured |")
        lines.append("|---|" + "---|" * (len(COLUMNS) + 2))
    for part, result in trains.items():
        cells = [format_value(result[name]) if name in result else "" for name in COLUMNS]
        rest = {name: value for name, value in result.items() if name not in COLUMNS}
        cells += [format_cells(rest), format_origin(result)]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    others = {part: result for part, result in results.items() if part not in trains}
    if others:
        lines += ["", "| part | result | measured |", "|---|---|---|"]
    for part, result in others.items():
        lines.append(f"| {part} | {format_cells(result)} | {format_origin(result)} |")
    return "\n".join(lines).lstrip("\n") + "\n"


ORIGIN = ("date", "commit", "size", "device", "seconds")


def format_cells(result):
    """Return a result in one line."""
    cells = [
        f"{name.replace('_', ' ')} {format_value(value)}"
        for name, value in result.items()
        if name not in ORIGIN
    ]
    return "; ".join(cells)


def format_origin(result):
    """Return when, at which commit, at which size and on what a result was measured."""
    return ", ".join(format_value(result[name]) for name in ORIGIN[:4] if name in result)


def format_value(value):
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_value(each)}" for name, each in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value).replace("|", "/")


def measure(args):
    """Run one part in this process, and write its result."""
    from jaxpt import xla_settings
    from jaxpt.spec import UserError

    (name,) = args.parts
    part = PARTS[name]
    xla_settings.set_variables()  # as jaxpt train does, before jax is imported
    try:
        device = DEVICES[part.on]()
        is_at_hand = args.tiny or "cpu" not in device.lower()
        result = part.run(args) if is_at_hand else {"skipped": f"{part.on} sees no accelerator"}
    except UserError as error:  # this chip has no such units
        result = {"skipped": str(error)}
    if "skipped" not in result and device:
        result["device"] = device
    (args.out / f"{name}.new").write_text(json.dumps(result), encoding="utf-8")


def name_jax_device():
    import jax

    device = jax.devices()[0]
    return device.device_kind if device.platform != "cpu" else "CPU"


def name_torch_device():
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


DEVICES = {"JAX": name_jax_device, "torch": name_torch_device, "its own process": lambda: ""}


# ---- parts


def measure_device(args):
    """What `jaxpt doctor` measures."""
    from jaxpt import doctor, xla_settings

    report = doctor.examine_machine(None)
    variables = xla_settings.list_variables(os.environ)
    return {
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
        return {"skipped": f"{backend} is not for {device.device_kind}"}
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
    """torch's scaled_dot_product_attention by FlashAttention, causal: whole sequences only."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    *_, N, K, H, _, T, B = shape_of(args)
    device, dtype = torch_device()
    q, k, v = (
        torch.randn(B, n, T, H, device=device, dtype=dtype, requires_grad=True) for n in (N, K, K)
    )
    d_out = torch.randn(B, N, T, H, device=device, dtype=dtype)

    def run():
        attend = torch.nn.functional.scaled_dot_product_attention
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error if it does not support this
            out = attend(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, (q, k, v), d_out)

    seconds = time_calls(run, args.steps, torch_wait)
    flops = 7 * B * N * H * T * T
    return {
        f"ms, documents of {T}": 1e3 * seconds,
        f"TFLOP/s, documents of {T}": flops / seconds / 1e12,
    }


def measure_train(args, *overrides, is_whole=False):
    """The train step: speed, and memory beside what its compiler expects.

    Args:
        args: of the command.
        overrides: of the recipe, such as "train.remat=dots".
        is_whole: a sequence is one document, as torch's are.
    """
    import jax

    from jaxpt import flops, hardware
    from jaxpt.plan import compile as plan

    run, settings, spec, chosen = make_train_call(args, overrides, is_whole)
    planned = plan.read_peak_bytes(run.compiled.program, jax.devices()[0].platform)
    first = run()
    seconds = time_calls(run, args.steps, jax.block_until_ready)
    T, B = settings.pack.seq_len, settings.train.batch_size
    speed = B * T / seconds
    peak = hardware.get_peak_flops(jax.devices()[0].device_kind, settings.train.compute_dtype)
    cost = flops.DeviceCost(flops.count_flops_per_token(spec, T), peak)
    met = measure_mean_document(run.batch.segment_ids)
    of_documents = flops.DeviceCost(flops.count_flops_per_token(spec, met), peak)
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "tokens/s per device": speed / jax.device_count(),
        "MFU": cost.compute_mfu(speed * cost.flops_per_token, jax.device_count()),
        "MFU of documents": of_documents.compute_mfu(
            speed * of_documents.flops_per_token, jax.device_count()
        ),
        "step s": seconds,
        "peak GiB": used and used / 2**30,
        "compiler's GiB": planned / 2**30,
        "devices": jax.device_count(),
        "attention": " - ".join(chosen),
        "settings": ", ".join(overrides) or "default",
        "compute dtype": settings.train.compute_dtype,
        "documents": "whole sequences" if is_whole else "several per sequence",
        "first loss": float(first["loss"]),
        "first gradient norm": float(first["grad_norm"]),
    }


def measure_mean_document(segment_ids):
    """Return the mean over tokens of the length of their document, in tokens."""
    import numpy as np

    total = 0
    for ids in np.asarray(segment_ids):
        total += int((np.bincount(ids) ** 2).sum())  # ids of a sequence: 0 is its padding
    return round(total / segment_ids.size)


class TrainCall:
    """A step of a run, on one batch."""

    def __init__(self, compiled, state, batch):
        self.compiled, self.state, self.batch = compiled, state, batch

    def __call__(self):
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics


def make_train_call(args, overrides, is_whole=False):
    """Return a compiled step to call, its settings and architecture, and (attention, why)."""
    from jaxpt.model.kernels import select
    from jaxpt.train import step

    settings, spec, mesh, now, batch = make_run(args, overrides, is_whole)
    train, seq_len = settings.train, settings.pack.seq_len
    chosen = select.choose_backend(spec, step.make_attention_request(train, seq_len), mesh)
    built = step.build_step(spec, train, settings.optim, seq_len, mesh)
    return TrainCall(built.compile(now, batch), now, batch), settings, spec, chosen


def measure_profile(args):
    """A profile of three steps, in RESULTS/profile, for xprof or TensorBoard."""
    import jax

    run, *_ = make_train_call(args, ())
    jax.block_until_ready(run())
    with jax.profiler.trace(str(args.out / "profile")):
        for _ in range(3):
            jax.block_until_ready(run())
    return {"profile": str(args.out / "profile")}


def measure_plan(args):
    """What `jaxpt plan` expects of the step of `train-auto`, beside what that measured."""
    from jaxpt import hardware

    results = read_results(args.out)
    measured = results.get("train-auto", {})
    if COLUMNS[0] not in measured:
        return {"skipped": "train-auto has no result to compare with"}
    if args.tiny:
        target = f"cpu:{measured['devices']}"
    else:
        chip = hardware.find_chip(measured["device"])
        target = chip and name_target(chip, measured["devices"])
        if target is None:
            found = f"{measured['devices']} x {measured['device']}"
            return {"skipped": f"the planner does not know {found}"}
    home = args.out / "plan"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    (home / "recipe.py").write_text("from jaxpt.config import defaults as get_config\n")
    overrides = list_overrides(args, measured["devices"], measured["compute dtype"])
    command = [sys.executable, "-m", "jaxpt", "plan", "--config", str(home / "recipe.py")]
    command += ["--on", target, "--json", str(home / "plan.json")]
    command += [f"--config.{each}" for each in overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True)
    (planned,) = json.loads((home / "plan.json").read_text())["targets"]
    steps = [planned[name]["step_seconds"] for name in ("fast", "slow")]
    peak = planned["peak_bytes"] / 2**30
    return {
        "planned by": f"{planned['method']} for {target}",
        "planned step s": " to ".join(f"{seconds:.3g}" for seconds in steps),
        "step, measured / planned": measured["step s"] / planned["expected"]["step_seconds"],
        "planned peak GiB": peak,
        "peak, measured / planned": measured["peak GiB"] and measured["peak GiB"] / peak,
    }


def name_target(chip, n_devices):
    """Return --on of so many devices of a chip; None: no slice of them is offered."""
    from jaxpt import hardware

    if chip.platform != "tpu":
        return f"{chip.name}:{n_devices}"
    n_chips = n_devices // chip.devices_per_chip
    sizes = [size for size in hardware.list_slices(chip) if math.prod(size) == n_chips]
    return f"{chip.name}:{hardware.format_topology(sizes[0])}" if sizes else None


def measure_torch_train(args):
    """transformers' Llama of the same shape: FSDP2, torch.compile, sdpa, fused AdamW.

    Its sequences are one document each, as those of `train-whole`, and it recomputes nothing. The
    batch is halved until it fits.
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

    @torch.compile
    def compute_loss(logits, labels):  # compiled, it makes no float32 logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def run():
        logits = model(input_ids=tokens[:, :-1]).logits
        compute_loss(logits, tokens[:, 1:]).backward()
        del logits
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    while True:
        tokens = torch.randint(0, V, (B, T + 1), device=device)
        try:
            seconds = time_calls(run, args.steps, torch_wait)
            break
        except torch.OutOfMemoryError:
            if B == 1:
                raise
            B //= 2
        optimizer.zero_grad()
        torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {
        "tokens/s per device": B * T / seconds,
        "step s": seconds,
        "peak GiB": memory,
        "devices": 1,
        "sequences per device": B,
        "documents": "whole sequences",
        "recomputed": "nothing",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def measure_decode(args):
    """Greedy continuation of 8 prompts of 128 tokens."""
    import numpy as np

    from jaxpt.model import decode

    _, spec, _, state, _ = make_run(args, ())
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

    settings, spec, _, state, _ = make_run(args, ())
    length = settings.pack.seq_len // 4
    texts = np.random.default_rng(0).integers(1, spec.vocab_size, (64, length)).tolist()
    pairs = [(text[: length // 2], text[length // 2 :]) for text in texts]

    def score():
        compute = likelihood.compute_token_log_likelihoods
        return list(compute(spec, state.params, pairs, dtype=dtype_of()))

    seconds = time_calls(score, 1 if args.tiny else 3, lambda _: None)
    return {"tokens/s": 64 * length / seconds}


def measure_resume(args):
    """The losses of a run that is killed and resumed, beside one that was left alone.

    They are equal where the device sums in the same order each time, as a CPU does.
    """
    home = args.out / "resume"
    shutil.rmtree(home, ignore_errors=True)  # a finished run does nothing when started again
    home.mkdir()
    (home / "recipe.py").write_text(RECIPE)
    jaxpt = [sys.executable, "-m", "jaxpt"]
    flags = ["--config", "recipe.py", "--workdir"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = functools.partial(subprocess.run, cwd=home, env=environment, check=True)
    for name in ("prepare", "train_tokenizer", "pack"):
        start([*jaxpt, name, *flags, "data"])
    data = ['--config.mixture.packed_paths=("data/packed",)']
    if not args.tiny:
        data.append("--config.train.compute_dtype=bfloat16")
    start([*jaxpt, "train", *flags, "alone", *data])
    killed = subprocess.Popen([*jaxpt, "train", *flags, "killed", *data], cwd=home, env=environment)
    while killed.poll() is None and len(read_losses(home / "killed")) < 10:
        time.sleep(0.005)
    killed.kill()
    if killed.wait() != -signal.SIGKILL:
        raise SystemExit(f"the run ended before it was killed, with status {killed.returncode}")
    before = len(read_losses(home / "killed"))
    begin = time.monotonic()
    start([*jaxpt, "train", *flags, "killed", *data])
    alone, resumed = (read_losses(home / name) for name in ("alone", "killed"))
    if alone.keys() != resumed.keys():
        raise SystemExit("the resumed run has other steps")
    differences = [abs(alone[step] - resumed[step]) for step in alone]
    first = (home / "alone" / "starts.jsonl").read_text().splitlines()[0]
    return {
        "killed after step": before,
        "steps": len(alone),
        "equal losses": differences.count(0.0),
        "largest difference, nats": max(differences),
        "resume and rest s": time.monotonic() - begin,
        "device": json.loads(first)["device_kind"],
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


def list_overrides(args, n_devices, dtype):
    """Return the recipe of the train parts, as what is overridden in the default one."""
    L, D, F, N, K, H, V, T, B = shape_of(args)
    return [
        f"model.n_layers={L}",
        f"model.d_model={D}",
        f"model.d_ff={F}",
        f"model.n_heads={N}",
        f"model.n_kv_heads={K}",
        f"model.d_head={H}",
        f"model.vocab_size={V}",
        f"model.max_seq_len={T}",
        "model.tie_embeddings=True",
        f"pack.seq_len={T}",
        f"train.batch_size={B * n_devices}",
        "train.remat=minimal",
        f"train.compute_dtype={dtype}",
    ]


def make_run(args, overrides, is_whole=False):
    """Return settings, architecture, mesh, initial state and a batch."""
    import jax
    import jax.numpy as jnp

    from jaxpt import config, initialize, sharding
    from jaxpt.model import transformer
    from jaxpt.train import state

    recipe = [*list_overrides(args, jax.device_count(), dtype_of()), *overrides]
    settings = config.build_config(config.apply_overrides([f"--config.{each}" for each in recipe]))
    T, V = settings.pack.seq_len, settings.model.vocab_size
    mesh = sharding.make_mesh(settings.mesh)
    spec = initialize.make_random_spec(settings.model, V)
    params = transformer.init_params(spec, 0, mesh, jnp.dtype(settings.initialize.param_dtype))
    batch = make_packed_batch(settings.train.batch_size, T, V, is_whole)
    batch = jax.device_put(batch, sharding.make_batch_sharding(mesh))
    return settings, spec, mesh, state.init_state(params, spec, settings.optim, mesh), batch


def make_packed_batch(batch_size, T, vocab_size, is_whole):
    """Return a Batch of random tokens in documents of T/64 to T/2 tokens, or one of T.

    A sequence of several ends in up to T/64 of padding.
    """
    import numpy as np

    from jaxpt.spec import Batch

    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocab_size, (batch_size, T)).astype(np.int32)
    segments, positions = np.zeros((batch_size, T), np.int32), np.zeros((batch_size, T), np.int32)
    for row in range(batch_size):
        at, document, full = 0, 0, T if is_whole else T - rng.integers(0, T // 64)
        while at < full:
            length = T if is_whole else min(rng.integers(T // 64, T // 2), full - at)
            document += 1
            segments[row, at : at + length] = document
            positions[row, at : at + length] = np.arange(length)
            at += length
    same = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
    mask = (same & (segments > 0)).astype(np.float32)
    return Batch(tokens, np.roll(tokens, -1, 1), segments, positions, mask)


class Part:
    """A measurement, the packages without which it is skipped, and whose device it is on."""

    def __init__(self, run, *packages, on="JAX"):
        self.run, self.packages, self.on = run, packages, on


def make_train_part(*overrides, is_whole=False):
    """Return the part of a train step with other settings than `train-auto`'s."""

    def run(args):
        return measure_train(args, *overrides, is_whole=is_whole)

    return Part(run, *DATA)


DATA = ("grain", "pyarrow")
# the most telling first: what does not fit into the time is left out
PARTS = {
    "device": Part(measure_device),
    "train-auto": make_train_part(),
    "train-float8": make_train_part("train.matmul_dtype=float8"),
    "train-int8": make_train_part("train.matmul_dtype=int8"),
    "train-whole": make_train_part(is_whole=True),
    "train-torch": Part(measure_torch_train, "torch", "transformers", on="torch"),
    "train-xla": make_train_part("train.attention=xla"),
    "train-unrolled": make_train_part("train.unroll_layers=16"),
    "train-dots": make_train_part("train.remat=dots"),
    "plan": Part(measure_plan, *DATA, on="its own process"),
    "attention-xla": Part(functools.partial(measure_attention, "xla")),
    "attention-cudnn": Part(functools.partial(measure_attention, "cudnn")),
    "attention-splash": Part(functools.partial(measure_attention, "splash")),
    "attention-torch": Part(measure_torch_attention, "torch", on="torch"),
    "decode": Part(measure_decode, *DATA),
    "evaluate": Part(measure_evaluate, *DATA),
    "resume": Part(measure_resume, *DATA, "sentencepiece", "tokenizers", on="its own process"),
    "profile": Part(measure_profile, *DATA),
}


if __name__ == "__main__":
    sys.exit(main())

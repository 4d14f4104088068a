"""Compile the train step for hardware that is not here, and list what the optimized program
contains, as a markdown table.

    pip install libtpu jax-cuda13-plugin jax-cuda13-pjrt   (see docs/plan.md for the versions)
    python benchmarks/compiled.py [NAME ...]

Each program is compiled by a process of its own; nothing runs on a TPU or GPU. From the program's
text: whether it contains an array as large as all logits (sequences x T x V of a device) or with
two axes of T, the largest array, and the collectives of one layer (those in the bodies of the loops
over layers, forward and backward).
"""

import math
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jaxpt import config, hardware, xla_settings
from jaxpt.plan import compile

# Llama 3.2's 1B and Llama 3's 8B. Sequences are longer than the 8B is wide, so that an array of
# T x T is not taken for one of T x D.
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
EIGHT = {
    "n_layers": 32,
    "d_model": 4096,
    "d_ff": 14_336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "d_head": 128,
    "vocab_size": 128_256,
}
ONE_CARD, PODS = (BILLION, {"seq_len": 4096}), (EIGHT, {"seq_len": 8192})
ROWS = {  # name: target, (model, pack), train, mesh
    "h100 xla": ("h100:1", ONE_CARD, {"batch_size": 8, "attention": "xla", "remat": "full"}, {}),
    "h100 cudnn full": ("h100:1", ONE_CARD, {"batch_size": 8, "remat": "full"}, {}),
    "h100 cudnn minimal": ("h100:1", ONE_CARD, {"batch_size": 8, "remat": "minimal"}, {}),
    "h100 cudnn dots": ("h100:1", ONE_CARD, {"batch_size": 8, "remat": "dots"}, {}),
    "h100 cudnn none": ("h100:1", ONE_CARD, {"batch_size": 8, "remat": "none"}, {}),
    "h100 cudnn offload": ("h100:1", ONE_CARD, {"batch_size": 8, "remat": "offload"}, {}),
    "h100 cudnn minimal float8": (
        "h100:1",
        ONE_CARD,
        {"batch_size": 8, "remat": "minimal", "matmul_dtype": "float8"},
        {},
    ),
    "v5e 8 splash minimal": ("v5e:2x4", ONE_CARD, {"batch_size": 8, "remat": "minimal"}, {}),
    "v5e 8 splash minimal int8": (
        "v5e:2x4",
        ONE_CARD,
        {"batch_size": 8, "remat": "minimal", "matmul_dtype": "int8"},
        {},
    ),
    "v5p 64 xla": ("v5p:4x4x4", PODS, {"batch_size": 64, "attention": "xla", "remat": "full"}, {}),
    "v5p 64 splash full": ("v5p:4x4x4", PODS, {"batch_size": 64, "remat": "full"}, {}),
    "v5p 64 splash minimal": ("v5p:4x4x4", PODS, {"batch_size": 64, "remat": "minimal"}, {}),
    "v5p 64 splash dots": ("v5p:4x4x4", PODS, {"batch_size": 64, "remat": "dots"}, {}),
    "v5p 64 splash offload": ("v5p:4x4x4", PODS, {"batch_size": 64, "remat": "offload"}, {}),
    "v5p 64 splash none": ("v5p:4x4x4", PODS, {"batch_size": 64, "remat": "none"}, {}),
    "v5p 64 splash tensor 4": (
        "v5p:4x4x4",
        PODS,
        {"batch_size": 16, "remat": "full"},
        {"tensor": 4},
    ),
    "v5p 64 context 4": (
        "v5p:4x4x4",
        PODS,
        {"batch_size": 16, "remat": "full"},
        {"context": 4},
    ),
    "v5p 4096 splash full": ("v5p:16x16x16", PODS, {"batch_size": 4096, "remat": "full"}, {}),
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def main(*names: str):
    print(
        "| program | attention | compile, s (CPU s) | peak, GiB | "
        "logits-sized | T x T | largest array | collectives per layer, "
        "forward; backward |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in names or ROWS:
        command = [sys.executable, __file__, "--child", name]
        chip = hardware.parse_target(ROWS[name][0]).chip
        flags = xla_settings.choose_variables(chip.platform, chip, os.environ)
        environment = os.environ | flags | compile.COMPILER_ENV
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        answer = (
            done.stdout.splitlines()[-1]
            if done.returncode == 0
            else f"| {name} | failed: {done.stderr.strip().splitlines()[-1][:300]} |"
        )
        print(answer, flush=True)


def child(name: str):

    from jaxpt import initialize, sharding
    from jaxpt.model.kernels import select
    from jaxpt.train import state, step
    from jaxpt.train.step import make_attention_request

    on, (model, pack), train, axes = ROWS[name]
    target = hardware.parse_target(on)
    if missing := compile.find_missing_package(target):
        sys.exit(f"needs {missing}")
    values = config.apply_overrides([])
    for section, changes in (
        ("model", model),
        ("pack", pack),
        ("train", {"compute_dtype": "bfloat16", **train}),
        ("mesh", axes),
    ):
        values[section] |= changes
    settings = config.build_config(values)
    spec = initialize.make_random_spec(settings.model, settings.tokenizer.vocab_size)
    mesh = sharding.make_mesh(settings.mesh, compile.make_target_devices(target, None))
    train, optim, seq_len = settings.train, settings.optim, settings.pack.seq_len
    backend, _ = select.choose_backend(spec, make_attention_request(train, seq_len), mesh)
    goal = state.make_abstract_state(spec, optim, mesh, settings.initialize.param_dtype)
    batch = step.make_abstract_batch(train.batch_size, seq_len, mesh)
    start, start_cpu = time.monotonic(), time.process_time()
    lowered = step.build_step(spec, train, optim, seq_len, mesh).lower(goal, batch)
    options = {"xla_gpu_enable_triton_gemm": False} if target.chip.platform == "cuda" else None
    compiled = lowered.compile(options)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - start_cpu
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if directory := os.environ.get("DUMP"):  # for a look at the program
        pathlib.Path(directory, name.replace(" ", "_") + ".txt").write_text(text, encoding="utf-8")
    peak = memory.peak_memory_in_bytes
    if target.chip.platform != "tpu":
        peak = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    T, rows = settings.pack.seq_len, settings.train.batch_size // sharding.n_shards(mesh, "batch")
    vocab = spec.vocab_size // sharding.n_shards(mesh, "vocab")
    logits = rows * T // sharding.n_shards(mesh, "position") * vocab
    arrays = arrays_of(text)
    largest = max(arrays, key=lambda array: math.prod(array[1]))
    layers = [
        ", ".join(
            f"{each.n_ops} {kind} {each.n_bytes / 1e6:,.0f} MB" for kind, each in found.items()
        )
        or "none"
        for found in compile.count_layer_collectives(text, spec.n_layers, mesh.size)
    ]
    host = (
        f" + {memory.host_temp_size_in_bytes / 2**30:.1f} on the host"
        if memory.host_temp_size_in_bytes
        else ""
    )
    n_logits = n_square = 0
    for _, shape in arrays:
        is_logits = vocab in shape and spec.d_model not in shape
        n_logits += is_logits and math.prod(shape) >= logits
        n_square += shape.count(T) > 1
    print(
        f"| {name} | {backend} | {seconds:.0f} ({cpu_seconds:.0f}) | {peak / 2**30:.1f}{host} | "
        f"{n_logits} | {n_square} | {largest[0]}{list(largest[1])} | {'; '.join(layers)} |"
    )


def arrays_of(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Return every (type, shape) in a program."""
    lines = "\n".join(
        line for line in text.splitlines() if " bitcast(" not in line
    )  # another shape for the same bytes: no array
    found = re.findall(r"\b(pred|bf16|f16|f32|f64|f8\w+|[su]\d+)\[([\d,]+)\]", lines)
    return {(kind, tuple(map(int, shape.split(",")))) for kind, shape in found}


if __name__ == "__main__":
    child(sys.argv[2]) if sys.argv[1:2] == ["--child"] else main(*sys.argv[1:])

"""The real train step compiled for hardware that is not here: the code that trains, over a state of shapes without arrays.

TPU slices come from libtpu, NVIDIA hosts from a description of the card that the CUDA plugin of JAX compiles for, CPU
devices are made up on this machine. Each target has its own process, because what JAX can compile for is settled when it
is first used. Where a package is missing the bytes of the state are still exact, and the rest is arithmetic.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from jaxpt import config
from jaxpt.config import Config
from jaxpt.plan import flops, hardware, hlo
from jaxpt.plan.hardware import GPUS_PER_HOST, Target
from jaxpt.spec import ModelSpec, UserError


def analyze_step(spec: ModelSpec, settings: Config, target: Target) -> dict[str, Any]:
    """What the train step takes on a target, asked of a process of its own.

    Returns method ("compiled" or "estimated"), missing (the package that would have compiled it, or None), mesh {axis: size},
    params_bytes, opt_bytes, peak_bytes, restore_bytes and export_bytes of one device, over_memory (whether the compiler gave
    up; the peak is then a lower bound), kept_bytes (what backward keeps, by rule of thumb), attention (its backend),
    executed_flops (of a whole step, recomputation included), once_flops (of a device, a loop's body counted once) and beside it
    compiler_flops (the compiler's own count, which is like that; None where it has none), layers (collectives of one layer in
    the compiled program, see hlo.layers), moved_bytes and traffic_bytes (that a device receives for the cut weights, and
    reads and writes, in a step, by arithmetic) and seconds.
    Raises UserError where the config's sizes cannot be laid out on the target.
    """
    missing = find_missing_package(target)
    request = {
        "spec": spec.to_json(),
        "settings": dataclasses.asdict(settings),
        "on": target.name,
        "missing": missing,
    }
    with tempfile.TemporaryDirectory() as directory:
        asked, answer = (
            pathlib.Path(directory) / "request.json",
            pathlib.Path(directory) / "answer.json",
        )
        asked.write_text(json.dumps(request))
        # -P: the directory it is called from may hold another jaxpt
        command = [sys.executable, "-P", "-m", "jaxpt.plan.compile", str(asked), str(answer)]
        house = str(pathlib.Path(__file__).resolve().parents[2])
        path = os.pathsep.join([house, *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            command,
            env={**os.environ, **COMPILER_ENV, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if not answer.exists():
            raise RuntimeError(
                f"plan: the process for {target.name} ended with status {done.returncode}.\n{done.stderr[-5000:]}"
            )
        result = json.loads(answer.read_text())
    if "user_error" in result:
        raise UserError(f"--on {target.name}: {result['user_error']}")
    return result


COMPILER_ENV = {
    "JAX_PLATFORMS": "cpu",  # the compilers run on this machine; nothing is asked of a chip
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask Google Cloud's metadata server which TPU this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock file would keep two plans from running side by side
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the CUDA plugin without CUDA's own libraries
}
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def find_missing_package(target: Target) -> str | None:
    """The package to install before this target can be compiled here; None when all is here."""
    here = importlib.util.find_spec
    if target.chip.platform == "tpu":
        return None if here("libtpu") else "libtpu"
    if target.chip.platform == "cuda":
        return None if any(map(here, CUDA_PLUGINS)) else "jax-cuda13-plugin and jax-cuda13-pjrt"
    return None


# ---- in the target's own process


def main(asked: str, answer: str) -> None:
    request = json.loads(pathlib.Path(asked).read_text())
    spec, settings = ModelSpec.from_json(request["spec"]), config.build_config(request["settings"])
    try:
        result = analyze_step_in_process(
            spec, settings, hardware.parse_target(request["on"]), request["missing"]
        )
    except UserError as error:
        result = {"user_error": str(error)}
    pathlib.Path(answer).write_text(json.dumps(result))


def analyze_step_in_process(
    spec: ModelSpec, settings: Config, target: Target, missing: str | None
) -> dict[str, Any]:
    from jaxpt import sharding
    from jaxpt.model import attention
    from jaxpt.train import state, step

    start = time.monotonic()
    mesh = sharding.make_mesh(settings.mesh, make_target_devices(target, missing))
    train = settings.train
    sharding.check_mesh_divides(
        mesh, spec, train.batch_size, train.grad_accum_steps, settings.pack.seq_len
    )
    goal = state.make_abstract_state(spec, settings, mesh)
    params_bytes, opt_bytes = (
        count_bytes_per_device(goal.params),
        count_bytes_per_device(goal.opt_state),
    )

    def trace(**changes):
        changed = dataclasses.replace(settings, train=dataclasses.replace(train, **changes))
        return step.build_step(spec, changed, mesh).trace(
            goal, step.make_abstract_batch(settings, mesh)
        )

    # A kernel's products are out of sight; xla's bands compute the same blocks. On stand-ins nothing else can be traced.
    plain = trace(
        attention="xla", remat="dots" if missing and train.remat == "offload" else train.remat
    )
    backend = (
        hardware.predict_attention_backend(settings, target)
        if missing
        else attention.choose_backend(spec, settings, mesh)[0]
    )
    found = flops.estimate_step(spec, settings, dict(mesh.shape), backend)
    found |= {
        "method": "estimated",
        "missing": missing,
        "mesh": dict(mesh.shape),
        "params_bytes": params_bytes,
        "opt_bytes": opt_bytes,
        "restore_bytes": params_bytes + opt_bytes,
        "peak_bytes": found["peak_bytes"] - found["restore_bytes"] + params_bytes + opt_bytes,
        "export_bytes": found["export_bytes"] - found["params_bytes"] + params_bytes,
        "executed_flops": count_matmul_flops(plain.jaxpr),
        "once_flops": count_matmul_flops(plain.jaxpr, multiply_loops=False) / target.n_devices,
    }
    if not missing:
        found |= {
            "method": "compiled",
            **analyze_compiled_step(trace().lower(), target.chip.platform, spec.n_layers),
        }
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def make_target_devices(target: Target, missing: str | None) -> list:
    """The target's devices, which can be compiled for and no more; or as many CPU devices, when they only stand in for a layout."""
    import jax
    from jax.experimental import topologies

    platform, shape = target.chip.platform, target.topology
    if platform == "cpu" or missing:
        jax.config.update("jax_num_cpu_devices", target.n_devices)
        return jax.devices("cpu")
    if platform == "tpu":
        options = {}
        if target.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # a v4 chip's two cores are one device
        if math.prod(shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{target.chip.name}:{hardware.format_topology(shape)}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    hosts, each = divmod(shape[0], GPUS_PER_HOST)
    topology = (
        f"1x{hosts}x{GPUS_PER_HOST}" if hosts else f"1x1x{each}"
    )  # slices x hosts x devices of a host
    patch_cudnn_checks(target.chip)
    return topologies.get_topology_desc(
        platform="cuda", target_config=format_gpu_target_config(target.chip), topology=topology
    ).devices


def patch_cudnn_checks(chip: hardware.Chip) -> None:
    """JAX asks the card of this machine whether it can run a cuDNN attention, and here is none: the target's answers are given."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    capability = GPU_SPECS[chip.name][1]
    read = lambda text: tuple(map(int, text.split(".")))  # noqa: E731
    fused.check_cudnn_version = lambda: 91000
    fused.check_compute_capability = lambda wanted: capability >= read(wanted)
    fused.is_cuda_compute_capability_equal = lambda wanted: capability == read(wanted)


def count_bytes_per_device(tree) -> int:
    """Of abstract arrays with shardings, the part that one device holds."""
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def analyze_compiled_step(lowered, platform: str, n_layers: int) -> dict[str, Any]:
    """What the compiler's own analyses and the text of its program say; where it refuses for want of memory, what it wanted."""
    import jax

    # XLA tries its Triton kernels for products on the card and passes over those whose tiling does not exist. With no card to
    # try on it stops there (at 60 x 24, say). Plain products compile in every shape and take more memory: the 8B shape on 8
    # H100 30.5 GiB against 26.9.
    options = {"xla_gpu_enable_triton_gemm": False} if platform == "cuda" else None
    try:
        made = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        wanted = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not wanted:
            raise
        peak = round(float(wanted[1]) * 1024 ** " KMGT".index(wanted[2] or " "))
        return {"over_memory": True, "peak_bytes": peak, "layers": [], "compiler_flops": None}
    memory = made.memory_analysis()
    if platform == "tpu":
        # libtpu's size of the temporaries counts buffers that never live together (it accepted 17.0 GiB by that count on
        # 15.75 GiB); its peak does not. The other compilers' peak leaves temporaries out on CPU, and their sum is right.
        peak = memory.peak_memory_in_bytes
    else:
        peak = (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return {
        "over_memory": False,
        "peak_bytes": peak + memory.generated_code_size_in_bytes,
        "layers": []
        if platform == "cpu"
        else hlo.count_layer_collectives(
            made.as_text(), n_layers
        ),  # a CPU's step has its layers written out
        "compiler_flops": (made.cost_analysis() or {}).get("flops"),
    }


def count_matmul_flops(jaxpr, multiply_loops: bool = True) -> float:
    """FLOPs of all matrix products of a traced program, over all devices, loops multiplied out.

    Without `loops` each body counts once, which is how the compilers count: of L layers they see one.
    """
    from jax.extend import core

    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(equation.outvars[0].aval.shape) * summed
        repeats = 1
        if (
            equation.primitive.name == "scan"
        ):  # one that is unrolled into as many turns as it has is no loop any more
            length, unroll = equation.params["length"], int(equation.params["unroll"])
            repeats = length if multiply_loops else min(length, unroll)
        total += repeats * sum(
            count_matmul_flops(inner, multiply_loops)
            for inner in core.jaxprs_in_params(equation.params)
        )
    return total


# ---- descriptions of NVIDIA cards: hardware facts in the text form that XLA's GPU compiler reads

GPU_SPECS = {  # JAX's name, compute capability, multiprocessors, units and shared bytes (all, one block's) and threads of each, L2 bytes, GHz
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167_936, 166_912, 2048, 41_943_040, 1.41),
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233_472, 232_448, 2048, 52_428_800, 1.98),
    "h200": ("NVIDIA H200", (9, 0), 132, 128, 233_472, 232_448, 2048, 52_428_800, 1.98),
    "b200": ("NVIDIA B200", (10, 0), 148, 128, 233_472, 232_448, 2048, 132_644_864, 1.965),
    "l4": ("NVIDIA L4", (8, 9), 58, 128, 102_400, 101_376, 1536, 50_331_648, 2.04),
    "rtx4090": (
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        128,
        128,
        102_400,
        101_376,
        1536,
        75_497_472,
        2.52,
    ),
}


def format_gpu_target_config(chip: hardware.Chip) -> str:
    """A GpuTargetConfigProto of the card, for CUDA 13 and cuDNN 9.10."""
    name, (major, minor), cores, units, shared, shared_block, threads, l2, ghz = GPU_SPECS[
        chip.name
    ]
    feature = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  name: "{name}" cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {ghz} l2_cache_size: {l2}
  device_memory_size: {chip.memory_bytes} memory_bandwidth: {round(chip.memory_bandwidth)}
  shared_memory_per_core: {shared} shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared_block}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {threads}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
"""


if __name__ == "__main__":
    main(*sys.argv[1:])

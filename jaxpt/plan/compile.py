"""Compile the real train step for hardware that is not here, over a state of shapes without arrays.

TPU slices come from libtpu, NVIDIA hosts from a description of the card that JAX's CUDA plugin
compiles for, CPU devices are simulated on this machine. Each target has its own process, because
what JAX can compile for is settled when it is first used. Where a package is missing, the bytes of
the state are still exact, and the rest is arithmetic.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.experimental import topologies
from jax.extend import backend, core
from jax.sharding import Mesh

from jaxpt import config, hardware, sharding
from jaxpt.config import Config
from jaxpt.hardware import GPUS_PER_HOST, Chip, Target
from jaxpt.model import transformer
from jaxpt.model.kernels import grouped, low_matmul, select_experts
from jaxpt.model.kernels.blockwise import count_mean_key_blocks
from jaxpt.plan import cost, roofline
from jaxpt.plan.roofline import CollectiveCount, LayerCollectives, StepAnalysis
from jaxpt.sharding import n_shards
from jaxpt.spec import ModelSpec, Record, UserError
from jaxpt.train import state, step
from jaxpt.xla_settings import choose_variables

COMPILER_ENV = {
    "JAX_PLATFORMS": "cpu",  # the compilers run on this machine and need no chip
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask Google Cloud's metadata server for its TPU
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu's lock file would serialize two plans
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the CUDA plugin without CUDA's own libraries
}
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class AnalysisRequest(Record):
    """What the target's process reads."""

    spec: ModelSpec
    settings: dict[str, dict[str, Any]]
    target: str
    missing_package: str | None


@dataclasses.dataclass(frozen=True)
class AnalysisResponse(Record):
    """What the target's process writes: one of both."""

    analysis: StepAnalysis | None = None
    user_error: str | None = None


def analyze_step(spec: ModelSpec, settings: Config, target: Target) -> StepAnalysis:
    """Return memory, FLOPs and traffic of the train step on a target, from its own process.

    Raises:
        UserError: the config's sizes cannot be sharded over the target.
    """
    values = dataclasses.asdict(settings)
    request = AnalysisRequest(spec, values, target.name, find_missing_package(target))
    with tempfile.TemporaryDirectory() as directory:
        request_path = pathlib.Path(directory) / "request.json"
        response_path = pathlib.Path(directory) / "response.json"
        request_path.write_text(json.dumps(request.to_json()))
        # -P: the working directory may hold another jaxpt
        command = [sys.executable, "-P", "-m", __name__, str(request_path), str(response_path)]
        chip = target.chip
        environment = os.environ | choose_variables(chip.platform, chip, os.environ)
        environment |= COMPILER_ENV | {"PYTHONPATH": make_python_path()}
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace"
        )
        if not response_path.exists():
            raise RuntimeError(
                f"plan: the process for {target.name} ended with status {done.returncode}.\n"
                f"{done.stderr[-5000:]}"
            )
        response = AnalysisResponse.from_json(json.loads(response_path.read_text(encoding="utf-8")))
    if response.analysis is None:
        raise UserError(f"--on {target.name}: {response.user_error}")
    return response.analysis


def make_python_path() -> str:
    """Return PYTHONPATH with this clone first."""
    clone = pathlib.Path(__file__).resolve().parents[2]
    paths = [str(clone)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    return os.pathsep.join(paths)


def find_missing_package(target: Target) -> str | None:
    """Return the package to install before compiling for this target; None if all is here."""
    find_spec = importlib.util.find_spec
    if target.chip.platform == "tpu" and not find_spec("libtpu"):
        return "libtpu"
    if target.chip.platform == "cuda" and not any(map(find_spec, CUDA_PLUGINS)):
        return "jax-cuda13-plugin and jax-cuda13-pjrt"
    return None


# ---- in the target's own process


def main(request_path: str, response_path: str) -> None:
    """Answer one request."""
    text = pathlib.Path(request_path).read_text(encoding="utf-8")
    request = AnalysisRequest.from_json(json.loads(text))
    try:
        response = AnalysisResponse(analysis=analyze_step_in_process(request))
    except UserError as error:
        response = AnalysisResponse(user_error=str(error))
    pathlib.Path(response_path).write_text(json.dumps(response.to_json()), encoding="utf-8")


def analyze_step_in_process(request: AnalysisRequest) -> StepAnalysis:
    """Return the analysis of a step for devices that this process alone sees."""
    start = time.monotonic()
    spec = request.spec
    missing = request.missing_package
    settings = config.build_config(request.settings)
    target = hardware.parse_target(request.target)
    train = settings.train
    low_matmul.check_chip(train.matmul_dtype, target.chip)
    seq_len = settings.pack.seq_len
    devices = make_target_devices(target, missing)
    mesh = sharding.make_mesh(settings.mesh, devices)
    sharding.check_mesh_divides(mesh, spec, train.batch_size, train.grad_accum_steps, seq_len)
    shape = dict(mesh.shape)
    attention = roofline.predict_attention_backend(spec, seq_len, train, shape, target)
    experts = None
    if not missing:
        attention = step.choose_kernels(spec, train, seq_len, mesh).attention
    if not missing and spec.n_experts:
        kernel = select_experts.choose_experts_kernel(
            spec, train.experts, train.compute_dtype, mesh
        )
        experts = ", ".join(kernel)

    # The matmuls of attention's kernel cannot be seen; xla's blocks compute about the same.
    # Stand-in devices can trace nothing else.
    remat = train.remat
    if missing and remat == "offload":
        remat = "dots"
    visible_train = dataclasses.replace(train, attention="xla", remat=remat)
    visible = dataclasses.replace(settings, train=visible_train)
    # where experts are sharded a program's buffers fit a device that all tokens choose
    program = trace_step(spec, visible, sharding.fold_expert_axis(mesh)).jaxpr
    n_context = n_shards(mesh, "position")
    on_cpu = devices[0].platform == "cpu"
    key_blocks = count_key_blocks(spec, seq_len, n_context, on_cpu)
    loop_body_flops = None
    if not missing:  # a CPU, which stands in, has other loops than the target
        loop_body_flops = count_matmul_flops(program, None) / target.n_devices

    whole = roofline.count_state_bytes(spec, settings.optim, settings.initialize.param_dtype)
    estimate = roofline.estimate_step(spec, whole, train, seq_len, shape, attention)
    abstract_state = state.make_abstract_state(
        spec, settings.optim, mesh, settings.initialize.param_dtype
    )
    params_bytes = count_bytes_per_device(abstract_state.params)
    kept = (abstract_state.opt_state, abstract_state.average)
    opt_state_bytes = count_bytes_per_device(kept)
    state_bytes = params_bytes + opt_state_bytes
    distill_spec = cost.resolve_distill_spec(settings)
    frozen = step.find_frozen_spec(spec, train, distill_spec)
    executed_flops = count_matmul_flops(program, key_blocks)
    if frozen:
        estimate = roofline.add_frozen(estimate, spec, frozen, train, seq_len)
        frozen_bytes = count_bytes_per_device(make_abstract_frozen(spec, settings, mesh))
        estimate = dataclasses.replace(estimate, frozen_bytes=frozen_bytes)
    if distill_spec and frozen:  # its windows, and so its blocks of keys, may be others
        alone = dataclasses.replace(visible, distill=config.DistillConfig())
        program = trace_step(spec, alone, sharding.fold_expert_axis(mesh)).jaxpr
        executed_flops = count_matmul_flops(program, key_blocks)
        executed_flops += train.batch_size * seq_len * estimate.frozen_flops_per_token
    restore_bytes = state_bytes + estimate.frozen_bytes
    analysis = dataclasses.replace(
        estimate,
        missing_package=missing,
        params_bytes=params_bytes,
        opt_state_bytes=opt_state_bytes,
        restore_bytes=restore_bytes,
        peak_bytes=estimate.peak_bytes - estimate.restore_bytes + restore_bytes,
        export_bytes=estimate.export_bytes - estimate.params_bytes + params_bytes,
        executed_flops=executed_flops,
        loop_body_flops=loop_body_flops,
        experts=experts,
    )
    if not missing:
        lowered = trace_step(spec, settings, mesh).lower()
        analysis = analyze_compiled_step(analysis, lowered, target)
    seconds = round(time.monotonic() - start, 1)
    return dataclasses.replace(analysis, analysis_seconds=seconds)


def trace_step(spec: ModelSpec, settings: Config, mesh: Mesh) -> Any:
    """Return the traced train step (jax.stages.Traced)."""
    train, optim, seq_len = settings.train, settings.optim, settings.pack.seq_len
    dtype = settings.initialize.param_dtype
    abstract_state = state.make_abstract_state(spec, optim, mesh, dtype)
    distill_spec = cost.resolve_distill_spec(settings)
    abstract_batch = step.make_abstract_batch(train.batch_size, seq_len, mesh, distill_spec)
    built = step.build_step(spec, train, optim, seq_len, mesh, distill_spec=distill_spec)
    frozen = make_abstract_frozen(spec, settings, mesh)
    return built.trace(abstract_state, abstract_batch, *([frozen] if frozen else []))


def make_abstract_frozen(spec: ModelSpec, settings: Config, mesh: Mesh) -> Any:
    """Return the parameters of a teacher or reference as ShapeDtypeStructs with shardings.

    None where a step takes none: there is no such model, or it is the base of the adapters.
    """
    train = settings.train
    frozen = step.find_frozen_spec(spec, train, cost.resolve_distill_spec(settings))
    if frozen is None or (train.dpo_beta and spec.lora):
        return None
    return transformer.make_abstract_params(frozen, mesh, train.compute_dtype)


def make_target_devices(target: Target, missing: str | None) -> Sequence[Any]:
    """Return the target's jax.Devices, to compile for only; CPU stand-ins if it is missing.

    Args:
        target: hardware to compile for.
        missing: the package that is not installed, or None.
    """
    platform = target.chip.platform
    shape = target.topology
    if platform == "cpu" or missing:
        jax.config.update("jax_num_cpu_devices", target.n_devices)
        return jax.devices("cpu")
    if platform == "tpu":
        options: dict[str, Any] = {"wrap": (*target.wraps, False)[:3]}  # of three axes
        if target.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # a v4 chip's two cores are one device
        if math.prod(shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        name = f"{target.chip.name}:{hardware.format_topology(shape)}"
        return topologies.get_topology_desc(name, "tpu", **options).devices
    n_hosts, n_devices = divmod(shape[0], GPUS_PER_HOST)
    # slices x hosts x devices per host
    topology = f"1x1x{n_devices}"
    if n_hosts:
        topology = f"1x{n_hosts}x{GPUS_PER_HOST}"
    patch_cudnn_checks(target.chip)
    target_config = format_gpu_target_config(target.chip)
    devices = topologies.get_topology_desc(
        platform="cuda", target_config=target_config, topology=topology
    ).devices
    # tokamax asks JAX for this machine's card
    backend.get_default_device = lambda: devices[0]
    return devices


def patch_cudnn_checks(chip: Chip) -> None:
    """Answer for the target where JAX asks this machine's card whether it runs cuDNN attention."""
    assert chip.gpu
    capability = chip.gpu.capability

    def parse_capability(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    fused.check_cudnn_version = lambda: 91000
    fused.check_compute_capability = lambda text: capability >= parse_capability(text)
    fused.is_cuda_compute_capability_equal = lambda text: capability == parse_capability(text)


def count_bytes_per_device(tree: Any) -> int:
    """Return the bytes that one device holds of a pytree of abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shard_shape = leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shard_shape) * leaf.dtype.itemsize
    return total


def analyze_compiled_step(analysis: StepAnalysis, lowered: Any, target: Target) -> StepAnalysis:
    """Return the analysis with what the compiler reports, or what it expected if it gave up.

    Args:
        analysis: by arithmetic and tracing.
        lowered: the lowered train step (jax.stages.Lowered).
        target: what it is compiled for.
    """
    platform = target.chip.platform
    # XLA tries its Triton kernels for matmuls on the card and passes over those whose tiling does
    # not exist. With no card it stops there (at 60 x 24, say). Plain matmuls compile in every shape
    # and take more memory: the 8B shape on 8 H100 30.5 GiB against 26.9.
    options = None
    if platform == "cuda":
        options = {"xla_gpu_enable_triton_gemm": False}
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        peak_bytes = parse_refused_bytes(str(error))
        if peak_bytes is None:
            raise
        return dataclasses.replace(
            analysis, method="compiled", exceeds_memory=True, peak_bytes=peak_bytes
        )
    layer_collectives = ()
    if platform != "cpu":  # a CPU may have several layers in a turn
        text = compiled.as_text()
        layer_collectives = count_layer_collectives(text, analysis.n_layers, target.domain_size)
    costs = compiled.cost_analysis() or {}
    return dataclasses.replace(
        analysis,
        method="compiled",
        peak_bytes=read_peak_bytes(compiled, platform),
        layer_collectives=layer_collectives,
        compiler_flops=costs.get("flops"),
    )


def parse_refused_bytes(message: str) -> int | None:
    """Return the bytes that a compiler expected when it ran out of memory.

    None for other errors.
    """
    amount = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)", message)
    if "RESOURCE_EXHAUSTED" not in message or not amount:
        return None
    exponent = " KMGT".index(amount[2] or " ")
    return round(float(amount[1]) * 1024**exponent)


def read_peak_bytes(compiled: Any, platform: str) -> int:
    """Return the peak memory per device of a compiled program (jax.stages.Compiled)."""
    memory = compiled.memory_analysis()
    code = memory.generated_code_size_in_bytes
    if platform == "tpu":
        # libtpu's size of the temporaries counts buffers that never live together (it accepted
        # 17.0 GiB by that count on 15.75 GiB); its peak does not
        return memory.peak_memory_in_bytes + code
    # the peak of the other compilers leaves temporaries out on CPU; the sum is right
    arguments = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    return arguments + memory.temp_size_in_bytes + memory.output_size_in_bytes + code


def count_key_blocks(spec: ModelSpec, seq_len: int, n_context: int, on_cpu: bool) -> float:
    """Return the turns of attention's loop over blocks of keys, mean over queries and layers.

    Every sequence is taken for one document: those of several need fewer.
    """
    windows = [kind.window for kind in spec.layer_kinds]
    turns = [count_mean_key_blocks(seq_len, window, n_context, on_cpu) for window in windows]
    return sum(turns) / max(len(turns), 1)


def count_matmul_flops(jaxpr: Any, key_blocks: float | None = 1) -> float:
    """Return the FLOPs of all matmuls of a traced program, over all devices.

    Args:
        jaxpr: the program (jax.extend.core.Jaxpr or ClosedJaxpr).
        key_blocks: turns of each loop whose number the data decide: attention's over blocks of keys
            (`count_key_blocks`). None counts every loop body once, as the compilers do: of L
            layers they see one.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        params = equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left_shape = equation.invars[0].aval.shape
            out_shape = equation.outvars[0].aval.shape
            n_summed = math.prod(left_shape[axis] for axis in contracted)
            total += 2 * math.prod(out_shape) * n_summed
        elif name == "jit":
            shapes = [operand.aval.shape for operand in equation.invars]
            kernel_flops = grouped.count_product_flops(params["name"], shapes)
            if kernel_flops is not None:
                total += kernel_flops
                continue
        n_repeats = 1
        if name == "scan":
            # unrolled by its whole length, it is no loop any more
            n_repeats = params["length"]
            if key_blocks is None:
                n_repeats = min(n_repeats, int(params["unroll"]))
        elif name == "while":
            n_repeats = key_blocks or 1
        elif name == "shard_map":  # its shapes are one device's
            n_repeats = params["mesh"].size
        for inner in core.jaxprs_in_params(params):
            total += n_repeats * count_matmul_flops(inner, key_blocks)
    return total


# ---- the collectives of a layer, read from a compiled program's text

# JAX's compilers report them in no other form. A layer is one turn of a loop over stacked weights.
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
DTYPE_BYTES = {
    "pred": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
ARRAY = re.compile(rf"\b({'|'.join(DTYPE_BYTES)})\[([\d,]+)\]")
MIN_STACKED_ARRAYS = 8  # a loop over layers carries the stacked weights: a dozen arrays


def count_layer_collectives(
    text: str, n_layers: int, domain_size: int
) -> tuple[LayerCollectives, ...]:
    """Return what a layer runs in each loop over layers, forward first.

    Groups within domain_size consecutive devices are counted apart. It is empty if the program has
    no such loop, as where all layers are unrolled.
    """
    computations = split_computations(text)
    counts = []
    for lines in computations.values():
        bodies = {}  # name -> layers per turn
        for line in lines:
            if loops_over_layers(line, n_layers):
                bodies[re.findall(r"body=%?([\w.\-]+)", line)[0]] = read_loop_step(line)
        # a loop over micro-batches carries the weights too: the loops inside of it are counted, and
        # not their copies beside it, which XLA makes for the first micro-batch
        inner = itertools.chain.from_iterable(computations[body] for body in bodies)
        if any(loops_over_layers(line, n_layers) for line in inner):
            continue
        for body, n_layers_per_turn in bodies.items():
            found = count_collectives(computations, body, domain_size, set())
            counts.append(divide_counts(found, n_layers_per_turn))
    return tuple(counts)


def read_loop_step(line: str) -> int:
    """Return what a loop's counter rises by: 2 where XLA put two layers into a turn."""
    step = re.search(r'known_init_step":\{"init":"-?\d+","step":"(\d+)"', line)
    return int(step[1]) if step else 1


def divide_counts(found: LayerCollectives, n: int) -> LayerCollectives:
    """Return the collectives of one of n layers."""
    return {
        kind: CollectiveCount(math.ceil(each.n_ops / n), each.n_bytes / n, each.domain_bytes / n)
        for kind, each in found.items()
    }


def split_computations(text: str) -> dict[str, list[str]]:
    """Return name -> lines of every computation of a program's text."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []  # what stands before the first computation is dropped
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and not line.startswith(" "):
            lines = computations[header[1]] = []
        else:
            lines.append(line)
    return computations


def loops_over_layers(line: str, n_layers: int) -> bool:
    """Return whether a line is a loop that carries the stacked weights, cast or not."""
    carried, is_loop, _ = line.partition(" while(")
    stacked_arrays = re.findall(rf"\[{n_layers},", carried)
    return bool(is_loop) and len(stacked_arrays) >= MIN_STACKED_ARRAYS


def count_collectives(
    computations: dict[str, list[str]], name: str, domain_size: int, begun: set[str]
) -> LayerCollectives:
    """Return the collectives of a computation and of all that it calls, inner loops multiplied.

    Args:
        computations: of the program, by name.
        name: of the computation.
        domain_size: as of count_layer_collectives.
        begun: channels of collectives that were counted. A TPU runs one beside several matmuls, and
            it stands in each of these fusions: in a chain of the same channel.
    """
    total: LayerCollectives = {}

    def add(kind: str, n_ops: int, n_bytes: float, domain_bytes: float) -> None:
        before = total.get(kind, CollectiveCount(0, 0))
        total[kind] = CollectiveCount(
            before.n_ops + n_ops, before.n_bytes + n_bytes, before.domain_bytes + domain_bytes
        )

    for line in computations.get(name, []):
        match = re.search(r" ([a-z\-]+)\(", line)
        operation = match[1] if match else ""
        kind = operation.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=\d+", line)
            if channel and "chain_id=" in line:
                if channel[0] in begun:
                    continue
                begun.add(channel[0])
            n_bytes = count_collective_bytes(line, operation)
            group = list_group(line)
            is_within = len(group) > 1 and max(group) - min(group) < domain_size
            add(kind, 1, n_bytes, n_bytes if is_within else 0)
            continue
        trip_count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        n_turns = int(trip_count[1]) if trip_count and kind == "while" else 1
        for called in re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line):
            inner = count_collectives(computations, called, domain_size, begun)
            for inner_kind, count in inner.items():
                n_bytes, domain_bytes = n_turns * count.n_bytes, n_turns * count.domain_bytes
                add(inner_kind, n_turns * count.n_ops, n_bytes, domain_bytes)
    return total


def count_collective_bytes(line: str, operation: str) -> float:
    """Return the bytes of the whole array that a collective gathers or scatters, summed if several.

    Args:
        line: of the program's text.
        operation: the operation's name as in the line, such as "all-gather-start".
    """
    result, _, _ = line.partition(f" {operation}(")
    sizes = []
    for dtype, shape in ARRAY.findall(result):
        n_elements = math.prod(map(int, shape.split(",")))
        sizes.append(n_elements * DTYPE_BYTES[dtype])
    # of a started operation, the operands stand before the results
    half = len(sizes) // 2
    if operation in ("all-gather-start", "collective-permute-start"):
        return sum(sizes[half:])
    if operation == "reduce-scatter-start":
        return sum(sizes[:half])
    if operation == "reduce-scatter":  # the result is one shard of the array
        return sum(sizes) * len(list_group(line))
    return sum(sizes)


def list_group(line: str) -> list[int]:
    """Return the devices of a collective's first group, such as {0,8}; one if none is listed."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line)
    if listed:
        return list(map(int, listed[1].split(",")))
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        taken = re.findall(r"'(\w+)'", named[2])
        dims = list(map(int, sizes.values()))
        devices = np.arange(math.prod(dims)).reshape(dims)
        group = devices[tuple(slice(None) if axis in taken else 0 for axis in sizes)]
        return group.ravel().tolist()
    # [4,2]<=[2,4]T(1,0): 4 groups of 2, of the devices counted along 2 x 4 and transposed
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if not counted:
        return [0]
    dims = list(map(int, counted[2].split(",")))
    order = list(map(int, counted[3].split(","))) if counted[3] else range(len(dims))
    devices = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return devices.ravel()[: int(counted[1])].tolist()


# ---- descriptions of NVIDIA cards, in the text form that XLA's GPU compiler reads


def format_gpu_target_config(chip: Chip) -> str:
    """Return the card's GpuTargetConfigProto as text, for CUDA 13 and cuDNN 9.10."""
    gpu = chip.gpu
    assert gpu
    major, minor = gpu.capability
    feature = ""
    if major >= 9:
        feature = "feature_extension: ACCELERATED_FEATURES"
    return f"""
gpu_device_info {{
  name: "{chip.device_kinds[0]}"
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  core_count: {gpu.n_multiprocessors} fpus_per_core: {gpu.units} clock_rate_ghz: {gpu.ghz}
  l2_cache_size: {gpu.l2_bytes} device_memory_size: {chip.memory_bytes}
  memory_bandwidth: {round(chip.memory_bandwidth)} shared_memory_per_core: {gpu.shared_bytes}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_bytes_per_block}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {gpu.max_threads}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.device_kinds[0]}"
"""


if __name__ == "__main__":
    main(*sys.argv[1:])

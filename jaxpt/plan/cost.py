"""Plan a run before any device is paid for: memory, speed, hours, money and energy per target."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable

import jax.numpy as jnp

from jaxpt import flops, initialize, io
from jaxpt.config import Config, PlanConfig
from jaxpt.data.teacher_samples import SampleReader
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.hardware import GIB, Chip, Target
from jaxpt.plan import roofline
from jaxpt.plan.roofline import LayerCollectives, StepAnalysis
from jaxpt.spec import ModelSpec, Record, UserError
from jaxpt.stage import read_spec
from jaxpt.text import choose_time_unit, format_significant
from jaxpt.train import teacher
from jaxpt.train.step import DistillSpec
from jaxpt.weights import checkpoint, hub, huggingface
from jaxpt.weights.load import find_base
from jaxpt.xla_settings import choose_variables, format_variables

# Power of host, network and cooling beside the boards: a DGX H100 is rated 10.2 kW for 8 boards of
# 0.7 kW, and boards in training draw some 85 % of their rating.
POWER_OVERHEAD = 1.5

Formatter = Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class RunProjection(Record):
    """Speed and cost of the whole run at one assumed step time."""

    mfu: float  # model FLOPs utilization, 0 to 1
    tokens_per_second: float  # over all devices
    step_seconds: float
    hours: float
    usd: float | None  # None: no price is known
    kwh: float | None  # None: the board's power is not known


@dataclasses.dataclass(frozen=True)
class TargetPlan(Record):
    """The plan of a run on one target."""

    target: str  # as in --on, such as "v5p:4x4x4"
    method: str  # "compiled" or "estimated"
    missing_package: str | None
    n_devices: int
    mesh: dict[str, int]
    attention: str
    fits: bool
    peak_bytes: int  # per device, as all bytes but host_*
    peak_is_lower_bound: bool  # the compiler gave up
    usable_bytes: int  # of a device's memory
    params_bytes: int
    opt_state_bytes: int
    opt_bytes_per_param: float  # of the optimizer's state
    saved_activation_bytes: int
    gathered_expert_bytes: int
    temporary_bytes: int | None  # gradients and activations; None where peak_is_lower_bound
    restore_bytes: int
    export_bytes: int
    host_save_bytes: int  # per host, as all host_*
    host_restore_bytes: int
    host_export_bytes: int
    variables: dict[str, str]  # of the environment, which jaxpt train sets
    flops_per_token: float  # of the model, forward and backward; of a frozen one, forward
    executed_flops_per_token: float  # recomputation included
    loop_body_flops: float | None
    compiler_flops: float | None
    layer_collectives: tuple[LayerCollectives, ...]
    comm_bytes_per_layer: float  # received per device per step
    compute_seconds: float  # per step, matmuls alone at peak speed
    memory_seconds: float  # per step, memory traffic alone
    network_seconds: float  # per step, communication alone
    expected: RunProjection  # in the middle of the assumptions
    slow: RunProjection  # at the low end of matmul efficiency, no transfer overlapped
    fast: RunProjection  # at the high end, transfers overlapped
    efficiency_range: tuple[float, float]  # assumed share of peak FLOP/s for matmuls (low, high)
    efficiency_source: str
    time_calibration: float  # measured / planned step seconds that times were multiplied by
    usd_per_hour: float | None  # per device
    price_source: str
    analysis_seconds: float
    experts: str | None = None  # a mixture's kernel, and why; None: not known without compiling
    frozen_bytes: int = 0  # per device, of the parameters of a teacher or DPO's reference
    overrides: tuple[str, ...] = ()  # found by --search, such as "--config.train.remat=full"


def get_token_budget(settings: Config) -> float:
    """Return the tokens that the run trains on."""
    if settings.plan.tokens:
        return settings.plan.tokens
    train = settings.train
    step_tokens = train.batch_size * settings.pack.seq_len
    return float(train.steps * step_tokens)


def resolve_model_spec(settings: Config) -> tuple[ModelSpec, list[str]]:
    """Return the model that a run of this config trains, growth included, and what is guessed."""
    initialization = settings.initialize
    notes = []
    if initialization.source == "random":
        spec = initialize.make_random_spec(settings.model, settings.tokenizer.vocab_size)
        if not settings.model.vocab_size:
            notes.append(
                "model.vocab_size is 0 (take the tokenizer's): planned with "
                f"tokenizer.vocab_size, {spec.vocab_size:,} when rounded up."
            )
    else:
        spec = read_source_spec(initialization.source, initialization.base)
    operators = list(initialization.grow)
    if settings.train.grow:
        for _, operator in settings.train.grow:
            operators.append(operator)
        notes.append(
            "planned at the size after the last growth of train.grow; the steps before it are "
            "cheaper."
        )
    for operator in operators:
        parent = Parent(spec)
        spec = plan_growth(operator, parent).child
    return spec.replace(lora=initialize.make_lora_spec(settings.lora, spec)), notes


def resolve_distill_spec(settings: Config) -> DistillSpec | None:
    """Return how a run of this config learns from a teacher, of which the sizes alone are read."""
    section = settings.distill
    if not section.teacher:
        return None
    try:
        if teacher.is_sampled(section.teacher):
            counts = SampleReader(section.teacher).counts
            return DistillSpec(section, None, counts.n_samples, counts.vocab_size)
        return DistillSpec(section, read_source_spec(section.teacher))
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from None


def read_source_spec(source: str, base: str = "") -> ModelSpec:
    """Return the architecture of a run, a checkpoint, a Hugging Face directory or hf:NAME."""
    directory = find_base(source, base) or hub.download_model(source)
    step_dir = checkpoint.find_checkpoint(directory)
    if step_dir:
        return read_spec(step_dir / "spec.json").replace(lora=None)  # merged as it is loaded
    return huggingface.read_hf_spec(io.local_copy(directory))


def project_target(
    spec: ModelSpec,
    settings: Config,
    target: Target,
    analysis: StepAnalysis,
    tokens: float,
    time_calibration: float = 1.0,
) -> TargetPlan:
    """Return the plan of a run on one target.

    Args:
        spec: the model.
        settings: the run's config.
        target: hardware.
        analysis: of the step on it.
        tokens: token budget of the run.
        time_calibration: measured / planned step seconds on this kind of device, see check.py.
    """
    chip = target.chip
    n_devices = target.n_devices
    seq_len = settings.pack.seq_len
    batch_tokens = settings.train.batch_size * seq_len
    flops_per_token = flops.count_flops_per_token(spec, seq_len) + analysis.frozen_flops_per_token
    chip_flops = chip.peak_flops(settings.train.compute_dtype)
    peak_flops = n_devices * chip_flops
    usd_per_hour, price_source = resolve_usd_per_hour(chip, settings.plan)
    roof = roofline.compute_roofline(analysis, target, settings.train)

    def project(step_seconds: float) -> RunProjection:
        seconds = step_seconds * time_calibration
        hours = tokens / batch_tokens * seconds / 3600
        device_hours = hours * n_devices
        usd = None
        kwh = None
        if usd_per_hour is not None:
            usd = device_hours * usd_per_hour
        if chip.watts is not None:
            kwh = device_hours * chip.watts / 1000 * POWER_OVERHEAD
        possible_flops = seconds * peak_flops
        mfu = batch_tokens * flops_per_token / possible_flops
        tokens_per_second = batch_tokens / seconds
        return RunProjection(mfu, tokens_per_second, seconds, hours, usd, kwh)

    peak_bytes = analysis.peak_bytes
    params_bytes = analysis.params_bytes
    opt_state_bytes = analysis.opt_state_bytes
    n_params = params_bytes / jnp.dtype(settings.initialize.param_dtype).itemsize
    export_bytes = analysis.export_bytes
    # a checkpoint is written behind the training, from a copy of the state in the hosts' memory
    host_state_bytes = target.devices_per_host * (params_bytes + opt_state_bytes)
    exceeds_memory = analysis.exceeds_memory
    fits = False
    temporary_bytes = None  # not known where the compiler refused the step
    if not exceeds_memory:
        fits = max(peak_bytes, export_bytes) <= target.usable_bytes
        temporary_bytes = peak_bytes - params_bytes - opt_state_bytes - analysis.frozen_bytes
    efficiency = chip.efficiency
    return TargetPlan(
        target=target.name,
        method=analysis.method,
        missing_package=analysis.missing_package,
        n_devices=n_devices,
        mesh=analysis.mesh,
        attention=analysis.attention,
        experts=analysis.experts,
        fits=fits,
        peak_bytes=peak_bytes,
        peak_is_lower_bound=exceeds_memory,
        usable_bytes=target.usable_bytes,
        params_bytes=params_bytes,
        opt_state_bytes=opt_state_bytes,
        frozen_bytes=analysis.frozen_bytes,
        opt_bytes_per_param=opt_state_bytes / n_params,
        saved_activation_bytes=analysis.saved_activation_bytes,
        gathered_expert_bytes=analysis.gathered_expert_bytes,
        temporary_bytes=temporary_bytes,
        restore_bytes=analysis.restore_bytes,
        export_bytes=export_bytes,
        host_save_bytes=host_state_bytes,
        host_restore_bytes=min(host_state_bytes, checkpoint.CHUNK_BYTES),
        host_export_bytes=export_bytes - params_bytes,
        variables=choose_variables(chip.platform, chip, os.environ),
        flops_per_token=flops_per_token,
        executed_flops_per_token=analysis.executed_flops / batch_tokens,
        loop_body_flops=analysis.loop_body_flops,
        compiler_flops=analysis.compiler_flops,
        layer_collectives=analysis.layer_collectives,
        comm_bytes_per_layer=sum(analysis.comm_bytes.values()) / max(spec.n_layers, 1),
        compute_seconds=roof.compute_seconds,
        memory_seconds=roof.memory_seconds,
        network_seconds=roof.network_seconds,
        expected=project(roof.expected_seconds),
        slow=project(roof.slow_seconds),
        fast=project(roof.fast_seconds),
        efficiency_range=(efficiency.low, efficiency.high),
        efficiency_source=efficiency.source,
        time_calibration=time_calibration,
        usd_per_hour=usd_per_hour,
        price_source=price_source,
        analysis_seconds=analysis.analysis_seconds,
    )


def resolve_usd_per_hour(chip: Chip, plan: PlanConfig) -> tuple[float | None, str]:
    """Return the price per device and hour in US dollars, and whose price it is."""
    if plan.usd_per_hour:
        return plan.usd_per_hour, "config.plan.usd_per_hour"
    return chip.usd_per_hour, chip.price_source


# ---- on the terminal


def make_column(plan: TargetPlan) -> dict[str, str]:
    """Return label -> cell of one target."""
    bound = "> " if plan.peak_is_lower_bound else ""
    mfu = format_range([plan.slow.mfu, plan.fast.mfu], "{:.0%}".format)
    efficiency = format_range(list(plan.efficiency_range), "{:.0%}".format)

    def span(get: Callable[[RunProjection], float | None], format_value: Formatter) -> str:
        return format_range([get(plan.slow), get(plan.fast)], format_value)

    experts = {}
    if plan.gathered_expert_bytes:
        experts["  gathered experts of a layer"] = format_memory(plan.gathered_expert_bytes)
    frozen = {}
    if plan.frozen_bytes:
        frozen["teacher or reference"] = format_memory(plan.frozen_bytes)
    return {
        "method": format_method(plan),
        "devices": f"{plan.n_devices:,}",
        "mesh": format_mesh(plan.mesh),
        "parameters": format_memory(plan.params_bytes),
        "optimizer state": format_memory(plan.opt_state_bytes),
        "  bytes per parameter": f"{plan.opt_bytes_per_param:.3g}",
        **frozen,
        "gradients, activations": format_memory(plan.temporary_bytes),
        "  saved activations, about": format_memory(plan.saved_activation_bytes),
        **experts,
        "peak per device": bound + format_memory(plan.peak_bytes),
        "  while restoring": format_memory(plan.restore_bytes),
        "  while exporting": format_memory(plan.export_bytes),
        "  per host, saving": format_memory(plan.host_save_bytes),
        "  per host, restoring": format_memory(plan.host_restore_bytes),
        "  per host, exporting": format_memory(plan.host_export_bytes),
        "memory per device": format_memory(plan.usable_bytes),
        "fits": format_fit(plan),
        "FLOPs per token, model": f"{plan.flops_per_token:.3g}",
        "FLOPs per token, executed": f"{plan.executed_flops_per_token:.3g}",
        "FLOPs, each loop body once": format_flops(plan.loop_body_flops),
        "  by the compiler": format_flops(plan.compiler_flops),
        "step at full speed: matmuls, s": format_significant(plan.compute_seconds),
        "  memory, s": format_significant(plan.memory_seconds),
        "  links, s": format_significant(plan.network_seconds),
        "assumed efficiency": efficiency,
        "expected MFU": mfu,
        "step, s": span(lambda run: run.step_seconds, format_significant),
        "tokens/s": span(lambda run: run.tokens_per_second, format_significant),
        "time": format_hours([plan.slow.hours, plan.fast.hours]),
        "usd": span(lambda run: run.usd, format_cents),
        "kWh": span(lambda run: run.kwh, format_cents),
    }


def format_mesh(mesh: dict[str, int]) -> str:
    """Return the axes with more than one device, such as "fsdp 16 x tensor 4"."""
    axes = [f"{axis} {size}" for axis, size in mesh.items() if size > 1]
    return " x ".join(axes) or "one device"


def format_method(plan: TargetPlan) -> str:
    """Return how the numbers were found."""
    if plan.missing_package:
        return "estimated, not compiled"
    if plan.peak_is_lower_bound:
        return "refused by the compiler"
    return "compiled"


def format_fit(plan: TargetPlan) -> str:
    """Return whether the step fits, and by how much."""
    spare = (plan.usable_bytes - plan.peak_bytes) / GIB
    if plan.fits:
        return f"yes, {spare:.1f} GiB to spare"
    bound = "at least " if plan.peak_is_lower_bound else ""
    return f"no, {bound}{-spare:.1f} GiB too much"


def format_memory(n_bytes: float | None) -> str:
    """Return bytes in GiB, or in MiB below 0.1 GiB."""
    if n_bytes is None:
        return "unknown"
    if n_bytes >= GIB / 10:
        return f"{n_bytes / GIB:.2f} GiB"
    return f"{n_bytes / 2**20:.1f} MiB"


def format_flops(n: float | None) -> str:
    """Return a count with three digits."""
    if n is None:
        return "unknown"
    return f"{n:.3g}"


def format_range(ends: list[float | None], format_value: Formatter) -> str:
    """Return both ends of a range, smaller first; one if they read the same."""
    values = sorted(end for end in ends if end is not None)
    if not values:
        return "unknown"
    return " to ".join(dict.fromkeys(map(format_value, values)))


def format_hours(ends: list[float | None]) -> str:
    """Return a range of hours in a unit in which its larger end is at least 1: "2 to 7 minutes"."""
    unit, per_hour = choose_time_unit(ends)
    return f"{format_range(ends, lambda end: format_significant(per_hour * end))} {unit}"


def format_cents(n: float) -> str:
    """Return an amount to a hundredth, "< 0.01", or whole numbers from 100 on."""
    if 0 < n < 0.005:
        return "< 0.01"
    return f"{n:,.2f}" if n < 100 else f"{n:,.0f}"


def abbreviate_count(n: float) -> str:
    """Return 40,265,318,400 as "40.3B"."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if n >= unit:
            return f"{n / unit:.3g}{letter}"
    return f"{n:,.0f}"


def collect_assumptions(plans: Iterable[TargetPlan]) -> tuple[str, ...]:
    """Return what the plans rest on, each sentence once: targets of one chip share some."""
    notes: dict[str, None] = {}
    for plan in plans:
        notes |= dict.fromkeys(describe_assumptions(plan))
    return tuple(notes)


def describe_assumptions(plan: TargetPlan) -> list[str]:
    """Return the assumptions of one plan, its price with the date, and what its layers move."""
    name = plan.target
    chip = name.partition(":")[0]
    low, high = plan.efficiency_range
    notes = [
        f"{chip}: matmuls are assumed to run at {low:.0%} to {high:.0%} {plan.efficiency_source}."
    ]
    notes.append("FLOPs and MFU count each sequence as one document; several take less attention.")
    if chip == "cpu":
        notes.append("cpu: a device stands for one core with 4 GiB.")
    if plan.time_calibration != 1:
        notes.append(
            f"{name}: times are multiplied by {plan.time_calibration:.3g}, from a measured run."
        )
    if plan.layer_collectives:
        collectives = format_collectives(plan.layer_collectives)
        notes.append(f"{name}: each layer runs {collectives} (forward; backward).")
    elif plan.n_devices > 1:
        notes.append(
            f"{name}: each layer moves {plan.comm_bytes_per_layer / 1e6:,.0f} MB to each device "
            "per step, by arithmetic."
        )
    matmul_seconds = plan.compute_seconds / high
    if plan.network_seconds > matmul_seconds:
        notes.append(
            f"{name}: communication takes {plan.network_seconds:.3g} s per step, the matmuls "
            f"{matmul_seconds:.3g} s: it is the bottleneck. A larger train.batch_size, a smaller "
            "train.grad_accum_steps or weights sharded over fewer devices help."
        )
    if plan.usd_per_hour is None:
        notes.append(
            f"{chip}: {plan.price_source}. Give yours: --config.plan.usd_per_hour=PRICE "
            "(per device and hour)."
        )
    else:
        notes.append(
            f"{chip}: {plan.usd_per_hour:.2f} usd per device and hour ({plan.price_source})."
        )
    if plan.missing_package:
        notes.append(
            f"{chip}: estimated, not compiled: install {plan.missing_package} to compile. "
            "Parameters and optimizer state are exact, the rest to about 25 %."
        )
    if plan.experts:
        notes.append(f"{name}: experts run by {plan.experts}.")
    if plan.variables:
        variables = format_variables(plan.variables)
        notes.append(f"{chip}: jaxpt train sets {variables}.")
    return notes


def format_collectives(layers: tuple[LayerCollectives, ...]) -> str:
    """Return, such as, "4 all-gather 436 MB; 9 reduce-scatter 1,308 MB"."""
    texts = []
    for counts in layers:
        parts = []
        for kind, count in sorted(counts.items()):
            parts.append(f"{count.n_ops} {kind} {count.n_bytes / 1e6:,.0f} MB")
        texts.append(", ".join(parts) or "none")
    return "; ".join(texts)

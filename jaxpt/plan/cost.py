"""Plan a run before any device is paid for: memory, speed, hours, money and energy per target."""

from __future__ import annotations

import dataclasses
import logging

from jaxpt import initialize
from jaxpt.config import Config, PlanConfig
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import transformer
from jaxpt.plan import compile, flops, format, hardware, layouts, roofline
from jaxpt.plan.hardware import DEFAULT_MEM_FRAC, Chip, Target
from jaxpt.plan.records import (
    PlannedModel,
    RunProjection,
    StepAnalysis,
    TargetPlan,
    TrainingPlan,
)
from jaxpt.spec import ModelSpec
from jaxpt.weights import checkpoint, hub, huggingface

log = logging.getLogger(__name__)

ORBAX_RESTORE_BYTES = 96 * 10**9  # that Orbax 0.12 reads into a host's memory at a time
# Power of host, network and cooling beside the boards: a DGX H100 is rated 10.2 kW for 8 boards of
# 0.7 kW, and boards in training draw some 85 % of their rating.
POWER_OVERHEAD = 1.5


def plan_targets(
    settings: Config, target_names: list[str], calibrations: dict[str, float] | None = None
) -> TrainingPlan:
    """Return the plan of a config on each target.

    Args:
        settings: the run's config.
        target_names: as in --on.
        calibrations: chip -> measured / planned step seconds, see check.py.

    Raises:
        UserError: a chip is unknown, a slice is not offered, or a target cannot divide the sizes.
    """
    targets = [hardware.parse_target(name) for name in target_names]
    spec, _ = resolve_model_spec(settings)
    header = make_plan_header(settings)
    tokens = get_token_budget(settings)
    calibrations = calibrations or {}
    plans: list[TargetPlan] = []
    notes = list(header.notes)
    for target in targets:
        name = target.name
        missing = compile.find_missing_package(target)
        if missing:
            log.warning(f"plan: {name}: estimating; to compile, install {missing}")
        else:
            log.info(f"plan: {name}: compiling the train step ...")
        analysis = compile.analyze_step(spec, settings, target)
        outcome = analysis.method
        if analysis.exceeds_memory:
            outcome = "refused by the compiler"
        log.info(f"plan: {name}: {outcome} in {analysis.analysis_seconds:.0f} s")
        calibration = calibrations.get(target.chip.name, 1.0)
        plan = project_target(spec, settings, target, analysis, tokens, calibration)
        plans.append(plan)
        if not plan.fits:
            suggestion = layouts.suggest_layout(spec, settings, target)
            notes.append(f"{name}: {suggestion}")
    notes += format.collect_assumptions(plans)
    return dataclasses.replace(header, targets=tuple(plans), notes=tuple(notes))


def make_plan_header(settings: Config) -> TrainingPlan:
    """Return a plan without targets."""
    spec, notes = resolve_model_spec(settings)
    tokens = get_token_budget(settings)
    model = PlannedModel(
        n_params=transformer.count_params(spec),
        seq_len=settings.pack.seq_len,
        batch_size=settings.train.batch_size,
        grad_accum_steps=settings.train.grad_accum_steps,
        spec=spec,
    )
    return TrainingPlan(model=model, tokens=tokens, notes=tuple(notes))


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
        spec = read_source_spec(initialization.source)
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
    return spec, notes


def read_source_spec(source: str) -> ModelSpec:
    """Return the architecture of a run, a checkpoint, a Hugging Face directory or hf:NAME."""
    directory = hub.download_model(source)
    step_dir = checkpoint.find_checkpoint(directory)
    if step_dir:
        return ModelSpec.load(step_dir / "spec.json")
    return huggingface.read_hf_spec(directory)


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
    flops_per_token = flops.count_flops_per_token(spec, seq_len)
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
    export_bytes = analysis.export_bytes
    # a checkpoint is written behind the training, from a copy of the state in the hosts' memory
    host_state_bytes = target.devices_per_host * analysis.restore_bytes
    exceeds_memory = analysis.exceeds_memory
    fits = False
    temporary_bytes = None  # not known where the compiler refused the step
    if not exceeds_memory:
        fits = max(peak_bytes, export_bytes) <= target.usable_bytes
        temporary_bytes = peak_bytes - params_bytes - opt_state_bytes
    default_bytes = chip.memory_bytes * DEFAULT_MEM_FRAC
    exceeds_default = peak_bytes > default_bytes
    efficiency = chip.efficiency
    return TargetPlan(
        target=target.name,
        method=analysis.method,
        missing_package=analysis.missing_package,
        n_devices=n_devices,
        mesh=analysis.mesh,
        attention=analysis.attention,
        fits=fits,
        peak_bytes=peak_bytes,
        peak_is_lower_bound=exceeds_memory,
        usable_bytes=target.usable_bytes,
        params_bytes=params_bytes,
        opt_state_bytes=opt_state_bytes,
        saved_activation_bytes=analysis.saved_activation_bytes,
        temporary_bytes=temporary_bytes,
        restore_bytes=analysis.restore_bytes,
        export_bytes=export_bytes,
        host_save_bytes=host_state_bytes,
        host_restore_bytes=min(host_state_bytes, ORBAX_RESTORE_BYTES),
        host_export_bytes=export_bytes - params_bytes,
        needs_mem_fraction=chip.platform == "cuda" and exceeds_default,
        flops_per_token=flops_per_token,
        executed_flops_per_token=analysis.executed_flops / batch_tokens,
        loop_body_flops=analysis.loop_body_flops,
        compiler_flops=analysis.compiler_flops,
        layer_collectives=analysis.layer_collectives,
        comm_bytes_per_layer=analysis.comm_bytes / max(spec.n_layers, 1),
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

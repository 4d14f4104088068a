"""Search mesh, micro-batch and remat: estimate all, compile from the best down until one fits."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import NamedTuple, cast

from jax.sharding import Mesh

from jaxpt import hardware, sharding
from jaxpt.config import Config, MeshConfig
from jaxpt.hardware import GIB, Target
from jaxpt.plan import compile, cost, roofline
from jaxpt.plan.cost import TargetPlan, format_cents, format_hours, format_mesh
from jaxpt.plan.roofline import StateBytes, StepAnalysis
from jaxpt.spec import ModelSpec, Record, UserError
from jaxpt.train import step

log = logging.getLogger(__name__)

REMAT_POLICIES = ("none", "dots", "minimal", "full")
# share of the memory to stay below by arithmetic alone: the compilers came within a few percent
SAFE_MEMORY_FRAC = 0.95
MAX_EXPERT_SHARDS = 16  # rows are kept for each of their devices' tokens
ESTIMATE_ERROR_FRAC = 0.25  # of roofline.estimate_temporary_bytes against the compilers
MAX_COMPILED = 4  # per target; an 8B step takes half a minute and more


@dataclasses.dataclass(frozen=True)
class LayoutSearch(Record):
    """Result of --search; the best layout of each target is in TrainingPlan.targets."""

    cheapest: TargetPlan | None  # None: nothing fits, or has a price
    fastest: TargetPlan | None  # None: nothing fits
    n_tried: int  # layouts estimated
    n_compiled: int
    unrolled: tuple[str, ...] = ()  # a sentence per target whose best layout was compiled so too


def search_layouts(
    settings: Config, target_names: list[str], calibrations: dict[str, float]
) -> tuple[tuple[TargetPlan, ...], LayoutSearch]:
    """Return the plan of each target's best layout, and the best of all.

    Sequences and tokens per step stay as in the config. Targets that nothing fits are left out.

    Raises:
        UserError: a target is unknown.
    """
    targets = [hardware.parse_target(name) for name in target_names]
    spec, _ = cost.resolve_model_spec(settings)
    tokens = cost.get_token_budget(settings)
    plans: list[TargetPlan] = []
    unrolled: list[str] = []
    n_tried = n_compiled = 0
    for target in targets:
        candidates = list_layouts(spec, settings, target)
        best, n_compiled_here = find_fitting_layout(spec, target, candidates)
        n_tried += len(candidates)
        n_compiled += n_compiled_here
        if best is None:
            suggestion = suggest_layout(spec, settings, target)
            log.warning(
                f"search: {target.name}: none of {len(candidates):,} layouts fits. {suggestion}"
            )
            continue
        if can_unroll(target, best):
            unrolled.append(compare_unrolled(spec, target, best))
            n_compiled += 1
        calibration = calibrations.get(target.chip.name, 1.0)
        plan = cost.project_target(spec, best.settings, target, best.analysis, tokens, calibration)
        overrides = list_overrides(settings, best.settings)
        plans.append(dataclasses.replace(plan, overrides=tuple(overrides)))
    priced = [plan for plan in plans if plan.expected.usd is not None]
    return tuple(plans), LayoutSearch(
        cheapest=min(priced, key=lambda plan: plan.expected.usd or 0.0, default=None),
        fastest=min(plans, key=lambda plan: plan.expected.hours, default=None),
        n_tried=n_tried,
        n_compiled=n_compiled,
        unrolled=tuple(unrolled),
    )


def find_fitting_layout(
    spec: ModelSpec, target: Target, candidates: list[Layout]
) -> tuple[Layout | None, int]:
    """Return the fastest layout that the compiler confirms, and how many were compiled.

    Without the compiler's package, arithmetic decides.
    """
    missing = compile.find_missing_package(target)
    usable_bytes = target.usable_bytes
    # until something was compiled, drop only what needs more than the estimate can be wrong by
    limit = usable_bytes if missing else usable_bytes * (1 + ESTIMATE_ERROR_FRAC)
    correction = 1.0  # compiled peak / estimated peak, once a layout did not fit
    for n_compiled in range(MAX_COMPILED):
        candidates = select_fitting(candidates, limit / correction)
        if not candidates:
            return None, n_compiled
        best = choose_layout(candidates)
        if missing:
            analysis = dataclasses.replace(best.analysis, missing_package=missing)
            return best._replace(analysis=analysis), n_compiled
        compiled = compile_layout(spec, target, best)
        if compiled.fits(usable_bytes):
            return compiled, n_compiled + 1
        correction = max(correction, measure_correction(best, compiled, usable_bytes))
        limit = usable_bytes
    return None, MAX_COMPILED


def compile_layout(spec: ModelSpec, target: Target, layout: Layout) -> Layout:
    """Return the layout as the compiler finds it, and log whether it fits."""
    log.info(f"search: {target.name}: compiling")
    log.info(f"  {format_layout(layout)}")
    compiled = layout._replace(analysis=compile.analyze_step(spec, layout.settings, target))
    verdict = "fits" if compiled.fits(target.usable_bytes) else "does not fit"
    memory = f"{compiled.required_bytes / GIB:.1f} of {target.usable_bytes / GIB:.1f} GiB"
    log.info(f"  {verdict}: {memory} ({compiled.analysis.analysis_seconds:.0f} s)")
    return compiled


def can_unroll(target: Target, best: Layout) -> bool:
    """Return whether unrolled layers are a choice: on GPUs, whose runs publish a gain."""
    is_compiled = best.analysis.missing_package is None
    return target.chip.platform == "cuda" and is_compiled and not best.settings.train.unroll_layers


def compare_unrolled(spec: ModelSpec, target: Target, loop: Layout) -> str:
    """Return a sentence that compares a layout's loop over layers with all of them unrolled."""
    n_layers = spec.n_layers
    train = dataclasses.replace(loop.settings.train, unroll_layers=n_layers)
    settings = dataclasses.replace(loop.settings, train=train)
    unrolled = compile_layout(spec, target, loop._replace(settings=settings))
    memory = unrolled.required_bytes / GIB - loop.required_bytes / GIB
    seconds, loop_seconds = (each.analysis.analysis_seconds for each in (unrolled, loop))
    compared = f"it takes {memory:+.1f} GiB and compiles in {seconds:.0f} s, not {loop_seconds:.0f}"
    text = f"{target.name}: with all {n_layers} layers unrolled {compared}"
    if not unrolled.fits(target.usable_bytes):
        return f"{text}; it does not fit."
    return (
        f"{text}. Published runs on GPUs up to 8B do so; a loop costs them 3 to 8 %: "
        f"--config.train.unroll_layers={n_layers}"
    )


def measure_correction(estimated: Layout, compiled: Layout, usable_bytes: int) -> float:
    """Return by how much the estimate of a layout that did not fit is multiplied.

    A refused program's number is no peak: then only what needs a tenth less is tried.
    """
    if compiled.analysis.exceeds_memory:
        return 1.1 * usable_bytes / estimated.required_bytes
    return compiled.analysis.peak_bytes / estimated.analysis.peak_bytes


def format_search(plans: tuple[TargetPlan, ...], search: LayoutSearch) -> str:
    """Return the overrides to paste: of each target, then of the best ones."""
    lines = [f"{search.n_tried:,} layouts estimated, {search.n_compiled} compiled"]
    lines.append("best of each target:")
    for plan in plans:
        lines.append(f"  {format_flags(plan)}")
    for name, plan in (("cheapest", search.cheapest), ("fastest", search.fastest)):
        if plan is None:
            lines.append(f"{name}: nothing fits{' and has a price' if name == 'cheapest' else ''}")
            continue
        usd = plan.expected.usd
        price = "" if usd is None else f", {format_cents(usd)} usd"
        lines.append(f"{name}: {format_hours([plan.expected.hours])}{price} ({plan.method})")
        lines.append(f"  {format_flags(plan)}")
    return "\n".join([*lines, *search.unrolled])


def format_flags(plan: TargetPlan) -> str:
    """Return the flags that select a target and its layout."""
    overrides = " ".join(plan.overrides) or "(the config as it is)"
    return f"--on {plan.target} {overrides}"


# ---- layouts, by arithmetic


class Layout(NamedTuple):
    """Settings with a mesh, micro-batch and remat, and what is known of their step."""

    settings: Config
    analysis: StepAnalysis
    step_seconds: float  # expected

    @property
    def required_bytes(self) -> int:
        """Memory that one device needs."""
        return max(self.analysis.peak_bytes, self.analysis.export_bytes)

    def fits(self, usable_bytes: int) -> bool:
        """Return whether one device's memory holds it, as far as is known."""
        return not self.analysis.exceeds_memory and self.required_bytes <= usable_bytes

    @property
    def n_sharded_axes(self) -> int:
        """Axes of the mesh with more than one device."""
        return sum(size > 1 for size in self.analysis.mesh.values())


class MeshShape(NamedTuple):
    """What sharding.check_mesh_divides reads of a mesh."""

    shape: dict[str, int]


def list_layouts(spec: ModelSpec, settings: Config, target: Target) -> list[Layout]:
    """Return every layout that the target's devices can be sharded for.

    Sequences and tokens per step stay as in the config.
    """
    batch_size, seq_len = settings.train.batch_size, settings.pack.seq_len
    sizes = dataclasses.asdict(settings.mesh)
    # axes that the config leaves open stay open: one recipe for any number of devices
    open_axes = {axis: -1 for axis, size in sizes.items() if size == -1}
    state = roofline.count_state_bytes(spec, settings.optim, settings.initialize.param_dtype)
    frozen = step.find_frozen_spec(spec, settings.train, cost.resolve_distill_spec(settings))
    models = [model for model in (spec, frozen) if model]
    layouts = []
    for mesh in iterate_meshes(spec, seq_len, target):
        shape = dataclasses.asdict(mesh)
        mesh = dataclasses.replace(mesh, **open_axes)
        for grad_accum_steps in list_divisors(batch_size):
            batch = (batch_size, grad_accum_steps, seq_len)
            if not all(can_shard(shape, model, *batch) for model in models):
                continue
            for remat in REMAT_POLICIES:
                train = dataclasses.replace(
                    settings.train, grad_accum_steps=grad_accum_steps, remat=remat
                )
                changed = dataclasses.replace(settings, mesh=mesh, train=train)
                layouts.append(estimate_layout(spec, state, changed, target, shape, frozen))
    return layouts


def iterate_meshes(spec: ModelSpec, seq_len: int, target: Target) -> Iterator[MeshConfig]:
    """Yield meshes: fsdp over what the others leave, one replica or one per GPU host."""
    n_hosts = 1
    if target.chip.platform == "cuda":
        n_hosts = max(target.n_devices // hardware.GPUS_PER_HOST, 1)
    n_replicas = sorted({1, n_hosts})
    tensor_sizes = list_divisors(spec.n_kv_heads)
    expert_sizes = [n for n in list_divisors(spec.n_experts or 1) if n <= MAX_EXPERT_SHARDS]
    sizes = itertools.product(n_replicas, expert_sizes, tensor_sizes, (1, 2, 4, 8))
    for replica, expert, tensor, context in sizes:
        fsdp, rest = divmod(target.n_devices, replica * expert * tensor * context)
        if rest == 0 and seq_len % context**2 == 0:
            yield MeshConfig(replica, fsdp, expert, tensor, context)


def can_shard(
    shape: dict[str, int], spec: ModelSpec, batch_size: int, accum_steps: int, seq_len: int
) -> bool:
    """Return whether a mesh divides the sizes of the model and its micro-batches."""
    mesh = cast(Mesh, MeshShape(shape))  # all that the check reads
    try:
        sharding.check_mesh_divides(mesh, spec, batch_size, accum_steps, seq_len)
    except UserError:
        return False
    return True


def estimate_layout(
    spec: ModelSpec,
    state: StateBytes,
    settings: Config,
    target: Target,
    shape: dict[str, int],
    frozen: ModelSpec | None = None,
) -> Layout:
    """Return a layout with its estimated memory and step time."""
    train, seq_len = settings.train, settings.pack.seq_len
    attention = roofline.predict_attention_backend(spec, seq_len, train, shape, target)
    analysis = roofline.estimate_step(spec, state, train, seq_len, shape, attention)
    if frozen:
        analysis = roofline.add_frozen(analysis, spec, frozen, train, seq_len)
    roof = roofline.compute_roofline(analysis, target, train)
    return Layout(settings, analysis, roof.expected_seconds)


def choose_layout(layouts: list[Layout]) -> Layout:
    """Return the fastest layout, but for differences that arithmetic cannot resolve.

    A mesh with fewer sharded axes goes before one that is less than 5 % faster; of layouts within
    2 %, the one that needs the least memory is taken.
    """
    near = select_fast(layouts, 1.05)
    fewest_axes = min(layout.n_sharded_axes for layout in near)
    simple = [layout for layout in near if layout.n_sharded_axes == fewest_axes]
    return min(select_fast(simple, 1.02), key=lambda layout: layout.required_bytes)


def select_fast(layouts: list[Layout], factor: float) -> list[Layout]:
    """Return the layouts that take at most `factor` times the fastest one's time."""
    limit = factor * min(layout.step_seconds for layout in layouts)
    return [layout for layout in layouts if layout.step_seconds <= limit]


def select_fitting(layouts: list[Layout], n_bytes: float) -> list[Layout]:
    """Return the layouts that need at most `n_bytes` per device."""
    return [layout for layout in layouts if layout.required_bytes <= n_bytes]


def suggest_layout(spec: ModelSpec, settings: Config, target: Target) -> str:
    """Return a sentence for a step that does not fit.

    It names the overrides with which this target fits it, else the smallest target of the chip
    that does, else the longest sequences that one does. What arithmetic finds is compiled where the
    compiler is here, and what that refuses teaches how much more it needs.
    """
    chip = target.chip
    candidates = hardware.list_target_names(chip)
    can_compile = compile.find_missing_package(target) is None
    correction = 1.0  # needed / estimated bytes, of layouts that did not fit
    n_compiled = 0
    for name in dict.fromkeys([target.name, *candidates]):
        candidate = hardware.parse_target(name)
        layouts = list_layouts(spec, settings, candidate)
        usable_bytes = candidate.usable_bytes
        while fitting := select_safely_fitting(layouts, usable_bytes / correction):
            best = choose_layout(fitting)
            if not can_compile or n_compiled == MAX_COMPILED:
                source = "By arithmetic"
                if n_compiled:
                    source = f"By arithmetic, after {n_compiled} compiled steps that do not fit,"
                return describe_suggestion(source, settings, target, candidate, best)
            compiled = compile_layout(spec, candidate, best)
            n_compiled += 1
            if compiled.fits(usable_bytes):
                return describe_suggestion("Compiled,", settings, target, candidate, compiled)
            correction = max(correction, measure_correction(best, compiled, usable_bytes))
    none_fits = (
        f"By arithmetic no number of {chip.name} fits a step of {settings.train.batch_size:,} "
        f"sequences of {settings.pack.seq_len:,} tokens"
    )
    shorter = settings
    while shorter.pack.seq_len % 2 == 0 and shorter.pack.seq_len > 8:
        shorter = halve_sequences(shorter)
        for name in candidates:
            candidate = hardware.parse_target(name)
            layouts = list_layouts(spec, shorter, candidate)
            if select_fitting(layouts, candidate.usable_bytes):
                overrides = " ".join(list_overrides(settings, shorter))
                return (
                    f"{none_fits}; the same tokens in sequences of {shorter.pack.seq_len:,} "
                    f"fit {name}: {overrides}."
                )
    return f"{none_fits}; a smaller model does."


def select_safely_fitting(layouts: list[Layout], n_bytes: float) -> list[Layout]:
    """Return the layouts that fit by arithmetic with something to spare, else that just fit."""
    return select_fitting(layouts, SAFE_MEMORY_FRAC * n_bytes) or select_fitting(layouts, n_bytes)


def describe_suggestion(
    source: str, settings: Config, target: Target, found: Target, layout: Layout
) -> str:
    """Return a sentence that names a layout that fits, on the target or another of its chip.

    Args:
        source: how it is known, such as "By arithmetic".
        settings: those that do not fit.
        target: where they do not.
        found: where the layout does.
        layout: the layout.
    """
    overrides = " ".join(list_overrides(settings, layout.settings))
    fits = f"{found.name} fits it"
    if found.name != target.name:
        fits = f"the smallest {target.chip.name} that fits is {found.name}"
    memory = f"{layout.required_bytes / GIB:.1f} of {found.usable_bytes / GIB:.1f} GiB per device"
    ending = f": {overrides}" if overrides else ""
    return f"{source} {fits}, with {memory}{ending}."


def halve_sequences(settings: Config) -> Config:
    """Return the settings with sequences of half the length, and twice as many of them."""
    pack = dataclasses.replace(settings.pack, seq_len=settings.pack.seq_len // 2)
    train = dataclasses.replace(settings.train, batch_size=2 * settings.train.batch_size)
    return dataclasses.replace(settings, pack=pack, train=train)


def list_overrides(before: Config, after: Config) -> list[str]:
    """Return the command-line overrides that turn one config into the other."""
    overrides = []
    for name in ("pack", "mesh", "train"):
        old, new = getattr(before, name), getattr(after, name)
        for knob in dataclasses.fields(new):
            value = getattr(new, knob.name)
            if value != getattr(old, knob.name):
                overrides.append(f"--config.{name}.{knob.name}={value}")
    return overrides


def format_layout(layout: Layout) -> str:
    """Return the mesh and the searched knobs in words."""
    train = layout.settings.train
    mesh = format_mesh(layout.analysis.mesh)
    unrolled = f", {train.unroll_layers} layers unrolled" if train.unroll_layers else ""
    return f"{mesh}, grad_accum_steps {train.grad_accum_steps}, remat {train.remat}{unrolled}"


def list_divisors(n: int) -> list[int]:
    """Return the divisors of n, smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]

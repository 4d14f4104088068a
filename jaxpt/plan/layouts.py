"""Enumerate the layouts of a step on a target: meshes, micro-batches, remat, each by arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

from jaxpt import sharding
from jaxpt.config import Config, MeshConfig
from jaxpt.plan import flops, hardware, roofline
from jaxpt.plan.hardware import GIB, Target
from jaxpt.plan.records import StepAnalysis
from jaxpt.spec import ModelSpec, UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

REMAT_POLICIES = ("none", "dots", "minimal", "full")
# share of the memory to stay below by arithmetic alone: the compilers came within a few percent
SAFE_MEMORY_FRAC = 0.95


class Layout(NamedTuple):
    """Settings with a mesh, micro-batch and remat, and what is known of their step."""

    settings: Config
    analysis: StepAnalysis
    step_seconds: float  # expected

    @property
    def required_bytes(self) -> int:
        """Memory that one device needs."""
        return max(self.analysis.peak_bytes, self.analysis.export_bytes)

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
    layouts = []
    for mesh in iterate_meshes(spec, seq_len, target):
        shape = dataclasses.asdict(mesh)
        mesh = dataclasses.replace(mesh, **open_axes)
        for grad_accum_steps in list_divisors(batch_size):
            if not can_shard(shape, spec, batch_size, grad_accum_steps, seq_len):
                continue
            for remat in REMAT_POLICIES:
                train = dataclasses.replace(
                    settings.train, grad_accum_steps=grad_accum_steps, remat=remat
                )
                changed = dataclasses.replace(settings, mesh=mesh, train=train)
                layouts.append(estimate_layout(spec, changed, target, shape))
    return layouts


def iterate_meshes(spec: ModelSpec, seq_len: int, target: Target) -> Iterator[MeshConfig]:
    """Yield meshes: fsdp over what tensor and context leave, one replica or one per GPU host."""
    n_hosts = 1
    if target.chip.platform == "cuda":
        n_hosts = max(target.n_devices // hardware.GPUS_PER_HOST, 1)
    n_replicas = sorted({1, n_hosts})
    tensor_sizes = list_divisors(spec.n_kv_heads)
    for replica, tensor, context in itertools.product(n_replicas, tensor_sizes, (1, 2, 4, 8)):
        fsdp, rest = divmod(target.n_devices, replica * tensor * context)
        if rest == 0 and seq_len % context**2 == 0:
            yield MeshConfig(replica, fsdp, tensor, context)


def can_shard(
    shape: dict[str, int], spec: ModelSpec, batch_size: int, accum_steps: int, seq_len: int
) -> bool:
    """Return whether a mesh divides the sizes of the model and its micro-batches."""
    mesh = cast("Mesh", MeshShape(shape))  # all that the check reads
    try:
        sharding.check_mesh_divides(mesh, spec, batch_size, accum_steps, seq_len)
    except UserError:
        return False
    return True


def estimate_layout(
    spec: ModelSpec, settings: Config, target: Target, shape: dict[str, int]
) -> Layout:
    """Return a layout with its estimated memory and step time."""
    attention = hardware.predict_attention_backend(settings, target)
    analysis = flops.estimate_step(spec, settings, shape, attention)
    roof = roofline.compute_roofline(analysis, target, settings.train)
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
    """Return a sentence for a step that does not fit, by arithmetic.

    It names the overrides with which this target fits it, else the smallest target of the chip
    that does, else the longest sequences that one does.
    """
    chip = target.chip
    candidates = hardware.list_target_names(chip)
    for name in (target.name, *candidates):
        candidate = hardware.parse_target(name)
        layouts = list_layouts(spec, settings, candidate)
        usable_bytes = candidate.usable_bytes
        fitting = select_fitting(layouts, SAFE_MEMORY_FRAC * usable_bytes)
        fitting = fitting or select_fitting(layouts, usable_bytes)
        if not fitting:
            continue
        best = choose_layout(fitting)
        overrides = " ".join(list_overrides(settings, best.settings))
        fits = f"{name} fits it"
        if name != target.name:
            fits = f"the smallest {chip.name} that fits is {name}"
        memory = f"{best.required_bytes / GIB:.1f} of {usable_bytes / GIB:.1f} GiB per device"
        ending = f": {overrides}" if overrides else ""
        return f"By arithmetic {fits}, with {memory}{ending}."
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
    return f"{mesh}, grad_accum_steps {train.grad_accum_steps}, remat {train.remat}"


def format_mesh(mesh: dict[str, int]) -> str:
    """Return the axes with more than one device, such as "fsdp 16 x tensor 4"."""
    axes = [f"{axis} {size}" for axis, size in mesh.items() if size > 1]
    return " x ".join(axes) or "one device"


def list_divisors(n: int) -> list[int]:
    """Return the divisors of n, smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]

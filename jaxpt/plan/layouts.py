"""The ways to lay a step out on a target: meshes, micro-batches and what backward keeps, each by arithmetic alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxpt import config, sharding
from jaxpt.config import Config
from jaxpt.plan import flops, hardware, roofline
from jaxpt.spec import ModelSpec, UserError

REMAT_POLICIES = ("none", "dots", "minimal", "full")
SAFE_MEMORY_FRAC = 0.95  # share of the memory that arithmetic alone had better stay below: the compilers came within a few percent of it


class Layout(NamedTuple):
    """Settings, what flops.of_step knows of them, and the seconds expected of a step."""

    config: Config
    analysis: dict[str, Any]
    step_seconds: float

    @property
    def required_bytes(self) -> float:
        """Bytes of one device."""
        return max(self.analysis["peak_bytes"], self.analysis["export_bytes"])


def list_layouts(spec: ModelSpec, settings: Config, target: hardware.Target) -> list[Layout]:
    """Every setting that the target's devices can be cut for. Rows and tokens of a step stay what the config says."""
    found = []
    open_axes = {
        axis: -1 for axis, size in dataclasses.asdict(settings.mesh).items() if size == -1
    }  # stay open: one recipe for any number
    for mesh in iterate_meshes(spec, settings, target):
        sizes = dataclasses.asdict(mesh)
        mesh = dataclasses.replace(mesh, **open_axes)
        for accumulate in list_divisors(settings.train.batch_size):
            try:
                sharding.check_mesh_divides(
                    MeshShape(sizes),
                    spec,
                    settings.train.batch_size,
                    accumulate,
                    settings.pack.seq_len,
                )
            except UserError:
                continue
            for remat in REMAT_POLICIES:
                asked = dataclasses.replace(
                    settings,
                    mesh=mesh,
                    train=dataclasses.replace(settings.train, grad_accum_steps=accumulate, remat=remat),
                )
                measured = flops.estimate_step(
                    spec, asked, sizes, hardware.predict_attention_backend(asked, target)
                )
                measured |= {"method": "estimated", "missing": None, "mesh": sizes, "seconds": 0.0}
                found.append(
                    Layout(
                        asked,
                        measured,
                        roofline.compute_roofline(measured, target, asked).expected_seconds,
                    )
                )
    return found


class MeshShape(NamedTuple):
    """What sharding.check reads of a mesh."""

    shape: dict[str, int]


def iterate_meshes(
    spec: ModelSpec, settings: Config, target: hardware.Target
) -> Iterator[config.MeshConfig]:
    """Data parallel over what tensor and context leave, one copy of the model or one for each host of GPUs."""
    n, hosts = (
        target.n_devices,
        max(target.n_devices // hardware.GPUS_PER_HOST, 1) if target.chip.platform == "cuda" else 1,
    )
    cuts = itertools.product(sorted({1, hosts}), list_divisors(spec.n_kv_heads), (1, 2, 4, 8))
    for copies, tensor, context in cuts:
        if n % (copies * tensor * context) == 0 and settings.pack.seq_len % context**2 == 0:
            yield config.MeshConfig(copies, n // (copies * tensor * context), tensor, context)


def choose_layout(found: list[Layout]) -> Layout:
    """The fastest, but for two things: a mesh with fewer cuts goes before one that is less than 5 % faster, and of two that differ by
    less than 2 % the one that needs less memory; arithmetic knows no better.
    """
    fastest = min(each.step_seconds for each in found)
    near = [each for each in found if each.step_seconds <= 1.05 * fastest]
    n_cuts = lambda each: sum(n > 1 for n in each.measured["mesh"].values())  # noqa: E731
    simple = [each for each in near if n_cuts(each) == min(map(n_cuts, near))]
    fastest = min(each.step_seconds for each in simple)
    return min(
        (each for each in simple if each.step_seconds <= 1.02 * fastest),
        key=lambda each: each.required_bytes,
    )


def suggest_layout(spec: ModelSpec, settings: Config, target: hardware.Target) -> str:
    """A sentence for what does not fit, by arithmetic: the overrides with which this target does, else the smallest of its chip that does."""
    for on in (target.name, *hardware.list_target_names(target.chip)):
        other = hardware.parse_target(on)
        found = list_layouts(spec, settings, other)
        fitting = next(
            (
                some
                for room in (SAFE_MEMORY_FRAC, 1)
                if (
                    some := [
                        each for each in found if each.required_bytes <= room * other.usable_bytes
                    ]
                )
            ),
            None,
        )
        if fitting:
            best = choose_layout(fitting)
            changes = " ".join(list_overrides(settings, best.config))
            what = (
                f"{on} fits it"
                if on == target.name
                else f"the smallest {target.chip.name} that fits is {on}"
            )
            room = f"{best.required_bytes / hardware.GIB:.1f} of {other.usable_bytes / hardware.GIB:.1f} GiB a device"
            return f"By arithmetic {what}, with {room}{': ' + changes if changes else ''}."
    none = f"By arithmetic no number of {target.chip.name} fits a step of {settings.train.batch_size:,} rows of {settings.pack.seq_len:,} tokens"
    shorter = settings
    while shorter.pack.seq_len % 2 == 0 and shorter.pack.seq_len > 8:
        shorter = dataclasses.replace(
            shorter,
            pack=dataclasses.replace(shorter.pack, seq_len=shorter.pack.seq_len // 2),
            train=dataclasses.replace(shorter.train, batch_size=2 * shorter.train.batch_size),
        )
        fitting = [
            on
            for on in map(hardware.parse_target, hardware.list_target_names(target.chip))
            if any(
                each.required_bytes <= on.usable_bytes for each in list_layouts(spec, shorter, on)
            )
        ]
        if fitting:
            return f"{none}; the same tokens in rows of {shorter.pack.seq_len:,} fit {fitting[0].name}: {' '.join(list_overrides(settings, shorter))}."
    return f"{none}; a smaller model does."


def list_overrides(before: Config, after: Config) -> list[str]:
    """What to paste behind a command to get from one to the other."""
    return [
        f"--config.{section}.{knob.name}={getattr(getattr(after, section), knob.name)}"
        for section in ("pack", "mesh", "train")
        for knob in dataclasses.fields(getattr(after, section))
        if getattr(getattr(after, section), knob.name)
        != getattr(getattr(before, section), knob.name)
    ]


def format_layout(layout: Layout) -> str:
    sizes = (
        " x ".join(f"{axis} {n}" for axis, n in layout.analysis["mesh"].items() if n > 1)
        or "one device"
    )
    return f"{sizes}, accumulate {layout.config.train.grad_accum_steps}, remat {layout.config.train.remat}"


def list_divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

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

REMATS = ("none", "dots", "minimal", "full")
COMFORT = 0.95  # share of the memory that arithmetic alone had better stay below: the compilers came within a few percent of it


class Layout(NamedTuple):
    """Settings, what flops.of_step knows of them, and the seconds expected of a step."""

    asked: Config
    measured: dict[str, Any]
    seconds: float

    @property
    def needs(self) -> float:
        """Bytes of one device."""
        return max(self.measured["peak_bytes"], self.measured["export_bytes"])


def candidates(spec: ModelSpec, settings: Config, target: hardware.Target) -> list[Layout]:
    """Every setting that the target's devices can be cut for. Rows and tokens of a step stay what the config says."""
    found = []
    open_axes = {axis: -1 for axis, size in dataclasses.asdict(settings.mesh).items() if size == -1}  # stay open: one recipe for any number
    for mesh in meshes(spec, settings, target):
        sizes = dataclasses.asdict(mesh)
        mesh = dataclasses.replace(mesh, **open_axes)
        for accumulate in divisors(settings.train.batch_rows):
            try:
                sharding.check(Sizes(sizes), spec, settings.train.batch_rows, accumulate, settings.pack.row_len)
            except UserError:
                continue
            for remat in REMATS:
                asked = dataclasses.replace(settings, mesh=mesh, train=dataclasses.replace(settings.train, accumulate=accumulate, remat=remat))
                measured = flops.of_step(spec, asked, sizes, hardware.attention(asked, target))
                measured |= {"method": "estimated", "missing": None, "mesh": sizes, "seconds": 0.0}
                found.append(Layout(asked, measured, roofline.of(measured, target, asked).middle))
    return found


class Sizes(NamedTuple):
    """What sharding.check reads of a mesh."""

    shape: dict[str, int]


def meshes(spec: ModelSpec, settings: Config, target: hardware.Target) -> Iterator[config.Mesh]:
    """Data parallel over what tensor and context leave, one copy of the model or one for each host of GPUs."""
    n, hosts = target.n_devices, max(target.n_devices // hardware.GPUS_PER_HOST, 1) if target.chip.platform == "cuda" else 1
    cuts = itertools.product(sorted({1, hosts}), divisors(spec.n_kv_heads), (1, 2, 4, 8))
    for copies, tensor, context in cuts:
        if n % (copies * tensor * context) == 0 and settings.pack.row_len % context**2 == 0:
            yield config.Mesh(copies, n // (copies * tensor * context), tensor, context)


def choose(found: list[Layout]) -> Layout:
    """The fastest, but for two things: a mesh with fewer cuts goes before one that is less than 5 % faster, and of two that differ by
    less than 2 % the one that needs less memory; arithmetic knows no better."""
    fastest = min(each.seconds for each in found)
    near = [each for each in found if each.seconds <= 1.05 * fastest]
    n_cuts = lambda each: sum(n > 1 for n in each.measured["mesh"].values())  # noqa: E731
    simple = [each for each in near if n_cuts(each) == min(map(n_cuts, near))]
    fastest = min(each.seconds for each in simple)
    return min((each for each in simple if each.seconds <= 1.02 * fastest), key=lambda each: each.needs)


def advice(spec: ModelSpec, settings: Config, target: hardware.Target) -> str:
    """A sentence for what does not fit, by arithmetic: the overrides with which this target does, else the smallest of its chip that does."""
    for on in (target.on, *hardware.sizes(target.chip)):
        other = hardware.target(on)
        found = candidates(spec, settings, other)
        fitting = next((some for room in (COMFORT, 1) if (some := [each for each in found if each.needs <= room * other.usable])), None)
        if fitting:
            best = choose(fitting)
            changes = " ".join(overrides(settings, best.asked))
            what = f"{on} fits it" if on == target.on else f"the smallest {target.chip.name} that fits is {on}"
            room = f"{best.needs / hardware.GIB:.1f} of {other.usable / hardware.GIB:.1f} GiB a device"
            return f"By arithmetic {what}, with {room}{': ' + changes if changes else ''}."
    none = f"By arithmetic no number of {target.chip.name} fits a step of {settings.train.batch_rows:,} rows of {settings.pack.row_len:,} tokens"
    shorter = settings
    while shorter.pack.row_len % 2 == 0 and shorter.pack.row_len > 8:
        shorter = dataclasses.replace(
            shorter,
            pack=dataclasses.replace(shorter.pack, row_len=shorter.pack.row_len // 2),
            train=dataclasses.replace(shorter.train, batch_rows=2 * shorter.train.batch_rows),
        )
        fitting = [
            on for on in map(hardware.target, hardware.sizes(target.chip)) if any(each.needs <= on.usable for each in candidates(spec, shorter, on))
        ]
        if fitting:
            return f"{none}; the same tokens in rows of {shorter.pack.row_len:,} fit {fitting[0].on}: {' '.join(overrides(settings, shorter))}."
    return f"{none}; a smaller model does."


def overrides(before: Config, after: Config) -> list[str]:
    """What to paste behind a command to get from one to the other."""
    return [
        f"--config.{section}.{knob.name}={getattr(getattr(after, section), knob.name)}"
        for section in ("pack", "mesh", "train")
        for knob in dataclasses.fields(getattr(after, section))
        if getattr(getattr(after, section), knob.name) != getattr(getattr(before, section), knob.name)
    ]


def tell(layout: Layout) -> str:
    sizes = " x ".join(f"{axis} {n}" for axis, n in layout.measured["mesh"].items() if n > 1) or "one device"
    return f"{sizes}, accumulate {layout.asked.train.accumulate}, remat {layout.asked.train.remat}"


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

"""List the chips that a run can be planned for: peak FLOP/s, memory, links, power, price, slices.

Every number is per JAX device, which is one chip but for TPU7x (two devices per chip). Peaks are
dense, without sparsity. Sources: Google Cloud's TPU pages (v4, v5e, v5p, v6e, tpu7x) and NVIDIA's
data sheets. TPU memory is what libtpu 0.0.42 lets a program have, a little less than published.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from typing import NamedTuple

from jaxpt.spec import UserError

GIB = 2**30
GPUS_PER_HOST = 8
MAX_MEM_FRAC = 0.92  # NVIDIA: what jaxpt train has JAX take; CUDA itself needs the rest
INTER_HOST_BANDWIDTH = 100e9  # bytes/s per GPU, both directions: 400 Gb/s each, as in clouds


class Efficiency(NamedTuple):
    """Assumed share of peak FLOP/s at which matmuls run while nothing else is waited for.

    A published MFU is less: it counts no recomputed matmul, and all waiting. MaxText reached 45 to
    50 % MFU on 256 v6e, 65 to 71 % on v5p (full attention counted) and 50 % on 8 H100; torchtitan
    35 % there; the course's 248M run 46 % on 16 A100.
    """

    low: float
    high: float
    source: str


TPU_EFFICIENCY = Efficiency(
    0.45,
    0.70,
    "of peak, from published runs of 8B to 1T (MaxText: 45 to 50 % MFU on v6e, 65 to 71 % on v5p)",
)
DATACENTER_GPU_EFFICIENCY = Efficiency(
    0.40,
    0.60,
    "of peak, from published 7B and 8B runs on 8 H100 (torchtitan 35 % MFU, MaxText 50 %)",
)
PCIE_GPU_EFFICIENCY = Efficiency(
    0.30, 0.55, "of peak, a guess: no published run, and slower links than a data-center card"
)
CPU_EFFICIENCY = Efficiency(
    0.20,
    0.65,
    "of peak, measured: 0.65 for large ones on AMD EPYC, less for small ones "
    "and beside other work on the machine",
)


class GpuSpec(NamedTuple):
    """What XLA's GPU compiler asks of a card."""

    capability: tuple[int, int]  # CUDA compute capability
    n_multiprocessors: int
    units: int  # floating-point units per multiprocessor, as the next three
    shared_bytes: int
    shared_bytes_per_block: int
    max_threads: int
    l2_bytes: int
    ghz: float


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind."""

    name: str  # as in --on NAME:...
    platform: str  # "tpu", "cuda" or "cpu"
    # JAX's names, jax.devices()[0].device_kind; the first is of the card that `gpu` describes
    device_kinds: tuple[str, ...]
    bfloat16_flops: float  # peak FLOP/s of matmuls
    # of float32 matmuls at JAX's default precision: one bfloat16 pass on TPU, TF32 on NVIDIA
    float32_flops: float
    # of matmuls in them; None: bfloat16 is as fast, or XLA has no such matmuls there
    float8_flops: float | None
    int8_flops: float | None
    memory_bytes: int  # that a program can have
    memory_bandwidth: float  # bytes/s
    # bytes/s to the rest of a slice or host, over all links and both directions
    link_bandwidth: float
    watts: float | None  # of the board at full load; None: the maker does not publish it
    usd_per_hour: float | None  # list price on demand
    price_source: str  # whose price, and when it was read
    efficiency: Efficiency
    max_chips: int = 0  # TPU: of the largest slice
    devices_per_chip: int = 1
    gpu: GpuSpec | None = None  # NVIDIA: what its compiler asks

    def peak_flops(self, dtype: str) -> float:
        """Return the peak FLOP/s of matmuls in "bfloat16", "float32", or what it has units for."""
        return getattr(self, f"{dtype}_flops")

    def has_units(self, dtype: str) -> bool:
        """Return whether matmuls in "float8" or "int8" have a higher peak than in bfloat16."""
        return getattr(self, f"{dtype}_flops") is not None


GOOGLE = "Google Cloud on demand, us regions, 2026-08"
LAMBDA = "Lambda on demand, 8 per host, 2026-09-20"
A100_KINDS = ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")

CHIP_TABLE = (
    Chip(
        name="v4",
        platform="tpu",
        device_kinds=("TPU v4",),
        bfloat16_flops=275e12,
        float32_flops=275e12,
        float8_flops=None,
        int8_flops=None,
        memory_bytes=int(30.75 * GIB),
        memory_bandwidth=1.2e12,
        link_bandwidth=600e9,
        watts=192,
        usd_per_hour=3.22,
        price_source="Google Cloud on demand, us-central2, 2025",
        efficiency=TPU_EFFICIENCY,
        max_chips=4096,
    ),
    Chip(
        name="v5e",
        platform="tpu",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        bfloat16_flops=197e12,
        float32_flops=197e12,
        float8_flops=None,
        int8_flops=393e12,
        memory_bytes=int(15.75 * GIB),
        memory_bandwidth=819e9,
        link_bandwidth=400e9,
        watts=None,
        usd_per_hour=1.20,
        price_source=GOOGLE,
        efficiency=TPU_EFFICIENCY,
        max_chips=256,
    ),
    Chip(
        name="v5p",
        platform="tpu",
        device_kinds=("TPU v5", "TPU v5p"),
        bfloat16_flops=459e12,
        float32_flops=459e12,
        float8_flops=None,
        int8_flops=918e12,
        memory_bytes=int(95.74 * GIB),
        memory_bandwidth=2.765e12,
        link_bandwidth=1200e9,
        watts=None,
        usd_per_hour=4.20,
        price_source=GOOGLE,
        efficiency=TPU_EFFICIENCY,
        max_chips=6144,
    ),
    Chip(
        name="v6e",
        platform="tpu",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        bfloat16_flops=918e12,
        float32_flops=918e12,
        float8_flops=None,
        int8_flops=1836e12,
        memory_bytes=int(31.25 * GIB),
        memory_bandwidth=1.64e12,
        link_bandwidth=800e9,
        watts=None,
        usd_per_hour=2.70,
        price_source=GOOGLE,
        efficiency=TPU_EFFICIENCY,
        max_chips=256,
    ),
    Chip(
        name="tpu7x",
        platform="tpu",
        device_kinds=("TPU7x",),
        bfloat16_flops=2307e12 / 2,
        float32_flops=2307e12 / 2,
        float8_flops=4614e12 / 2,
        int8_flops=None,
        memory_bytes=int(94.75 * GIB),
        memory_bandwidth=7.37e12 / 2,
        link_bandwidth=1200e9 / 2,
        watts=None,
        usd_per_hour=None,
        price_source="no public list price found, 2026-08",
        efficiency=TPU_EFFICIENCY,
        max_chips=9216,
        devices_per_chip=2,
    ),
    Chip(
        name="a100",
        platform="cuda",
        device_kinds=A100_KINDS,
        bfloat16_flops=312e12,
        float32_flops=156e12,
        float8_flops=None,
        int8_flops=None,
        memory_bytes=85_100_068_864,
        memory_bandwidth=2.039e12,
        link_bandwidth=600e9,
        watts=400,
        usd_per_hour=2.79,
        price_source=LAMBDA,
        efficiency=DATACENTER_GPU_EFFICIENCY,
        gpu=GpuSpec((8, 0), 108, 64, 167_936, 166_912, 2048, 41_943_040, 1.41),
    ),
    Chip(
        name="a100-40gb",
        platform="cuda",
        device_kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        bfloat16_flops=312e12,
        float32_flops=156e12,
        float8_flops=None,
        int8_flops=None,
        memory_bytes=42_505_273_344,
        memory_bandwidth=1.555e12,
        link_bandwidth=600e9,
        watts=400,
        usd_per_hour=None,
        price_source="no public list price read, 2026-11",
        efficiency=DATACENTER_GPU_EFFICIENCY,
        gpu=GpuSpec((8, 0), 108, 64, 167_936, 166_912, 2048, 41_943_040, 1.41),
    ),
    Chip(
        name="h100",
        platform="cuda",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        bfloat16_flops=989.4e12,
        float32_flops=494.7e12,
        float8_flops=1978.9e12,
        int8_flops=None,
        memory_bytes=84_942_979_072,
        memory_bandwidth=3.352e12,
        link_bandwidth=900e9,
        watts=700,
        usd_per_hour=3.99,
        price_source=LAMBDA,
        efficiency=DATACENTER_GPU_EFFICIENCY,
        gpu=GpuSpec((9, 0), 132, 128, 233_472, 232_448, 2048, 52_428_800, 1.98),
    ),
    Chip(
        name="h200",
        platform="cuda",
        device_kinds=("NVIDIA H200", "NVIDIA H200 141GB HBM3e"),
        bfloat16_flops=989.4e12,
        float32_flops=494.7e12,
        float8_flops=1978.9e12,
        int8_flops=None,
        memory_bytes=151_397_597_184,
        memory_bandwidth=4.8e12,
        link_bandwidth=900e9,
        watts=700,
        usd_per_hour=4.59,
        price_source="Runpod on demand, 2026-10-07",
        efficiency=DATACENTER_GPU_EFFICIENCY,
        gpu=GpuSpec((9, 0), 132, 128, 233_472, 232_448, 2048, 52_428_800, 1.98),
    ),
    Chip(
        name="b200",
        platform="cuda",
        device_kinds=("NVIDIA B200",),
        bfloat16_flops=2250e12,
        float32_flops=1125e12,
        float8_flops=4500e12,
        int8_flops=None,
        memory_bytes=191_514_411_008,
        memory_bandwidth=7.672e12,
        link_bandwidth=1800e9,
        watts=1000,
        usd_per_hour=6.69,
        price_source=LAMBDA,
        efficiency=DATACENTER_GPU_EFFICIENCY,
        gpu=GpuSpec((10, 0), 148, 128, 233_472, 232_448, 2048, 132_644_864, 1.965),
    ),
    Chip(
        name="l4",
        platform="cuda",
        device_kinds=("NVIDIA L4",),
        bfloat16_flops=121e12,
        float32_flops=60e12,
        float8_flops=242e12,
        int8_flops=None,
        memory_bytes=23_580_639_232,
        memory_bandwidth=300e9,
        link_bandwidth=64e9,
        watts=72,
        usd_per_hour=0.80,
        price_source="AWS g6.xlarge on demand, us-east-1, 2025",
        efficiency=PCIE_GPU_EFFICIENCY,
        gpu=GpuSpec((8, 9), 58, 128, 102_400, 101_376, 1536, 50_331_648, 2.04),
    ),
    Chip(
        name="rtx4090",
        platform="cuda",
        device_kinds=("NVIDIA GeForce RTX 4090",),
        bfloat16_flops=165.2e12,
        float32_flops=82.6e12,
        float8_flops=330.3e12,
        int8_flops=None,
        memory_bytes=25_386_352_640,
        memory_bandwidth=1.008e12,
        link_bandwidth=64e9,
        watts=450,
        usd_per_hour=0.29,
        price_source="OpenRelay on demand, 2026-09-20",
        efficiency=PCIE_GPU_EFFICIENCY,
        gpu=GpuSpec((8, 9), 128, 128, 102_400, 101_376, 1536, 75_497_472, 2.52),
    ),
    # one core with AVX-512: 16 lanes x 2 units x multiply and add at 2.5 GHz; bfloat16 matmuls run
    # in float32 there
    Chip(
        name="cpu",
        platform="cpu",
        device_kinds=("cpu",),
        bfloat16_flops=160e9,
        float32_flops=160e9,
        float8_flops=None,
        int8_flops=None,
        memory_bytes=4 * GIB,
        memory_bandwidth=10e9,
        link_bandwidth=10e9,
        watts=8,
        usd_per_hour=0.089,
        price_source="AWS c7i on demand, us-east-1, 2 vCPU per core, 2025",
        efficiency=CPU_EFFICIENCY,
    ),
)
CHIPS = {chip.name: chip for chip in CHIP_TABLE}


def find_chip(device_kind: str) -> Chip | None:
    """Return the chip of a `jax.devices()[0].device_kind`; None if the table has none."""
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip
    return None


def get_peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the dense peak FLOP/s per device in "bfloat16" or "float32"; None if unknown.

    A CPU's is unknown: JAX's CPU device takes all cores of whatever machine it runs on.
    """
    chip = find_chip(device_kind)
    if chip is None or chip.platform == "cpu":
        return None
    return chip.peak_flops(dtype)


# ---- targets: "v5p:4x4x4", "h100:8", "cpu:8"

Topology = tuple[int, ...]

SLICES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # v5e and v6e
SMALL_SLICES_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # below one cube of 4x4x4


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to plan for."""

    name: str  # as in --on
    chip: Chip
    topology: Topology  # TPU: chips along each axis of the torus; else (number of devices,)

    @property
    def n_devices(self) -> int:
        """Number of JAX devices."""
        return math.prod(self.topology) * self.chip.devices_per_chip

    @property
    def domain_size(self) -> int:
        """Consecutive devices joined by NVLink or ICI: a host's GPUs, or all."""
        return GPUS_PER_HOST if self.chip.platform == "cuda" else self.n_devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the links of a TPU slice close a ring, by axis.

        They do in slices of whole 4x4x4 cubes, and along the 16 chips of a two-dimensional pod.
        Source: MaxText, accelerator_to_spec_map.py.
        """
        if len(self.topology) == 3:
            return (all(n % 4 == 0 for n in self.topology),) * 3
        return tuple(n == 16 for n in self.topology)

    @property
    def used_links(self) -> float:
        """Share of a chip's links that bring it what a slice's other chips send.

        An axis has two in a ring. A line of chips brings its ends everything by one.
        """
        if self.chip.platform != "tpu":
            return 1.0
        n_links = 0
        for n_chips, is_ring in zip(self.topology, self.wraps, strict=True):
            n_links += 2 if is_ring else min(n_chips - 1, 1)
        return n_links / (2 * len(self.topology))

    def count_receive_seconds(self, n_bytes: float, domain_bytes: float) -> float:
        """Return the seconds in which a device receives so many bytes, some within its domain."""
        if not n_bytes:
            return 0.0
        within = self.chip.link_bandwidth / 2 * self.used_links
        between = within if self.n_devices <= self.domain_size else INTER_HOST_BANDWIDTH / 2
        return domain_bytes / within + (n_bytes - domain_bytes) / between

    @property
    def devices_per_host(self) -> int:
        """Devices of a slice's host (4 chips, or 8 of a single v5e or v6e host) or of a server."""
        if self.chip.platform == "cpu":
            return self.n_devices
        full_host = 4 * self.chip.devices_per_chip
        if self.chip.platform == "cuda" or self.topology == (2, 4):
            full_host = GPUS_PER_HOST
        return min(self.n_devices, full_host)

    @property
    def usable_bytes(self) -> int:
        """Bytes of a device's memory that a program can have."""
        if self.chip.platform == "cuda":
            return round(self.chip.memory_bytes * MAX_MEM_FRAC)
        return self.chip.memory_bytes


def parse_target(name: str) -> Target:
    """Return the target of CHIP:TOPOLOGY (TPU) or CHIP:COUNT.

    Raises:
        UserError: there is no such chip or slice; the message names the nearest ones.
    """
    chip_name, _, size = name.partition(":")
    if chip_name not in CHIPS:
        raise UserError(f"--on {name}: there is no chip {chip_name!r}; {suggest_target(name)}")
    chip = CHIPS[chip_name]
    is_tpu = chip.platform == "tpu"
    size_example = format_topology(list_slices(chip)[3]) if is_tpu else "8"
    example = f"{chip_name}:{size_example}"
    axes = size.split("x")
    if not all(axis.isdecimal() and int(axis) for axis in axes):
        raise UserError(f"--on {name}: expected a chip and how many of them, such as {example}.")
    topology = tuple(map(int, axes))
    if is_tpu and topology not in list_slices(chip):
        near = suggest_slices(chip, topology)
        raise UserError(f"--on {name}: no such slice is offered. {near}")
    if not is_tpu and len(topology) > 1:
        raise UserError(
            f"--on {name}: expected a count, such as {example}; {chip_name} has no topology."
        )
    if chip.platform == "cuda":
        check_gpu_count(name, math.prod(topology))
    return Target(name, chip, topology)


def check_gpu_count(name: str, n: int) -> None:
    """Raise UserError if the last host would be used in part."""
    if n in (1, 2, 4) or n % GPUS_PER_HOST == 0:
        return
    n_full_hosts = n // GPUS_PER_HOST
    below = n_full_hosts * GPUS_PER_HOST or 4
    above = (n_full_hosts + 1) * GPUS_PER_HOST
    raise UserError(
        f"--on {name}: expected 1, 2, 4 or a multiple of {GPUS_PER_HOST} cards, got {n}: "
        f"hosts have {GPUS_PER_HOST}. Use such as {below} or {above}."
    )


OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "a100-80gb": "a100", "4090": "rtx4090"}
CORES_PER_CHIP = {"v4": 2, "v5p": 2}  # as Google's names count: v5p-128 is 64 chips, v5e-8 is 8
# such as v5e-8, a100-80gb:8, v5q:4x4x4 and 8xh100
TARGET_NAME = re.compile(r"(?:(?P<n>\d+)x)?(?P<chip>.+?)(?:(?P<mark>[-:_])(?P<size>\d+(x\d+)*))?$")


def suggest_target(name: str) -> str:
    """Return the end of a sentence that names the nearest target, or all chips."""
    found = TARGET_NAME.match(name.lower().removeprefix("tpu-").removeprefix("nvidia-"))
    assert found
    chip_name = OTHER_NAMES.get(found["chip"], found["chip"])
    near = difflib.get_close_matches(chip_name, CHIPS, 1, 0.6)
    if not near or chip_name in ("tpu", "gpu", "cuda"):
        return f"there are: {', '.join(CHIPS)}."
    chip = CHIPS[near[0]]
    size = found["size"] or found["n"] or "8"
    n_chips = math.prod(map(int, size.split("x"))) or 8
    if chip.platform != "tpu":
        return f"did you mean {chip.name}:{n_chips}?"
    if found["mark"] == "-":
        n_chips = max(n_chips // CORES_PER_CHIP.get(chip.name, 1), 1)
    shape = sort_slices(chip, n_chips)[0]
    return f"did you mean {chip.name}:{format_topology(shape)} ({math.prod(shape):,} chips)?"


def sort_slices(chip: Chip, n: int) -> list[Topology]:
    """Return the slices that are offered, those nearest to a number of chips first."""

    def distance(shape: Topology) -> tuple[float, int]:
        return abs(math.log(math.prod(shape) / n)), max(shape) - min(shape)

    return sorted(list_slices(chip), key=distance)


def suggest_slices(chip: Chip, topology: Topology) -> str:
    """Return a sentence that names the offered slices nearest to a number of chips."""
    n = math.prod(topology)
    slices = list_slices(chip)
    nearest = sort_slices(chip, n)[:3]
    listed = ", ".join(
        f"{chip.name}:{format_topology(shape)} ({math.prod(shape):,} chips)" for shape in nearest
    )
    sizes = [math.prod(shape) for shape in slices]
    return (
        f"Near {n:,} chips there are {listed}; "
        f"{chip.name} slices have {min(sizes)} to {max(sizes):,} chips."
    )


def list_slices(chip: Chip) -> list[Topology]:
    """Return the TPU slices that are offered, smallest first.

    Cubes of 4x4x4 are joined along any axis; the longest axis is written last.
    """
    if chip.max_chips == 256:
        return list(SLICES_2D)
    shapes = itertools.combinations_with_replacement(range(4, 25, 4), 3)
    cubes = [shape for shape in shapes if math.prod(shape) <= chip.max_chips]
    cubes.sort(key=lambda shape: (math.prod(shape), shape))
    return [*SMALL_SLICES_3D, *cubes]


def list_target_names(chip: Chip) -> list[str]:
    """Return targets of a chip, smallest first; of each number of devices the most cubic slice."""
    if chip.platform != "tpu":
        return [f"{chip.name}:{2**i}" for i in range(11)]
    slices = list_slices(chip)
    slices.sort(key=lambda shape: max(shape) - min(shape), reverse=True)
    by_size = {math.prod(shape): shape for shape in slices}  # the last, most cubic one stays
    return [f"{chip.name}:{format_topology(by_size[n])}" for n in sorted(by_size)]


def format_topology(shape: Topology) -> str:
    """Return (4, 4, 8) as "4x4x8"."""
    return "x".join(map(str, shape))

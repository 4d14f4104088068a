"""The chips a run can be planned for: peak speed, memory, links, power, price; and which slices of them exist.

Every number is of one JAX device, which is one chip but for TPU7x (two devices a chip). Peaks are dense, no sparsity.
Sources: Google Cloud's TPU pages (v4, v5e, v5p, v6e, tpu7x), NVIDIA's data sheets. TPU memory is what libtpu 0.0.42
lets a program have, which is a little less than the data sheet says.
"""

from __future__ import annotations

import dataclasses
import difflib
import math

from jaxpt.config import Config
from jaxpt.spec import UserError

GIB = 2**30

# Shares of peak at which matrix products run while nothing else is waited for, as the planner's assumption. A published MFU is
# less: it counts no product that remat computes again, and all waiting. MaxText reached 45 to 50 % MFU on 256 v6e and 65 to 71 %
# on v5p (with full attention counted), 50 % on 8 H100; torchtitan 35 % there; the course's 248M run 46 % on 16 A100.
TPU_EFFICIENCY = (
    (0.45, 0.70),
    "of peak, from published runs of 8B to 1T (MaxText: 45 to 50 % MFU on v6e, 65 to 71 % on v5p)",
)
DATACENTER_GPU_EFFICIENCY = (
    (0.40, 0.60),
    "of peak, from published 7B and 8B runs on 8 H100 (torchtitan 35 % MFU, MaxText 50 %)",
)
PCIE_GPU_EFFICIENCY = (
    (0.30, 0.55),
    "of peak, a guess: no published run, and slower links than a data-centre card",
)
CPU_EFFICIENCY = (
    (0.20, 0.65),
    "of peak, measured: 0.65 for large ones on AMD EPYC, less for small ones; other work on the machine takes its share",
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind."""

    name: str  # as in --on NAME:...
    platform: str  # tpu, cuda or cpu
    device_kinds: tuple[str, ...]  # what JAX calls it: jax.devices()[0].device_kind
    bfloat16: float  # FLOP/s of matrix products
    float32: float  # FLOP/s of what JAX runs for float32 at default precision: one bfloat16 pass on TPU, TF32 on NVIDIA
    memory_bytes: int  # bytes a program can have
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s to the other devices of a slice or host, all links and both directions together
    watts: float | None  # of the board at full load; None where the maker does not say
    usd_per_hour: float | None  # list price on demand
    price_source: str  # whose price, and when it was read
    efficiency: tuple[
        tuple[float, float], str
    ]  # assumed share of peak for products (low, high), and where the assumption comes from
    max_chips: int = 0  # TPU: in the largest slice
    devices_per_chip: int = 1


GOOGLE_PRICE_SOURCE = "Google Cloud on demand, us regions, 2026-08"
LAMBDA_PRICE_SOURCE = "Lambda on demand, 8 a host, 2026-09-20"

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "tpu", ("TPU v4",), 275e12, 275e12, int(30.75 * GIB), 1.2e12, 600e9, 192,
            3.22, "Google Cloud on demand, us-central2, 2025", TPU_EFFICIENCY, max_chips=4096,
        ),
        Chip(
            "v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 197e12, int(15.75 * GIB), 819e9, 400e9, None,
            1.20, GOOGLE_PRICE_SOURCE, TPU_EFFICIENCY, max_chips=256,
        ),
        Chip(
            "v5p", "tpu", ("TPU v5", "TPU v5p"), 459e12, 459e12, int(95.74 * GIB), 2.765e12, 1200e9, None,
            4.20, GOOGLE_PRICE_SOURCE, TPU_EFFICIENCY, max_chips=6144,
        ),
        Chip(
            "v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 918e12, int(31.25 * GIB), 1.64e12, 800e9, None,
            2.70, GOOGLE_PRICE_SOURCE, TPU_EFFICIENCY, max_chips=256,
        ),
        Chip(
            "tpu7x", "tpu", ("TPU7x",), 2307e12 / 2, 2307e12 / 2, int(94.75 * GIB), 7.37e12 / 2, 1200e9 / 2, None,
            None, "no public list price found, 2026-08", TPU_EFFICIENCY, max_chips=9216, devices_per_chip=2,
        ),
        Chip(
            "a100", "cuda", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe"), 312e12, 156e12,
            85_100_068_864, 2.039e12, 600e9, 400, 2.79, LAMBDA_PRICE_SOURCE, DATACENTER_GPU_EFFICIENCY,
        ),
        Chip(
            "h100", "cuda", ("NVIDIA H100 80GB HBM3",), 989.4e12, 494.7e12, 84_942_979_072, 3.352e12, 900e9, 700,
            3.99, LAMBDA_PRICE_SOURCE, DATACENTER_GPU_EFFICIENCY,
        ),
        Chip(
            "h200", "cuda", ("NVIDIA H200", "NVIDIA H200 141GB HBM3e"), 989.4e12, 494.7e12, 151_397_597_184, 4.8e12, 900e9, 700,
            4.59, "Runpod on demand, 2026-10-07", DATACENTER_GPU_EFFICIENCY,
        ),
        Chip("b200", "cuda", ("NVIDIA B200",), 2250e12, 1125e12, 191_514_411_008, 7.672e12, 1800e9, 1000, 6.69, LAMBDA_PRICE_SOURCE, DATACENTER_GPU_EFFICIENCY),
        Chip(
            "l4", "cuda", ("NVIDIA L4",), 121e12, 60e12, 23_580_639_232, 300e9, 64e9, 72,
            0.80, "AWS g6.xlarge on demand, us-east-1, 2025", PCIE_GPU_EFFICIENCY,
        ),
        Chip(
            "rtx4090", "cuda", ("NVIDIA GeForce RTX 4090",), 165.2e12, 82.6e12, 25_386_352_640, 1.008e12, 64e9, 450,
            0.29, "OpenRelay on demand, 2026-09-20", PCIE_GPU_EFFICIENCY,
        ),
        # One core with AVX-512: 16 lanes x 2 units x multiply and add at 2.5 GHz. bfloat16 products are done in float32 there.
        Chip(
            "cpu", "cpu", ("cpu",), 160e9, 160e9, 4 * GIB, 10e9, 10e9, 8,
            0.089, "AWS c7i on demand, us-east-1, 2 vCPU a core, 2025", CPU_EFFICIENCY,
        ),
    )
}  # fmt: skip


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls by this name (`jax.devices()[0].device_kind`); None where the table has none."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def get_peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of one device for "bfloat16" or "float32"; None where it is not known.

    A CPU's is not: JAX's CPU device takes all cores of whatever machine it runs on.
    """
    chip = find_chip(device_kind)
    return getattr(chip, dtype) if chip and chip.platform != "cpu" else None


# ---- targets: "v5p:4x4x4", "h100:8", "cpu:8"

SLICES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # v5e and v6e
SMALL_SLICES_3D = (
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
)  # v4, v5p and TPU7x below one cube of 4x4x4
GPUS_PER_HOST = 8
MAX_MEM_FRAC = 0.92  # of a card's memory that JAX can be told to take; the rest CUDA itself needs
INTER_HOST_BANDWIDTH = 100e9  # bytes/s a GPU between hosts, both directions: the 400 Gb/s each that clouds' 8-GPU hosts have


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to plan for."""

    name: str  # as asked
    chip: Chip
    topology: tuple[int, ...]  # TPU: chips along each axis of the torus; else the number of devices

    @property
    def n_devices(self) -> int:
        return math.prod(self.topology) * self.chip.devices_per_chip

    @property
    def receive_bandwidth(self) -> float:
        """Bytes/s that a device can receive from the others."""
        between_hosts = self.chip.platform == "cuda" and self.n_devices > GPUS_PER_HOST
        return (INTER_HOST_BANDWIDTH if between_hosts else self.chip.link_bandwidth) / 2

    @property
    def devices_per_host(self) -> int:
        """Of a slice's hosts (4 chips each; v5e and v6e have single ones of 8), a server of cards, or this machine."""
        if self.chip.platform == "cpu":
            return self.n_devices
        whole = (
            GPUS_PER_HOST
            if self.chip.platform == "cuda" or self.topology == (2, 4)
            else 4 * self.chip.devices_per_chip
        )
        return min(self.n_devices, whole)

    @property
    def usable_bytes(self) -> int:
        """Bytes that a program can have of a device."""
        return (
            round(self.chip.memory_bytes * MAX_MEM_FRAC)
            if self.chip.platform == "cuda"
            else self.chip.memory_bytes
        )


def parse_target(on: str) -> Target:
    """Read CHIP:TOPOLOGY (TPU) or CHIP:COUNT. Raises UserError where there is no such chip or no such slice, with what is near."""
    name, colon, text = on.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name.lower().removeprefix("tpu-"), CHIPS, 1, 0.4)
        raise UserError(
            f"--on {on}: there is no chip {name!r}; "
            + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(CHIPS)}.")
        )
    chip = CHIPS[name]
    example = (
        f"{name}:{format_topology(list_slices(chip)[3])}" if chip.platform == "tpu" else f"{name}:8"
    )
    if not colon or not text or not all(part.isdecimal() and int(part) for part in text.split("x")):
        raise UserError(f"--on {on}: wanted a chip and how many of them, such as {example}.")
    shape = tuple(int(part) for part in text.split("x"))
    if chip.platform == "tpu":
        if shape not in list_slices(chip):
            raise UserError(
                f"--on {on}: no such slice is offered. {describe_near_slices(chip, shape)}"
            )
    elif len(shape) != 1:
        raise UserError(
            f"--on {on}: {name} has no topology to choose; wanted a count, such as {example}."
        )
    elif chip.platform == "cuda" and shape[0] not in (1, 2, 4) and shape[0] % GPUS_PER_HOST:
        below, above = (
            shape[0] // GPUS_PER_HOST * GPUS_PER_HOST or 4,
            (shape[0] // GPUS_PER_HOST + 1) * GPUS_PER_HOST,
        )
        raise UserError(
            f"--on {on}: hosts carry {GPUS_PER_HOST} of them; wanted 1, 2, 4 or a multiple of {GPUS_PER_HOST}, such as {below} or {above}."
        )
    return Target(on, chip, shape)


def list_slices(chip: Chip) -> list[tuple[int, ...]]:
    """The TPU slices that are offered, smallest first. Cubes of 4x4x4 are joined along any axis, the longest written last."""
    if chip.max_chips == 256:
        return list(SLICES_2D)
    sides = range(4, 25, 4)
    cubes = [
        (a, b, c)
        for a in sides
        for b in sides
        if b >= a
        for c in sides
        if c >= b and a * b * c <= chip.max_chips
    ]
    return [*SMALL_SLICES_3D, *sorted(cubes, key=lambda shape: (math.prod(shape), shape))]


def list_target_names(chip: Chip) -> list[str]:
    """Targets of a chip, smallest first: one of each number of devices, the most cubic slice of it."""
    if chip.platform == "tpu":
        by_number = {
            math.prod(shape): shape
            for shape in sorted(
                list_slices(chip), key=lambda shape: max(shape) - min(shape), reverse=True
            )
        }
        return [f"{chip.name}:{format_topology(by_number[n])}" for n in sorted(by_number)]
    return [f"{chip.name}:{2**i}" for i in range(11)]


def describe_near_slices(chip: Chip, asked: tuple[int, ...]) -> str:
    """The offered slices around the asked number of chips, as a sentence."""
    n = math.prod(asked)
    sizes = [math.prod(shape) for shape in list_slices(chip)]
    near = sorted(
        list_slices(chip),
        key=lambda shape: (abs(math.log(math.prod(shape) / n)), max(shape) - min(shape)),
    )[:3]
    listed = ", ".join(
        f"{chip.name}:{format_topology(shape)} ({math.prod(shape):,} chips)" for shape in near
    )
    return f"Near {n:,} chips there are {listed}; {chip.name} slices have {min(sizes)} to {max(sizes):,} chips."


def format_topology(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def predict_attention_backend(settings: Config, target: Target) -> str:
    """The backend that model/attention.py would choose on the target, as far as that is known without its devices."""
    kernel = {"tpu": "splash", "cuda": "cudnn"}.get(target.chip.platform)
    too_old = target.chip.name in ("a100", "l4", "rtx4090")  # cuDNN's packed documents need Hopper
    whole_rows = settings.pack.seq_len % 128 == 0 and settings.mesh.context == 1
    return (
        "xla"
        if kernel is None or too_old or not whole_rows or settings.train.attention == "xla"
        else kernel
    )

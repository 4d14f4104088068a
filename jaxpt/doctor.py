"""Measure a machine before a run: devices, matmuls, memory, links, disk or bucket, clock.

Each is a second's work, so that a card that is slow, a disk that is full or a JAX without its
plugin is found before hours are paid for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import hardware, io, sharding, stage
from jaxpt.config import MeshConfig
from jaxpt.spec import Record, UserError
from jaxpt.text import format_table

FILE = "doctor.json"
MEASURE_SECONDS = 0.3  # of each kernel, after its compilation
DTYPES = ("bfloat16", "float32")
N_DISK_BYTES = 64_000_000
SLOW_SHARE = 0.5  # of the published peak; large matmuls reach 0.7 and more
SLOW_DEVICE = 0.8  # of the fastest one's speed
SLOW_DISK = 50e6  # bytes/s: a checkpoint of a billion parameters takes four minutes
MAX_CLOCK_SECONDS = 5.0
PLUGINS = ("jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
CARDS = {  # device file -> what makes JAX see it
    "/dev/nvidia0": "requirements-gpu.txt",
    "/dev/accel0": "requirements-tpu.txt",
    "/dev/vfio/0": "requirements-tpu.txt",
}


@dataclasses.dataclass(frozen=True)
class DoctorReport(Record):
    """WORKDIR/doctor.json. Rates are per second; of the slowest device where there are several."""

    created: str  # ISO 8601, UTC
    host: str
    platform: str  # JAX's name
    device_kind: str  # JAX's name
    n_devices: int
    versions: dict[str, str]  # package -> version
    matmul_flops: dict[str, float]  # dtype -> FLOP/s
    fastest_matmul_flops: dict[str, float]  # dtype -> FLOP/s of the fastest device
    peak_flops: dict[str, float]  # dtype -> published; empty: not known
    memory_bytes: float  # read and written
    link_bytes: float | None  # received by each device in an all-gather; None: one device
    write_bytes: float | None  # to the working directory, durably; None: none was given
    read_bytes: float | None
    clock_seconds: float | None  # by which the disk's clock is ahead; None: not known
    findings: tuple[str, ...]  # sentences: what is wrong


def examine_machine(workdir: io.Path | None) -> DoctorReport:
    """Measure this machine; a report is written into the working directory if one is given.

    Raises:
        UserError: there is no such platform, or the directory cannot be written.
    """
    devices = sharding.find_devices()
    speeds = {dtype: [measure_matmul(device, dtype) for device in devices] for dtype in DTYPES}
    kind = devices[0].device_kind
    peaks = {dtype: hardware.get_peak_flops(kind, dtype) for dtype in DTYPES}
    disk = measure_place(workdir) if workdir else (None, None, None)
    report = DoctorReport(
        created=stage.now(),
        host=socket.gethostname(),
        platform=devices[0].platform,
        device_kind=kind,
        n_devices=len(devices),
        versions=stage.package_versions() | find_plugins(),
        matmul_flops={dtype: min(found) for dtype, found in speeds.items()},
        fastest_matmul_flops={dtype: max(found) for dtype, found in speeds.items()},
        peak_flops={dtype: peak for dtype, peak in peaks.items() if peak},
        memory_bytes=min(measure_memory(device) for device in devices),
        link_bytes=measure_links(devices),
        write_bytes=disk[0],
        read_bytes=disk[1],
        clock_seconds=disk[2],
        findings=(),
    )
    report = dataclasses.replace(report, findings=tuple(list_findings(report)))
    # a finished run's report is sealed in its manifest
    if workdir and not io.exists(workdir / "manifest.json"):
        io.write_json(workdir / FILE, report)
    return report


# ---- measuring


def time_call(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the mean seconds of a call, over MEASURE_SECONDS after a first one."""
    jax.block_until_ready(function(*arguments))
    n_calls, start = 0, time.monotonic()
    while time.monotonic() < start + MEASURE_SECONDS:
        jax.block_until_ready(function(*arguments))
        n_calls += 1
    return (time.monotonic() - start) / n_calls


def measure_matmul(device: Any, dtype: str) -> float:
    """Return the FLOP/s of a device in a large matmul."""
    n = 1024 if device.platform == "cpu" else 8192
    with jax.default_device(device):  # random: ones take a card less power than data do
        matrix = jax.random.normal(jax.random.key(0), (n, n), dtype)
    return 2 * n**3 / time_call(jax.jit(jnp.matmul), matrix, matrix)


def measure_memory(device: Any) -> float:
    """Return the bytes per second that a device reads and writes, in a copy."""
    n = 2**24 if device.platform == "cpu" else 2**28
    array = jax.device_put(jnp.zeros(n, jnp.float32), device)
    return 2 * array.nbytes / time_call(jax.jit(jnp.negative), array)


def measure_links(devices: list[Any]) -> float | None:
    """Return the bytes per second that each device receives in an all-gather; None: one device."""
    n = len(devices)
    if n == 1:
        return None
    mesh = sharding.make_mesh(MeshConfig(), devices)
    sharded = sharding.make_logical_sharding(mesh, ("batch",))
    replicated = sharding.make_logical_sharding(mesh, (None,))
    n_numbers = n * (2**20 if devices[0].platform == "cpu" else 2**24)
    array = jax.device_put(np.zeros(n_numbers, np.float32), sharded)
    gather = jax.jit(lambda x: x, out_shardings=replicated)
    return array.nbytes * (n - 1) / n / time_call(gather, array)


def measure_place(workdir: io.Path) -> tuple[float, float, float | None]:
    """Return bytes written and read per second, and the seconds by which its clock is ahead."""
    io.make_directory(workdir)
    file = workdir / f".doctor-{socket.gethostname()}"
    data = np.random.default_rng(0).bytes(N_DISK_BYTES)  # no disk compresses it
    start = time.monotonic()
    io.write_bytes(file, data)
    write_seconds = time.monotonic() - start
    ahead = file.stat().st_mtime - time.time() if isinstance(file, pathlib.Path) else None
    io.drop_cached(file)
    start = time.monotonic()
    is_equal = io.read_bytes(file) == data
    read_seconds = time.monotonic() - start
    io.remove(file)
    if not is_equal:
        raise UserError(f"{workdir}: gave back other bytes than were written. Use another place.")
    return N_DISK_BYTES / write_seconds, N_DISK_BYTES / read_seconds, ahead


def find_plugins() -> dict[str, str]:
    """Return name -> version of what drives the devices."""
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in PLUGINS if name in installed}


# ---- judging and printing


def list_findings(report: DoctorReport) -> list[str]:
    """Return a sentence for each thing that a run would suffer from."""
    found = []
    for card, requirements in CARDS.items():
        if report.platform == "cpu" and io.exists(io.path(card)):
            found.append(f"{card} is there, but JAX sees CPUs alone: install {requirements}.")
    for dtype, flops in report.matmul_flops.items():
        peak, fastest = report.peak_flops.get(dtype), report.fastest_matmul_flops[dtype]
        if peak and flops < SLOW_SHARE * peak:
            found.append(
                f"{dtype} matmuls reach {flops / peak:.0%} of the published peak: is the device "
                "shared, capped or hot?"
            )
        if report.platform != "cpu" and flops < SLOW_DEVICE * fastest:
            found.append(f"the slowest device has {flops / fastest:.0%} of the fastest's {dtype}.")
    if report.write_bytes and report.write_bytes < SLOW_DISK:
        found.append(
            f"writing takes {1e9 / report.write_bytes:.0f} s per GB: checkpoints are slow."
        )
    if report.clock_seconds and abs(report.clock_seconds) > MAX_CLOCK_SECONDS:
        found.append(f"clocks differ by {report.clock_seconds:.0f} s: synchronize this host (NTP).")
    return found


def format_report(report: DoctorReport) -> str:
    """Return the report as a table."""
    rows = [["devices", f"{report.n_devices} x {report.device_kind} on {report.host}"]]
    for dtype, flops in report.matmul_flops.items():
        peak = report.peak_flops.get(dtype)
        share = f", {flops / peak:.0%} of the published peak" if peak else ""
        rows.append([f"matmul, {dtype}", f"{flops / 1e12:.3g} TFLOP/s{share}"])
    rows.append(["memory", f"{report.memory_bytes / 1e9:.3g} GB/s"])
    links = report.link_bytes
    rows.append(["links", f"{links / 1e9:.3g} GB/s" if links else "one device"])
    if report.write_bytes and report.read_bytes:
        written, read = report.write_bytes / 1e6, report.read_bytes / 1e6
        rows.append(["working directory", f"writes {written:,.0f} MB/s, reads {read:,.0f} MB/s"])
    if report.clock_seconds is not None:
        rows.append(["clock", f"{report.created}, {report.clock_seconds:+.1f} s to the disk's"])
    shown = [name for name in ("python", "jax", *PLUGINS) if name in report.versions]
    versions = ", ".join(f"{name} {report.versions[name]}" for name in shown)
    return format_table([*rows, ["versions", versions]], "<")


def read_summary(run_dir: io.Path) -> str:
    """Return what a run's report says of its machine in a line; "" without one."""
    try:
        report = DoctorReport.from_json(io.read_json(run_dir / FILE))
    except UserError:
        return ""
    flops = report.matmul_flops["bfloat16" if report.platform != "cpu" else "float32"]
    speed = f"{flops / 1e12:.3g} TFLOP/s"
    return f"{report.n_devices} x {report.device_kind} on {report.host}, {speed} in matmuls"

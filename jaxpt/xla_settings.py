"""Choose the environment variables that XLA and JAX read for a kind of device; a user's values win.

JAX reads them when it starts, so commands set them before that, and `jaxpt plan` compiles with the
same. XLA ends a process at a flag that it does not know: tests/test_xla_settings.py gives
these to the compilers that are installed.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shlex
from collections.abc import Mapping

from jaxpt import hardware
from jaxpt.hardware import MAX_MEM_FRAC, Chip

log = logging.getLogger(__name__)

# One operation for all that a layer gathers or reduces. O1 schedules collectives to overlap with
# matmuls and pipelines them over layers. Source: NVIDIA's JAX-Toolbox, GPU_performance.md, 2026-07.
GPU_FLAGS = {
    "--xla_gpu_all_gather_combine_threshold_bytes": str(2**30),
    "--xla_gpu_all_reduce_combine_threshold_bytes": str(2**30),
    "--xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**27),
}
# CUDA graphs, by compute capability: none on Hopper, most of a step from Blackwell on
COMMAND_BUFFERS = {9: "", 10: "FUSION,CUSTOM_CALL"}
# Collectives run beside matmuls, gathers among them. Source: MaxText, benchmark_and_performance.md.
TPU_FLAGS = {
    "--xla_enable_async_all_gather": "true",
    "--xla_tpu_enable_async_collective_fusion": "true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "--xla_tpu_overlap_compute_collective_tc": "true",
}
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# JAX's name for the share of a card's memory, and an older one; it refuses both at once
MEM_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
NVIDIA_CARDS, DEVICE_FILES = pathlib.Path("/proc/driver/nvidia/gpus"), pathlib.Path("/dev")
VARIABLES = (*FLAG_VARIABLES, "JAX_OPTIMIZATION_LEVEL", *MEM_VARIABLES)


def choose_variables(platform: str, chip: Chip | None, user: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a device, a user's values among them; none for a CPU.

    Args:
        platform: "tpu", "cuda" or "cpu".
        chip: its row in hardware.py, if it has one.
        user: the environment as it is. A flag that it sets is left alone, and so is any other
            variable.
    """
    if platform == "cpu":
        return {}
    ours = {}
    if platform == "tpu":
        ours["LIBTPU_INIT_ARGS"] = join_flags(TPU_FLAGS, user.get("LIBTPU_INIT_ARGS", ""))
    if platform == "cuda":
        flags = dict(GPU_FLAGS)
        generation = chip.gpu.capability[0] if chip and chip.gpu else None
        if generation in COMMAND_BUFFERS:
            flags["--xla_gpu_enable_command_buffer"] = COMMAND_BUFFERS[generation]
        ours["JAX_OPTIMIZATION_LEVEL"] = "O1"
        if not user.keys() & set(MEM_VARIABLES):
            ours[MEM_VARIABLES[0]] = str(MAX_MEM_FRAC)
        ours["XLA_FLAGS"] = join_flags(flags, user.get("XLA_FLAGS", ""))
    joined = {name: ours[name] for name in FLAG_VARIABLES if name in ours}
    return ours | list_variables(user) | joined


def list_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what an environment tells XLA and JAX about compiling and memory."""
    return {name: environment[name] for name in VARIABLES if name in environment}


def join_flags(ours: Mapping[str, str], theirs: str) -> str:
    """Return a user's flags after those of ours that they do not set.

    A value that is no flag names a file of flags, which XLA reads if nothing else is there: it
    stays as it is.
    """
    if theirs.strip() and not theirs.strip().startswith("-"):
        return theirs
    names = {word.partition("=")[0] for word in theirs.split()}
    added = [f"{name}={value}" for name, value in ours.items() if name not in names]
    return " ".join([*added, *theirs.split()])


def set_variables() -> None:
    """Set the variables of this machine's accelerator, if it has one; call it before JAX starts."""
    platform, chip = find_accelerator()
    variables = choose_variables(platform, chip, os.environ)
    os.environ.update(variables)
    if variables:
        log.info(f"environment: {format_variables(variables)}")


def find_accelerator() -> tuple[str, Chip | None]:
    """Return the platform that JAX will take here and its chip, if known, without starting JAX."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    cards = sorted(NVIDIA_CARDS.glob("*/information"))
    if cards and asked.partition(",")[0] in ("", "cuda", "gpu"):
        lines = cards[0].read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
        return "cuda", hardware.find_chip(models[0]) if models else None
    is_tpu = any(DEVICE_FILES.glob("accel[0-9]*")) or (DEVICE_FILES / "vfio/0").exists()
    if is_tpu and asked.partition(",")[0] in ("", "tpu"):
        return "tpu", None
    return "cpu", None


def format_variables(variables: Mapping[str, str]) -> str:
    """Return them as they would be typed before a command."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())

"""The plan held against what a real run measured: seconds of a step and peak memory, before and after calibrating by one run."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pathlib
import statistics
from typing import Any, NamedTuple

from jaxpt import config, stage
from jaxpt.config import Config
from jaxpt.plan import compile, cost, hardware
from jaxpt.plan.hardware import GIB, Target
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train.metrics import read_metrics

log = logging.getLogger(__name__)


class MeasuredRun(NamedTuple):
    """What a run directory says of itself."""

    config: Config
    spec: ModelSpec
    target: Target
    step_seconds: float  # median over the lines of metrics.jsonl, the first left out
    memory_bytes: float  # peak of the first device; on CPU of the process


def compare_plan_to_runs(run_dirs: list[pathlib.Path]) -> list[dict[str, Any]]:
    """One record a run: planned and measured step_seconds and memory_bytes, their ratios measured / planned, and the same once
    the first run has calibrated the plan.

    What calibrates: a factor for time, and for memory the bytes that a process holds beside the step.
    Raises UserError for a directory that holds no run, or one on a device that the table does not know.
    """
    found: list[dict[str, Any]] = []
    for run_dir in run_dirs:
        run = read_measured_run(run_dir)
        log.info(f"check: {run_dir}: compiling its step for {run.target.name} ...")
        planned = cost.project_target(
            run.spec,
            run.config,
            run.target,
            compile.analyze_step(run.spec, run.config, run.target),
            1.0,
        )
        seconds, memory = planned["step_seconds"], planned["peak_bytes_per_device"]
        first = (
            found[0]
            if found
            else {
                "time_ratio": run.step_seconds / seconds,
                "beside_bytes": run.memory_bytes - memory,
            }
        )
        found.append(
            {
                "run": str(run_dir),
                "on": planned["on"],
                "method": planned["method"],
                "planned_step_seconds": seconds,
                "expected_step_seconds": sorted(
                    (planned["high"]["step_seconds"], planned["low"]["step_seconds"])
                ),
                "measured_step_seconds": run.step_seconds,
                "time_ratio": run.step_seconds / seconds,
                "planned_memory_bytes": memory,
                "measured_memory_bytes": run.memory_bytes,
                "memory_ratio": run.memory_bytes / memory,
                "beside_bytes": run.memory_bytes - memory,
                "calibrated_time_ratio": run.step_seconds / (seconds * first["time_ratio"]),
                "calibrated_memory_ratio": run.memory_bytes / (memory + first["beside_bytes"]),
            }
        )
    return found


def read_measured_run(run_dir: pathlib.Path) -> MeasuredRun:
    """Raises UserError where the run has not measured enough."""
    run_dir = stage.local_path(run_dir)
    try:
        settings = config.build_config(json.loads((run_dir / "config.json").read_text()))
        started = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--check {run_dir}: no config.json and starts.jsonl there. Give a run directory that train.py wrote."
        ) from None
    lines = [
        record for record in read_metrics(run_dir / "metrics.jsonl") if "step_seconds" in record
    ]
    if len(lines) < 3:
        raise UserError(
            f"--check {run_dir}: metrics.jsonl has {len(lines)} lines of training, wanted at least 3. Train on, or with a smaller train.log_every."
        )
    n_devices, _, kind = started[-1]["devices"].partition(" x ")
    seconds = statistics.median(record["step_seconds"] for record in lines[1:])
    memory = max(record["memory_bytes"] for record in lines)
    return MeasuredRun(
        settings,
        ModelSpec.load(run_dir / "spec.json"),
        find_run_target(run_dir, kind, int(n_devices)),
        seconds,
        memory,
    )


def find_run_target(run_dir: pathlib.Path, kind: str, n_devices: int) -> Target:
    """The target that JAX calls `n_devices x kind`. The cores of a CPU are this machine's, shared among its devices."""
    chip = hardware.find_chip(kind)
    if chip is None:
        raise UserError(
            f"--check {run_dir}: ran on {kind}, which is not in the table of chips ({', '.join(hardware.CHIPS)})."
        )
    if chip.platform == "tpu":
        fitting = [
            on
            for on in hardware.list_target_names(chip)
            if hardware.parse_target(on).n_devices == n_devices
        ]
        if not fitting:
            raise UserError(
                f"--check {run_dir}: ran on {n_devices} x {kind}, which is no slice that is offered."
            )
        return hardware.parse_target(fitting[0])
    target = hardware.parse_target(f"{chip.name}:{n_devices}")
    if chip.platform == "cuda":
        return target
    cores = (os.cpu_count() or 1) / n_devices
    names = ("bfloat16", "float32", "memory_bandwidth", "link")
    whole = {name: getattr(chip, name) * cores for name in names} | {
        "memory": math.floor(chip.memory_bytes * cores)
    }
    return dataclasses.replace(target, chip=dataclasses.replace(chip, **whole))


def compute_time_calibrations(found: list[dict[str, Any]]) -> dict[str, float]:
    """Factors of time by chip, from the first run of each: what `cost.plan` takes."""
    factors: dict[str, float] = {}
    for each in found:
        factors.setdefault(each["on"].partition(":")[0], each["time_ratio"])
    return factors


def format_plan_checks(found: list[dict[str, Any]]) -> str:
    lines = []
    for i, each in enumerate(found):
        low, high = each["expected_step_seconds"]
        lines += [
            f"{each['run']} on {each['on']} ({each['method']})",
            f"  seconds a step   planned {each['planned_step_seconds']:.3g} ({low:.3g} to {high:.3g})   measured {each['measured_step_seconds']:.3g}"
            f"   ratio {each['time_ratio']:.2f}",
            f"  peak memory      planned {each['planned_memory_bytes'] / GIB:.2f} GiB   measured {each['measured_memory_bytes'] / GIB:.2f} GiB"
            f"   ratio {each['memory_ratio']:.2f}",
        ]
        if i:
            lines.append(
                f"  calibrated by {found[0]['run']}: ratio of time {each['calibrated_time_ratio']:.2f}, of memory {each['calibrated_memory_ratio']:.2f}"
            )
        else:
            lines.append(
                f"  it calibrates: times x {each['time_ratio']:.2f}, {each['beside_bytes'] / GIB:.2f} GiB that the process holds beside the step"
            )
    return "\n".join(lines)

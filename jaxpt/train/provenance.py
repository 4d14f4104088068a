"""Write what a run directory tells about its run: settings, program, starts, mixture, tokenizer."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from typing import Any

import jax

from jaxpt import io, stage, xla_settings
from jaxpt.config import Config
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train.context import RunContext
from jaxpt.train.records import StartRecord

log = logging.getLogger(__name__)

# What decides the result of a run. Another mesh does not (law 3), nor do the other sections.
RESULT_SECTIONS = ("mixture", "model", "initialize", "train", "optim", "lora", "distill")


WATCHING_KNOBS = ("wandb_project", "prometheus_file", "profile_steps")  # of section train


def result_config(config: Config) -> dict[str, Any]:
    """Return what decides the result; packed data does by content, not by place."""
    sections = {}
    for name in RESULT_SECTIONS:
        sections[name] = dataclasses.asdict(getattr(config, name))
    del sections["mixture"]["packed_paths"]
    for name in WATCHING_KNOBS:
        del sections["train"][name]
    return sections


def list_changed_settings(run_dir: io.Path, config: Config) -> list[str]:
    """Return what decides the result and changed: "optim.peak_lr: 0.001, was 0.003"."""
    path = run_dir / "config.json"
    changes = []
    try:
        before = io.read_json(path)
        known = {name: dict(before[name]) for name in RESULT_SECTIONS}
    except (UserError, KeyError, TypeError, ValueError):
        log.warning(f"{path}: cannot be read; what changed since is not listed.")
        return []
    for section, knobs in stage.to_jsonable(result_config(config)).items():
        for name, value in knobs.items():
            old = known[section].get(name)
            if old != value:
                changes.append(f"{section}.{name}: {value!r}, was {old!r}")
    return changes


def write_mixture_phases(run_dir: io.Path, schedule: MixtureSchedule) -> None:
    """Write RUN/phases.json: what the run has read and will read, for tracing."""
    if jax.process_index() == 0:
        io.write_json(run_dir / "phases.json", schedule.phases)


def write_epochs(run_dir: io.Path, schedule: MixtureSchedule, n_sequences: int) -> None:
    """Write RUN/epochs.json: how often each source was read; records hold the first few."""
    if jax.process_index() == 0:
        try:
            io.write_json(run_dir / "epochs.json", schedule.compute_epochs(n_sequences))
        except UserError as error:
            log.warning(f"{error} The run goes on.")


def write_run_provenance(run: RunContext, spec: ModelSpec, at_step: int) -> None:
    """Write what a run needs to be read and repeated by itself.

    config.json, spec.json and tokenizer/; starts.jsonl and program.diff for every start.
    """
    if jax.process_index():
        return
    program, diff = stage.describe_program()
    start = StartRecord(
        started=program.started,
        command=program.command,
        working_dir=program.directory,
        host=program.host,
        versions=program.versions,
        commit=program.commit,
        step=at_step,
        n_processes=jax.process_count(),
        n_devices=run.mesh.size,
        device_kind=run.mesh.devices.flat[0].device_kind,
        variables=xla_settings.list_variables(os.environ),
    )
    line = json.dumps(start.to_json())
    run_dir = run.run_dir
    try:
        io.append_line(run_dir / "starts.jsonl", line)
    except UserError as error:
        log.warning(f"{error} The run goes on.")
    io.write_text(run_dir / "program.diff", diff)
    io.write_json(run_dir / "config.json", dataclasses.asdict(run.config))
    io.write_json(run_dir / "spec.json", spec)
    copy_tokenizer(run)


def copy_tokenizer(run: RunContext) -> None:
    """Copy the tokenizer beside the packed data into the run, unless a whole one is there."""
    source = io.path(run.packed[0]).parent / "tokenizer"
    tokenizer = run.run_dir / "tokenizer"
    names = list(io.list_files(source))
    if not names or not find_tokenizer_damage(tokenizer):
        return
    names.sort(key=lambda name: name == "manifest.json")
    for name in names:
        io.copy_file(source / name, tokenizer / name)
    damage = find_tokenizer_damage(tokenizer)
    if damage:
        log.warning(f"{damage} The run goes on, but cannot be exported without it.")


def find_tokenizer_damage(directory: io.Path) -> str:
    """Return what is wrong with a tokenizer that a stage published; empty if nothing is."""
    try:
        damage = io.find_damage(directory, verify=True)
    except UserError as error:
        return str(error)
    return f"{directory}: {io.printable(damage.name)} {damage.reason}." if damage else ""

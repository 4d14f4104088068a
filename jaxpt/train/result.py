"""Say what decides the result of a run, whether it is there already, and record it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import jax

from jaxpt import doctor, io, stage
from jaxpt.config import Config
from jaxpt.data.storage import open_storage
from jaxpt.spec import UserError
from jaxpt.stage import read_manifest
from jaxpt.train import provenance, teacher
from jaxpt.train.records import CheckpointRecord, TrainCounts
from jaxpt.train.session import Session
from jaxpt.weights.load import list_sources

log = logging.getLogger(__name__)

# what tells of a run: damaged, it is warned of, and the run stays finished
RECORDS = ("config.json", "spec.json", "metrics.jsonl", "phases.json", "growth.json", "epochs.json")
RECORDS += (doctor.FILE,)
Input = dict[str, str]  # path and fingerprint


def make_request(config: Config, packed: list[str]) -> stage.StageRequest:
    """Return what a run is asked for: settings, inputs and seed, wherever the inputs are."""
    inputs = find_inputs(config, packed)
    settings = provenance.result_config(config)
    del settings["initialize"]["source"], settings["distill"]["teacher"]
    return stage.StageRequest("train", settings, inputs, config.mixture.seed)


def find_inputs(config: Config, packed: list[str]) -> dict[str, Input]:
    """Return path and fingerprint of what a run reads: data, source of weights, teacher.

    An adapter's base is a source of weights too.
    """
    section = config.initialize
    inputs = {}
    for i, path in enumerate(packed):
        found = open_storage(path).manifest.fingerprint
        inputs[f"packed/{i}"] = {"path": path, "fingerprint": found}
    sources = teacher.list_inputs(config.distill)
    if section.source != "random":
        sources |= list_sources(section.source, "initialize", section.base)
    for name, directory in sources.items():
        found = stage.fingerprint_path(directory)
        inputs[name] = {"path": str(directory), "fingerprint": found}
    return inputs


def is_finished(run_dir: io.Path, request: stage.StageRequest, verify: bool) -> bool:
    """Return whether a run holds the whole end of this training.

    A damaged one is not finished: it resumes from the newest undamaged checkpoint.

    Raises:
        UserError: it holds the end of another training.
    """
    if not io.exists(run_dir / "manifest.json"):
        return False
    manifest = stage.read_manifest(run_dir)
    if manifest.stage != "train":
        raise UserError(
            f"{run_dir}: was written by {manifest.stage}. Train in a --workdir of its own, with "
            f"--config.initialize.source={run_dir}."
        )
    there = stage.request_fingerprint("train", manifest.config, manifest.inputs, manifest.seed)
    train = request.config["train"]
    n_done, n_steps = manifest.counts["n_steps"], train["steps"]
    if there == request.fingerprint:
        damage = io.find_damage(run_dir, verify)
        if damage:
            name = io.printable(damage.name)
            log.warning(f"train: {run_dir} was finished, but {name} {damage.reason}")
            if damage.name not in RECORDS:
                return False
        verified = "checksums verified, " if verify else ""
        log.info(
            f"train: {run_dir} is finished already ({verified}{n_done:,} steps), nothing to do"
        )
        return True
    same = {**request.config, "train": {**train, "steps": n_done}}
    if n_steps > n_done and stage.to_jsonable(same) == manifest.config:
        if has_same_source(manifest.inputs, request.inputs):
            log.info(f"train: {run_dir} had {n_done:,} steps and continues to {n_steps:,}")
            return False
        request = dataclasses.replace(request, config=same)
    difference = stage.describe_difference(manifest, request)
    raise UserError(
        f"train: {run_dir} holds the result of {difference}. Give another --workdir; with "
        f"--config.initialize.source={run_dir} --config.initialize.mode=resume it goes on from "
        "this one."
    )


def has_same_source(there: Mapping[str, Input], asked: Mapping[str, Input]) -> bool:
    """Return whether two runs start from the same weights: by content, or by path.

    A source that has trained on is the same one for a run that has left it.
    """
    one, other = there.get("initialize"), asked.get("initialize")
    if one is None or other is None:
        return one is other
    return one["fingerprint"] == other["fingerprint"] or one["path"] == other["path"]


def remove_manifest(run_dir: io.Path) -> None:
    """Mark a run that goes on as not finished, which launch/ and later stages look at."""
    if jax.process_index() == 0:
        io.remove(run_dir / "manifest.json")


def write_manifest(session: Session, request: stage.StageRequest) -> None:
    """Write a finished run's manifest, so that the next start does nothing."""
    if jax.process_index():
        return
    assert session.saved
    run = session.run
    saved = read_manifest(session.saved)
    heldout = CheckpointRecord.from_json(saved.counts, str(session.saved)).heldout
    losses = heldout.losses if heldout else {}
    n_params = sum(x.size for x in jax.tree.leaves(session.state.params))
    sums = session.meter.read()
    counts = TrainCounts(session.step, session.n_sequences, losses, n_params, **vars(sums))
    manifest = stage.make_manifest(
        request,
        sealed=seal_run(run.run_dir, session.step),
        counts=counts.to_json(),
        tokenizer=run.dataset.tokenizer,
        seconds=sums.seconds,
    )
    io.write_json(run.run_dir / "manifest.json", manifest)
    log.info(f"train: {session.saved}: {session.step:,} steps, {sums.n_tokens:,} tokens")


def seal_run(run_dir: io.Path, step: int) -> dict[str, io.SealedFile]:
    """Return the files of a finished run: its last checkpoint, its tokenizer, its records."""
    last = run_dir / "checkpoints" / str(step)
    sealed = {}
    for name, file in io.read_sealed(last).items():
        sealed[f"checkpoints/{step}/{name}"] = file
    others = [f"checkpoints/{step}/manifest.json"]
    others += [f"tokenizer/{name}" for name in io.list_files(run_dir / "tokenizer")]
    others += [name for name in RECORDS if io.exists(run_dir / name)]
    for name in others:
        sealed[name] = io.SealedFile(io.size(run_dir / name) or 0, io.sha256(run_dir / name))
    return sealed

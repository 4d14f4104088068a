"""Start a run from weights: keep only them, or continue the whole run that they come from."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple

import jax

from jaxpt.config import Config
from jaxpt.data import loader
from jaxpt.data.mixture import MixturePhase, schedule_from_history
from jaxpt.spec import Manifest, UserError
from jaxpt.stage import local_path
from jaxpt.train import state
from jaxpt.train.optimizer import NewParams
from jaxpt.train.records import CheckpointRecord, NewParamsRecord, TrainProgress
from jaxpt.train.state import TrainState
from jaxpt.weights import checkpoint, growth
from jaxpt.weights.initialize import InitResult

log = logging.getLogger(__name__)


class RunStart(NamedTuple):
    """The first state of a run."""

    state: TrainState
    progress: TrainProgress
    new_params: NewParams


def init_train_state(
    config: Config, init: InitResult, dataset: loader.PackedDataset, mesh: jax.sharding.Mesh
) -> RunStart:
    """Return a run's first state by initialize.mode; log what it keeps.

    Args:
        config: the recipe.
        init: the initialized, perhaps grown, model.
        dataset: the packed sequences.
        mesh: the devices.
    """
    section, model = config.initialize, init.model
    if section.mode == "continue":
        log_init_plan(config, init)
        first = state.init_state(model.params, model.spec, config, mesh)
        new_params = find_new_params(init)
        return RunStart(first, TrainProgress(), new_params)
    source = checkpoint.find_checkpoint(local_path(section.source))
    if source is None or not (source / checkpoint.TRAIN_STATE).is_dir():
        raise UserError(
            f"initialize.mode: {section.mode} needs a run's checkpoint, but {section.source} is "
            "none. Use continue, which needs only weights."
        )
    manifest = Manifest.load(source)
    record = CheckpointRecord.from_json(manifest.counts, str(source))
    check_resumed_data(manifest, config, dataset, section.source)
    if record.step >= config.train.steps:
        raise UserError(
            f"initialize.mode: {section.source} is at step {record.step}, but train.steps is "
            f"{config.train.steps}. Set more."
        )
    log_init_plan(config, init)
    return RunStart(*continue_state(config, init, source, record, mesh))


def continue_state(
    config: Config,
    init: InitResult,
    source: Any,
    record: CheckpointRecord,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, TrainProgress, NewParams]:
    """Return the state of a source run around the model, with grown moments if it grew."""
    assert record.progress
    spec = init.growths[0].spec if init.growths else init.model.spec
    abstract = state.make_abstract_state(spec, config, mesh)
    restored = state.restore_state(source, init.model.params, abstract)
    recorded = record.new_params or NewParamsRecord({}, 0, "none")
    new_params = NewParams.from_record(recorded)
    for i, grown in enumerate(init.growths):
        before = new_params if i else NewParams()
        opt_state, skip_state, new_params = state.grow_state(
            restored, grown, config.optim, config.initialize.moments, mesh, before
        )
        restored = restored._replace(opt_state=opt_state, skip_state=skip_state)
    # growths of train.grow before this step; at this very step only if the source had grown there
    n_growths = 0
    for i, (at, _) in enumerate(config.train.grow):
        is_done = at == record.step and i < record.progress.n_growths
        n_growths += at < record.step or is_done
    progress = dataclasses.replace(record.progress, n_growths=n_growths)
    if init.growths:
        progress = dataclasses.replace(progress, interval_loss_sum=0.0, interval_n_tokens=0.0)
    return restored, progress, new_params


def find_new_params(init: InitResult) -> NewParams:
    """Return what the last growth added, also of a model that initialize.py grew."""
    if init.growths:
        new = growth.find_new_params_through(init.growths)
        return NewParams(new)
    recorded = init.model.record.get("new_params")
    if not recorded:
        return NewParams()
    record = NewParamsRecord.from_json(recorded)
    new_params = NewParams.from_record(record)
    return NewParams(new_params.new)


def check_resumed_data(
    manifest: Manifest, config: Config, dataset: loader.PackedDataset, run: object
) -> None:
    """Raise UserError unless a resumed run finds the sequences that it was reading.

    With mixture.allow_changed_data naming the changed data, what is no longer reproducible is
    logged instead.

    Args:
        manifest: of the checkpoint.
        config: the recipe.
        dataset: the packed sequences.
        run: for messages.
    """
    record = CheckpointRecord.from_json(manifest.counts, str(run))
    seed = config.mixture.seed
    if record.mixture_seed not in (None, seed):
        raise UserError(
            f"mixture.seed: expected {record.mixture_seed}, the order that {run} reads in, got "
            f"{seed}, which would start in the middle of its epochs. Set it back, or start over."
        )
    if record.data_fingerprint == dataset.fingerprint:
        return
    places = {source.storage.where for source in dataset.sources.values()}
    where = ", ".join(sorted(places))
    if manifest.tokenizer != dataset.tokenizer:
        raise UserError(
            f"{run}: has read data of tokenizer {manifest.tokenizer}, but {where} was packed with "
            f"{dataset.tokenizer}. Pack with the run's tokenizer, or start over."
        )
    breaks = describe_broken_data(record, config, dataset)
    if config.mixture.allow_changed_data != dataset.fingerprint:
        raise UserError(
            f"{run}: the data in {where} has changed since it was read. Restore it, or use another "
            f"--workdir, or continue with --config.mixture.allow_changed_data={dataset.fingerprint}"
            f", after which: {breaks}."
        )
    log.warning(f"{run} continues on changed data: {breaks}")


def describe_broken_data(
    record: CheckpointRecord, config: Config, dataset: loader.PackedDataset
) -> str:
    """Return what is no longer reproducible when a run continues on changed data."""
    progress = record.progress or TrainProgress()
    history: list[MixturePhase] = list(progress.data_history)
    n_sequences: dict[str, int] = {}
    for phase in history:
        n_sequences |= dict.fromkeys(phase.shares, 1)  # some may be gone
    n_sequences |= dataset.n_sequences
    schedule = schedule_from_history(history, n_sequences, config.mixture.seed)
    started = []
    epochs = schedule.compute_epochs(progress.n_sequences)
    for name, n in epochs.items():
        if n % 1:
            started.append(f"{name} ({n % 1:.0%} of an epoch)")
    return (
        "sequences read in the current epochs may be read again and others not: "
        f"{', '.join(started) or 'none'}; the documents of steps up to {record.step:,} can no "
        "longer be traced; the run cannot be repeated from one data set"
    )


def log_init_plan(config: Config, init: InitResult) -> None:
    """Log what a start from weights keeps."""
    if config.initialize.source != "random":
        for line in format_init_plan(config, init):
            log.info(line)


def format_init_plan(config: Config, init: InitResult) -> list[str]:
    """Return lines: each part of a run, and what becomes of it."""
    section, optim = config.initialize, config.optim
    record = init.model.record
    policies = [grown.moments or section.moments for grown in init.growths]
    warmup = f"{optim.warmup_steps} steps up to {optim.peak_lr:g}, then {optim.schedule}"
    step, schedule, moments, sequences = "0", f"restarts: {warmup}", "0", "0"
    if section.mode != "continue":
        progress = record.get("progress") or {}
        step, schedule = f"kept: {record['step']:,}", "continues"
        moments = f"mapped: {', '.join(policies)}" if policies else "kept"
        sequences = f"kept: {progress.get('n_sequences', 0):,}"
    parts = {
        "weights": "grown" if init.growths else "kept",
        "step": step,
        "schedule": schedule,
        "moments": moments,
        "sequences": sequences,
        "random state": "none: every draw comes from a seed and a position",
    }
    lines = [f"initialize.mode: {section.mode}"]
    lines += [f"  {part:<13} {fate}" for part, fate in parts.items()]
    trained_with = record.get("optimizer") or "adamw"
    # 2605.06654: a base trained with one optimizer degrades under another
    if trained_with != optim.name:
        lines.append(
            f"warning: {section.source} was trained with {trained_with}, this run uses "
            f"{optim.name}; such a change costs quality. Compare with a short run"
        )
    lr = record.get("lr")
    if section.mode == "continue" and lr and optim.peak_lr > lr:
        lines.append(
            f"  its last learning rate was {lr:.2e}; {optim.peak_lr:.2e} re-warms it, which "
            "forgets some before it learns (2403.08763)"
        )
    return lines

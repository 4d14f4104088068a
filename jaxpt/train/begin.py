"""Find where a run starts: at its own checkpoint, or with weights, and what it keeps of them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpt import initialize, io, stage
from jaxpt.config import Config, InitializeConfig, LoraConfig, MixtureConfig, OptimConfig
from jaxpt.data import loader
from jaxpt.data.mixture import MixturePhase, schedule_from_history
from jaxpt.growth import verify
from jaxpt.growth.new_params import NewParams, find_new_params_through
from jaxpt.growth.records import NewParamsRecord
from jaxpt.initialize import InitResult
from jaxpt.model import transformer
from jaxpt.model.transformer import Params
from jaxpt.spec import LoraSpec, Manifest, ModelSpec, UserError
from jaxpt.stage import read_manifest, read_spec
from jaxpt.text import format_table
from jaxpt.train import forgetting, gate, meter, metrics, provenance, state, step
from jaxpt.train.average import describe_average, init_average
from jaxpt.train.context import RunContext
from jaxpt.train.meter import LostWork
from jaxpt.train.records import CheckpointRecord, HeldoutRecord, TrainProgress
from jaxpt.train.schedule import count_warmup_steps, make_lr_schedule
from jaxpt.train.state import TrainState
from jaxpt.weights import checkpoint
from jaxpt.weights.load import LoadedModel, list_sources

log = logging.getLogger(__name__)

MAX_RATE_RISE = 1.1  # of the learning rate through a resume, without a warning


class RunStart(NamedTuple):
    """Where a run starts or continues.

    Attributes:
        spec: the architecture.
        progress: the position.
        new_params: what the last growth added.
        mixture: in force: as configured, or as replay changed it.
        parent: the parent's held-out losses; None where unknown.
        reference: fingerprint of the model that DPO compares with; None: no other model.
    """

    spec: ModelSpec
    progress: TrainProgress
    new_params: NewParams
    mixture: MixtureConfig
    parent: HeldoutRecord | None = None
    reference: str | None = None


class InitialModel(NamedTuple):
    """What a run that is not resumed starts from.

    Attributes:
        start: spec and position.
        state: the first state.
        record: what is known of the weights, for the check of their loss.
        is_grown: whether they grew since that record.
    """

    start: RunStart
    state: TrainState
    record: dict[str, Any]
    is_grown: bool


def read_start(run: RunContext, resumed: io.Path) -> RunStart:
    """Return where a checkpoint of the run itself left it; log what changed since."""
    spec = read_spec(resumed / "spec.json")
    manifest = read_manifest(resumed)
    record = CheckpointRecord.from_json(manifest.counts, str(resumed))
    check_resumed_data(manifest, run.config.mixture, run.dataset, run.run_dir)
    progress = record.progress
    if progress is None:
        raise UserError(
            f"{resumed}: was initialized, not trained, here. Train in a --workdir of its own, "
            f"with --config.initialize.source={run.run_dir}."
        )
    check_optimizer(record, run.config.optim, str(run.run_dir))
    n = progress.n_sequences
    log.info(f"resumed from {resumed}: step {record.step:,}, {n:,} sequences read")
    log.info(initialize.describe_model(spec))
    check_same_adapters(resumed, spec, run.config.lora)
    check_same_teacher(resumed, record, run)
    check_same_reference(resumed, record, run, spec)
    for change in provenance.list_changed_settings(run.run_dir, run.config):
        log.warning(f"changed: {change}")
    warn_of_higher_rate(record, run.config, run.run_dir)
    new_params = NewParams.from_record(record.new_params or NewParamsRecord({}, 0, "none"))
    mixture = forgetting.restore_replay(run.config.mixture, record.replay)
    return RunStart(spec, progress, new_params, mixture, record.parent, record.reference)


def read_lost_work(run_dir: io.Path, resumed: io.Path | None) -> LostWork:
    """Return what an earlier start left of its time after the checkpoint that is resumed."""
    step = int(resumed.name) if resumed else None
    try:
        last = metrics.find_dropped(run_dir / "metrics.jsonl", step).last
    except UserError as error:
        log.warning(f"{error} What an earlier start spent after its checkpoint is not counted.")
        last = None
    return LostWork(last, meter.read_spent_time(run_dir))


def init_run(run: RunContext) -> InitialModel:
    """Initialize a run by config.initialize, and grow."""
    config, dataset = run.config, run.dataset
    section = config.initialize
    init = initialize.init_model(
        section,
        config.model,
        run.mesh,
        dataset,
        run.measuring_batches,
        functools.partial(gate.check_parent, run.heldout, section),
    )
    check_tokens(section.source, init.model, dataset)
    model = end_as_documents(init.model, dataset)
    init = init._replace(model=model)
    if init.parent:
        verify_init(run, init, init.parent)
    elif model.source and jax.process_index() == 0:
        report = model.source / "growth.json"
        if io.exists(report):
            io.check_published([report])
            io.copy_file(report, run.run_dir / "growth.json")
    model = add_adapters(run, model)
    state_now, progress, new_params = init_train_state(run, init._replace(model=model))
    reference = fingerprint_reference(run, model.spec)
    start = RunStart(model.spec, progress, new_params, config.mixture, reference=reference)
    is_grown = bool(init.parent) or gate.has_just_grown(model)
    return InitialModel(start, state_now, gate.describe_origin(model), is_grown)


def copy_reference(run: RunContext, spec: ModelSpec, params: Params) -> Params | None:
    """Return a copy of the initial parameters for DPO, in the dtype of matmuls; None: not needed.

    A step takes over those that it trains.
    """
    if not step.has_reference_params(run.config.train, spec):
        return None
    dtype = jnp.dtype(run.config.train.compute_dtype)
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)


def load_reference(run: RunContext, spec: ModelSpec) -> Params | None:
    """Return what `copy_reference` did when the run began, made again from its source."""
    if not step.has_reference_params(run.config.train, spec):
        return None
    config = run.config
    init = initialize.init_model(
        config.initialize, config.model, run.mesh, run.dataset, run.measuring_batches
    )
    return copy_reference(run, spec, init.model.params)


def fingerprint_reference(run: RunContext, spec: ModelSpec) -> str | None:
    """Return the fingerprint of what `load_reference` reads; None: not needed.

    Of a run that is its newest checkpoint: the run may train on.
    """
    if not step.has_reference_params(run.config.train, spec):
        return None
    section = run.config.initialize
    found = []
    for name, source in list_sources(section.source, "initialize", section.base).items():
        weights = checkpoint.find_checkpoint(source)
        known = weights is None and run.fingerprints.get(name)
        found.append(known or stage.fingerprint_path(weights or source))
    return stage.fingerprint([found, section.grow, section.param_dtype])


def check_same_reference(
    resumed: io.Path, record: CheckpointRecord, run: RunContext, spec: ModelSpec
) -> None:
    """Raise UserError unless DPO goes on with the reference that it began with."""
    got = fingerprint_reference(run, spec)
    if record.reference != got:
        raise UserError(
            f"train.dpo_beta: expected the reference {record.reference or 'none'}, which {resumed} "
            f"was tuned from, got {got or 'none'}: {run.config.initialize.source} as it is now. "
            "Name the checkpoint that the run began with as initialize.source, or use another "
            "--workdir."
        )


def add_adapters(run: RunContext, model: LoadedModel) -> LoadedModel:
    """Return the model with the adapters of config.lora; without them, the model."""
    adapters = initialize.make_lora_spec(run.config.lora, model.spec)
    if adapters is None:
        return model
    seed = run.config.initialize.seed
    spec, params = transformer.add_adapters(model.spec, model.params, adapters, seed, run.mesh)
    n_trained = transformer.count_trained_params(spec)
    log.info(f"adapters: rank {adapters.rank}, {n_trained:,} parameters train, the base is frozen")
    return model._replace(spec=spec, params=params)


def check_same_adapters(resumed: io.Path, spec: ModelSpec, section: LoraConfig) -> None:
    """Raise UserError unless a run goes on with the adapters that it began with."""
    expected, got = spec.lora, initialize.make_lora_spec(section, spec)
    if expected != got:
        raise UserError(
            f"lora: expected {describe_adapters(expected)}, with which {resumed} was trained, got "
            f"{describe_adapters(got)}. Set them back, or use another --workdir."
        )


def check_same_teacher(resumed: io.Path, record: CheckpointRecord, run: RunContext) -> None:
    """Raise UserError unless a run goes on with the teacher that it began with."""
    got = run.teacher.fingerprint if run.teacher else None
    if record.teacher != got:
        raise UserError(
            f"distill.teacher: expected {record.teacher or 'none'}, the files with which {resumed} "
            f"was trained, got {got or 'none'}. Restore them, or go on in another --workdir, with "
            f"--config.initialize.source={run.run_dir}."
        )


def describe_adapters(lora: LoraSpec | None) -> str:
    """Return the knobs of adapters as text."""
    if lora is None:
        return "rank 0"
    return f"rank {lora.rank}, alpha {lora.alpha:g}, targets {','.join(lora.targets)}"


def verify_init(run: RunContext, init: InitResult, parent: LoadedModel) -> None:
    """Compare a model that grew with its parent and write growth.json."""
    section = run.config.initialize
    report = verify.verify_growth(
        parent,
        init.model,
        section.grow,
        init.growths,
        run.mesh,
        seq_len=run.dataset.seq_len,
        heldout=run.heldout,
        batches=run.measuring_batches,
        moments=section.moments if section.mode == "grow" else "fresh",
    )
    verify.write_growth(report, run.run_dir)


def check_tokens(source: str, model: LoadedModel, dataset: loader.PackedDataset) -> None:
    """Raise UserError unless the data holds the model's tokens."""
    if model.tokenizer not in (None, dataset.tokenizer):
        raise UserError(
            f"initialize.source: {source} was trained with another tokenizer than the data was "
            "packed with. Pack with the model's tokenizer."
        )
    if dataset.n_ids > model.spec.vocab_size:
        raise UserError(
            f"initialize.source: the data has token ids up to {dataset.n_ids - 1}, the "
            f"model {model.spec.vocab_size} embedding rows. Pack with the model's tokenizer."
        )


def end_as_documents(model: LoadedModel, dataset: loader.PackedDataset) -> LoadedModel:
    """Return the model with the end of the data's documents among its end tokens."""
    ids = model.spec.eos_ids
    added = tuple(i for i in dataset.special_tokens.eos_ids if i not in ids)
    if not added:
        return model
    log.warning(
        f"initialize: documents of the data end by token {added[0]}, which is not among the "
        f"model's end tokens {list(ids)}. It is added: the model learns to end texts by it."
    )
    return model._replace(spec=model.spec.replace(eos_ids=(*ids, *added)))


def read_parent_losses(run_dir: io.Path, heldout: gate.HeldoutData) -> dict[str, float] | None:
    """Return the parent's losses on these sequences, as its growth recorded them.

    None if it did not, or on others.
    """
    path = run_dir / "growth.json"
    if not io.exists(path):
        return None
    try:
        report = io.read_json(path)
        losses = report["heldout_loss"]
        measured_on = report["heldout_sequences"], report["heldout_seq_len"]
        if not losses or measured_on != (heldout.n_sequences, heldout.seq_len):
            return None
        parent = losses["parent"]
        return {name: parent[name] for name in heldout.dataset.names if name in parent}
    except (UserError, KeyError, TypeError, ValueError):
        log.warning(f"{path}: cannot be read; the parent's losses are measured again.")
        return None


def init_train_state(
    run: RunContext, init: InitResult
) -> tuple[TrainState, TrainProgress, NewParams]:
    """Return the first state around an initialized, perhaps grown, model; log what it keeps."""
    config, model = run.config, init.model
    section = config.initialize
    if section.mode == "continue":
        log_init_plan(section, config.optim, init)
        first = state.init_state(model.params, model.spec, config.optim, run.mesh)
        return first, TrainProgress(), find_new_params(init)
    source = checkpoint.find_checkpoint(io.path(section.source))
    if source is None or not io.exists(source / checkpoint.TRAIN_STATE):
        raise UserError(
            f"initialize.mode: {section.mode} needs a run's checkpoint, but {section.source} is "
            "none. Use continue, which needs only weights."
        )
    if read_spec(source / "spec.json").lora:
        raise UserError(
            f"initialize.mode: {section.mode} keeps the optimizer, but {section.source} trained "
            "adapters alone, which are merged into the base here. Use continue."
        )
    manifest = read_manifest(source)
    record = CheckpointRecord.from_json(manifest.counts, str(source))
    check_resumed_data(manifest, config.mixture, run.dataset, section.source)
    if record.step >= config.train.steps:
        raise UserError(
            f"initialize.mode: {section.source} is at step {record.step}, but train.steps is "
            f"{config.train.steps}. Set more."
        )
    check_optimizer(record, config.optim, section.source)
    warn_of_higher_rate(record, config, source.parent.parent)
    log_init_plan(section, config.optim, init)
    return continue_state(run, init, source, record)


def continue_state(
    run: RunContext, init: InitResult, source: io.Path, record: CheckpointRecord
) -> tuple[TrainState, TrainProgress, NewParams]:
    """Return the state of a source run around the model, with grown moments if it grew."""
    assert record.progress
    config, section = run.config, run.config.initialize
    spec = init.growths[0].spec if init.growths else init.model.spec
    abstract = state.make_abstract_state(spec, config.optim, run.mesh, section.param_dtype)
    average = describe_average(config.optim, config.train.steps)
    restored = state.restore_state(source, init.model.params, abstract, average)
    recorded = record.new_params or NewParamsRecord({}, 0, "none")
    new_params = NewParams.from_record(recorded)
    for i, grown in enumerate(init.growths):
        before = new_params if i else NewParams()
        opt_state, skip_state, new_params = state.grow_state(
            restored, grown, config.optim, section.moments, run.mesh, before
        )
        restored = restored._replace(opt_state=opt_state, skip_state=skip_state)
    if init.growths:  # an average begins anew
        child = state.make_abstract_state(init.model.spec, config.optim, run.mesh)
        restored = restored._replace(average=init_average(child.average))
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
    """Return what the last growth added, also of a model that jaxpt initialize grew."""
    if init.growths:
        new = find_new_params_through(init.growths)
        return NewParams(new)
    recorded = init.model.record.get("new_params")
    if not recorded:
        return NewParams()
    record = NewParamsRecord.from_json(recorded)
    new_params = NewParams.from_record(record)
    return NewParams(new_params.new)


def check_optimizer(record: CheckpointRecord, optim: OptimConfig, source: str) -> None:
    """Raise UserError if a run that goes on has moments of another optimizer."""
    for knob, had in (("name", record.optimizer), ("moment_dtype", record.moment_dtype)):
        has = getattr(optim, knob)
        if had not in (None, has):
            raise UserError(
                f"optim.{knob}: {source} has moments of {had}, which {has} cannot use. Set it "
                "back, or start from the weights alone in another --workdir, by "
                f"--config.initialize.source={source}."
            )


def warn_of_higher_rate(record: CheckpointRecord, config: Config, run_dir: io.Path) -> None:
    """Warn where the schedule raises the rate that a run had, as more steps after a decay do.

    Args:
        record: of the checkpoint that the run goes on from.
        config: with the schedule from here on.
        run_dir: where the checkpoints before it are.
    """
    step = record.step
    n_warmup = count_warmup_steps(config.optim, config.train.steps)
    if step <= n_warmup or not is_rate_higher(config, step, record.lr):
        return
    after = find_rate(config, step + 1)
    log.warning(
        f"the learning rate rises from {record.lr:.2e} to {after:.2e} at step {step + 1:,}: the "
        "schedule is another one than up to here, and what a decay has won is lost in part"
    )
    for earlier in reversed(checkpoint.list_steps(run_dir)):
        directory = run_dir / "checkpoints" / str(earlier)
        lr = read_manifest(directory).counts.get("lr")
        if lr and not is_rate_higher(config, earlier, lr):
            log.warning(
                f"{directory} is from before the decay. To go on from there: another --workdir, "
                f"--config.initialize.source={directory} --config.initialize.mode=resume"
            )
            return
    log.warning("no checkpoint from before the decay is left; train.keep_every keeps some")


def is_rate_higher(config: Config, step: int, lr: float | None) -> bool:
    """Return whether the schedule has a clearly higher rate at a step than the run had there."""
    is_to_come = step < config.train.steps
    return lr is not None and is_to_come and find_rate(config, step) > MAX_RATE_RISE * lr


def find_rate(config: Config, step: int) -> float:
    """Return the learning rate of a step, counted from 1."""
    lr_at = make_lr_schedule(config.optim, config.train)
    return float(lr_at(jnp.int32(step - 1)))


def check_resumed_data(
    manifest: Manifest, mixture: MixtureConfig, dataset: loader.PackedDataset, run: object
) -> None:
    """Raise UserError unless a resumed run finds the sequences that it was reading.

    With mixture.allow_changed_data naming the changed data, what is no longer reproducible is
    logged instead.

    Args:
        manifest: of the checkpoint.
        mixture: as configured.
        dataset: the packed sequences.
        run: for messages.
    """
    record = CheckpointRecord.from_json(manifest.counts, str(run))
    seed = mixture.seed
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
    breaks = describe_broken_data(record, seed, dataset)
    if mixture.allow_changed_data != dataset.fingerprint:
        raise UserError(
            f"{run}: the data in {where} has changed since it was read. Restore it, or use another "
            f"--workdir, or continue with --config.mixture.allow_changed_data={dataset.fingerprint}"
            f", after which: {breaks}."
        )
    log.warning(f"{run} continues on changed data: {breaks}")


def describe_broken_data(record: CheckpointRecord, seed: int, dataset: loader.PackedDataset) -> str:
    """Return what is no longer reproducible when a run continues on changed data."""
    progress = record.progress or TrainProgress()
    history: list[MixturePhase] = list(progress.data_history)
    n_sequences: dict[str, int] = {}
    for phase in history:
        n_sequences |= dict.fromkeys(phase.shares, 1)  # some may be gone
    n_sequences |= dataset.n_sequences
    schedule = schedule_from_history(history, n_sequences, seed)
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


def log_init_plan(section: InitializeConfig, optim: OptimConfig, init: InitResult) -> None:
    """Log what a start from weights keeps."""
    if section.source != "random":
        for line in format_init_plan(section, optim, init):
            log.info(line)


def format_init_plan(section: InitializeConfig, optim: OptimConfig, init: InitResult) -> list[str]:
    """Return lines: each part of a run, and what becomes of it."""
    record = init.model.record
    policies = [grown.moments or section.moments for grown in init.growths]
    warmup = f"{optim.warmup_frac:.1%} of the steps up to {optim.peak_lr:g}, then {optim.schedule}"
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
    lines += format_table(list(parts.items()), "<", indent="  ").splitlines()
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

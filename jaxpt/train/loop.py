"""Train: start or resume a run, loop over steps, log, evaluate, save, grow."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxpt import sharding, stage
from jaxpt.config import Config, MixtureConfig
from jaxpt.data import loader
from jaxpt.data.mixture import MixturePhase, MixtureSchedule
from jaxpt.data.storage import open_storage
from jaxpt.model import loss
from jaxpt.model.kernels import select
from jaxpt.spec import Manifest, ModelSpec, UserError
from jaxpt.train import begin, distributed, forgetting, gate, optimizer, state, step, verify
from jaxpt.train.metrics import DeviceCost, MetricsLogger, read_metrics
from jaxpt.train.optimizer import NewParams
from jaxpt.train.records import (
    CheckpointRecord,
    HeldoutMetrics,
    HeldoutRecord,
    NewParamsRecord,
    StartRecord,
    TrainCounts,
    TrainProgress,
)
from jaxpt.train.state import TrainState
from jaxpt.train.step import StepMetrics
from jaxpt.weights import checkpoint, hub, initialize

log = logging.getLogger(__name__)

# What decides the result of a run. Another mesh does not (law 3), nor do the other sections.
RESULT_SECTIONS = ("mixture", "model", "initialize", "train", "optim")

Inputs = dict[str, dict[str, str]]
EstimateCost = Callable[[ModelSpec], DeviceCost]


def no_cost(spec: ModelSpec) -> DeviceCost:
    """Return an unknown cost."""
    return DeviceCost()


def train_model(
    config: Config, workdir: pathlib.Path, estimate_device_cost: EstimateCost = no_cost
) -> None:
    """Train in `workdir` to train.steps.

    Starts from the run's own newest checkpoint, else from config.initialize.

    Args:
        config: the recipe.
        workdir: the run directory.
        estimate_device_cost: what a device costs and can do for a model, for MFU and money.
    """
    run_dir = stage.local_path(workdir)
    distributed.join_processes(run_dir)
    distributed.enable_compilation_cache()
    packed = list(config.mixture.packed_paths) or [str(run_dir / "packed")]
    inputs = find_inputs(config, packed)
    request = stage.StageRequest("train", result_config(config), inputs, config.mixture.seed)
    if is_finished(run_dir, request):
        return
    run = TrainingRun(config, run_dir, packed, estimate_device_cost)
    run.start()
    run.loop()
    run.finish(request)


def result_config(config: Config) -> dict[str, Any]:
    """Return the sections that decide the result."""
    sections = {}
    for name in RESULT_SECTIONS:
        sections[name] = dataclasses.asdict(getattr(config, name))
    return sections


def find_inputs(config: Config, packed: list[str]) -> Inputs:
    """Return path and fingerprint of what a run reads."""
    inputs = {}
    for path in packed:
        found = open_storage(path).manifest.fingerprint
        inputs[f"packed {path}"] = {"path": path, "fingerprint": found}
    if config.initialize.source != "random":
        source = initialize.resolve_source(config.initialize.source)
        found = stage.fingerprint_path(source)
        inputs["initialize"] = {"path": str(source), "fingerprint": found}
    return inputs


class InitialModel(NamedTuple):
    """What a run that is not resumed starts from.

    Attributes:
        start: state and position.
        spec: the architecture.
        record: what is known of the weights, for the check of their loss.
        is_grown: whether they grew since that record.
    """

    start: begin.RunStart
    spec: ModelSpec
    record: dict[str, Any]
    is_grown: bool


class TrainingRun:
    """One run: its data, state and position.

    Metrics stay on the devices until a line is due, so that the host never waits for a step.
    """

    def __init__(
        self,
        config: Config,
        run_dir: pathlib.Path,
        packed: list[str],
        estimate_device_cost: EstimateCost,
    ):
        """Open the data and the mesh, and check that they fit each other."""
        self.config = config
        self.run_dir = run_dir
        self.packed = packed
        self.estimate_device_cost = estimate_device_cost
        self.started = time.monotonic()
        optimizer.check_name(config.optim)
        self.dataset = loader.open_packed(packed)
        self.mesh = sharding.make_mesh(config.mesh)
        if self.dataset.seq_len != config.pack.seq_len:
            raise UserError(
                f"pack.seq_len: expected {self.dataset.seq_len}, as the packed sequences have, got "
                f"{config.pack.seq_len}. Set it to that, or pack again."
            )
        self.heldout = gate.HeldoutData(config, packed, self.mesh)
        self.measuring_batches = verify.make_measuring_batches(config, packed, self.mesh)
        self.parent_loss: dict[str, float] | None = None
        self.waiting: list[StepMetrics] = []
        self.is_terminated = False
        self.is_stopping = False

    # ---- start

    def start(self) -> None:
        """Resume from the newest checkpoint, or initialize; compile the step; open the logs."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        resumed = checkpoint.find_newest(self.run_dir)
        self.resumed = resumed
        initial = None
        replay = None
        if resumed:
            replay = self.resume(resumed)
        else:
            initial = self.initialize()
            self.spec = initial.spec
            self.progress = initial.start.progress
            self.new_params = initial.start.new_params
        self.check_sizes()
        self.mixture = forgetting.restore_replay(self.config.mixture, replay)
        history = list(self.progress.data_history)
        self.schedule = self.make_schedule(history)
        train = self.config.train
        n_left = train.steps - self.progress.step
        self.n_sequences = self.progress.n_sequences + n_left * train.batch_size
        self.schedule.check_max_epochs(self.n_sequences, self.mixture.max_epochs)
        self.check_growth_steps()
        self.log_plan()
        with (
            distributed.explain_out_of_memory(self.config),
            distributed.log_compile_time("train step"),
            concurrent.futures.ThreadPoolExecutor(1) as executor,
        ):
            # a checkpoint is read while the step is compiled, or read from the cache
            arguments = (self.spec, self.config, self.mesh, self.new_params)
            compiled = executor.submit(step.compile_step, *arguments)
            if initial is None:
                assert resumed
                abstract = state.make_abstract_state(self.spec, self.config, self.mesh)
                params = checkpoint.restore_tree(resumed, checkpoint.PARAMS, abstract.params)
                self.state = state.restore_state(resumed, params, abstract)
                self.train_step = compiled.result()
            else:
                self.train_step = compiled.result()
                first = initial.start.state
                self.state = step.run_warmup_step(self.train_step, first, self.config, self.mesh)
        write_mixture_phases(self.run_dir, self.schedule)
        write_run_provenance(self.run_dir, self.config, self.spec, self.packed, self.progress.step)
        self.metrics = MetricsLogger(
            self.run_dir,
            self.config,
            tokens_per_step=train.batch_size * self.dataset.seq_len,
            resumed_at=self.progress.step,
            started=self.started,
            cost=self.estimate_device_cost(self.spec),
        )
        self.is_new_step = bool(resumed)  # no warm-up step has tried its memory
        if initial is None:
            self.metrics.log_resume(self.progress.step)
        else:
            self.check_initial_loss(initial)

    def resume(self, resumed: pathlib.Path) -> Any:
        """Set spec, position and new parameters from a checkpoint. Return its replay phases."""
        self.spec = ModelSpec.load(resumed / "spec.json")
        manifest = Manifest.load(resumed)
        record = CheckpointRecord.from_json(manifest.counts, str(resumed))
        begin.check_resumed_data(manifest, self.config, self.dataset, self.run_dir)
        if record.progress is None:
            raise UserError(
                f"{resumed}: was initialized, not trained, here. Train in a --workdir of its own, "
                f"with --config.initialize.source={self.run_dir}."
            )
        self.progress = record.progress
        new_params = record.new_params or NewParamsRecord({}, 0, "none")
        self.new_params = NewParams.from_record(new_params)
        self.parent_loss = record.parent_loss
        n = self.progress.n_sequences
        log.info(f"resumed from {resumed}: step {record.step:,}, {n:,} sequences read")
        log.info(initialize.describe_model(self.spec))
        for change in list_changed_settings(self.run_dir, self.config):
            log.warning(f"changed: {change}")
        return record.replay

    def initialize(self) -> InitialModel:
        """Initialize by config.initialize, and grow."""
        config, dataset = self.config, self.dataset
        init = initialize.init_model(config, self.mesh, dataset.vocab_size, self.measuring_batches)
        model = init.model
        if model.tokenizer not in (None, dataset.tokenizer):
            raise UserError(
                f"initialize.source: {config.initialize.source} was trained with another tokenizer "
                "than the data was packed with. Pack with the model's tokenizer."
            )
        if dataset.vocab_size > model.spec.vocab_size:
            raise UserError(
                f"initialize.source: the data has token ids up to {dataset.vocab_size - 1}, the "
                f"model {model.spec.vocab_size} embedding rows. Pack with the model's tokenizer."
            )
        report = None
        if config.initialize.source != "random":
            source = hub.download_model(config.initialize.source)
            report = source / "growth.json"
        was_grown = report is not None and report.is_file()
        if init.parent:
            self.verify_growth(init)
        elif report and was_grown and jax.process_index() == 0:
            shutil.copyfile(report, self.run_dir / "growth.json")
        start = begin.init_train_state(config, init, dataset, self.mesh)
        record = {"tokenizer": model.tokenizer, **model.record}
        # a trained descendant of a growth has a record of its own; a grown model has none yet
        is_grown = bool(init.parent) or (was_grown and not model.step)
        return InitialModel(start, model.spec, record, is_grown)

    def verify_growth(self, init: initialize.InitResult) -> None:
        """Compare a grown model with its parent and write growth.json."""
        assert init.parent
        section = self.config.initialize
        report = verify.verify_growth(
            init.parent,
            init.model,
            section.grow,
            init.growths,
            self.mesh,
            heldout=self.heldout,
            batches=self.measuring_batches,
            flops_per_token=self.flops_per_token,
            moments=section.moments if section.mode == "grow" else "fresh",
        )
        verify.write_growth(report, self.run_dir)

    def flops_per_token(self, spec: ModelSpec) -> float | None:
        """Return training FLOPs per token of a model."""
        return self.estimate_device_cost(spec).flops_per_token

    def check_sizes(self) -> None:
        """Raise UserError if the model does not fit the sequences or the mesh."""
        seq_len = self.dataset.seq_len
        if seq_len > self.spec.max_seq_len:
            raise UserError(
                f"pack.seq_len: expected at most {self.spec.max_seq_len}, the model's max_seq_len, "
                f"got sequences of {seq_len} tokens. Pack shorter ones."
            )
        train = self.config.train
        sharding.check_mesh_divides(
            self.mesh, self.spec, train.batch_size, train.grad_accum_steps, seq_len
        )

    def make_schedule(self, history: list[MixturePhase]) -> MixtureSchedule:
        """Return the order of sequences, from the position on."""
        return MixtureSchedule(
            self.mixture,
            self.dataset.n_sequences,
            self.config.train.batch_size,
            history,
            self.progress.step,
            self.progress.n_sequences,
            self.dataset.fingerprint,
        )

    def check_growth_steps(self) -> None:
        """Raise UserError for a growth planned at a step that has passed."""
        coming = self.config.train.grow[self.progress.n_growths :]
        for at, _ in coming:
            if at < self.progress.step:
                raise UserError(
                    f"train.grow: {self.run_dir} is at step {self.progress.step:,} and did not "
                    f"grow after step {at}, which has passed. Use a later step, or grow it into "
                    "another --workdir with initialize.source and initialize.grow."
                )

    def log_plan(self) -> None:
        """Log mesh, batch, data and the fast paths of the step."""
        sizes = [f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1]
        shape = ", ".join(sizes) or "no sharding"
        n = jax.device_count()
        kind = jax.devices()[0].device_kind
        log.info(f"mesh: {n} {kind} device{'s' if n > 1 else ''}, {shape}")
        train = self.config.train
        log.info(f"batch: {train.batch_size} sequences x {self.dataset.seq_len} tokens per step")
        epochs = format_epochs(self.schedule.compute_epochs(self.n_sequences))
        log.info(f"data: {train.steps:,} steps: {epochs}")
        log_fast_paths(self.spec, self.config, self.mesh)

    def check_initial_loss(self, initial: InitialModel) -> None:
        """Measure weights that come from elsewhere before their first update."""
        section = self.config.initialize
        if section.source == "random" and not section.grow:
            return
        params = self.state.params
        if section.source == "random" or section.mode != "continue":
            # untrained weights, or a run's own on the sequences that it was reading
            losses = self.heldout.measure_losses(self.spec, params)
        else:
            losses = gate.check_initial_loss(
                self.heldout, self.spec, params, initial.record, initial.is_grown
            )
        self.parent_loss = read_parent_losses(self.run_dir, self.config) or losses
        self.metrics.log_heldout(self.progress.step, losses, self.parent_loss)

    # ---- loop

    def loop(self) -> None:
        """Run steps until train.steps, or until the run is asked to stop."""
        train = self.config.train
        should_stop = distributed.watch_for_preemption()
        self.saver = checkpoint.Checkpointer(self.run_dir, train.max_to_keep, train.keep_every)
        self.saved_at = time.monotonic()
        self.n_done = self.progress.step
        self.n_read = self.progress.n_sequences
        self.n_growths = self.progress.n_growths
        self.loss_sum = self.progress.interval_loss_sum
        self.n_targets = self.progress.interval_n_tokens
        self.batches = self.read_batches()
        self.metrics.restart_timer(self.n_done)
        while self.n_done < train.steps and not self.is_stopping:
            self.grow_if_due()
            # asked once per step, so that the step that leaves is the one that saves
            self.is_terminated = self.is_stopping = should_stop(self.n_done)
            last = self.run_step()
            self.after_step(last)
        self.saved = self.saver.wait_until_saved() or self.resumed
        self.metrics.close()
        if self.n_done < train.steps:
            log.info(f"stopped: step {self.n_done:,} is saved in {self.saved}")
            log.info("run the same command again to continue")
            raise SystemExit(143 if self.is_terminated else 1)

    def read_batches(self) -> Iterator[Any]:
        """Return batches from the position on."""
        return loader.iterate_batches(
            self.dataset,
            self.schedule,
            sharding.make_batch_sharding(self.mesh),
            self.config.train.batch_size,
            self.n_read,
            self.mixture.document_mask,
        )

    def run_step(self) -> StepMetrics:
        """Run one step and return its metrics, on the devices."""
        batch = next(self.batches)
        self.metrics.profile_step(self.n_done + 1)
        if self.is_new_step:
            with distributed.explain_out_of_memory(self.config):
                found = self.train_step(self.state, batch)
                self.state, last = jax.block_until_ready(found)
            self.is_new_step = False
        else:
            self.state, last = self.train_step(self.state, batch)
        self.waiting.append(last)
        self.n_done += 1
        self.n_read += self.config.train.batch_size
        self.metrics.profile_step(self.n_done, last)
        return last

    def after_step(self, last: StepMetrics) -> None:
        """Log, evaluate and save where due."""
        train, n_done = self.config.train, self.n_done
        is_last = n_done == train.steps
        logs = saves = evaluates = is_last
        logs |= n_done % train.log_every == 0
        saves |= self.is_stopping or n_done % train.checkpoint_every == 0
        if train.eval_every:
            evaluates |= n_done % train.eval_every == 0
        if logs and not saves and train.checkpoint_minutes:
            seconds = time.monotonic() - self.saved_at
            is_due = seconds > 60 * train.checkpoint_minutes
            saves = distributed.broadcast_from_first(is_due)
        if logs or saves or evaluates:
            self.collect_metrics()
        if logs:
            mean_loss = self.loss_sum / max(self.n_targets, 1)
            epochs = self.schedule.compute_epochs(self.n_read)
            self.metrics.log_train(n_done, jax.device_get(last), loss=mean_loss, epochs=epochs)
            self.loss_sum = self.n_targets = 0.0
        losses = None
        if evaluates:
            losses = self.heldout.measure_losses(self.spec, self.state.params)
            self.metrics.log_heldout(n_done, losses, self.parent_loss)
            saves |= self.check_forgetting(losses, is_last)
        stops_on_error = train.on_save_error == "stop"
        if saves:
            self.save(last, losses, is_last)
        elif logs:
            with handle_save_errors(stops_on_error):
                self.saver.check_errors()

    def collect_metrics(self) -> None:
        """Sum the losses of the steps since the last call, and report skipped updates."""
        first = self.n_done - len(self.waiting) + 1
        for at, metrics in enumerate(jax.device_get(self.waiting), first):
            if math.isfinite(metrics.loss_sum):  # a batch that is not is skipped, and counted so
                self.loss_sum += float(metrics.loss_sum)
                self.n_targets += float(metrics.n_targets)
            n_skips = int(metrics.consecutive_skips)
            if n_skips:
                documents = self.list_documents(at)
                self.metrics.log_skipped_update(at, metrics, documents)
                check_consecutive_skips(n_skips, self.config, at, documents)
        self.waiting.clear()

    def list_documents(self, at: int) -> list[str]:
        """Return the ids of the documents of a step's batch."""
        batch_size = self.config.train.batch_size
        end = self.n_read - (self.n_done - at) * batch_size
        documents: dict[str, None] = {}
        for i in range(end - batch_size, end):
            sequence = self.schedule.sequence_at(i)
            found = self.dataset.read_document_ids(*sequence)
            documents |= dict.fromkeys(found)
        return list(documents)

    def check_forgetting(self, losses: dict[str, float], is_last: bool) -> bool:
        """Act by train.on_forgetting. Return whether the run must save and stop."""
        forgotten = forgetting.find_forgotten(losses, self.parent_loss, self.config)
        if not forgotten:
            return False
        log.warning(forgetting.describe_forgetting(forgotten, self.config))
        action = self.config.train.on_forgetting
        if is_last or action == "warn":
            return False
        if action == "stop":
            self.is_stopping = True
            return True
        n_rows = dict(self.dataset.n_sequences)
        mixture = forgetting.increase_replay(self.mixture, list(forgotten), self.n_done, n_rows)
        self.change_mixture(mixture)
        return False

    def change_mixture(self, mixture: MixtureConfig) -> None:
        """Read by another mixture from the next step on."""
        self.mixture = mixture
        shares = mixture.phases[-1][1]
        log.info(f"forgetting: from step {self.n_done + 1:,} on the shares are {shares}")
        self.progress = dataclasses.replace(
            self.progress, step=self.n_done, n_sequences=self.n_read
        )
        history = self.schedule.data_history(self.n_read)
        self.schedule = self.make_schedule(history)
        self.schedule.check_max_epochs(self.n_sequences, mixture.max_epochs)
        write_mixture_phases(self.run_dir, self.schedule)
        close = getattr(self.batches, "close", None)
        if close:
            close()
        self.batches = self.read_batches()

    def save(self, last: StepMetrics, losses: dict[str, float] | None, is_last: bool) -> None:
        """Start saving a checkpoint."""
        heldout = None
        if losses:  # what a later start from this checkpoint is compared with
            heldout = HeldoutRecord.from_json(self.heldout.to_record(losses))
        record = CheckpointRecord(
            step=self.n_done,
            progress=TrainProgress(
                step=self.n_done,
                n_sequences=self.n_read,
                interval_loss_sum=self.loss_sum,
                interval_n_tokens=self.n_targets,
                n_growths=self.n_growths,
                data_history=tuple(self.schedule.data_history(self.n_read)),
            ),
            data_fingerprint=self.dataset.fingerprint,
            mixture_seed=self.config.mixture.seed,
            optimizer=self.config.optim.name,
            lr=float(last.lr),
            new_params=self.new_params.to_record(),
            parent_loss=self.parent_loss,
            replay=forgetting.record_replay(self.config.mixture, self.mixture),
            heldout=heldout,
        )
        stops_on_error = self.config.train.on_save_error == "stop"
        with handle_save_errors(stops_on_error):
            self.saver.wait_until_saved()  # for the previous one
        with handle_save_errors(stops_on_error or is_last or self.is_stopping):
            self.saver.save_async(
                self.n_done,
                self.state.params,
                state.rest_of_state(self.state),
                self.spec,
                counts=record.to_json(),
                tokenizer=self.dataset.tokenizer,
            )
        self.saved_at = time.monotonic()
        self.metrics.restart_timer(self.n_done)

    def grow_if_due(self) -> None:
        """Apply the operators of train.grow for this step."""
        grow = self.config.train.grow
        for at, operator in grow[self.n_growths :]:
            if at != self.n_done:
                break
            self.grow(operator)
            self.n_growths += 1
            cost = self.estimate_device_cost(self.spec)
            self.metrics.log_growth(self.n_done, operator, self.spec, cost)

    def grow(self, operator: str) -> None:
        """Grow the model; schedule, step and position continue. Writes growth.json, spec.json."""
        params = self.state.params
        parent = initialize.LoadedModel(
            self.spec, params, None, self.run_dir, self.n_done, None, {}
        )
        child, grown = initialize.grow_model(parent, operator, self.mesh, self.measuring_batches)
        policy = grown.moments or self.config.initialize.moments
        opt_state, skip_state, self.new_params = state.grow_state(
            self.state, grown, self.config.optim, policy, self.mesh
        )
        report = verify.verify_growth(
            parent,
            child,
            [operator],
            [grown],
            self.mesh,
            heldout=self.heldout,
            batches=self.measuring_batches,
            flops_per_token=self.flops_per_token,
            at_step=self.n_done,
            moments=policy,
        )
        verify.write_growth(report, self.run_dir)
        if jax.process_index() == 0:
            child.spec.save(self.run_dir / "spec.json")
        self.state = TrainState(self.state.step, child.params, opt_state, skip_state)
        self.spec = child.spec
        self.check_sizes()
        with (
            distributed.explain_out_of_memory(self.config),
            distributed.log_compile_time("train step"),
        ):
            self.train_step = step.compile_step(self.spec, self.config, self.mesh, self.new_params)
        self.is_new_step = True

    # ---- end

    def finish(self, request: stage.StageRequest) -> None:
        """Write the manifest, so that the next start does nothing."""
        if jax.process_index():
            return
        assert self.saved
        records = read_metrics(self.run_dir / "metrics.jsonl")
        losses = [r.heldout_loss for r in records if isinstance(r, HeldoutMetrics)][-1]
        n_tokens = self.n_read * self.dataset.seq_len
        n_params = sum(x.size for x in jax.tree.leaves(self.state.params))
        counts = TrainCounts(self.n_done, self.n_read, n_tokens, losses, n_params)
        outputs = {}
        for name, checksum in Manifest.load(self.saved).outputs.items():
            outputs[f"checkpoints/{self.n_done}/{name}"] = checksum
        manifest = stage.make_manifest(
            request,
            outputs=outputs,
            counts=counts.to_json(),
            tokenizer=self.dataset.tokenizer,
            seconds=self.metrics.seconds_before_resume + time.monotonic() - self.started,
        )
        stage.write_manifest(manifest, self.run_dir)
        log.info(f"train: {self.saved}: {self.n_done:,} steps, {n_tokens:,} tokens")


def is_finished(run_dir: pathlib.Path, request: stage.StageRequest) -> bool:
    """Return whether a run holds the end of this training. Raise UserError if of another."""
    if not (run_dir / "manifest.json").is_file():
        return False
    manifest = Manifest.load(run_dir)
    if manifest.stage != "train":
        raise UserError(
            f"{run_dir}: was written by {manifest.stage}. Train in a --workdir of its own, with "
            f"--config.initialize.source={run_dir}."
        )
    there = stage.request_fingerprint("train", manifest.config, manifest.inputs, manifest.seed)
    train = request.config["train"]
    n_done, n_steps = manifest.counts["n_steps"], train["steps"]
    if there == request.fingerprint:
        log.info(f"train: {run_dir} is finished already ({n_done:,} steps), nothing to do")
        return True
    same = {**request.config, "train": {**train, "steps": n_done}}
    if n_steps > n_done and stage.to_jsonable(same) == manifest.config:
        log.info(f"train: {run_dir} had {n_done:,} steps and continues to {n_steps:,}")
        if jax.process_index() == 0:
            # not finished any more, which launch.py and later stages look at
            (run_dir / "manifest.json").unlink()
        return False
    difference = stage.describe_difference(manifest, request)
    raise UserError(f"train: {run_dir} holds the result of {difference}. Give another --workdir.")


def list_changed_settings(run_dir: pathlib.Path, config: Config) -> list[str]:
    """Return what decides the result and changed: "optim.peak_lr: 0.001, was 0.003"."""
    before = json.loads((run_dir / "config.json").read_text())
    changes = []
    for section, knobs in stage.to_jsonable(result_config(config)).items():
        for name, value in knobs.items():
            old = before[section].get(name)
            if old != value:
                changes.append(f"{section}.{name}: {value!r}, was {old!r}")
    return changes


def write_mixture_phases(run_dir: pathlib.Path, schedule: MixtureSchedule) -> None:
    """Write RUN/phases.json: what the run has read and will read, for tracing."""
    if jax.process_index() == 0:
        stage.write_json_atomic(run_dir / "phases.json", schedule.phases)


def write_run_provenance(
    run_dir: pathlib.Path, config: Config, spec: ModelSpec, packed: list[str], at_step: int
) -> None:
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
        n_devices=jax.device_count(),
        device_kind=jax.devices()[0].device_kind,
    )
    line = json.dumps(start.to_json())
    with open(run_dir / "starts.jsonl", "a") as file:
        file.write(f"{line}\n")
    stage.write_atomic(run_dir / "program.diff", diff)
    stage.write_json_atomic(run_dir / "config.json", dataclasses.asdict(config))
    spec.save(run_dir / "spec.json")
    tokenizer = run_dir / "tokenizer"
    partial = run_dir / "tokenizer.partial"
    if tokenizer.exists():
        return
    storage = open_storage(packed[0])
    if storage.copy_to_local("tokenizer", partial):
        partial.rename(tokenizer)


def read_parent_losses(run_dir: pathlib.Path, config: Config) -> dict[str, float] | None:
    """Return the parent's held-out losses on the same sequences, if its growth recorded them."""
    path = run_dir / "growth.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text())
    losses = report["heldout_loss"]
    if not losses or report["heldout_sequences"] != config.train.eval_sequences:
        return None
    return losses["parent"]


@contextlib.contextmanager
def handle_save_errors(reraise: bool) -> Iterator[None]:
    """Raise a failed save, or log it so that the run continues."""
    try:
        yield
    except checkpoint.CheckpointSaveError as error:
        if reraise:
            raise
        log.warning(f"{error} The run continues, by train.on_save_error.")


def check_consecutive_skips(n_skips: int, config: Config, step: int, documents: list[str]) -> None:
    """Raise UserError after train.max_consecutive_skips skipped updates."""
    if n_skips < config.train.max_consecutive_skips:
        return
    more = ""
    if len(documents) > 4:
        more = f" and {len(documents) - 4} more documents"
    raise UserError(
        f"train: {n_skips} consecutive updates were skipped up to step {step} (not finite, or a "
        f"spike), which read {', '.join(documents[:4])}{more}. Lower optim.peak_lr "
        f"({config.optim.peak_lr:g}), or look at the documents: scripts/trace.py --workdir RUN "
        f"--step {step} prints them."
    )


def log_fast_paths(spec: ModelSpec, config: Config, mesh: jax.sharding.Mesh) -> None:
    """Log which implementation the step takes where there are several, and why."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    backend, reason = select.choose_backend(spec, step.make_attention_request(config), mesh)
    log.info(f"attention: {backend}, {reason}")
    dtype, note = config.train.compute_dtype, ""
    if dtype == "bfloat16" and on_cpu:
        note = " (XLA's CPU converts to float32: slower than compute_dtype=float32)"
    elif dtype == "float32" and not on_cpu:
        note = " (bfloat16 is several times faster here: train.compute_dtype)"
    log.info(f"matmuls: {dtype}{note}")
    chunk = loss.CPU_CHUNK_TOKENS if on_cpu else loss.ACCELERATOR_CHUNK_TOKENS
    log.info(f"loss: chunks of {chunk} tokens per device; remat: {config.train.remat}")


def format_epochs(epochs: dict[str, float]) -> str:
    """Return "code 0.00 epochs, prose 0.41 epochs"."""
    return ", ".join(f"{name} {n:.2f} epochs" for name, n in epochs.items())

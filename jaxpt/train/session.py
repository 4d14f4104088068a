"""A run in progress: its state and position, resumed from a checkpoint or initialized."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Generator, Iterator
from typing import Any

import jax

from jaxpt import io, sharding
from jaxpt.config import MixtureConfig, TrainConfig
from jaxpt.data import loader
from jaxpt.data.mixture import MAX_NAMED, MixturePhase, MixtureSchedule
from jaxpt.growth.growth import Parent
from jaxpt.growth.parse import plan_growth
from jaxpt.model import loss, transformer
from jaxpt.model.kernels import select, select_experts
from jaxpt.model.transformer import Params
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.train import agreement, begin, distributed, gate, provenance, shapes, state, step
from jaxpt.train import teacher as teachers
from jaxpt.train.average import describe_average
from jaxpt.train.begin import InitialModel, RunStart
from jaxpt.train.context import RunContext
from jaxpt.train.meter import LostWork, Meter, SignOfLife
from jaxpt.train.metrics import (
    MAX_SOURCES,
    CollectedStep,
    HostScalars,
    MetricsLogger,
    find_most_read,
)
from jaxpt.train.records import HeldoutRecord, RunSums, TrainProgress
from jaxpt.train.shapes import StepShape, find_largest
from jaxpt.train.state import TrainState
from jaxpt.train.webhook import Webhook
from jaxpt.weights import checkpoint

log = logging.getLogger(__name__)


def start_session(run: RunContext) -> Session:
    """Resume a run from its newest checkpoint, else initialize it by config.initialize.

    Raises:
        UserError: model, data, mesh and settings do not fit each other, or memory does not suffice.
    """
    io.make_directory(run.run_dir)
    newest = checkpoint.find_newest(run.run_dir)
    agreement.check_start(newest, run.config.initialize)
    if jax.process_index():
        return resume_session(run, newest) if newest else init_session(run)
    lost = begin.read_lost_work(run.run_dir, newest)
    sign = SignOfLife(run.run_dir, lost.seconds, started=run.started, n_devices=run.mesh.size)
    try:
        session = resume_session(run, newest, lost) if newest else init_session(run, lost)
    except UserError:
        sign.withdraw()
        raise
    session.sign, sign.meter = sign, session.meter
    return session


def resume_session(run: RunContext, directory: io.Path, lost: LostWork = LostWork()) -> Session:
    """Return the session that a checkpoint of the run continues."""
    session = Session(run, begin.read_start(run, directory), lost)
    session.reference = begin.load_reference(run, session.spec)
    session.check_kernels()
    # the checkpoint is read while the step is compiled, or read from the cache
    average = describe_average(run.config.optim, run.config.train.steps)
    with session.explain_start(), concurrent.futures.ThreadPoolExecutor(1) as executor:
        compiled = executor.submit(session.compile_steps)
        abstract = session.make_abstract_state()
        params = checkpoint.restore_tree(directory, checkpoint.PARAMS, abstract.params)
        session.state = state.restore_state(directory, params, abstract, average)
        session.train_step = compiled.result()
    agreement.wait_for_compilation()
    session.is_new_step = True  # no warm-up step has tried its memory
    session.saved = directory
    session.open_logs()
    session.metrics.log_resume(session.step)
    return session


def init_session(run: RunContext, lost: LostWork = LostWork()) -> Session:
    """Return a new session, after a warm-up step and a check of weights from elsewhere."""
    if run.teacher:
        run.teacher.check(run.heldout)
    initial = begin.init_run(run)
    session = Session(run, initial.start, lost)
    session.reference = begin.copy_reference(run, session.spec, initial.state.params)
    session.check_kernels()
    with session.explain_start():
        session.state = initial.state
        for shape in reversed(session.list_next_shapes()):  # the first one is compiled last
            session.train_step = session.compile_step(shape)
            agreement.wait_for_compilation()
            batch = session.make_abstract_batch(shape)
            session.state = step.run_warmup_step(session.train_step, session.state, batch)
    session.open_logs()
    check_initial_loss(session, initial)
    return session


class Session:
    """What the steps of a run, and the hooks around them, change.

    Scalars stay on the devices until a hook is due, so that the host never waits for a step.

    Attributes:
        run: what stays the same.
        spec: the architecture.
        state: weights, optimizer and skip state.
        train_step: the compiled (state, batch) -> (state, scalars).
        compiled: shape -> train step, of the model as it is.
        batch_shape: of the batches that are read.
        reference: parameters of the model that DPO compares with, if it is no part of this one.
        reference_fingerprint: of where they are from.
        new_params: what the last growth added.
        heldout: what losses are measured on, cut as the batches.
        parent: the parent's held-out losses; None where unknown.
        mixture: in force: as configured, or as replay changed it.
        schedule: which sequence is read when.
        batches: from the position on.
        step: updates done or skipped.
        n_sequences: packed ones, read.
        n_growths: of train.grow, done.
        loss_sum: nats since the last log line, of the steps collected.
        n_targets: trained on since the last log line, likewise.
        collected: the steps that the host has waited for after this one.
        scalars: of the last step collected.
        heldout_losses: source -> nats per token after this step; None: not measured.
        is_diverged: whether the loss is far above any that a model learns from; nothing is saved.
        meter: sums over the steps.
        metrics: writes records.
        webhook: notifies a person of what they should know at once.
        sign: of life, on the first process.
        saved: the newest complete checkpoint, of those that were waited for.
        exit_status: once the run was asked to stop; until then None.
        failure: why it ends with an error, if it does.
        dispatched: time.monotonic() at which the last step's batch was there.
    """

    state: TrainState
    train_step: Any
    metrics: MetricsLogger
    webhook: Webhook

    sign: SignOfLife | None = None
    reference: Params | None = None

    def __init__(self, run: RunContext, start: RunStart, lost: LostWork):
        """Take a position over. Raise UserError if it does not fit the run."""
        self.run = run
        self.spec = start.spec
        self.new_params = start.new_params
        self.parent = start.parent
        self.reference_fingerprint = start.reference
        self.mixture = start.mixture
        self.step = start.progress.step
        self.n_sequences = start.progress.n_sequences
        self.n_growths = start.progress.n_growths
        self.loss_sum = start.progress.interval_loss_sum
        self.n_targets = start.progress.interval_n_tokens
        self.on_device: list[step.Scalars] = []  # of the steps since the last collection
        self.sums_after: list[RunSums] = []  # likewise
        self.collected: list[CollectedStep] = []
        self.scalars: HostScalars = {}
        self.heldout_losses: dict[str, float] | None = None
        self.is_diverged = False
        self.is_new_step = False  # perhaps its memory was never tried
        self.saved: io.Path | None = None
        self.exit_status: int | None = None
        self.dispatched = 0.0
        self.failure = ""
        self.compiled: dict[StepShape, Any] = {}
        self.batch_shape = self.shape
        self.heldout = run.heldout.cut_to(self.shape.seq_len)
        cost = run.estimate_cost(start.spec, self.shape.seq_len)
        self.meter = Meter(
            lost.add_to(start.progress.sums, cost),
            started=run.started,
            n_devices=run.mesh.size,
            cost=cost,
        )
        self.schedule = self.make_schedule(list(start.progress.data_history))
        self.batches = self.read_batches()
        self.check_growths()
        teachers.check_vocabulary(run.teacher, self.spec)
        self.log_plan()

    # ---- checks

    def check_lengths(self, spec: ModelSpec, first: int, stop: int) -> None:
        """Raise UserError if a model is not for the sequences of the steps after `first`."""
        config = self.run.config
        for start, shape in shapes.list_shapes(config).items():
            is_read = start < stop and (start >= first or shape == shapes.find_shape(config, first))
            if is_read and shape.seq_len > spec.max_seq_len:
                raise UserError(
                    f"pack.seq_len: expected at most {spec.max_seq_len}, the model's max_seq_len, "
                    f"got sequences of {shape.seq_len} tokens after step {max(start, first)}. Pack "
                    "shorter ones, or grow by extend_context(length=..., theta=...)."
                )

    def check_growths(self) -> None:
        """Raise UserError for a growth to come whose step has passed or that cannot be made."""
        spec, done = self.spec, self.step
        for at, text in self.run.config.train.grow[self.n_growths :]:
            if at < self.step:
                raise UserError(
                    f"train.grow: {self.run.run_dir} is at step {self.step:,} and did not "
                    f"grow after step {at}, which has passed. Use a later step, or grow it into "
                    "another --workdir with initialize.source and initialize.grow."
                )
            self.check_lengths(spec, done, at)
            spec, done = plan_growth(text, Parent(spec)).child, at
            sharding.check_model_divides(self.run.mesh, spec)
        self.check_lengths(spec, done, self.run.config.train.steps)

    def log_plan(self) -> None:
        """Log mesh, batch, data and the fast paths of the step."""
        mesh, train = self.run.mesh, self.run.config.train
        sizes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
        sharded = ", ".join(sizes) or "no sharding"
        kind = mesh.devices.flat[0].device_kind
        log.info(f"mesh: {mesh.size} {kind} device{'s' if mesh.size > 1 else ''}, {sharded}")
        for start, shape in shapes.list_shapes(self.run.config).items():
            when = f" after step {start:,}" if start else ""
            log.info(f"batch: {shape.batch_size} sequences x {shape.seq_len} tokens per step{when}")
        epochs = format_epochs(self.schedule.compute_epochs(self.n_sequences_at_end))
        log.info(f"data: {train.steps:,} steps: {epochs}")
        log_fast_paths(self.spec, self.train_settings(self.shape), self.shape.seq_len, mesh)

    # ---- data

    @property
    def parent_loss(self) -> dict[str, float] | None:
        """Return source -> the parent's nats per token on the same sequences; None: not known."""
        record = {"heldout": vars(self.parent)} if self.parent else {}
        return self.heldout.find_recorded_losses(record) or None

    @property
    def n_sequences_at_end(self) -> int:
        """Return how many packed sequences the run will have read after its last step."""
        n_tokens = shapes.count_tokens(self.run.config, self.step)
        return self.n_sequences + n_tokens // self.run.dataset.seq_len

    def make_schedule(self, history: list[MixturePhase]) -> MixtureSchedule:
        """Return the order of sequences, from the position on.

        Raises:
            UserError: it reads a source more often than mixture.max_epochs.
        """
        schedule = MixtureSchedule(
            self.mixture,
            self.run.dataset.n_sequences,
            self.shape.count_sequences(self.run.dataset.seq_len),
            history,
            self.step,
            self.n_sequences,
            self.run.dataset.fingerprint,
            shapes.list_sequences_per_step(self.run.config),
        )
        schedule.check_max_epochs(self.n_sequences_at_end, self.mixture.max_epochs)
        return schedule

    def read_batches(self) -> Generator[Batch, None, None]:
        """Return batches from the position on."""
        return loader.iterate_batches(
            self.run.dataset,
            self.schedule,
            sharding.make_batch_sharding(self.run.mesh),
            self.shape.batch_size,
            self.n_sequences,
            self.mixture.document_mask,
            self.run.teacher.samples if self.run.teacher else None,
            self.shape.seq_len,
        )

    def change_mixture(self, mixture: MixtureConfig) -> None:
        """Read by another mixture from the next step on."""
        self.mixture = mixture
        history = self.schedule.data_history(self.n_sequences)
        self.schedule = self.make_schedule(history)
        provenance.write_mixture_phases(self.run.run_dir, self.schedule)
        self.batches.close()
        self.batches = self.read_batches()

    # ---- shapes

    @property
    def shape(self) -> StepShape:
        """Return the shape of the next step's batch."""
        return shapes.find_shape(self.run.config, self.step)

    def change_shape(self) -> None:
        """Read batches of the next step's shape from here on, with a program for them."""
        run, shape, was_compared = self.run, self.shape, self.parent_loss is not None
        self.batch_shape, self.heldout = shape, run.heldout.cut_to(shape.seq_len)
        self.batches.close()
        self.batches = self.read_batches()
        self.meter.cost = run.estimate_cost(self.spec, shape.seq_len)
        log.info(f"batch: {shape.batch_size} sequences x {shape.seq_len} tokens from here on")
        if was_compared and self.parent_loss is None:
            log.info(
                "forgetting: the parent was measured on sequences of another length, so the run is "
                "not compared with it from here on"
            )
        self.recompile()

    def list_next_shapes(self) -> list[StepShape]:
        """Return the shapes, each once, up to the next growth: those of the model as it is."""
        train = self.run.config.train
        ends = [at for at, _ in train.grow[self.n_growths :]]
        end = min([*ends, train.steps])
        found = [self.shape]
        for start, shape in shapes.list_shapes(self.run.config).items():
            if self.step < start < end and shape not in found:
                found.append(shape)
        return found

    def train_settings(self, shape: StepShape) -> TrainConfig:
        """Return the section train with the batch size of a shape."""
        return dataclasses.replace(self.run.config.train, batch_size=shape.batch_size)

    # ---- start

    @contextlib.contextmanager
    def explain_start(self) -> Iterator[None]:
        """Log how long the step's programs took, and explain it where memory does not suffice."""
        with self.explain_out_of_memory(), distributed.log_compile_time("train step"):
            yield

    def explain_out_of_memory(self) -> contextlib.AbstractContextManager[None]:
        """Raise a failed allocation as a UserError with the settings that would help."""
        train, shape = self.run.config.train, find_largest(self.list_next_shapes())
        train = dataclasses.replace(train, batch_size=shape.batch_size)
        return distributed.explain_out_of_memory(train, shape.seq_len)

    def check_kernels(self) -> None:
        """Raise UserError, on every process, if a kernel holds on some hosts alone."""
        facts = {}
        for shape in self.list_next_shapes():
            train = self.train_settings(shape)
            kernels = step.choose_kernels(self.spec, train, shape.seq_len, self.run.mesh)
            for name, kernel in kernels._asdict().items():
                facts[f"the kernel for {name} at {shape.seq_len} tokens"] = str(kernel)
        agreement.check_same("kernels", facts)

    def compile_step(self, shape: StepShape | None = None) -> Any:
        """Return the train step of the model as it is, compiled once for a shape; None: the next.

        It takes any state, and any batch of the shape.
        """
        run, shape = self.run, shape or self.shape
        if shape not in self.compiled:
            train, optim = self.train_settings(shape), run.config.optim
            built = step.build_step(
                self.spec, train, optim, shape.seq_len, run.mesh, self.new_params, run.distill_spec
            )
            teacher_model = run.teacher.model if run.teacher else None
            frozen_params = teacher_model.params if teacher_model else self.reference
            more = () if frozen_params is None else (frozen_params,)
            abstract = self.make_abstract_state(), self.make_abstract_batch(shape)
            self.compiled[shape] = built.compile(*abstract, *more)
        return self.compiled[shape]

    def compile_steps(self) -> Any:
        """Return the train step of the next shape, with those of `list_next_shapes` compiled."""
        for shape in self.list_next_shapes():
            self.compile_step(shape)
        return self.compile_step()

    def recompile(self) -> None:
        """Take the train step of the model and the shape as they are now."""
        if self.shape not in self.compiled:
            with self.explain_start():
                self.compile_step()
        self.train_step = self.compile_step()
        self.is_new_step = True

    def make_abstract_state(self) -> TrainState:
        """Return the state of the model as it is, as ShapeDtypeStructs with shardings."""
        config = self.run.config
        dtype = config.initialize.param_dtype
        return state.make_abstract_state(self.spec, config.optim, self.run.mesh, dtype)

    def make_abstract_batch(self, shape: StepShape) -> Batch:
        """Return a batch as ShapeDtypeStructs with shardings."""
        return step.make_abstract_batch(*shape, self.run.mesh, self.run.distill_spec)

    def open_logs(self) -> None:
        """Write what the run directory tells of its run, and open the metrics."""
        run, train = self.run, self.run.config.train
        provenance.write_mixture_phases(run.run_dir, self.schedule)
        provenance.write_run_provenance(run, self.spec, self.step)
        self.webhook = Webhook(run.run_dir)
        self.metrics = MetricsLogger(
            run.run_dir,
            train.steps,
            meter=self.meter,
            resumed_at=self.step if self.saved else None,
            config=run.config,
        )

    # ---- steps

    @property
    def is_last_step(self) -> bool:
        """Return whether the run has made all of its steps."""
        return self.step >= self.run.config.train.steps

    @property
    def is_stopping(self) -> bool:
        """Return whether the run was asked to save and stop."""
        return self.exit_status is not None

    def stop(self, exit_status: int) -> None:
        """Ask the run to save and stop after this step."""
        self.exit_status = exit_status

    def fail(self, sentence: str) -> None:
        """Ask the run to end with an error after this step."""
        self.failure = sentence
        self.stop(exit_status=1)

    def run_step(self) -> None:
        """Make one step. The scalars that it returns stay on the devices."""
        self.meter.begin_steps()
        with self.meter.wait_for_data():
            batch = next(self.batches)
        self.dispatched = time.monotonic()
        if self.is_new_step:
            with self.explain_out_of_memory():
                found = self.train_step(self.state, batch)
                self.state, scalars = jax.block_until_ready(found)
            self.is_new_step = False
        else:
            self.state, scalars = self.train_step(self.state, batch)
        self.meter.count_step(self.batch_shape.n_tokens)
        self.on_device.append(scalars)
        self.sums_after.append(self.meter.sums)
        self.step += 1
        self.n_sequences += self.batch_shape.count_sequences(self.run.dataset.seq_len)
        self.collected = []
        self.heldout_losses = None

    def collect_scalars(self) -> None:
        """Wait for the steps since the last call, and sum their losses."""
        found: list[HostScalars] = jax.device_get(self.on_device)
        self.meter.end_steps(len(found), time.monotonic() - self.dispatched)
        self.collected = []
        first = self.step - len(found) + 1
        for number, (scalars, after) in enumerate(zip(found, self.sums_after, strict=True), first):
            if math.isfinite(scalars["loss_sum"]):  # else the update is skipped, and counted so
                self.loss_sum += float(scalars["loss_sum"])
                self.n_targets += float(scalars["n_targets"])
            if not scalars["consecutive_skips"]:
                self.meter.count_trained(int(scalars["n_targets"]))
            now = self.meter.sums
            sums = dataclasses.replace(now, n_tokens=after.n_tokens, flops=after.flops)
            self.collected.append(CollectedStep(number, scalars, sums))
        self.scalars = found[-1]
        self.on_device, self.sums_after = [], []

    def take_interval_loss(self) -> float:
        """Return the mean loss since the last call, in nats per target, and begin another mean.

        NaN if no step had a finite one.
        """
        mean = self.loss_sum / self.n_targets if self.n_targets else math.nan
        self.loss_sum = self.n_targets = 0.0
        return mean

    def close(self) -> None:
        """End what runs beside the steps."""
        self.metrics.close()
        self.webhook.close()
        if self.sign:
            self.sign.end()

    def make_progress(self) -> TrainProgress:
        """Return the position, from which a run resumes bit by bit."""
        history = self.schedule.data_history(self.n_sequences)
        return TrainProgress(
            step=self.step,
            n_sequences=self.n_sequences,
            interval_loss_sum=self.loss_sum,
            interval_n_tokens=self.n_targets,
            n_growths=self.n_growths,
            sums=self.meter.read(),
            data_history=tuple(history),
        )


def check_initial_loss(session: Session, initial: InitialModel) -> None:
    """Measure weights that come from elsewhere before their first update."""
    run = session.run
    section = run.config.initialize
    if section.source == "random" and not section.grow:
        return
    spec, params = session.spec, session.state.params
    heldout = session.heldout
    recorded = begin.read_parent_losses(run.run_dir, heldout)
    if section.source == "random" or section.mode != "continue":
        # untrained weights, or a run's own on the sequences that it was reading
        losses = heldout.measure_losses(spec, params)
    else:
        losses = gate.check_initial_loss(
            heldout, spec, params, initial.record, initial.is_grown, recorded
        )
    session.parent = HeldoutRecord(**heldout.to_record(recorded or losses))
    session.metrics.log_heldout(session.step, losses, heldout.seq_len, session.parent_loss)


def log_fast_paths(
    spec: ModelSpec, train: TrainConfig, seq_len: int, mesh: jax.sharding.Mesh
) -> None:
    """Log which implementation the step takes where there are several, and why."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    backend, reason = select.choose_backend(spec, step.make_attention_request(train, seq_len), mesh)
    log.info(f"attention: {backend}, {reason}")
    dtype, note = train.compute_dtype, ""
    if spec.n_experts:
        kernel, reason = select_experts.choose_experts_kernel(spec, train.experts, dtype, mesh)
        log.info(f"experts: {kernel}, {reason}")
    if dtype == "bfloat16" and on_cpu:
        note = " (XLA's CPU converts to float32: slower than compute_dtype=float32)"
    elif dtype == "float32" and not on_cpu:
        note = " (bfloat16 has several times its peak here: train.compute_dtype)"
    log.info(f"matmuls: {describe_low_matmuls(spec, train, seq_len, on_cpu)}{dtype}{note}")
    n_tokens = loss.count_chunk_tokens(mesh)
    log.info(f"loss: chunks of {n_tokens:,} tokens over all devices; remat: {train.remat}")


def describe_low_matmuls(spec: ModelSpec, train: TrainConfig, seq_len: int, on_cpu: bool) -> str:
    """Return "float8 of q, k, v, o, gate, up, down; others " for train.matmul_dtype, or nothing."""
    if train.matmul_dtype == "compute":
        return ""
    n_tokens = train.batch_size // train.grad_accum_steps * seq_len
    names = ", ".join(transformer.list_low_matmuls(spec, n_tokens)) or "none (multiples of 16)"
    emulated = " (emulated on a CPU, slower)" if on_cpu else ""
    return f"{train.matmul_dtype}{emulated} of {names}; others "


def format_epochs(epochs: dict[str, float]) -> str:
    """Return "code 0.00 epochs, prose 0.41 epochs", of many sources the ones read most."""
    shown = epochs
    if len(epochs) > MAX_SOURCES:
        shown = find_most_read(epochs, MAX_NAMED)
    parts = [f"{name} {n:.2f} epochs" for name, n in shown.items()]
    n_more = len(epochs) - len(shown)
    if n_more:
        parts.append(f"{n_more:,} more sources less")
    return ", ".join(parts)

"""Open what a run is given: settings, directory, devices and data."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax

from jaxpt import io
from jaxpt.config import Config, TrainConfig
from jaxpt.data import loader
from jaxpt.flops import DeviceCost
from jaxpt.growth import measure
from jaxpt.growth.growth import ReadBatches
from jaxpt.sharding import check_batch_divides
from jaxpt.spec import ModelSpec, UserError
from jaxpt.text import name_some
from jaxpt.train import gate, optimizer, shapes, webhook, writers
from jaxpt.train.schedule import find_average_window
from jaxpt.train.step import DistillSpec, find_frozen_spec
from jaxpt.train.teacher import Teacher, open_teacher

if TYPE_CHECKING:
    from jaxpt.evaluate.harness import Benchmarks

log = logging.getLogger(__name__)

EstimateCost = Callable[[ModelSpec, int], DeviceCost]  # of a spec and a sequence length


def no_cost(spec: ModelSpec, seq_len: int) -> DeviceCost:
    """Return an unknown cost."""
    return DeviceCost()


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What stays the same from a run's first step to its last.

    Attributes:
        config: the recipe.
        run_dir: the run directory.
        mesh: the devices.
        packed: directories of packed sequences.
        benchmarks: to score as the run goes, if any.
        dataset: their training split.
        heldout: their held-out split, to measure losses on.
        measuring_batches: reads the training batches that growth measures on.
        estimate_device_cost: what a device costs and can do for a model, for MFU and money.
        started: time.monotonic() at the start, from which time and money count.
        teacher: that the run learns from, if there is one.
        lock: on the run directory, where this process holds it.
        fingerprints: of inputs by name, where they are known already.
    """

    config: Config
    run_dir: io.Path
    mesh: jax.sharding.Mesh
    packed: list[str]
    benchmarks: Benchmarks | None
    dataset: loader.PackedDataset
    heldout: gate.HeldoutData
    measuring_batches: ReadBatches
    estimate_device_cost: EstimateCost
    started: float
    teacher: Teacher | None = None
    lock: io.Lock | None = None
    fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def distill_spec(self) -> DistillSpec | None:
        """How a step learns from the teacher, if there is one."""
        return self.teacher.distill_spec if self.teacher else None

    def estimate_cost(self, spec: ModelSpec, seq_len: int) -> DeviceCost:
        """Return what a device costs and can do for a model, frozen ones included."""
        cost = self.estimate_device_cost(spec, seq_len)
        frozen = find_frozen_spec(spec, self.config.train, self.distill_spec)
        return cost.add_forward(frozen, seq_len) if frozen else cost


def open_run(
    config: Config,
    run_dir: io.Path,
    packed: list[str],
    mesh: jax.sharding.Mesh,
    estimate_device_cost: EstimateCost = no_cost,
    started: float | None = None,
    lock: io.Lock | None = None,
    fingerprints: Mapping[str, str] | None = None,
) -> RunContext:
    """Open the packed sequences of a run. For the arguments see RunContext.

    Raises:
        UserError: their length is not pack.seq_len, or there is no such optimizer or window of
            averaged weights, or wandb is asked for and not installed, or the teacher is not of
            these sequences.
    """
    optimizer.check_name(config.optim)
    find_average_window(config.optim, config.train.steps)  # raises if the schedule has none
    if config.train.wandb_project:
        writers.check_wandb()
    webhook.read_url()  # raises if it is none
    dataset = loader.open_packed(packed)
    if dataset.seq_len != config.pack.seq_len:
        raise UserError(
            f"pack.seq_len: expected {dataset.seq_len}, as the packed sequences have, got "
            f"{config.pack.seq_len}. Set it to that, or pack again."
        )
    check_pairs(config, dataset)
    train, mask = config.train, config.mixture.document_mask
    for shape in shapes.list_shapes(config).values():
        check_batch_divides(mesh, shape.batch_size, train.grad_accum_steps, shape.seq_len)
    seq_len = shapes.find_shape(config, 0).seq_len
    heldout = gate.HeldoutData(packed, train, mask, mesh, seq_len)
    missing = sorted(dataset.n_sequences.keys() - heldout.dataset.n_sequences.keys())
    if missing:
        log.warning(
            f"no held-out sequences of {name_some(missing)}: no loss is measured there. Raise "
            "prepare.heldout_frac, then prepare and pack again."
        )
    return RunContext(
        config=config,
        run_dir=run_dir,
        mesh=mesh,
        packed=packed,
        benchmarks=open_benchmarks(train, packed),
        dataset=dataset,
        heldout=heldout,
        measuring_batches=measure.make_measuring_batches(
            packed, train.batch_size, mask, mesh, seq_len
        ),
        estimate_device_cost=estimate_device_cost,
        started=started or time.monotonic(),
        teacher=open_teacher(config, dataset, mesh, fingerprints or {}),
        lock=lock,
        fingerprints=fingerprints or {},
    )


def check_pairs(config: Config, dataset: loader.PackedDataset) -> None:
    """Raise UserError unless data of preference pairs and train.dpo_beta come together."""
    has_pairs = {name: counts.n_pairs > 0 for name, counts in dataset.counts.items()}
    beta = config.train.dpo_beta
    wrong = sorted(name for name, has in has_pairs.items() if has != (beta > 0))
    if wrong and beta:
        raise UserError(
            f"train.dpo_beta: expected packed preference pairs, got other documents in "
            f"{name_some(wrong)}. Prepare JSON lines with three fields: "
            "NAME=jsonl:FILE#prompt+chosen+rejected."
        )
    if wrong:
        raise UserError(
            f"mixture.packed_paths: {name_some(wrong)} holds preference pairs, whose rejected "
            "answers would be learnt too. Set train.dpo_beta, such as 0.1."
        )


def open_benchmarks(train: TrainConfig, packed: list[str]) -> Benchmarks | None:
    """Return the benchmarks of train.eval_tasks; None if it names none.

    Raises:
        UserError: the harness is not installed, a benchmark or the tokenizer is missing, or the
            run has several processes.
    """
    if not train.eval_tasks:
        return None
    if jax.process_count() > 1:
        raise UserError(
            f"train.eval_tasks: expected one process, got {jax.process_count()}. Leave it out, and "
            "run jaxpt evaluate on the checkpoints."
        )
    from jaxpt.evaluate import harness  # 0.05 s, which most starts save

    data_dir = io.path(train.eval_dir) if train.eval_dir else None
    try:
        benchmarks = harness.open_benchmarks(train.eval_tasks, train.eval_items, data_dir)
    except UserError as error:
        raise UserError(f"train.eval_tasks: {error}") from None
    tokenizer = io.path(packed[0]).parent / "tokenizer"
    if not io.exists(tokenizer):
        raise UserError(
            f"train.eval_tasks: {tokenizer} is not there, so no text can be scored. Copy there "
            "the tokenizer that the data was packed with."
        )
    return benchmarks

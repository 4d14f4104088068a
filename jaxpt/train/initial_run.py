"""Write a model as a run directory at step 0: initialized, grown, compared with its parent."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpt import initialize, io, logs
from jaxpt.config import Config, build_config
from jaxpt.data import loader
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.growth import measure
from jaxpt.growth.growth import ReadBatches
from jaxpt.growth.new_params import NewParams, find_new_params_through
from jaxpt.growth.verify import Probe, verify_growth, write_growth
from jaxpt.model import transformer
from jaxpt.model.transformer import Params
from jaxpt.sharding import check_batch_divides, make_batch_sharding, make_mesh
from jaxpt.spec import ModelSpec, UserError
from jaxpt.stage import run_stage
from jaxpt.train import gate, state, step
from jaxpt.train.gate import HeldoutData
from jaxpt.train.records import CheckpointRecord
from jaxpt.weights import checkpoint, hub, huggingface, peft
from jaxpt.weights.load import LoadedModel, list_sources, open_tokenizer

log = logging.getLogger(__name__)


def initialize_run(
    config: Config,
    out: io.Path,
    probe_steps: int = 0,
    check: bool = False,
    replace: bool = False,
    verify: bool = False,
) -> None:
    """Write a run directory at step 0, initialized and grown as config.initialize says.

    Args:
        config: the recipe.
        out: the directory.
        probe_steps: training steps of parent and grown model, to compare them; 0: none.
        check: compare an imported model's logits with transformers'.
        replace: overwrite what `out` holds.
        verify: compare the checksums of a finished run directory, not only sizes.
    """
    checkpoint.check_run(out)
    source, is_import = find_source(config.initialize.source, check)
    config, packed = find_measuring_data(config, source)
    section = config.initialize

    def work(run: pathlib.Path) -> dict[str, Any]:
        mesh = make_mesh(config.mesh)
        heldout, batches, probe = open_measuring_data(config, packed, mesh, probe_steps)
        dataset = heldout.dataset if heldout else None
        check_parent = functools.partial(gate.check_parent, heldout, section)
        init = initialize.init_model(section, config.model, mesh, dataset, batches, check_parent)
        if source and is_import:
            check_import(source, init.parent or init.model, heldout, mesh, check)
        if init.parent:
            report = verify_growth(
                init.parent,
                init.model,
                section.grow,
                init.growths,
                mesh,
                seq_len=config.pack.seq_len,
                heldout=heldout,
                batches=batches,
                probe=probe,
            )
            write_growth(report, run)
        return save_initial_model(run, init)

    request, inputs = describe_request(config, source, packed, probe_steps)
    run_stage(
        "initialize",
        out,
        work,
        config=request,
        inputs=inputs,
        seed=section.seed,
        replace=replace,
        verify=verify,
        flag="--to",
    )
    log.info(f"initialize: {out} is ready")


class MeasuringData(NamedTuple):
    """What a model is measured on, as far as there is packed data."""

    heldout: HeldoutData | None = None
    batches: ReadBatches | None = None
    probe: Probe | None = None


def open_measuring_data(
    config: Config, packed: Sequence[io.Path], mesh: jax.sharding.Mesh, probe_steps: int
) -> MeasuringData:
    """Open packed data. Raise UserError if the mesh does not divide its batches."""
    if not packed:
        return MeasuringData()
    train, mask = config.train, config.mixture.document_mask
    heldout = HeldoutData(packed, train, mask, mesh)
    seq_len = heldout.dataset.seq_len
    check_batch_divides(mesh, train.batch_size, train.grad_accum_steps, seq_len)
    batches = measure.make_measuring_batches(packed, train.batch_size, mask, mesh)
    probe = ShortTraining(probe_steps, config, packed, mesh) if probe_steps else None
    return MeasuringData(heldout, batches, probe)


def describe_request(
    config: Config, source: io.Path | None, packed: Sequence[io.Path], probe_steps: int
) -> tuple[dict[str, Any], dict[str, io.Path]]:
    """Return the settings that an initial run depends on, and what it reads, wherever it is."""
    inputs = {f"packed/{i}": path for i, path in enumerate(packed)}
    section = dataclasses.asdict(config.initialize)
    del section["source"]
    request = {"initialize": section, "probe_steps": probe_steps}
    if source:
        request["base_shape"] = config.model.base_shape
        inputs |= list_sources(source, "initialize", config.initialize.base)
    else:
        request["model"] = dataclasses.asdict(config.model)
    return request, inputs


def find_source(source: str, check: bool) -> tuple[io.Path | None, bool]:
    """Return (directory, or None for random weights; whether it is of Hugging Face).

    Raises:
        UserError: an import is to be checked, but this is none.
    """
    directory, is_import = None, False
    if source != "random":
        directory = hub.download_model(source)
        is_import = checkpoint.find_checkpoint(directory) is None
    if check and directory and peft.is_adapter(directory):
        raise UserError(
            f"--check: compares a whole model with transformers, and {source} is a LoRA adapter. "
            "Check its base."
        )
    if check and not is_import:
        raise UserError(
            "--check: compares an imported model with transformers; expected a Hugging Face "
            f"directory, got {source}."
        )
    return directory, is_import


class ShortTraining:
    """A training with fresh moments at the peak rate, as growth's verify.Probe.

    Attributes:
        n_steps: at most.
    """

    def __init__(self, n_steps: int, config: Config, packed: Sequence[io.Path], mesh: Mesh):
        """Train nothing yet."""
        self.n_steps = n_steps
        self.config = config
        self.packed = packed
        self.mesh = mesh
        self.steps: dict[ModelSpec, Callable] = {}  # compiled

    def time_step(self, spec: ModelSpec, params: Params) -> float:
        """Return the seconds of a step, compilation apart."""
        states = self.iterate_states(spec, params)
        jax.block_until_ready(next(states))
        start = time.monotonic()
        jax.block_until_ready(next(states))
        return time.monotonic() - start

    def train(self, spec: ModelSpec, params: Params, n_steps: int) -> Params:
        """Return the parameters after n steps; those given are kept."""
        *_, last = itertools.islice(self.iterate_states(spec, params), n_steps)
        return jax.block_until_ready(last.params)

    def iterate_states(self, spec: ModelSpec, params: Params) -> Iterator[state.TrainState]:
        """Yield the state after each step, which takes over the one before.

        The rate rises over a quarter of n_steps, however few are done: a model is compiled once.
        """
        train, mixture = self.config.train, self.config.mixture
        optim = dataclasses.replace(
            self.config.optim,
            schedule="constant",
            warmup_frac=0.25,
            lr_multipliers=(),
            average=0.0,
        )
        dataset = loader.open_packed(self.packed)
        schedule = MixtureSchedule(mixture, dataset.n_sequences, train.batch_size)
        place = make_batch_sharding(self.mesh)
        mask = mixture.document_mask
        batches = loader.iterate_batches(dataset, schedule, place, train.batch_size, 0, mask)
        params = jax.tree.map(jnp.copy, params)  # the step takes its state over
        now = state.init_state(params, spec, optim, self.mesh)
        if spec not in self.steps:
            # of preference pairs both answers are learnt: a grown model has no reference
            settings = dataclasses.replace(
                train, steps=self.n_steps, grow=(), shape_schedule=(), dpo_beta=0.0
            )
            built = step.build_step(spec, settings, optim, dataset.seq_len, self.mesh)
            self.steps[spec] = built
        for batch in batches:
            now, _ = self.steps[spec](now, batch)
            yield now


def check_import(
    source: io.Path,
    model: LoadedModel,
    heldout: HeldoutData | None,
    mesh: jax.sharding.Mesh,
    check: bool,
) -> None:
    """Log the checks of an imported model; with check, compare it with transformers."""
    vocab_size = None
    keeps_text = True
    if model.tokenizer_dir:
        encoder = open_tokenizer(model)
        vocab_size = encoder.vocab_size
        keeps_text = encoder.keeps_text()
    if heldout:
        heldout = heldout.cut_for(model.spec)
        vocab_size = heldout.dataset.vocab_size
    with logs.announce_if_slow(log, "initialize: measuring the imported model"):
        gate.log_import_check(model.spec, model.params, heldout, vocab_size, keeps_text)
    if check:
        gate.check_import_against_transformers(
            io.local_copy(source), model.spec, model.params, heldout, mesh
        )


def save_initial_model(run: pathlib.Path, init: initialize.InitResult) -> dict[str, Any]:
    """Write spec, tokenizer and checkpoint 0. Return the counts of the run's manifest."""
    model = init.model
    io.write_json(run / "spec.json", model.spec)
    if model.tokenizer_dir:
        huggingface.copy_tokenizer(model.tokenizer_dir, run / "tokenizer")
    else:
        log.warning("the source has no tokenizer, so this run and its export have none")
    new_params = NewParams(find_new_params_through(init.growths))
    record = CheckpointRecord(step=0, new_params=new_params.to_record())
    counts = record.to_json()
    # a grown model has another loss
    known = ("optimizer", "lr") if init.growths else ("optimizer", "lr", "heldout")
    for name in known:
        if name in model.record:
            counts[name] = model.record[name]
    train_state = {"step": jnp.int32(0)}
    checkpoint.save_checkpoint(
        run,
        0,
        model.params,
        train_state,
        model.spec,
        counts=counts,
        tokenizer=model.tokenizer,
    )
    return {"n_params": transformer.count_params(model.spec), "tokenizer": model.tokenizer}


def find_measuring_data(config: Config, source: io.Path | None) -> tuple[Config, list[io.Path]]:
    """Return (config, packed data) to measure a model on.

    That is the config's data if it names some, else what the source's run measures itself on.
    """
    if config.mixture.packed_paths:
        return config, [io.path(path) for path in config.mixture.packed_paths]
    if not source or not io.exists(source / "checkpoints"):
        return config, []
    if huggingface.is_hf_directory(source):  # whose config.json is no run's
        return config, []
    config_path = source / "config.json"
    if not io.exists(config_path):
        return config, []
    try:
        theirs = build_config(io.read_record(config_path))
    except UserError as error:
        log.warning(f"{error} The model is not measured on that run's data.")
        return config, []
    packed = [io.path(path) for path in theirs.mixture.packed_paths]
    packed = packed or [source / "packed"]
    for path in packed:
        if not io.exists(path / "manifest.json"):
            return config, []
    measured_as = dataclasses.replace(
        config, mixture=theirs.mixture, train=theirs.train, optim=theirs.optim, pack=theirs.pack
    )
    return measured_as, packed

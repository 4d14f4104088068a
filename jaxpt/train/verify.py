"""Compare a grown model with its parent, and write a model as a run directory at step 0."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import initialize
from jaxpt.config import Config, build_config
from jaxpt.data import loader, tokenizer
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.growth import measure
from jaxpt.growth.growth import Growth
from jaxpt.growth.new_params import find_new_params_through
from jaxpt.growth.records import (
    GrowthReport,
    LayerRecord,
    ProbeRecord,
)
from jaxpt.initialize import LoadedModel
from jaxpt.model import transformer
from jaxpt.sharding import make_batch_sharding, make_mesh, n_shards
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.stage import local_path, run_stage, write_json_atomic
from jaxpt.train import gate, state, step
from jaxpt.train.gate import HeldoutData
from jaxpt.train.optimizer import NewParams
from jaxpt.train.records import CheckpointRecord
from jaxpt.weights import checkpoint, hub, huggingface

log = logging.getLogger(__name__)

N_MEASURED_SEQUENCES = 64  # per source: what operators measure on, and the report's statistics
# sums in another order: a widened model adds each product in halves. Fraction of the largest
# logit, in float32
ROUNDING_TOLERANCE = 1e-5

ReadBatches = Callable[[], Iterable[Batch]]


def unknown_flops(spec: ModelSpec) -> float | None:
    """Return None: FLOPs per token are not known."""
    return None


def verify_growth(
    parent: LoadedModel,
    child: LoadedModel,
    operators: Sequence[str],
    growths: Sequence[Growth],
    mesh: jax.sharding.Mesh,
    *,
    heldout: HeldoutData | None,
    batches: ReadBatches | None,
    flops_per_token: Callable[[ModelSpec], float | None] = unknown_flops,
    at_step: int | None = None,
    moments: str | None = None,
) -> GrowthReport:
    """Return the growth report: layer map, sizes, held-out losses, layer statistics, verdict.

    Args:
        parent: before growth.
        child: after growth.
        operators: as text.
        growths: what they did.
        mesh: the devices.
        heldout: to measure losses on, if there is any.
        batches: training batches for layer statistics, if there are any.
        flops_per_token: of a model.
        at_step: of the run, if it grew during training.
        moments: policy for the optimizer's moments.

    Raises:
        UserError: an operator that promises to preserve the function did not.
    """
    models = {"parent": parent, "child": child}
    report = describe_growth(models, operators, growths, flops_per_token, at_step, moments)
    if report.preserves_function:
        difference = check_logits(parent, child, operators, growths, mesh)
        report = dataclasses.replace(report, max_logit_difference=difference)
    # else the data is not the parent's, or not the child's
    if parent.tokenizer == child.tokenizer:
        report = measure_models(report, models, heldout, batches)
    unigram = heldout.dataset.unigram_nats if heldout else {}
    verdict = judge_growth(report, unigram)
    return dataclasses.replace(report, verdict=verdict)


def describe_growth(
    models: dict[str, LoadedModel],
    operators: Sequence[str],
    growths: Sequence[Growth],
    flops_per_token: Callable[[ModelSpec], float | None],
    at_step: int | None,
    moments: str | None,
) -> GrowthReport:
    """Return the report before anything is measured. For the arguments see `verify_growth`."""
    parent = models["parent"]
    layer_map: list[int | None] = list(range(parent.spec.n_layers))
    measured: dict[str, Any] = {}
    for grown in growths:
        layer_map = [None if i is None else layer_map[i] for i in grown.layer_map]
        measured |= grown.measured
    new_params = find_new_params_through(growths)
    new_layers = np.flatnonzero(new_params.get("layers", ()))
    flops: dict[str, float] = {}
    for name, model in models.items():
        flops[name] = flops_per_token(model.spec) or 0.0
    return GrowthReport(
        parent=str(parent.source) if parent.source else "random weights",
        operators=tuple(operators),
        at_step=at_step,
        layer_map=tuple(layer_map),
        new_layers=tuple(map(int, new_layers)),
        n_params={name: transformer.count_params(model.spec) for name, model in models.items()},
        flops_per_token=flops if all(flops.values()) else None,
        spec={name: model.spec for name, model in models.items()},
        heldout_loss=None,
        heldout_sequences=None,
        preserves_function=all(grown.preserves_function for grown in growths),
        max_logit_difference=None,
        layers=None,
        copy_similarity=None,
        measured=measured,
        moments=moments,
    )


def measure_models(
    report: GrowthReport,
    models: dict[str, LoadedModel],
    heldout: HeldoutData | None,
    batches: ReadBatches | None,
) -> GrowthReport:
    """Return the report with held-out losses and layer statistics, as far as there is data."""
    if heldout:
        losses = {}
        for name, model in models.items():
            losses[name] = heldout.measure_losses(model.spec, model.params)
        n_sequences = heldout.settings.train.eval_sequences
        report = dataclasses.replace(report, heldout_loss=losses, heldout_sequences=n_sequences)
    if batches:
        layers = {}
        for name, model in models.items():
            layers[name] = measure_model_statistics(model, batches())
        child, layer_map = models["child"], report.layer_map
        found = measure.measure_copy_similarity(child.spec, child.params, layer_map, batches())
        report = dataclasses.replace(report, layers=layers, copy_similarity=tuple(found))
    return report


def check_logits(
    parent: LoadedModel,
    child: LoadedModel,
    operators: Sequence[str],
    growths: Sequence[Growth],
    mesh: jax.sharding.Mesh,
) -> float:
    """Return the largest difference of a logit. Raise UserError if it is more than rounding."""
    difference, largest = measure_logit_difference(parent, child, mesh)
    allowed = 0
    if any(grown.changes_width for grown in growths):
        allowed = ROUNDING_TOLERANCE * largest
    if not difference <= allowed:
        raise UserError(
            f"growth {', '.join(operators)}: promises to preserve the function, but logits of up "
            f"to {largest:.3g} differ by {difference:.3g}. This is a bug of the operator; please "
            "report it, and use another one."
        )
    return difference


def measure_model_statistics(
    model: LoadedModel, batches: Iterable[Batch]
) -> tuple[LayerRecord, ...]:
    """Return the statistics of every layer."""
    found = measure.measure_layers(model.spec, model.params, batches)
    records = []
    for rms, influence in zip(found.rms, found.influence, strict=True):
        record = LayerRecord(float(rms), float(influence))
        records.append(record)
    return tuple(records)


def judge_growth(report: GrowthReport, unigram_nats: dict[str, float]) -> str:
    """Return one sentence: is the grown model healthy?"""
    losses, probe = report.heldout_loss, report.probe
    after = ""
    if probe:
        parts = []
        for name, loss in probe.child.items():
            parts.append(f"{name} {loss:.2f} (parent {probe.parent[name]:.2f})")
        after = f"; after {probe.n_steps} steps of both: {', '.join(parts)}"
    if report.preserves_function:
        difference = report.max_logit_difference
        return (
            "healthy: it computes the parent's function (largest difference of a logit: "
            f"{difference:.2g}){after}"
        )
    if not losses:
        return "not measured: there is no held-out data that both models read"
    before, now = losses["parent"], losses["child"]
    parts, rises, worse_than_guessing = [], [], False
    guessing = math.log(report.spec["child"].vocab_size)
    for name, loss in before.items():
        parts.append(f"{name} {loss:.2f} -> {now[name]:.2f}")
        rises.append(now[name] - loss)
        worse_than_guessing |= not now[name] <= guessing
    changes = ", ".join(parts)
    if worse_than_guessing:
        return (
            f"not healthy: worse than guessing (held-out nats per token: {changes}; guessing: "
            f"{guessing:.2f}){after}"
        )
    was_better = beats_unigram(before, unigram_nats)
    if was_better and not beats_unigram(now, unigram_nats):
        return (
            f"not healthy: no better than a unigram model (held-out nats per token: {changes}); "
            f"training has to start over{after}"
        )
    return (
        f"healthy: it starts {max(rises):+.2f} nats per token from its parent (held-out: "
        f"{changes}); training has to recover that{after}"
    )


def beats_unigram(losses: dict[str, float], unigram_nats: dict[str, float]) -> bool:
    """Return whether a model is better than a unigram model on some source."""
    return any(loss < unigram_nats.get(name, 0) for name, loss in losses.items())


def measure_logit_difference(
    parent: LoadedModel, child: LoadedModel, mesh: jax.sharding.Mesh
) -> tuple[float, float]:
    """Return (largest difference, largest size) of logits over one sequence of spread token ids."""
    tokens = gate.make_test_tokens(parent.spec, 128)
    before = gate.compute_logits(parent.spec, parent.params, tokens, mesh)
    after = gate.compute_logits(child.spec, child.params, tokens, mesh)
    difference = np.max(np.abs(before - after))
    largest = np.max(np.abs(before))
    return float(difference), float(largest)


def make_measuring_batches(
    config: Config, packed: Sequence[str | pathlib.Path], mesh: jax.sharding.Mesh
) -> Callable[[], Iterator[Batch]]:
    """Return a function that reads training batches to measure on: the same at every call."""

    def read_batches() -> Iterator[Batch]:
        dataset = loader.open_packed(packed)
        shards = n_shards(mesh, "batch")
        n = min(config.train.batch_size, 32)
        batch_size = -(-n // shards) * shards
        for name in dataset.names:
            yield from loader.iterate_heldout_batches(
                dataset,
                name,
                make_batch_sharding(mesh),
                batch_size,
                N_MEASURED_SEQUENCES,
                config.mixture.document_mask,
            )

    return read_batches


def run_probe(
    model: LoadedModel,
    config: Config,
    packed: Sequence[str | pathlib.Path],
    heldout: HeldoutData,
    mesh: jax.sharding.Mesh,
    n_steps: int,
) -> dict[str, float]:
    """Return held-out losses after a short training with fresh moments at the peak rate.

    It shows what the initial loss does not (2604.04281).
    """
    train = dataclasses.replace(config.train, steps=n_steps, grow=())
    optim = dataclasses.replace(
        config.optim, schedule="constant", warmup_steps=n_steps // 4, lr_multipliers=()
    )
    probe = dataclasses.replace(config, train=train, optim=optim)
    dataset = loader.open_packed(packed)
    schedule = MixtureSchedule(probe.mixture, dataset.n_sequences, train.batch_size)
    place = make_batch_sharding(mesh)
    mask = probe.mixture.document_mask
    batches = loader.iterate_batches(dataset, schedule, place, train.batch_size, 0, mask)
    params = jax.tree.map(jnp.copy, model.params)  # the step takes its state over
    now = state.init_state(params, model.spec, probe, mesh)
    train_step = step.build_step(model.spec, probe, mesh)
    for _ in range(n_steps):
        now, _ = train_step(now, next(batches))
    return heldout.measure_losses(model.spec, now.params)


def write_growth(report: GrowthReport, run: pathlib.Path) -> None:
    """Log the verdict and write growth.json."""
    log.info(f"growth: {report.verdict}")
    if jax.process_index() == 0:
        write_json_atomic(run / "growth.json", report)


def initialize_run(
    config: Config,
    out: pathlib.Path,
    *,
    probe_steps: int = 0,
    check: bool = False,
    flops_per_token: Callable[[ModelSpec, int], float] = lambda spec, seq_len: 0.0,
    replace: bool = False,
) -> None:
    """Write a run directory at step 0, initialized and grown as config.initialize says.

    Args:
        config: the recipe.
        out: the directory.
        probe_steps: training steps of parent and grown model, to compare them; 0: none.
        check: compare an imported model's logits with transformers'.
        flops_per_token: of a model at a sequence length.
        replace: overwrite what `out` holds.
    """
    source = None
    if config.initialize.source != "random":
        source = hub.download_model(config.initialize.source)
    config, packed = find_measuring_data(config, source)
    is_import = source is not None and checkpoint.find_checkpoint(source) is None
    if check and not is_import:
        raise UserError(
            "--check: compares an imported model with transformers; expected a Hugging Face "
            f"directory, got {config.initialize.source}."
        )

    def work(run: pathlib.Path) -> dict[str, Any]:
        mesh = make_mesh(config.mesh)
        heldout = batches = vocab_size = None
        if packed:
            heldout = HeldoutData(config, list(map(str, packed)), mesh)
            batches = make_measuring_batches(config, packed, mesh)
            vocab_size = heldout.dataset.vocab_size
        init = initialize.init_model(config.initialize, config.model, mesh, vocab_size, batches)
        if source and is_import:
            check_import(source, init.parent or init.model, heldout, mesh, check)
        if init.parent:
            report = report_growth(
                init, init.parent, config, packed, heldout, batches, flops_per_token, probe_steps
            )
            write_growth(report, run)
        save_initial_model(run, init)
        model = init.model
        return {"n_params": transformer.count_params(model.spec), "tokenizer": model.tokenizer}

    inputs = {"initialize": initialize.resolve_source(source)} if source else {}
    inputs |= {f"packed {path}": path for path in packed}
    section = dataclasses.asdict(config.initialize)
    request: dict[str, Any] = {"initialize": section, "probe_steps": probe_steps}
    if not source:
        request["model"] = dataclasses.asdict(config.model)
    seed = config.initialize.seed
    run_stage("initialize", out, work, config=request, inputs=inputs, seed=seed, replace=replace)
    log.info(f"initialize: {out} is ready; train it with --config.initialize.source={out}")


def report_growth(
    init: initialize.InitResult,
    parent: LoadedModel,
    config: Config,
    packed: Sequence[pathlib.Path],
    heldout: HeldoutData | None,
    batches: ReadBatches | None,
    flops_per_token: Callable[[ModelSpec, int], float],
    probe_steps: int,
) -> GrowthReport:
    """Return the report of a growth before training, after a short training of both models."""
    mesh = make_mesh(config.mesh)
    report = verify_growth(
        parent,
        init.model,
        config.initialize.grow,
        init.growths,
        mesh,
        heldout=heldout,
        batches=batches,
        flops_per_token=lambda spec: flops_per_token(spec, config.pack.seq_len),
    )
    if not probe_steps or not heldout or not report.heldout_loss:
        return report
    before = run_probe(parent, config, packed, heldout, mesh, probe_steps)
    after = run_probe(init.model, config, packed, heldout, mesh, probe_steps)
    report = dataclasses.replace(report, probe=ProbeRecord(probe_steps, before, after))
    verdict = judge_growth(report, heldout.dataset.unigram_nats)
    return dataclasses.replace(report, verdict=verdict)


def check_import(
    source: pathlib.Path,
    model: LoadedModel,
    heldout: HeldoutData | None,
    mesh: jax.sharding.Mesh,
    check: bool,
) -> None:
    """Log the checks of an imported model; with check, compare it with transformers."""
    vocab_size = None
    if heldout:
        vocab_size = heldout.dataset.vocab_size
    elif model.tokenizer_dir:
        vocab_size = tokenizer.load_tokenizer(model.tokenizer_dir).vocab_size
    gate.log_import_check(model.spec, model.params, heldout, vocab_size)
    if check:
        gate.check_import_against_transformers(source, model.spec, model.params, heldout, mesh)


def save_initial_model(run: pathlib.Path, init: initialize.InitResult) -> None:
    """Write spec, tokenizer and checkpoint 0."""
    model = init.model
    model.spec.save(run / "spec.json")
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


def find_measuring_data(
    config: Config, source: pathlib.Path | None
) -> tuple[Config, list[pathlib.Path]]:
    """Return (config, packed data) to measure a model on.

    That is the config's data if it names some, else what the source's run measures itself on.
    """
    if config.mixture.packed_paths:
        return config, [local_path(path) for path in config.mixture.packed_paths]
    if not source or not (source / "checkpoints").is_dir():
        return config, []
    config_path = source / "config.json"
    if not config_path.is_file():
        return config, []
    theirs = build_config(json.loads(config_path.read_text()))
    packed = [local_path(path) for path in theirs.mixture.packed_paths]
    packed = packed or [source / "packed"]
    for path in packed:
        if not (path / "manifest.json").is_file():
            return config, []
    measured_as = dataclasses.replace(
        config, mixture=theirs.mixture, train=theirs.train, optim=theirs.optim, pack=theirs.pack
    )
    return measured_as, packed

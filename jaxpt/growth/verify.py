"""Compare a grown model with its parent: function, held-out losses, layers, a short training."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxpt import io, logs
from jaxpt.flops import count_flops_per_token
from jaxpt.growth import measure
from jaxpt.growth.growth import Growth, ReadBatches
from jaxpt.growth.new_params import find_new_params_through
from jaxpt.growth.records import GrowthReport, LayerRecord, ProbeRecord
from jaxpt.model import transformer
from jaxpt.model.transformer import Params
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.weights.load import LoadedModel

log = logging.getLogger(__name__)

# sums in another order: a widened model adds each product in halves. Fraction of the largest
# logit, in float32
ROUNDING_TOLERANCE = 1e-5
# of training in a probe, and of measuring after it: with two compilations about a minute on two
# cores for 8M parameters
PROBE_SECONDS, PROBE_MEASURING_SECONDS = 20.0, 10.0
MIN_PROBE_STEPS = 4  # of fewer steps most are warm-up


class HeldoutLosses(Protocol):
    """Held-out sequences that losses are measured on, as train/gate.py does."""

    n_sequences: int  # per source, at most
    seq_len: int

    @property
    def unigram_nats(self) -> dict[str, float]:
        """Return the nats per token of a unigram model, by source."""
        ...

    def measure_losses(self, spec: ModelSpec, params: Params) -> dict[str, float]:
        """Return nats per token of each source."""
        ...

    def cut_for(self, *specs: ModelSpec) -> HeldoutLosses:
        """Return the same, in parts that these models all read."""
        ...

    def limit_to(self, n_sequences: int) -> HeldoutLosses:
        """Return the same of so many sequences per source, a whole batch at least."""
        ...


class Probe(Protocol):
    """A short training that parent and child both go through.

    It shows what the initial loss does not (2604.04281).
    """

    n_steps: int  # at most

    def time_step(self, spec: ModelSpec, params: Params) -> float:
        """Return the seconds of a step, compilation apart."""
        ...

    def train(self, spec: ModelSpec, params: Params, n_steps: int) -> Params:
        """Return the trained parameters of a model; those given are kept."""
        ...


def verify_growth(
    parent: LoadedModel,
    child: LoadedModel,
    operators: Sequence[str],
    growths: Sequence[Growth],
    mesh: jax.sharding.Mesh,
    *,
    seq_len: int,
    heldout: HeldoutLosses | None,
    batches: ReadBatches | None,
    at_step: int | None = None,
    moments: str | None = None,
    probe: Probe | None = None,
) -> GrowthReport:
    """Return the growth report: layer map, sizes, held-out losses, layer statistics, verdict.

    Args:
        parent: before growth.
        child: after growth.
        operators: as text.
        growths: what they did.
        mesh: the devices.
        seq_len: at which FLOPs are counted.
        heldout: to measure losses on, if there is any.
        batches: training batches for layer statistics, if there are any.
        at_step: of the run, if it grew during training.
        moments: policy for the optimizer's moments.
        probe: a short training of both models, to compare them after it.

    Raises:
        UserError: an operator that promises to preserve the function did not.
    """
    models = {"parent": parent, "child": child}
    report = describe_growth(models, operators, growths, seq_len, at_step, moments)
    heldout = heldout.cut_for(parent.spec, child.spec) if heldout else None
    if report.preserves_function:
        difference = check_logits(parent, child, operators, growths, mesh)
        report = dataclasses.replace(report, max_logit_difference=difference)
    # else the data is not the parent's, or not the child's
    if parent.tokenizer == child.tokenizer:
        with logs.announce_if_slow(log, "growth: measuring losses and layers, parent and child"):
            start = time.monotonic()
            report = measure_losses(report, models, heldout)
            seconds = time.monotonic() - start
            report = measure_statistics(report, models, batches)
        if probe and heldout:
            limited = limit_by_time(heldout, seconds)
            report = dataclasses.replace(report, probe=run_probe(probe, models, limited))
    unigram_nats = heldout.unigram_nats if heldout else {}
    verdict = judge_growth(report, unigram_nats)
    if all(grown.is_identity for grown in growths):
        verdict = f"nothing grew: {', '.join(operators)} gives back the parent"
    elif report.n_params["child"] < report.n_params["parent"]:
        verdict += f"; it is smaller than its parent ({describe_shrinking(report)})"
    return dataclasses.replace(report, verdict=verdict)


def describe_shrinking(report: GrowthReport) -> str:
    """Return "8 -> 2 layers, 9,000 -> 4,000 parameters"."""
    layers = [str(report.spec[name].n_layers) for name in ("parent", "child")]
    sizes = [f"{report.n_params[name]:,}" for name in ("parent", "child")]
    return f"{' -> '.join(layers)} layers, {' -> '.join(sizes)} parameters"


def describe_growth(
    models: dict[str, LoadedModel],
    operators: Sequence[str],
    growths: Sequence[Growth],
    seq_len: int,
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
    specs = {name: model.spec for name, model in models.items()}
    return GrowthReport(
        parent=str(parent.source) if parent.source else "random weights",
        operators=tuple(operators),
        at_step=at_step,
        layer_map=tuple(layer_map),
        new_layers=tuple(map(int, new_layers)),
        n_params={name: transformer.count_params(spec) for name, spec in specs.items()},
        flops_per_token={
            name: count_flops_per_token(spec, seq_len) for name, spec in specs.items()
        },
        spec=specs,
        heldout_loss=None,
        heldout_sequences=None,
        heldout_seq_len=None,
        preserves_function=all(grown.preserves_function for grown in growths),
        max_logit_difference=None,
        layers=None,
        copy_similarity=None,
        measured=measured,
        moments=moments,
    )


def measure_losses(
    report: GrowthReport, models: dict[str, LoadedModel], heldout: HeldoutLosses | None
) -> GrowthReport:
    """Return the report with held-out losses, if there is data."""
    if not heldout:
        return report
    losses = {}
    for name, model in models.items():
        losses[name] = heldout.measure_losses(model.spec, model.params)
    return dataclasses.replace(
        report,
        heldout_loss=losses,
        heldout_sequences=heldout.n_sequences,
        heldout_seq_len=heldout.seq_len,
    )


def measure_statistics(
    report: GrowthReport, models: dict[str, LoadedModel], batches: ReadBatches | None
) -> GrowthReport:
    """Return the report with layer statistics, if there is data."""
    if not batches:
        return report
    layers = {}
    for name, model in models.items():
        layers[name] = measure_model_statistics(model, batches())
    child, layer_map = models["child"], report.layer_map
    found = measure.measure_copy_similarity(child.spec, child.params, layer_map, batches())
    return dataclasses.replace(report, layers=layers, copy_similarity=tuple(found))


def limit_by_time(heldout: HeldoutLosses, seconds: float) -> HeldoutLosses:
    """Return as many sequences as a probe has time for, of those whose losses took `seconds`."""
    if seconds <= PROBE_MEASURING_SECONDS:
        return heldout
    return heldout.limit_to(int(heldout.n_sequences * PROBE_MEASURING_SECONDS / seconds))


def run_probe(
    probe: Probe, models: dict[str, LoadedModel], heldout: HeldoutLosses
) -> ProbeRecord | None:
    """Return the held-out losses of both models after a short training.

    It has as many steps as PROBE_SECONDS allow; None if they are too few to show anything.
    """
    with logs.announce_if_slow(log, "growth: timing a training step of parent and child"):
        seconds = sum(probe.time_step(model.spec, model.params) for model in models.values())
    n_steps = min(probe.n_steps, int(PROBE_SECONDS / seconds))
    if n_steps < min(probe.n_steps, MIN_PROBE_STEPS):
        log.info(
            f"growth: no probe: a step of parent and child takes {seconds:.1f} s, and "
            f"{PROBE_SECONDS:.0f} s would not hold {MIN_PROBE_STEPS}"
        )
        return None
    log.info(
        f"growth: training parent and child for {n_steps} steps each to compare them, about "
        f"{n_steps * seconds:.0f} s (--probe 0: do not)"
    )
    losses = {}
    for name, model in models.items():
        params = probe.train(model.spec, model.params, n_steps)
        with logs.announce_if_slow(log, f"growth: measuring the {name} after {n_steps} steps"):
            losses[name] = heldout.measure_losses(model.spec, params)
    return ProbeRecord(n_steps, n_sequences=heldout.n_sequences, **losses)


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
    parts, rises = [], []
    guessing = math.log(report.spec["child"].vocab_size)
    for name, loss in before.items():
        parts.append(f"{name} {loss:.2f} -> {now[name]:.2f}")
        rises.append(now[name] - loss)
    changes = ", ".join(parts)
    if any(not loss <= guessing for loss in before.values()):
        return (
            f"not healthy: its parent was worse than guessing already (held-out nats per token: "
            f"{changes}; guessing: {guessing:.2f}){after}"
        )
    if any(not loss <= guessing for loss in now.values()):
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
    tokens = measure.make_test_tokens(parent.spec, 128)
    before = measure.compute_logits(parent.spec, parent.params, tokens, mesh)
    after = measure.compute_logits(child.spec, child.params, tokens, mesh)
    difference = np.max(np.abs(before - after))
    largest = np.max(np.abs(before))
    return float(difference), float(largest)


def write_growth(report: GrowthReport, run: io.Path) -> None:
    """Log the verdict and write growth.json."""
    log.info(f"growth: {report.verdict}")
    if jax.process_index() == 0:
        io.write_json(run / "growth.json", report)

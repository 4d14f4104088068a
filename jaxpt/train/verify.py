"""A newborn held against its parent: what growth did, in numbers; and the stage that writes a newborn as a run at step 0."""

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

from jaxpt.config import Config, build_config
from jaxpt.data import loader, tokenizer
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.model import llama
from jaxpt.sharding import make_batch_sharding, make_mesh, n_shards
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.stage import local_path, write_atomic
from jaxpt.stage import run_stage as run_stage
from jaxpt.train import gate, optimizer, state, step
from jaxpt.train.gate import HeldoutData
from jaxpt.weights import checkpoint, growth, hub, huggingface, initialize, measure
from jaxpt.weights.initialize import LoadedModel

log = logging.getLogger(__name__)

N_MEASURED_SEQUENCES = 64  # of each source: what operators measure on, and the report's statistics
# Sums in another order: a widened model adds each product in halves. Share of the largest logit, in float32.
ROUNDING_TOLERANCE = 1e-5


def verify_growth(
    parent: LoadedModel,
    child: LoadedModel,
    operators: Sequence[str],
    growths: Sequence[growth.Growth],
    mesh,
    *,
    heldout: HeldoutData | None,
    rows: Callable[[], Iterable[Batch]] | None,
    flops_per_token: Callable[[ModelSpec], float | None] = lambda spec: None,
    at_step: int | None = None,
    moments: str | None = None,
) -> dict[str, Any]:
    """growth.json: what became of what, sizes, held-out loss of parent and newborn on the same rows, what the layers do, and
    what an operator that promises to keep the function did to the logits.

    Raises UserError when such a promise is broken.
    """
    layer_map: list[int | None] = list(range(parent.spec.n_layers))
    for grew in growths:
        layer_map = [None if layer is None else layer_map[layer] for layer in grew.layer_map]
    new_layers = growth.find_new_params_through(growths).get("layers", np.zeros(0))
    exact = all(grew.preserves_function for grew in growths)
    difference = None
    if exact:
        difference, largest = measure_logit_difference(parent, child, mesh)
        if not difference <= (
            ROUNDING_TOLERANCE * largest if any(grew.changes_width for grew in growths) else 0
        ):
            raise UserError(
                f"growth {', '.join(operators)}: promises to keep the function, but logits of up to {largest:.3g} differ by {difference:.3g}. "
                "This is a defect of the operator; please report it, and take another one."
            )
    same_words = (
        parent.tokenizer == child.tokenizer
    )  # else the rows are not the parent's own, or not the child's
    losses = None
    if heldout and same_words:
        losses = {
            "parent": heldout.measure_losses(parent.spec, parent.params),
            "newborn": heldout.measure_losses(child.spec, child.params),
        }
    layers = twins = None
    if rows and same_words:
        layers = {
            who: measure_model_statistics(model, rows())
            for who, model in (("parent", parent), ("newborn", child))
        }
        twins = measure.measure_copy_similarity(child.spec, child.params, layer_map, rows())
    flops = {
        who: flops_per_token(model.spec) for who, model in (("parent", parent), ("child", child))
    }
    found = {
        "parent": str(parent.source) if parent.source else "random weights",
        "operators": list(operators),
        "at_step": at_step,
        "layer_map": layer_map,
        "new_layers": [int(layer) for layer in new_layers.nonzero()[0]],
        "n_params": {
            "parent": llama.count_params(parent.spec),
            "child": llama.count_params(child.spec),
        },
        "flops_per_token": flops if all(flops.values()) else None,
        "spec": {"parent": parent.spec.to_json(), "child": child.spec.to_json()},
        "heldout_loss": losses,
        "heldout_rows": heldout.settings.train.eval_sequences if losses else None,
        "preserves_function": exact,
        "max_logit_difference": difference,
        "layers": layers,
        "twins": twins,
        "probe": None,
        "measured": {name: value for grew in growths for name, value in grew.measured.items()},
        "moments": moments,
    }
    found["verdict"] = judge_growth(found, heldout.rows.unigram_nats if losses else {})
    return found


def measure_model_statistics(model: LoadedModel, rows: Iterable[Batch]) -> list[dict[str, float]]:
    found = measure.measure_layers(model.spec, model.params, rows)
    return [
        {"rms": float(rms), "influence": float(influence)}
        for rms, influence in zip(found.rms, found.influence, strict=True)
    ]


def judge_growth(found: dict[str, Any], unigram_nats: dict[str, float]) -> str:
    """One sentence: is the newborn healthy?"""
    losses, probe = found["heldout_loss"], found["probe"]
    after = ""
    if probe:
        told = ", ".join(
            f"{name} {loss:.2f} (parent {probe['parent'][name]:.2f})"
            for name, loss in probe["newborn"].items()
        )
        after = f"; after {probe['steps']} steps of both: {told}"
    if found["preserves_function"]:
        return f"healthy: it computes the parent's function (largest difference of a logit: {found['max_logit_difference']:.2g}){after}"
    if not losses:
        return "not measured: there are no held-out rows that parent and newborn both read"
    changes = {name: losses["newborn"][name] - loss for name, loss in losses["parent"].items()}
    told = ", ".join(
        f"{name} {losses['parent'][name]:.2f} -> {losses['newborn'][name]:.2f}" for name in changes
    )
    guessing = math.log(found["spec"]["child"]["vocab_size"])
    if not all(losses["newborn"][name] <= guessing for name in changes):
        return f"not healthy: worse than guessing (held-out nats a token: {told}; guessing: {guessing:.2f}){after}"
    knows = {
        who: any(loss < unigram_nats.get(name, 0) for name, loss in losses[who].items())
        for who in losses
    }
    if knows["parent"] and not knows["newborn"]:
        return f"not healthy: it knows no more than how often each token occurs (held-out nats a token: {told}); training has to begin again{after}"
    return f"healthy: it starts {max(changes.values()):+.2f} nats a token from its parent (held-out: {told}); training has to win that back{after}"


def measure_logit_difference(parent: LoadedModel, child: LoadedModel, mesh) -> tuple[float, float]:
    """(largest difference, largest size) of logits over one row of token ids spread over the vocabulary."""
    tokens = gate.make_test_tokens(parent.spec, 128)
    before, after = (
        gate.compute_logits(model.spec, model.params, tokens, mesh) for model in (parent, child)
    )
    return float(np.max(np.abs(before - after))), float(np.max(np.abs(before)))


def make_measuring_batches(
    settings: Config, packed: list[pathlib.Path], mesh
) -> Callable[[], Iterator[Batch]]:
    """Training rows for operators that measure and for the report: the same ones each time it is called."""

    def rows() -> Iterator[Batch]:
        opened = loader.open_packed(packed)
        pieces = n_shards(mesh, "batch")
        batch_rows = -(-min(settings.train.batch_size, 32) // pieces) * pieces
        for name in opened.names:
            yield from loader.iterate_heldout_batches(
                opened,
                name,
                make_batch_sharding(mesh),
                batch_rows,
                N_MEASURED_SEQUENCES,
                settings.mixture.document_mask,
            )

    return rows


def run_probe(
    model: LoadedModel,
    settings: Config,
    packed: list[pathlib.Path],
    heldout: HeldoutData,
    mesh,
    n_steps: int,
) -> dict[str, float]:
    """Held-out losses after n_steps of training from fresh moments at the recipe's peak rate: what the loss at birth does not tell (2604.04281)."""
    asked = dataclasses.replace(
        settings,
        train=dataclasses.replace(settings.train, steps=n_steps, grow=()),
        optim=dataclasses.replace(
            settings.optim, schedule="constant", warmup_steps=n_steps // 4, lr_multipliers=()
        ),
    )
    rows = loader.open_packed(packed)
    mixture = MixtureSchedule(asked.mixture, rows.n_rows, asked.train.batch_size)
    batches = loader.iterate_batches(
        rows,
        mixture,
        make_batch_sharding(mesh),
        asked.train.batch_size,
        0,
        asked.mixture.document_mask,
    )
    now = state.init_state(
        jax.tree.map(jnp.copy, model.params), model.spec, asked, mesh
    )  # the step takes its state over
    train_step = step.build_step(model.spec, asked, mesh)
    for _ in range(n_steps):
        now, _ = train_step(now, next(batches))
    return heldout.measure_losses(model.spec, now.params)


def write_growth(found: dict[str, Any], run: pathlib.Path) -> None:
    log.info(f"growth: {found['verdict']}")
    if jax.process_index() == 0:
        write_atomic(run / "growth.json", json.dumps(found, indent=1) + "\n")


def initialize_run(
    settings: Config,
    out: pathlib.Path,
    *,
    probe_steps: int = 0,
    check: bool = False,
    flops_per_token: Callable[[ModelSpec, int], float] = lambda spec, seq_len: 0.0,
    replace: bool = False,
) -> None:
    """The stage of initialize.py: a run directory at step 0, born and grown as config.initialize says; with its growth.json
    when it grew, measured on the rows of its parent's run where that has some.

    probe_steps  training steps that parent and newborn each take, to compare what comes of them; 0 takes none
    check        compare an imported model's logits with transformers'
    """
    source = (
        None
        if settings.initialize.source == "random"
        else hub.download_model(settings.initialize.source)
    )
    settings, packed = open_measuring_data(settings, source)

    def work(run: pathlib.Path) -> dict[str, Any]:
        mesh = make_mesh(settings.mesh)
        heldout = HeldoutData(settings, packed, mesh) if packed else None
        rows = make_measuring_batches(settings, packed, mesh) if packed else None
        birth = initialize.init_model(
            settings, mesh, heldout.rows.vocab_size if heldout else None, rows
        )
        model = birth.model
        if source and checkpoint.find_checkpoint(source) is None:
            imported = birth.parent or model
            own = (
                imported.tokenizer_dir
                and tokenizer.load_tokenizer(imported.tokenizer_dir).vocab_size
            )
            gate.log_import_check(
                imported.spec, imported.params, heldout, heldout.rows.vocab_size if heldout else own
            )
            if check:
                gate.check_import_against_transformers(
                    source, imported.spec, imported.params, heldout, mesh
                )
        if birth.parent:
            found = verify_growth(
                birth.parent, model, settings.initialize.grow, birth.growths, mesh, heldout=heldout, rows=rows,
                flops_per_token=lambda spec: flops_per_token(spec, settings.pack.seq_len),
            )  # fmt: skip
            if probe_steps and found["heldout_loss"]:
                taken = {
                    who: run_probe(each, settings, packed, heldout, mesh, probe_steps)
                    for who, each in (("parent", birth.parent), ("newborn", model))
                }
                found["probe"] = {"steps": probe_steps, **taken}
                found["verdict"] = judge_growth(found, heldout.rows.unigram_nats)
            write_growth(found, run)
        model.spec.save(run / "spec.json")
        if model.tokenizer_dir:
            huggingface.copy_tokenizer(model.tokenizer_dir, run / "tokenizer")
        else:
            log.info(
                "no tokenizer: the source has none, so neither this run nor its export carries one"
            )
        known = (
            ("optimizer", "lr") if birth.growths else ("optimizer", "lr", "heldout")
        )  # a grown model's loss is another
        kept = {name: model.record[name] for name in known if name in model.record}
        counts = {
            "rows": 0,
            "young": optimizer.NewParams(growth.find_new_params_through(birth.growths)).to_json(),
            **kept,
        }
        checkpoint.save_checkpoint(
            run,
            0,
            model.params,
            {"step": jnp.int32(0)},
            model.spec,
            counts=counts,
            tokenizer=model.tokenizer,
        )
        return {"n_params": llama.count_params(model.spec), "tokenizer": model.tokenizer}

    if check and (source is None or checkpoint.find_checkpoint(source) is not None):
        raise UserError(
            f"--check: compares an imported model with transformers; {settings.initialize.source} is no Hugging Face directory."
        )
    inputs = {"initialize": initialize.resolve_source(source)} if source else {}
    inputs |= {f"packed {path}": path for path in packed}
    asked = {"initialize": dataclasses.asdict(settings.initialize), "probe_steps": probe_steps}
    asked |= {} if source else {"model": dataclasses.asdict(settings.model)}
    run_stage(
        "initialize",
        out,
        work,
        config=asked,
        inputs=inputs,
        seed=settings.initialize.seed,
        replace=replace,
    )
    log.info(f"initialize: {out} is ready; train it with --config.initialize.source={out}")


def open_measuring_data(
    settings: Config, source: pathlib.Path | None
) -> tuple[Config, list[pathlib.Path]]:
    """(settings, packed rows) to measure a newborn with: the config's, where it names rows, else as the source's run measures itself."""
    if settings.mixture.packed_paths:
        return settings, [local_path(path) for path in settings.mixture.packed_paths]
    if source and (source / "config.json").is_file() and (source / "checkpoints").is_dir():
        theirs = build_config(json.loads((source / "config.json").read_text()))
        found = [local_path(path) for path in theirs.mixture.packed_paths] or [source / "packed"]
        if all((path / "manifest.json").is_file() for path in found):
            return dataclasses.replace(
                settings,
                mixture=theirs.mixture,
                train=theirs.train,
                optim=theirs.optim,
                pack=theirs.pack,
            ), found
    return settings, []

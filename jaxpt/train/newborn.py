"""A newborn held against its parent: what growth did, in numbers; and the stage that writes a newborn as a run at step 0."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxpt.config import Config, typed
from jaxpt.model import llama
from jaxpt.sharding import make_mesh, n_shards
from jaxpt.spec import UserError
from jaxpt.stage import local_path, say, write_whole
from jaxpt.stage import run as run_stage
from jaxpt.train.gate import Heldout
from jaxpt.weights import checkpoint, huggingface, initialize
from jaxpt.weights.initialize import Birth


def verify_growth(birth: Birth, operators: tuple[str, ...], heldout: Heldout | None, mesh) -> dict[str, Any]:
    """growth.json: layer map, sizes, held-out loss of parent and newborn on the same rows, and what an operator that
    promises to keep the function did to the logits. Raises UserError when such a promise is broken.
    """
    parent, child = birth.parent, birth.model
    layer_map = list(range(parent.spec.n_layers))
    for growth in birth.growths:
        layer_map = [layer_map[layer] for layer in growth.layer_map]
    exact = all(growth.preserves_function for growth in birth.growths)
    difference = max_logit_difference(birth, mesh) if exact else None
    if exact and difference != 0.0:
        raise UserError(
            f"growth {operators}: promises to keep the function, but logits differ by up to {difference:.3g}. Train the parent's newest release, and report this."
        )
    losses = heldout and {"parent": heldout.losses(parent.spec, parent.params), "newborn": heldout.losses(child.spec, child.params)}
    found = {
        "parent": str(parent.source) if parent.source else "random weights",
        "operators": list(operators),
        "layer_map": layer_map,
        "n_params": {"parent": llama.count(parent.spec), "child": llama.count(child.spec)},
        "spec": {"parent": parent.spec.to_dict(), "child": child.spec.to_dict()},
        "heldout_loss": losses,
        "heldout_rows": heldout.settings.train.eval_rows if heldout else None,
        "preserves_function": exact,
        "max_logit_difference": difference,
    }
    found["verdict"] = verdict(found)
    say(f"growth: {found['verdict']}")
    return found


def verdict(found: dict[str, Any]) -> str:
    """One sentence."""
    losses = found["heldout_loss"]
    if found["preserves_function"]:
        return "the newborn computes the parent's function exactly (largest difference of logits: 0)"
    if not losses:
        return "not measured: no held-out rows were given"
    changes = {name: losses["newborn"][name] - loss for name, loss in losses["parent"].items()}
    told = ", ".join(f"{name} {losses['parent'][name]:.2f} -> {losses['newborn'][name]:.2f}" for name in changes)
    ceiling = math.log(found["spec"]["child"]["vocab_size"])
    if any(losses["newborn"][name] > ceiling or math.isnan(losses["newborn"][name]) for name in changes):
        return f"the newborn is worse than guessing (held-out nats a token: {told}; guessing: {ceiling:.2f}): it keeps nothing that it could use"
    return f"the newborn starts {max(changes.values()):+.2f} nats a token from its parent (held-out: {told}); training has to win that back"


def max_logit_difference(birth: Birth, mesh) -> float:
    """Over one row of every kind of token id, in float32."""
    T = min(128, birth.parent.spec.max_positions)
    tokens = (jnp.arange(T, dtype=jnp.int32) * 7919 % birth.parent.spec.vocab_size)[None].repeat(n_shards(mesh, "batch"), 0)
    segments, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens.shape)

    def logits(spec, params):
        def forward(params, tokens, segments, positions):
            model = llama.bind(spec, params)
            return model(tokens, segments, positions) @ model.head()

        return jax.jit(forward)(params, tokens, segments, positions)

    parent, child = birth.parent, birth.model
    return float(jnp.max(jnp.abs(logits(parent.spec, parent.params) - logits(child.spec, child.params))))


def write_growth(found: dict[str, Any], run: pathlib.Path) -> None:
    write_whole(run / "growth.json", json.dumps(found, indent=1) + "\n")


def write(settings: Config, out: pathlib.Path, replace: bool = False) -> None:
    """The stage of initialize.py: a run directory at step 0, born and grown as config.initialize says; with its growth.json
    when it grew, measured on the held-out rows of its parent's run where that has some.
    """
    source = None if settings.initialize.source == "random" else local_path(settings.initialize.source)
    settings, packed = measuring(settings, source)

    def work(run: pathlib.Path) -> dict[str, Any]:
        mesh = make_mesh(settings.mesh)
        heldout = Heldout(settings, packed, mesh) if packed else None
        birth = initialize.birth(settings, mesh, heldout.rows.n_pieces if heldout else None)
        model = birth.model
        if birth.parent:
            write_growth(verify_growth(birth, settings.initialize.grow, heldout, mesh), run)
        model.spec.save(run / "spec.json")
        if model.tokenizer_dir:
            huggingface.copy_tokenizer(model.tokenizer_dir, run / "tokenizer")
        else:
            say("no tokenizer: the source has none, so neither this run nor its export carries one")
        checkpoint.save(run, 0, model.params, {"step": jnp.int32(0)}, model.spec, counts={"rows": 0}, tokenizer=model.tokenizer, keep=1)
        return {"n_params": llama.count(model.spec), "tokenizer": model.tokenizer}

    inputs = {"initialize": initialize.source_of(source)} if source else {}
    inputs |= {f"packed {path}": path for path in packed}
    asked = {"initialize": dataclasses.asdict(settings.initialize)} | ({} if source else {"model": dataclasses.asdict(settings.model)})
    run_stage("initialize", out, work, config=asked, inputs=inputs, seed=settings.initialize.seed, replace=replace)
    say(f"initialize: {out} is ready; train it with --config.initialize.source={out}")


def measuring(settings: Config, source: pathlib.Path | None) -> tuple[Config, list[pathlib.Path]]:
    """(settings, packed rows) to measure a newborn with: the config's, where it names rows, else as the source's run measures itself."""
    if settings.mixture.packed:
        return settings, [local_path(path) for path in settings.mixture.packed]
    if source and (source / "config.json").is_file() and (source / "checkpoints").is_dir():
        theirs = typed(json.loads((source / "config.json").read_text()))
        found = [local_path(path) for path in theirs.mixture.packed] or [source / "packed"]
        if all((path / "manifest.json").is_file() for path in found):
            return dataclasses.replace(settings, mixture=theirs.mixture, train=theirs.train), found
    return settings, []

"""What a model makes of the documents of one step, so that a spike has a culprit: each document's loss, and what it adds to the step's."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import jax
import numpy as np

from jaxpt import config, sharding, stage
from jaxpt.data import loader
from jaxpt.evaluate import likelihood
from jaxpt.spec import UserError
from jaxpt.weights import checkpoint, initialize


class Culprit(NamedTuple):
    """A document, or the part of one in a row.

    nats_sum   of its n_trained trained tokens
    lift       nats a token by which the step's loss would be lower without it
    """

    seen: loader.Seen
    nats_sum: float
    n_trained: int
    lift: float


def rank(run: pathlib.Path, step: int, tokenizer: str) -> tuple[pathlib.Path, list[Culprit]]:
    """(the checkpoint used, the trained documents of a run's step-th update, those that lift its loss most first).

    The checkpoint is the newest one before that update, else the first after it. tokenizer: see `loader.trace`.
    Raises UserError where the run cannot be read or has no checkpoint.
    """
    documents = list(loader.trace(run, step, tokenizer))
    known = checkpoint.steps(run)
    if not known:
        raise UserError(f"{run}: has no checkpoint, so no loss can be computed. Leave --losses out to see the documents alone.")
    nearest = max((each for each in known if each < step), default=known[0])
    mesh = sharding.make_mesh(config.Mesh())
    model = initialize.load(run / "checkpoints" / str(nearest), mesh)

    settings, rows, places = loader.rows_of_step(run, step)
    token_step = likelihood.token_step(model.spec, mesh, np.dtype("float32"))
    to_mesh = sharding.batch_sharding(mesh)
    at_once = sharding.n_shards(mesh, "batch") * max(1, likelihood.TOKENS_AT_A_TIME // rows.row_len)
    nats, weights = [], []  # of each row, [T]
    with stage.progress("losses", len(places), "rows") as advance:
        for start in range(0, len(places), at_once):
            chosen = [rows.row(name, i) for name, i in places[start : start + at_once]]
            batch = loader.make_batch(chosen, settings.mixture.document_mask)
            # whole blocks of logits, and as many rows as the devices share evenly: segment 0 is nobody's
            more = (0, at_once - len(chosen)), (0, -rows.row_len % likelihood.LOGITS_AT_A_TIME)
            padded = jax.tree.map(lambda field, more=more: np.pad(field, more), batch)
            on_devices = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, to_mesh, x.__getitem__), padded)
            likelihoods, _ = token_step(model.params, on_devices)
            nats += list(-np.asarray(likelihoods)[: len(chosen), : rows.row_len] * batch.weights)
            weights += list(batch.weights)
            advance(len(chosen))

    total, n_total = sum(float(each.sum()) for each in nats), sum(int(each.sum()) for each in weights)
    found, ends = [], dict.fromkeys(range(len(places)), 0)
    for seen in documents:
        start, ends[seen.slot] = ends[seen.slot], ends[seen.slot] + len(seen.tokens)
        span = slice(max(start - 1, 0), ends[seen.slot] - 1)  # a token's loss stands where the one before it is read
        nats_sum, n_trained = float(nats[seen.slot][span].sum()), int(weights[seen.slot][span].sum())
        if n_trained:
            without = (total - nats_sum) / (n_total - n_trained) if n_total > n_trained else 0.0
            found.append(Culprit(seen, nats_sum, n_trained, total / n_total - without))
    return run / "checkpoints" / str(nearest), sorted(found, key=lambda each: -each.lift)

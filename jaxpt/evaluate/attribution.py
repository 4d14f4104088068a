"""Attribute the loss of one step to its documents.

Each one's loss, and what it adds to the step's.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from jaxpt import config, sharding
from jaxpt.data import loader
from jaxpt.evaluate import likelihood
from jaxpt.spec import UserError
from jaxpt.weights import checkpoint, initialize


class DocumentLoss(NamedTuple):
    """A document, or the part of one in a row.

    nats_sum   of its n_trained trained tokens
    lift       nats per token by which the step's loss would be lower without it
    """

    document: loader.TracedDocument
    loss_sum: float
    n_trained: int
    delta: float


def rank_documents(
    run: pathlib.Path, step: int, tokenizer: str
) -> tuple[pathlib.Path, list[DocumentLoss]]:
    """(the checkpoint used, the trained documents of a run's step-th update, those that lift its
    loss most first).

    The checkpoint is the newest one before that update, else the first after it. tokenizer: see
    `loader.trace`.
    Raises UserError where the run cannot be read or has no checkpoint.
    """
    documents = list(loader.trace_step(run, step, tokenizer))
    known = checkpoint.list_steps(run)
    if not known:
        raise UserError(
            f"{run}: has no checkpoint, so no loss can be computed. Leave "
            "--losses out to see the documents alone."
        )
    nearest = max((each for each in known if each < step), default=known[0])
    mesh = sharding.make_mesh(config.MeshConfig())
    model = initialize.load_model(run / "checkpoints" / str(nearest), mesh)

    settings, rows, places = loader.list_step_sequences(run, step)
    batch = loader.make_batch(
        [rows.read_sequence(name, i) for name, i in places], settings.mixture.document_mask
    )
    nats = np.zeros(batch.tokens.shape, np.float32)
    spans = []  # of each text that a row's tokens see as one: (row, its columns)
    for row, segments in enumerate(batch.segment_ids):
        cuts = [0, *np.flatnonzero(np.diff(segments)) + 1, len(segments)]
        spans += [
            (row, slice(a, b)) for a, b in itertools.pairwise(cuts) if segments[a] and b - a > 1
        ]
    pairs = [
        (batch.tokens[row, span][:1].tolist(), batch.tokens[row, span][1:].tolist())
        for row, span in spans
    ]
    for place, likelihoods, _ in likelihood.compute_token_log_likelihoods(
        model.spec, model.params, pairs, max_length=rows.seq_len, label="losses"
    ):
        row, span = spans[place]
        nats[row, span.start : span.stop - 1] = -likelihoods
    nats *= batch.loss_mask

    total, n_total = float(nats.sum(dtype=np.float64)), int(batch.loss_mask.sum())
    found, ends = [], dict.fromkeys(range(len(places)), 0)
    for seen in documents:
        start, ends[seen.slot] = ends[seen.slot], ends[seen.slot] + len(seen.tokens)
        span = slice(
            max(start - 1, 0), ends[seen.slot] - 1
        )  # a token's loss stands where the one before it is read
        nats_sum, n_trained = (
            float(nats[seen.slot][span].sum()),
            int(batch.loss_mask[seen.slot][span].sum()),
        )
        if n_trained:
            without = (total - nats_sum) / (n_total - n_trained) if n_total > n_trained else 0.0
            found.append(DocumentLoss(seen, nats_sum, n_trained, total / n_total - without))
    return run / "checkpoints" / str(nearest), sorted(found, key=lambda each: -each.delta)

"""Attribute the loss of one training step to its documents."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxpt import config, io, sharding
from jaxpt.data import loader
from jaxpt.evaluate import likelihood
from jaxpt.spec import Batch, UserError
from jaxpt.weights import checkpoint
from jaxpt.weights.load import LoadedModel, load_model


@dataclasses.dataclass(frozen=True)
class DocumentLoss:
    """The loss of a document, or of the part of one in a sequence.

    Attributes:
        document: the document and its tokens.
        loss_sum: nats, over the trained tokens.
        n_trained: trained tokens.
        delta: nats per token by which the step's loss would be lower without this document.
    """

    document: loader.TracedDocument
    loss_sum: float
    n_trained: int
    delta: float


class Segment(NamedTuple):
    """Columns [start, stop) of a sequence, to the last trained one, that attend to each other."""

    row: int
    start: int
    stop: int


def rank_documents(run: io.Path, step: int, tokenizer: str) -> tuple[io.Path, list[DocumentLoss]]:
    """Rank the trained documents of a step by what they add to its loss.

    The losses are computed with the newest checkpoint before that step, else the first after it.

    Args:
        run: a run directory.
        step: counted from 1.
        tokenizer: fingerprint of the run's tokenizer, see `loader.trace_step`.

    Returns:
        The checkpoint directory used, and the documents, largest delta first.

    Raises:
        UserError: the run cannot be read or has no checkpoint.
    """
    documents = list(loader.trace_step(run, step, tokenizer))
    saved = checkpoint.list_steps(run)
    if not saved:
        raise UserError(
            f"{run}: has no checkpoint, so no loss can be computed. Omit --losses to list the "
            "documents alone."
        )
    nearest = max((saved_step for saved_step in saved if saved_step < step), default=saved[0])
    checkpoint_dir = run / "checkpoints" / str(nearest)
    mesh = sharding.make_mesh(config.MeshConfig())
    model = load_model(checkpoint_dir, mesh)

    settings, dataset, places, n_parts = loader.list_step_sequences(run, step)
    sequences = [dataset.read_sequence(name, i) for name, i in places]
    batch = loader.make_batch(sequences, settings.mixture.document_mask)
    losses = compute_batch_losses(model, loader.cut_batch(batch, n_parts))
    losses = losses.reshape(batch.tokens.shape)
    ranked = sum_document_losses(documents, losses, batch.loss_mask)
    ranked.sort(key=lambda found: -found.delta)
    return checkpoint_dir, ranked


def compute_batch_losses(model: LoadedModel, batch: Batch) -> np.ndarray:
    """Return the loss of each target of a batch in nats, float32 [B, T]; 0 where not trained."""
    losses = np.zeros(batch.tokens.shape, np.float32)
    segments = find_segments(batch)
    pairs = []
    for row, start, stop in segments:
        ids = batch.tokens[row, start:stop].tolist()
        last = int(batch.targets[row, stop - 1])  # of a part it is the first token of the next
        pairs.append((ids[:1], [*ids[1:], last]))
    scored = likelihood.compute_token_log_likelihoods(
        model.spec, model.params, pairs, max_length=batch.tokens.shape[1], label="losses"
    )
    for place, log_likelihoods, _ in scored:
        row, start, stop = segments[place]
        losses[row, start:stop] = -log_likelihoods
    losses *= batch.loss_mask
    return losses


def find_segments(batch: Batch) -> list[Segment]:
    """Return the segments of a batch in which a target is trained."""
    segments = []
    for row, ids in enumerate(batch.segment_ids):
        changes = np.flatnonzero(np.diff(ids)) + 1
        starts = [0, *changes.tolist()]
        stops = [*changes.tolist(), len(ids)]
        for start, stop in zip(starts, stops, strict=True):
            trained = np.flatnonzero(batch.loss_mask[row, start:stop]).tolist()
            if trained:
                segments.append(Segment(row, start, start + trained[-1] + 1))
    return segments


def sum_document_losses(
    documents: list[loader.TracedDocument], losses: np.ndarray, loss_mask: np.ndarray
) -> list[DocumentLoss]:
    """Sum losses [B, T] over each document that has trained tokens, in the order of the batch."""
    total = float(losses.sum(dtype=np.float64))
    n_total = int(loss_mask.sum())
    stops = dict.fromkeys(range(len(losses)), 0)
    found = []
    for document in documents:
        start = stops[document.slot]
        stop = stops[document.slot] = start + len(document.tokens)
        # the loss of a token is stored where the token before it is read
        columns = slice(max(start - 1, 0), stop - 1)
        loss_sum = float(losses[document.slot][columns].sum())
        n_trained = int(loss_mask[document.slot][columns].sum())
        if not n_trained:
            continue
        n_others = n_total - n_trained
        mean_of_others = (total - loss_sum) / n_others if n_others else 0.0
        delta = total / n_total - mean_of_others
        found.append(DocumentLoss(document, loss_sum, n_trained, delta))
    return found

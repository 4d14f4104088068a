"""Is this model what it claims to be? Asked of its held-out losses before the first update, and of every import."""

from __future__ import annotations

import logging
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.config import Config
from jaxpt.data import loader
from jaxpt.evaluate import likelihood, reference
from jaxpt.model import llama
from jaxpt.sharding import make_batch_sharding, make_replicated_sharding, n_shards
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.stage import fingerprint
from jaxpt.train import diagnosis
from jaxpt.train.diagnosis import (
    TINY_STD,
    compute_embedding_norms,
    measure_nats_per_token,
    reset_norms,
)

log = logging.getLogger(__name__)

# Nats a token between a recorded loss and the same one measured here. Another mesh moves it by 1e-5, bfloat16 weights and
# products by 0.0003 (stories260K); a wrong theta, shift or norm moves it by 0.3 and more there.
LOSS_TOLERANCE = 0.01
MIN_SEQUENCES, MIN_TOKENS = 16, 8192  # of a quick measurement, at most
# Nats a token from transformers, by the type of our weights: float32 gave at most 3e-12, weights rounded to bfloat16 up to
# 2e-4; a wrong theta 0.6 in a trained model (stories260K) and 4e-4 in a random one (24 layers).
MAX_KL = {"float32": 1e-6, "bfloat16": 1e-3}


class HeldoutData:
    """Held-out loss per source over the same rows each time: train.eval_sequences of each, evenly spaced."""

    def __init__(self, settings: Config, packed: list[pathlib.Path], mesh):
        self.rows = loader.open_packed(packed, split="heldout")
        self.settings, self.mesh, self.steps = settings, mesh, {}
        self.batch_rows = self.whole(min(settings.train.batch_size, 32))

    def measure_losses(self, spec: ModelSpec, params) -> dict[str, float]:
        """Nats per token of each source."""
        if spec not in self.steps:
            self.steps[spec] = likelihood.make_loss_step(
                spec, self.mesh, self.settings.train.compute_dtype
            )
        return {
            name: likelihood.measure_heldout_loss(
                self.steps[spec], params, self.iterate_source(name)
            )
            for name in self.rows.names
        }

    def iterate_source(self, name: str) -> Iterator[Batch]:
        return self.n_read(
            name, self.batch_rows, min(self.settings.train.eval_sequences, self.rows.n_rows[name])
        )

    def is_small_sample(self, name: str) -> Batch:
        """One batch of at most FEW_ROWS rows and FEW_TOKENS tokens; one row at least."""
        n_rows = min(MIN_SEQUENCES, max(1, MIN_TOKENS // self.rows.seq_len))
        return next(self.n_read(name, self.whole(n_rows), n_rows))

    def n_read(self, name: str, batch_rows: int, n_rows: int) -> Iterator[Batch]:
        return loader.iterate_heldout_batches(
            self.rows,
            name,
            make_batch_sharding(self.mesh),
            batch_rows,
            n_rows,
            self.settings.mixture.document_mask,
        )

    def whole(self, n_rows: int) -> int:
        """So many rows or a few more, as the mesh cuts them evenly."""
        pieces = n_shards(self.mesh, "batch")
        return -(-n_rows // pieces) * pieces

    def to_record(self, losses: dict[str, float]) -> dict[str, Any]:
        """What a checkpoint keeps of these losses, for `recorded` to find."""
        asked = {
            "n_rows": self.settings.train.eval_sequences,
            "document_mask": self.settings.mixture.document_mask,
        }
        return {"losses": losses, "rows": self.rows.fingerprint, **asked}

    def matches_record(self, record: dict[str, Any]) -> dict[str, float]:
        """The losses that a model's record holds of these very rows, of all of these sources or some of them; else none."""
        found = record.get("heldout")
        if not found or any(name not in self.rows.names for name in found["losses"]):
            return {}
        sources = {name: self.rows.sources[name].fingerprint for name in sorted(found["losses"])}
        here = {
            **self.to_record(found["losses"]),
            "rows": fingerprint(["heldout", sources]),
        }  # as loader.Rows makes it of these sources alone
        return (
            found["losses"] if all(here.get(key) == value for key, value in found.items()) else {}
        )


# ---- before the first update of a model that comes with weights


def check_initial_loss(
    heldout: HeldoutData, spec: ModelSpec, params, record: dict[str, Any], grown: bool
) -> dict[str, float]:
    """The held-out losses of a model whose weights come from elsewhere, before its first update.

    record  what the model's makers wrote of it (initialize.Loaded.record). Losses of these very rows must come out again;
            where it has none, the model must know more than how often each token occurs, and no other reading of the same
            weights may fit the rows clearly better
    grown   since that record: such a newborn may have to learn its function again, so a failure is only noted

    Raises UserError naming loss, what it was held against, the most likely cause and what to do.
    """
    losses, unigram = heldout.measure_losses(spec, params), heldout.rows.unigram_nats
    if not losses:
        log.info("note: no source has held-out rows, so nothing tells whether the weights fit")
        return losses
    recorded = {} if grown else heldout.matches_record(record)
    differing = [
        name for name in recorded if not abs(losses[name] - recorded[name]) <= LOSS_TOLERANCE
    ]  # not: a NaN differs too
    known = [name for name in losses if losses[name] < unigram[name]]
    fails = bool(differing) if recorded else not known
    if not fails and (recorded or grown):
        return losses

    # told of the first source that differs, or of the one that the model is best at
    name = (
        differing[0]
        if differing
        else min(known or losses, key=lambda name: losses[name] - unigram[name])
    )
    finding, sound = f"held-out loss on {name} is {losses[name]:.2f} nats a token", unigram[name]
    if differing:
        finding += f", where its makers measured {recorded[name]:.2f} on the same rows"
        sound = (
            losses[name] + recorded[name]
        ) / 2  # what explains the failure makes up for half of it at least
    elif fails:
        finding += f"; counting tokens alone gives {unigram[name]:.2f}, guessing {math.log(spec.vocab_size):.2f}"
    else:
        finding += ", and the same weights can do better"
    theirs = (
        heldout.rows.tokenizer if differing else record.get("tokenizer")
    )  # the same rows are of the same tokenizer
    if grown:
        log.info(
            f"note: {finding}. The growth broke the model's function; training has to mend it first"
        )
    elif fails and record.get("step") == 0 and all(reset_norms(spec, params).values()):
        log.info(f"note: {finding}. The weights were never trained")
    elif cause := find_likely_cause(heldout, name, spec, params, theirs, sound, fails):
        raise UserError(f"initialize.source: {finding}. Most likely {cause}.")
    return losses


def find_likely_cause(
    heldout: HeldoutData,
    name: str,
    spec: ModelSpec,
    params,
    theirs: str | None,
    sound: float,
    fails: bool,
) -> str | None:
    """Why the weights do not fit a source's rows, and what to do; None where they do and no other reading of them fits better.

    theirs  fingerprint of the model's tokenizer, where known
    sound   nats a token that a right reading stays below
    """
    if fails and theirs not in (None, heldout.rows.tokenizer):
        return f"the rows were packed with tokenizer {heldout.rows.tokenizer}, the model was trained with {theirs}; pack with its own"
    batch, dtype = heldout.is_small_sample(name), heldout.settings.train.compute_dtype
    cause = diagnosis.find_better_reading(spec, params, batch, dtype, sound, fails)
    if fails and not cause:
        cause = diagnosis.describe_weight_fault(spec, params, batch)
    if fails and not cause:
        another = "the rows were packed with another tokenizer; pack with the model's own"
        cause = (
            "weights and config.json are not of the same model; take both from one place"
            if theirs
            else another
        )
    return cause


# ---- an import


def log_import_check(
    spec: ModelSpec, params, heldout: HeldoutData | None, vocab_size: int | None
) -> None:
    """Say how well an imported model foresees the rows, in bits per byte, and which rows of its embedding are of no use.

    vocab_size  the tokenizer's; None: there is none
    """
    if heldout is None or not heldout.rows.names:
        log.info("import: no held-out rows were given, so bits per byte are not measured")
    elif heldout.rows.vocab_size > spec.vocab_size:
        log.info(
            f"import: the rows hold ids up to {heldout.rows.vocab_size - 1:,}, the model knows {spec.vocab_size:,}, so bits per byte are not measured"
        )
    else:
        told = ", ".join(
            f"{name} {heldout_bits_per_byte(heldout, name, spec, params):.3f}"
            for name in heldout.rows.names
        )
        log.info(f"import: bits per byte on a few held-out rows: {told}")
    norms = compute_embedding_norms(params)
    pieces, beyond = norms[:vocab_size], norms[vocab_size:] if vocab_size else norms[:0]
    median = np.median(pieces)
    dead, tiny = (
        take_batches(pieces == 0),
        take_batches((pieces > 0) & (pieces < TINY_STD * median)),
    )
    log.info(
        f"import: of {len(pieces):,} rows of the embedding {dead} are dead (all zero), {tiny} below {TINY_STD:g} of the median norm {median:.3g}"
    )
    if vocab_size is None:
        log.info("import: there is no tokenizer, so rows beyond it are not told apart")
    elif len(beyond):
        # norms of normally distributed rows spread by 1 / sqrt(2D) around their mean, equal rows not at all, trained ones more
        spread, at_birth = (
            float(np.std(beyond) / max(np.mean(beyond), 1e-30)),
            (2 * spec.d_model) ** -0.5,
        )
        looks = (
            "untrained"
            if spread < 1.5 * at_birth or np.median(beyond) < TINY_STD * median
            else "trained"
        )
        log.info(
            f"import: {len(beyond):,} rows more lie beyond the tokenizer's {vocab_size:,} pieces and look {looks} (median norm {np.median(beyond):.3g})"
        )


def heldout_bits_per_byte(heldout: HeldoutData, name: str, spec: ModelSpec, params) -> float:
    """likelihood.bits_per_byte, estimated: mean nats of a few rows' tokens of text, times the source's tokens of text a byte.

    The manifest's tokens are all in the rows: text, and of each document an end and, where the tokenizer has one, a beginning of
    sequence. Its bytes still count what pack.method course drops at the end of a source: less than one row.
    """
    batch, counts = heldout.is_small_sample(name), heldout.rows.counts[name]
    of_text = batch._replace(loss_mask=batch.loss_mask * (batch.targets != spec.eos_id))
    n_special = 1 + int(heldout.rows.read_sequence(name, 0).tokens[0] == spec.bos_id)
    tokens_per_byte = (counts["tokens"] - n_special * counts["documents"]) / counts["bytes"]
    return (
        measure_nats_per_token(spec, params, of_text, heldout.settings.train.compute_dtype)
        / math.log(2)
        * tokens_per_byte
    )


def take_batches(chosen: np.ndarray) -> str:
    """How many, and the first of them."""
    places = np.flatnonzero(chosen)
    return f"{len(places):,}" + (
        f" (rows {', '.join(map(str, places[:5]))}{', ...' if len(places) > 5 else ''})"
        if len(places)
        else ""
    )


def check_import_against_transformers(
    hf_dir: pathlib.Path, spec: ModelSpec, params, heldout: HeldoutData | None, mesh
) -> None:
    """Hold a model's logits against those of `transformers` from the directory that it came from, in float32, on about 1,000
    tokens of the held-out rows, or of ids spread over the vocabulary. Every process asks its own `transformers`.

    Raises UserError when the mean KL a token is above KL_BOUND, or when this host's memory cannot hold the model.
    """
    tokens = choose_test_tokens(spec, heldout)
    needed, free = (
        4 * llama.count_params(spec) + 12 * tokens.size * spec.vocab_size,
        measure_free_memory(),
    )  # weights; both logits and room to make them
    if needed > free:
        raise UserError(
            f"--check: {hf_dir} takes {needed / 1e9:,.1f} GB of this host's memory in transformers and float32, but {free / 1e9:,.1f} GB are free. "
            "Check it on a larger host, or leave --check out."
        )

    found = reference.measure_logit_distance(
        hf_dir, tokens, compute_logits(spec, params, tokens, mesh)
    )
    measured = f"KL to transformers is {found.kl:.2g} nats a token, logits differ by at most {found.max_abs_diff:.2g} ({tokens.size:,} tokens)"
    log.info(f"import: {measured}")
    bound = MAX_KL[params["embed"].dtype.name]
    if not found.kl <= bound:
        scaling = spec.rope_scaling.rope_type if spec.rope_scaling else "no"
        raise UserError(
            f"--check: {hf_dir}: {measured}, wanted at most {bound:g}. The model was read with rope theta {spec.rope_theta:,.0f}, {scaling} "
            f"rope scaling and norm eps {spec.norm_eps:g}: compare config.json, and report this where it says the same."
        )


def compute_logits(spec: ModelSpec, params, tokens: np.ndarray, mesh) -> np.ndarray:
    """float32 [B, T, V] of a few rows of token ids [B, T], each one document."""

    def forward(params, tokens):
        model = llama.bind_params(spec, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return model(tokens, jnp.ones_like(tokens), positions) @ model.lm_head()

    with jax.default_matmul_precision(
        "highest"
    ):  # a GPU or TPU would otherwise multiply float32 in fewer bits
        return np.asarray(
            jax.jit(forward, out_shardings=make_replicated_sharding(mesh))(params, tokens)
        )


def make_test_tokens(spec: ModelSpec, n: int) -> np.ndarray:
    """int32 [1, n]: one row of ids from all over the vocabulary."""
    return (np.arange(min(n, spec.max_seq_len), dtype=np.int32) * 7919 % spec.vocab_size)[None]


def choose_test_tokens(spec: ModelSpec, heldout: HeldoutData | None) -> np.ndarray:
    """int32 [B, T], about 1,000 in all: the beginnings of held-out rows of each source in turn, where there are some."""
    if heldout is None or not heldout.rows.names or heldout.rows.vocab_size > spec.vocab_size:
        return make_test_tokens(spec, 1024)
    rows, T = heldout.rows, min(1024, heldout.rows.seq_len, spec.max_seq_len)
    names = [rows.names[i % len(rows.names)] for i in range(max(1, 1024 // T))]
    return np.stack(
        [
            rows.read_sequence(name, i // len(rows.names) % rows.n_rows[name]).tokens[:T]
            for i, name in enumerate(names)
        ]
    )


def measure_free_memory() -> int:
    """Bytes of this host's memory that a process can still take; where the system does not say, all that it has."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

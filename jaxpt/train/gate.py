"""Check a model before its first update, by its held-out losses, and check every import."""

from __future__ import annotations

import copy
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import io
from jaxpt.config import InitializeConfig, TrainConfig
from jaxpt.data import loader
from jaxpt.evaluate import likelihood, reference
from jaxpt.growth.measure import compute_logits, make_test_tokens
from jaxpt.growth.operators import new_tokenizer
from jaxpt.growth.parse import parse_operator
from jaxpt.model import transformer
from jaxpt.model.transformer import Params
from jaxpt.sharding import make_batch_sharding, n_shards
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.stage import fingerprint
from jaxpt.train import diagnosis
from jaxpt.weights.load import LoadedModel

log = logging.getLogger(__name__)

# nats per token between a recorded loss and the same one measured here. Another mesh moves it by
# 1e-5, bfloat16 weights and activations by 0.0003 (stories260K); a wrong theta, shift or norm by
# 0.3 and more
LOSS_TOLERANCE = 0.01
SMALL_SEQUENCES, SMALL_TOKENS = 16, 8192  # of a quick measurement, at most
# nats per token from transformers, by dtype of our weights: float32 gave at most 3e-12, weights
# rounded to bfloat16 up to 2e-4; a wrong theta 0.6 in a trained model (stories260K) and 4e-4 in a
# random one (24 layers)
MAX_KL = {"float32": 1e-6, "bfloat16": 1e-3}
CHECK_TOKENS = 1024  # compared with transformers


class HeldoutData:
    """Held-out loss per source over the same sequences each time.

    It takes train.eval_sequences of each source, evenly spaced.
    """

    def __init__(
        self,
        packed: Sequence[str | io.Path],
        train: TrainConfig,
        document_mask: bool,
        mesh: jax.sharding.Mesh,
        seq_len: int | None = None,
    ):
        """Open the held-out split of packed data.

        Args:
            packed: its directories.
            train: the training loop's knobs: how much is measured, and in what dtype.
            document_mask: whether a document sees only itself.
            mesh: the devices.
            seq_len: of the parts that packed sequences are cut into; None: they stay whole.
        """
        self.dataset = loader.open_packed(packed, split="heldout")
        self.seq_len = seq_len or self.dataset.seq_len
        self.n_sequences = train.eval_sequences
        self.compute_dtype = train.compute_dtype
        self.document_mask = document_mask
        self.mesh = mesh
        self.steps: dict[ModelSpec, Any] = {}
        self.batch_size = self.round_batch_size(min(train.batch_size, 32))

    @property
    def unigram_nats(self) -> dict[str, float]:
        """Return the nats per token of a unigram model, by source."""
        return self.dataset.unigram_nats

    def measure_losses(self, spec: ModelSpec, params: Params) -> dict[str, float]:
        """Return nats per token of each source."""
        if spec not in self.steps:
            self.steps[spec] = likelihood.make_loss_step(spec, self.mesh, self.compute_dtype)
        losses = {}
        for name in self.dataset.names:
            batches = self.iterate_source(name)
            losses[name] = likelihood.measure_heldout_loss(self.steps[spec], params, batches)
        return losses

    def iterate_source(self, name: str) -> Iterator[Batch]:
        """Yield the batches of a source that a loss is measured on."""
        n = min(self.n_sequences, self.dataset.n_sequences[name])
        return self.iterate_batches(name, self.batch_size, n)

    def read_small_batch(self, name: str) -> Batch:
        """Return one batch of at most SMALL_SEQUENCES and SMALL_TOKENS; at least one sequence."""
        n = min(SMALL_SEQUENCES, max(1, SMALL_TOKENS // self.dataset.seq_len))
        batch_size = self.round_batch_size(n)
        return next(self.iterate_batches(name, batch_size, n))

    def iterate_batches(self, name: str, batch_size: int, n_sequences: int) -> Iterator[Batch]:
        """Yield sharded batches of n evenly spaced sequences of a source."""
        place = make_batch_sharding(self.mesh)
        return loader.iterate_heldout_batches(
            self.dataset, name, place, batch_size, n_sequences, self.document_mask, self.seq_len
        )

    def cut_to(self, length: int) -> HeldoutData:
        """Return the same, in the longest equal parts of at most `length` tokens."""
        whole = self.dataset.seq_len
        cut = copy.copy(self)  # the compiled steps are shared
        cut.seq_len = max(n for n in range(1, min(whole, length) + 1) if whole % n == 0)
        return cut

    def cut_for(self, *specs: ModelSpec) -> HeldoutData:
        """Return the same, in parts that these models all read."""
        return self.cut_to(min(self.seq_len, *(spec.max_seq_len for spec in specs)))

    def limit_to(self, n_sequences: int) -> HeldoutData:
        """Return the same of so many sequences per source, a whole batch at least."""
        limited = copy.copy(self)  # the compiled steps are shared
        limited.n_sequences = min(self.n_sequences, max(n_sequences, self.batch_size))
        return limited

    def round_batch_size(self, n: int) -> int:
        """Return the next number of sequences that the mesh shards evenly."""
        shards = n_shards(self.mesh, "batch")
        return -(-n // shards) * shards

    def to_record(self, losses: dict[str, float]) -> dict[str, Any]:
        """Return what a checkpoint keeps of these losses, for `find_recorded_losses`.

        They may be of all sources here, or of some.
        """
        sources = {name: self.dataset.sources[name].fingerprint for name in losses}
        return {
            "losses": losses,
            "fingerprint": fingerprint(["heldout", sources]),  # as the loader's of these alone
            "n_sequences": self.n_sequences,
            "document_mask": self.document_mask,
            "seq_len": self.seq_len,
        }

    def find_recorded_losses(self, record: dict[str, Any]) -> dict[str, float]:
        """Return a model's recorded losses if they are of these sequences, else none."""
        found = record.get("heldout")
        if not found:
            return {}
        losses = found["losses"]
        if not losses.keys() <= set(self.dataset.names):
            return {}
        return losses if found == self.to_record(losses) else {}


# ---- before the first update of a model that comes with weights


def check_parent(
    heldout: HeldoutData | None, section: InitializeConfig, parent: LoadedModel
) -> None:
    """Check weights from elsewhere before they grow, as those of any start, if there is data.

    A child that fails the check later then fails by its growth. A parent whose vocabulary changes
    cannot read the data, and one whose context grows is measured on shorter parts of it.
    """
    if heldout is None:
        return
    if any(parse_operator(text).operator is new_tokenizer for text in section.grow):
        return
    heldout = heldout.cut_for(parent.spec)
    check_initial_loss(
        heldout, parent.spec, parent.params, describe_origin(parent), has_just_grown(parent)
    )


def describe_origin(model: LoadedModel) -> dict[str, Any]:
    """Return what is known of a model's weights, for `check_initial_loss`."""
    return {"tokenizer": model.tokenizer, **model.record}


def has_just_grown(model: LoadedModel) -> bool:
    """Return whether a model grew and was not trained since, so that it has no loss recorded."""
    is_grown = model.source is not None and io.exists(model.source / "growth.json")
    return is_grown and not model.step


def check_initial_loss(
    heldout: HeldoutData,
    spec: ModelSpec,
    params: Params,
    record: dict[str, Any],
    grown: bool,
    parent_loss: dict[str, float] | None = None,
    knob: str = "initialize.source",
) -> dict[str, float]:
    """Return the held-out losses of a model with weights from elsewhere, before its first update.

    Recorded losses of the same sequences must be reproduced. Without them the model must beat a
    unigram model, and no other reading of the same weights may fit clearly better.

    Args:
        heldout: what to measure on.
        spec: the architecture.
        params: the parameters.
        record: what was recorded with the model (LoadedModel.record).
        grown: whether it grew since: it may have to relearn its function, so a failure is only
            logged.
        parent_loss: of the parent that it grew from, on the same sequences, where known.
        knob: that names the model, for the error.

    Raises:
        UserError: naming the loss, what it was compared with, the likely cause and what to do.
    """
    losses = heldout.measure_losses(spec, params)
    if not losses:
        log.warning("no source has held-out sequences, so the weights cannot be checked")
        return losses
    recorded = {} if grown else heldout.find_recorded_losses(record)
    judgement = judge_losses(heldout, spec, losses, recorded)
    finding, fails = judgement.finding, judgement.fails
    if not fails and (recorded or grown):
        return losses
    if grown:
        if beats_unigram(heldout, parent_loss):
            log.warning(f"{finding}. Growth broke the model's function; training has to repair it")
        else:
            log.warning(f"{finding}. Its parent was no better before it grew")
        return losses
    if fails and record.get("step") == 0:
        norms = diagnosis.find_reset_norms(spec, params)
        if all(norms.values()):
            log.warning(f"{finding}. The weights were never trained")
            return losses
    tokenizer = record.get("tokenizer")
    if judgement.differs:
        tokenizer = heldout.dataset.tokenizer  # the same sequences have the same tokenizer
    name, bound = judgement.source, judgement.bound
    cause = find_likely_cause(heldout, name, spec, params, tokenizer, bound, fails)
    if cause:
        raise UserError(f"{knob}: {finding}. Most likely {cause}.")
    return losses


def beats_unigram(heldout: HeldoutData, losses: dict[str, float] | None) -> bool:
    """Return whether a model is better than a unigram model somewhere; True where not known."""
    unigram = heldout.unigram_nats
    if not losses or not losses.keys() <= unigram.keys():
        return True
    return any(loss < unigram[name] for name, loss in losses.items())


class LossJudgement(NamedTuple):
    """What a model's held-out losses say about it.

    Attributes:
        fails: whether they are wrong.
        differs: whether they differ from those recorded.
        source: the first that differs, or the one that the model is best at.
        finding: its loss and what that was compared with, as half a sentence.
        bound: nats per token that a right reading of the weights stays below.
    """

    fails: bool
    differs: bool
    source: str
    finding: str
    bound: float


def judge_losses(
    heldout: HeldoutData, spec: ModelSpec, losses: dict[str, float], recorded: dict[str, float]
) -> LossJudgement:
    """Compare losses with those recorded for the same sequences, else with a unigram model's."""
    unigram = heldout.unigram_nats
    differing = []
    for name, expected in recorded.items():
        difference = abs(losses[name] - expected)
        if not difference <= LOSS_TOLERANCE:  # a NaN differs too
            differing.append(name)
    learned = [name for name in losses if losses[name] < unigram[name]]
    fails = bool(differing) if recorded else not learned
    best_first = sorted(learned or losses, key=lambda name: losses[name] - unigram[name])
    name = differing[0] if differing else best_first[0]
    finding = f"held-out loss on {name} is {losses[name]:.2f} nats per token"
    bound = unigram[name]
    if differing:
        finding += f", but {recorded[name]:.2f} was recorded for the same sequences"
        bound = (losses[name] + recorded[name]) / 2  # a cause explains at least half of it
    elif fails:
        guess = math.log(spec.vocab_size)
        finding += f"; a unigram model has {unigram[name]:.2f}, guessing {guess:.2f}"
    else:
        finding += ", and the same weights can do better"
    return LossJudgement(fails, bool(differing), name, finding, bound)


def find_likely_cause(
    heldout: HeldoutData,
    name: str,
    spec: ModelSpec,
    params: Params,
    model_tokenizer: str | None,
    bound: float,
    fails: bool,
) -> str | None:
    """Return why the weights do not fit a source's sequences, and what to do.

    Args:
        heldout: what to measure on.
        name: of the source.
        spec: the architecture.
        params: the parameters.
        model_tokenizer: fingerprint, where known.
        bound: nats per token that a right reading stays below.
        fails: whether the loss is wrong; else only a clearly better reading is a cause.

    Returns:
        The cause; None if the weights fit and no other reading of them fits better.
    """
    packed_with = heldout.dataset.tokenizer
    if fails and model_tokenizer not in (None, packed_with):
        return (
            f"the data was packed with tokenizer {packed_with}, but the model was trained with "
            f"{model_tokenizer}; pack with the model's"
        )
    batch = heldout.read_small_batch(name)
    dtype = heldout.compute_dtype
    cause = diagnosis.find_better_reading(spec, params, batch, dtype, bound, fails)
    if cause or not fails:
        return cause
    cause = diagnosis.describe_weight_fault(spec, params, batch)
    if cause:
        return cause
    if model_tokenizer:
        return "weights and config.json are not of the same model; take both from one place"
    return "the data was packed with another tokenizer; pack with the model's"


# ---- an import


def log_import_check(
    spec: ModelSpec,
    params: Params,
    heldout: HeldoutData | None,
    vocab_size: int | None,
    keeps_text: bool = True,
) -> None:
    """Log an imported model's bits per byte, and embedding rows that are of no use.

    Args:
        spec: the architecture.
        params: the parameters.
        heldout: what to measure on, if there is any.
        vocab_size: the tokenizer's; None: there is none.
        keeps_text: whether the tokenizer's ids give back case and white space.
    """
    log_import_bits(spec, params, heldout, keeps_text)
    norms = diagnosis.compute_embedding_norms(params)
    used = norms[:vocab_size]
    median = np.median(used)
    tiny = diagnosis.TINY_STD * median
    dead = format_rows(used == 0)
    small = format_rows((used > 0) & (used < tiny))
    log.info(f"import: embedding: of {len(used):,} rows {dead} are zero,")
    log.info(f"import: {small} below {diagnosis.TINY_STD:g} of the median norm {median:.3g}")
    if vocab_size is None:
        log.info("import: no tokenizer, so padding rows cannot be distinguished")
        return
    padding = norms[vocab_size:]
    if not len(padding):
        return
    # norms of normally distributed rows spread by 1 / sqrt(2D) around their mean, equal rows not
    # at all, trained ones more
    mean = max(np.mean(padding), 1e-30)
    spread = float(np.std(padding) / mean)
    untrained_spread = (2 * spec.d_model) ** -0.5
    is_untrained = spread < 1.5 * untrained_spread or np.median(padding) < tiny
    looks = "untrained" if is_untrained else "trained"
    log.info(
        f"import: {len(padding):,} rows beyond the tokenizer's {vocab_size:,} tokens look {looks} "
        f"(median norm {np.median(padding):.3g})"
    )


def log_import_bits(
    spec: ModelSpec, params: Params, heldout: HeldoutData | None, keeps_text: bool
) -> None:
    """Log bits per byte of each source; see `log_import_check`."""
    if heldout is None or not heldout.dataset.names:
        log.info("import: no held-out data, so bits per byte are not measured")
    elif heldout.dataset.n_ids > spec.vocab_size:
        log.warning(
            f"import: the data has token ids up to {heldout.dataset.n_ids - 1:,}, the model "
            f"{spec.vocab_size:,} embedding rows, so bits per byte are not measured"
        )
    elif not keeps_text:
        log.warning(
            "import: the tokenizer changes case or white space: decode(encode(text)) is not the "
            "text, so bits per byte are not measured"
        )
    else:
        for name in heldout.dataset.names:
            counts = heldout.dataset.counts[name]
            if counts.n_unknown_tokens:
                log.warning(
                    f"import: {name}: {counts.n_unknown_tokens:,} of {counts.n_tokens:,} tokens "
                    "stand for text that the tokenizer cannot spell, so bits per byte are not "
                    "measured"
                )
                continue
            bits = estimate_bits_per_byte(heldout, name, spec, params)
            log.info(f"import: {name}: {bits:.3f} bits per byte on a few sequences")


def estimate_bits_per_byte(
    heldout: HeldoutData, name: str, spec: ModelSpec, params: Params
) -> float:
    """Estimate likelihood.measure_bits_per_byte: nats of a few sequences' text x tokens per byte.

    The manifest counts text tokens and, per document, an end and (where the tokenizer has one) a
    beginning of sequence; a pair is two documents. Its bytes include what pack.method course drops
    at the end of a source: less than one sequence.
    """
    batch = heldout.read_small_batch(name)
    special = heldout.dataset.special_tokens
    is_text = ~jnp.isin(batch.targets, jnp.array(special.eos_ids))
    text_only = batch._replace(loss_mask=batch.loss_mask * is_text)
    counts = heldout.dataset.counts[name]
    first_token = heldout.dataset.read_sequence(name, 0).tokens[0]
    n_special = counts.n_documents + counts.n_pairs
    if first_token == special.bos_id:
        n_special *= 2
    n_tokens = counts.n_tokens - n_special
    tokens_per_byte = n_tokens / (counts.n_text_bytes + counts.n_rejected_bytes)
    dtype = heldout.compute_dtype
    nats = diagnosis.measure_nats_per_token(spec, params, text_only, dtype)
    return nats / math.log(2) * tokens_per_byte


def format_rows(chosen: np.ndarray) -> str:
    """Return how many rows are chosen, and the first of them."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return "0"
    more = ", ..." if len(rows) > 5 else ""
    return f"{len(rows):,} (rows {', '.join(map(str, rows[:5]))}{more})"


def check_import_against_transformers(
    hf_dir: pathlib.Path,
    spec: ModelSpec,
    params: Params,
    heldout: HeldoutData | None,
    mesh: jax.sharding.Mesh,
) -> None:
    """Compare a model's logits with transformers' from the directory it came from, in float32.

    Uses about 1,000 held-out tokens, or ids spread over the vocabulary. Every process runs its own
    transformers.

    Raises:
        UserError: the mean KL per token is above MAX_KL, or this host's memory cannot hold the
            model.
    """
    tokens = choose_test_tokens(spec, heldout)
    # weights; both logits and room to make them
    logits_bytes = 12 * tokens.size * spec.vocab_size
    needed = 4 * transformer.count_params(spec) + logits_bytes
    free = measure_free_memory()
    if needed > free:
        raise UserError(
            f"--check: {hf_dir} takes {needed / 1e9:,.1f} GB of host memory in transformers and "
            f"float32, but {free / 1e9:,.1f} GB are free. Check it on a larger host, or leave "
            "--check out."
        )
    logits = compute_logits(spec, params, tokens, mesh)
    found = reference.measure_logit_distance(hf_dir, tokens, logits)
    measured = (
        f"KL to transformers {found.kl:.2g} nats per token, logits differ by at most "
        f"{found.max_abs_diff:.2g} ({tokens.size:,} tokens)"
    )
    log.info(f"import: {measured}")
    bound = MAX_KL[params["embed"].dtype.name]
    if not found.kl <= bound:
        scaling = spec.rope_scaling.rope_type if spec.rope_scaling else "no"
        raise UserError(
            f"--check: {hf_dir}: expected a KL of at most {bound:g}, got {measured}. The model was "
            f"read with rope theta {spec.rope_theta:,.0f}, {scaling} rope scaling and norm eps "
            f"{spec.norm_eps:g}: compare config.json, and report this if it says the same."
        )


def choose_test_tokens(spec: ModelSpec, heldout: HeldoutData | None) -> np.ndarray:
    """Return int32 [B, T], about 1,000 ids: beginnings of held-out sequences, if any."""
    dataset = heldout.dataset if heldout else None
    if dataset is None or not dataset.names or dataset.vocab_size > spec.vocab_size:
        return make_test_tokens(spec, CHECK_TOKENS)
    length = min(CHECK_TOKENS, dataset.seq_len, spec.max_seq_len)
    sequences = []
    n_sources = len(dataset.names)
    for i in range(max(1, CHECK_TOKENS // length)):
        name = dataset.names[i % n_sources]
        place = i // n_sources % dataset.n_sequences[name]
        sequence = dataset.read_sequence(name, place)
        sequences.append(sequence.tokens[:length])
    return np.stack(sequences)


def measure_free_memory() -> int:
    """Return the bytes of host memory that a process can still take; all of it if unknown."""
    text = io.read_text_if_there(pathlib.Path("/proc/meminfo")) or ""
    for line in text.splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

"""Pack documents into sequences of token ids, all exactly seq_len long.

    best_fit   bos + ids + eos per document. A document of up to seq_len tokens is never split; a
               longer one becomes full sequences and one rest. Whole documents and rests fill
               sequences by best-fit-decreasing within a window of the corpus; the rest is padding.
    course     bos + ids + eos of all documents of a source, concatenated and split every seq_len
               tokens; the last partial sequence is dropped.

A prompt that leaves its completion no place in a sequence loses its beginning, counted; else most
sequences of a long prompt would train nothing.

There are two passes, each split into jobs: tokenize a part of the corpus; fill the sequences of one
Arrow shard. A job depends on corpus and tokenizer alone, so that any number of workers, here or on
a cluster, gives the same sequences, and a killed run continues with the jobs that are left.
`datasets.load_from_disk` opens the shards; `jaxpt.data.loader` maps them into memory.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxpt import config, io, stage
from jaxpt.data import chat, executor, fim, tokenizer
from jaxpt.data.meta import CONVERSATION, PAIR
from jaxpt.spec import Manifest, Record, SpecialTokens, UserError
from jaxpt.text import name_some

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)

N_LOGGED_SOURCES = 8  # of a split that have lines of their own on the console
WINDOW_SEGMENTS = 2**16  # that best-fit sees at once, and
WINDOW_TOKENS = 2**25  # the tokens in them: 128 MB of ids
# encoded at once; the tokenizers library holds about 100 bytes per token meanwhile
MAX_ENCODE_CHARS = 2**23
JOB_BYTES = 2**25  # of text that a job tokenizes, about
MAX_BYTES_IN_PROCESS = 2**24  # of text; up to this, starting processes takes longer than the work
# of ids in a shard of the course's stream; best-fit makes a shard of each window
SHARD_BYTES = 2**28
BATCH_TOKENS = 2**18  # in an Arrow record batch
# beside the shards: [record batches, 5] int64 of shard, first byte, bytes, sequences, CRC-32
INDEX_FILE = "batches.npy"
END_OF_STREAM = b"\xff\xff\xff\xff" + bytes(4)  # of Arrow messages, the format datasets reads
LESSON_FILE = "packaged_pretrain_dataset.parquet"  # of the course's lesson 3
INT32 = pa.int32()
INT_LIST = pa.list_(INT32)
STRING_LIST = pa.list_(pa.string())
TOKEN_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "ids": INT_LIST,
        "loss_from": INT32,
        "untrained": INT_LIST,
        "pair_at": INT32,  # where the rejected answer of a pair begins, with its prompt; 0: none
    }
)
SPLITS = ("train", "heldout")
NO_SPANS = np.zeros((0, 2), np.int32)


def packed_schema(seq_len: int) -> pa.Schema:
    """Return the schema of the shards."""
    fields = {"input_ids": pa.list_(INT32, seq_len)}
    fields |= {"doc_lens": INT_LIST, "doc_ids": STRING_LIST, "loss_from": INT_LIST}
    # of conversations: start, stop, start, ... of the sequence's tokens that are not trained on
    fields |= {"untrained": INT_LIST}
    return pa.schema(fields)


# ---- records: the manifest's counts, and jobs


@dataclasses.dataclass(frozen=True)
class PackLayout(Record):
    """What decides the form of the sequences."""

    seq_len: int  # tokens per sequence
    method: str  # "best_fit" or "course"
    fim_rate: float  # of the documents to train on, for fill-in-the-middle
    vocab_size: int  # largest token id + 1


@dataclasses.dataclass(frozen=True)
class PackedShard(Record):
    """One Arrow shard."""

    file: str  # name, beside dataset_info.json
    n_sequences: int
    n_bytes: int  # of the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCounts(Record):
    """What is counted of documents as they are tokenized."""

    n_documents: int = 0
    n_text_bytes: int = 0  # of UTF-8; of pairs, prompt and chosen answer
    n_rejected_bytes: int = 0  # of pairs, prompt and rejected answer
    n_unknown_tokens: int = 0  # for text that the tokenizer has no token for
    n_cut_prompts: int = 0  # that were too long; their first tokens are left out
    n_cut_tokens: int = 0  # of these prompts, in no sequence
    n_fim_documents: int = 0  # rearranged for fill-in-the-middle
    n_fim_too_long: int = 0  # chosen for it, and left as they are: a sequence cannot hold them
    n_pairs: int = 0  # preference pairs
    n_long_pairs: int = 0  # left out: a sequence cannot hold them


@dataclasses.dataclass(frozen=True)
class PackedSource(TextCounts):
    """Counts of one source and split."""

    n_split_documents: int  # longer than seq_len (best_fit), or across a boundary (course)
    n_sequences: int
    n_tokens: int  # bos and eos included, padding not
    n_ids: int  # largest token id + 1
    n_trained_tokens: int  # targets of the loss: no first token of a segment, no prompt
    padding_frac: float  # of n_sequences * seq_len
    # entropy of the trained tokens' frequencies, per token: the loss of a model that has learnt
    # these and nothing else
    unigram_nats: float
    shards: tuple[PackedShard, ...]  # in the order of their sequences


@dataclasses.dataclass(frozen=True)
class PackCounts(PackLayout):
    """Manifest.counts of the stage: source name -> counts, per split."""

    special_tokens: SpecialTokens  # of the tokenizer
    train: dict[str, PackedSource]
    heldout: dict[str, PackedSource]


@dataclasses.dataclass(frozen=True)
class PackingJob(Record):
    """A part of the work; it is done when its result exists."""

    output_path: str
    result_path: str
    parallelism: str = dataclasses.field(default="true", kw_only=True)  # TOKENIZERS_PARALLELISM


@dataclasses.dataclass(frozen=True)
class TokenizeJob(PackingJob):
    """Row groups of one corpus file, to be written as an Arrow stream of TOKEN_SCHEMA."""

    corpus_path: str
    sha256: str | None  # to check the file by; None: the file's first job does
    row_groups: tuple[int, ...]
    tokenizer_path: str
    seq_len: int  # which bounds a prompt, and documents for fill-in-the-middle
    fim_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeResult(TextCounts):
    """Counts of a finished TokenizeJob."""

    n_conversations: int = 0
    turn_end_id: int | None = None  # by which an answer in them ends


@dataclasses.dataclass(frozen=True)
class DocumentRange(Record):
    """Consecutive documents of a file that a TokenizeJob wrote."""

    tokens_path: str
    first: int
    stop: int  # exclusive


@dataclasses.dataclass(frozen=True)
class StreamRange(Record):
    """Consecutive sequences of a source's stream of tokens (course)."""

    position: int  # of the first document's first token in the stream
    first_sequence: int
    n_sequences: int


@dataclasses.dataclass(frozen=True)
class PackJob(PackingJob):
    """Documents to be packed into one Arrow shard."""

    documents: tuple[DocumentRange, ...]
    layout: PackLayout
    stream: StreamRange | None  # course only


@dataclasses.dataclass(frozen=True)
class PackResult(Record):
    """Counts of a finished PackJob."""

    shard: PackedShard
    n_tokens: int  # without padding
    n_ids: int  # largest token id + 1
    n_split_documents: int  # that have their second segment here
    token_counts: dict[int, int]  # token id -> times trained on
    batches: tuple[tuple[int, int, int, int], ...]  # first byte, bytes, sequences, CRC-32


# ---- the stage


def pack_corpus(
    section: config.PackConfig,
    workdir: io.Path | str,
    replace: bool = False,
    executor: str = "local",
    verify: bool = False,
) -> Manifest:
    """Make WORKDIR/packed from WORKDIR/corpus and WORKDIR/tokenizer.

    The sequences and their order depend on nothing else, `executor` included.

    Raises:
        UserError: a source has less text than one sequence.
    """
    workdir = io.path(workdir)
    packed = workdir / "packed"
    corpus = workdir / "corpus"
    tokenizer_path = workdir / "tokenizer"
    inputs = {"corpus": corpus, "tokenizer": tokenizer_path}
    encoder = tokenizer.load_tokenizer(tokenizer_path)
    layout = PackLayout(section.seq_len, section.method, section.fim_rate, encoder.vocab_size)
    if layout.fim_rate:
        fim.FimEncoder(encoder)  # before any work

    def work(out: pathlib.Path) -> dict[str, Any]:
        counts = pack_splits(
            io.local_copy(corpus).resolve(),
            io.local_copy(tokenizer_path).resolve(),
            out.resolve(),
            layout,
            encoder.special_tokens,
            executor,
        )
        return counts.to_json()

    manifest = stage.run_stage(
        "pack",
        packed,
        work,
        config=stage.to_jsonable(section),
        inputs=inputs,
        tokenizer=encoder.fingerprint,
        replace=replace,
        verify=verify,
    )
    counts = PackCounts.from_json(manifest.counts)
    log_counts(counts)
    if stage.read_manifest(corpus).config.get("heldout_frac") != 0:
        log_missing_heldout(counts)
    return manifest


def pack_splits(
    corpus: pathlib.Path,
    tokenizer_path: pathlib.Path,
    out: pathlib.Path,
    layout: PackLayout,
    special_tokens: SpecialTokens,
    where: str,
) -> PackCounts:
    """Run both passes over both splits.

    Args:
        corpus: what jaxpt prepare wrote.
        tokenizer_path: the tokenizer's directory.
        out: the stage's directory.
        layout: of the sequences.
        special_tokens: the tokenizer's.
        where: the executor, for more than MAX_BYTES_IN_PROCESS of text.
    """
    jobs_dir = out / ".jobs"
    files: dict[tuple[str, str], list[pathlib.Path]] = {}
    for split in SPLITS:
        corpus_files = tokenizer.list_corpus_files(corpus, split)
        for name, paths in corpus_files.items():
            files[split, name] = paths
    n_bytes = estimate_bytes(itertools.chain(*files.values()))
    if n_bytes <= MAX_BYTES_IN_PROCESS:
        where = "here"
    checksums = {}
    manifest = stage.read_manifest(corpus)
    for name, checksum in manifest.outputs.items():
        path = str(corpus / name)
        checksums[path] = checksum
    tokenize_jobs = {}
    for key, paths in files.items():
        directory = jobs_dir.joinpath(*key)
        # held-out documents stay as they are, so that their losses mean the same at any rate
        fim_rate = layout.fim_rate if key[0] == "train" else 0.0
        tokenize_jobs[key] = plan_tokenize_jobs(
            paths, checksums, tokenizer_path, directory, layout.seq_len, fim_rate
        )
    run_pack_jobs(where, run_tokenize_job, tokenize_jobs.values(), ("tokenizing", "B"), n_bytes)
    check_pairs(tokenize_jobs, layout.method)
    pack_jobs = {}
    for key, jobs in tokenize_jobs.items():
        directory = jobs_dir.joinpath(*key)
        shards_dir = out.joinpath(*key)
        pack_jobs[key] = plan_pack_jobs(jobs, shards_dir, directory, layout)
    run_pack_jobs(where, run_pack_job, pack_jobs.values(), ("packing", "sequences"))
    special_tokens = add_turn_ends(special_tokens, itertools.chain(*tokenize_jobs.values()))
    counts = PackCounts(
        **dataclasses.asdict(layout), special_tokens=special_tokens, train={}, heldout={}
    )
    for (split, name), jobs in pack_jobs.items():
        if jobs:
            texts = load_results(TokenizeResult, tokenize_jobs[split, name])
            shards = load_results(PackResult, jobs)
            source = gather_shards(texts, shards, out / split / name, layout)
            getattr(counts, split)[name] = source
        elif split == "train":
            raise UserError(
                f"pack: source {name} has less than one sequence of {layout.seq_len} tokens. "
                "Lower pack.seq_len, or prepare more text."
            )
    io.remove_working(jobs_dir)
    return counts


def check_pairs(jobs: Mapping[tuple[str, str], Sequence[TokenizeJob]], method: str) -> None:
    """Raise UserError where a source has other documents beside pairs, or pairs would be torn."""
    for (split, name), of_source in jobs.items():
        results = load_results(TokenizeResult, of_source)
        n_pairs = sum(result.n_pairs for result in results)
        n_others = sum(result.n_documents for result in results) - n_pairs
        n_long = sum(result.n_long_pairs for result in results)
        if n_pairs and (n_others or method != "best_fit"):
            raise UserError(
                f"pack: {split}/{name}: expected preference pairs alone and pack.method=best_fit, "
                f"got {n_pairs:,} pairs, {n_others:,} other documents and {method}. Prepare the "
                "pairs under a name of their own."
            )
        if n_long:
            log.warning(
                f"pack: {split}/{name}: {n_long:,} pairs are left out: a sequence cannot hold both "
                "answers with their prompts. A longer pack.seq_len keeps them."
            )


def add_turn_ends(tokens: SpecialTokens, jobs: Iterable[TokenizeJob]) -> SpecialTokens:
    """Return special tokens with those that end the answers of conversations."""
    results = load_results(TokenizeResult, list(jobs))
    chats = [result for result in results if result.n_conversations]
    ends = [result.turn_end_id for result in chats]
    if None in ends:
        log.warning(
            "pack: the chat template ends an answer by no control token that is trained on, so the "
            "model will not learn to stop. Put eos_token behind the content of the assistant."
        )
    found = [token_id for token_id in ends if token_id is not None]
    return dataclasses.replace(tokens, eos_ids=tuple(dict.fromkeys((*tokens.eos_ids, *found))))


def estimate_bytes(files: Iterable[pathlib.Path]) -> int:
    """Return about how much text the files have. Raise UserError for one that cannot be read."""
    n_bytes = 0
    for file in files:
        with corpus_read_errors(file):
            n_bytes += tokenizer.count_text_bytes(file)
    return n_bytes


def log_counts(counts: PackCounts) -> None:
    """Log two lines for each of a split's largest sources, and one for the others together."""
    for split in SPLITS:
        sources: dict[str, PackedSource] = getattr(counts, split)
        by_size = sorted(sources.items(), key=lambda item: -item[1].n_tokens)
        for name, source in by_size[:N_LOGGED_SOURCES]:
            log.info(
                f"pack: {split}/{name}: {source.n_tokens:,} tokens in "
                f"{source.n_sequences:,} sequences"
            )
            trained = source.n_trained_tokens / source.n_tokens
            log.info(
                f"  of {counts.seq_len:,}: {source.padding_frac:.2%} padding, "
                f"{source.n_split_documents:,} of {source.n_documents:,} documents split, "
                f"{trained:.1%} of the tokens are trained on"
            )
            if counts.fim_rate and split == "train":
                log.info(
                    f"  fill-in-the-middle: {source.n_fim_documents:,} documents; "
                    f"{source.n_fim_too_long:,} more do not fit a sequence and stay as they are"
                )
        others = [source for _, source in by_size[N_LOGGED_SOURCES:]]
        if others:
            log.info(
                f"pack: {split}: {len(others):,} more sources: "
                f"{sum(source.n_tokens for source in others):,} tokens in "
                f"{sum(source.n_sequences for source in others):,} sequences"
            )
        log_cut_prompts(split, sources)
        log_unknown_tokens(split, sources)


def log_missing_heldout(counts: PackCounts) -> None:
    """Warn of the sources that have sequences to train on and none to measure a loss on."""
    missing = [name for name in counts.train if name not in counts.heldout]
    if missing:
        log.warning(
            f"pack: no held-out sequence of {name_some(missing)}: no loss will be measured there. "
            "Raise prepare.heldout_frac, lower pack.seq_len, or prepare shorter documents, such as "
            "chapters instead of books."
        )


def log_cut_prompts(split: str, sources: dict[str, PackedSource]) -> None:
    """Warn of the sources in which most prompts were too long for a sequence."""
    cut = {name: source for name, source in sources.items() if source.n_cut_prompts}
    worst = sorted(cut, key=lambda name: -cut[name].n_cut_prompts)
    for name in worst[:N_LOGGED_SOURCES]:
        log.warning(
            f"pack: {split}/{name}: {cut[name].n_cut_prompts:,} prompts do not fit a sequence with "
            f"their completion: {cut[name].n_cut_tokens:,} tokens of their beginnings are left "
            "out. A longer pack.seq_len keeps them."
        )
    if len(worst) > N_LOGGED_SOURCES:
        log.warning(f"pack: {split}: so it is in {len(worst) - N_LOGGED_SOURCES:,} more sources")


def log_unknown_tokens(split: str, sources: dict[str, PackedSource]) -> None:
    """Warn of the sources with the largest shares of tokens for text that has none."""
    shares = {
        name: source.n_unknown_tokens / source.n_tokens
        for name, source in sources.items()
        if source.n_unknown_tokens
    }
    worst = sorted(shares, key=lambda name: -shares[name])
    for name in worst[:N_LOGGED_SOURCES]:
        log.warning(
            f"pack: {split}/{name}: {sources[name].n_unknown_tokens:,} tokens ({shares[name]:.2%}) "
            "stand for text that the tokenizer has no token for. That text is lost; a tokenizer "
            "with byte fallback keeps it."
        )
    if len(worst) > N_LOGGED_SOURCES:
        log.warning(f"pack: {split}: so it is in {len(worst) - N_LOGGED_SOURCES:,} more sources")


def run_pack_jobs(
    where: str,
    run_job: Callable[..., int],
    groups: Iterable[Sequence[PackingJob]],
    progress: tuple[str, str],
    total: int | None = None,
) -> None:
    """Run the jobs that no earlier, killed run has finished.

    Args:
        where: "here", or an executor.
        run_job: takes a job and returns how much of the progress unit it has done.
        groups: of jobs.
        progress: label and unit of the progress bar.
        total: of the unit, about.
    """
    jobs = []
    for job in itertools.chain(*groups):
        if not io.exists(pathlib.Path(job.result_path)):
            jobs.append(job)
    # with a process per core, the tokenizers library's own threads would only compete
    n_cores = os.cpu_count() or 1
    default = "true"
    if where != "here" and len(jobs) >= n_cores:
        default = "false"
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM", default)
    left = [dataclasses.replace(job, parallelism=parallelism) for job in jobs]
    label, unit = progress
    with stage.progress_bar(label, total, unit) as advance:
        for n_done in executor.map_jobs(where, run_job, left):
            advance(n_done)


def load_results(kind: type[R], jobs: Sequence[PackingJob]) -> list[R]:
    """Return the results of finished jobs."""
    results = []
    for job in jobs:
        found = io.read_json(pathlib.Path(job.result_path))
        results.append(kind.from_json(found, job.result_path))
    return results


# ---- first pass: tokens


class Segment(NamedTuple):
    """A document or a part of one, within a sequence."""

    ids: np.ndarray  # int32
    document: str  # its id
    part: int = 0  # 0, 1, ... of its document
    loss_from: int = 0  # the first trained token; those before it belong to a prompt
    untrained: np.ndarray = NO_SPANS  # int32 [n, 2], further tokens that are not trained on
    pair_at: int = 0  # first token of the rejected answer, with its prompt; 0: it is no pair

    def split(self, start: int, stop: int, part: int) -> Segment:
        """Return the tokens from start to stop as a segment."""
        ids = self.ids[start:stop]
        loss_from = max(self.loss_from - start, 0)
        loss_from = min(loss_from, len(ids))
        untrained = self.untrained
        if len(untrained):
            untrained = np.clip(untrained - start, 0, len(ids))
            untrained = untrained[untrained[:, 0] < untrained[:, 1]]
        return Segment(ids, self.document, part, loss_from, untrained)

    def split_pair(self) -> list[Segment]:
        """Return the two answers of a pair, which are documents of their own; else itself."""
        if not self.pair_at:
            return [self]
        return [self.split(0, self.pair_at, 0), self.split(self.pair_at, len(self.ids), 0)]

    def list_targets(self) -> np.ndarray:
        """Return the ids of the tokens that are trained on."""
        first = max(1, self.loss_from)
        if not len(self.untrained):
            return self.ids[first:]
        is_trained = np.ones(len(self.ids), bool)
        is_trained[:first] = False
        for start, stop in self.untrained:
            is_trained[start:stop] = False
        return self.ids[is_trained]


def plan_tokenize_jobs(
    files: Sequence[pathlib.Path],
    checksums: Mapping[str, str],
    tokenizer_path: pathlib.Path,
    jobs_dir: pathlib.Path,
    seq_len: int,
    fim_rate: float,
) -> list[TokenizeJob]:
    """Return jobs of about JOB_BYTES of text each, in the order of the corpus.

    Args:
        files: of one source.
        checksums: path -> sha256.
        tokenizer_path: the tokenizer's directory.
        jobs_dir: where the jobs write.
        seq_len: tokens per sequence.
        fim_rate: of documents, for fill-in-the-middle.
    """
    jobs: list[TokenizeJob] = []
    for file in files:
        corpus_path = str(file)
        # the first job of a file checks that it is whole
        sha256 = checksums.get(corpus_path)
        metadata = pq.ParquetFile(file).metadata
        all_groups = range(metadata.num_row_groups)
        sizes = [tokenizer.count_text_bytes(file, group) for group in all_groups]
        for groups in split_row_groups(sizes):
            output = str(jobs_dir / f"tokens-{len(jobs):06d}.arrow")
            paths = (output, f"{output}.json", corpus_path)
            job = TokenizeJob(*paths, sha256, groups, str(tokenizer_path), seq_len, fim_rate)
            jobs.append(job)
            sha256 = None
    return jobs


def split_row_groups(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return consecutive row groups of JOB_BYTES or somewhat more each."""
    parts: list[tuple[int, ...]] = []
    left = 0
    for group, size in enumerate(sizes):
        if left <= 0:
            parts.append(())
            left = JOB_BYTES
        parts[-1] += (group,)
        left -= size
    return parts


def run_tokenize_job(job: TokenizeJob) -> int:
    """Write the ids of each document: bos + ids + eos, or as the chat template has it.

    Returns:
        The bytes of their texts.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = job.parallelism
    encoder = load_cached_tokenizer(job.tokenizer_path)
    file = pathlib.Path(job.corpus_path)
    output = pathlib.Path(job.output_path)
    if job.sha256 and io.sha256(file) != job.sha256:
        raise UserError(
            f"{file}: its checksum is not the manifest's: it was changed or damaged. "
            "Run jaxpt prepare again with --replace."
        )
    fim_encoder = fim.FimEncoder(encoder) if job.fim_rate else None
    counts: collections.Counter[str] = collections.Counter()  # of TokenizeResult
    turn_end_id = None
    with (
        io.writing(output) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, TOKEN_SCHEMA) as stream,
    ):
        for batch in iter_text_batches(file, job.row_groups):
            chats = encode_chats(batch, job.tokenizer_path)
            texts = ["" if i in chats else text for i, text in enumerate(batch.texts)]
            ids, loss_from = encoder.encode_documents(texts, batch.prompt_chars)
            n_first = 0 if encoder.bos_id is None else 1  # bos stays
            counts += cut_prompts(ids, loss_from, n_first, job.seq_len)
            if fim_encoder:
                plain = {
                    i: text
                    for i, text in enumerate(texts)
                    if not batch.prompt_chars[i] and not PAIR.is_in(batch.meta[i])
                }
                counts += rearrange_documents(ids, plain, fim_encoder, job)
            untrained = [NO_SPANS] * len(ids)
            for i, encoded in chats.items():
                ids[i], untrained[i] = encoded
            pair_at = append_rejected(batch, encoder, ids, untrained)
            n_long = drop_long_pairs(batch, job.seq_len, ids, loss_from, untrained, pair_at)
            if chats:
                turn_end_id = load_cached_template(job.tokenizer_path).find_turn_end()
            columns = {"id": batch.ids, "ids": make_lists(ids), "loss_from": loss_from}
            columns["untrained"] = make_lists([spans.reshape(-1) for spans in untrained])
            columns["pair_at"] = pair_at
            record_batch = pa.record_batch(columns, schema=TOKEN_SCHEMA)
            stream.write_batch(record_batch)
            counts["n_documents"] += len(batch.texts)
            counts["n_text_bytes"] += sum(len(text.encode()) for text in batch.texts)
            rejected = list_rejected(batch).values()
            counts["n_rejected_bytes"] += sum(len(text.encode()) for text in rejected)
            counts["n_unknown_tokens"] += encoder.count_unknown(ids)
            counts["n_conversations"] += len(chats)
            counts.update(n_pairs=sum(at > 0 for at in pair_at), n_long_pairs=n_long)
    result = TokenizeResult(**counts, turn_end_id=turn_end_id)
    io.write_json(pathlib.Path(job.result_path), result)
    return result.n_text_bytes


def cut_prompts(
    ids: list[np.ndarray], loss_from: list[int], n_first: int, seq_len: int
) -> collections.Counter[str]:
    """Cut the beginnings of prompts that are too long, in place. Return the counts.

    Args:
        ids: of each document.
        loss_from: first trained token of each.
        n_first: tokens in front of a prompt that stay.
        seq_len: tokens per sequence.
    """
    counts: collections.Counter[str] = collections.Counter()
    for i, n_prompt in enumerate(loss_from):
        n_cut = count_excess(len(ids[i]), n_prompt, seq_len)
        if n_cut:
            ids[i] = np.delete(ids[i], slice(n_first, n_first + n_cut))
            loss_from[i] -= n_cut
            counts.update(n_cut_prompts=1, n_cut_tokens=n_cut)
    return counts


def encode_chats(batch: TextBatch, tokenizer_path: str) -> dict[int, chat.EncodedChat]:
    """Return place in the batch -> encoded conversation.

    Raises:
        UserError: the tokenizer has no chat template, or the template refuses a conversation.
    """
    places = [i for i, meta in enumerate(batch.meta) if CONVERSATION.is_in(meta)]
    if not places:
        return {}
    conversations = [CONVERSATION.decode(batch.meta[i]) for i in places]
    encoded = load_cached_template(tokenizer_path).encode_conversations(conversations)
    return dict(zip(places, encoded, strict=True))


def list_rejected(batch: TextBatch) -> dict[int, str]:
    """Return place in the batch -> prompt and rejected answer of a pair."""
    return {
        i: batch.texts[i][: batch.prompt_chars[i]] + PAIR.decode(meta)
        for i, meta in enumerate(batch.meta)
        if PAIR.is_in(meta)
    }


def append_rejected(
    batch: TextBatch,
    encoder: tokenizer.Tokenizer,
    ids: list[np.ndarray],
    untrained: list[np.ndarray],
) -> list[int]:
    """Append the rejected answers of pairs, with their prompts, in place.

    Returns:
        Where each begins; 0: the document is no pair.
    """
    pair_at = [0] * len(ids)
    texts = list_rejected(batch)
    n_chars = [batch.prompt_chars[i] for i in texts]
    rejected, loss_from = encoder.encode_documents(list(texts.values()), n_chars)
    for i, other, n_prompt in zip(texts, rejected, loss_from, strict=True):
        pair_at[i] = start = len(ids[i])
        ids[i] = np.concatenate([ids[i], other])
        untrained[i] = np.array([(start, start + n_prompt)], np.int32)
    return pair_at


def drop_long_pairs(
    batch: TextBatch, seq_len: int, ids: list[np.ndarray], *others: list[Any]
) -> int:
    """Leave out pairs that a sequence cannot hold, in place. Return their number."""
    *_, pair_at = others
    long = [i for i, at in enumerate(pair_at) if at and len(ids[i]) > seq_len]
    for i in reversed(long):
        for column in (*batch, ids, *others):
            del column[i]
    return len(long)


def make_lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Return int32 arrays as one Arrow array of lists."""
    offsets = np.cumsum([0, *map(len, arrays)])
    values = np.concatenate([np.zeros(0, np.int32), *arrays])
    return pa.ListArray.from_arrays(pa.array(offsets, INT32), values)


def rearrange_documents(
    ids: list[np.ndarray], texts: Mapping[int, str], encoder: fim.FimEncoder, job: TokenizeJob
) -> collections.Counter[str]:
    """Rearrange a share of documents for fill-in-the-middle, in place. Return the counts.

    A document that does not fit a sequence stays as it is: torn over two, its middle would follow
    nothing.

    Args:
        ids: of all documents.
        texts: place in ids -> text, of those without a prompt.
        encoder: of the pieces.
        job: with the share and the tokens per sequence.
    """
    pieces = {i: fim.cut_document(text, job.fim_rate) for i, text in texts.items()}
    chosen = {i: found for i, found in pieces.items() if found}
    short = [i for i in chosen if len(ids[i]) + fim.N_ADDED_TOKENS <= job.seq_len]
    n_done = 0
    encoded = encoder.encode_documents([chosen[i] for i in short])
    for i, rearranged in zip(short, encoded, strict=True):
        # words that a cut divides may take more tokens
        if len(rearranged) <= job.seq_len:
            ids[i] = rearranged
            n_done += 1
    return collections.Counter(n_fim_documents=n_done, n_fim_too_long=len(chosen) - n_done)


def count_excess(n_tokens: int, n_prompt: int, seq_len: int) -> int:
    """Return how many tokens a prompt has too many: its document does not fit a sequence.

    What is left of the prompt fills a sequence together with the completion, or half of one before
    a long completion.

    Args:
        n_tokens: of the document.
        n_prompt: of these before the first trained one.
        seq_len: tokens per sequence.
    """
    n_completion = n_tokens - n_prompt
    most = max(seq_len - n_completion, seq_len // 2)
    return max(0, n_prompt - most)


# a worker does many jobs
load_cached_tokenizer = functools.lru_cache(maxsize=1)(tokenizer.load_tokenizer)


@functools.lru_cache(maxsize=1)
def load_cached_template(tokenizer_path: str) -> chat.ChatTemplate:
    """Return the chat template of a tokenizer. Raise UserError if it has none."""
    return chat.ChatTemplate(load_cached_tokenizer(tokenizer_path), tokenizer_path)


class TextBatch(NamedTuple):
    """Documents that are encoded at once."""

    ids: list[str]
    texts: list[str]
    prompt_chars: list[int]
    meta: list[str]


def iter_text_batches(file: pathlib.Path, groups: Sequence[int]) -> Iterator[TextBatch]:
    """Yield the documents of row groups, about MAX_ENCODE_CHARS characters at a time.

    Raises:
        UserError: the file cannot be read.
    """
    columns = ["id", "text", "prompt_chars"]
    batch = TextBatch([], [], [], [])
    n_chars = 0
    with corpus_read_errors(file):
        reader = pq.ParquetFile(file)
        if "meta" in reader.schema_arrow.names:  # shards of others may have none
            columns.append("meta")
        batches = reader.iter_batches(256, row_groups=list(groups), columns=columns)
        for rows in batches:
            values = [rows.column(name).to_pylist() for name in columns]
            if len(values) < len(batch):
                values.append(["{}"] * len(rows))
            for document in zip(*values, strict=True):
                for column, value in zip(batch, document, strict=True):
                    column.append(value)
                n_chars += len(batch.texts[-1])
                if n_chars >= MAX_ENCODE_CHARS:
                    yield batch
                    batch = TextBatch([], [], [], [])
                    n_chars = 0
    if batch.ids:
        yield batch


@contextlib.contextmanager
def corpus_read_errors(file: pathlib.Path) -> Iterator[None]:
    """Turn what reading a corpus file raises into a UserError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        message = str(error) or type(error).__name__
        line, *_ = message.splitlines()
        raise UserError(
            f"{file}: cannot be read as a shard of a corpus ({line}). "
            "Run jaxpt prepare again with --replace."
        ) from None


# ---- second pass: sequences


def plan_pack_jobs(
    tokenize_jobs: Sequence[TokenizeJob],
    out: pathlib.Path,
    jobs_dir: pathlib.Path,
    layout: PackLayout,
) -> list[PackJob]:
    """Return a job per shard of a source, in the order of their sequences.

    A shard has a window of documents (best_fit) or a range of the stream (course).

    Args:
        tokenize_jobs: the source's.
        out: directory of the shards.
        jobs_dir: directory of the results.
        layout: of the sequences.
    """
    paths = [job.output_path for job in tokenize_jobs]
    lengths = [read_document_lengths(path) for path in paths]
    n_documents = map(len, lengths)
    starts = np.cumsum([0, *n_documents]).tolist()  # the first document of each file
    all_lengths = np.concatenate(lengths)
    if layout.method == "best_fit":
        ranges = split_windows(all_lengths, layout.seq_len)
        streams = [None] * len(ranges)
    else:
        ranges, streams = split_stream(all_lengths, layout.seq_len)
    jobs = []
    for k, (first, stop) in enumerate(ranges):
        first_file = bisect.bisect_right(starts, first) - 1
        stop_file = bisect.bisect_left(starts, stop)
        documents = []
        for i in range(first_file, stop_file):
            first_in_file = max(first - starts[i], 0)
            stop_in_file = stop - starts[i]
            document_range = DocumentRange(paths[i], first_in_file, stop_in_file)
            documents.append(document_range)
        output = out / f"data-{k:05d}.arrow"
        result_path = str(jobs_dir / f"{output.name}.json")
        job = PackJob(str(output), result_path, tuple(documents), layout, streams[k])
        jobs.append(job)
    return jobs


def read_document_lengths(tokens_path: str) -> np.ndarray:
    """Return the tokens of each document of a file that a TokenizeJob wrote."""
    lengths = [np.zeros(0, np.int64)]
    stream = pa.ipc.open_stream(pa.memory_map(tokens_path))
    for batch in stream:
        offsets = batch.column("ids").offsets.to_numpy()
        lengths.append(np.diff(offsets))
    return np.concatenate(lengths)


def split_windows(lengths: np.ndarray, seq_len: int) -> list[tuple[int, int]]:
    """Return the ranges of documents that best-fit sees at once, (first, stop).

    A window has WINDOW_SEGMENTS segments or WINDOW_TOKENS tokens, or somewhat more.
    """
    segments_of_document = -(-lengths // seq_len)  # rounded up
    n_segments = np.cumsum(segments_of_document)
    n_tokens = np.cumsum(lengths)
    windows = []
    first = 0
    segments_before = 0
    tokens_before = 0
    while first < len(lengths):
        last_by_segments = np.searchsorted(n_segments, segments_before + WINDOW_SEGMENTS)
        last_by_tokens = np.searchsorted(n_tokens, tokens_before + WINDOW_TOKENS)
        last = int(min(last_by_segments, last_by_tokens, len(lengths) - 1))
        segments_before = n_segments[last]
        tokens_before = n_tokens[last]
        windows.append((first, last + 1))
        first = last + 1
    return windows


def split_stream(
    lengths: np.ndarray, seq_len: int
) -> tuple[list[tuple[int, int]], list[StreamRange]]:
    """Return the range of documents and of the stream for each shard of method course."""
    ends = np.cumsum(lengths)
    n_sequences = int(lengths.sum()) // seq_len
    sequence_bytes = 4 * seq_len
    per_shard = max(1, SHARD_BYTES // sequence_bytes)
    ranges = []
    streams = []
    for start in range(0, n_sequences, per_shard):
        n = min(per_shard, n_sequences - start)
        first_token = start * seq_len
        last_token = first_token + n * seq_len - 1
        span = np.searchsorted(ends, [first_token, last_token], side="right")
        first, last = span.tolist()
        position = int(ends[first] - lengths[first])
        ranges.append((first, last + 1))
        streams.append(StreamRange(position, start, n))
    return ranges, streams


def run_pack_job(job: PackJob) -> int:
    """Pack documents into one Arrow shard. Return the number of sequences."""
    seq_len = job.layout.seq_len
    stream = job.stream
    parts = map(read_tokenized_documents, job.documents)
    documents = itertools.chain.from_iterable(parts)
    if stream is None:
        sequences = pack_best_fit(documents, seq_len)
    else:
        sequences = pack_course(documents, seq_len, stream.position, stream.first_sequence)
        sequences = itertools.islice(sequences, stream.n_sequences)
    output = pathlib.Path(job.output_path)
    result = write_sequences(sequences, output, job.layout)
    io.write_json(pathlib.Path(job.result_path), result)
    return result.shard.n_sequences


def read_tokenized_documents(documents: DocumentRange) -> Iterator[Segment]:
    """Yield documents of a file that a TokenizeJob wrote."""
    start = 0
    stream = pa.ipc.open_stream(pa.memory_map(documents.tokens_path))
    for batch in stream:
        skipped = max(documents.first - start, 0)
        n_left = documents.stop - start - skipped
        part = batch.slice(skipped, max(n_left, 0))
        start += len(batch)
        column = part.column("ids")
        offsets = column.offsets.to_numpy()
        ids = column.values.to_numpy()
        names = part.column("id").to_pylist()
        prompt_ends = part.column("loss_from").to_pylist()
        spans = part.column("untrained")
        span_offsets = spans.offsets.to_numpy()
        untrained = spans.values.to_numpy()
        pair_at = part.column("pair_at").to_pylist()
        for i, loss_from in enumerate(prompt_ends):
            document_ids = ids[offsets[i] : offsets[i + 1]]
            own = NO_SPANS
            if span_offsets[i] < span_offsets[i + 1]:
                own = untrained[span_offsets[i] : span_offsets[i + 1]].reshape(-1, 2)
            yield Segment(document_ids, names[i], 0, loss_from, own, pair_at[i])


# ---- which segments share a sequence


def pack_best_fit(documents: Iterable[Segment], seq_len: int) -> Iterator[list[Segment]]:
    """Yield sequences of whole documents, packed by best-fit-decreasing.

    Each segment, longest first, goes into the fullest sequence that still has space for it.
    Documents longer than seq_len are split into full sequences and one rest. Sequences come in the
    order of their first segments in the corpus, so that no range of them is all long or all short
    documents.
    """
    segments = []
    for document in documents:
        starts = range(0, len(document.ids), seq_len)
        for part, start in enumerate(starts):
            segment = document.split(start, start + seq_len, part)
            segments.append(segment._replace(pair_at=document.pair_at))
    sequences: list[list[int]] = []
    not_full: dict[int, list[int]] = {}  # free tokens -> sequences with as many
    free_sizes: list[int] = []  # the keys of not_full, sorted
    lengths = [len(segment.ids) for segment in segments]
    longest_first = np.argsort(-np.array(lengths), kind="stable")
    for i in longest_first.tolist():
        length = lengths[i]
        k = bisect.bisect_left(free_sizes, length)
        if k == len(free_sizes):
            chosen = len(sequences)
            free = seq_len
            sequences.append([])
        else:
            free = free_sizes[k]
            chosen = not_full[free].pop()
            if not not_full[free]:
                del not_full[free], free_sizes[k]
        sequences[chosen].append(i)
        free -= length
        if free and free not in not_full:
            bisect.insort(free_sizes, free)
            not_full[free] = []
        if free:
            not_full[free].append(chosen)
    for sequence in sorted(map(sorted, sequences)):
        yield [answer for i in sequence for answer in segments[i].split_pair()]


def pack_course(
    documents: Iterable[Segment], seq_len: int, position: int = 0, first_sequence: int = 0
) -> Iterator[list[Segment]]:
    """Yield sequences as the course packs them: one stream of tokens, split every seq_len.

    Source: "Pretraining LLMs", lesson 3.

    Args:
        documents: consecutive documents of a source.
        seq_len: tokens per sequence.
        position: of the first document in the stream.
        first_sequence: index of the first sequence to yield.
    """
    sequence: list[Segment] = []
    for document in documents:
        start = position
        stop = start + len(document.ids)
        while position < stop:
            index = position // seq_len
            boundary = (index + 1) * seq_len
            if index >= first_sequence:
                part = index - start // seq_len
                segment = document.split(position - start, boundary - start, part)
                sequence.append(segment)
            position = min(boundary, stop)
            if position == boundary and sequence:
                yield sequence
                sequence = []


# ---- sequences on disk


def write_sequences(
    sequences: Iterable[list[Segment]], file: pathlib.Path, layout: PackLayout
) -> PackResult:
    """Write sequences as one shard and count them."""
    sequences = iter(sequences)
    seq_len = layout.seq_len
    vocab_size = layout.vocab_size
    per_batch = max(1, BATCH_TOKENS // seq_len)
    n_sequences = 0
    n_tokens = 0
    n_ids = 1
    n_split = 0
    token_counts = np.zeros(vocab_size, np.int64)
    batches = []
    with io.open_write(file) as sink:
        schema = packed_schema(seq_len)
        sink.write(schema.serialize())
        while group := list(itertools.islice(sequences, per_batch)):
            record_batch = make_record_batch(group, seq_len)
            largest = record_batch.column("input_ids").values.to_numpy().max()
            n_ids = max(n_ids, int(largest) + 1)
            message = record_batch.serialize()
            checksum = zlib.crc32(message)
            batches.append((sink.tell(), len(message), len(group), checksum))
            sink.write(message)
            trained = []
            for segment in itertools.chain.from_iterable(group):
                n_tokens += len(segment.ids)
                n_split += segment.part == 1
                trained.append(segment.list_targets())
            n_sequences += len(group)
            targets = np.concatenate(trained)
            token_counts += np.bincount(targets, minlength=vocab_size)
        sink.write(END_OF_STREAM)
        n_bytes = sink.tell()
    shard = PackedShard(file.name, n_sequences, n_bytes)
    trained_ids = np.flatnonzero(token_counts)
    times_trained = token_counts[trained_ids].tolist()
    counts = dict(zip(trained_ids.tolist(), times_trained, strict=True))
    return PackResult(shard, n_tokens, n_ids, n_split, counts, tuple(batches))


def make_record_batch(sequences: list[list[Segment]], seq_len: int) -> pa.RecordBatch:
    """Return sequences as an Arrow record batch of `packed_schema`."""
    ids = np.zeros((len(sequences), seq_len), np.int32)  # padding is 0 and at the end
    for row, sequence in zip(ids, sequences, strict=True):
        tokens = np.concatenate([segment.ids for segment in sequence])
        row[: len(tokens)] = tokens
    n_segments = map(len, sequences)
    offsets = pa.array(np.cumsum([0, *n_segments]), INT32)
    segments = list(itertools.chain.from_iterable(sequences))
    lengths = [len(segment.ids) for segment in segments]
    names = [segment.document for segment in segments]
    loss_from = [segment.loss_from for segment in segments]
    columns = [(lengths, INT32), (names, pa.string()), (loss_from, INT32)]
    lists = []
    for values, dtype in columns:
        column = pa.array(values, dtype)
        lists.append(pa.ListArray.from_arrays(offsets, column))
    flat_ids = pa.array(ids.reshape(-1))
    input_ids = pa.FixedSizeListArray.from_arrays(flat_ids, seq_len)
    untrained = pa.array(list(map(list_untrained, sequences)), INT_LIST)
    return pa.record_batch([input_ids, *lists, untrained], schema=packed_schema(seq_len))


def list_untrained(sequence: list[Segment]) -> list[int]:
    """Return start, stop, start, ... of the spans of a sequence that are not trained on."""
    found = []
    position = 0
    for segment in sequence:
        if len(segment.untrained):
            found += (segment.untrained + position).reshape(-1).tolist()
        position += len(segment.ids)
    return found


def gather_shards(
    texts: Sequence[TokenizeResult],
    results: Sequence[PackResult],
    out: pathlib.Path,
    layout: PackLayout,
) -> PackedSource:
    """Make a source's shards one directory for `datasets.load_from_disk`, with an index.

    Args:
        texts: of its first pass.
        results: of its second pass.
        out: directory of the shards.
        layout: of the sequences.

    Returns:
        The counts added up.
    """
    token_counts = np.zeros(layout.vocab_size, np.int64)
    index = []
    n_tokens = 0
    n_split = 0
    for k, result in enumerate(results):
        trained_ids = list(result.token_counts)
        times_trained = list(result.token_counts.values())
        token_counts[trained_ids] += times_trained
        index += [(k, *batch) for batch in result.batches]
        n_tokens += result.n_tokens
        n_split += result.n_split_documents
    with io.open_write(out / INDEX_FILE) as file:
        np.save(file, np.array(index, np.int64))
    shards = tuple(result.shard for result in results)
    files = [shard.file for shard in shards]
    write_datasets_metadata(out, layout.seq_len, files)
    if layout.method == "course":
        write_course_parquet(out, shards)
    text_counts = {}
    for field in dataclasses.fields(TextCounts):
        text_counts[field.name] = sum(getattr(text, field.name) for text in texts)
    n_sequences = sum(shard.n_sequences for shard in shards)
    n_slots = n_sequences * layout.seq_len
    n_trained = int(token_counts.sum())
    frequencies = token_counts[token_counts > 0] / max(1, n_trained)
    entropy = -(frequencies * np.log(frequencies)).sum()
    return PackedSource(
        n_split_documents=n_split,
        n_sequences=n_sequences,
        n_tokens=n_tokens,
        n_ids=max(result.n_ids for result in results),
        n_trained_tokens=n_trained,
        padding_frac=1 - n_tokens / n_slots,
        unigram_nats=float(entropy),
        shards=shards,
        **text_counts,
    )


def write_course_parquet(out: pathlib.Path, shards: Sequence[PackedShard]) -> None:
    """Write the sequences as LESSON_FILE, which lesson 5 of the course reads."""
    schema = pa.schema({"input_ids": INT_LIST})
    with io.writing(out / LESSON_FILE) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for shard in shards:
            file = str(out / shard.file)
            stream = pa.ipc.open_stream(pa.memory_map(file))
            for batch in stream:
                ids = batch.column("input_ids").cast(INT_LIST)
                lists = pa.record_batch([ids], schema=schema)
                writer.write_batch(lists)


def write_datasets_metadata(out: pathlib.Path, seq_len: int, files: list[str]) -> None:
    """Write the two JSON files that `datasets.load_from_disk` needs, with every key."""
    integer = {"dtype": "int32", "_type": "Value"}
    string = {"dtype": "string", "_type": "Value"}
    sequence = {"feature": integer, "length": seq_len, "_type": "List"}
    features: dict[str, Any] = {"input_ids": sequence}
    values = {"doc_lens": integer, "doc_ids": string, "loss_from": integer, "untrained": integer}
    for name, value in values.items():
        features[name] = {"feature": value, "_type": "List"}
    state = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": stage.fingerprint([out.name, files]),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    metadata = {"dataset_info.json": {"features": features}, "state.json": state}
    for name, value in metadata.items():
        io.write_json(out / name, value)

"""What the stages tokenizer and pack and the data mixture write as JSON or pass on."""

from __future__ import annotations

import dataclasses

from jaxpt.spec import Record

# ---- manifest of the stage tokenizer


@dataclasses.dataclass(frozen=True)
class TokenizerCounts(Record):
    """Manifest.counts of the stage tokenizer; the fingerprint is Manifest.tokenizer."""

    vocab_size: int  # largest id + 1
    bos_id: int | None  # put before each document; None: the tokenizer has none
    eos_id: int  # ends each document


# ---- manifest of the stage pack


@dataclasses.dataclass(frozen=True)
class PackedShard(Record):
    """One Arrow shard of a packed source."""

    file: str  # name, beside dataset_info.json
    n_sequences: int
    n_bytes: int  # of the file


@dataclasses.dataclass(frozen=True)
class PackedSource(Record):
    """The packed sequences of one source and split."""

    n_documents: int
    n_split_documents: int  # longer than seq_len (best_fit), or across a boundary (course)
    n_sequences: int
    n_tokens: int  # bos and eos included, padding not
    n_trained_tokens: int  # targets of the loss: no first token of a segment, no prompt
    n_text_bytes: int  # of UTF-8
    padding_frac: float  # of n_sequences * seq_len
    unigram_nats: float  # nats per token of the unigram baseline, over trained tokens
    shards: tuple[PackedShard, ...]  # in the order of their sequences


@dataclasses.dataclass(frozen=True)
class PackCounts(Record):
    """Manifest.counts of the stage pack."""

    seq_len: int  # tokens per sequence
    method: str  # "best_fit" or "course"
    vocab_size: int
    train: dict[str, PackedSource]  # source name -> training split
    heldout: dict[str, PackedSource]  # source name -> held-out split; none below one sequence


# ---- jobs of the stage pack; each writes its result to result_path, and a job with one is done


@dataclasses.dataclass(frozen=True)
class TokenizeJob(Record):
    """Row groups of one corpus file, to be written as token ids."""

    corpus_path: str
    corpus_sha256: str | None  # to verify; None: the file's first job does
    row_groups: tuple[int, ...]
    tokenizer_path: str
    output_path: str  # an Arrow stream of id, ids, loss_from
    result_path: str
    tokenizers_parallelism: str = "true"  # TOKENIZERS_PARALLELISM; set by run_pack_jobs


@dataclasses.dataclass(frozen=True)
class TokenizeResult(Record):
    """Counts of a finished TokenizeJob."""

    n_documents: int
    n_text_bytes: int  # of UTF-8


@dataclasses.dataclass(frozen=True)
class DocumentRange(Record):
    """Consecutive documents of a file that a TokenizeJob wrote."""

    tokens_path: str
    first: int
    stop: int  # exclusive


@dataclasses.dataclass(frozen=True)
class StreamRange(Record):
    """A stretch of a source's token stream (method course)."""

    position: int  # of the first document's first token in the stream
    first_sequence: int
    n_sequences: int


@dataclasses.dataclass(frozen=True)
class PackJob(Record):
    """Documents to be packed into one Arrow shard."""

    documents: tuple[DocumentRange, ...]
    seq_len: int
    method: str  # "best_fit" or "course"
    vocab_size: int
    output_path: str
    result_path: str
    stream_range: StreamRange | None = None  # course alone
    tokenizers_parallelism: str = "true"  # set by run_pack_jobs; without effect here


@dataclasses.dataclass(frozen=True)
class RecordBatchIndex(Record):
    """Where one record batch is in its shard; a line of batches.npy with the shard's number."""

    offset: int  # bytes
    n_bytes: int
    n_sequences: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class PackResult(Record):
    """Counts of a finished PackJob."""

    shard: PackedShard
    n_tokens: int
    n_split_documents: int
    token_counts: dict[int, int]  # token id -> times trained on
    batches: tuple[RecordBatchIndex, ...]


# ---- the mixture: phases.json of a run, and TrainProgress.data_history


@dataclasses.dataclass(frozen=True)
class MixturePhase(Record):
    """Consecutive sequences that a run reads with one mixture, batch size and data set."""

    step: int  # steps done before it
    sequence: int  # sequences read before it, over all sources
    batch_size: int  # global, in sequences
    shares: dict[str, float]  # source -> share, of any sum
    fingerprint: str = ""  # of the packed sequences

    def find_step(self, sequence: int) -> int:
        """Return the steps done before the one that reads a global sequence index."""
        return self.step + (sequence - self.sequence) // self.batch_size

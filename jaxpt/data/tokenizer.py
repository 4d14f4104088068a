"""The tokenizer of a run.

Trained on its corpus or adopted, saved in Hugging Face form, the same ids wherever it is opened.

Every stage encodes through the `tokenizers` library with `Tokenizer` below. A SentencePiece model
is turned into that form so
that ids are equal to SentencePiece's own and to those of `AutoTokenizer`; what cannot be turned
exactly is refused.
"""

from __future__ import annotations

import io
import json
import logging
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from jaxpt import config, stage
from jaxpt.spec import Manifest, UserError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import tokenizers

# What SentencePiece learns in: text as it is (identity, no spaces removed), so that
# decode(encode(x)) == x; digits alone, so that
# numbers of equal length look alike; bytes for what has no piece; runs of spaces as pieces, for
# code.
SENTENCEPIECE_FILE = {
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.999,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}
# characters: the training sample is drawn in spans of this length, so that a long book counts by
# its length
MAX_SPAN_CHARS = 4_000
MAX_CACHED_TOKENIZERS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "model_max_length",
    "padding_side",
    "chat_template",
)  # of a tokenizer_config.json
EOS_NAMES = (
    "</s>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<eos>",
)  # tried where no tokenizer_config.json names it


def train_tokenizer(
    settings: config.Config, workdir: pathlib.Path, replace: bool = False
) -> Manifest:
    """Make WORKDIR/tokenizer.

    Trained on WORKDIR/corpus/train, or adopted from settings.tokenizer.source.

    Deterministic: the same corpus and settings give the same vocabulary. Raises UserError for what
    cannot be trained or adopted exactly.
    """
    asked = settings.tokenizer
    if asked.source == "train":
        expected, inputs = asked, {"corpus": stage.local_path(workdir) / "corpus"}
    else:
        expected, inputs = (
            {"source": "adopted"},
            {file.name: file for file in find_tokenizer_files(stage.local_path(asked.source))},
        )

    def work(out: pathlib.Path) -> dict:
        if asked.source == "train":
            backend, settings_file, proto = convert_sentencepiece(
                train_sentencepiece(asked, inputs["corpus"]), "the trained tokenizer", asked.model
            )
        else:
            backend, settings_file, proto = read_tokenizer_source(stage.local_path(asked.source))
        made = Tokenizer(backend, settings_file, asked.source)
        made.save_tokenizer(out)
        if proto:
            (out / "tokenizer.model").write_bytes(proto)
        return {
            "vocab_size": made.vocab_size,
            "bos_id": made.bos_id,
            "eos_id": made.eos_id,
            "tokenizer": made.fingerprint,
        }

    out = stage.local_path(workdir) / "tokenizer"
    manifest = stage.run_stage(
        "tokenizer", out, work, config=stage.to_jsonable(expected), inputs=inputs, replace=replace
    )
    log.info(
        f"tokenizer: {manifest.counts['vocab_size']:,} pieces, fingerprint "
        f"{manifest.tokenizer}, in {out}"
    )
    return manifest


def load_tokenizer(directory: pathlib.Path | str) -> Tokenizer:
    """Open a tokenizer directory, an exported Hugging Face directory, a tokenizer.json or a
    SentencePiece .model.

    Raises UserError when there is none, or when it names no end-of-document token.
    """
    backend, settings_file, _ = read_tokenizer_source(stage.local_path(directory))
    return Tokenizer(backend, settings_file, directory)


class Tokenizer:
    """Text to ids and back.

    bos_id       what the tokenizer itself puts before a text (Llama), or None where it puts nothing
    (GPT-2, Qwen)
    eos_id       ends a document
    vocab_size     the largest id + 1
    fingerprint  of the vocabulary, merges, normalization and document tokens; equal in every saved
    copy of the tokenizer
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, settings_file: dict, where: pathlib.Path | str
    ):
        self.backend, self.settings_file = backend, settings_file
        backend.no_truncation()
        backend.no_padding()
        # a literal "<s>" in a document is text: nobody writes control tokens into a corpus
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        eos = get_token_text(settings_file.get("eos_token")) or next(
            (name for name in EOS_NAMES if name in vocabulary), None
        )
        if eos not in vocabulary:
            raise UserError(
                f"{where}: no end-of-document token (eos_token is {eos!r}). "
                "Name one of its tokens as eos_token in "
                "tokenizer_config.json."
            )
        self.eos_id = vocabulary[eos]
        self.bos_id = find_prefix_id(backend)
        bos = get_token_text(settings_file.get("bos_token"))
        if self.bos_id is None and settings_file.get("add_bos_token") and bos in vocabulary:
            prepend_token(backend, bos, vocabulary[bos])
            self.bos_id = vocabulary[bos]
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = fingerprint_tokenizer(
            json.loads(backend.to_str()), self.bos_id, self.eos_id
        )
        for control in {self.bos_id, self.eos_id} - {None}:
            if control in self.encode_batch([backend.id_to_token(control)])[0]:
                raise UserError(
                    f"{where}: the text {backend.id_to_token(control)!r} in a "
                    f"document would become token {control}, which marks a "
                    "document's "
                    'border. Give that token "special": true in tokenizer.json.'
                )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores, without bos and eos."""
        return [
            encoded.ids
            for encoded in self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def encode_documents(
        self, texts: Sequence[str], prompt_chars: Sequence[int]
    ) -> tuple[list[list[int]], list[int]]:
        """(bos + ids + eos of each text, its first trained token): 0, or the first that reaches
        beyond its first prompt_chars characters.

        A prompt and its completion are encoded as the one text that they are, so that a token may
        begin in the prompt; it is trained.
        """
        bos = [] if self.bos_id is None else [self.bos_id]
        ids = [[*bos, *found, self.eos_id] for found in self.encode_batch(texts)]
        loss_from = [0] * len(texts)
        prompted = [i for i, n in enumerate(prompt_chars) if n]
        for i, found in zip(
            prompted,
            self.backend.encode_batch([texts[i] for i in prompted], add_special_tokens=False),
            strict=True,
        ):
            beyond = (k for k, (_, end) in enumerate(found.offsets) if end > prompt_chars[i])
            loss_from[i] = len(bos) + next(beyond, len(found.ids))
        return ids, loss_from

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bos, eos and other control tokens leave no trace."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def save_tokenizer(self, directory: pathlib.Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer` and `load` open
        with equal ids.
        """
        self.backend.save(str(directory / "tokenizer.json"))
        kept = {
            key: get_token_text(self.settings_file[key])
            for key in MAX_CACHED_TOKENIZERS
            if self.settings_file.get(key) is not None
        }
        kept.setdefault("eos_token", self.backend.id_to_token(self.eos_id))
        if self.bos_id is not None:
            kept.setdefault("bos_token", self.backend.id_to_token(self.bos_id))
        # this class reads tokenizer.json as it is, in transformers 4 and 5; LlamaTokenizerFast
        # rebuilds it and gets some ids wrong
        kept |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer_config.json").write_text(
            json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
        )


def find_prefix_id(backend: tokenizers.Tokenizer) -> int | None:
    """The token that the tokenizer puts before a text of its own accord."""
    bare, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return full[0] if full[: len(bare)] != bare else None


def prepend_token(backend: tokenizers.Tokenizer, token: str, token_id: int) -> None:
    """Let the tokenizer put a token before every text, as Llama's does."""
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )
    backend.post_processor = (
        template
        if backend.post_processor is None
        else processors.Sequence([backend.post_processor, template])
    )


def fingerprint_tokenizer(form: dict, bos_id: int | None, eos_id: int) -> str:
    """Of what decides the ids, whatever the version of the library that wrote it."""
    model = {
        key: value for key, value in form["model"].items() if value not in (None, False, "")
    }  # newer versions write out more defaults
    if "merges" in model:
        model["merges"] = [
            merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]
        ]
    added = sorted(
        (token["id"], token["content"], token["special"]) for token in form["added_tokens"]
    )
    return stage.fingerprint(
        [model, form["normalizer"], form["pre_tokenizer"], added, bos_id, eos_id]
    )


def get_token_text(value):
    """A special token of a tokenizer_config.json by its name.

    Older files describe it in a dict. Other values pass.
    """
    return value["content"] if isinstance(value, dict) and "content" in value else value


# ---- reading what others made


def read_tokenizer_source(path: pathlib.Path) -> tuple[tokenizers.Tokenizer, dict, bytes | None]:
    """A tokenizer on disk as (the tokenizers library's form, its tokenizer_config.json, its
    SentencePiece bytes where that is what it is).
    """
    from tokenizers import Tokenizer as Backend

    first, *rest = find_tokenizer_files(path)
    if first.suffix == ".model":
        return convert_sentencepiece(first.read_bytes(), str(first))
    try:
        settings_file = json.loads(rest[0].read_text()) if rest else {}
        if (template := first.with_name("chat_template.jinja")).is_file():
            settings_file["chat_template"] = template.read_text()
        return Backend.from_str(first.read_text()), settings_file, None
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"{path}: cannot be read as a tokenizer ({error}). Get the files "
            "again from where they came."
        ) from None


def find_tokenizer_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that a tokenizer consists of.

    A .model, or a tokenizer.json and the tokenizer_config.json beside it.
    """
    if not path.exists():
        raise UserError(
            f"tokenizer {path}: not there. Give a SentencePiece .model, a "
            "tokenizer.json or a Hugging Face directory."
        )
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    first = next(
        (file for file in candidates if file.is_file() and file.suffix in (".json", ".model")), None
    )
    if first is None:
        raise UserError(
            f"tokenizer {path}: no tokenizer.json and no SentencePiece "
            ".model. Give one, or a Hugging Face directory that has one."
        )
    beside = first.with_name("tokenizer_config.json")
    return [first, beside] if first.suffix == ".json" and beside.is_file() else [first]


def convert_sentencepiece(
    proto: bytes, where: str, kind: str = "bpe"
) -> tuple[tokenizers.Tokenizer, dict, bytes | None]:
    """A SentencePiece model in the tokenizers library's form, with equal ids for every text.

    BPE models alone.

    kind "unigram" takes the pieces and scores of a unigram model just trained, and gives no
    SentencePiece bytes back: SentencePiece sums
    scores in float32 over a whole document, so that its ids part from exact ones after some
    thousand tokens. Here a word is segmented by
    itself, which no rounding reaches.

    Raises UserError for models for which no equal form is known.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(proto)
    except DecodeError as error:
        raise UserError(
            f"{where}: not a SentencePiece model ({error}). Get the file again from where it came."
        ) from None
    kinds = type(model.trainer_spec)
    piece_kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    rules = model.normalizer_spec
    hindrance = (
        f"it is not a {kind} model"
        if model.trainer_spec.model_type != {"bpe": kinds.BPE, "unigram": kinds.UNIGRAM}[kind]
        else f"it rewrites text ({rules.name})"
        if rules.precompiled_charsmap
        else "it removes spaces"
        if rules.remove_extra_whitespaces
        else "it treats spaces in another way"
        if model.trainer_spec.treat_whitespace_as_suffix or not rules.escape_whitespaces
        else "it has user-defined or unused pieces"
        if any(p.type in (piece_kinds.USER_DEFINED, piece_kinds.UNUSED) for p in model.pieces)
        else None
    )
    if hindrance:
        raise UserError(
            f"{where}: no Hugging Face tokenizer would give equal ids, since "
            f"{hindrance}. Give its tokenizer.json, or train one."
        )

    names = {
        kind: [p.piece for p in model.pieces if p.type == kind]
        for kind in (piece_kinds.UNKNOWN, piece_kinds.CONTROL)
    }
    unknown = names[piece_kinds.UNKNOWN][0]
    if kind == "bpe":
        backend = Backend(convert_bpe(model, piece_kinds.NORMAL, unknown))
    else:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        backend = Backend(
            models.Unigram(
                scores,
                unk_id=model.trainer_spec.unk_id,
                byte_fallback=model.trainer_spec.byte_fallback,
            )
        )
        # a "<" ends a word, so that no text is read as "<s>" or "<0x0A>", which are pieces here
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁*<|▁*[^▁<]+|▁+"), behavior="isolated")
    prefix = rules.add_dummy_prefix
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    backend.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in [unknown, *names[piece_kinds.CONTROL]]
        ]
    )
    bos_id, eos_id = model.trainer_spec.bos_id, model.trainer_spec.eos_id
    settings_file = {"unk_token": unknown}
    if bos_id >= 0:
        settings_file["bos_token"] = model.pieces[bos_id].piece
        prepend_token(backend, settings_file["bos_token"], bos_id)
    if eos_id >= 0:
        settings_file["eos_token"] = model.pieces[eos_id].piece
    return backend, settings_file, proto if kind == "bpe" else None


def convert_bpe(model, normal: int, unknown: str) -> tokenizers.models.BPE:
    """The merges that SentencePiece does by score, as a list."""
    from tokenizers import models

    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = []  # (minus score, left, right): SentencePiece merges the best score first
    for piece in model.pieces:
        if piece.type == normal:
            cuts = [(piece.piece[:k], piece.piece[k:]) for k in range(1, len(piece.piece))]
            pairs = [
                (left, right) for left, right in cuts if left in vocabulary and right in vocabulary
            ]
            merges += [
                (-piece.score, *pair)
                for pair in sorted(
                    pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]])
                )
            ]
    merges.sort(key=lambda merge: merge[0])  # stable: pieces of equal score keep their order
    merges = [merge[1:] for merge in merges]
    return models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


# ---- training


def train_sentencepiece(asked: config.TokenizerConfig, corpus: pathlib.Path) -> bytes:
    """The bytes of a SentencePiece model learnt from a sample of the corpus."""
    import sentencepiece

    texts = [text for _, text in sample_corpus(corpus, asked.sample_mb * 1_000_000)]
    n_bytes = sum(len(text.encode()) for text in texts)
    log.info(
        f"tokenizer: learning {asked.vocab_size:,} pieces from {n_bytes / 1e6:,.1f} MB of text"
    )
    made = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=made,
            model_type=asked.model,
            vocab_size=asked.vocab_size,
            max_sentence_length=4 * MAX_SPAN_CHARS,
            minloglevel=2,
            **SENTENCEPIECE_FILE,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"tokenizer.vocab_size: cannot learn {asked.vocab_size} pieces "
            f"from this corpus. {explain_training_error(str(error), n_bytes)}"
        ) from None
    return made.getvalue()


def explain_training_error(error: str, n_bytes: int) -> str:
    """SentencePiece's own words for a vocabulary of impossible size, in ours."""
    if most := re.search(r"set it to a value <= (\d+)", error):
        return f"{n_bytes:,} bytes of text give at most {most[1]}. Lower it, or prepare more text."
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"Its characters, bytes and control pieces alone are {least[1]}. Raise it."
    return f"SentencePiece says: {error.strip()}"


def compare_tokenizers(
    paths: Sequence[pathlib.Path], corpus: pathlib.Path, limit_mb: float
) -> dict[str, dict[str, float]]:
    """Bytes per token of several tokenizers: {path: {source.

    Bytes per token}}, over the same evenly spread sample of the corpus.
    """
    opened = {str(path): load_tokenizer(path) for path in paths}
    texts: dict[str, list[str]] = {}
    for name, text in sample_corpus(corpus, limit_mb * 1e6):
        texts.setdefault(name, []).append(text)
    table = {path: {} for path in opened}
    for path, tokenizer in stage.track_progress(
        opened.items(), "comparing", len(opened), "tokenizers"
    ):
        for name, spans in texts.items():
            n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(spans))
            table[path][name] = sum(len(span.encode()) for span in spans) / n_tokens
    return table


def sample_corpus(corpus: pathlib.Path, limit_bytes: float) -> Iterator[tuple[str, str]]:
    """(source, span of text) spread evenly over the training documents, about limit_bytes together.

    No randomness: every k-th span.
    """
    files = [
        (name, file) for name, files in list_corpus_files(corpus, "train").items() for file in files
    ]
    size = sum(count_text_bytes(file) for _, file in files)
    frac = min(1.0, limit_bytes / max(size, 1))
    n_spans = 0
    for name, file in stage.track_progress(files, "reading the sample", len(files), "shards"):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=["text"]):
            for text in batch.column(0).to_pylist():
                for start in range(0, len(text), MAX_SPAN_CHARS):
                    n_spans += 1
                    if int(n_spans * frac) > int((n_spans - 1) * frac):
                        yield name, text[start : start + MAX_SPAN_CHARS]


def count_text_bytes(file: pathlib.Path, group: int | None = None) -> int:
    """Of the text column of a parquet file, or of one row group of it, about, from its footer."""
    footer = pq.ParquetFile(file).metadata
    column, groups = (
        footer.schema.names.index("text"),
        range(footer.num_row_groups) if group is None else [group],
    )
    return sum(footer.row_group(each).column(column).total_uncompressed_size for each in groups)


def list_corpus_files(corpus: pathlib.Path, split: str) -> dict[str, list[pathlib.Path]]:
    """The parquet shards of each source of a corpus, in order.

    Raises UserError where the corpus has none to train on.
    """
    found: dict[str, list[pathlib.Path]] = {}
    for file in sorted((corpus / split).glob("*.parquet")):
        found.setdefault(re.sub(r"-\d+$", "", file.stem), []).append(file)
    if split == "train" and not found:
        raise UserError(f"{corpus / split}: no parquet shards there. Run prepare.py first.")
    return found

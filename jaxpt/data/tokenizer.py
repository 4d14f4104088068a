"""Train or adopt a tokenizer, and save it in Hugging Face form with the same ids wherever it opens.

Every stage encodes through the `tokenizers` library by `Tokenizer` below. A SentencePiece model is
converted so that ids equal SentencePiece's own and those of `AutoTokenizer`; what cannot be
converted exactly is refused.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from jaxpt import config, io, stage
from jaxpt.data import executor, tokenizer_trial
from jaxpt.io import hub
from jaxpt.spec import Manifest, Record, SpecialTokens, UserError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import tokenizers

# Text as it is (identity, no spaces removed), so that decode(encode(x)) == x; single digits, so
# that numbers of equal length look alike; bytes for what has no token; runs of spaces as tokens,
# for code.
SENTENCEPIECE_OPTIONS = {
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.999,
    "required_chars": "▁",  # a space; rare where a script is written without
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}
# the training sample is drawn in spans of this length, so that a long book counts by its length
MAX_SPAN_CHARS = 4_000
MAX_BYTES_IN_PROCESS = 2**22  # of text to train on; a process of its own takes half a second
CONFIG_FILE, TOKENS_MAP, ADDED_TOKENS = FURTHER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CHAT_TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
TEMPLATE_FILES = (CHAT_TEMPLATE, f"{NAMED_TEMPLATES}/*.jinja")
HUB_FILES = ("tokenizer.json", "tokenizer.model", *FURTHER_FILES, *TEMPLATE_FILES)
# keys of a tokenizer_config.json that are kept
SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")
SAVED_CONFIG_KEYS = (*SPECIAL_TOKEN_KEYS, "model_max_length", "padding_side", "chat_template")
TRIAL_SECONDS = 120  # how long a tokenizer.json is tried
# of letters, cases and white space only: what a normalizer changes
PROBE = "Ab  C\nd\n\n e"
# what tokenizers differ on: spaces, digits, case, accents composed or not, scripts, code
PROBE_TEXTS = (
    *("a", " a", "  a  b", "Hello world", "hello  WORLD", "It's they'll we'd I'M"),
    *("x\n\n y\t z \n", "1 12 123 1234567890", "3.14159 -2e10", "a_b.c(d)!=e"),
    *("def f(x):\n    return x**2  # ok\n", "\u00e9 e\u0301 \u212b", "na\u00efve caf\u00e9"),
    *("\ufb01 \u00bd \u2460", "Stra\u00dfe \u0130", "\u65e5\u672c\u8a9e", "\u041f\u0440\u0438"),
    *("\U0001f600\u200d", "\u2581a \u00a0b"),
)
# a text longer than this is encoded in parts, of which so many characters at once
PART_CHARS = 1 << 16
GROUP_CHARS = 1 << 20
MAX_PART_CHARS = 1 << 25
# characters on both sides by which a cut is judged: no word's split depends on more
CUT_CONTEXT = 256
MAX_CUTS_TRIED = 1000
WHITE_SPACE_CUT = re.compile(r"(?<=\S) (?=\S)")
SPACE_INSIDE = re.compile("[^▁ ][▁ ]")
# tried if no tokenizer_config.json names the end of a document
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")


@dataclasses.dataclass(frozen=True)
class TokenizerCounts(Record):
    """Manifest.counts of the stage; the fingerprint is Manifest.tokenizer."""

    vocab_size: int  # largest id + 1
    bos_id: int | None  # put before each document; None: the tokenizer has none
    eos_id: int  # ends each document


class TokenizerSource(NamedTuple):
    """A tokenizer as it is read from disk or trained."""

    backend: tokenizers.Tokenizer
    config: dict[str, Any]  # tokenizer_config.json
    sentencepiece_model: bytes | None = None  # None: it is none, or its ids would differ


class TextPart(NamedTuple):
    """A part of a text that is encoded alone."""

    start: int  # in characters
    text: str


def train_tokenizer(
    section: config.TokenizerConfig,
    workdir: io.Path | str,
    replace: bool = False,
    verify: bool = False,
) -> Manifest:
    """Make WORKDIR/tokenizer: trained on WORKDIR/corpus/train, or adopted from tokenizer.source.

    Deterministic: the same corpus and settings give the same vocabulary.

    Raises:
        UserError: it cannot be trained, or not be adopted exactly.
    """
    workdir = io.path(workdir)
    is_trained = section.source == "train"
    if is_trained:
        inputs = {"corpus": workdir / "corpus"}
        request = stage.to_jsonable(section)
    else:
        files = find_tokenizer_files(find_tokenizer(section.source))
        inputs = {file.name: file for file in files}
        request = {"source": "adopted"}
    if section.chat_template:
        inputs["chat_template"] = io.path(section.chat_template)

    def work(out: pathlib.Path) -> dict[str, Any]:
        if is_trained:
            model = train_sentencepiece(section, inputs["corpus"])
            source = convert_sentencepiece(model, "the trained tokenizer", section.model)
        else:
            source = read_tokenizer_source(section.source)
        if section.chat_template:
            source.config["chat_template"] = io.read_text(inputs["chat_template"])
        tokenizer = Tokenizer(source.backend, source.config, section.source)
        tokenizer.save_tokenizer(out)
        if source.sentencepiece_model:
            io.write_bytes(out / "tokenizer.model", source.sentencepiece_model)
        counts = TokenizerCounts(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        return {**counts.to_json(), "tokenizer": tokenizer.fingerprint}

    out = workdir / "tokenizer"
    manifest = stage.run_stage(
        "tokenizer", out, work, config=request, inputs=inputs, replace=replace, verify=verify
    )
    n_tokens = manifest.counts["vocab_size"]
    log.info(f"tokenizer: {n_tokens:,} tokens, fingerprint {manifest.tokenizer},")
    log.info(f"  in {out}")
    return manifest


def load_tokenizer(directory: io.Path | str, expected: str | None = None) -> Tokenizer:
    """Open a tokenizer or Hugging Face directory, a tokenizer.json or a SentencePiece .model.

    Args:
        directory: or file, or hf:NAME.
        expected: the fingerprint of the one that a model was trained with, where known.

    Raises:
        UserError: there is none, a file of it was changed since a stage published it, it is not
            the expected one, or it has no end-of-document token.
    """
    source = read_tokenizer_source(directory)
    found = Tokenizer(source.backend, source.config, directory)
    if expected and found.fingerprint != expected:
        raise UserError(
            f"{io.printable(directory)}: expected the tokenizer {expected} that the model was "
            f"trained with, got {found.fingerprint}: its files were changed. Copy there the right "
            "one."
        )
    return found


class Tokenizer:
    """Text to ids and back.

    Attributes:
        bos_id: what the tokenizer itself puts before a text (Llama); None if nothing (GPT-2, Qwen).
        eos_id: ends a document.
        special_tokens: what a model of this tokenizer begins, ends and pads texts with.
        first_id: the token in front of a document: bos, else eos.
        separators: the texts of bos and eos.
        unk_id: stands for text that has no token; None: the tokenizer has none.
        vocab_size: largest id + 1.
        n_text_ids: largest id that a document may have + 1; control tokens may lie beyond.
        fingerprint: of vocabulary, merges, normalization and document tokens; equal in every saved
            copy.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        tokenizer_config: dict[str, Any],
        where: io.Path | str,
    ):
        """Find the document tokens.

        Args:
            backend: the tokenizers library's form.
            tokenizer_config: tokenizer_config.json.
            where: what to name in errors.

        Raises:
            UserError: it has no end-of-document token, or reads a document token from text.
        """
        self.backend = backend
        self.tokenizer_config = tokenizer_config
        # a tokenizer trained with dropout has it in its file; each call would give other ids
        if getattr(backend.model, "dropout", None):
            log.warning(f"{io.printable(where)}: dropout ({backend.model.dropout}) is switched off")
            backend.model.dropout = None
        backend.no_truncation()
        backend.no_padding()
        # a literal "<s>" in a document is text: nobody writes control tokens into a corpus
        backend.encode_special_tokens = True
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.eos_id = self.find_eos_id(vocabulary, where)
        self.bos_id = find_prefix_id(backend)
        bos = get_token_text(tokenizer_config.get("bos_token"))
        has_bos = tokenizer_config.get("add_bos_token") and bos in vocabulary
        if self.bos_id is None and has_bos:
            self.bos_id = vocabulary[bos]
            prepend_token(backend, bos, self.bos_id)
        named_bos = vocabulary.get(bos, self.bos_id)
        pad = get_token_text(tokenizer_config.get("pad_token"))
        self.special_tokens = SpecialTokens(named_bos, (self.eos_id,), vocabulary.get(pad))
        self.first_id = self.eos_id if self.bos_id is None else self.bos_id
        self.vocab_size = max(vocabulary.values()) + 1
        self.n_text_ids = count_text_ids(backend, (self.bos_id, self.eos_id))
        self.separators = []
        for token_id in sorted({self.bos_id, self.eos_id} - {None}):
            text = str(backend.id_to_token(token_id))
            self.separators.append(text)
            self.read_as_text(text, token_id, where)
        form = json.loads(backend.to_str())
        self.unk_id = find_unk_id(form["model"], vocabulary)
        self.fingerprint = fingerprint_tokenizer(form, self.bos_id, self.eos_id)

    def read_as_text(self, text: str, token_id: int, where: io.Path | str) -> None:
        """Keep a document's literal "</s>" from becoming the token that separates documents.

        Where it is a token of the model itself, as in many unigram models, the text is split after
        its first character; no other text is encoded differently.

        Raises:
            UserError: it becomes the token all the same.
        """
        from tokenizers import Regex, pre_tokenizers

        if token_id not in self.backend.encode(text, add_special_tokens=False).ids:
            return
        split = pre_tokenizers.Split(Regex(break_pattern(text)), behavior="isolated")
        if self.backend.pre_tokenizer is not None:
            split = pre_tokenizers.Sequence([self.backend.pre_tokenizer, split])
        self.backend.pre_tokenizer = split
        if token_id in self.backend.encode(text, add_special_tokens=False).ids:
            raise UserError(
                f"{where}: the text {text!r} in a document would become token {token_id}, "
                'which separates documents. Give that token "special": true in tokenizer.json.'
            )

    def find_eos_id(self, vocabulary: dict[str, int], where: io.Path | str) -> int:
        """Return the end-of-document token, as configured or by a usual name."""
        eos = get_token_text(self.tokenizer_config.get("eos_token"))
        if not eos:
            usual = [name for name in EOS_NAMES if name in vocabulary]
            eos = usual[0] if usual else None
        if eos not in vocabulary:
            raise UserError(
                f"{where}: no end-of-document token (eos_token is {eos!r}). "
                "Name one of its tokens as eos_token in tokenizer_config.json."
            )
        return vocabulary[eos]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without bos and eos. Uses all cores."""
        return [ids.tolist() for ids in self.encode_arrays(list(map(self.split_text, texts)))]

    def encode_probe_texts(self) -> list[list[int]]:
        """Return the ids of PROBE_TEXTS, each after what the tokenizer puts before a text."""
        first = [] if self.bos_id is None else [self.bos_id]
        return [first + ids for ids in self.encode_batch(PROBE_TEXTS)]

    @property
    def chat_template(self) -> str | None:
        """The default template of conversations, if there is one."""
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):  # named ones
            template = {each["name"]: each["template"] for each in template}.get("default")
        return template if isinstance(template, str) else None

    @functools.cached_property
    def control_backend(self) -> tokenizers.Tokenizer:
        """The library's form that reads control tokens from text, as a prompt may hold them."""
        backend = type(self.backend).from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def encode_with_controls(self, text: str) -> list[int]:
        """Return the ids of a text whose literal control tokens are meant as such."""
        return self.control_backend.encode(text, add_special_tokens=False).ids

    def encode_documents(
        self, texts: Sequence[str], prompt_chars: Sequence[int]
    ) -> tuple[list[np.ndarray], list[int]]:
        """Encode documents that may begin with a prompt.

        Prompt and completion are encoded as one text, so that a token may begin in the prompt; it
        is trained on.

        Args:
            texts: the documents.
            prompt_chars: leading characters of each that are a prompt.

        Returns:
            bos + ids + eos of each, int32, and the index of its first trained token: 0, or the
            first that reaches beyond the prompt.
        """
        bos = [] if self.bos_id is None else [self.bos_id]
        first, last = np.array(bos, np.int32), np.array([self.eos_id], np.int32)
        split = [self.split_text(text) for text in texts]
        ids = [np.concatenate([first, text_ids, last]) for text_ids in self.encode_arrays(split)]
        loss_from = [0] * len(texts)
        for i, n_chars in enumerate(prompt_chars):
            if n_chars:
                loss_from[i] = len(bos) + self.count_prompt_tokens(split[i], n_chars)
        return ids, loss_from

    def encode_arrays(self, split_texts: Sequence[Sequence[TextPart]]) -> list[np.ndarray]:
        """Return the int32 ids of each text, GROUP_CHARS at a time.

        The library takes some 85 bytes per byte of text until its encodings are dropped.
        """
        found: list[list[np.ndarray]] = [[] for _ in split_texts]
        parts = [(i, part) for i, split in enumerate(split_texts) for part in split]
        for group in group_by_length(parts):
            texts = [part.text for _, part in group]
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            for (i, _), encoding in zip(group, encodings, strict=True):
                found[i].append(np.array(encoding.ids, np.int32))
        return [np.concatenate(arrays) for arrays in found]

    def count_prompt_tokens(self, split: Sequence[TextPart], n_chars: int) -> int:
        """Return how many tokens of a text end within its first characters."""
        n_tokens = 0
        for part in split:
            encoding = self.backend.encode(part.text, add_special_tokens=False)
            ends = [part.start + end for _, end in encoding.offsets]
            if self.n_dropped and part.start and encoding.tokens[0] == "▁":
                ends[0] = part.start  # the dropped space
            beyond = (k for k, end in enumerate(ends) if end > n_chars)
            n_within = next(beyond, None)
            if n_within is not None:
                return n_tokens + n_within
            n_tokens += len(encoding.ids)
        return n_tokens

    def split_text(self, text: str) -> list[TextPart]:
        """Return parts of about PART_CHARS, whose ids one after the other are those of the text.

        Raises:
            UserError: a part that cannot be cut is longer than MAX_PART_CHARS.
        """
        parts = []
        start = 0
        cut = self.find_cut(text, PART_CHARS)
        while cut is not None:
            parts.append(TextPart(start, text[start:cut]))
            start = cut + (self.n_dropped or 0)
            cut = self.find_cut(text, start + PART_CHARS)
        n_left = len(text) - start
        if n_left > MAX_PART_CHARS:
            raise UserError(
                f"a document of {len(text):,} characters: expected a space at which its ids can be "
                f"cut at least every {MAX_PART_CHARS:,}, which take 3 GB while they are encoded, "
                f"got none in the last {n_left:,} (they begin {text[start : start + 40]!r}). Break "
                "it into documents."
            )
        return [*parts, TextPart(start, text[start:])]

    def find_cut(self, text: str, first: int) -> int | None:
        """Return the first place from `first` on where the ids of a text can be cut, if any.

        There the ids of what surrounds it are those of its two sides, encoded apart.
        """
        if len(text) < first + CUT_CONTEXT or self.n_dropped is None:
            return None
        candidates = WHITE_SPACE_CUT.finditer(text, first)
        for found in itertools.islice(candidates, MAX_CUTS_TRIED):
            cut = found.start()
            left = text[cut - CUT_CONTEXT : cut]
            right = text[cut : cut + CUT_CONTEXT]
            if self.is_cut_between(left, right, self.n_dropped):
                return cut
        return None

    @functools.cached_property
    def n_dropped(self) -> int | None:
        """How many characters a part drops in front, or None: the tokenizer cannot be cut.

        It is 1 where the tokenizer itself puts a space before every text, as Llama 2's does.
        """
        form = json.loads(self.backend.to_str())
        is_split = splits_words(form["pre_tokenizer"], set(map(break_pattern, self.separators)))
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        if not is_split and any(map(SPACE_INSIDE.search, vocabulary)):
            return None  # a token may reach over any space
        left, right = PROBE.split("  ")
        return next((n for n in (0, 1) if self.is_cut_between(left, f" {right}", n)), None)

    def is_cut_between(self, left: str, right: str, n_dropped: int) -> bool:
        """Return whether two texts have the ids of both in a row."""
        texts = [left + right, left, right[n_dropped:]]
        whole, *sides = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return whole.ids == sides[0].ids + sides[1].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, without bos, eos and other control tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def count_lost_bytes(self, texts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> int:
        """Return how many UTF-8 bytes of the texts their ids do not give back; 0 if all is spelt.

        A character is lost if the decoded text has fewer of it. A space that decoding puts in front
        is no loss.
        """
        n_lost = 0
        decoded = self.backend.decode_batch(token_ids, skip_special_tokens=True)
        for text, back in zip(texts, decoded, strict=True):
            if text not in (back, back.removeprefix(" ")):
                missing = collections.Counter(text) - collections.Counter(back)
                n_bytes = sum(n * len(char.encode()) for char, n in missing.items())
                n_lost += max(n_bytes, 1)  # the same characters in another order
        return n_lost

    def keeps_text(self) -> bool:
        """Return whether case and white space come back from the ids."""
        return not self.count_lost_bytes([PROBE], self.encode_batch([PROBE]))

    def count_unknown(self, documents: Sequence[np.ndarray]) -> int:
        """Return how many tokens of bos + ids + eos stand for text that has no token."""
        if self.unk_id in (None, self.bos_id, self.eos_id):
            return 0
        return sum(int(np.sum(ids == self.unk_id)) for ids in documents)

    def save_tokenizer(self, directory: pathlib.Path) -> None:
        """Write tokenizer.json and tokenizer_config.json.

        `AutoTokenizer` and `load_tokenizer` open them with equal ids.
        """
        io.write_text(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        saved = {}
        for key in SAVED_CONFIG_KEYS:
            value = self.tokenizer_config.get(key)
            if value is not None:
                saved[key] = get_token_text(value)
        saved.setdefault("eos_token", self.backend.id_to_token(self.eos_id))
        if self.bos_id is not None:
            saved.setdefault("bos_token", self.backend.id_to_token(self.bos_id))
        # this class reads tokenizer.json as it is, in transformers 4 and 5; LlamaTokenizerFast
        # rebuilds it and gets some ids wrong
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
        saved["clean_up_tokenization_spaces"] = False
        text = json.dumps(saved, indent=1, ensure_ascii=False)
        io.write_text(directory / "tokenizer_config.json", text + "\n")


def group_by_length(parts: list[tuple[int, TextPart]]) -> Iterator[list[tuple[int, TextPart]]]:
    """Yield parts in order, in groups of GROUP_CHARS or somewhat more."""
    group = []
    n_chars = 0
    for numbered in parts:
        group.append(numbered)
        n_chars += len(numbered[1].text)
        if n_chars >= GROUP_CHARS:
            yield group
            group = []
            n_chars = 0
    if group:
        yield group


def break_pattern(text: str) -> str:
    """Return a pattern for the first character of a text, where the rest follows."""
    return f"{re.escape(text[0])}(?={re.escape(text[1:])})"


def splits_words(step: dict[str, Any] | None, ignored: set[str]) -> bool:
    """Return whether a pre-tokenizer splits a text at spaces.

    Args:
        step: of tokenizer.json; None: it has none.
        ignored: patterns of splits that do not count.
    """
    if step is None:
        return False
    if step["type"] == "Sequence":
        return any(splits_words(part, ignored) for part in step["pretokenizers"])
    if step["type"] == "Split":
        return step["pattern"].get("Regex") not in ignored
    return step.get("split", True)


def find_prefix_id(backend: tokenizers.Tokenizer) -> int | None:
    """Return the token that the tokenizer itself puts before a text, if any."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    if full[: len(bare)] == bare:
        return None
    return full[0]


def count_text_ids(backend: tokenizers.Tokenizer, document_ids: Iterable[int | None]) -> int:
    """Return the largest id of document tokens and tokens that text becomes, + 1."""
    added = backend.get_added_tokens_decoder()
    controls = {i for i, token in added.items() if token.special} - set(document_ids)
    used = set(backend.get_vocab(with_added_tokens=True).values()) - controls
    return max(used) + 1


def find_unk_id(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """Return the id of the model's unknown token, if it has one."""
    if model.get("unk_id") is not None:  # Unigram
        return model["unk_id"]
    return vocabulary.get(model.get("unk_token") or "")


def prepend_token(backend: tokenizers.Tokenizer, token: str, token_id: int) -> None:
    """Let the tokenizer put a token before every text, as Llama's does."""
    from tokenizers import processors

    single = f"{token} $A"
    pair = f"{single} {token} $B"
    special = [(token, token_id)]
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    if backend.post_processor is not None:
        template = processors.Sequence([backend.post_processor, template])
    backend.post_processor = template


def fingerprint_tokenizer(tokenizer_json: dict[str, Any], bos_id: int | None, eos_id: int) -> str:
    """Return the hash of what decides the ids, whatever the version of the library."""
    model = {}
    for key, value in tokenizer_json["model"].items():
        if value not in (None, False, ""):  # newer versions write more defaults
            model[key] = value
    if "merges" in model:
        model["merges"] = [split_merge(merge) for merge in model["merges"]]
    added = []
    for token in tokenizer_json["added_tokens"]:
        added.append((token["id"], token["content"], token["special"]))
    added.sort()
    steps = (tokenizer_json["normalizer"], tokenizer_json["pre_tokenizer"])
    return stage.fingerprint([model, *steps, added, bos_id, eos_id])


def split_merge(merge: str | list[str]) -> list[str]:
    """Return a BPE merge as a pair; older versions write it as one string."""
    if isinstance(merge, str):
        return merge.split(" ", 1)
    return merge


def get_token_text(value: Any) -> Any:
    """Return a special token's text, which older files describe in a dict. Other values pass."""
    if isinstance(value, dict):
        return value.get("content", value)
    return value


# ---- tokenizers of others


def read_tokenizer_source(where: io.Path | str) -> TokenizerSource:
    """Read a tokenizer. Raise UserError if there is none, or its stage wrote other bytes."""
    from tokenizers import Tokenizer as Backend

    first, *rest = find_tokenizer_files(find_tokenizer(where))
    io.check_published([first, *rest])
    settings = read_tokenizer_settings(first, rest)
    if first.suffix == ".model":
        return read_sentencepiece(first, settings)
    text = io.read_text(first)
    reason = find_fault(text)
    if not reason:
        try:
            return TokenizerSource(Backend.from_str(text), settings)
        except Exception as error:  # tokenizers raises bare Exception
            reason = str(error)
    raise UserError(
        f"{io.printable(where)}: cannot be read as a tokenizer ({io.printable(reason)}). "
        "Get the files again from where they came."
    )


def read_tokenizer_settings(first: io.Path, rest: Sequence[io.Path]) -> dict[str, Any]:
    """Return tokenizer_config.json with what the files beside it add, as transformers reads them.

    Args:
        first: tokenizer.json or tokenizer.model.
        rest: the files that belong to it.

    Raises:
        UserError: a special token is no text.
    """
    by_name = {file.name: file for file in rest}
    settings = {}
    if CONFIG_FILE in by_name:
        settings = read_special_tokens(by_name[CONFIG_FILE])
    if TOKENS_MAP in by_name:
        add_tokens_map(settings, by_name[TOKENS_MAP])
    if ADDED_TOKENS in by_name and "added_tokens_decoder" not in settings:
        added = read_json_object(by_name[ADDED_TOKENS])
        settings["added_tokens_decoder"] = {str(i): token for token, i in added.items()}
    templates = {}
    for file in rest:
        if file.suffix == ".jinja":
            name = "default" if file.name == CHAT_TEMPLATE else file.stem
            templates[name] = io.read_text(file)
    if templates:
        settings["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    if list(templates) == ["default"]:
        settings["chat_template"] = templates["default"]
    return settings


def add_tokens_map(settings: dict[str, Any], file: io.Path) -> None:
    """Add the special tokens of special_tokens_map.json to those of tokenizer_config.json.

    Where they differ, transformers takes the former only beside an old tokenizer_config.json, one
    without added_tokens_decoder.
    """
    is_old = "added_tokens_decoder" not in settings
    for key, value in read_special_tokens(file).items():
        if key not in SPECIAL_TOKEN_KEYS or value is None:
            continue
        ours, theirs = get_token_text(settings.get(key)), get_token_text(value)
        if ours and ours != theirs:
            taken = TOKENS_MAP if is_old else CONFIG_FILE
            log.warning(
                f"{io.printable(file)}: {key} is {io.printable(repr(theirs))}, in {CONFIG_FILE} "
                f"{io.printable(repr(ours))}. {taken} is taken, as transformers does."
            )
        if is_old or not ours:
            settings[key] = value


def read_json_object(file: io.Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise UserError if it holds another value."""
    found = io.read_json(file)
    if not isinstance(found, dict):
        raise UserError(
            f"{io.printable(file)}: expected a JSON object, got a {type(found).__name__}. "
            "Get the file again from where it came."
        )
    return found


def read_special_tokens(file: io.Path) -> dict[str, Any]:
    """Return a file with special tokens. Raise UserError if they are no texts."""
    found = read_json_object(file)
    for key in SPECIAL_TOKEN_KEYS:
        text = get_token_text(found.get(key))
        if not isinstance(text, str | None):
            raise UserError(
                f"{io.printable(file)}: {key}: expected a token's text, got "
                f"{io.printable(repr(text)[:80])}. Get the file again from where it came."
            )
    return found


def read_sentencepiece(file: io.Path, settings: dict[str, Any]) -> TokenizerSource:
    """Read a SentencePiece model with the settings and added tokens beside it.

    Raises:
        UserError: no equal form is known for the model, or a token was added at another id than
            behind its last one.
    """
    from tokenizers import AddedToken

    source = convert_sentencepiece(io.read_bytes(file), str(file))
    backend = source.backend
    added = settings.get("added_tokens_decoder", {})
    for i in sorted(map(int, added)):
        form = added[str(i)]
        text = get_token_text(form)
        is_special = form.get("special", True) if isinstance(form, dict) else True
        if backend.token_to_id(text) is None:
            token = AddedToken(text, special=is_special, normalized=False)
            backend.add_tokens([token])
        if backend.token_to_id(text) != i:
            raise UserError(
                f"{file}: {io.printable(repr(text))}, added beside it, has the id {i}, but would "
                f"get {backend.token_to_id(text)}. Save the tokenizer as a tokenizer.json."
            )
    known = backend.get_vocab(with_added_tokens=True)
    tokenizer_config = dict(source.config)
    for key, value in settings.items():
        if key not in SPECIAL_TOKEN_KEYS or get_token_text(value) in known:
            tokenizer_config[key] = value
    if settings.get("add_bos_token") is False:
        backend.post_processor = None
    return source._replace(config=tokenizer_config)


def find_fault(tokenizer_json: str) -> str:
    """Return why a tokenizer.json is of no use, tried in a process of its own; "" if it is of use.

    The cache remembers what was tried, by which trial and library.
    """
    data = tokenizer_json.encode()
    tried = None
    with contextlib.suppress(UserError):
        trial = io.read_bytes(pathlib.Path(tokenizer_trial.__file__))
        library = importlib.metadata.version("tokenizers").encode()
        name = hashlib.sha256(trial + library + data).hexdigest()
        tried = io.cache_directory() / "tokenizers" / name
        if io.exists(tried):
            return ""
    # one thread: each takes 64 MB of the addresses that are allowed
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", tokenizer_trial.__file__],
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=TRIAL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        return "the tokenizers library breaks off on a short text, or takes too long or much for it"
    if tried and not done.stdout:
        with contextlib.suppress(UserError):
            io.write_text(tried, "")
    return done.stdout.decode("utf-8", "replace")


def find_tokenizer(where: io.Path | str) -> io.Path:
    """Return the path of a tokenizer, downloaded from the hub for hf:NAME or hf:NAME@REVISION."""
    address = str(where)
    if address.startswith("hf:"):
        return hub.download(address, HUB_FILES, "tokenizer")
    hub.check_is_no_hub_name(address)
    return io.path(where)


def find_tokenizer_files(path: io.Path) -> list[io.Path]:
    """Return a tokenizer's files: tokenizer.json or a .model, and what belongs to it."""
    if not io.exists(path):
        if path.name in stage.WRITERS:
            raise UserError(f"{path}: not found. {stage.suggest_stages(path)}")
        raise UserError(
            f"tokenizer {path}: not found. Give a SentencePiece .model, a tokenizer.json or a "
            "Hugging Face directory."
        )
    for file in (path, path / "tokenizer.json", path / "tokenizer.model"):
        if io.size(file) is None or file.suffix not in (".json", ".model"):
            continue
        if file.name != "tokenizer.model" and file.suffix == ".model":
            return [file]  # settings beside it need not be its own
        beside = [file.with_name(name) for name in (*FURTHER_FILES, CHAT_TEMPLATE)]
        found = [other for other in beside if io.size(other) is not None]
        return [file, *found, *io.find(file.with_name(NAMED_TEMPLATES), "*.jinja")]
    raise UserError(
        f"tokenizer {path}: no tokenizer.json and no SentencePiece .model. "
        "Give one, or a Hugging Face directory that has one."
    )


def has_tokenizer(directory: io.Path) -> bool:
    """Return whether a directory has the files of a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model")
    return any(io.size(directory / name) is not None for name in names)


def convert_sentencepiece(proto: bytes, where: str, model_type: str = "bpe") -> TokenizerSource:
    """Convert a SentencePiece model, with equal ids for every text: BPE models only.

    A unigram model just trained is converted too, but not to be read by SentencePiece: that sums
    scores in float32 over a whole document, so that its ids part from exact ones after some
    thousand tokens. Here each word is segmented by itself, where no rounding matters.

    Args:
        proto: the bytes of a .model.
        where: what to name in errors.
        model_type: "bpe" or "unigram".

    Raises:
        UserError: no equal form is known for the model.
    """
    model = parse_sentencepiece(proto, where)
    reason = unsupported_reason(model, model_type)
    if reason:
        raise UserError(
            f"{where}: no Hugging Face tokenizer would give equal ids, since {reason}. "
            "Give its tokenizer.json, or train one."
        )
    from tokenizers import AddedToken

    kinds = model.SentencePiece
    unknown, *_ = list_pieces(model, kinds.UNKNOWN)
    controls = list_pieces(model, kinds.CONTROL)
    backend = build_backend(model, model_type, unknown)
    special = []
    for name in [unknown, *controls]:
        special.append(AddedToken(name, special=True, normalized=False))
    backend.add_special_tokens(special)
    tokenizer_config = {"unk_token": unknown}
    bos_id = model.trainer_spec.bos_id
    eos_id = model.trainer_spec.eos_id
    if bos_id >= 0:
        bos = model.pieces[bos_id].piece
        tokenizer_config["bos_token"] = bos
        prepend_token(backend, bos, bos_id)
    if eos_id >= 0:
        tokenizer_config["eos_token"] = model.pieces[eos_id].piece
    equal_model = proto if model_type == "bpe" else None
    return TokenizerSource(backend, tokenizer_config, equal_model)


def list_pieces(model: Any, kind: int) -> list[str]:
    """Return the pieces of one kind of a ModelProto, in order."""
    return [piece.piece for piece in model.pieces if piece.type == kind]


def parse_sentencepiece(proto: bytes, where: str) -> Any:
    """Return the ModelProto in a .model's bytes. Raise UserError if they hold none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # generated when it is imported
    model = messages.ModelProto()
    try:
        model.ParseFromString(proto)
    except DecodeError as error:
        raise UserError(
            f"{where}: not a SentencePiece model ({error}). Get the file again from where it came."
        ) from None
    return model


def unsupported_reason(model: Any, model_type: str) -> str | None:
    """Return why a ModelProto has no equal form in the tokenizers library, or None."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    types = {"bpe": trainer.BPE, "unigram": trainer.UNIGRAM}
    if trainer.model_type != types[model_type]:
        return f"it is not a {model_type} model"
    if normalizer.precompiled_charsmap:
        return f"it rewrites text ({normalizer.name})"
    if normalizer.remove_extra_whitespaces:
        return "it removes spaces"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "it treats spaces in another way"
    kinds = model.SentencePiece
    kinds_used = {piece.type for piece in model.pieces}
    if kinds_used & {kinds.USER_DEFINED, kinds.UNUSED}:
        return "it has user-defined or unused pieces"
    return None


def build_backend(model: Any, model_type: str, unknown: str) -> tokenizers.Tokenizer:
    """Return the tokenizers library's form of a ModelProto, without special tokens."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    if model_type == "bpe":
        backend = Backend(build_bpe_model(model, unknown))
    else:
        backend = Backend(build_unigram_model(model))
        # a "<" ends a word, so that no text is read as "<s>" or "<0x0A>", which are tokens here
        words = Regex("▁*<|▁*[^▁<]+|▁+")
        backend.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    normalize: list[Any] = [normalizers.Replace(" ", "▁")]
    decode: list[Any] = [decoders.Replace("▁", " ")]
    decode += [decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        normalize.insert(0, normalizers.Prepend("▁"))
        decode.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(normalize)
    backend.decoder = decoders.Sequence(decode)
    return backend


def build_unigram_model(model: Any) -> tokenizers.models.Unigram:
    """Return the pieces and scores of a unigram model."""
    from tokenizers import models

    trainer = model.trainer_spec
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    return models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)


def build_bpe_model(model: Any, unknown: str) -> tokenizers.models.BPE:
    """Return a BPE model with a list of the merges that SentencePiece makes by score."""
    from tokenizers import models

    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}

    def token_ids(pair: tuple[str, str]) -> tuple[int, int]:
        left, right = pair
        return vocabulary[left], vocabulary[right]

    # SentencePiece merges the best score first; stable: pieces of equal score keep their order
    merges = []
    by_score = sorted(model.pieces, key=lambda piece: -piece.score)
    for piece in by_score:
        if piece.type != model.SentencePiece.NORMAL:
            continue
        text = piece.piece
        pairs = [(text[:k], text[k:]) for k in range(1, len(text))]
        known = [pair for pair in pairs if vocabulary.keys() >= set(pair)]
        merges += sorted(known, key=token_ids)
    byte_fallback = model.trainer_spec.byte_fallback
    return models.BPE(
        vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback
    )


# ---- training


def train_sentencepiece(section: config.TokenizerConfig, corpus: io.Path) -> bytes:
    """Return a SentencePiece model trained on a sample of the corpus."""
    max_bytes = section.sample_mb * 1_000_000
    texts = [text for _, text in sample_corpus(corpus, max_bytes)]
    n_bytes = sum(len(text.encode()) for text in texts)
    log.info(
        f"tokenizer: training {section.vocab_size:,} tokens on {n_bytes / 1e6:,.1f} MB of text"
    )
    where = "here" if n_bytes <= MAX_BYTES_IN_PROCESS else "local"
    [model] = executor.map_jobs(where, train_on_texts, [TrainingJob(section, texts, n_bytes)])
    return model


class TrainingJob(NamedTuple):
    """A vocabulary to train. SentencePiece aborts its process where memory ends."""

    section: config.TokenizerConfig
    texts: list[str]
    n_bytes: int  # of the texts


def train_on_texts(job: TrainingJob) -> bytes:
    """Return a SentencePiece model."""
    import sentencepiece

    section = job.section
    lines = (line for text in job.texts for line in text.split("\n") if line)
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=section.model,
            vocab_size=section.vocab_size,
            control_symbols=list(section.control_tokens),
            max_sentence_length=4 * MAX_SPAN_CHARS,
            minloglevel=2,
            **SENTENCEPIECE_OPTIONS,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"tokenizer.vocab_size: cannot train {section.vocab_size} tokens on this corpus. "
            f"{explain_training_error(str(error), job.n_bytes)}"
        ) from None
    return model.getvalue()


def explain_training_error(error: str, n_bytes: int) -> str:
    """Return what to do about SentencePiece's error for a vocabulary of impossible size."""
    maximum = re.search(r"set it to a value <= (\d+)", error)
    if maximum:
        return (
            f"{n_bytes:,} bytes of text give at most {maximum[1]}. Lower it, or prepare more text."
        )
    minimum = re.search(r"smaller than required_chars\. \d+ vs (\d+)", error)
    if minimum:
        return f"Its characters, bytes and control tokens alone are {minimum[1]}. Raise it."
    return f"SentencePiece reports: {error.strip()}"


def compare_tokenizers(
    paths: Sequence[io.Path | str], corpus: io.Path, sample_mb: float
) -> dict[str, dict[str, float]]:
    """Return path -> source -> bytes per token, over the same evenly spread sample of a corpus."""
    opened = {str(path): load_tokenizer(path) for path in paths}
    texts: dict[str, list[str]] = {}
    for name, text in sample_corpus(corpus, sample_mb * 1e6):
        spans = texts.setdefault(name, [])
        spans.append(text)
    table: dict[str, dict[str, float]] = {path: {} for path in opened}
    progress = stage.track_progress(opened.items(), "comparing", len(opened), "tokenizers")
    for path, tokenizer in progress:
        for name, spans in texts.items():
            n_tokens = sum(map(len, tokenizer.encode_batch(spans)))
            n_bytes = sum(len(span.encode()) for span in spans)
            table[path][name] = n_bytes / n_tokens
    return table


def sample_corpus(corpus: io.Path, max_bytes: float) -> Iterator[tuple[str, str]]:
    """Yield (source, span of text), spread evenly over the training documents.

    Not random: every k-th span, about max_bytes together.

    Raises:
        UserError: a shard is not as `jaxpt prepare` wrote it.
    """
    files = []
    for name, paths in list_corpus_files(io.local_copy(corpus), "train").items():
        files += [(name, path) for path in paths]
    io.check_published(file for _, file in files)
    n_bytes = sum(count_text_bytes(file) for _, file in files)
    frac = min(1.0, max_bytes / max(n_bytes, 1))
    n_spans = 0
    with stage.progress_bar("reading the sample", n_bytes, "B") as advance:
        for name, file in files:
            for text in iter_texts(file):
                for start in range(0, len(text), MAX_SPAN_CHARS):
                    n_before = int(n_spans * frac)
                    n_spans += 1
                    if int(n_spans * frac) > n_before:
                        yield name, text[start : start + MAX_SPAN_CHARS]
                advance(len(text.encode()))


def iter_texts(file: pathlib.Path) -> Iterator[str]:
    """Yield the texts of a corpus shard."""
    shard = pq.ParquetFile(file)
    for batch in shard.iter_batches(batch_size=256, columns=["text"]):
        yield from batch.column(0).to_pylist()


def count_text_bytes(file: pathlib.Path, row_group: int | None = None) -> int:
    """Return about how many bytes of text a parquet file or row group has, from its footer."""
    footer = pq.ParquetFile(file).metadata
    column = footer.schema.names.index("text")
    groups = [row_group]
    if row_group is None:
        groups = range(footer.num_row_groups)
    n_bytes = 0
    for group in groups:
        chunk = footer.row_group(group).column(column)
        n_bytes += chunk.total_uncompressed_size
    return n_bytes


def list_corpus_files(corpus: pathlib.Path, split: str) -> dict[str, list[pathlib.Path]]:
    """Return the parquet shards of each source, in order.

    Raises:
        UserError: the corpus has none to train on.
    """
    files: dict[str, list[pathlib.Path]] = {}
    directory = corpus / split
    for file in io.find(directory, "*.parquet"):
        name = re.sub(r"-\d+$", "", file.stem)
        files.setdefault(name, []).append(file)
    if split == "train" and not files:
        raise UserError(f"{directory}: no parquet shards. Run jaxpt prepare first.")
    return files

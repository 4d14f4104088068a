"""Describe a tokenizer.json as llama.cpp reads it from a GGUF file.

llama.cpp has two tokenizers that fit: "llama" (SentencePiece's BPE, by scores) and "gpt2"
(byte-level BPE, by merges), the latter with the pre-tokenizers that it knows by name.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from jaxpt.data.tokenizer import Tokenizer, find_prefix_id, split_merge
from jaxpt.spec import ModelSpec, UserError

# types of tokens, llama.cpp's llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# the pre-tokenizers that llama.cpp has a name for: (steps before bytes, ignore_merges) -> name
PRE_TOKENIZERS = {
    ((CONTRACTIONS + WORDS % r"\p{N}{1,3}",), True): "llama-bpe",
    ((CONTRACTIONS + WORDS % r"\p{N}",), False): "qwen2",
    (("GPT-2",), False): "gpt-2",
    (("digits", "GPT-2"), False): "smollm",
}


MAX_ENDS = 3  # llama.cpp's eos, eot and eom


class GgufTokenizer(NamedTuple):
    """A tokenizer in llama.cpp's terms.

    Attributes:
        model: "llama" or "gpt2".
        pre: name of the pre-tokenizer.
        tokens: by id.
        token_types: by id.
        scores: by id, of model "llama"; empty of "gpt2".
        merges: "left right", of model "gpt2"; empty of "llama".
        bos_id: put before a text if adds_bos.
        eos_ids: each ends a generated text; up to three.
        unk_id: None: there is none.
        adds_bos: whether a text begins with bos.
        adds_space: whether a space is put before a text.
        chat_template: None: there is none.
    """

    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    scores: list[float]
    merges: list[str]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    unk_id: int | None
    adds_bos: bool
    adds_space: bool
    chat_template: str | None


def describe_tokenizer(tokenizer: Tokenizer, spec: ModelSpec) -> GgufTokenizer:
    """Return a model's tokenizer in llama.cpp's terms, with as many tokens as the model has.

    Raises:
        UserError: llama.cpp would make other tokens of a text.
    """
    form = json.loads(tokenizer.backend.to_str())
    if form["model"]["type"] != "BPE":
        raise refuse("a BPE model", form["model"]["type"])
    if len(spec.eos_ids) > MAX_ENDS:
        raise UserError(
            f"export_gguf: llama.cpp has {MAX_ENDS} end tokens, got {list(spec.eos_ids)}. Take one "
            "out of the model's generation_config.json."
        )
    is_sentencepiece = bool(form["model"]["byte_fallback"])
    tokens, token_types = list_tokens(form, spec.vocab_size)
    pre, adds_space = "default", False
    scores: list[float] = []
    merges = [split_merge(merge) for merge in form["model"]["merges"]]
    if is_sentencepiece:
        adds_space = read_spaces(form)
        scores = score_tokens(tokens, merges)
    else:
        pre = find_pre_tokenizer(form)
    return GgufTokenizer(
        model="llama" if is_sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        token_types=token_types,
        scores=scores,
        merges=[] if is_sentencepiece else [" ".join(merge) for merge in merges],
        bos_id=tokenizer.bos_id,
        eos_ids=spec.eos_ids or (tokenizer.eos_id,),
        unk_id=tokenizer.unk_id,
        adds_bos=find_prefix_id(tokenizer.backend) is not None,
        adds_space=adds_space,
        chat_template=tokenizer.chat_template,
    )


def refuse(expected: str, got: Any) -> UserError:
    """Return the error for a tokenizer that llama.cpp does not have."""
    return UserError(
        f"tokenizer.json: llama.cpp reads {expected}, got {got!s:.300}. Export with jaxpt "
        "export_hf, and convert that with a newer llama.cpp's convert_hf_to_gguf.py."
    )


def list_tokens(form: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return texts and types of all ids; those without a token are unused."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    token_types = [UNUSED] * vocab_size
    model = form["model"]
    for text, token_id in model["vocab"].items():
        tokens[token_id], token_types[token_id] = text, NORMAL
        if model["byte_fallback"] and len(text) == 6 and text.startswith("<0x"):
            token_types[token_id] = BYTE
        if text == model["unk_token"]:
            token_types[token_id] = UNKNOWN
    for added in form["added_tokens"]:
        token_id = added["id"]
        tokens[token_id] = added["content"]
        if token_types[token_id] != UNKNOWN:
            token_types[token_id] = CONTROL if added["special"] else USER_DEFINED
    return tokens, token_types


def score_tokens(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return scores by which the pair that the first merge joins is joined first.

    llama.cpp joins the neighbors whose joined token has the highest score.
    """
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    return [-float(rank.get(token, 0)) for token in tokens]


def read_spaces(form: dict[str, Any]) -> bool:
    """Return whether a SentencePiece-like tokenizer puts a space before a text.

    Raises:
        UserError: it changes a text in other ways, or splits it.
    """
    normalizer, pre = form["normalizer"] or {}, form["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepends = {"type": "Prepend", "prepend": "▁"}
    if not pre and replaces in steps and steps in ([replaces], [prepends, replaces]):
        return prepends in steps
    is_metaspace = pre.get("type") == "Metaspace" and pre.get("replacement") == "▁"
    if is_metaspace and not pre.get("split", True) and not kinds:
        return pre["prepend_scheme"] != "never"
    raise refuse("spaces as ▁ and nothing else changed or split", {**normalizer, **pre})


def find_pre_tokenizer(form: dict[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's pre-tokenizer. UserError: it has none."""
    pre = form["pre_tokenizer"] or {}
    steps = tuple(
        describe_step(step) for step in pre.get("pretokenizers", [pre]) if not is_bytes(step)
    )
    ignores_merges = bool(form["model"].get("ignore_merges"))
    normalizer = form["normalizer"]
    name = PRE_TOKENIZERS.get((steps, ignores_merges))
    # NFC: Qwen's; llama.cpp leaves texts as they are, which are NFC but for decomposed accents
    if name is None or (normalizer and normalizer["type"] != "NFC"):
        raise refuse(f"the pre-tokenizers {', '.join(PRE_TOKENIZERS.values())}", pre)
    return name


def is_bytes(step: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer only spells a text in bytes."""
    return (
        step.get("type") == "ByteLevel" and not step["use_regex"] and not step["add_prefix_space"]
    )


def describe_step(step: dict[str, Any]) -> str:
    """Return a pre-tokenizer by what it splits at: its pattern, or a word of PRE_TOKENIZERS."""
    kind = step.get("type")
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", "")
    if kind == "ByteLevel" and step["use_regex"] and not step["add_prefix_space"]:
        return "GPT-2"
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    return str(step)

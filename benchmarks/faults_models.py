"""Damaged and hostile Hugging Face directories: what each command that reads models makes of them.

    python benchmarks/faults_models.py [--cases 400] [--seed 0] [--only PATTERN]

Small random models of several families are written by transformers, and exported by jaxpt, which
adds a manifest. A case is one of them with one damage: a file cut, emptied, with one bit changed,
zeros in it, removed; a value of a JSON file of another type or of an absurd size; or one of the
hostile edits below. Evaluate, export_hf, initialize and report --lineage read it, each in turn in a
forked child whose sockets are refused, with bounded time and memory. Outcomes:

    sentence    exit 1 and one sentence
    right       exit 0, and the numbers are those of the undamaged model or, where the damage made
                another model, of transformers; export and run give the same numbers
    wrong       exit 0 and other numbers, or an export of what evaluate refuses
    traceback   anything else that ends a command, or control characters in what it prints
    hang        too long, or too much memory

Prints a table; exits 1 if one of the last three occurs. About 40 minutes on two cores.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import tokenizers
import torch
import transformers

from jaxpt import export, lineage
from jaxpt.cli.main import run_command
from jaxpt.evaluate import harness
from jaxpt.stage import entry_point
from jaxpt.train import initial_run
from jaxpt.weights import huggingface

PRELOADED = (export, lineage, harness, initial_run, huggingface)

CASE_SECONDS = 120.0
CASE_BYTES = 3e9  # resident, above what was imported
SHOWN = 900  # characters of an answer
KL_BITS = 2e-3  # bits per byte by which two backends may differ
TEXT = "The ship sailed at dawn; nobody on the quay said a word.\n" * 3
VOCAB_SIZE = 320
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": HEADS | {"tie_word_embeddings": True},
    "qwen3": HEADS,
    "mixtral": HEADS | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "gemma2": HEADS | {"query_pre_attn_scalar": 12},
    "phi3": {},
    "olmo2": HEADS | {"attention_bias": True},
}

Damage = Callable[[pathlib.Path, random.Random], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One damaged directory.

    Attributes:
        name: what was done, "config.json: hidden_size = -1".
        model: the directory that is copied.
        damage: changes the copy.
        seed: of the damage.
    """

    name: str
    model: pathlib.Path
    damage: Damage
    seed: int


@dataclasses.dataclass
class Answer:
    """What one command did.

    Attributes:
        outcome: "sentence", "right", "wrong", "traceback" or "hang".
        text: the sentence, or what was wrong.
        bits: bits per byte, of evaluate.
    """

    outcome: str
    text: str = ""
    bits: float | None = None


# ---- models


def make_models(home: pathlib.Path, names: Iterable[str]) -> None:
    """Write HOME/FAMILY by transformers and HOME/FAMILY-exported by jaxpt."""
    for name in names:
        more = FAMILIES[name]
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **SIZES, **more)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        sharded = {"max_shard_size": "30KB"} if name == "qwen3" else {}
        model.save_pretrained(home / name, **sharded)
        write_tokenizer(home / name)
        exported = home / f"{name}-exported"
        run_command(["export_hf", "--from", str(home / name), "--to", str(exported)])


def write_tokenizer(directory: pathlib.Path) -> None:
    """Write a byte-level tokenizer with a few merges, a chat template and their settings."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    vocabulary = {letter: i for i, letter in enumerate(sorted(byte_level.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("s", "a"), ("n", "o")]
    special = ["<s>", "</s>"]
    for text in special:
        vocabulary[text] = len(vocabulary)
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = byte_level(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
    }
    edit(directory / "tokenizer_config.json", lambda _: settings)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m }}{% endfor %}")


# ---- damage to any file


def truncate(file: pathlib.Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(1, file.stat().st_size))


def empty(file: pathlib.Path, rng: random.Random) -> None:
    os.truncate(file, 0)


def flip(file: pathlib.Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def zero(file: pathlib.Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = rng.randrange(max(len(data) - 4096, 1))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    file.write_bytes(data)


def remove(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()


def make_directory(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def make_pipe(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def link_to_zeros(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def link_to_itself(file: pathlib.Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to(file)


FILE_DAMAGES = {
    "cut": truncate,
    "empty": empty,
    "one bit": flip,
    "4 kB of zeros": zero,
    "gone": remove,
    "a directory": make_directory,
    "a pipe": make_pipe,
    "a link to /dev/zero": link_to_zeros,
    "a link to itself": link_to_itself,
}
OFTEN = ("cut", "one bit", "4 kB of zeros")  # drawn anew for every case

# ---- damage to values

VALUES: list[Any] = [None, -1, 0, 1, 1.5, True, "x", "", [], {}, ["x"], {"x": 1}, [[]]]
VALUES += [
    2**31,
    2**32 - 1,
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "\x1b[2J\x1b]0;x\x07",
]
VALUES += ["x" * 1_000_000, list(range(100_000)), "nested"]


def edit(file: pathlib.Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file."""
    value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(change(value), indent=1), encoding="utf-8")


def list_places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON value; of a long object or list the first ones."""
    places = [at] if at else []
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    for key, child in children[:40]:
        places += list_places(child, (*at, key))
    return places


def replace_value(file: pathlib.Path, place: tuple[Any, ...], value: Any) -> None:
    """Set one value of a JSON file."""
    whole = json.loads(file.read_text(encoding="utf-8"))
    inner = whole
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "NESTED" if value == "nested" else value
    text = json.dumps(whole, indent=1).replace('"NESTED"', "[" * 100_000 + "]" * 100_000)
    file.write_text(text, encoding="utf-8")


# ---- hostile edits


def edit_config(**changes: Any) -> Damage:
    """Change keys of config.json."""
    return lambda directory, rng: edit(directory / "config.json", lambda config: config | changes)


def edit_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change tokenizer.json in place."""

    def damage(directory: pathlib.Path, rng: random.Random) -> None:
        def edited(value: dict[str, Any]) -> dict[str, Any]:
            change(value)
            return value

        edit(directory / "tokenizer.json", edited)

    return damage


def edit_settings(**changes: Any) -> Damage:
    """Change keys of tokenizer_config.json."""
    return lambda directory, rng: edit(
        directory / "tokenizer_config.json", lambda settings: settings | changes
    )


def write_index(weight_map: Any) -> Damage:
    """Put an index in the place of the weights."""

    def damage(directory: pathlib.Path, rng: random.Random) -> None:
        for file in directory.glob("model*.safetensors"):
            file.rename(directory / f"was-{file.name}")
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the header of the first safetensors file; the numbers behind it stay."""

    def damage(directory: pathlib.Path, rng: random.Random) -> None:
        file = min(directory.glob("model*.safetensors"))
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def write_header(text: bytes, length: int | None = None) -> Damage:
    """Put a header in the place of the first safetensors file."""

    def damage(directory: pathlib.Path, rng: random.Random) -> None:
        file = min(directory.glob("model*.safetensors"))
        size = len(text) if length is None else length
        file.write_bytes(size.to_bytes(8, "little") + text + bytes(64))

    return damage


def write_file(name: str, text: str) -> Damage:
    """Write a file beside the others."""
    return lambda directory, rng: (directory / name).write_text(text) and None


def set_every_entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Change the first entry of a safetensors header."""

    def change(header: dict[str, Any]) -> None:
        name = next(name for name in header if name != "__metadata__")
        header[name] |= changes

    return change


def rename_entry(header: dict[str, Any]) -> None:
    name = next(name for name in header if name != "__metadata__")
    header[f"\x1b[31m{name}\x07"] = header.pop(name)


def set_key(key: str, value: Any) -> Damage:
    """Set a key of tokenizer.json."""
    return edit_tokenizer(lambda form: form.__setitem__(key, value))


def set_model(**changes: Any) -> Damage:
    """Change the model of tokenizer.json."""
    return edit_tokenizer(lambda form: form["model"].update(changes))


def set_id(token: str, value: Any) -> Damage:
    """Give a token of the vocabulary another id."""
    return edit_tokenizer(lambda form: form["model"]["vocab"].__setitem__(token, value))


def set_added(**changes: Any) -> Damage:
    """Change the first added token."""
    return edit_tokenizer(lambda form: form["added_tokens"][0].update(changes))


def make_template(**changes: Any) -> Damage:
    """Change the post-processor."""
    return edit_tokenizer(lambda form: form["post_processor"].update(changes))


def replacer(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


BOMB = {"type": "Sequence", "normalizers": [replacer(" ", " " * 100)] * 4}
SLOW = {
    "type": "Split",
    "pattern": {"Regex": "(\\w+\\s?)+$X"},
    "behavior": "Isolated",
    "invert": False,
}
TEMPLATE_PIECE = {"SpecialToken": {"id": "<s>", "type_id": 0}}
SEQUENCE_A = {"Sequence": {"id": "A", "type_id": 0}}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "byte_fallback": False}
PROC = "/proc/self/environ"
HOSTILE: dict[str, Damage] = {
    "config: a billion layers": edit_config(num_hidden_layers=10**9),
    "config: 10,000 layers": edit_config(num_hidden_layers=10_000),
    "config: a vocabulary of 2^40": edit_config(vocab_size=2**40),
    "config: a width of 2^40": edit_config(hidden_size=2**40),
    "config: a feed-forward of 2^62": edit_config(intermediate_size=2**62),
    "config: a billion heads": edit_config(num_attention_heads=10**9, num_key_value_heads=10**9),
    "config: heads of 2^40": edit_config(head_dim=2**40),
    "config: a billion experts": edit_config(
        num_local_experts=10**9, num_experts=10**9, model_type="mixtral"
    ),
    "config: a million experts": edit_config(
        num_local_experts=10**6, num_experts=10**6, model_type="mixtral"
    ),
    "config: a context of 2^62": edit_config(max_position_embeddings=2**62),
    "config: 10^7 layer types": edit_config(layer_types=["full_attention"] * 10**7),
    "config: end token 2^31": edit_config(eos_token_id=2**31),
    "config: end tokens without end": edit_config(eos_token_id=list(range(10**6))),
    "config: end token -1": edit_config(eos_token_id=-1),
    "config: begin token 2^63": edit_config(bos_token_id=2**63),
    "config: code of strangers": edit_config(
        auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}
    ),
    "config: control characters": edit_config(model_type="\x1b[2Jllama\x07"),
    "config: a key of control characters": edit_config(**{"\x1b]0;x\x07": 1}),
    "config: rope of 10^308": edit_config(rope_theta=1e308, rope_parameters=None),
    "config: rope of lists": edit_config(rope_parameters=[1, 2]),
    "config: a window of 2^62": edit_config(sliding_window=2**62),
    "config: quantized": edit_config(quantization_config={"quant_method": "\x1b[2J"}),
    "config: dtype unknown": edit_config(dtype="float3", torch_dtype="float3"),
    "config: an adapter beside": write_file(
        "adapter_config.json", '{"base_model_name_or_path": 7}'
    ),
    "index: a file elsewhere": write_index({"a": "../llama/model.safetensors"}),
    "index: /proc": write_index({"a": PROC}),
    "index: /proc by dots": write_index({"a": "x/../../../../../../../../../.." + PROC}),
    "index: /dev/zero": write_index({"a": "/dev/zero"}),
    "index: itself": write_index({"a": "model.safetensors.index.json"}),
    "index: the directory": write_index({"a": "."}),
    "index: no name": write_index({"a": ""}),
    "index: a name with NUL": write_index({"a": "a\0b"}),
    "index: a long name": write_index({"a": "a" * 100_000}),
    "index: control characters": write_index({"\x1b[2J": "\x1b[2J.safetensors"}),
    "index: a million files": write_index({str(i): f"{i}.safetensors" for i in range(10**6)}),
    "index: numbers": write_index({"a": 1}),
    "index: a list": write_index(["model.safetensors"]),
    "index: a lone surrogate": write_index({"a": "\ud800"}),
    "weights: a header of 2^63": write_header(b"{}", 2**63),
    "weights: a header of 99 MB": write_header(b"{" + b" " * 99_000_000 + b"}"),
    "weights: a million tensors": write_header(
        json.dumps(
            {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**6)}
        ).encode()
    ),
    "weights: deep brackets": write_header(b"[" * 1_000_000),
    "weights: an integer of 5,000 digits": write_header(b'{"a": ' + b"9" * 5000 + b"}"),
    "weights: a shape of 2^62": edit_header(set_every_entry(shape=[2**62, 4])),
    "weights: a shape of 10^5 axes": edit_header(set_every_entry(shape=[1] * 100_000)),
    "weights: offsets of 2^80": edit_header(set_every_entry(data_offsets=[2**80, 2**80 + 4])),
    "weights: a type of control characters": edit_header(set_every_entry(dtype="\x1b[2J")),
    "weights: a name of control characters": edit_header(rename_entry),
    "weights: metadata of another kind": edit_header(lambda h: h.update({"__metadata__": 7})),
    "tokenizer: an id of 2^31": set_id("a", 2**31),
    "tokenizer: an id of 2^32 - 1": set_id("a", 2**32 - 1),
    "tokenizer: an id of 2^32": set_id("a", 2**32),
    "tokenizer: an id of -1": set_id("a", -1),
    "tokenizer: an id twice": set_id("a", 98),
    "tokenizer: an added id of 2^31": set_added(id=2**31),
    "tokenizer: an added id of 2^32 - 1": set_added(id=2**32 - 1),
    "tokenizer: an added token without text": set_added(content=""),
    "tokenizer: an added token of another id": set_added(id=300),
    "tokenizer: an added token of a space": set_added(content=" "),
    "tokenizer: an end token that is no special one": set_added(special=False),
    "tokenizer: a merge of nothing": set_model(merges=[["", ""]]),
    "tokenizer: a merge of the unknown": set_model(merges=[["zz", "yy"]]),
    "tokenizer: no vocabulary": set_model(vocab={}),
    "tokenizer: an unknown token that is none": set_model(unk_token="nothing"),
    "tokenizer: random merges": set_model(dropout=0.5),
    "tokenizer: dropout of 7": set_model(dropout=7),
    "tokenizer: a prefix of the model": set_model(continuing_subword_prefix="\x1b[2J" * 1000),
    "tokenizer: a normalizer that multiplies": set_key("normalizer", BOMB),
    "tokenizer: a normalizer of 10^7": set_key("normalizer", replacer(" ", "x" * 10**7)),
    "tokenizer: a normalizer that prepends": set_key(
        "normalizer", {"type": "Prepend", "prepend": "x" * 10**7}
    ),
    "tokenizer: a normalizer of nothing": set_key("normalizer", replacer("", "x")),
    "tokenizer: a normalizer that takes all": set_key(
        "normalizer", {"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    ),
    "tokenizer: a pattern that does not compile": set_key(
        "normalizer", {"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}
    ),
    "tokenizer: a slow pattern": set_key("pre_tokenizer", SLOW),
    "tokenizer: deep normalizers": edit_tokenizer(
        lambda form: form.update(normalizer=nest({"type": "NFC"}, "normalizers", 200))
    ),
    "tokenizer: a charsmap of noise": set_key(
        "normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}
    ),
    "tokenizer: a charsmap that reaches out": set_key(
        "normalizer", {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////9BQUFB"}
    ),
    "tokenizer: a template of a token that is not named": make_template(special_tokens={}),
    "tokenizer: a template without text": make_template(single=[TEMPLATE_PIECE]),
    "tokenizer: a template of text twice": make_template(single=[SEQUENCE_A, SEQUENCE_A]),
    "tokenizer: a template of B alone": make_template(
        single=[{"Sequence": {"id": "B", "type_id": 0}}]
    ),
    "tokenizer: a template of 10^6": make_template(single=[TEMPLATE_PIECE] * 10**6 + [SEQUENCE_A]),
    "tokenizer: a template's id of 2^31": make_template(
        special_tokens={"<s>": {"id": "<s>", "ids": [2**31], "tokens": ["<s>"]}}
    ),
    "tokenizer: a template's ids without end": make_template(
        special_tokens={"<s>": {"id": "<s>", "ids": [1] * 10**6, "tokens": ["<s>"] * 10**6}}
    ),
    "tokenizer: a template's ids without tokens": make_template(
        special_tokens={"<s>": {"id": "<s>", "ids": [1, 2, 3], "tokens": []}}
    ),
    "tokenizer: truncation to nothing": set_key(
        "truncation",
        {"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Right"},
    ),
    "tokenizer: padding to 2^60": set_key(
        "padding",
        {
            "strategy": {"Fixed": 2**60},
            "direction": "Right",
            "pad_to_multiple_of": 0,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    ),
    "tokenizer: a decoder that strips 2^60": set_key(
        "decoder", {"type": "Strip", "content": "x", "start": 2**60, "stop": 2**60}
    ),
    "tokenizer: a decoder that multiplies": set_key("decoder", replacer("e", "x" * 10**6)),
    "tokenizer: no decoder": set_key("decoder", None),
    "tokenizer: no pre-tokenizer": set_key("pre_tokenizer", None),
    "tokenizer: unigram without scores": edit_tokenizer(
        lambda form: form.update(model=UNIGRAM | {"vocab": []})
    ),
    "tokenizer: unigram of NaN": edit_tokenizer(
        lambda form: form.update(model=UNIGRAM | {"vocab": [["</s>", float("nan")]]})
    ),
    "tokenizer: unigram, unknown beyond": edit_tokenizer(
        lambda form: form.update(
            model=UNIGRAM | {"unk_id": 999, "vocab": [["</s>", 0.0], ["a", -1.0]]}
        )
    ),
    "tokenizer: unigram, unknown token used": edit_tokenizer(
        lambda form: form.update(
            model=UNIGRAM | {"unk_id": None, "vocab": [["</s>", 0.0], ["a", -1.0]]}
        )
    ),
    "tokenizer: words without an unknown": edit_tokenizer(
        lambda form: form.update(
            model={"type": "WordLevel", "unk_token": "no", "vocab": {"</s>": 0, "a": 1}}
        )
    ),
    "tokenizer: another version": set_key("version", "9.0"),
    "settings: code of strangers": edit_settings(
        auto_map={"AutoTokenizer": ["theirs.T", None]}, tokenizer_class="Theirs"
    ),
    "settings: code of strangers, oddly": edit_settings(auto_map=7),
    "settings: an end token of numbers": edit_settings(eos_token=257),
    "settings: an end token in a list": edit_settings(eos_token=["</s>"]),
    "settings: an end token of another kind": edit_settings(eos_token={"content": {"content": 7}}),
    "settings: an end token that is a letter": edit_settings(eos_token="a"),
    "settings: an end token unknown": edit_settings(eos_token="\x1b[2J"),
    "settings: a begin token of lists": edit_settings(bos_token=[1], add_bos_token=True),
    "settings: a begin token of dicts": edit_settings(bos_token={}, add_bos_token=True),
    "settings: a length of 10^30": edit_settings(model_max_length=10**30),
    "settings: a length in words": edit_settings(model_max_length="x"),
    "settings: added tokens of 2^31": edit_settings(
        added_tokens_decoder={str(2**31): {"content": "x", "special": True}}
    ),
    "settings: added tokens of another kind": edit_settings(added_tokens_decoder=[1, 2]),
    "settings: more special tokens": edit_settings(additional_special_tokens=[7, None, {}]),
    "settings: a template that is a number": edit_settings(chat_template=7),
    "settings: templates in a list": edit_settings(chat_template=[{"name": 1}, 7]),
    "settings: a class of control characters": edit_settings(tokenizer_class="\x1b[2J\x07"),
    "settings: a class of numbers": edit_settings(tokenizer_class=7),
    "settings: a class of lists": edit_settings(tokenizer_class=["x"]),
    "settings: the class of Llama": edit_settings(tokenizer_class="LlamaTokenizerFast"),
    "settings: a list": write_file("tokenizer_config.json", "[]"),
    "settings: a number": write_file("tokenizer_config.json", "7"),
    "template: without end": write_file(
        "chat_template.jinja", "{% for i in range(10**18) %}x{% endfor %}"
    ),
    "template: no UTF-8": lambda directory, rng: (
        (directory / "chat_template.jinja").write_bytes(b"\xff\xfe") and None
    ),
    "special tokens: of another kind": write_file("special_tokens_map.json", "[[[["),
    "special tokens: numbers": write_file("special_tokens_map.json", '{"eos_token": 7}'),
    "added tokens: numbers": write_file("added_tokens.json", "7"),
    "generation: a list": write_file("generation_config.json", "[]"),
    "generation: words": write_file("generation_config.json", '{"eos_token_id": "x"}'),
    "record: a list": write_file("jaxpt.json", "[]"),
    "record: of other kinds": write_file(
        "jaxpt.json", '{"step": "x", "tokenizer": 7, "heldout": [], "lr": {}, "optimizer": 7}'
    ),
    "record: a huge step": write_file("jaxpt.json", f'{{"step": {10**30}, "tokenizer": null}}'),
    "record: control characters": write_file("jaxpt.json", '{"tokenizer": "\\u001b[2J"}'),
    "manifest: a list": write_file("manifest.json", "[]"),
    "manifest: of other kinds": write_file("manifest.json", '{"outputs": 7, "sizes": []}'),
    "files of code": write_file("modeling_theirs.py", "raise SystemExit('ran')"),
}


def nest(value: dict[str, Any], key: str, depth: int) -> dict[str, Any]:
    """Return a Sequence of a Sequence of ... the value."""
    for _ in range(depth):
        value = {"type": "Sequence", key: [value]}
    return value


# ---- the cases


def list_cases(home: pathlib.Path, n_cases: int, seed: int) -> list[Case]:
    """Return every hostile edit once, every file damage once per kind of file, then random ones."""
    rng = random.Random(seed)
    cases = []
    for name, damage in HOSTILE.items():
        family = "llama" if name.startswith(("tokenizer", "settings")) else rng.choice([*FAMILIES])
        cases.append(Case(name, home / family, damage, rng.getrandbits(32)))
    directories = [home / name for family in FAMILIES for name in (family, f"{family}-exported")]
    exported = home / "llama-exported"
    for file in sorted(path.name for path in exported.iterdir()):
        for kind in FILE_DAMAGES:
            cases.append(damage_file(exported, file, kind, rng))
    while len(cases) < n_cases:
        directory = rng.choice(directories)
        file = rng.choice(sorted(path.name for path in directory.iterdir()))
        is_json = file.endswith(".json")
        if is_json and rng.random() < 0.7:
            cases.append(damage_value(directory, file, rng))
        elif directory.name.endswith("-exported"):
            # elsewhere nobody can know what a changed number was
            cases.append(damage_file(directory, file, rng.choice(OFTEN), rng))
    return cases[:n_cases]


def damage_file(directory: pathlib.Path, file: str, kind: str, rng: random.Random) -> Case:
    """Return a case of a damaged file."""
    work = FILE_DAMAGES[kind]
    return Case(
        f"{directory.name}/{file}: {kind}",
        directory,
        lambda copy, rng: work(copy / file, rng),
        rng.getrandbits(32),
    )


def damage_value(directory: pathlib.Path, file: str, rng: random.Random) -> Case:
    """Return a case of a JSON value of another type or size."""
    place = rng.choice(list_places(json.loads((directory / file).read_text(encoding="utf-8"))))
    value = rng.choice(VALUES)
    where = ".".join(map(str, place))
    return Case(
        f"{directory.name}/{file}: {where} = {repr(value)[:40]}",
        directory,
        lambda copy, rng: replace_value(copy / file, place, value),
        rng.getrandbits(32),
    )


# ---- what the commands make of it


def run(words: list[str], printed: pathlib.Path) -> Answer:
    """Run a command as a terminal does; what it printed is in a file."""
    os.truncate(printed, 0)
    try:
        entry_point(lambda: run_command(words))
        answer = Answer("right")
    except SystemExit as exit:
        text = str(exit.code)
        is_sentence = text.startswith("error: ") and "\n" not in text and len(text) < 2000
        answer = Answer("sentence" if is_sentence else "traceback", text)
    except BaseException:  # a panic of Rust is no Exception
        answer = Answer("traceback", traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    shown = printed.read_text(encoding="utf-8", errors="replace") + answer.text
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]|panicked at|Traceback", shown.replace("\r", "")):
        return Answer("traceback", shown[-1500:])
    return answer


def evaluate(directory: pathlib.Path, backend: str, home: pathlib.Path) -> Answer:
    """Measure bits per byte of TEXT."""
    to = home / f"{directory.name}-{backend}.json"
    words = ["evaluate", "--model", str(directory), "--backend", backend, "--to", str(to)]
    answer = run([*words, "--tasks", f"bits_per_byte/t=text:{home / 'text.txt'}"], home / "printed")
    if answer.outcome == "right":
        scores = json.loads(to.read_text(encoding="utf-8"))["results"]
        answer.bits = scores["bits_per_byte/t"]["bits_per_byte,none"]
    return answer


def judge(
    copy: pathlib.Path, expected: float | None, may_change: bool, home: pathlib.Path
) -> list[Answer]:
    """Let every command read a directory. Return what each made of it.

    Args:
        copy: the damaged directory.
        expected: bits per byte of the undamaged one; None: not known yet.
        may_change: whether the damage may have made another model.
        home: for outputs.
    """
    answers = []
    found = evaluate(copy, "jax", home)
    found.text = f"evaluate: {found.text}"
    answers.append(found)
    is_same = is_near(found.bits, expected)
    if found.outcome == "right" and (may_change or not is_same):
        # transformers opens no model beside a bad one, and takes nothing from it that counts here
        (copy / "generation_config.json").unlink(missing_ok=True)
        theirs = evaluate(copy, "hf", home)
        # what transformers refuses for a key that decides nothing here has the numbers of before
        is_right = is_same if theirs.outcome == "sentence" else is_near(found.bits, theirs.bits)
        if not may_change or not is_right:
            text = f"{found.bits} bits per byte, {expected} before; transformers: {theirs}"
            answers.append(Answer("wrong", text))
    outputs = {"export_hf": home / "export", "initialize": home / "run"}
    for command, out in outputs.items():
        more = ["--probe", "0"] if command == "initialize" else []
        made = run([command, "--from", str(copy), "--to", str(out), *more], home / "printed")
        made.text = f"{command}: {made.text}"
        answers.append(made)
        if made.outcome != "right":
            continue
        again = evaluate(out, "jax", home)
        if again.bits != found.bits or again.outcome != found.outcome:
            text = f"{command} gives {again}, the directory {found}"
            answers.append(Answer("wrong", text))
        if list(out.glob("**/*.py")) or "auto_map" in read_texts(out):
            answers.append(Answer("wrong", f"{command} copies code of strangers"))
    shown = run(["report", "--lineage", str(copy)], home / "printed")
    answers.append(Answer(shown.outcome, f"report: {shown.text}"))
    return answers


def is_near(a: float | None, b: float | None) -> bool:
    """Return whether two backends' numbers agree."""
    if a is None or b is None:
        return a is b
    return abs(a - b) <= KL_BITS


def read_texts(directory: pathlib.Path) -> str:
    """Return the JSON files of a directory, one after the other."""
    return "".join(file.read_text(encoding="utf-8") for file in directory.glob("**/*config.json"))


def refuse_connection(*where: Any, **how: Any) -> None:
    """Stand in for connecting."""
    raise RuntimeError(f"a connection to {where} was opened")


def judge_in_child(
    case: Case, expected: float | None, home: pathlib.Path, limit: float
) -> list[Answer]:
    """Copy a directory, damage the copy, and let a forked child read it."""
    copy = home / "model"
    may_change = not case.model.name.endswith("-exported")
    shutil.copytree(case.model, copy)
    case.damage(copy, random.Random(case.seed))
    (home / "text.txt").write_text(TEXT)
    child = os.fork()
    if not child:
        descriptor = os.open(home / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(home)
        socket.socket.connect = socket.getaddrinfo = refuse_connection
        try:
            found = [
                dataclasses.asdict(answer) for answer in judge(copy, expected, may_change, home)
            ]
            (home / "answers.json").write_text(json.dumps(found))
        except BaseException:
            os.write(descriptor, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)
    ended = watch(child, limit)
    if ended:
        return [Answer("hang", ended)]
    try:
        answers = json.loads((home / "answers.json").read_text())
    except OSError:
        printed = (home / "printed").read_text(encoding="utf-8", errors="replace")
        return [Answer("traceback", f"the process died: {printed[-1500:]}")]
    return [Answer(**answer) for answer in answers]


def watch(child: int, limit: float) -> str:
    """Wait for a child; end it at a limit. Return which one, or ""."""
    start = time.monotonic()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        n_bytes = resident_bytes(child) - resident_bytes(os.getpid())
        seconds = time.monotonic() - start
        if n_bytes > CASE_BYTES or seconds > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"{seconds:.0f} s, {n_bytes / 1e9:.1f} GB"
        time.sleep(0.02)
    return ""


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/statm").read_text("ascii").split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


WORST = ("hang", "traceback", "wrong")  # else a case has the outcome of evaluate


def campaign(home: pathlib.Path, n_cases: int, seed: int, only: str) -> bool:
    """Print the table; return whether every case ended well."""
    maker = os.fork()
    if not maker:
        make_models(home, FAMILIES)
        os._exit(0)
    assert os.waitpid(maker, 0)[1] == 0
    expected = {}
    for name in FAMILIES:
        whole = Case(name, home / name, lambda copy, rng: None, 0)
        found = run_case(whole, None, home)
        assert all(answer.outcome != "wrong" for answer in found), found
        expected[name] = found[0].bits
        assert expected[name], found
    table: dict[str, collections.Counter[str]] = {}
    for case in list_cases(home, n_cases, seed):
        if not re.search(only, case.name):
            continue
        answers = run_case(case, expected[case.model.name.removesuffix("-exported")], home)
        outcomes = [answer.outcome for answer in answers]
        worst = next((name for name in WORST if name in outcomes), outcomes[0])
        kind = case.name.partition(": ")[0].rpartition("/")[2]
        table.setdefault(kind, collections.Counter())[worst] += 1
        if only or worst in WORST:
            print(f"{worst}: {case.name} (in {case.model.name})", file=sys.stderr)
            for answer in answers:
                if only or answer.outcome == worst:
                    text = f"    {answer.outcome}, {answer.bits}: {answer.text[-SHOWN:]}"
                    print(text, file=sys.stderr, flush=True)
    print_table(table)
    bad = sum(counts[name] for counts in table.values() for name in WORST)
    return not bad


def run_case(case: Case, expected: float | None, home: pathlib.Path) -> list[Answer]:
    """Judge a case in a directory of its own."""
    place = pathlib.Path(tempfile.mkdtemp(dir=home))
    try:
        return judge_in_child(case, expected, place, CASE_SECONDS)
    finally:
        shutil.rmtree(place)


def print_table(table: dict[str, collections.Counter[str]]) -> None:
    """Print a row per kind of file."""
    heads = ("sentence", "right", "wrong", "traceback", "hang")
    print(f"| damaged | cases | {' | '.join(heads)} |\n|---|---|{'---|' * len(heads)}")
    total = sum(table.values(), collections.Counter())
    for name, counts in [*sorted(table.items()), ("all", total)]:
        cells = [counts[head] for head in heads]
        print(f"| {name} | {sum(cells)} | {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only cases whose names match this pattern")
    asked = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # the programs run for a moment
    with tempfile.TemporaryDirectory() as home:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{home}/programs"
        jax.config.update("jax_compilation_cache_dir", f"{home}/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        sys.exit(0 if campaign(pathlib.Path(home), asked.cases, asked.seed, asked.only) else 1)


if __name__ == "__main__":
    main()

"""Try a tokenizer.json in a program of its own, with bounded time and memory.

A file of strangers may panic in Rust, overflow its stack, search for a pattern without end or
multiply text. tokenizer.py starts this file: it reads a tokenizer.json from stdin and prints why it
is of no use; nothing where it is. It imports nothing of jaxpt, to start in 0.1 s.
"""

from __future__ import annotations

import base64
import json
import math
import resource
import sys
from typing import Any

CPU_SECONDS = 30  # 1.5 are taken by the largest in use, of 34 MB
MEMORY_BYTES = 8 << 30
MAX_GROWTH = 100  # characters that one becomes; NFKC's largest is 18
MAX_ID = 2**31 - 1
PROBE = (
    "The Ship sailed at 12:30,  and nobody said 'no'.\n\tif x >= 10: y = [é, 日本, 😀]\r\n"
    + 30 * "a"
)


def main() -> None:
    """Print why the file is of no use."""
    for limit, value in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    text = sys.stdin.buffer.read().decode("utf-8")
    try:
        reason = find_fault(json.loads(text)) or try_out(text)
    except BaseException as error:  # a panic of Rust is no Exception
        reason = str(error).partition("\n")[0] or type(error).__name__
    sys.stdout.buffer.write(reason.encode("utf-8", "backslashreplace"))


def find_fault(form: dict[str, Any]) -> str:
    """Return what in a tokenizer.json makes it of no use, or ""."""
    for name in ("normalizer", "decoder"):
        growth = measure_growth(form.get(name))
        if growth > MAX_GROWTH:
            return f"its {name} may make a text {growth:,.0f} times as long"
    n_added = count_template_tokens(form.get("post_processor"))
    if n_added > MAX_GROWTH:
        return f"its post_processor adds {n_added:,} tokens to every text"
    vocabulary = form["model"]["vocab"]
    if isinstance(vocabulary, dict) and len(set(vocabulary.values())) < len(vocabulary):
        return "two tokens have one id"
    return ""


def measure_growth(step: dict[str, Any] | None) -> float:
    """Return how many times as long a normalizer or decoder may make a text."""
    if step is None:
        return 1
    if step["type"] == "Sequence":
        steps = step.get("normalizers") or step.get("decoders") or []
        return math.prod(map(measure_growth, steps))
    if step["type"] == "Replace":
        n_replaced = len(step["pattern"].get("String", "x"))
        return max(1, len(step["content"]) / max(1, n_replaced))
    if step["type"] == "Prepend":
        return max(1, len(step["prepend"]))
    if step["type"] == "Precompiled":
        charsmap = base64.b64decode(step["precompiled_charsmap"])
        n_trie = int.from_bytes(charsmap[:4], "little")
        return max(map(len, charsmap[4 + n_trie :].split(b"\0")), default=1)
    return 1


def count_template_tokens(step: dict[str, Any] | None) -> int:
    """Return how many tokens a post-processor adds to a text."""
    if step is None:
        return 0
    if step["type"] == "Sequence":
        return sum(map(count_template_tokens, step["processors"]))
    if step["type"] != "TemplateProcessing":
        return 0
    named = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
    parts = [*step["single"], *step["pair"]]
    names = [part["SpecialToken"]["id"] for part in parts if "SpecialToken" in part]
    return len(parts) + sum(named[name] for name in names)


def try_out(text: str) -> str:
    """Return what is wrong with the tokenizer's work on PROBE, or ""."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        return "it has no tokens"
    largest = max(vocabulary.values())
    if largest > MAX_ID:
        return f"it has the id {largest:,}, and ids end at {MAX_ID:,}"
    bare = backend.encode(PROBE, add_special_tokens=False)
    full = backend.encode(PROBE)
    backend.encode("a")
    if max([0, *bare.ids, *full.ids]) > MAX_ID:
        return f"it gives ids above {MAX_ID:,}"
    backend.decode(bare.ids)
    backend.decode_batch([full.ids, bare.ids])
    return ""


if __name__ == "__main__":
    main()

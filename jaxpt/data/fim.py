"""Fill-in-the-middle: documents rearranged so that a causal model learns to write what is missing.

A document is cut at two characters into prefix, middle and suffix, and becomes one of

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

each half of the time, between its bos and eos, with every token trained on. Which documents, where
they are cut and in which form depends on their text alone. prefix + middle + suffix is the document
to the character.

Source: Bavarian et al. 2022, "Efficient training of language models to fill in the middle"; SPM is
its second variant, as in Code Llama.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxpt.data.tokenizer import Tokenizer
from jaxpt.spec import UserError

if TYPE_CHECKING:
    import tokenizers

# of prefix, suffix and middle, in the order that they are looked for
TOKEN_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
N_ADDED_TOKENS = 3


class Pieces(NamedTuple):
    """A document in three, each at least a character long."""

    prefix: str
    middle: str
    suffix: str
    is_psm: bool  # else SPM


def cut_document(text: str, rate: float) -> Pieces | None:
    """Return the pieces of a document, or None: it stays as it is.

    Args:
        text: the document; below three characters it stays as it is.
        rate: of documents that are cut.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=32, person=b"jaxpt fim").digest()
    chance, first, second, form = np.frombuffer(digest, "<u8").tolist()
    n_cuts = len(text) - 1
    if n_cuts < 2 or chance >= rate * 2**64:
        return None
    start = first % n_cuts
    stop = second % (n_cuts - 1)
    stop += stop >= start  # two different cuts, every pair as likely
    start, stop = sorted((start + 1, stop + 1))
    return Pieces(text[:start], text[start:stop], text[stop:], form % 2 == 0)


class FimEncoder:
    """Ids of rearranged documents, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        """Find the tokenizer's three tokens.

        Raises:
            UserError: it has none.
        """
        vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
        known = [names for names in TOKEN_NAMES if vocabulary.keys() >= set(names)]
        if not known:
            usual = ", ".join(TOKEN_NAMES[0])
            raise UserError(
                f"pack.fim_rate: the tokenizer has no tokens for fill-in-the-middle, such as "
                f"{usual}. Train one with these as tokenizer.control_tokens, adopt one that has "
                "them, or set pack.fim_rate=0."
            )
        self.tokenizer = tokenizer
        self.prefix_id, self.suffix_id, self.middle_id = (vocabulary[name] for name in known[0])
        self.inner = without_prefix_space(tokenizer)

    def encode_documents(self, documents: list[Pieces]) -> list[np.ndarray]:
        """Return bos + the rearranged pieces + eos of each, int32."""
        bos_id = self.tokenizer.bos_id
        bos = [] if bos_id is None else [bos_id]
        prefixes = self.tokenizer.encode_batch([pieces.prefix for pieces in documents])
        inner = [text for pieces in documents for text in (pieces.middle, pieces.suffix)]
        encodings = self.inner.encode_batch_fast(inner, add_special_tokens=False)
        found = []
        for i, prefix in enumerate(prefixes):
            middle, suffix = encodings[2 * i].ids, encodings[2 * i + 1].ids
            if documents[i].is_psm:
                before = [self.prefix_id, *prefix, self.suffix_id, *suffix, self.middle_id]
            else:
                before = [self.prefix_id, self.suffix_id, *suffix, self.middle_id, *prefix]
            ids = [*bos, *before, *middle, self.tokenizer.eos_id]
            found.append(np.array(ids, np.int32))
        return found


def without_prefix_space(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return the library's form for the inside of a text: no space is put in front."""
    form = json.loads(tokenizer.backend.to_str())
    form["normalizer"] = drop_prefix_space(form["normalizer"])
    form["pre_tokenizer"] = drop_prefix_space(form["pre_tokenizer"])
    inner = type(tokenizer.backend).from_str(json.dumps(form))
    inner.encode_special_tokens = True
    return inner


def drop_prefix_space(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer of tokenizer.json that puts nothing before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    changed = dict(step)
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            changed[key] = [part for part in map(drop_prefix_space, step[key]) if part]
    if step["type"] == "Metaspace":
        changed |= {"prepend_scheme": "never", "add_prefix_space": False}
    elif "add_prefix_space" in step:
        changed["add_prefix_space"] = False
    return changed

"""Embedding and head rows for another tokenizer.

Kept tokens are copied; new ones start as the mean of the old tokens that spell them.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data import tokenizer
from jaxpt.data.tokenizer import Tokenizer
from jaxpt.spec import SpecialTokens, UserError

# put before a token to see it within a line: few tokenizers merge a digit with what follows
ANCHOR_TEXT = "7"


class TokenMapping(NamedTuple):
    """A new vocabulary as old ids.

    Attributes:
        old_ids: row i is the row of old_ids[i], their mean if there are several, the mean of all
            old rows if there are none (the least surprising vector: its logit is the average one).
            Padding rows have none.
        tokenizer_dir: of the new vocabulary.
    """

    old_ids: list[list[int]]
    tokenizer_dir: pathlib.Path


def map_tokens(
    old_dir: pathlib.Path, new_dir: pathlib.Path, vocab_size: int
) -> tuple[TokenMapping, SpecialTokens]:
    """Map the new tokenizer's tokens to old ids, padded to a multiple of 128 rows.

    Args:
        old_dir: the model's tokenizer.
        new_dir: the new tokenizer.
        vocab_size: the model's embedding rows.

    Returns:
        The mapping, and the new tokenizer's special tokens.

    Raises:
        UserError: the old tokenizer has more tokens than the model has rows.
    """
    old = tokenizer.load_tokenizer(old_dir)
    new = tokenizer.load_tokenizer(new_dir)
    if old.n_text_ids > vocab_size:
        raise UserError(
            f"new_tokenizer: expected a tokenizer of at most {vocab_size} tokens, the model's "
            f"embedding rows, got {old_dir} with {old.n_text_ids}. It is not the model's tokenizer."
        )
    # control tokens may lie beyond the rows, such as a <pad> that was added
    old_vocab = {
        token: i
        for token, i in old.backend.get_vocab(with_added_tokens=True).items()
        if i < vocab_size
    }
    new_vocab = new.backend.get_vocab(with_added_tokens=True)
    special_ids = {new.bos_id: old.bos_id, new.eos_id: old.eos_id}
    added = new.backend.get_added_tokens_decoder()
    controls = {i for i, token in added.items() if token.special}
    n_rows = pad_vocab_size(new.vocab_size)
    old_ids: list[list[int]] = [[] for _ in range(n_rows)]
    unknown: dict[int, str] = {}  # tokens that the old tokenizer has to spell
    for token, i in new_vocab.items():
        special_id = special_ids.get(i)
        if special_id is not None:
            old_ids[i] = [special_id]
            continue
        text = token_text(new, i)
        old_id = old_vocab.get(token)
        # the same text: the two may write a space differently
        if old_id is not None and token_text(old, old_id) == text:
            old_ids[i] = [old_id]
        elif i not in controls:
            unknown[i] = text
    spelled = spell_tokens(old, list(unknown.values()))
    for i, ids in zip(unknown, spelled, strict=True):
        old_ids[i] = ids
    return TokenMapping(old_ids, new_dir), new.special_tokens


def token_text(encoder: Tokenizer, i: int) -> str:
    """Return the text that a token adds after another one, its leading space included.

    Alone, many decoders strip that space.
    """
    (anchor,) = encoder.encode_batch([ANCHOR_TEXT])
    anchor_text = encoder.decode(anchor)
    text = encoder.decode([*anchor, i])
    return text[len(anchor_text) :]


def spell_tokens(old: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the old ids of each text within a line; empty for a part of a character."""
    (anchor,) = old.encode_batch([ANCHOR_TEXT])
    anchored_texts = [ANCHOR_TEXT + text for text in texts]
    bare_texts = [text.removeprefix(" ") for text in texts]
    after_anchor = old.encode_batch(anchored_texts)
    alone = old.encode_batch(bare_texts)
    spelled = []
    for text, ids, bare in zip(texts, after_anchor, alone, strict=True):
        if not text or "\ufffd" in text:
            spelled.append([])
        elif ids[: len(anchor)] == anchor:  # the text was not merged with the anchor
            spelled.append(ids[len(anchor) :])
        else:
            spelled.append(bare)
    return spelled


def average_embeddings(leaf: jax.Array, mapping: TokenMapping, axis: int) -> jax.Array:
    """Return the new rows of an embedding or head: one gather and one segment sum.

    Args:
        leaf: [.., V, ..].
        mapping: new vocabulary as old ids.
        axis: of V.
    """
    counts = np.asarray(list(map(len, mapping.old_ids)))
    n_new = len(counts)
    new_ids = np.arange(n_new, dtype=np.int32)
    new_row = np.repeat(new_ids, counts)
    flat_ids = itertools.chain.from_iterable(mapping.old_ids)
    old_row = np.asarray(list(flat_ids), np.int32)
    share = (1 / counts[new_row]).astype(np.float32)
    old = jnp.moveaxis(leaf, axis, 0)
    old = old.astype(jnp.float32)
    parts = old[old_row] * share[:, None]
    averaged = jax.ops.segment_sum(parts, new_row, n_new)
    has_none = (counts == 0)[:, None]
    rows = jnp.where(has_none, jnp.mean(old, axis=0), averaged)
    return jnp.moveaxis(rows.astype(leaf.dtype), 0, axis)


def pad_vocab_size(vocab_size: int) -> int:
    """Return the rows for a vocabulary: a multiple of 128, for tensor cores and meshes."""
    n_blocks = -(-vocab_size // 128)
    return n_blocks * 128

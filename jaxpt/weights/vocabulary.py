"""Rows of the embedding and head for another tokenizer: kept pieces are copied, new ones start as the mean of their old pieces."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.data import tokenizer
from jaxpt.spec import UserError

ANCHOR_TEXT = "7"  # stands before a piece to see it within a line: few tokenizers let a digit grow together with what follows


class TokenMapping(NamedTuple):
    """A new vocabulary as old ids: row i is old_ids[i]'s row, their mean where there are several, the mean of all old rows
    where there are none (the least surprising vector: its logit is the average one). Padding rows have none.
    """

    old_ids: list[list[int]]
    tokenizer_dir: pathlib.Path  # of the new vocabulary


def map_tokens(
    old_dir: pathlib.Path, new_dir: pathlib.Path, vocab_size: int
) -> tuple[TokenMapping, dict[str, int | None]]:
    """(the new tokenizer's pieces as old ids, {bos_id, eos_id} of the new one), padded to a multiple of 128 rows.

    vocab_size  the model's rows; the old tokenizer must stay below it, else UserError
    """
    old, new = tokenizer.load_tokenizer(old_dir), tokenizer.load_tokenizer(new_dir)
    if old.vocab_size > vocab_size:
        raise UserError(
            f"new_tokenizer: {old_dir} has {old.vocab_size} pieces, the model only {vocab_size} rows. It is not the model's own tokenizer."
        )
    known = old.backend.get_vocab(with_added_tokens=True)
    pieces = {i: piece for piece, i in new.backend.get_vocab(with_added_tokens=True).items()}
    twins = {new.bos_id: old.bos_id, new.eos_id: old.eos_id}
    controls = {i for i, token in new.backend.get_added_tokens_decoder().items() if token.special}
    old_ids: list[list[int]] = [[] for _ in range(pad_vocab_size(new.vocab_size))]
    unknown: dict[int, str] = {}  # pieces that the old tokenizer has to spell
    for i, piece in pieces.items():
        if twins.get(i) is not None:
            old_ids[i] = [twins[i]]
        elif piece in known and is_same_kind(piece, known[piece], i, old, new):
            old_ids[i] = [known[piece]]
        elif i not in controls:
            unknown[i] = token_text(new, i)
    spelled = spell_tokens(old, list(unknown.values()))
    for i, ids in zip(unknown, spelled, strict=True):
        old_ids[i] = ids
    return TokenMapping(old_ids, new_dir), {"bos_id": new.bos_id, "eos_id": new.eos_id}


def is_same_kind(
    piece: str, old_id: int, new_id: int, old: tokenizer.Tokenizer, new: tokenizer.Tokenizer
) -> bool:
    """Whether a piece of the same name means the same text: the two may write a space in another way."""
    return token_text(old, old_id) == token_text(new, new_id)


def token_text(of: tokenizer.Tokenizer, i: int) -> str:
    """The text that a piece adds behind another one, its leading space included (alone, many decoders strip that)."""
    (anchor,) = of.encode_batch([ANCHOR_TEXT])
    return of.decode([*anchor, i])[len(of.decode(anchor)) :]


def spell_tokens(old: tokenizer.Tokenizer, texts: list[str]) -> list[list[int]]:
    """Old ids of each text as it stands within a line; empty for a piece that is no text by itself (a part of a character)."""
    (start,) = old.encode_batch([ANCHOR_TEXT])
    behind = old.encode_batch([ANCHOR_TEXT + text for text in texts])
    alone = old.encode_batch([text.removeprefix(" ") for text in texts])
    found = []
    for text, ids, bare in zip(texts, behind, alone, strict=True):
        if not text or "\ufffd" in text:
            found.append([])
        elif (
            ids[: len(start)] == start
        ):  # the piece did not grow together with what stands before it
            found.append(ids[len(start) :])
        else:
            found.append(bare)
    return found


def average_embeddings(leaf: jax.Array, words: TokenMapping, axis: int) -> jax.Array:
    """[.., V, ..] -> [.., V', ..] along the axis: one gather and one segment sum."""
    n_new = len(words.old_ids)
    new_row = np.concatenate(
        [np.full(len(ids), row, np.int32) for row, ids in enumerate(words.old_ids) if ids]
    )
    old_row = np.concatenate([np.asarray(ids, np.int32) for ids in words.old_ids if ids])
    share = np.concatenate(
        [np.full(len(ids), 1 / len(ids), np.float32) for ids in words.old_ids if ids]
    )
    empty = np.asarray([not ids for ids in words.old_ids])
    old = jnp.moveaxis(leaf, axis, 0).astype(jnp.float32)
    mixed = jax.ops.segment_sum(old[old_row] * share[:, None], new_row, n_new)
    rows: Any = jnp.where(empty[:, None], jnp.mean(old, axis=0), mixed)
    return jnp.moveaxis(rows.astype(leaf.dtype), 0, axis)


def pad_vocab_size(vocab_size: int) -> int:
    """Rows for so many pieces: a multiple of 128, which tensor cores and meshes cut evenly."""
    return -(-vocab_size // 128) * 128

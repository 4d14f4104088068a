"""Rows of the embedding and head for another tokenizer: kept pieces are copied, new ones start as the mean of their old pieces."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.model import llama
from jaxpt.spec import ModelSpec, UserError


def reword(spec: ModelSpec, params: dict[str, Any], old_ids_of: list[list[int]], mesh) -> tuple[ModelSpec, dict[str, Any]]:
    """The same model over a new vocabulary.

    old_ids_of[i]  the old ids whose rows make new row i: one id copies a row, several are averaged, none takes the mean
                   of all old rows (the least surprising vector: its logit is the average one)

    The vocabulary is rounded up to a multiple of 128; padding rows are means too, so that none is dead or huge.
    Raises UserError when an old id is beyond the old vocabulary.
    """
    highest = max((i for ids in old_ids_of for i in ids), default=0)
    if highest >= spec.vocab_size:
        raise UserError(
            f"new vocabulary: old id {highest} is beyond the model's {spec.vocab_size} rows. Give the tokenizer that the model was trained with."
        )
    n_new = round_up(len(old_ids_of))
    ids = list(old_ids_of) + [[]] * (n_new - len(old_ids_of))
    # one flat list of (new row, old row, share), so that the whole map is one gather and one segment sum
    new_row = np.concatenate([np.full(len(each), row, np.int32) for row, each in enumerate(ids) if each])
    old_row = np.concatenate([np.asarray(each, np.int32) for each in ids if each])
    share = np.concatenate([np.full(len(each), 1 / len(each), np.float32) for each in ids if each])
    empty = np.asarray([not each for each in ids])
    child = spec.replace(vocab_size=n_new)

    def rows_of(old):  # [V, D] -> [V', D]
        mixed = jax.ops.segment_sum(old.astype(jnp.float32)[old_row] * share[:, None], new_row, n_new)
        return jnp.where(empty[:, None], jnp.mean(old.astype(jnp.float32), axis=0), mixed).astype(old.dtype)

    def map_rows(params):
        changed = {**params, "embed": rows_of(params["embed"])}
        if "unembed" in params:
            changed["unembed"] = rows_of(params["unembed"].T).T
        return changed

    return child, jax.jit(map_rows, out_shardings=llama.shardings(child, mesh))(params)


def round_up(n_pieces: int) -> int:
    """Rows for so many pieces: a multiple of 128, which tensor cores and meshes cut evenly."""
    return -(-n_pieces // 128) * 128

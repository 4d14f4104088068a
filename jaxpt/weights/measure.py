"""What the layers, heads, neurons and channels of a model do to given rows: figures that growth reports, and that pruning chooses by."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpt.model import llama
from jaxpt.model.attention import attend
from jaxpt.sharding import make_batch_sharding, make_replicated_sharding, with_logical_constraint
from jaxpt.spec import Batch, ModelSpec, UserError


class LayerStatistics(NamedTuple):
    """Of each layer, over all real tokens; float64 [L].

    rms        root mean square of the residual stream behind the layer
    influence  1 - mean cosine between the residual before and behind it: 0 for a layer that does nothing
               (ShortGPT, 2403.03853, section 2.2)
    """

    rms: np.ndarray
    influence: np.ndarray


def measure_layers(
    spec: ModelSpec, params: dict[str, Any], batches: Iterable[Batch]
) -> LayerStatistics:
    """Of a model with params as in model/llama.py, over batches on their mesh; float32 throughout.

    Raises UserError when the batches hold no token.
    """
    sums = sum_over_batches(spec, params, batches, sum_layer_statistics)
    return LayerStatistics(
        np.sqrt(sums["squares"] / sums["tokens"]), 1 - sums["cosine"] / sums["tokens"]
    )


def measure_copy_similarity(
    spec: ModelSpec,
    params: dict[str, Any],
    layer_map: Sequence[int | None],
    batches: Iterable[Batch],
) -> list[dict[str, Any]]:
    """How alike neighbouring copies of one source still are: for each pair {"source", "layers": [i, j], "cosine"}, the mean
    over tokens of the cosine between what layers i and j add to the residual; 0 where one of them adds nothing.

    layer_map[i]  the source of layer i; None: it has none

    Raises UserError when the batches hold no token.
    """
    copies: dict[int, list[int]] = {}
    for layer, source in enumerate(layer_map):
        if source is not None:
            copies.setdefault(source, []).append(layer)
    pairs = sorted((i, j) for layers in copies.values() for i, j in itertools.pairwise(layers))
    if not pairs:
        return []
    slot_of = {
        source: slot
        for slot, source in enumerate(
            source for source, layers in copies.items() if len(layers) > 1
        )
    }
    slots = tuple(slot_of.get(source, len(slot_of)) for source in layer_map)
    sums = sum_over_batches(spec, params, batches, sum_copy_similarity, slots)
    return [
        {
            "source": layer_map[i],
            "layers": [i, j],
            "cosine": float(sums["cosine"][j] / sums["tokens"]),
        }
        for i, j in pairs
    ]


def measure_importance(
    spec: ModelSpec, params: dict[str, Any], batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    """How much each part of a width says, as means over all real tokens; float64.

    heads  [L, N]  L2 norm of the head's output, before `o`
    mlp    [L, F]  |silu(gate) x up| of the neuron
    embed  [D]     |channel| behind every norm, the final one included, summed

    Source: Minitron (2407.14679), section 2.2. Raises UserError when the batches hold no token.
    """
    sums = sum_over_batches(spec, params, batches, sum_importance)
    return {name: sums[name] / sums["tokens"] for name in ("heads", "mlp", "embed")}


def select_important(scores: np.ndarray, n: int) -> np.ndarray:
    """Indices [..., n] of the n highest scores along the last axis, in rising order; of equal ones those of lower index."""
    return np.sort(np.argsort(-np.asarray(scores), axis=-1, kind="stable")[..., :n], axis=-1)


def select_heads(
    scores: np.ndarray, n_heads: int, n_kv_heads: int, new_heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """(query heads [L, new_heads], kv heads [L, new_heads / group]) to keep, by scores [L, N]: whole groups, a kv head with all
    query heads that read it, whose heads' scores sum highest.

    Raises UserError when new_heads is not so many whole groups.
    """
    group = n_heads // n_kv_heads
    if new_heads % group or not group <= new_heads <= n_heads:
        raise UserError(
            f"heads={new_heads}: the {n_heads} query heads share kv heads by {group}. Use a multiple of {group} from {group} to {n_heads}."
        )
    L = len(scores)
    kv = select_important(np.reshape(scores, (L, n_kv_heads, group)).sum(-1), new_heads // group)
    return (kv[:, :, None] * group + np.arange(group)).reshape(L, new_heads), kv


# ---- sums of one batch, traced: every array over real tokens


def sum_layer_statistics(spec: ModelSpec, params, batch: Batch) -> dict[str, jax.Array]:
    def visit(block, x, rope, attend, _):
        y = block(x, rope, attend)
        return (
            y,
            None,
            {
                "squares": sum_over_tokens(batch, jnp.mean(y * y, axis=-1)),
                "cosine": sum_over_tokens(batch, cosine_similarity(x, y)),
            },
        )

    return visit_layers(spec, params, batch, visit)[1]


def sum_copy_similarity(
    spec: ModelSpec, params, batch: Batch, slots: tuple[int, ...]
) -> dict[str, jax.Array]:
    """slots[i]: where layer i's source keeps its last copy's write; the highest slot is for layers that have no twin."""

    def visit(block, x, rope, attend, carry):
        writes, layer = (
            carry  # only sources that have twins are held: a whole stack of writes would be as large as training's
        )
        y = block(x, rope, attend)
        slot = jnp.asarray(slots)[layer]
        found = sum_over_tokens(batch, cosine_similarity(y - x, writes[slot]))
        writes = with_logical_constraint(
            writes.at[slot].set(y - x), None, "batch", "position", "act_embed"
        )
        return y, (writes, layer + 1), {"cosine": found}

    empty = jnp.zeros((max(slots) + 1, *batch.tokens.shape, spec.d_model))
    return visit_layers(
        spec,
        params,
        batch,
        visit,
        (with_logical_constraint(empty, None, "batch", "position", "act_embed"), jnp.int32(0)),
    )[1]


def sum_importance(spec: ModelSpec, params, batch: Batch) -> dict[str, jax.Array]:
    def visit(block, x, rope, attend, _):
        mixed = None

        def attend_and_keep(q, k, v):
            nonlocal mixed
            mixed = attend(q, k, v)
            return mixed

        before_attention = llama.rms_norm(x, block.attn_norm[...], block.eps)
        x = x + block.attention(before_attention, rope, attend_and_keep)
        before_mlp = llama.rms_norm(x, block.mlp_norm[...], block.eps)
        sums = {
            "heads": sum_over_tokens(batch, jnp.linalg.norm(mixed, axis=-1)),
            "mlp": sum_over_tokens(batch, jnp.abs(block.neurons(before_mlp))),
            "embed": sum_over_tokens(batch, jnp.abs(before_attention) + jnp.abs(before_mlp)),
        }
        return x + block.feed_forward(before_mlp), None, sums

    x, sums = visit_layers(spec, params, batch, visit)
    final = jnp.abs(llama.rms_norm(x, params["norm"], spec.norm_eps))
    return {**sums, "embed": jnp.sum(sums["embed"], axis=0) + sum_over_tokens(batch, final)}


def visit_layers(
    spec: ModelSpec, params, batch: Batch, visit: Callable, carry=None
) -> tuple[jax.Array, Any]:
    """A batch through the layers. visit(block, x, rope, attend, carry) -> (the block's output, carry, found).

    Returns the residual stream behind the last layer, float32 [B, T, D], and what was found, stacked [L, ...].
    """
    model = llama.bind_params(spec, params)
    table = with_logical_constraint(
        model.embed[...], "vocab", None
    )  # gathered along its width first, as in Llama.__call__
    x = with_logical_constraint(
        table[batch.tokens].astype(jnp.float32), "batch", "position", "act_embed"
    )
    rope = llama.compute_rope(spec, batch.positions)
    blocks, stacked = nnx.split(model.blocks)

    def layer(state, one):
        x, carry = state
        within = functools.partial(
            attend, segment_ids=batch.segment_ids, window=spec.sliding_window
        )
        x, carry, found = visit(nnx.merge(blocks, one), x, rope, within, carry)
        return (with_logical_constraint(x, "batch", "position", "act_embed"), carry), found

    (x, _), found = jax.lax.scan(layer, (x, carry), stacked)
    return x, found


def sum_over_tokens(batch: Batch, x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [...], summed over the tokens that are no padding."""
    real = (batch.segment_ids > 0).reshape(*batch.segment_ids.shape, *[1] * (x.ndim - 2))
    return jnp.sum(jnp.where(real, x, 0), axis=(0, 1))


def cosine_similarity(x: jax.Array, y: jax.Array) -> jax.Array:
    """Along the last axis; 0 where one of them is 0."""
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(x * y, axis=-1) / jnp.maximum(norms, jnp.finfo(x.dtype).tiny)


# ---- running them


def sum_over_batches(
    spec: ModelSpec, params, batches: Iterable[Batch], sums: Callable, *settings
) -> dict[str, np.ndarray]:
    """Sums over all batches, float64, and "tokens", the number of real ones. The divisions are the caller's."""
    step = jit_sums(spec, jax.tree.leaves(params)[0].sharding.mesh, sums, *settings)
    total: dict[str, np.ndarray] = {"tokens": np.float64(0)}
    for batch in batches:
        total = {
            name: total.get(name, 0) + np.asarray(value, np.float64)
            for name, value in step(params, batch).items()
        }
    if not total["tokens"]:
        raise UserError(
            "measuring layers: the rows hold no token. Give held-out rows of text that the model knows."
        )
    return total


@functools.lru_cache(maxsize=8)
def jit_sums(spec: ModelSpec, mesh, sums: Callable, *settings):
    """The jitted step(params, batch) -> sums(spec, params, batch, *settings) and "tokens", on every device."""
    shardings = llama.make_param_shardings(spec, mesh)

    def step(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return {
                **sums(spec, params, batch, *settings),
                "tokens": jnp.sum(batch.segment_ids > 0),
            }

    return jax.jit(
        step,
        in_shardings=(shardings, make_batch_sharding(mesh)),
        out_shardings=make_replicated_sharding(mesh),
    )

"""Measure what layers, heads, MLP activations and channels do, for growth reports and pruning."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxpt.model import llama
from jaxpt.model.attention import attend
from jaxpt.sharding import make_batch_sharding, make_replicated_sharding, with_logical_constraint
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.weights.records_growth import CopySimilarity

Params = dict[str, Any]  # nested dict of arrays, see model/llama.py
Sums = dict[str, jax.Array]  # of one batch
RESIDUAL_AXES = ("batch", "position", "act_embed")


class LayerStatistics(NamedTuple):
    """Statistics of each layer over all real tokens; float64 [L].

    Attributes:
        rms: root mean square of the residual stream after the layer.
        influence: 1 - mean cosine between the residual before and after it: 0 for a layer that
            does nothing (ShortGPT, 2403.03853, section 2.2).
    """

    rms: np.ndarray
    influence: np.ndarray


def measure_layers(spec: ModelSpec, params: Params, batches: Iterable[Batch]) -> LayerStatistics:
    """Measure every layer, in float32.

    Args:
        spec: the architecture.
        params: as in model/llama.py.
        batches: on the mesh of params.

    Raises:
        UserError: the batches hold no token.
    """
    sums = sum_over_batches(spec, params, batches, sum_layer_statistics)
    n_tokens = sums["tokens"]
    return LayerStatistics(np.sqrt(sums["squares"] / n_tokens), 1 - sums["cosine"] / n_tokens)


def measure_copy_similarity(
    spec: ModelSpec, params: Params, layer_map: Sequence[int | None], batches: Iterable[Batch]
) -> list[CopySimilarity]:
    """Measure how alike neighboring copies of one layer still are.

    The cosine is the mean over tokens between what the two layers add to the residual; 0 where one
    of them adds nothing.

    Args:
        spec: the architecture.
        params: as in model/llama.py.
        layer_map: the source of each layer; None: it has none.
        batches: on the mesh of params.

    Raises:
        UserError: the batches hold no token.
    """
    copies: dict[int, list[int]] = {}
    for layer, source in enumerate(layer_map):
        if source is not None:
            copies.setdefault(source, []).append(layer)
    copied = [source for source, layers in copies.items() if len(layers) > 1]
    if not copied:
        return []
    slot_of = {source: slot for slot, source in enumerate(copied)}
    other = len(copied)
    slots = tuple(other if s is None else slot_of.get(s, other) for s in layer_map)
    sums = sum_over_batches(spec, params, batches, sum_copy_similarity, slots)
    pairs = []
    for source in copied:
        for i, j in itertools.pairwise(copies[source]):
            cosine = float(sums["cosine"][j] / sums["tokens"])
            pairs.append(CopySimilarity(source, (i, j), cosine))
    return sorted(pairs, key=lambda pair: pair.layers)


class Importance(NamedTuple):
    """How active each part of a width is, as means over all real tokens; float64.

    Attributes:
        heads: [L, N], L2 norm of the head's output, before `o`.
        mlp: [L, F], |silu(gate) x up|.
        embed: [D], |channel| after every norm, the final one included, summed.
    """

    heads: np.ndarray
    mlp: np.ndarray
    embed: np.ndarray


def measure_importance(spec: ModelSpec, params: Params, batches: Iterable[Batch]) -> Importance:
    """Measure every head, MLP activation and channel.

    Raises:
        UserError: the batches hold no token.

    Source: Minitron (2407.14679), section 2.2.
    """
    sums = sum_over_batches(spec, params, batches, sum_importance)
    return Importance(*(sums[name] / sums["tokens"] for name in Importance._fields))


def select_important(scores: np.ndarray, n: int) -> np.ndarray:
    """Return the indices [..., n] of the n highest scores along the last axis, in rising order.

    Of equal scores those of lower index win.
    """
    order = np.argsort(-np.asarray(scores), axis=-1, kind="stable")
    return np.sort(order[..., :n], axis=-1)


def select_heads(
    scores: np.ndarray, n_heads: int, n_kv_heads: int, new_heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (query heads [L, new_heads], kv heads [L, new_heads / group]) to keep.

    Whole groups are kept, a kv head with all query heads that read it: those of the highest sums.

    Args:
        scores: [L, N].
        n_heads: query heads.
        n_kv_heads: kv heads.
        new_heads: query heads to keep.

    Raises:
        UserError: new_heads is not a whole number of groups.
    """
    group = n_heads // n_kv_heads
    if new_heads % group or not group <= new_heads <= n_heads:
        raise UserError(
            f"heads={new_heads}: {group} of the {n_heads} query heads share one kv head. "
            f"Use a multiple of {group} from {group} to {n_heads}."
        )
    L = len(scores)
    group_scores = np.reshape(scores, (L, n_kv_heads, group)).sum(-1)
    kv_heads = select_important(group_scores, new_heads // group)
    heads = kv_heads[:, :, None] * group + np.arange(group)
    return heads.reshape(L, new_heads), kv_heads


# ---- sums over one batch, traced; every array is summed over real tokens


def sum_layer_statistics(spec: ModelSpec, params: Params, batch: Batch) -> Sums:
    """Return the sums behind LayerStatistics."""

    def visit(block, x, rope, attend, carry):
        y = block(x, rope, attend)
        squares = sum_over_tokens(batch, jnp.mean(y * y, axis=-1))
        cosine = sum_over_tokens(batch, cosine_similarity(x, y))
        return y, carry, {"squares": squares, "cosine": cosine}

    return visit_layers(spec, params, batch, visit)[1]


def sum_copy_similarity(
    spec: ModelSpec, params: Params, batch: Batch, slots: tuple[int, ...]
) -> Sums:
    """Return the sums behind CopySimilarity.

    Args:
        spec: the architecture.
        params: as in model/llama.py.
        batch: the tokens.
        slots: for each layer the slot that keeps the output of its source's last copy; the highest
            one is for layers without copies. A whole stack of outputs would be as large as
            training's.
    """

    def visit(block, x, rope, attend, carry):
        outputs, layer = carry
        y = block(x, rope, attend)
        slot = jnp.asarray(slots)[layer]
        cosine = sum_over_tokens(batch, cosine_similarity(y - x, outputs[slot]))
        outputs = outputs.at[slot].set(y - x)
        outputs = with_logical_constraint(outputs, None, *RESIDUAL_AXES)
        return y, (outputs, layer + 1), {"cosine": cosine}

    empty = jnp.zeros((max(slots) + 1, *batch.tokens.shape, spec.d_model))
    empty = with_logical_constraint(empty, None, *RESIDUAL_AXES)
    return visit_layers(spec, params, batch, visit, (empty, jnp.int32(0)))[1]


def sum_importance(spec: ModelSpec, params: Params, batch: Batch) -> Sums:
    """Return the sums behind Importance."""

    def visit(block, x, rope, attend, carry):
        attended = []

        def attend_and_keep(q, k, v):
            attended.append(attend(q, k, v))
            return attended[-1]

        attention_input = llama.rms_norm(x, block.attn_norm[...], block.eps)
        x = x + block.attention(attention_input, rope, attend_and_keep)
        mlp_input = llama.rms_norm(x, block.mlp_norm[...], block.eps)
        head_norms = jnp.linalg.norm(attended[-1], axis=-1)
        activations = jnp.abs(block.compute_mlp_activations(mlp_input))
        channels = jnp.abs(attention_input) + jnp.abs(mlp_input)
        sums = {
            "heads": sum_over_tokens(batch, head_norms),
            "mlp": sum_over_tokens(batch, activations),
            "embed": sum_over_tokens(batch, channels),
        }
        return x + block.mlp(mlp_input), carry, sums

    x, sums = visit_layers(spec, params, batch, visit)
    final = jnp.abs(llama.rms_norm(x, params["norm"], spec.norm_eps))
    embed = jnp.sum(sums["embed"], axis=0) + sum_over_tokens(batch, final)
    return {**sums, "embed": embed}


def visit_layers(
    spec: ModelSpec, params: Params, batch: Batch, visit: Callable, carry: Any = None
) -> tuple[jax.Array, Sums]:
    """Run a batch through the layers, as Llama.__call__ does.

    Args:
        spec: the architecture.
        params: as in model/llama.py.
        batch: the tokens.
        visit: (block, x, rope, attend, carry) -> (the block's output, carry, sums).
        carry: the first layer's carry.

    Returns:
        The residual stream after the last layer, float32 [B, T, D], and the sums, [L, ...].
    """
    model = llama.bind_params(spec, params)
    # gathered along its width first, as in Llama.__call__
    table = with_logical_constraint(model.embed[...], "vocab", None)
    x = table[batch.tokens].astype(jnp.float32)
    x = with_logical_constraint(x, *RESIDUAL_AXES)
    rope = llama.compute_rope(spec, batch.positions)
    blocks, stacked = nnx.split(model.blocks)
    attend_within = functools.partial(
        attend, segment_ids=batch.segment_ids, window=spec.sliding_window
    )

    def run_layer(state: Any, layer: Any) -> tuple[Any, Sums]:
        x, carry = state
        block = nnx.merge(blocks, layer)
        x, carry, sums = visit(block, x, rope, attend_within, carry)
        return (with_logical_constraint(x, *RESIDUAL_AXES), carry), sums

    (x, _), sums = jax.lax.scan(run_layer, (x, carry), stacked)
    return x, sums


def sum_over_tokens(batch: Batch, x: jax.Array) -> jax.Array:
    """Return [B, T, ...] as [...], summed over the tokens that are not padding."""
    is_real = batch.segment_ids > 0
    is_real = is_real.reshape(*is_real.shape, *[1] * (x.ndim - 2))
    return jnp.sum(jnp.where(is_real, x, 0), axis=(0, 1))


def cosine_similarity(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the cosine along the last axis; 0 where one of them is 0."""
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    tiny = jnp.finfo(x.dtype).tiny
    return jnp.sum(x * y, axis=-1) / jnp.maximum(norms, tiny)


# ---- running them


def sum_over_batches(
    spec: ModelSpec, params: Params, batches: Iterable[Batch], sums: Callable, *extra: Any
) -> dict[str, np.ndarray]:
    """Return float64 sums over all batches, and "tokens", the number of real ones."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    step = jit_sums(spec, mesh, sums, *extra)
    totals: dict[str, Any] = {"tokens": np.float64(0)}
    for batch in batches:
        for name, value in step(params, batch).items():
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
    if not totals["tokens"]:
        raise UserError(
            "measuring layers: the sequences hold no token. "
            "Give held-out sequences of text that the model knows."
        )
    return totals


@functools.lru_cache(maxsize=8)
def jit_sums(spec: ModelSpec, mesh: Mesh, sums: Callable, *extra: Any) -> Any:
    """Return the jitted step(params, batch) -> sums(spec, params, batch, *extra) and "tokens"."""

    def step(params: Params, batch: Batch) -> Sums:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            n_tokens = jnp.sum(batch.segment_ids > 0)
            return {**sums(spec, params, batch, *extra), "tokens": n_tokens}

    shardings = (llama.make_param_shardings(spec, mesh), make_batch_sharding(mesh))
    return jax.jit(step, in_shardings=shardings, out_shardings=make_replicated_sharding(mesh))

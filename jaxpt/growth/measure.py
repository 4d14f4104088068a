"""Measure what layers, heads, MLP activations and channels do, for growth reports and pruning."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpt import io
from jaxpt.data import loader
from jaxpt.growth.growth import ReadBatches
from jaxpt.growth.records import CopySimilarity
from jaxpt.model import loss, transformer
from jaxpt.model.kernels.select import attend
from jaxpt.model.rope import compute_ropes
from jaxpt.model.transformer import Observe, Params
from jaxpt.sharding import (
    make_batch_sharding,
    make_replicated_sharding,
    n_shards,
    with_logical_constraint,
)
from jaxpt.spec import Batch, ModelSpec, UserError

Sums = dict[str, jax.Array]  # of one batch
RESIDUAL_AXES = ("batch", "position", "act_embed")
N_MEASURED_SEQUENCES = 64  # per source: what operators measure on, and the report's statistics


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
        params: as in model/transformer.py.
        batches: on the mesh of params.

    Raises:
        UserError: the batches hold no token.
    """
    sums = sum_over_batches(spec, params, batches, sum_layer_statistics)
    n_tokens = sums["tokens"]
    mean_square = sums["squares"] / n_tokens
    mean_cosine = sums["cosine"] / n_tokens
    return LayerStatistics(np.sqrt(mean_square), 1 - mean_cosine)


def measure_copy_similarity(
    spec: ModelSpec, params: Params, layer_map: Sequence[int | None], batches: Iterable[Batch]
) -> list[CopySimilarity]:
    """Measure how alike neighboring copies of one layer still are.

    The cosine is the mean over tokens between what the two layers add to the residual; 0 where one
    of them adds nothing.

    Args:
        spec: the architecture.
        params: as in model/transformer.py.
        layer_map: the source of each layer; None: it has none.
        batches: on the mesh of params.

    Raises:
        UserError: the batches hold no token.
    """
    copies: dict[int, list[int]] = {}
    for layer, source in enumerate(layer_map):
        if source is not None:
            copies.setdefault(source, []).append(layer)
    copies = {source: layers for source, layers in copies.items() if len(layers) > 1}
    if not copies:
        return []
    slots = [len(copies)] * len(layer_map)
    for slot, layers in enumerate(copies.values()):
        for layer in layers:
            slots[layer] = slot
    sums = sum_over_batches(spec, params, batches, sum_copy_similarity, tuple(slots))
    cosines = sums["cosine"] / sums["tokens"]
    pairs = []
    for source, layers in copies.items():
        for pair in itertools.pairwise(layers):
            cosine = float(cosines[pair[1]])
            pairs.append(CopySimilarity(source, pair, cosine))
    return sorted(pairs, key=lambda pair: pair.layers)


def measure_loss_of_layers(
    spec: ModelSpec, params: Params, batches: Iterable[Batch], layers: Sequence[int]
) -> float:
    """Return the loss of the model that has these layers alone, in nats per trained token.

    Args:
        spec: the architecture.
        params: as in model/transformer.py.
        batches: on the mesh of params.
        layers: rising.

    Raises:
        UserError: the batches hold no token that is trained.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    step = jit_layers_loss(spec, spec.take_layers(layers), mesh)
    indices = np.asarray(layers, np.int32)
    sums = np.zeros(2)
    for batch in batches:
        sums += np.asarray(step(params, batch, indices), np.float64)
    nats, n_trained = sums
    if not n_trained:
        raise UserError(
            "measuring layers: the sequences hold no token that is trained. Give sequences of text."
        )
    return float(nats / n_trained)


@functools.lru_cache(maxsize=8)
def jit_layers_loss(spec: ModelSpec, child: ModelSpec, mesh: Mesh) -> Any:
    """Return the jitted step(params, batch, layers) -> the child's nats and trained tokens."""

    def step(params: Params, batch: Batch, layers: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = jax.tree.map(lambda x: jnp.take(x, layers, axis=0), params["blocks"])
        params = {**params, "blocks": blocks}
        inputs = batch.tokens, batch.segment_ids, batch.positions
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            hidden, _ = transformer.forward(child, params, *inputs)
            head = transformer.lm_head(child, params)
            _, nats = loss.cross_entropy(
                hidden, head, batch.targets, batch.loss_mask, softcap=child.logit_softcap
            )
        return nats, jnp.sum(batch.loss_mask)

    replicated = make_replicated_sharding(mesh)
    inputs = (transformer.make_param_shardings(spec, mesh), make_batch_sharding(mesh), replicated)
    return jax.jit(step, in_shardings=inputs, out_shardings=replicated)


class Importance(NamedTuple):
    """How active each part of a width is, as means over all real tokens; float64.

    Attributes:
        heads: [L, N], L2 norm of the head's output, before `o`.
        mlp: [L, F], |activation(gate) x up|.
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
    n_tokens = sums.pop("tokens")
    means = {name: total / n_tokens for name, total in sums.items()}
    return Importance(**means)


def select_important(scores: np.ndarray, n: int) -> np.ndarray:
    """Return the indices [..., n] of the n highest scores along the last axis, in rising order.

    Of equal scores those of lower index win.
    """
    descending = -np.asarray(scores)
    order = np.argsort(descending, kind="stable")
    return np.sort(order[..., :n])


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
    grouped_scores = np.reshape(scores, (L, n_kv_heads, group))
    group_scores = grouped_scores.sum(-1)
    kv_heads = select_important(group_scores, new_heads // group)
    first_heads = group * kv_heads[..., None]
    heads = first_heads + np.arange(group)
    return heads.reshape(L, new_heads), kv_heads


# ---- logits of a whole model


def compute_logits(
    spec: ModelSpec, params: Params, tokens: np.ndarray, mesh: jax.sharding.Mesh
) -> np.ndarray:
    """Return float32 logits [B, T, V] of token ids [B, T], one document per sequence."""

    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        segment_ids = jnp.ones_like(tokens)
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = jnp.broadcast_to(positions, tokens.shape)
        return transformer.compute_logits(spec, params, tokens, segment_ids, positions)

    jitted = jax.jit(forward, out_shardings=make_replicated_sharding(mesh))
    # a GPU or TPU would otherwise multiply float32 in fewer bits
    with jax.default_matmul_precision("highest"):
        return np.asarray(jitted(params, tokens))


def make_test_tokens(spec: ModelSpec, n: int) -> np.ndarray:
    """Return int32 [1, n]: a sequence of ids from all over the vocabulary."""
    length = min(n, spec.max_seq_len)
    ids = np.arange(length, dtype=np.int32) * 7919 % spec.vocab_size
    return ids[None]


# ---- the batches to measure on


def make_measuring_batches(
    packed: Sequence[str | io.Path],
    batch_size: int,
    document_mask: bool,
    mesh: Mesh,
    seq_len: int | None = None,
) -> ReadBatches:
    """Return a function that reads training batches to measure on: the same at every call.

    Args:
        packed: directories of packed sequences.
        batch_size: in sequences, at least; the mesh shards it evenly.
        document_mask: whether a document sees only itself.
        mesh: the devices.
        seq_len: of the parts that sequences are cut into; None: they stay whole.
    """

    def read_batches() -> Iterator[Batch]:
        dataset = loader.open_packed(packed)
        shards = n_shards(mesh, "batch")
        n = -(-min(batch_size, 32) // shards) * shards
        place = make_batch_sharding(mesh)
        for name in dataset.names:
            yield from loader.iterate_heldout_batches(
                dataset, name, place, n, N_MEASURED_SEQUENCES, document_mask, seq_len
            )

    return read_batches


# ---- sums over one batch, traced; every array is summed over real tokens


def sum_layer_statistics(spec: ModelSpec, params: Params, batch: Batch) -> Sums:
    """Return the sums behind LayerStatistics."""

    def observe(before, after, inner, state):
        mean_square = jnp.mean(after * after, axis=-1)
        cosine = cosine_similarity(before, after)
        sums = {"squares": sum_over_tokens(batch, mean_square)}
        sums["cosine"] = sum_over_tokens(batch, cosine)
        return state, sums

    _, sums = observe_layers(spec, params, batch, observe)
    return sums


def sum_copy_similarity(
    spec: ModelSpec, params: Params, batch: Batch, slots: tuple[int, ...]
) -> Sums:
    """Return the sums behind CopySimilarity.

    Args:
        spec: the architecture.
        params: as in model/transformer.py.
        batch: the tokens.
        slots: for each layer the slot that keeps the output of its source's last copy; the highest
            one is for layers without copies. A whole stack of outputs would be as large as
            training's.
    """

    def observe(before, after, inner, state):
        outputs, layer = state
        output = after - before
        slot = jnp.asarray(slots)[layer]
        cosine = cosine_similarity(output, outputs[slot])
        sums = {"cosine": sum_over_tokens(batch, cosine)}
        outputs = outputs.at[slot].set(output)
        outputs = with_logical_constraint(outputs, None, *RESIDUAL_AXES)
        return (outputs, layer + 1), sums

    n_slots = max(slots) + 1
    empty = jnp.zeros((n_slots, *batch.tokens.shape, spec.d_model))
    empty = with_logical_constraint(empty, None, *RESIDUAL_AXES)
    state = (empty, jnp.int32(0))
    _, sums = observe_layers(spec, params, batch, observe, state)
    return sums


def sum_importance(spec: ModelSpec, params: Params, batch: Batch) -> Sums:
    """Return the sums behind Importance."""

    def observe(before, after, inner, state):
        head_norms = jnp.linalg.norm(inner.heads, axis=-1)
        channels = jnp.abs(inner.attention_input) + jnp.abs(inner.mlp_input)
        sums = {"heads": sum_over_tokens(batch, head_norms)}
        sums["mlp"] = sum_over_tokens(batch, jnp.abs(inner.activations))
        sums["embed"] = sum_over_tokens(batch, channels)
        return state, sums

    x, sums = observe_layers(spec, params, batch, observe)
    normed = transformer.final_norm(spec, params, x)
    final = sum_over_tokens(batch, jnp.abs(normed))
    sums["embed"] = jnp.sum(sums["embed"], axis=0) + final
    return sums


def observe_layers(
    spec: ModelSpec, params: Params, batch: Batch, observe: Observe, state: Any = ()
) -> tuple[jax.Array, Sums]:
    """Run a batch through the layers in float32.

    Args:
        spec: the architecture.
        params: as in model/transformer.py.
        batch: the tokens.
        observe: called after each layer; the batch's segments are in `attend` already.
        state: of the first layer.

    Returns:
        The residual stream after the last layer, [B, T, D], and the sums, [L, ...].
    """

    def attend_within(q, k, v, window, state):
        softcap = spec.attention_softcap
        return attend(q, k, v, batch.segment_ids, window, softcap=softcap), state

    x = transformer.embed_tokens(spec, params, batch.tokens, jnp.float32)
    ropes = compute_ropes(spec, batch.positions)
    x, _, sums = transformer.run_layers(
        spec, params["blocks"], x, ropes, attend_within, state, observe=observe
    )
    return x, sums


def sum_over_tokens(batch: Batch, x: jax.Array) -> jax.Array:
    """Return [B, T, ...] as [...], summed over the tokens that are not padding."""
    is_real = batch.segment_ids > 0
    is_real = jnp.expand_dims(is_real, range(2, x.ndim))
    masked = jnp.where(is_real, x, 0)
    return jnp.sum(masked, axis=(0, 1))


def cosine_similarity(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the cosine along the last axis; 0 where one of them is 0."""
    x_norm = jnp.linalg.norm(x, axis=-1)
    y_norm = jnp.linalg.norm(y, axis=-1)
    tiny = jnp.finfo(x.dtype).tiny
    norms = jnp.maximum(x_norm * y_norm, tiny)
    return jnp.sum(x * y, axis=-1) / norms


# ---- running them


def sum_over_batches(
    spec: ModelSpec, params: Params, batches: Iterable[Batch], sums: Callable, *extra: Any
) -> dict[str, np.ndarray]:
    """Return float64 sums over all batches, and "tokens", the number of real ones."""
    any_leaf = jax.tree.leaves(params)[0]
    mesh = any_leaf.sharding.mesh
    step = jit_sums(spec, mesh, sums, *extra)
    totals: dict[str, Any] = {"tokens": np.float64(0)}
    for batch in batches:
        batch_sums = step(params, batch)
        for name, value in batch_sums.items():
            total = totals.get(name, 0)
            totals[name] = total + np.asarray(value, np.float64)
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
            found = sums(spec, params, batch, *extra)
        return {**found, "tokens": n_tokens}

    param_shardings = transformer.make_param_shardings(spec, mesh)
    inputs = (param_shardings, make_batch_sharding(mesh))
    replicated = make_replicated_sharding(mesh)
    return jax.jit(step, in_shardings=inputs, out_shardings=replicated)

"""Text from a model.

One pass over the prompts fills a key-value cache, then one compiled loop adds a token at a time.

Prompts of a batch are padded on the left, so that all rows write to the same column of the cache. A
row's padding has
segment 0, which its tokens do not see, and its positions count from its first token: a row comes
out as it would alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpt.model import llama
from jaxpt.model.attention import attend
from jaxpt.sharding import make_logical_sharding, n_shards, with_logical_constraint
from jaxpt.spec import ModelSpec, UserError

MAX_DECODE_BATCH = (
    32  # prompts decoded together: a step reads every weight once, however many rows share it
)
# prompt and cache lengths are rounded up to multiples of it, so that few shapes are compiled
LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Each setting as transformers' generate defines it, in its order.

    repetition_penalty  logits of tokens already in prompt or output are divided by it where
    positive, else multiplied
    temperature         logits are divided by it; 0 takes the likeliest token, whatever top_k and
    top_p say
    top_k               only the k likeliest; 0 keeps all
    top_p               only the fewest likeliest that together have this probability; 1 keeps all

    Source: transformers' RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
    TopKLogitsWarper, TopPLogitsWarper.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for name, value, good, expected in (
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0,
                "above 0 (1 changes nothing)",
            ),
            ("temperature", self.temperature, self.temperature >= 0, "of at least 0 (0 is greedy)"),
            ("top_k", self.top_k, self.top_k >= 0, "of at least 0 (0 keeps all)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1 (1 keeps all)"),
        ):
            if not good:
                raise UserError(f"sampling: {name} is {value}, expected a number {expected}.")


def generate(
    spec: ModelSpec,
    params: dict[str, Any],
    prompts: list[list[int]],
    *,
    max_new: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    dtype="float32",
    watch: Callable[[int, list[int]], bool | None] | None = None,
    watch_every: int = 1,
) -> list[list[int]]:
    """Continuations of the prompts, without the prompts and without the end-of-sequence token that
    ended them.

    A row ends with spec.eos_id, after max_new tokens, or when prompt and output fill
    spec.max_seq_len.
    watch(row, ids so far) is called every `watch_every` tokens, for streaming; a true answer ends
    the row there.
    The same seed, prompt and place in the list give the same text in any batch. Params lie on the
    mesh of their shardings.
    Raises UserError for a prompt that is empty, leaves no room in the context, or has ids that the
    model does not know.
    """
    if max_new < 1:
        raise UserError(f"generate: asked for {max_new} new tokens, expected at least 1.")
    check_prompts(spec, prompts)
    params = unstack_layers(params)
    outputs: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(prompts), MAX_DECODE_BATCH):
        rows = by_length[start : start + MAX_DECODE_BATCH]
        generate_batch(
            spec,
            params,
            prompts,
            rows,
            outputs,
            max_new,
            sampling,
            seed,
            jnp.dtype(dtype),
            watch,
            watch_every,
        )
    return outputs


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with one tree a layer in place of stacked blocks, where that helps.

    On a single CPU device. Nothing is copied.

    XLA's CPU compiler copies a layer out of a stack before it multiplies with it; for a product
    with one token that is most of the time.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return params
    blocks = jax.tree.map(np.asarray, params["blocks"])  # views of the same memory
    n_layers = len(jax.tree.leaves(blocks)[0])
    where = make_logical_sharding(mesh, ())
    return params | {
        "blocks": tuple(
            jax.device_put(jax.tree.map(lambda x, i=i: x[i], blocks), where)
            for i in range(n_layers)
        )
    }


def check_prompts(spec: ModelSpec, prompts: list[list[int]]) -> None:
    """Raise UserError for prompts that the model cannot continue."""
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(
                f"generate: prompt {row + 1} has no tokens. Begin it with the "
                "beginning-of-sequence token, or write something."
            )
        if len(prompt) >= spec.max_seq_len:
            raise UserError(
                f"generate: prompt {row + 1} has {len(prompt):,} tokens, but "
                f"the model's context is {spec.max_seq_len:,}. "
                f"Shorten it to at most {spec.max_seq_len - 1:,}."
            )
        wrong = [token for token in prompt if not 0 <= token < spec.vocab_size]
        if wrong:
            raise UserError(
                f"generate: prompt {row + 1} has token id {wrong[0]}, but the "
                f"model knows ids 0 to {spec.vocab_size - 1}. "
                "Use the tokenizer that the model was trained with."
            )


class DecodeState(NamedTuple):
    """What the loop carries.

    C: columns of the cache; the prompts end at the column where decoding starts.
    """

    keys: jax.Array  # [L, B, C, K, H], rotated
    values: jax.Array  # [L, B, C, K, H]
    segments: jax.Array  # int32 [B, C]; 0 at a row's padding, else 1
    logits: jax.Array  # float32 [B, V], of the token to choose next
    seen: jax.Array  # bool [B, V]: tokens of prompt and output
    output: jax.Array  # int32 [B, C]: column c holds the token chosen to stand there
    lengths: jax.Array  # int32 [B]: tokens of prompt and output
    room: jax.Array  # int32 [B]: tokens that a row may still add; 0 once it has ended
    column: jax.Array  # int32: the next to be written


def generate_batch(
    spec, params, prompts, rows, outputs, max_new, sampling, seed, dtype, watch, watch_every
) -> None:
    """Fill outputs[row] for a batch of rows."""
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    B = round_up_length(len(rows), n_shards(mesh, "batch"))
    P = round_up_length(max(len(prompts[row]) for row in rows), LENGTH_STEP)
    C = P + round_up_length(max_new, LENGTH_STEP)
    tokens, lengths, room = np.zeros((B, P), np.int32), np.ones(B, np.int32), np.zeros(B, np.int32)
    for i, row in enumerate(rows):
        tokens[i, P - len(prompts[row]) :] = prompts[row]
        lengths[i] = len(prompts[row])
        room[i] = min(max_new, spec.max_seq_len - len(prompts[row]))
    draws = np.asarray(
        [*rows, *[0] * (B - len(rows))], np.uint32
    )  # which stream of random numbers a row draws from

    where = make_logical_sharding(mesh, ("batch",))
    lengths, room, draws = (jax.device_put(x, where) for x in (lengths, room, draws))
    state = prefill_cache(
        spec,
        mesh,
        dtype,
        C,
        params,
        jax.device_put(tokens, make_logical_sharding(mesh, ("batch", None))),
        lengths,
        room,
    )
    stop = P
    while True:
        stop = stop + watch_every if watch else P + max_new
        state = decode_step(
            spec, mesh, dtype, sampling, params, state, jax.random.key(seed), draws, stop
        )
        output, ended_at, room = (
            np.asarray(state.output),
            np.asarray(state.lengths),
            np.array(state.room),
        )
        for i, row in enumerate(rows):
            ids = output[i, P : P + ended_at[i] - len(prompts[row])].tolist()
            if ids and ids[-1] == spec.eos_id:
                ids.pop()
            if len(ids) > len(outputs[row]):
                outputs[row] = ids
                if watch and watch(row, ids):
                    room[i] = 0
        if not room.any():
            return
        state = state._replace(room=jax.device_put(room, where))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def prefill_cache(
    spec: ModelSpec, mesh, dtype, n_columns: int, params, tokens, lengths, room
) -> DecodeState:
    """The state after reading the prompts, tokens int32 [B, P] padded on the left."""
    B, P = tokens.shape
    columns = jnp.arange(n_columns)[None]
    segments = (columns >= P - lengths[:, None]).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(P)[None] - (P - lengths[:, None]), 0)

    def attend_prompt(q, k, v, cache, layer):
        keys, values = (
            jax.lax.dynamic_update_slice(old, new[None].astype(dtype), (layer, 0, 0, 0, 0))
            for old, new in zip(cache, (k, v), strict=True)
        )
        return attend(q, k, v, segments[:, :P], spec.sliding_window), (keys, values)

    model, layers = bind_for_decoding(spec, params)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        empty = with_logical_constraint(
            jnp.zeros((spec.n_layers, B, n_columns, spec.n_kv_heads, spec.d_head), dtype),
            "layers",
            "batch",
            None,
            "kv_heads",
            None,
        )
        logits, (keys, values) = run_layers_with_cache(
            model, layers, tokens, positions, (empty, empty), attend_prompt, dtype
        )
    rows = jnp.arange(B)[:, None]
    seen = jnp.zeros((B, spec.vocab_size), bool).at[rows, tokens].max(segments[:, :P] == 1)
    output = jnp.zeros((B, n_columns), jnp.int32)
    return DecodeState(keys, values, segments, logits, seen, output, lengths, room, jnp.int32(P))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def decode_step(
    spec: ModelSpec, mesh, dtype, sampling: Sampling, params, state: DecodeState, key, draws, stop
) -> DecodeState:
    """Add tokens until column `stop`, or until every row has ended."""
    model, layers = bind_for_decoding(spec, params)

    def add_token(state: DecodeState) -> DecodeState:
        going = state.room > 0
        token = sample_token(sampling, state, key, draws)
        column, rows = state.column, jnp.arange(len(token))

        def attend_cache(q, k, v, cache, layer):
            keys, values = (
                jax.lax.dynamic_update_slice(old, new[None].astype(dtype), (layer, 0, column, 0, 0))
                for old, new in zip(cache, (k, v), strict=True)
            )
            B, _, N, H = q.shape
            mixed = attend_to_cache(
                q.reshape(B, k.shape[2], -1, H),
                keys[layer],
                values[layer],
                state.segments,
                column,
                spec.sliding_window,
            )
            return mixed.reshape(B, 1, N, H), (keys, values)

        logits, (keys, values) = run_layers_with_cache(
            model,
            layers,
            token[:, None],
            state.lengths[:, None],
            (state.keys, state.values),
            attend_cache,
            dtype,
        )
        return DecodeState(
            keys,
            values,
            state.segments,
            logits,
            seen=state.seen.at[rows, token].set(True),
            output=jax.lax.dynamic_update_slice(state.output, token[:, None], (0, column)),
            lengths=state.lengths + going,
            room=jnp.where(
                token == (-1 if spec.eos_id is None else spec.eos_id),
                0,
                jnp.maximum(state.room - 1, 0),
            ),
            column=column + 1,
        )

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.lax.while_loop(
            lambda state: (state.column < stop) & jnp.any(state.room > 0), add_token, state
        )


def attend_to_cache(q, keys, values, segments, column, window):
    """One query a row, at `column`.

    Q [B, K, G, H], keys and values [B, S, K, H] as the cache holds them. Sees the columns of
    segment 1.
    """
    distance = column - jnp.arange(keys.shape[1])
    sees = (distance >= 0) & (distance < (window or keys.shape[1])) & (segments == 1)
    scores = (
        jnp.einsum("bkgh,bskh->bkgs", q, keys, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    shares = jax.nn.softmax(jnp.where(sees[:, None, None], scores, -jnp.inf)).astype(values.dtype)
    return jnp.einsum("bkgs,bskh->bkgh", shares, values)


def bind_for_decoding(
    spec: ModelSpec, params: dict[str, Any]
) -> tuple[llama.Llama, tuple[dict, ...] | None]:
    """The model, and its layers one by one where they are not stacked in it."""
    layers = params["blocks"]
    if isinstance(layers, tuple):
        return llama.bind_params(spec, params | {"blocks": layers[0]}), layers
    return llama.bind_params(spec, params), None


def run_layers_with_cache(
    model: llama.Llama, layers, tokens, positions, cache, attend_layer, dtype
):
    """Tokens [B, T] through the model beside its cache.

    Attend_layer(q, k, v, cache, layer) -> (mixed, cache).

    Returns float32 logits [B, V] of the last column, and the cache.
    """
    spec = model.spec
    rope = llama.compute_rope(spec, positions)
    blocks, stacked = nnx.split(model.blocks)

    def run_layer(carry, one):
        x, cache = (
            # the cache is carried, not scanned over: a step then writes one column in place, not
            # all of it anew
            carry
        )
        layer, weights = one

        def attend_and_keep(q, k, v):
            nonlocal cache
            mixed, cache = attend_layer(q, k, v, cache, layer)
            return mixed

        x = nnx.merge(blocks, weights)(x, rope, attend_and_keep)
        return (with_logical_constraint(x, "batch", None, "act_embed"), cache), None

    x = with_logical_constraint(model.embed[...].astype(dtype)[tokens], "batch", None, "act_embed")
    if layers is None:
        (x, cache), _ = jax.lax.scan(run_layer, (x, cache), (jnp.arange(spec.n_layers), stacked))
    for layer, weights in enumerate(layers or ()):
        nnx.replace_by_pure_dict(stacked, weights)
        (x, cache), _ = run_layer((x, cache), (layer, stacked))
    last = llama.rms_norm(x[:, -1], model.norm[...], spec.norm_eps)
    return jnp.einsum(
        "bd,dv->bv", last, model.lm_head(dtype), preferred_element_type=jnp.float32
    ), cache


def sample_token(sampling: Sampling, state: DecodeState, key, draws) -> jax.Array:
    """The next token of each row, int32 [B]."""
    logits = penalize_repetition(state.logits, state.seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = mask_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = mask_top_p(logits, sampling.top_p)

    def draw(stream, length, logits):
        return jax.random.categorical(
            jax.random.fold_in(jax.random.fold_in(key, stream), length), logits
        )

    return jax.vmap(draw)(draws, state.lengths, logits).astype(jnp.int32)


def penalize_repetition(logits, seen, penalty: float):
    """Return logits with seen tokens penalized."""
    if penalty == 1:
        return logits
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def mask_top_k(logits, k: int):
    """Return logits with all but the k largest at -inf."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def mask_top_p(logits, p: float):
    """Return logits without the tail beyond probability p."""
    order = jnp.argsort(logits, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1), axis=-1)
    dropped = (mass <= 1 - p).at[:, -1].set(False)  # the likeliest always stays
    return jnp.where(
        jnp.zeros_like(dropped).at[jnp.arange(len(logits))[:, None], order].set(dropped),
        -jnp.inf,
        logits,
    )


def round_up_length(n: int, step: int) -> int:
    """Return n rounded up to a multiple of step."""
    return -(-n // step) * step

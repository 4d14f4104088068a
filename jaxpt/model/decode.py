"""Generate text from a model.

One pass over the prompts fills a key-value cache, then one compiled loop adds a token at a time.
Prompts of a batch are padded on the left, so that all sequences write to the same column of the
cache. The padding has segment 0, which tokens do not attend to, and positions count from a
sequence's first token: it comes out as it would alone.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpt.model import transformer
from jaxpt.model.attention import attend_plain
from jaxpt.model.kernels.select import attend
from jaxpt.model.rope import compute_ropes
from jaxpt.model.softcap import apply_softcap
from jaxpt.model.transformer import Attend, Params
from jaxpt.sharding import make_logical_sharding, n_shards, with_logical_constraint
from jaxpt.spec import ModelSpec, UserError

# prompts decoded together: a step reads every parameter once, however many sequences share it
MAX_DECODE_BATCH = 32
# prompt and cache lengths are rounded up to multiples of it, so that few shapes are compiled
LENGTH_STEP = 64

Array = jax.Array
Cache = tuple[Array, Array]  # keys and values [L, B, C, K, H]
# (index of the prompt, ids so far) -> whether to stop there
Watch = Callable[[int, list[int]], bool | None]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits, as in transformers' generate, in its order.

    Attributes:
        repetition_penalty: positive logits of tokens already in prompt or output are divided by
            it, negative ones multiplied.
        temperature: logits are divided by it; 0 takes the likeliest token, whatever top_k and top_p
            are.
        top_k: only the k likeliest; 0 keeps all.
        top_p: only the fewest likeliest that together have this probability; 1 keeps all.

    Source: transformers' RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
    TopKLogitsWarper, TopPLogitsWarper.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        """Raise UserError for a value out of range."""
        require_setting("top_k", self.top_k, self.top_k >= 0, "of at least 0 (0 keeps all)")
        is_share = 0 < self.top_p <= 1
        require_setting("top_p", self.top_p, is_share, "above 0, up to 1 (1 keeps all)")
        penalty = self.repetition_penalty
        expected = "above 0 (1 changes nothing)"
        require_setting("repetition_penalty", penalty, penalty > 0, expected)
        is_positive = self.temperature >= 0
        require_setting("temperature", self.temperature, is_positive, "of at least 0 (0: greedy)")


def require_setting(name: str, value: float, is_valid: bool, expected: str) -> None:
    """Raise UserError for an invalid setting."""
    if not is_valid:
        raise UserError(f"sampling: {name}: expected a number {expected}, got {value}.")


class DecodeSetup(NamedTuple):
    """What the compiled functions are specialized for."""

    spec: ModelSpec
    mesh: Mesh
    dtype: np.dtype


def generate(
    spec: ModelSpec,
    params: Params,
    prompts: list[list[int]],
    *,
    max_new: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    repeats: list[int] | None = None,
    dtype: str = "float32",
    watch: Watch | None = None,
    watch_every: int = 1,
) -> list[list[int]]:
    """Return continuations of the prompts, without the end-of-sequence token that ended them.

    A continuation ends at one of spec.eos_ids, after max_new tokens, or where spec.max_seq_len is
    reached.
    The same seed, prompt and repeat draw the same text in any batch.

    Args:
        spec: the architecture.
        params: sharded on a mesh.
        prompts: token ids.
        max_new: tokens added at most.
        sampling: how tokens are chosen.
        seed: of the random draws.
        repeats: of each prompt: equal prompts of different repeats draw different texts; None: as
            `number_repeats` counts them.
        dtype: of computation and cache.
        watch: called every watch_every tokens, for streaming; if true the continuation ends there.
        watch_every: period of watch, in tokens.

    Raises:
        UserError: a prompt is empty, leaves no room in the context or has unknown ids.
    """
    if max_new < 1:
        raise UserError(f"generate: expected at least 1 new token, got {max_new}.")
    check_prompts(spec, prompts)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    setup = DecodeSetup(spec, mesh, jnp.dtype(dtype))
    params = unstack_layers(params, mesh)
    key = jax.random.key(seed)
    streams = make_streams(prompts, number_repeats(prompts) if repeats is None else repeats)
    outputs: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), MAX_DECODE_BATCH):
        indices = by_length[start : start + MAX_DECODE_BATCH]
        state, placed = start_batch(setup, params, prompts, streams, indices, max_new)
        if not jnp.isfinite(state.logits[: len(indices)]).all():
            raise UserError(
                "generate: the model's logits are NaN or infinite, so there is nothing to choose "
                "from. Use an earlier checkpoint."
            )
        first = stop = int(state.column)
        while True:
            stop = stop + watch_every if watch else first + max_new
            state = decode_step(setup, sampling, params, state, key, placed, stop)
            room = collect_outputs(state, first, spec, prompts, indices, outputs, watch)
            if not room.any():
                break
            state = state._replace(room=jax.device_put(room, state.room.sharding))
    return outputs


def number_repeats(prompts: list[list[int]]) -> list[int]:
    """Return how many equal prompts stand before each one."""
    counts: dict[tuple[int, ...], int] = {}
    repeats = []
    for prompt in prompts:
        ids = tuple(prompt)
        n_before = counts.get(ids, 0)
        repeats.append(n_before)
        counts[ids] = n_before + 1
    return repeats


def make_streams(prompts: list[list[int]], repeats: list[int]) -> np.ndarray:
    """Return which random numbers each sequence draws: (checksum, repeat), uint32 [B, 2]."""
    streams = np.zeros((len(prompts), 2), np.uint32)
    for i, (prompt, repeat) in enumerate(zip(prompts, repeats, strict=True)):
        ids = np.array(prompt, np.uint32)
        streams[i] = zlib.crc32(ids.tobytes()), repeat
    return streams


def unstack_layers(params: Params, mesh: Mesh) -> Params:
    """Return the parameters with a tree per layer on a single CPU device, else unchanged.

    XLA's CPU compiler copies a layer out of a stack before it multiplies with it; for a matmul
    with one token that is most of the time. Nothing is copied here.
    """
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return params
    blocks = jax.tree.map(np.asarray, params["blocks"])  # views of the same memory
    n_layers = len(jax.tree.leaves(blocks)[0])
    place = make_logical_sharding(mesh, ())
    layers = []
    for i in range(n_layers):
        layer = jax.tree.map(lambda x, i=i: x[i], blocks)
        layers.append(jax.device_put(layer, place))
    return params | {"blocks": tuple(layers)}


def check_prompts(spec: ModelSpec, prompts: list[list[int]]) -> None:
    """Raise UserError for prompts that the model cannot continue."""
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(
                f"generate: prompt {number} has no tokens. Begin it with the beginning-of-sequence "
                "token, or write something."
            )
        if len(prompt) >= spec.max_seq_len:
            raise UserError(
                f"generate: prompt {number} has {len(prompt):,} tokens, but the model's context is "
                f"{spec.max_seq_len:,}. Shorten it to at most {spec.max_seq_len - 1:,}."
            )
        unknown = [token for token in prompt if not 0 <= token < spec.vocab_size]
        if unknown:
            raise UserError(
                f"generate: prompt {number} has token id {unknown[0]}, but the model knows ids 0 "
                f"to {spec.vocab_size - 1}. Use the tokenizer that the model was trained with."
            )


class DecodeState(NamedTuple):
    """What the loop carries.

    C: columns of the cache; the prompts end at the column where decoding starts.
    """

    cache: Cache  # keys and values [L, B, C, K, H], keys rotated
    segment_ids: Array  # int32 [B, C]; 0 at padding, else 1
    logits: Array  # float32 [B, V], of the token to choose next
    seen: Array  # bool [B, V], tokens of prompt and output
    output: Array  # int32 [B, C]; column c holds the token chosen for it
    lengths: Array  # int32 [B], tokens of prompt and output
    room: Array  # int32 [B], tokens that may still be added; 0 once a sequence has ended
    column: Array  # int32, the next to be written


def start_batch(
    setup: DecodeSetup,
    params: Params,
    prompts: list[list[int]],
    streams: np.ndarray,
    indices: list[int],
    max_new: int,
) -> tuple[DecodeState, Array]:
    """Read some prompts.

    Returns:
        The state, and the batch's rows of `streams`, uint32 [B, 2].
    """
    spec, mesh, _ = setup
    B = round_up_length(len(indices), n_shards(mesh, "batch"))
    P = round_up_length(max(len(prompts[i]) for i in indices), LENGTH_STEP)
    C = P + round_up_length(max_new, LENGTH_STEP)
    tokens = np.zeros((B, P), np.int32)
    lengths = np.ones(B, np.int32)
    room = np.zeros(B, np.int32)
    batch_streams = np.zeros((B, 2), np.uint32)
    for b, i in enumerate(indices):
        n = len(prompts[i])
        tokens[b, P - n :] = prompts[i]
        lengths[b] = n
        room[b] = min(max_new, spec.max_seq_len - n)
        batch_streams[b] = streams[i]
    place = make_logical_sharding(mesh, ("batch",))
    lengths, room = jax.device_put((lengths, room), place)
    rows = make_logical_sharding(mesh, ("batch", None))
    tokens, placed = jax.device_put((tokens, batch_streams), rows)
    return prefill_cache(setup, C, params, tokens, lengths, room), placed


def collect_outputs(
    state: DecodeState,
    first: int,
    spec: ModelSpec,
    prompts: list[list[int]],
    indices: list[int],
    outputs: list[list[int]],
    watch: Watch | None,
) -> np.ndarray:
    """Copy the new tokens to `outputs`. Return the room left, 0 where watch ends a sequence."""
    output, lengths = np.asarray(state.output), np.asarray(state.lengths)
    room = np.array(state.room)
    for b, i in enumerate(indices):
        n_new = lengths[b] - len(prompts[i])
        ids = output[b, first : first + n_new].tolist()
        if ids and ids[-1] in spec.eos_ids:
            ids.pop()
        if len(ids) > len(outputs[i]):
            outputs[i] = ids
            if watch and watch(i, ids):
                room[b] = 0
    return room


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill_cache(
    setup: DecodeSetup, n_columns: int, params: Params, tokens: Array, lengths: Array, room: Array
) -> DecodeState:
    """Return the state after reading the prompts, tokens int32 [B, P] padded on the left."""
    spec, mesh, dtype = setup
    B, P = tokens.shape
    n_padding = P - lengths[:, None]
    segment_ids = (jnp.arange(n_columns)[None] >= n_padding).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(P)[None] - n_padding, 0)
    prompt_segments = segment_ids[:, :P]

    def attend_prompt(
        q: Array, k: Array, v: Array, window: int | None, state: CacheState
    ) -> tuple[Array, CacheState]:
        softcap = spec.attention_softcap
        heads = attend(q, k, v, prompt_segments, window, softcap=softcap)
        return heads, state.write(k, v, 0)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shape = spec.n_layers, B, n_columns, spec.n_kv_heads, spec.d_head
        empty = jnp.zeros(shape, dtype)
        empty = with_logical_constraint(empty, "layers", "batch", None, "kv_heads", None)
        logits, cache = run_with_cache(
            spec, params, tokens, positions, (empty, empty), attend_prompt, dtype
        )
    rows = jnp.arange(B)[:, None]
    seen = jnp.zeros((B, spec.vocab_size), bool).at[rows, tokens].max(prompt_segments == 1)
    output = jnp.zeros((B, n_columns), jnp.int32)
    return DecodeState(cache, segment_ids, logits, seen, output, lengths, room, jnp.int32(P))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode_step(
    setup: DecodeSetup,
    sampling: Sampling,
    params: Params,
    state: DecodeState,
    key: Array,
    streams: Array,
    stop: int,
) -> DecodeState:
    """Add tokens until column `stop`, or until every sequence has ended."""
    spec, mesh, dtype = setup
    eos_ids = jnp.array(spec.eos_ids, jnp.int32)

    def add_token(state: DecodeState) -> DecodeState:
        column = state.column
        token = sample_token(sampling, state, key, streams)

        def attend_to_cache(
            q: Array, k: Array, v: Array, window: int | None, cache: CacheState
        ) -> tuple[Array, CacheState]:
            written = cache.write(k, v, column)
            is_visible = find_visible_columns(state.segment_ids, column, window)
            keys = written.keys[cache.layer]
            values = written.values[cache.layer]
            visible = is_visible[:, None]
            return attend_plain(q, keys, values, visible, spec.attention_softcap), written

        positions = state.lengths[:, None]
        logits, cache = run_with_cache(
            spec, params, token[:, None], positions, state.cache, attend_to_cache, dtype
        )
        rows = jnp.arange(len(token))
        output = jax.lax.dynamic_update_slice(state.output, token[:, None], (0, column))
        room = jnp.where(jnp.isin(token, eos_ids), 0, jnp.maximum(state.room - 1, 0))
        return DecodeState(
            cache,
            state.segment_ids,
            logits,
            state.seen.at[rows, token].set(True),
            output,
            state.lengths + (state.room > 0),
            room,
            column + 1,
        )

    def is_running(state: DecodeState) -> Array:
        return (state.column < stop) & jnp.any(state.room > 0)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.lax.while_loop(is_running, add_token, state)


class CacheState(NamedTuple):
    """The cache on its way through the layers, and the layer that it has reached.

    It is carried, not scanned over: a step then writes one column in place, not all of it.
    """

    keys: Array
    values: Array
    layer: Any

    def write(self, k: Array, v: Array, column: Any) -> CacheState:
        """Return the state with this layer's keys and values [B, T, K, H] from a column on."""
        start = self.layer, 0, column, 0, 0
        keys = k[None].astype(self.keys.dtype)
        keys = jax.lax.dynamic_update_slice(self.keys, keys, start)
        values = v[None].astype(self.values.dtype)
        values = jax.lax.dynamic_update_slice(self.values, values, start)
        return CacheState(keys, values, self.layer + 1)


def find_visible_columns(segment_ids: Array, column: Array, window: int | None) -> Array:
    """Return which columns a query at `column` sees, bool [B, S].

    Args:
        segment_ids: int32 [B, S]; 1 for tokens, 0 for padding.
        column: int32, of the query.
        window: sliding window in tokens; None: all.
    """
    S = segment_ids.shape[1]
    distance = column - jnp.arange(S)
    is_near = (distance >= 0) & (distance < (window or S))
    return is_near & (segment_ids == 1)


def run_with_cache(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    positions: Array,
    cache: Cache,
    attend_layer: Attend,
    dtype: np.dtype,
) -> tuple[Array, Cache]:
    """Run tokens [B, T] through the model.

    Returns:
        float32 logits [B, V] of the last column, and the cache.
    """
    x = transformer.embed_tokens(spec, params, tokens, dtype)
    ropes = compute_ropes(spec, positions)
    state = CacheState(*cache, 0)
    x, state, _ = transformer.run_layers(spec, params["blocks"], x, ropes, attend_layer, state)
    last = transformer.final_norm(spec, params, x[:, -1])
    head = transformer.lm_head(spec, params, dtype)
    logits = jnp.einsum("bd,dv->bv", last, head, preferred_element_type=jnp.float32)
    logits = apply_softcap(logits, spec.logit_softcap)
    return logits, (state.keys, state.values)


def sample_token(sampling: Sampling, state: DecodeState, key: Array, streams: Array) -> Array:
    """Return the next token of each sequence, int32 [B]."""
    logits = penalize_repetition(state.logits, state.seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = mask_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = mask_top_p(logits, sampling.top_p)

    def draw(stream: Array, length: Array, logits: Array) -> Array:
        prompt_key = jax.random.fold_in(key, stream[0])
        stream_key = jax.random.fold_in(prompt_key, stream[1])
        token_key = jax.random.fold_in(stream_key, length)
        return jax.random.categorical(token_key, logits)

    return jax.vmap(draw)(streams, state.lengths, logits).astype(jnp.int32)


def penalize_repetition(logits: Array, seen: Array, penalty: float) -> Array:
    """Return logits with seen tokens penalized."""
    if penalty == 1:
        return logits
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def mask_top_k(logits: Array, k: int) -> Array:
    """Return logits with all but the k largest at -inf."""
    largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.where(logits < largest[:, -1:], -jnp.inf, logits)


def mask_top_p(logits: Array, p: float) -> Array:
    """Return logits without the tail beyond probability p."""
    order = jnp.argsort(logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    in_tail = jnp.cumsum(probs, axis=-1) <= 1 - p
    in_tail = in_tail.at[:, -1].set(False)  # the likeliest always stays
    rows = jnp.arange(len(logits))[:, None]
    is_dropped = jnp.zeros_like(in_tail).at[rows, order].set(in_tail)
    return jnp.where(is_dropped, -jnp.inf, logits)


def round_up_length(n: int, step: int) -> int:
    """Return n rounded up to a multiple of step."""
    return -(-n // step) * step

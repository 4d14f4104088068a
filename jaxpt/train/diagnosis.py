"""Find why weights do not fit the data: read them in other ways, and look at the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.model import loss, transformer
from jaxpt.model.transformer import Params
from jaxpt.sharding import make_batch_sharding, make_replicated_sharding
from jaxpt.spec import Batch, ModelSpec

# nats per token by which another reading must be better to count. Both are measured on the same
# few thousand tokens, where a mean difference by chance stays near 0.01
MIN_IMPROVEMENT = 0.05
# Llama 1 and 2; Llama 3; Qwen and the later Mistrals
ROPE_THETAS = (10_000.0, 500_000.0, 1_000_000.0)
NORM_EPS_VALUES = (1e-5, 1e-6)
NORM_SCALES = (0.25, 0.35, 0.5, 0.71, 1.41, 2.0, 2.83, 4.0)
# of the median norm of embedding rows; trained rows lie within half and twice of it (stories260K:
# 0.54 to 1.18)
TINY_STD = 0.1
MAX_UNTRAINED_FRAC = 0.01  # of tokens with an embedding near zero
NOT_COPIED = (
    "{} was not copied: all its scales are exactly 1, other norms' are not; take it from the "
    "model's source"
)


class AlternativeReading(NamedTuple):
    """Another way to read the same weights, and what it means if that fits the data better."""

    cause: str
    spec: ModelSpec
    params: Params
    target_shift: int = 0  # added to every token id


def find_better_reading(
    spec: ModelSpec, params: Params, batch: Batch, dtype: str, bound: float, fails: bool
) -> str | None:
    """Return the cause if another reading of the same weights fits the batch clearly better.

    Args:
        spec: the architecture.
        params: the parameters.
        batch: a few sequences.
        dtype: of activations.
        bound: nats per token that the other reading must stay below.
        fails: whether the model fails; if not, causes that would have made it fail are not tried.
    """
    measured = measure_nats_per_token(spec, params, batch, dtype)
    best = min(measured - MIN_IMPROVEMENT, bound)
    cause = None
    last = spec.vocab_size - 1
    for reading in list_readings(spec, params, fails):
        shift = reading.target_shift
        tokens = jnp.clip(batch.tokens + shift, 0, last)
        targets = jnp.clip(batch.targets + shift, 0, last)
        shifted = batch._replace(tokens=tokens, targets=targets)
        found = measure_nats_per_token(reading.spec, reading.params, shifted, dtype)
        if found < best:
            best = found
            effect = f"loss {found:.2f} instead of {measured:.2f} on a few sequences"
            cause = f"{reading.cause} ({effect})"
    return cause


def list_readings(spec: ModelSpec, params: Params, fails: bool) -> Iterator[AlternativeReading]:
    """Yield what people get wrong."""
    where = "set it in config.json, or in spec.json of a run"
    for theta in ROPE_THETAS:
        if theta != spec.rope_theta:
            cause = f"the model's rope theta is {theta:,.0f}, not {spec.rope_theta:,.0f}; {where}"
            yield AlternativeReading(cause, spec.replace(rope_theta=theta), params)
    if spec.rope_scaling:
        cause = "the model was trained without the rope scaling of its config.json; remove it there"
        yield AlternativeReading(cause, spec.replace(rope_scaling=None), params)
    norms = find_reset_norms(spec, params)
    if norms["the final norm"] and not all(norms.values()):
        # sound logits are neither too flat nor too steep: if another scale fits better, ones are
        # not the norm's scales
        cause = NOT_COPIED.format("the final norm")
        for scale in NORM_SCALES:
            offset = transformer.param_specs(spec)["norm"].offset
            scaled = {**params, "norm": (params["norm"] + offset) * scale - offset}
            yield AlternativeReading(cause, spec, scaled)
    if not fails:
        return
    for eps in NORM_EPS_VALUES:
        if eps != spec.norm_eps:
            cause = f"the model's norm eps is {eps:g}, not {spec.norm_eps:g}; {where}"
            yield AlternativeReading(cause, spec.replace(norm_eps=eps), params)
    for shift in (-3, -2, -1, 1, 2, 3):
        cause = (
            f"the vocabulary is shifted: id i of the data is embedding row i{shift:+d} of the "
            "model; pack with the model's tokenizer"
        )
        yield AlternativeReading(cause, spec, params, shift)


def describe_weight_fault(spec: ModelSpec, params: Params, batch: Batch) -> str | None:
    """Return what is wrong with the weights themselves, if anything can be seen."""
    for leaf in jax.tree.leaves(params):
        if not jnp.all(jnp.isfinite(leaf)):
            return "the weights are damaged: some are not finite; get them again"
    norms = find_reset_norms(spec, params)
    if all(norms.values()):
        return (
            "the weights were never trained, or no norm was copied: the scales of all norms are "
            "exactly 1; take them from the model's source"
        )
    reset_names = [name for name, is_reset in norms.items() if is_reset]
    if reset_names:
        return NOT_COPIED.format(" and ".join(reset_names))
    row_norms = compute_embedding_norms(params)
    is_tiny_row = row_norms < TINY_STD * np.median(row_norms)
    is_tiny = jnp.take(is_tiny_row, batch.tokens)
    n_trained = jnp.sum(batch.loss_mask)
    n_tiny = jnp.sum(batch.loss_mask * is_tiny)
    share = float(n_tiny / n_trained)
    if share > MAX_UNTRAINED_FRAC:
        return (
            f"the data uses token ids that the model never learned ({share:.0%} of its tokens have "
            "an embedding near zero); pack with the model's tokenizer"
        )
    return None


def find_reset_norms(spec: ModelSpec, params: Params) -> dict[str, bool]:
    """Return, per kind of norm, whether all its scales are exactly 1, as before any training."""
    scales = {"the final norm": params["norm"]}
    for name, scale in params["blocks"].items():
        if name.endswith("norm"):
            scales[f"{name} of all layers"] = scale
    offset = transformer.param_specs(spec)["norm"].offset
    return {name: bool(jnp.all(scale + offset == 1)) for name, scale in scales.items()}


def compute_embedding_norms(params: Params) -> np.ndarray:
    """Return the norm of each embedding row, float32 [V], without gathering the embedding."""
    replicated = make_replicated_sharding(params["embed"].sharding.mesh)

    def row_norms(embed: jax.Array) -> jax.Array:
        return jnp.linalg.norm(embed.astype(jnp.float32), axis=1)

    jitted = jax.jit(row_norms, out_shardings=replicated)
    return np.asarray(jitted(params["embed"]))


def measure_nats_per_token(spec: ModelSpec, params: Params, batch: Batch, dtype: str) -> float:
    """Return nats per trained token of a batch."""
    mesh = params["embed"].sharding.mesh
    step = make_theta_step(spec.replace(rope_theta=1.0), mesh, dtype)
    return float(step(params, batch, np.float32(spec.rope_theta)))


@functools.lru_cache(maxsize=8)
def make_theta_step(
    spec: ModelSpec, mesh: jax.sharding.Mesh, dtype: str
) -> Callable[..., jax.Array]:
    """Return (params, batch, theta) -> nats per token; one compilation serves all thetas."""
    compute_dtype = jnp.dtype(dtype)

    def step(params: Params, batch: Batch, theta: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            inputs = batch.tokens, batch.segment_ids, batch.positions
            with_theta = spec.replace(rope_theta=theta)
            hidden, _ = transformer.forward(with_theta, params, *inputs, compute_dtype)
            head = transformer.lm_head(spec, params, compute_dtype)
            _, loss_sum = loss.cross_entropy(
                hidden, head, batch.targets, batch.loss_mask, softcap=spec.logit_softcap
            )
            return loss_sum / jnp.sum(batch.loss_mask)

    replicated = make_replicated_sharding(mesh)
    params_sharding = transformer.make_param_shardings(spec, mesh)
    in_shardings = (params_sharding, make_batch_sharding(mesh), replicated)
    return jax.jit(step, in_shardings=in_shardings, out_shardings=replicated)

"""Why do weights not fit the rows? The same weights read in other ways, and what they tell of themselves."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.model import llama, loss
from jaxpt.sharding import make_batch_sharding, make_replicated_sharding
from jaxpt.spec import Batch, ModelSpec

# Nats a token by which another reading of the weights must be better to count. Both are measured on the same few thousand
# tokens, where a mean difference by chance stays near 0.01.
MIN_IMPROVEMENT = 0.05
ROPE_THETAS = (
    10_000.0,
    500_000.0,
    1_000_000.0,
)  # Llama 1 and 2; Llama 3; Qwen and the later Mistrals
NORM_EPS_VALUES = (1e-5, 1e-6)
TINY_STD = 0.1  # of the median norm of embedding rows; trained rows lie within a half and twice of it (stories260K: 0.54 to 1.18)
MAX_UNTRAINED_FRAC = "{} was not copied: all its scales are exactly 1, other norms' are not; take it from the model's source"


def find_better_reading(
    spec: ModelSpec, params, batch: Batch, dtype: str, sound: float, fails: bool
) -> str | None:
    """What is wrong and what to do, if another reading of the same weights fits the batch better by MARGIN, and below `sound` nats a token."""
    measured = measure_nats_per_token(spec, params, batch, dtype)
    best, cause = min(measured - MIN_IMPROVEMENT, sound), None
    for reading in list_readings(spec, params, fails):
        tokens, targets = (
            jnp.clip(ids + reading.target_shift, 0, spec.vocab_size - 1)
            for ids in (batch.tokens, batch.targets)
        )
        found = measure_nats_per_token(
            reading.spec, reading.params, batch._replace(tokens=tokens, targets=targets), dtype
        )
        if found < best:
            best, cause = (
                found,
                f"{reading.cause} (on a few rows that alone takes the loss from {measured:.2f} to {found:.2f})",
            )
    return cause


class AlternativeReading(NamedTuple):
    """Another way to read the same weights, and what it means if that fits the rows better."""

    cause: str
    spec: ModelSpec
    params: Any
    target_shift: int = 0  # added to every token id


def list_readings(spec: ModelSpec, params, fails: bool) -> Iterator[AlternativeReading]:
    """What people get wrong. A model that does not fail is not tried with what would have made it fail."""
    where = "set it in config.json, or in spec.json of a run"
    for theta in ROPE_THETAS:
        if theta != spec.rope_theta:
            yield AlternativeReading(
                f"the model's rope theta is {theta:,.0f}, not {spec.rope_theta:,.0f}; {where}",
                spec.replace(rope_theta=theta),
                params,
            )
    if spec.rope_scaling:
        yield AlternativeReading(
            "the model was trained without the rope scaling of its config.json; remove it there",
            spec.replace(rope_scaling=None),
            params,
        )
    norms = reset_norms(spec, params)
    if norms["the final norm"] and not all(norms.values()):
        # sound logits are neither too flat nor too steep: where another size of the norm fits better, ones are not its scales
        for size in (0.25, 0.35, 0.5, 0.71, 1.41, 2.0, 2.83, 4.0):
            yield AlternativeReading(
                MAX_UNTRAINED_FRAC.format("the final norm"),
                spec,
                {**params, "norm": params["norm"] * size},
            )
    if fails:
        for eps in NORM_EPS_VALUES:
            if eps != spec.norm_eps:
                yield AlternativeReading(
                    f"the model's norm eps is {eps:g}, not {spec.norm_eps:g}; {where}",
                    spec.replace(norm_eps=eps),
                    params,
                )
        for shift in (-3, -2, -1, 1, 2, 3):
            cause = f"the vocabulary is shifted: id i of the rows is row i{shift:+d} of the model's embedding; pack with the model's own tokenizer"
            yield AlternativeReading(cause, spec, params, shift)


def describe_weight_fault(spec: ModelSpec, params, batch: Batch) -> str | None:
    """What the weights themselves tell, where no other reading of them fits."""
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(params)):
        return "the weights are damaged: some are not finite; get them again"
    norms = reset_norms(spec, params)
    if all(norms.values()):
        return "the weights were never trained, or no norm was copied: the scales of all norms are exactly 1; take them from the model's source"
    if any(norms.values()):
        return MAX_UNTRAINED_FRAC.format(" and ".join(name for name, ones in norms.items() if ones))
    rows = compute_embedding_norms(params)
    share = float(
        jnp.sum(batch.loss_mask * jnp.take(rows < TINY_STD * np.median(rows), batch.tokens))
        / jnp.sum(batch.loss_mask)
    )
    if share > 0.01:
        return f"the rows use token ids that the model never learnt ({share:.0%} of their tokens have an embedding near zero); pack with its own tokenizer"
    return None


def reset_norms(spec: ModelSpec, params) -> dict[str, bool]:
    """Of each kind of norm, whether all its scales (in all layers) are exactly 1, as they are before any training."""
    norms = {"the final norm": params["norm"]}
    norms |= {
        f"{name} of all layers": params["blocks"][name]
        for name, row in llama.param_specs(spec)["blocks"].items()
        if row.ones
    }
    return {name: bool(jnp.all(scales == 1)) for name, scales in norms.items()}


def compute_embedding_norms(params) -> np.ndarray:
    """Norm of each row of the embedding, float32 [V]; the table stays where it lies."""
    whole = make_replicated_sharding(params["embed"].sharding.mesh)
    return np.asarray(
        jax.jit(
            lambda table: jnp.linalg.norm(table.astype(jnp.float32), axis=1), out_shardings=whole
        )(params["embed"])
    )


def measure_nats_per_token(spec: ModelSpec, params, batch: Batch, dtype: str) -> float:
    """Nats per trained token of a batch."""
    mesh = params["embed"].sharding.mesh
    return float(
        make_theta_step(spec.replace(rope_theta=1.0), mesh, dtype)(
            params, batch, np.float32(spec.rope_theta)
        )
    )


@functools.lru_cache(maxsize=8)
def make_theta_step(spec: ModelSpec, mesh, dtype: str):
    """likelihood.nats_step with the rope theta as an argument, so that one compilation serves all thetas."""

    def step(params, batch: Batch, theta):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = llama.bind_params(spec, params)
            model.spec = spec.replace(rope_theta=theta)
            hidden = model(batch.tokens, batch.segment_ids, batch.positions, jnp.dtype(dtype))
            _, nats_sum = loss.cross_entropy(
                hidden, model.lm_head(jnp.dtype(dtype)), batch.targets, batch.loss_mask
            )
            return nats_sum / jnp.sum(batch.loss_mask)

    return jax.jit(
        step,
        in_shardings=(
            llama.make_param_shardings(spec, mesh),
            make_batch_sharding(mesh),
            make_replicated_sharding(mesh),
        ),
        out_shardings=make_replicated_sharding(mesh),
    )

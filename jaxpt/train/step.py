"""One compiled step: forward, backward, accumulation, guards, update. The same code trains, and is planned for chips that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from jaxpt.config import Config
from jaxpt.model import attention, llama, loss
from jaxpt.sharding import (
    make_batch_sharding,
    make_replicated_sharding,
    n_shards,
    with_logical_constraint,
)
from jaxpt.spec import Batch, ModelSpec, UserError
from jaxpt.train import optimizer
from jaxpt.train.state import TrainState, make_abstract_state, state_shardings

SPIKE_WARMUP = 50  # updates before the running mean of gradient norms is trusted: early norms fall by themselves


def build_step(
    spec: ModelSpec, settings: Config, mesh, young: optimizer.NewParams = optimizer.NewParams()
):
    """The jitted step(state, batch) -> (state, metrics). State is donated, and leaves with the shardings it came with.

    young    what the last growth made new, for rates by age and for its warm-up

    metrics: float32 scalars nats_sum, weights_sum, loss (nats per trained token), grad_norm, lr, n_skipped, n_in_a_row.
    """
    train, optim = settings.train, settings.optim
    dtype = jnp.dtype(train.compute_dtype)
    # unrolled, a CPU overlaps what a loop's turns would do one after the other: 1.06 x on two cores (benchmarks/train_step.py)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    unroll = min(max(spec.n_layers, 1), 16) if on_cpu else 1
    if train.remat == "offload" and on_cpu:
        raise UserError(
            "train.remat: offload moves what dots keeps to the host's memory, and a CPU has no other. Use dots, minimal or full."
        )
    at_a_time = (
        (loss.CPU_CHUNK_TOKENS if on_cpu else loss.ACCELERATOR_CHUNK_TOKENS)
        * n_shards(mesh, "batch")
        * n_shards(mesh, "position")
    )
    backend, _ = attention.choose_backend(spec, settings, mesh)
    tx, lr_at = (
        optimizer.make_optimizer(optim, spec, young),
        optimizer.make_lr_schedule(optim, train.steps),
    )

    def loss_sums(params, batch: Batch):
        model = llama.bind_params(spec, params)
        hidden = model(
            batch.tokens, batch.segment_ids, batch.positions, dtype, train.remat, unroll, backend
        )
        return loss.cross_entropy(
            hidden,
            model.lm_head(dtype),
            batch.targets,
            batch.loss_mask,
            train.z_loss_weight,
            at_a_time,
        )

    def gradient_sums(params, batch: Batch):
        """Gradients of the summed loss, and the summed nats."""
        differentiate = jax.value_and_grad(loss_sums, has_aux=True)
        if train.grad_accum_steps == 1:
            (_, nats_sum), grads = differentiate(params, batch)
            return grads, nats_sum

        def add(sums, micro):
            (_, nats_sum), grads = differentiate(params, micro)
            return jax.tree.map(jnp.add, sums, (grads, nats_sum)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params), jnp.float32(0)
        return jax.lax.scan(add, zeros, split_micro_batches(batch, train.grad_accum_steps))[0]

    def step(state: TrainState, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            grads, nats_sum = gradient_sums(state.params, batch)
        weights_sum = jnp.sum(batch.loss_mask)
        rates = optimizer.lr_multiplier_tree(optim, spec, young)
        if rates:  # what is frozen has no part in the norm either
            grads = jax.tree.map(lambda g, rate: jnp.where(rate > 0, g, 0), grads, rates)
        per_token = 1 / jnp.maximum(weights_sum, 1)
        grad_norm = per_token * optax.tree.norm(grads)
        good = jnp.isfinite(nats_sum) & jnp.isfinite(grad_norm)
        if train.spike_factor:
            trusted = (state.step - state.skip_state["n_skipped"] >= SPIKE_WARMUP) & (
                state.skip_state["norm_mean"] > 0
            )  # 0: just grown
            good &= ~trusted | (grad_norm <= train.spike_factor * state.skip_state["norm_mean"])

        clip = jnp.minimum(optim.clip_norm / grad_norm, 1) if optim.clip_norm else 1
        directions, opt = tx.update(
            grads, state.opt_state, state.params, scale=clip * per_token, good=good
        )
        lr = lr_at(state.step)
        if rates:
            directions = jax.tree.map(lambda d, rate: rate * d, directions, rates)
        params = jax.tree.map(
            lambda p, d: jnp.where(good, (p - lr * d).astype(p.dtype), p), state.params, directions
        )
        guard = {
            "norm_mean": jnp.where(
                good,
                update_running_mean(state.skip_state["norm_mean"], grad_norm),
                state.skip_state["norm_mean"],
            ),
            "n_skipped": state.skip_state["n_skipped"] + ~good,
            "n_in_a_row": jnp.where(good, 0, state.skip_state["n_in_a_row"] + 1),
        }
        metrics = {
            "nats_sum": nats_sum, "weights_sum": weights_sum, "loss": nats_sum / jnp.maximum(weights_sum, 1),
            "grad_norm": grad_norm, "lr": lr, "n_skipped": guard["n_skipped"], "n_in_a_row": guard["n_in_a_row"],
        }  # fmt: skip
        return TrainState(state.step + 1, params, opt, guard), metrics

    goal = state_shardings(make_abstract_state(spec, settings, mesh))
    rows = jax.tree.map(lambda _: make_batch_sharding(mesh), Batch(*Batch._fields))
    return jax.jit(
        step,
        in_shardings=(goal, rows),
        out_shardings=(goal, make_replicated_sharding(mesh)),
        donate_argnums=0,
    )


def compile_step(
    spec: ModelSpec, settings: Config, mesh, young: optimizer.NewParams = optimizer.NewParams()
):
    """`build`'s step, compiled for a run's state and batches before either is there."""
    return (
        build_step(spec, settings, mesh, young)
        .lower(make_abstract_state(spec, settings, mesh), make_abstract_batch(settings, mesh))
        .compile()
    )


def run_warmup_step(run, now: TrainState, settings: Config, mesh) -> TrainState:
    """One step `run` on a made-up batch of full shape, so that memory is asked for before any data is read. Returns the state as it was.

    The batch's weights are NaN: the guard skips the update, which leaves parameters and moments as they are, bit by bit.
    """
    like = make_abstract_batch(settings, mesh)

    def make():
        B, T = like.tokens.shape
        each = lambda row, dtype: jnp.broadcast_to(jnp.asarray(row, dtype), (B, T))  # noqa: E731
        return Batch(
            each(0, "int32"),
            each(0, "int32"),
            each(1, "int32"),
            each(jnp.arange(T), "int32"),
            each(jnp.nan, "float32"),
        )

    batch = jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))()
    step, guard = jax.tree.map(jnp.copy, (now.step, now.skip_state))  # the others are donated
    after, _ = run(now, batch)
    return jax.block_until_ready(TrainState(step, after.params, after.opt, guard))


def split_micro_batches(batch: Batch, k: int) -> Batch:
    """[B, T] -> [k, B/k, T], micro-batch j holding rows j, j + k, ...: each device keeps the rows it has."""

    def cut(x):
        B, T = x.shape
        return with_logical_constraint(
            jnp.moveaxis(x.reshape(B // k, k, T), 1, 0), None, "batch", "position"
        )

    return jax.tree.map(cut, batch)


def update_running_mean(mean, value):
    """Over about 100 updates; starts at the first value."""
    return jnp.where(mean == 0, value, 0.99 * mean + 0.01 * value)


def make_abstract_batch(settings: Config, mesh) -> Batch:
    """A batch as ShapeDtypeStructs with shardings, for compiling without data."""
    shape = (settings.train.batch_size, settings.pack.seq_len)
    int32, float32 = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=make_batch_sharding(mesh))
        for dtype in (jnp.int32, jnp.float32)
    )
    return Batch(tokens=int32, targets=int32, segment_ids=int32, positions=int32, loss_mask=float32)

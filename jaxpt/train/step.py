"""The compiled train step: forward, backward, gradient accumulation, skip check, update.

The same code trains, and is compiled by the planner for chips that are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxpt.config import DistillConfig, OptimConfig, TrainConfig
from jaxpt.flops import count_flops_per_token
from jaxpt.growth.new_params import NewParams
from jaxpt.model import distill, dpo, loss, moe, transformer
from jaxpt.model.kernels import low_matmul, select, select_experts
from jaxpt.model.kernels.select import AttentionRequest
from jaxpt.model.mlp import SideOutputs
from jaxpt.model.param import replace_subtree, subtree_like
from jaxpt.model.transformer import Kernels, Params
from jaxpt.sharding import (
    make_batch_sharding,
    make_replicated_sharding,
    with_logical_constraint,
)
from jaxpt.spec import Batch, ModelSpec, TeacherSamples, UserError
from jaxpt.train import optimizer
from jaxpt.train.average import add_weights
from jaxpt.train.schedule import Schedule, compute_lr, make_schedule
from jaxpt.train.state import (
    SkipState,
    TrainState,
    make_abstract_state,
    select_trained,
    state_shardings,
)

# Updates before the running mean of gradient norms is trusted: early norms fall by themselves.
SPIKE_WARMUP = 50
# what decides how many layers are unrolled on a CPU
MAX_UNROLL = 16
UNROLLED_GAIN = 0.06  # of the run's time
COMPILE_SECONDS_PER_LAYER = 0.8
CPU_FLOPS = 1e11  # FLOP/s that a small model reaches on two cores


# What a step reports: float32 scalars by name, `n_skipped` and `consecutive_skips` int32. A further
# one needs no other line: it is logged, stored and plotted under its name.
Scalars = dict[str, jax.Array]
# (params, batch, LossInputs) -> (gradients of the summed loss, its sum in nats, side sums)
GradientFunction = Callable[..., tuple[Params, jax.Array, SideOutputs]]


class DistillSpec(NamedTuple):
    """How a step learns from a teacher.

    Attributes:
        config: of the loss.
        teacher: its architecture; None: the batches bring its samples.
        n_samples: per position of those.
        vocab_size: of the teacher that was sampled.
    """

    config: DistillConfig
    teacher: ModelSpec | None = None
    n_samples: int = 0
    vocab_size: int | None = None


class LossInputs(NamedTuple):
    """What the loss reads beside the model and the batch.

    Attributes:
        frozen_params: of the teacher, or of DPO's reference; None: there is none, or it is the base
            without adapters.
        alpha: weight of the KL to the teacher, float32 scalar; None without a teacher.
    """

    frozen_params: Params | None = None
    alpha: Any = None


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step(state, batch) -> (state, Scalars).

    Attributes:
        program: jax.stages.Compiled, of all arguments.
        rest: its arguments after the batch.
    """

    program: Any
    rest: tuple[Any, ...]

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        """Run a step."""
        return self.program(state, batch, *self.rest)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The jitted step(state, batch) -> (state, Scalars) on a schedule.

    The state is donated, and returned with the shardings that it came with. A third argument is the
    parameters of the teacher, or of DPO's reference unless the base without adapters is that.

    Attributes:
        program: jitted step(state, batch, schedule, frozen_params).
        schedule: of the run.
    """

    program: Any
    schedule: Schedule

    def __call__(self, state: TrainState, batch: Batch, *frozen: Params) -> Any:
        """Run a step."""
        return self.program(state, batch, self.schedule, *frozen)

    def trace(self, state: TrainState, batch: Batch, *frozen: Params) -> jax.stages.Traced:
        """Return the traced step of such arguments."""
        return self.program.trace(state, batch, self.schedule, *frozen)

    def lower(self, state: TrainState, batch: Batch, *frozen: Params) -> jax.stages.Lowered:
        """Return the lowered step of such arguments, whose program takes the schedule third."""
        return self.program.lower(state, batch, self.schedule, *frozen)

    def compile(self, state: TrainState, batch: Batch, *frozen: Params) -> CompiledStep:
        """Return the step, compiled for such arguments and with these frozen parameters."""
        compiled = self.lower(state, batch, *frozen).compile()
        return CompiledStep(compiled, (self.schedule, *frozen))


def build_step(
    spec: ModelSpec,
    train: TrainConfig,
    optim: OptimConfig,
    seq_len: int,
    mesh: Mesh,
    new_params: NewParams = NewParams(),
    distill_spec: DistillSpec | None = None,
) -> TrainStep:
    """Return the train step.

    Args:
        spec: the architecture.
        train: the training loop's knobs.
        optim: the optimizer's.
        seq_len: of a batch, in tokens.
        mesh: the devices.
        new_params: what the last growth added, for multipliers of old and new and re-warmup.
        distill_spec: of the teacher, if there is one.

    Raises:
        UserError: the settings do not work on this mesh.
    """
    sum_gradients = make_gradient_function(spec, train, seq_len, mesh, distill_spec)
    update = make_update_function(spec, optim, new_params, mesh)

    def step(
        state: TrainState, batch: Batch, schedule: Schedule, frozen_params: Params | None = None
    ) -> Any:
        loss_inputs = make_loss_inputs(distill_spec, state.step, schedule.n_steps, frozen_params)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            grads, loss_sum, side = sum_gradients(state.params, batch, loss_inputs)
        n_targets = count_targets(train, batch)
        multipliers = optimizer.lr_multiplier_tree(optim, spec, new_params)
        if multipliers:  # frozen weights are left out of the gradient norm too
            grads = jax.tree.map(drop_frozen, grads, multipliers)
        per_token = 1 / jnp.maximum(n_targets, 1)
        grad_norm = per_token * optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss_sum) & jnp.isfinite(grad_norm)
        good = is_finite & ~is_spike(state, grad_norm, train.spike_factor)
        scale = compute_scale(optim, per_token, grad_norm)
        rates = compute_lr(schedule, state.step, optim, train), schedule.n_warmup
        params, opt_state = update(state, grads, scale, rates, multipliers, good)
        params = move_router_bias(spec, params, side.loads, multipliers, good)
        skips = update_skip_state(state.skip_state, grad_norm, good)
        average = update_average(spec, optim, schedule, state, params, good)
        scalars = report_loss(loss_sum, n_targets, grad_norm, skips)
        scalars |= {"lr": rates[0], **report_layers(side, params, per_token, loss_inputs.alpha)}
        return TrainState(state.step + 1, params, opt_state, skips, average), scalars

    frozen = list_frozen_shardings(spec, train, distill_spec, mesh)
    in_state = state_shardings(make_abstract_state(spec, optim, mesh))
    return TrainStep(jit_step(step, in_state, frozen, mesh), make_schedule(optim, train.steps))


def jit_step(step: Callable, in_state: Any, frozen: list[Any], mesh: Mesh) -> Any:
    """Return the step, jitted with the shardings of its state and of frozen parameters."""
    replicated = make_replicated_sharding(mesh)
    in_shardings = (in_state, make_batch_sharding(mesh), replicated, *frozen)
    out = (in_state, replicated)
    return jax.jit(step, in_shardings=in_shardings, out_shardings=out, donate_argnums=0)


def update_average(
    spec: ModelSpec,
    optim: OptimConfig,
    schedule: Schedule,
    state: TrainState,
    params: Params,
    good: jax.Array,
) -> Any:
    """Return the average of the weights after a step, which takes them in its window if good."""
    n = state.step + 1
    takes = good & (n >= schedule.average_start) & (n < schedule.average_stop)
    return add_weights(state.average, select_trained(spec, params), optim, takes)


def has_reference_params(train: TrainConfig, spec: ModelSpec) -> bool:
    """Return whether a step takes the parameters of a reference, beside the model's own."""
    return train.dpo_beta > 0 and not spec.lora


def find_frozen_spec(
    spec: ModelSpec, train: TrainConfig, distill_spec: DistillSpec | None
) -> ModelSpec | None:
    """Return the model that a step runs forward beside its own: a teacher, or DPO's reference."""
    if train.dpo_beta:
        return spec.replace(lora=None)
    return distill_spec.teacher if distill_spec else None


def count_targets(train: TrainConfig, batch: Batch) -> jax.Array:
    """Return the divisor of a batch's summed loss: its targets, or its pairs."""
    return jnp.sum(dpo.find_pairs(batch) if train.dpo_beta else batch.loss_mask)


def list_frozen_shardings(
    spec: ModelSpec, train: TrainConfig, distill_spec: DistillSpec | None, mesh: Mesh
) -> list[Any]:
    """Return the shardings of the teacher's or the reference's parameters, if they are given."""
    frozen = spec if has_reference_params(train, spec) else None
    if distill_spec:
        frozen = distill_spec.teacher
    return [transformer.make_param_shardings(frozen, mesh)] if frozen else []


def compute_scale(optim: OptimConfig, per_token: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Return what summed gradients are multiplied by: to their mean, clipped to a norm."""
    scale = per_token
    if optim.clip_norm:
        scale *= jnp.minimum(optim.clip_norm / grad_norm, 1)
    return scale


def make_loss_inputs(
    distill_spec: DistillSpec | None, step: jax.Array, n_steps: Any, frozen_params: Params | None
) -> LossInputs:
    """Return what the loss reads in the step after `step` others."""
    if distill_spec is None:
        return LossInputs(frozen_params)
    first, last = distill_spec.config.alpha
    done = jnp.minimum(step / jnp.maximum(n_steps - 1, 1), 1)
    return LossInputs(frozen_params, first + (last - first) * done)


def report_loss(
    loss_sum: jax.Array, n_targets: jax.Array, grad_norm: jax.Array, skips: SkipState
) -> Scalars:
    """Return what every step reports of its loss and of skipped updates."""
    return {
        "loss_sum": loss_sum,  # nats, over the batch, without z-loss
        "n_targets": n_targets,  # the sum of the loss mask, or the number of pairs
        "loss": loss_sum / jnp.maximum(n_targets, 1),
        "grad_norm": grad_norm,  # of the mean gradient, before clipping
        "n_skipped": skips.n_skipped,  # since step 0
        "consecutive_skips": skips.consecutive_skips,  # this step included
    }


def report_layers(
    side: SideOutputs, params: Params, per_token: jax.Array, alpha: jax.Array | None
) -> Scalars:
    """Return what the layers' feed-forward parts and the teacher report, given their side sums."""
    scalars = {name: per_token * total for name, total in side.scalars.items()}
    if alpha is not None:
        scalars["alpha"] = alpha  # weight of the KL
    if side.loads is not None:
        scalars |= moe.measure_routers(params["blocks"], side.loads)
    return scalars


def make_update_function(
    spec: ModelSpec, optim: OptimConfig, new_params: NewParams, mesh: Mesh
) -> Callable[..., tuple[Params, Any]]:
    """Return update(state, grads, scale, rates, multipliers, good) -> (params, opt_state).

    Gradients are of the summed loss, by what trains: all parameters, or the adapters; `scale`
    divides and clips them. The rates are the step's and the number of warm-up steps. Multipliers of
    the learning rate are nested like the gradients, or None. A bad step changes nothing.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"

    def update(
        state: TrainState,
        grads: Params,
        scale: jax.Array,
        rates: tuple[jax.Array, jax.Array],
        multipliers: Any,
        good: jax.Array,
    ) -> tuple[Params, Any]:
        optimizer.check_lr_multipliers(optim, state.opt_state)
        lr, n_warmup = rates
        n_updates = state.step - state.skip_state.n_skipped + 1
        tx = optimizer.make_optimizer(optim, spec, new_params, lr, n_updates, n_warmup)

        def apply(params: Params, opt_state: Any) -> tuple[Params, Any]:
            clipped = jax.tree.map(lambda g: scale * g, grads)
            updates, opt_state = tx.update(clipped, opt_state, params)
            if multipliers:
                updates = jax.tree.map(jnp.multiply, multipliers, updates)
            return cast(Params, optax.apply_updates(params, updates)), opt_state

        trained = select_trained(spec, state.params)
        trained, opt_state = update_if(good, apply, trained, state.opt_state, on_cpu)
        return replace_subtree(state.params, trained), opt_state

    return update


def move_router_bias(
    spec: ModelSpec, params: Params, loads: jax.Array | None, multipliers: Any, good: jax.Array
) -> Params:
    """Return the parameters with the routers' biases moved by the loads, after a good step.

    No optimizer moves them: they have no gradient. Under adapters they are frozen.
    """
    blocks = params["blocks"]
    if loads is None or spec.lora or "router_bias" not in blocks:
        return params
    bias = blocks["router_bias"]
    moves = good
    if multipliers:
        moves = good & (multipliers["blocks"]["router_bias"] > 0)
    bias = jnp.where(moves, moe.move_router_bias(spec, bias, loads), bias)
    return {**params, "blocks": {**blocks, "router_bias": bias}}


def update_if(
    good: jax.Array, update: Callable, params: Params, opt_state: Any, on_cpu: bool
) -> Any:
    """Return update(params, opt_state) or, after a bad step, both bit for bit.

    This skips the update of any optimizer, whatever its state, and writes in place. On a CPU that
    takes a conditional: `where(good, new, old)` makes XLA copy all moments first, in 5 x the time.
    On a GPU it is the conditional that copies: Adam's update peaks at 7 times the parameters, and
    at 4 times without (compiled for an H100; for v5p 4 and 3).
    """

    def update_as(params: Params, opt_state: Any) -> tuple[Params, Any]:
        new = update(params, opt_state)
        return jax.tree.map(lambda a, b: a.astype(b.dtype), new, (params, opt_state))

    def keep(params: Params, opt_state: Any) -> tuple[Params, Any]:
        return params, opt_state

    if on_cpu:
        return jax.lax.cond(good, update_as, keep, params, opt_state)
    new = update_as(params, opt_state)
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (params, opt_state))


def drop_frozen(grad: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Return the gradient, 0 where the learning rate is."""
    return jnp.where(multiplier > 0, grad, 0)


def make_gradient_function(
    spec: ModelSpec,
    train: TrainConfig,
    seq_len: int,
    mesh: Mesh,
    distill_spec: DistillSpec | None = None,
) -> GradientFunction:
    """Return a function of (params, batch, LossInputs) -> (summed loss's gradients, sum, sides).

    Gradients are of the parameters that train. The sum is of the cross-entropy, in nats. The side
    sums are what the feed-forward parts and the loss report. Scalars are times the
    number of targets, so that their mean over micro-batches weighs each as the loss does.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    unroll = choose_unroll(spec, train, seq_len, on_cpu)
    if train.remat == "offload" and on_cpu:
        raise UserError(
            "train.remat: offload moves activations to the host's memory, and a CPU has no other. "
            "Use dots, minimal or full."
        )
    low_matmul.check_matmul_dtype(train.matmul_dtype, mesh.devices.flat[0])
    kernels = choose_kernels(spec, train, seq_len, mesh)
    kernels = kernels._replace(matmul_dtype=train.matmul_dtype)
    run_model = make_model_function(train, kernels, unroll)
    loss_knobs = (train.z_loss_weight, loss.count_chunk_tokens(mesh), spec.logit_softcap)
    if train.dpo_beta:
        measure = make_pair_loss(spec, train.dpo_beta, run_model, loss_knobs)
    else:
        measure = make_loss_function(train, seq_len, mesh, unroll, loss_knobs, distill_spec)

    def sum_losses(
        trained: Params, params: Params, batch: Batch, loss_inputs: LossInputs
    ) -> tuple[jax.Array, tuple[jax.Array, SideOutputs]]:
        params = replace_subtree(params, trained)
        hidden, head, side = run_model(spec, params, batch)
        objective, loss_sum, reported = measure(hidden, head, params, batch, loss_inputs)
        n_targets = count_targets(train, batch)
        if side.losses:
            objective += n_targets * sum(side.losses.values())
        scalars = {name: n_targets * value for name, value in side.scalars.items()}
        return objective, (loss_sum, SideOutputs({}, scalars | reported, side.loads))

    differentiate = jax.value_and_grad(sum_losses, has_aux=True)

    def sum_gradients(
        params: Params, batch: Batch, loss_inputs: LossInputs = LossInputs()
    ) -> tuple[Params, jax.Array, SideOutputs]:
        trained = select_trained(spec, params)
        (_, (loss_sum, side)), grads = differentiate(trained, params, batch, loss_inputs)
        return grads, loss_sum, side

    if train.grad_accum_steps == 1:
        return sum_gradients
    return accumulate_gradients(spec, sum_gradients, train.grad_accum_steps)


def make_model_function(
    train: TrainConfig, kernels: Kernels, unroll: int
) -> Callable[..., tuple[jax.Array, jax.Array, SideOutputs]]:
    """Return a function of (spec, params, batch) -> hidden states, output head, layers' reports."""
    dtype = jnp.dtype(train.compute_dtype)

    def run_model(spec: ModelSpec, params: Params, batch: Batch) -> Any:
        inputs = batch.tokens, batch.segment_ids, batch.positions
        hidden, side = transformer.forward(
            spec, params, *inputs, dtype, train.remat, unroll, kernels
        )
        return hidden, transformer.lm_head(spec, params, dtype), side

    return run_model


def make_pair_loss(
    spec: ModelSpec, beta: float, run_model: Callable, loss_knobs: tuple[float, int, float | None]
) -> Callable[..., tuple[jax.Array, jax.Array, Scalars]]:
    """Return a function of (hidden, head, params, batch, LossInputs) -> sums of DPO, as others'.

    The default of the reference is the base without adapters.
    """
    _, chunk_tokens, softcap = loss_knobs
    base = spec.replace(lora=None)

    def pair_loss(
        hidden: jax.Array, head: jax.Array, params: Params, batch: Batch, loss_inputs: LossInputs
    ) -> tuple[jax.Array, jax.Array, Scalars]:
        reference = loss_inputs.frozen_params
        if reference is None:
            reference = subtree_like(transformer.param_specs(base), params)
        expected, its_head, _ = run_model(base, reference, batch)
        how = batch, chunk_tokens, softcap
        nats = dpo.compute_target_nats(*jax.lax.stop_gradient((hidden, head)), *how)
        expected_nats = dpo.compute_target_nats(expected, its_head, *how)
        pairs = dpo.measure_pairs(nats, expected_nats, batch, beta)
        # the gradient is that of nats with these weights
        weighted = batch.targets, pairs.token_weights
        objective, _ = loss.cross_entropy(hidden, head, *weighted, 0.0, chunk_tokens, softcap)
        scalars = {"dpo_margin": pairs.margin_sum, "dpo_accuracy": pairs.n_right}
        return objective, pairs.loss_sum, scalars

    return pair_loss


def make_loss_function(
    train: TrainConfig,
    seq_len: int,
    mesh: Mesh,
    unroll: int,
    loss_knobs: tuple[float, int, float | None],
    distill_spec: DistillSpec | None,
) -> Callable[..., tuple[jax.Array, jax.Array, Scalars]]:
    """Return a function of (hidden, head, params, batch, LossInputs) -> objective, nats, others.

    Args:
        train: the training loop's knobs.
        seq_len: of a batch, in tokens.
        mesh: the devices.
        unroll: layers that the model runs per turn of a loop.
        loss_knobs: weight of the z-loss, tokens per chunk, softcap of the logits.
        distill_spec: of the teacher, if there is one.
    """

    def cross_entropy(
        hidden: jax.Array, head: jax.Array, params: Params, batch: Batch, _: LossInputs
    ) -> Any:
        targets = batch.targets, batch.loss_mask
        return *loss.cross_entropy(hidden, head, *targets, *loss_knobs), {}

    if distill_spec is None:
        return cross_entropy
    run_teacher = make_teacher_function(distill_spec, train, seq_len, mesh, unroll)
    divergence = make_divergence(distill_spec)

    def distillation_loss(
        hidden: jax.Array, head: jax.Array, params: Params, batch: Batch, loss_inputs: LossInputs
    ) -> Any:
        teacher = run_teacher(batch, loss_inputs.frozen_params)
        targets = batch.targets, batch.loss_mask
        *sums, kl_sum = distill.distillation_loss(
            hidden, head, *targets, teacher, loss_inputs.alpha, divergence, *loss_knobs
        )
        return *sums, {"kl": kl_sum}

    return distillation_loss


def make_teacher_function(
    distill_spec: DistillSpec, train: TrainConfig, seq_len: int, mesh: Mesh, unroll: int
) -> Callable[..., tuple[jax.Array, jax.Array] | TeacherSamples]:
    """Return a function of (batch, params) -> the teacher's hidden states and head, or samples."""
    spec, dtype = distill_spec.teacher, jnp.dtype(train.compute_dtype)
    if spec is None:

        def take_samples(batch: Batch, _: None) -> TeacherSamples:
            assert batch.samples
            return batch.samples

        return take_samples
    kernels = choose_kernels(spec, train, seq_len, mesh)
    unroll = unroll if spec.n_layers % unroll == 0 else 1

    def run(batch: Batch, params: Params) -> tuple[jax.Array, jax.Array]:
        inputs = batch.tokens, batch.segment_ids, batch.positions
        hidden, _ = transformer.forward(
            spec, params, *inputs, dtype, unroll=unroll, kernels=kernels
        )
        return hidden, transformer.lm_head(spec, params, dtype)

    return run


def make_divergence(distill_spec: DistillSpec) -> distill.Divergence:
    """Return which KL a run takes."""
    knobs, spec = distill_spec.config, distill_spec.teacher
    softcap = spec.logit_softcap if spec else None
    is_reverse = knobs.direction == "reverse"
    return distill.Divergence(knobs.temperature, is_reverse, softcap, distill_spec.vocab_size)


def choose_unroll(spec: ModelSpec, train: TrainConfig, seq_len: int, on_cpu: bool) -> int:
    """Return how many layers are in the body of the loop over layers: train.unroll_layers, or 0's.

    Unrolled, a CPU overlaps what a loop would run one after the other: 1.06 x on two cores
    (benchmarks/train_step.py). Each layer more in the loop's body takes 0.8 CPU seconds to compile
    (measured with 4, 10 and 16 of 100), so a short run keeps the loop. A divisor leaves no
    remainder, which would be compiled beside the body. It depends on nothing but the recipe, so a
    resumed run has the same program.
    """
    if train.unroll_layers:
        return max(min(train.unroll_layers, spec.n_layers), 1)
    if not on_cpu:
        return 1
    n_tokens = train.steps * train.batch_size * seq_len
    run_seconds = n_tokens * count_flops_per_token(spec, seq_len) / CPU_FLOPS
    n_worthwhile = int(UNROLLED_GAIN * run_seconds / COMPILE_SECONDS_PER_LAYER)
    most = min(spec.n_layers, n_worthwhile, MAX_UNROLL)
    return max((n for n in range(1, most + 1) if spec.n_layers % n == 0), default=1)


def accumulate_gradients(
    spec: ModelSpec, sum_gradients: GradientFunction, n_micro_batches: int
) -> GradientFunction:
    """Return a function that runs `sum_gradients` on one micro-batch after the other."""

    def accumulate(
        params: Params, batch: Batch, loss_inputs: LossInputs = LossInputs()
    ) -> tuple[Params, jax.Array, SideOutputs]:
        def add(sums: Any, micro_batch: Batch) -> tuple[Any, SideOutputs]:
            grads, loss_sum, side = sum_gradients(params, micro_batch, loss_inputs)
            return jax.tree.map(jnp.add, sums, (grads, loss_sum)), side

        trained = select_trained(spec, params)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), trained)
        initial = (zeros, jnp.float32(0))
        micro_batches = split_micro_batches(batch, n_micro_batches)
        (grads, loss_sum), sides = jax.lax.scan(add, initial, micro_batches)
        return grads, loss_sum, jax.tree.map(sum_micro_batches, sides)

    return accumulate


def sum_micro_batches(x: jax.Array) -> jax.Array:
    """Return the sum over the first axis."""
    return jnp.sum(x, axis=0)


def choose_kernels(spec: ModelSpec, train: TrainConfig, seq_len: int, mesh: Mesh) -> Kernels:
    """Return what runs attention and experts."""
    asked = make_attention_request(train, seq_len)
    attention, _ = select.choose_backend(spec, asked, mesh)
    if not spec.n_experts:
        return Kernels(attention)
    experts, _ = select_experts.choose_experts_kernel(
        spec, train.experts, train.compute_dtype, mesh
    )
    return Kernels(attention, experts)


def make_attention_request(train: TrainConfig, seq_len: int) -> AttentionRequest:
    """Return what a run asks of attention."""
    micro_batch_size = train.batch_size // train.grad_accum_steps
    return AttentionRequest(train.attention, train.compute_dtype, micro_batch_size, seq_len)


def is_spike(state: TrainState, grad_norm: jax.Array, spike_factor: float) -> Any:
    """Return whether the gradient norm is far above its running mean. A factor of 0: never."""
    if not spike_factor:
        return jnp.bool_(False)
    mean = state.skip_state.norm_mean
    n_updates = state.step - state.skip_state.n_skipped
    trusted = (n_updates >= SPIKE_WARMUP) & (mean > 0)  # 0: just grown
    is_near = grad_norm <= spike_factor * mean
    return trusted & ~is_near


def update_skip_state(skips: SkipState, grad_norm: jax.Array, good: jax.Array) -> SkipState:
    """Return the skip state after a step."""
    mean = update_running_mean(skips.norm_mean, grad_norm)
    return SkipState(
        norm_mean=jnp.where(good, mean, skips.norm_mean),
        n_skipped=skips.n_skipped + ~good,
        consecutive_skips=jnp.where(good, 0, skips.consecutive_skips + 1),
    )


def update_running_mean(mean: jax.Array, value: jax.Array) -> jax.Array:
    """Return the mean over about the last 100 updates. It starts at the first value."""
    return jnp.where(mean == 0, value, 0.99 * mean + 0.01 * value)


def run_warmup_step(step: Any, state: TrainState, abstract: Batch) -> TrainState:
    """Run one step on a made-up batch of full shape, so that out-of-memory comes before data.

    The batch's loss mask is NaN, so the update is skipped: parameters and moments keep their bits.

    Args:
        step: the compiled step.
        state: donated.
        abstract: `make_abstract_batch` of its batches.

    Returns:
        The state as it was.
    """
    shape = abstract.tokens.shape

    def make_batch() -> Batch:
        zeros = jnp.zeros(shape, jnp.int32)
        segment_ids = jnp.ones(shape, jnp.int32)
        positions = jnp.arange(shape[1], dtype=jnp.int32)
        positions = jnp.broadcast_to(positions, shape)
        mask = jnp.full(shape, jnp.nan, jnp.float32)
        samples = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.samples)
        return Batch(zeros, zeros, segment_ids, positions, mask, samples)

    batch = jax.jit(make_batch, out_shardings=abstract.tokens.sharding)()
    kept_step = jnp.copy(state.step)  # the rest is donated
    kept_skips = jax.tree.map(jnp.copy, state.skip_state)
    after, _ = step(state, batch)
    after = after._replace(step=kept_step, skip_state=kept_skips)
    return jax.block_until_ready(after)


def split_micro_batches(batch: Batch, k: int) -> Batch:
    """Return [B, T, ...] as [k, B/k, T, ...]. Each device keeps the sequences that it has.

    Micro-batch j holds sequences j, j + k, ...
    """

    def split(x: jax.Array) -> jax.Array:
        B, *rest = x.shape
        x = x.reshape(B // k, k, *rest)
        x = jnp.moveaxis(x, 1, 0)
        return with_logical_constraint(x, None, "batch", "position", *[None] * (len(rest) - 1))

    return jax.tree.map(split, batch)


def make_abstract_batch(
    batch_size: int, seq_len: int, mesh: Mesh, distill_spec: DistillSpec | None = None
) -> Batch:
    """Return a batch as ShapeDtypeStructs with shardings, for compiling without data."""
    shape = (batch_size, seq_len)
    sharding = make_batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    numbers = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    samples = None
    if distill_spec and not distill_spec.teacher:
        drawn = (*shape, distill_spec.n_samples)
        drawn_ids = jax.ShapeDtypeStruct(drawn, jnp.int32, sharding=sharding)
        samples = TeacherSamples(drawn_ids, numbers)
    return Batch(ids, ids, ids, ids, numbers, samples)

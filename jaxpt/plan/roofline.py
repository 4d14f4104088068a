"""Estimate a step by arithmetic: its memory, FLOPs and traffic, and the time that they take.

The time of a step lies between what matmuls, memory and links would each take at full speed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpt import sharding
from jaxpt.config import OptimConfig, TrainConfig
from jaxpt.flops import (
    compute_mean_context,
    count_attention_flops,
    count_flops_per_token,
    count_forward_flops_per_token,
    count_layer_matmul_params,
)
from jaxpt.hardware import Target
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, list_param_specs, map_param_specs
from jaxpt.model.transformer import count_params
from jaxpt.spec import ModelSpec, Record
from jaxpt.train import optimizer
from jaxpt.train.state import find_sharded, select_trained


@dataclasses.dataclass(frozen=True)
class CollectiveCount(Record):
    """Collectives of one kind that one layer runs."""

    n_ops: int
    n_bytes: float  # of the whole arrays, summed over the operations
    domain_bytes: float = 0  # of them, within a domain: devices joined by NVLink or ICI


LayerCollectives = dict[str, CollectiveCount]  # collective, such as "all-gather" -> count


@dataclasses.dataclass(frozen=True)
class StepAnalysis(Record):
    """Memory, FLOPs and traffic of one train step on a target, compiled or estimated."""

    method: str  # "compiled" or "estimated"
    missing_package: str | None  # to install before compiling; None: nothing is missing
    mesh: dict[str, int]  # axis -> devices
    n_layers: int
    attention: str  # backend: "splash", "cudnn" or "xla"
    params_bytes: int  # per device, as all bytes up to peak_bytes
    opt_state_bytes: int
    saved_activation_bytes: int  # kept for backward under the remat policy, by rule of thumb
    gathered_expert_bytes: int  # of one layer, of which a token uses a few; 0: a dense model
    restore_bytes: int  # while a checkpoint is restored
    export_bytes: int  # while weights are gathered for export
    peak_bytes: int  # a lower bound where exceeds_memory
    exceeds_memory: bool  # the compiler gave up
    comm_bytes: dict[str, float]  # logical axis -> received over its mesh axes, per device and step
    memory_traffic_bytes: float  # read and written per device per step
    executed_flops: float  # per step over all devices, recomputation included
    loop_body_flops: float | None  # per device, each loop body counted once, as compilers count
    compiler_flops: float | None  # per device, the compiler's own count; None: it has none
    # of one turn of each loop over layers, forward first; empty: unknown
    layer_collectives: tuple[LayerCollectives, ...]
    analysis_seconds: float
    experts: str | None = None  # a mixture's kernel, and why; None: not known without compiling
    low_flops: float = 0.0  # of the executed ones, those in train.matmul_dtype
    frozen_bytes: int = 0  # per device, of the parameters of a teacher or DPO's reference
    frozen_flops_per_token: float = 0.0  # of its forward pass


class Roofline(NamedTuple):
    """Seconds per step: of each part alone at full speed, and the range that is expected."""

    compute_seconds: float
    memory_seconds: float
    network_seconds: float
    fast_seconds: float  # matmuls at high efficiency, transfers overlapped with them
    slow_seconds: float  # matmuls at low efficiency, no transfer overlapped

    @property
    def expected_seconds(self) -> float:
        """The middle of the range."""
        return (self.fast_seconds + self.slow_seconds) / 2


def compute_roofline(analysis: StepAnalysis, target: Target, train: TrainConfig) -> Roofline:
    """Return the time of a step from its executed matmuls and the bytes that it moves.

    The fast end moves the sharded weights, activations and sequences only; the slow end moves what
    the compiled program's layers move, where that is known to be more.
    """
    chip = target.chip
    compute = (analysis.executed_flops - analysis.low_flops) / chip.peak_flops(train.compute_dtype)
    if analysis.low_flops:
        is_faster = chip.has_units(train.matmul_dtype)  # a CPU emulates them
        dtype = train.matmul_dtype if is_faster else train.compute_dtype
        compute += analysis.low_flops / chip.peak_flops(dtype)
    compute /= target.n_devices
    memory = analysis.memory_traffic_bytes / chip.memory_bandwidth
    domain_bytes = 0.0
    for axis, n_bytes in analysis.comm_bytes.items():
        if count_span(analysis.mesh, axis) <= target.domain_size:
            domain_bytes += n_bytes
    network = target.count_receive_seconds(sum(analysis.comm_bytes.values()), domain_bytes)

    received = [count_received_bytes(found) for found in analysis.layer_collectives]
    n_turns = analysis.n_layers * train.grad_accum_steps
    layer_seconds = sum(target.count_receive_seconds(*each) for each in received)
    compiled_network = n_turns * layer_seconds

    slow_compute = compute / chip.efficiency.low
    fast_compute = compute / chip.efficiency.high
    return Roofline(
        compute,
        memory,
        network,
        fast_seconds=max(fast_compute, memory, network),
        slow_seconds=max(slow_compute, memory) + max(network, compiled_network),
    )


def count_span(mesh: dict[str, int], axis: str) -> int:
    """Return among how many consecutive devices a logical axis is sharded.

    Later axes of the mesh have closer neighbours.
    """
    first = min(map(sharding.MESH_AXES.index, sharding.find_mesh_axes(axis)))
    return math.prod(mesh[name] for name in sharding.MESH_AXES[first:])


def count_received_bytes(collectives: LayerCollectives) -> tuple[float, float]:
    """Return the least bytes that a device receives for them, and how many within a domain.

    An all-reduce brings each number twice: once to be added and once as the sum.
    """
    total = within = 0.0
    for kind, count in collectives.items():
        n_times = 2 if kind == "all-reduce" else 1
        total += n_times * count.n_bytes
        within += n_times * count.domain_bytes
    return total, within


# ---- one device, by rule of thumb


class StateBytes(NamedTuple):
    """Bytes of a train state over all devices, without copies."""

    param: int  # of one stored number
    params: int
    moments: int  # sharded as the parameters
    rest: int  # of the optimizer's state; every device holds it


def count_state_bytes(spec: ModelSpec, optim: OptimConfig, param_dtype: str) -> StateBytes:
    """Return the bytes of parameters and optimizer state, whatever the optimizer."""

    def describe(path: tuple[str, ...], param: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(param.shape, param.stored_dtype(param_dtype))

    params = map_param_specs(describe, transformer.param_specs(spec))
    trained = select_trained(spec, params)
    opt_state = jax.eval_shape(optimizer.make_optimizer(optim, spec).init, trained)
    weights = dict(jax.tree_util.tree_leaves_with_path(params))
    moments = rest = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        n_bytes = leaf.size * leaf.dtype.itemsize
        if find_sharded(path, leaf, weights):
            moments += n_bytes
        else:
            rest += n_bytes
    if optim.average:  # float32, sharded as the moments are
        moments += 4 * sum(leaf.size for leaf in jax.tree.leaves(trained))
    itemsize = jnp.dtype(param_dtype).itemsize
    params_bytes = 0
    for _, param in list_param_specs(transformer.param_specs(spec)):
        params_bytes += param.n_params * param.stored_dtype(param_dtype).itemsize
    return StateBytes(itemsize, params_bytes, moments, rest)


class DeviceShare(NamedTuple):
    """One device's share of a step."""

    microbatch_tokens: int
    grad_accum_steps: int
    n_fsdp: int  # shards of the weights over the batch's devices
    n_expert: int  # of experts, by their number
    n_tensor: int  # shards of heads, feed-forward and vocabulary
    n_context: int  # shards of a sequence
    compute_bytes: int  # per number in a matmul

    @classmethod
    def from_config(cls, train: TrainConfig, seq_len: int, mesh: dict[str, int]) -> DeviceShare:
        """Return the share on a mesh (axis -> devices)."""
        n_fsdp = sharding.n_shards_of_shape(mesh, "embed")
        n_expert = sharding.n_shards_of_shape(mesh, "experts")
        n_tensor = sharding.n_shards_of_shape(mesh, "mlp")
        n_context = sharding.n_shards_of_shape(mesh, "position")
        n_batch = sharding.n_shards_of_shape(mesh, "batch")
        n_sequences = train.batch_size // train.grad_accum_steps
        n_tokens = n_sequences * seq_len
        tokens = n_tokens // (n_batch * n_context)
        compute_bytes = jnp.dtype(train.compute_dtype).itemsize
        return cls(
            tokens, train.grad_accum_steps, n_fsdp, n_expert, n_tensor, n_context, compute_bytes
        )

    def count_gathered_params(self, spec: ModelSpec) -> float:
        """Return the parameters that a device gathers over fsdp, one layer after the other."""
        n_expert_params = spec.n_layers * count_expert_params(spec)
        n_others = count_params(spec) - n_expert_params
        return (n_others + n_expert_params / self.n_expert) / self.n_tensor

    def compute_weight_frac(self, spec: ModelSpec) -> float:
        """Return the share of the weights that a device holds."""
        return self.count_gathered_params(spec) / self.n_fsdp / count_params(spec)


def estimate_saved_activation_bytes(spec: ModelSpec, share: DeviceShare, remat: str) -> float:
    """Return the bytes that all layers keep for backward under a remat policy.

    full: each layer's input; offload: the same, the rest lies with the host; minimal: attention's
    result and logsumexp too; dots: the matmul results that backward reads too; none: about all
    that backward reads.
    """
    D = spec.d_model
    qkv = count_qkv_width(spec)
    mixed = spec.n_heads * (spec.d_head + 2)
    n_tensor = share.n_tensor
    widths = {
        "full": D,
        "offload": D,
        "minimal": D + mixed / n_tensor,
        "dots": 2 * D + (mixed + qkv + 2 * spec.active_d_ff) / n_tensor,
        "none": 6 * D + (2 * qkv + 4 * spec.active_d_ff) / n_tensor,
    }
    n_rows = spec.n_layers * share.microbatch_tokens
    return n_rows * widths[remat] * share.compute_bytes


def count_qkv_width(spec: ModelSpec) -> int:
    """Return the channels of q, k and v together."""
    return (spec.n_heads + 2 * spec.n_kv_heads) * spec.d_head


def count_expert_params(spec: ModelSpec) -> int:
    """Return the parameters of one layer's experts, all of which a device gathers."""
    params = transformer.layer_params(spec).values()
    return sum(param.size for param in params if "experts" in param.axes)


def estimate_temporary_bytes(
    spec: ModelSpec, share: DeviceShare, params_bytes: float, remat: str
) -> float:
    """Return the bytes that a device needs beside its state.

    Saved activations; gradients like the parameters, twice if micro-batches are summed; one layer
    at work; its gathered experts and the gathered output head, with their float32 gradients. Within
    25 % of what the compilers reported for the 8B shape on v5p, v6e and H100, and for
    Mixtral 8x7B and Solar Open on v5p; Grok-1 with tensor shards took 1.6 times as much there.
    """
    gradients = params_bytes
    if share.grad_accum_steps > 1:
        gradients *= 2
    n_rows = count_expert_rows(spec, share)  # of each token
    layer_width = 8 * spec.d_model + 5 * (n_rows * spec.d_ff + spec.d_shared) / share.n_tensor
    if spec.n_experts:
        layer_width += 4 * n_rows * spec.d_model  # as they go in and come out, and their gradients
    layer = share.microbatch_tokens * layer_width * share.compute_bytes
    n_head_params = spec.d_model * spec.vocab_size
    head = n_head_params * (share.compute_bytes + 4) / share.n_tensor
    # their gradients twice: of a device's own tokens, and summed over devices
    n_expert_params = count_expert_params(spec) / share.n_expert
    experts = n_expert_params * (share.compute_bytes + 8) / share.n_tensor
    saved = estimate_saved_activation_bytes(spec, share, remat)
    return gradients + saved + layer + head + experts


def count_expert_rows(spec: ModelSpec, share: DeviceShare) -> int:
    """Return the rows of experts that a device has space for, per token; dense: 1.

    Those of all devices that share the experts, should they all choose this one's.
    """
    if not spec.n_experts:
        return 1
    n_own = spec.n_experts // share.n_expert
    return share.n_expert * min(spec.n_experts_per_token, n_own)


def estimate_comm_bytes(
    spec: ModelSpec, share: DeviceShare, attention: str = "xla"
) -> dict[str, float]:
    """Return logical axis -> the least bytes that a device receives per step as it is sharded.

    fsdp: weights are gathered per micro-batch for forward and backward, and float32 gradients are
    summed on the way back. tensor: each layer's two results are summed in forward, backward and
    recomputation. context: each layer's keys and values are gathered, as often; a kernel's queries,
    keys, values and results are exchanged for those of whole sequences. expert: the tokens
    of each layer and their gradients are gathered and scattered, six times in all.
    """
    n_bytes = share.compute_bytes
    tokens = share.microbatch_tokens
    fsdp_params = share.count_gathered_params(spec)
    fsdp_params *= 1 - 1 / share.n_fsdp
    fsdp = (2 * n_bytes + 4) * fsdp_params
    tensor = 6 * 2 * tokens * spec.d_model * n_bytes
    tensor *= 1 - 1 / share.n_tensor
    n_kv_heads = spec.n_kv_heads / share.n_tensor
    n_received = share.n_context - 1  # times a device's own keys and values
    if attention != "xla":
        repeated = math.lcm(round(n_kv_heads), share.n_context)
        n_kv_heads = spec.n_heads / share.n_tensor + repeated
        n_received /= share.n_context
    context = 3 * tokens * n_received * 2 * n_kv_heads * spec.d_head * n_bytes
    expert = 6 * tokens * (share.n_expert - 1) * spec.d_model * n_bytes
    of_layer = {"experts": expert, "mlp": tensor, "position": context}
    micro_batch = {"embed": fsdp} | {axis: spec.n_layers * n for axis, n in of_layer.items()}
    return {axis: share.grad_accum_steps * n for axis, n in micro_batch.items()}


def estimate_memory_traffic_bytes(
    spec: ModelSpec, share: DeviceShare, seq_len: int, materializes_scores: bool
) -> float:
    """Return the bytes that a device reads and writes in its memory per step, by rule of thumb.

    The update passes over parameters, gradients and both moments, 8 times in all. A micro-batch
    casts the weights, reads them in forward, backward and recomputation, and adds to float32
    gradients. Each layer's activations (as many as remat none keeps) are written and read in
    forward, and twice more in backward; so are float32 attention scores if they are materialized.
    Logits: float32, three times.
    """
    n_tensor = share.n_tensor
    n_gathered = share.count_gathered_params(spec)
    update = 8 * n_gathered * 4 / share.n_fsdp
    weights = n_gathered * (5 * share.compute_bytes + 8)
    sharded_width = 2 * count_qkv_width(spec) + 4 * spec.active_d_ff
    width = 6 * spec.d_model + sharded_width / n_tensor
    layer = 6 * width * share.compute_bytes
    if materializes_scores:
        score_bytes = 6 * 4 * spec.n_heads / n_tensor
        layer += score_bytes * compute_mean_context(spec, seq_len)
    logits = 3 * 4 * spec.vocab_size / n_tensor
    per_token = spec.n_layers * layer + logits
    micro_batch = weights + share.microbatch_tokens * per_token
    return update + share.grad_accum_steps * micro_batch


def estimate_executed_flops_per_token(spec: ModelSpec, seq_len: int, remat: str) -> float:
    """Return the FLOPs that a step runs per token, recomputation included.

    Attention counts once more under any policy: each backward recomputes its scores, and cuDNN its
    result too.
    """
    flops = count_flops_per_token(spec, seq_len)
    flops += count_attention_flops(spec, seq_len)
    if remat in ("full", "minimal"):
        flops += 2 * spec.n_layers * count_layer_matmul_params(spec)
    return flops


def estimate_low_flops_per_token(spec: ModelSpec, train: TrainConfig, seq_len: int) -> float:
    """Return the FLOPs per token that a step runs in train.matmul_dtype.

    Forward, and with remat of matmuls again; in float8 both gradients too, or that of activations
    where the matrices are frozen. DPO's reference runs forward as the model does.
    """
    if train.matmul_dtype == "compute":
        return 0.0
    n_passes = 1 + (train.remat in ("full", "minimal")) + (train.dpo_beta > 0)
    if train.matmul_dtype == "float8":
        n_passes += 1 if spec.lora else 2
    n_tokens = train.batch_size // train.grad_accum_steps * seq_len
    params = transformer.list_low_matmuls(spec, n_tokens).values()
    return 2 * n_passes * spec.n_layers * sum(param.size for param in params)


def estimate_step(
    spec: ModelSpec,
    state: StateBytes,
    train: TrainConfig,
    seq_len: int,
    mesh: dict[str, int],
    attention: str,
) -> StepAnalysis:
    """Return what is known of a step without tracing or compiling it.

    Args:
        spec: the model.
        state: of the model and its optimizer.
        train: the section of the config.
        seq_len: tokens per sequence.
        mesh: axis -> devices.
        attention: backend, such as "xla".
    """
    share = DeviceShare.from_config(train, seq_len, mesh)
    weight_frac = share.compute_weight_frac(spec)
    params_bytes = round(state.params * weight_frac)
    opt_state_bytes = round(state.moments * weight_frac) + state.rest
    state_bytes = params_bytes + opt_state_bytes
    temporary_bytes = round(estimate_temporary_bytes(spec, share, params_bytes, train.remat))
    saved_bytes = estimate_saved_activation_bytes(spec, share, train.remat)
    expert_params = count_expert_params(spec) / share.n_expert / share.n_tensor
    expert_bytes = expert_params * share.compute_bytes
    widest = max(spec.vocab_size, spec.d_ff, spec.n_heads * spec.d_head)
    largest_tensor = spec.d_model * widest
    per_token = estimate_executed_flops_per_token(spec, seq_len, train.remat)
    low_per_token = estimate_low_flops_per_token(spec, train, seq_len)
    traffic = estimate_memory_traffic_bytes(spec, share, seq_len, attention == "xla")
    return StepAnalysis(
        method="estimated",
        missing_package=None,
        mesh=mesh,
        n_layers=spec.n_layers,
        attention=attention,
        params_bytes=params_bytes,
        opt_state_bytes=opt_state_bytes,
        saved_activation_bytes=round(saved_bytes),
        gathered_expert_bytes=round(expert_bytes),
        restore_bytes=state_bytes,  # a restored state is made in place
        # tensors are gathered one after the other, each whole on every device
        export_bytes=params_bytes + largest_tensor * state.param,
        peak_bytes=state_bytes + temporary_bytes,
        exceeds_memory=False,
        comm_bytes=estimate_comm_bytes(spec, share, attention),
        memory_traffic_bytes=round(traffic),
        executed_flops=train.batch_size * seq_len * per_token,
        loop_body_flops=None,
        compiler_flops=None,
        low_flops=train.batch_size * seq_len * low_per_token,
        layer_collectives=(),
        analysis_seconds=0.0,
    )


def add_frozen(
    analysis: StepAnalysis, spec: ModelSpec, frozen: ModelSpec, train: TrainConfig, seq_len: int
) -> StepAnalysis:
    """Return the analysis with the forward pass of a teacher or reference, by rule of thumb.

    Its weights are in the dtype of matmuls, gathered once per micro-batch, and keep nothing for
    backward: one layer is at work at a time. DPO's reference of adapters is their base, which is
    there already.
    """
    share = DeviceShare.from_config(train, seq_len, analysis.mesh)
    n_bytes, tokens = share.compute_bytes, share.microbatch_tokens
    n_params = 0 if train.dpo_beta and spec.lora else count_params(frozen)
    own_bytes = round(n_params * share.compute_weight_frac(frozen) * n_bytes)
    gathered = share.count_gathered_params(frozen)
    received = gathered * (1 - 1 / share.n_fsdp) * n_bytes
    width = 8 * frozen.d_model + 3 * frozen.active_d_ff / share.n_tensor
    head = frozen.d_model * frozen.vocab_size / share.n_tensor
    temporary = round((tokens * width + head) * n_bytes)
    logits = 4 * frozen.vocab_size / share.n_tensor
    per_token = frozen.n_layers * 2 * width * n_bytes + logits
    traffic = 2 * gathered * n_bytes + tokens * per_token
    flops = count_forward_flops_per_token(frozen, seq_len)
    comm_bytes = analysis.comm_bytes
    return dataclasses.replace(
        analysis,
        frozen_bytes=own_bytes,
        frozen_flops_per_token=flops,
        restore_bytes=analysis.restore_bytes + own_bytes,
        peak_bytes=analysis.peak_bytes + own_bytes + temporary,
        comm_bytes=comm_bytes | {"embed": comm_bytes["embed"] + share.grad_accum_steps * received},
        memory_traffic_bytes=analysis.memory_traffic_bytes
        + round(share.grad_accum_steps * traffic),
        executed_flops=analysis.executed_flops + train.batch_size * seq_len * flops,
    )


def predict_attention_backend(
    spec: ModelSpec, seq_len: int, train: TrainConfig, mesh: Mapping[str, int], target: Target
) -> str:
    """Return the backend that kernels/select.py would choose, as far as known without a device."""
    chip = target.chip
    n_heads = spec.n_heads // mesh["tensor"]  # which positions are exchanged for
    has_kernel_shapes = seq_len % 128 == 0 and n_heads % mesh["context"] == 0
    if train.attention == "xla" or not has_kernel_shapes or spec.attention_softcap is not None:
        return "xla"
    if chip.platform == "tpu":
        return "splash"
    # cuDNN attends to packed documents from Hopper on
    is_hopper = chip.gpu is not None and chip.gpu.capability >= (9, 0)
    has_cudnn_shapes = spec.d_head % 8 == 0 and spec.d_head <= 128
    if is_hopper and has_cudnn_shapes and train.compute_dtype == "bfloat16":
        return "cudnn"
    return "xla"

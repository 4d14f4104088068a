"""Count what a model costs by arithmetic: parameters, FLOPs and bytes from a ModelSpec.

A multiply and an add count as two FLOPs. Backward costs twice forward, so training costs three
forwards. What remat recomputes is not counted, because it is no progress (model FLOPs, as in PaLM,
2204.02311, appendix B). Axis letters as in jaxpt/spec.py.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxpt import sharding
from jaxpt.config import Config, TrainConfig
from jaxpt.model import transformer
from jaxpt.model.transformer import count_params
from jaxpt.plan.records import StepAnalysis
from jaxpt.spec import ModelSpec


def count_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Return the FLOPs to train on one token of a sequence of seq_len."""
    return 3 * count_forward_flops_per_token(spec, seq_len)


def count_forward_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Return the FLOPs of one token's forward pass: 2 per matmul parameter, and attention.

    Each layer's scores and mixing take 4 N H per position seen. Causal attention sees half the
    sequence on average, so training takes 6 per parameter plus 12 L N H T / 2. Documents shorter
    than the sequence make it less; that is left out.
    """
    matmul_flops = 2 * count_matmul_params(spec)
    return matmul_flops + count_attention_flops(spec, seq_len)


def count_attention_flops(spec: ModelSpec, seq_len: int) -> float:
    """Return the forward FLOPs per token of scores and mixing in all layers."""
    per_position = 4 * spec.n_heads * spec.d_head
    return spec.n_layers * per_position * compute_mean_context(spec, seq_len)


def compute_mean_context(spec: ModelSpec, seq_len: int) -> float:
    """Return how many positions a query sees in a sequence of one document, mean over layers."""
    contexts = []
    for kind in spec.layer_kinds:
        window = min(kind.window or seq_len, seq_len)
        contexts.append(window - window**2 / (2 * seq_len))
    return sum(contexts) / max(spec.n_layers, 1)


def count_matmul_params(spec: ModelSpec) -> int:
    """Return the matmul parameters that one token uses: layers and output head, no lookup."""
    head = spec.vocab_size * spec.d_model
    return spec.n_layers * count_layer_matmul_params(spec) + head


def count_layer_matmul_params(spec: ModelSpec) -> int:
    """Return the parameters of one layer's matrices that one token uses."""
    n_active = 0.0
    for param in transformer.layer_params(spec).values():
        if param.n_in:
            n_active += param.size * param.active_frac
    return round(n_active)


# ---- one device, by rule of thumb

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class DeviceShare(NamedTuple):
    """One device's share of a step."""

    microbatch_tokens: int
    grad_accum_steps: int
    n_fsdp: int  # shards of the weights over the batch's devices
    n_tensor: int  # shards of heads, feed-forward and vocabulary
    n_context: int  # shards of a sequence
    param_bytes: int  # per stored parameter
    compute_bytes: int  # per number in a matmul

    @classmethod
    def from_config(
        cls, train: TrainConfig, seq_len: int, param_dtype: str, mesh: dict[str, int]
    ) -> DeviceShare:
        """Return the share on a mesh (axis -> devices)."""
        n_fsdp = sharding.n_shards_of_shape(mesh, "embed")
        n_tensor = sharding.n_shards_of_shape(mesh, "mlp")
        n_context = sharding.n_shards_of_shape(mesh, "position")
        n_batch = sharding.n_shards_of_shape(mesh, "batch")
        n_sequences = train.batch_size // train.grad_accum_steps
        n_tokens = n_sequences * seq_len
        tokens = n_tokens // (n_batch * n_context)
        param_bytes = DTYPE_BYTES[param_dtype]
        compute_bytes = DTYPE_BYTES[train.compute_dtype]
        sizes = (n_fsdp, n_tensor, n_context, param_bytes, compute_bytes)
        return cls(tokens, train.grad_accum_steps, *sizes)

    @property
    def n_weight_shards(self) -> int:
        """Devices that one copy of the weights is sharded over."""
        return self.n_fsdp * self.n_tensor


def estimate_state_bytes(spec: ModelSpec, share: DeviceShare, n_moments: int) -> float:
    """Return the bytes of parameters and moments."""
    n_numbers = (1 + n_moments) * count_params(spec)
    return n_numbers * share.param_bytes / share.n_weight_shards


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
        "dots": 2 * D + (mixed + qkv + 2 * spec.d_ff) / n_tensor,
        "none": 6 * D + (2 * qkv + 4 * spec.d_ff) / n_tensor,
    }
    n_rows = spec.n_layers * share.microbatch_tokens
    return n_rows * widths[remat] * share.compute_bytes


def count_qkv_width(spec: ModelSpec) -> int:
    """Return the channels of q, k and v together."""
    return (spec.n_heads + 2 * spec.n_kv_heads) * spec.d_head


def estimate_temporary_bytes(spec: ModelSpec, share: DeviceShare, remat: str) -> float:
    """Return the bytes that a device needs beside its state.

    Saved activations; gradients like the parameters, twice if micro-batches are summed; one layer
    at work; the gathered output head with its float32 gradient. Within 25 % of what the compilers
    reported for the 8B shape on v5p, v6e and H100.
    """
    gradients = estimate_state_bytes(spec, share, n_moments=0)
    if share.grad_accum_steps > 1:
        gradients *= 2
    layer_width = 8 * spec.d_model + 5 * spec.d_ff / share.n_tensor
    layer = share.microbatch_tokens * layer_width * share.compute_bytes
    n_head_params = spec.d_model * spec.vocab_size
    head = n_head_params * (share.compute_bytes + 4) / share.n_tensor
    saved = estimate_saved_activation_bytes(spec, share, remat)
    return gradients + saved + layer + head


def estimate_comm_bytes(spec: ModelSpec, share: DeviceShare) -> float:
    """Return the least bytes that a device receives per step.

    fsdp: weights are gathered per micro-batch for forward and backward, and float32 gradients are
    summed on the way back. tensor: each layer's two results are summed in forward, backward and
    recomputation. context: each layer's keys and values are gathered, as often.
    """
    n_bytes = share.compute_bytes
    tokens = share.microbatch_tokens
    fsdp_params = count_params(spec) / share.n_tensor
    fsdp_params *= 1 - 1 / share.n_fsdp
    fsdp = (2 * n_bytes + 4) * fsdp_params
    tensor = 6 * 2 * tokens * spec.d_model * n_bytes
    tensor *= 1 - 1 / share.n_tensor
    kv_width = 2 * spec.n_kv_heads * spec.d_head / share.n_tensor
    n_received = 3 * tokens * (share.n_context - 1)
    context = n_received * kv_width * n_bytes
    layers = spec.n_layers * (tensor + context)
    return share.grad_accum_steps * (fsdp + layers)


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
    n_params = count_params(spec)
    update = 8 * n_params * 4 / share.n_weight_shards
    weights = n_params / n_tensor * (5 * share.compute_bytes + 8)
    sharded_width = 2 * count_qkv_width(spec) + 4 * spec.d_ff
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


def estimate_step(
    spec: ModelSpec, settings: Config, mesh: dict[str, int], attention: str
) -> StepAnalysis:
    """Return what is known of a step without tracing or compiling it.

    Args:
        spec: the model.
        settings: the run's config.
        mesh: axis -> devices.
        attention: backend, such as "xla".
    """
    train, seq_len = settings.train, settings.pack.seq_len
    share = DeviceShare.from_config(train, seq_len, settings.initialize.param_dtype, mesh)
    n_moments = 2 if settings.optim.name == "adamw" else 1
    params_bytes = round(estimate_state_bytes(spec, share, n_moments=0))
    state_bytes = round(estimate_state_bytes(spec, share, n_moments))
    temporary_bytes = round(estimate_temporary_bytes(spec, share, train.remat))
    saved_bytes = estimate_saved_activation_bytes(spec, share, train.remat)
    widest = max(spec.vocab_size, spec.d_ff, spec.n_heads * spec.d_head)
    largest_tensor = spec.d_model * widest
    per_token = estimate_executed_flops_per_token(spec, seq_len, train.remat)
    traffic = estimate_memory_traffic_bytes(spec, share, seq_len, attention == "xla")
    return StepAnalysis(
        method="estimated",
        missing_package=None,
        mesh=mesh,
        n_layers=spec.n_layers,
        attention=attention,
        params_bytes=params_bytes,
        opt_state_bytes=state_bytes - params_bytes,
        saved_activation_bytes=round(saved_bytes),
        restore_bytes=state_bytes,  # a restored state is made in place
        # tensors are gathered one after the other, each whole on every device
        export_bytes=params_bytes + largest_tensor * share.param_bytes,
        peak_bytes=state_bytes + temporary_bytes,
        exceeds_memory=False,
        comm_bytes=round(estimate_comm_bytes(spec, share)),
        memory_traffic_bytes=round(traffic),
        executed_flops=train.batch_size * seq_len * per_token,
        loop_body_flops=None,
        compiler_flops=None,
        layer_collectives=(),
        analysis_seconds=0.0,
    )

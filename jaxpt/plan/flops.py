"""What a model costs by arithmetic: parameters, floating-point operations and bytes from a ModelSpec. Axis letters as in jaxpt/spec.py.

A multiply and an add count as two. Backward costs twice forward, so training is three forwards; what remat computes
again is not counted, because it is no progress (model FLOPs, as in PaLM, 2204.02311, appendix B).
"""

from __future__ import annotations

from typing import NamedTuple

from jaxpt import sharding
from jaxpt.config import Config
from jaxpt.spec import ModelSpec


def count_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """FLOPs to train on one token of a row of seq_len."""
    return 3 * count_forward_flops_per_token(spec, seq_len)


def count_forward_flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """FLOPs of one token's forward pass: 2 for each parameter that multiplies it, and the two products of attention.

    Each layer's scores and mixing take 4 N H for every position seen. Causal attention sees half the row on average, so
    training takes 6 a parameter plus 12 L N H T / 2. Documents shorter than the row make it less; that is left out.
    """
    return 2 * count_matmul_params(
        spec
    ) + 4 * spec.n_layers * spec.n_heads * spec.d_head * compute_mean_context(spec, seq_len)


def compute_mean_context(spec: ModelSpec, seq_len: int) -> float:
    """Positions that a query sees, averaged over a row that is one document."""
    window = min(spec.sliding_window or seq_len, seq_len)
    return window - window**2 / (2 * seq_len)


def count_matmul_params(spec: ModelSpec) -> int:
    """Parameters that take part in a matrix product: the blocks' matrices and the output head, but no embedding lookup."""
    return spec.n_layers * count_block_matmul_params(spec) + spec.vocab_size * spec.d_model


def count_block_matmul_params(spec: ModelSpec) -> int:
    D, F, N, K, H = spec.d_model, spec.d_ff, spec.n_heads, spec.n_kv_heads, spec.d_head
    return D * N * H + 2 * D * K * H + N * H * D + 3 * D * F


def count_matmul_params(spec: ModelSpec) -> int:
    """All parameters. Equal to the model's own weight rows, which a test holds it to."""
    D, F, N, K, H = spec.d_model, spec.d_ff, spec.n_heads, spec.n_kv_heads, spec.d_head
    vectors = 2 * D  # the two norms
    vectors += (
        (N + 2 * K) * H * spec.qkv_bias
        + D * spec.out_bias
        + (2 * F + D) * spec.mlp_bias
        + 2 * H * spec.qk_norm
    )
    embeddings = spec.vocab_size * D * (1 if spec.tie_embeddings else 2)
    return embeddings + spec.n_layers * (count_block_matmul_params(spec) + vectors) + D


# ---- bytes of one device, by rule of thumb; sizes and cuts in one noun


class DeviceShare(NamedTuple):
    """What one device has of a step."""

    microbatch_tokens: int  # of a micro-batch
    grad_accum_steps: int  # micro-batches
    n_fsdp: int  # pieces that the weights are cut into along the batch's devices
    n_tensor: int  # and along heads, feed-forward and vocabulary
    n_context: int  # pieces of a row
    param_bytes: int  # of a stored weight
    compute_bytes: int  # of a number in a product

    @classmethod
    def from_config(cls, spec: ModelSpec, settings: Config, mesh: dict[str, int]) -> DeviceShare:
        train = settings.train
        cut = lambda axis: sharding.n_shards_of_shape(mesh, axis)  # noqa: E731
        rows = train.batch_size // train.grad_accum_steps
        width = {"float32": 4, "bfloat16": 2}
        return cls(
            tokens=rows * settings.pack.seq_len // (cut("batch") * cut("position")),
            grad_accum_steps=train.grad_accum_steps,
            n_shards=cut("embed"),
            n_tensor=cut("mlp"),
            n_context=cut("position"),
            param_bytes=width[settings.initialize.param_dtype],
            compute_bytes=width[train.compute_dtype],
        )


def estimate_state_bytes(spec: ModelSpec, at: DeviceShare, n_moments: int = 2) -> float:
    """Bytes of parameters and moments."""
    return (1 + n_moments) * count_matmul_params(spec) * at.param_bytes / (at.n_fsdp * at.n_tensor)


def estimate_saved_activation_bytes(spec: ModelSpec, at: DeviceShare, remat: str) -> float:
    """Bytes that backward keeps of all layers: for each its input (remat full, and offload, whose rest lies with the host),
    attention's result and its logarithms too (minimal), the results of products that backward reads too (dots), or about what each reads (none).
    """
    D, F, qkv, mixed = (
        spec.d_model,
        spec.d_ff,
        (spec.n_heads + 2 * spec.n_kv_heads) * spec.d_head,
        spec.n_heads * (spec.d_head + 2),
    )
    elements = {
        "full": D,
        "offload": D,
        "minimal": D + mixed / at.n_tensor,
        "dots": 2 * D + (mixed + qkv + 2 * F) / at.n_tensor,
        "none": 6 * D + (2 * qkv + 4 * F) / at.n_tensor,
    }
    return spec.n_layers * at.microbatch_tokens * elements[remat] * at.compute_bytes


def estimate_temporary_bytes(spec: ModelSpec, at: DeviceShare, remat: str) -> float:
    """Bytes a device needs beside its state.

    What backward keeps; gradients like the parameters, twice where micro-batches are summed; one layer at work; the output head
    gathered, with its float32 gradient. Within 25 % of what the compilers said of the 8B shape on v5p, v6e and H100.
    """
    gradients = (
        count_matmul_params(spec)
        * at.param_bytes
        / (at.n_fsdp * at.n_tensor)
        * (2 if at.grad_accum_steps > 1 else 1)
    )
    at_work = (
        at.microbatch_tokens * (8 * spec.d_model + 5 * spec.d_ff / at.n_tensor) * at.compute_bytes
    )
    head = spec.d_model * spec.vocab_size * (at.compute_bytes + 4) / at.n_tensor
    return gradients + estimate_saved_activation_bytes(spec, at, remat) + at_work + head


def estimate_comm_bytes(spec: ModelSpec, at: DeviceShare) -> float:
    """Bytes that a device receives in a step, at least.

    Weights cut along the batch's devices are gathered for each micro-batch, for forward and for backward, and float32 gradients
    are summed on the way back. Cut heads and feed-forward: each layer's two results are summed, in forward, backward and
    recomputing. Cut rows: each layer's keys and values are gathered, as often.
    """
    c = at.compute_bytes
    weights = (2 * c + 4) * count_matmul_params(spec) / at.n_tensor * (1 - 1 / at.n_fsdp)
    sums = 6 * 2 * at.microbatch_tokens * spec.d_model * c * (1 - 1 / at.n_tensor)
    rows = (
        3
        * at.microbatch_tokens
        * (at.n_context - 1)
        * 2
        * spec.n_kv_heads
        * spec.d_head
        / at.n_tensor
        * c
    )
    return at.grad_accum_steps * (weights + spec.n_layers * (sums + rows))


def estimate_memory_traffic_bytes(
    spec: ModelSpec, at: DeviceShare, *, seq_len: int, materializes_scores: bool
) -> float:
    """Bytes that a device reads from and writes to its memory in a step, by rule of thumb.

    The update passes over parameters, gradients and both moments, 8 times in all. A micro-batch casts the weights, reads them in
    forward, backward and recomputing, and adds to float32 gradients. Each layer's activations (as many as remat none keeps) are
    written and read in forward, and twice more in backward; with `scores` those of attention too, float32. Logits: float32, three times.
    """
    D, F, qkv = spec.d_model, spec.d_ff, (spec.n_heads + 2 * spec.n_kv_heads) * spec.d_head
    update = 8 * count_matmul_params(spec) * 4 / (at.n_fsdp * at.n_tensor)
    weights = (
        at.grad_accum_steps * count_matmul_params(spec) / at.n_tensor * (5 * at.compute_bytes + 8)
    )
    elements = 6 * D + (2 * qkv + 4 * F) / at.n_tensor
    layer = 6 * elements * at.compute_bytes + (
        6 * 4 * spec.n_heads / at.n_tensor * compute_mean_context(spec, seq_len)
        if materializes_scores
        else 0
    )
    logits = 3 * 4 * spec.vocab_size / at.n_tensor
    return (
        update
        + weights
        + at.grad_accum_steps * at.microbatch_tokens * (spec.n_layers * layer + logits)
    )


def estimate_executed_flops_per_token(spec: ModelSpec, seq_len: int, remat: str) -> float:
    """FLOPs that a step runs for one token, recomputation included; attention counts once more in any case: each backward computes its scores again, and cudnn its result too."""
    products = 2 * spec.n_layers * count_block_matmul_params(spec)
    scores = count_forward_flops_per_token(spec, seq_len) - 2 * count_matmul_params(spec)
    again = products if remat in ("full", "minimal") else 0
    return count_flops_per_token(spec, seq_len) + again + scores


def estimate_step(
    spec: ModelSpec, settings: Config, mesh: dict[str, int], attention: str
) -> dict[str, float]:
    """What is known of a step without tracing or compiling it, under the names that compile.measure answers with."""
    at, train = DeviceShare.from_config(spec, settings, mesh), settings.train
    params_bytes = round(estimate_state_bytes(spec, at, n_moments=0))
    held = round(
        estimate_state_bytes(spec, at, n_moments=2 if settings.optim.name == "adamw" else 1)
    )
    largest = max(
        spec.vocab_size * spec.d_model,
        spec.d_model * spec.d_ff,
        spec.d_model * spec.n_heads * spec.d_head,
    )
    return {
        "n_layers": spec.n_layers,
        "attention": attention,
        "params_bytes": params_bytes,
        "opt_bytes": held - params_bytes,
        "restore_bytes": held,  # a restored state is made in place
        "export_bytes": params_bytes
        + largest * at.param_bytes,  # gathered one after the other, each whole on every device
        "peak_bytes": held + round(estimate_temporary_bytes(spec, at, train.remat)),
        "over_memory": False,
        "kept_bytes": round(estimate_saved_activation_bytes(spec, at, train.remat)),
        "moved_bytes": round(estimate_comm_bytes(spec, at)),
        "traffic_bytes": round(
            estimate_memory_traffic_bytes(
                spec, at, seq_len=settings.pack.seq_len, materializes_scores=attention == "xla"
            )
        ),
        "executed_flops": train.batch_size
        * settings.pack.seq_len
        * estimate_executed_flops_per_token(spec, settings.pack.seq_len, train.remat),
        "once_flops": None,
        "compiler_flops": None,
        "layers": [],
    }

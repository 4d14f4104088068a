"""What a model costs by arithmetic: parameters, floating-point operations and bytes from a ModelSpec. Axis letters as in jaxpt/spec.py.

A multiply and an add count as two. Backward costs twice forward, so training is three forwards; what remat computes
again is not counted, because it is no progress (model FLOPs, as in PaLM, 2204.02311, appendix B).
"""

from __future__ import annotations

from jaxpt.spec import ModelSpec


def training(spec: ModelSpec, row_len: int) -> float:
    """FLOPs to train on one token of a row of row_len."""
    return 3 * forward(spec, row_len)


def forward(spec: ModelSpec, row_len: int) -> float:
    """FLOPs of one token's forward pass: 2 for each parameter that multiplies it, and the two products of attention.

    Each layer's scores and mixing take 4 N H for every position seen. Causal attention sees half the row on average, so
    training takes 6 a parameter plus 12 L N H T / 2. Documents shorter than the row make it less; that is left out.
    """
    return 2 * matmul_params(spec) + 4 * spec.n_layers * spec.n_heads * spec.d_head * mean_context(spec, row_len)


def mean_context(spec: ModelSpec, row_len: int) -> float:
    """Positions that a query sees, averaged over a row that is one document."""
    window = min(spec.sliding_window or row_len, row_len)
    return window - window**2 / (2 * row_len)


def matmul_params(spec: ModelSpec) -> int:
    """Parameters that take part in a matrix product: the blocks' matrices and the output head, but no embedding lookup."""
    return spec.n_layers * block_matrices(spec) + spec.vocab_size * spec.d_model


def block_matrices(spec: ModelSpec) -> int:
    D, F, N, K, H = spec.d_model, spec.d_ff, spec.n_heads, spec.n_kv_heads, spec.d_head
    return D * N * H + 2 * D * K * H + N * H * D + 3 * D * F


def n_params(spec: ModelSpec) -> int:
    """All parameters. Equal to the model's own weight rows, which a test holds it to."""
    D, F, N, K, H = spec.d_model, spec.d_ff, spec.n_heads, spec.n_kv_heads, spec.d_head
    vectors = 2 * D  # the two norms
    vectors += (N + 2 * K) * H * spec.qkv_bias + D * spec.out_bias + (2 * F + D) * spec.mlp_bias + 2 * H * spec.qk_norm
    embeddings = spec.vocab_size * D * (1 if spec.tied else 2)
    return embeddings + spec.n_layers * (block_matrices(spec) + vectors) + D


def temporaries(
    spec: ModelSpec, *, tokens: int, n_shards: int, n_tensor: int, accumulate: int, param_bytes: int, compute_bytes: int, remat: str
) -> float:
    """Bytes a device needs beside its state, with `tokens` of a micro-batch on each device, by rule of thumb.

    Gradients like the parameters, twice where micro-batches are summed; for each layer its input (remat full, and offload, whose
    rest lies with the host), attention's result too (minimal), the results of products that backward reads too (dots), or about
    what each product reads (none); one layer at work; the output head gathered, with its float32 gradient.
    Within 25 % of what the compilers said of the 8B shape on v5p, v6e and H100.
    """
    D, F, qkv = spec.d_model, spec.d_ff, (spec.n_heads + 2 * spec.n_kv_heads) * spec.d_head
    gradients = n_params(spec) * param_bytes / n_shards * (2 if accumulate > 1 else 1)
    at_work = tokens * (8 * D + 5 * F / n_tensor) * compute_bytes
    mixed = spec.n_heads * spec.d_head
    elements = {
        "full": D,
        "offload": D,
        "minimal": D + mixed / n_tensor,
        "dots": 2 * D + (mixed + qkv + 2 * F) / n_tensor,
        "none": 6 * D + (2 * qkv + 4 * F) / n_tensor,
    }
    kept = tokens * elements[remat] * compute_bytes
    head = D * spec.vocab_size * (compute_bytes + 4) / n_tensor
    return gradients + spec.n_layers * kept + at_work + head


def weights_moved(spec: ModelSpec, *, n_shards: int, n_tensor: int, accumulate: int, compute_bytes: int) -> float:
    """Bytes that a device receives in a step because the weights are cut into n_shards along the batch's axis: for each
    micro-batch they are gathered for forward and for backward, and float32 gradients are summed on the way back.
    """
    return accumulate * (2 * compute_bytes + 4) * n_params(spec) / n_tensor * (1 - 1 / n_shards)

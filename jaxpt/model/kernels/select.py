"""Attention by the platform's kernel where it supports a run: one signature, several backends.

`xla` runs everywhere, `splash` is JAX's TPU kernel, `cudnn` is NVIDIA's, through JAX. All attend to
the same keys as the plain formula and give the same numbers (tests/test_attention.py).
`choose_backend` returns which one a run takes, and why.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model.kernels.blockwise import blockwise_attend
from jaxpt.model.kernels.cudnn import cudnn_attend
from jaxpt.model.kernels.splash import splash_attend
from jaxpt.model.kernels.trial import KernelKnob, can_run_on, choose_kernel, describe_difference
from jaxpt.sharding import n_shards
from jaxpt.spec import ModelSpec

Kernel = Callable[[Array, Array, Array, Array, int | None], Array]

BACKENDS: dict[str, Kernel] = {
    "xla": blockwise_attend,
    "splash": splash_attend,
    "cudnn": cudnn_attend,
}
KNOB = KernelKnob("train.attention", "xla", {"tpu": "splash", "gpu": "cudnn"})


class AttentionRequest(NamedTuple):
    """What a run asks of attention.

    Attributes:
        backend: one of BACKENDS, or "auto".
        dtype: of q, k and v.
        batch_size: sequences per micro-batch, over all devices.
        seq_len: tokens per sequence.
    """

    backend: str
    dtype: str
    batch_size: int
    seq_len: int


def attend(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: int | None = None,
    backend: str = "xla",
    softcap: float | None = None,
) -> Array:
    """Return softmax attention of each query to the keys of its document at or before it.

    Args:
        q: [B, T, N, H], rotated.
        k: [B, T, K, H], rotated; N is a multiple of K, query head n reads kv head n // (N / K).
        v: [B, T, K, H].
        segment_ids: int32 [B, T]; a token attends to its own segment, whose tokens are adjacent.
        window: positions that a query sees, itself included; None: all.
        backend: one of BACKENDS, as `choose_backend` returned.
        softcap: scores s become softcap tanh(s / softcap), by xla only.

    Returns:
        [B, T, N, H] in q's dtype; the softmax is float32.
    """
    if softcap is not None:
        return blockwise_attend(q, k, v, segment_ids, window, softcap)
    return BACKENDS[backend](q, k, v, segment_ids, window)


def choose_backend(
    spec: ModelSpec, request: AttentionRequest, mesh: jax.sharding.Mesh
) -> tuple[str, str]:
    """Return (backend, reason) that train.attention resolves to for a model on a mesh.

    Raises:
        UserError: a backend requested by name does not support the run.
    """
    device = mesh.devices.flat[0]

    def find_reason(kernel: str) -> str | None:
        reason = unsupported_reason(kernel, spec, request, mesh)
        if reason or not can_run_on(device):
            return reason
        own = take_own_heads(spec, mesh)
        return check_against_reference(
            kernel, own, request.seq_len, request.dtype, mesh.local_devices[0]
        )

    return choose_kernel(KNOB, request.backend, device, find_reason)


def unsupported_reason(
    kernel: str, spec: ModelSpec, request: AttentionRequest, mesh: jax.sharding.Mesh
) -> str | None:
    """Return why a kernel does not support a run, with what would help; None if it does."""
    T, H = request.seq_len, spec.d_head
    if spec.attention_softcap is not None:
        return f"model.attention_softcap = {spec.attention_softcap:g} (none)"
    n_context = n_shards(mesh, "position")
    n_heads = spec.n_heads // n_shards(mesh, "heads")
    if n_heads % n_context:
        return (
            f"{n_heads} heads per device cannot be exchanged for {n_context} parts of a sequence "
            f"(mesh.context = {math.gcd(n_heads, n_context)})"
        )
    if T % 128:
        below = T - T % 128
        return f"pack.seq_len = {T} is no multiple of 128 ({below or 128} or {below + 128})"
    if kernel != "cudnn":
        return None
    device = mesh.devices.flat[0]
    kind = device.device_kind
    if "NVIDIA" not in kind:
        return f"{kind} is not NVIDIA's"
    if float(device.compute_capability) < 9:
        capability = device.compute_capability
        return f"packed documents need Hopper or newer (9.0), and {kind} is {capability}"
    if request.dtype != "bfloat16":
        return f"train.compute_dtype = {request.dtype} (bfloat16)"
    if H % 8 or H > 128:
        return f"model.d_head = {H} is no multiple of 8 up to 128"
    batch = request.batch_size // n_shards(mesh, "batch")
    width = spec.n_heads * H
    n_entries = batch * T * width // n_shards(mesh, "heads") // n_context
    if n_entries >= 2**31:
        return (
            f"{batch} sequences per device exceed its 32-bit offsets "
            "(a higher train.grad_accum_steps)"
        )
    return None


def take_own_heads(spec: ModelSpec, mesh: jax.sharding.Mesh) -> ModelSpec:
    """Return the architecture with the heads that one device attends with."""
    n_context = n_shards(mesh, "position")
    n_kv_heads = spec.n_kv_heads // n_shards(mesh, "kv_heads")
    return spec.replace(
        n_heads=spec.n_heads // n_shards(mesh, "heads") // n_context,
        n_kv_heads=math.lcm(n_kv_heads, n_context) // n_context,
    )


@functools.lru_cache(maxsize=64)
def check_against_reference(
    kernel: str, spec: ModelSpec, seq_len: int, dtype: str, device: Any
) -> str | None:
    """Return how a kernel's output or gradients differ from xla's; None if they agree.

    Run on two sequences, with every window that a layer has.
    """
    inputs = jax.device_put(make_check_inputs(spec, seq_len, dtype), device)
    for window in dict.fromkeys(kind.window for kind in spec.layer_kinds):
        run = functools.partial(run_forward_and_backward, window=window, inputs=inputs)
        difference = describe_difference(kernel, KNOB.plain, run, device.device_kind)
        if difference:
            return difference
    return None


def make_check_inputs(spec: ModelSpec, seq_len: int, dtype: str) -> tuple[Array, ...]:
    """Return random q, k, v, segment ids and output gradient of two sequences."""
    arrays = []
    N, K = spec.n_heads, spec.n_kv_heads
    keys = jax.random.split(jax.random.key(0), 4)
    for key, n in zip(keys, (N, K, K, N), strict=True):
        shape = (2, seq_len, n, spec.d_head)
        arrays.append(jax.random.normal(key, shape, dtype))
    q, k, v, d_out = arrays
    # the last segment stands for padding
    first = [seq_len // 5, seq_len // 2, seq_len - 7]
    second = [1, seq_len // 3, seq_len]
    ends = jnp.array([first, second])
    has_ended = jnp.arange(seq_len) >= ends[..., None]
    segment_ids = jnp.sum(has_ended, axis=1) + 1
    return q, k, v, segment_ids.astype(jnp.int32), d_out


def run_forward_and_backward(
    backend: str, window: int | None, inputs: tuple[Array, ...]
) -> dict[str, Array]:
    """Return output and gradients for q, k and v."""

    @jax.jit
    def run(q: Array, k: Array, v: Array, ids: Array, d_out: Array) -> tuple[Array, ...]:
        def forward(q: Array, k: Array, v: Array) -> Array:
            return attend(q, k, v, ids, window, backend)

        out, pullback = jax.vjp(forward, q, k, v)
        return out, *pullback(d_out)

    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    return dict(zip(names, run(*inputs), strict=True))

"""Grouped-query self-attention: its parameters, projections and plain formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model.lora import linear
from jaxpt.model.norm import rms_norm
from jaxpt.model.param import ParamSpec, bias, matrix, norm_scale
from jaxpt.model.rope import Rope, apply_rope
from jaxpt.model.softcap import apply_softcap
from jaxpt.spec import ModelSpec

LayerParams = dict[str, Array]  # of one layer


def attention_params(spec: ModelSpec, residual_scale: float) -> dict[str, ParamSpec]:
    """Return the parameters of one layer's attention.

    Args:
        spec: the architecture.
        residual_scale: of the initial std of what writes into the residual.
    """
    D, N, K, H = spec.d_model, spec.n_heads, spec.n_kv_heads, spec.d_head
    std = D**-0.5
    out_std = (N * H) ** -0.5 * residual_scale
    heads, kv_heads = ("heads", "head"), ("kv_heads", "head")
    params = {
        "q": matrix((D, N, H), ("embed", *heads), std, "self_attn.q_proj"),
        "k": matrix((D, K, H), ("embed", *kv_heads), std, "self_attn.k_proj"),
        "v": matrix((D, K, H), ("embed", *kv_heads), std, "self_attn.v_proj"),
        "o": matrix(
            (N, H, D),
            (*heads, "embed"),
            out_std,
            "self_attn.o_proj",
            n_in=2,
            writes_residual=True,
        ),
    }
    if spec.qkv_bias:
        params["q_bias"] = bias((N, H), heads, "self_attn.q_proj")
        params["k_bias"] = bias((K, H), kv_heads, "self_attn.k_proj")
        params["v_bias"] = bias((K, H), kv_heads, "self_attn.v_proj")
    if spec.out_bias:
        params["o_bias"] = bias((D,), ("norm",), "self_attn.o_proj", writes_residual=True)
    if spec.qk_norm:
        for name, n, axes in (("q", N, heads), ("k", K, kv_heads)):
            shape = (n, H) if spec.qk_norm_whole else (H,)
            params[f"{name}_norm"] = norm_scale(
                shape,
                f"self_attn.{name}_norm",
                axes[-len(shape) :],
                adds_one=spec.norm_adds_one,
            )
    return params


def project_qkv(
    spec: ModelSpec,
    params: LayerParams,
    x: Array,
    rope: Rope | None,
    matmul_dtype: str = "compute",
) -> tuple[Array, Array, Array]:
    """Return queries [B, T, N, H], keys and values [B, T, K, H]; queries and keys rotated.

    Kernels multiply scores by H ** -0.5; another query_scale is multiplied into the queries.
    """
    q = linear(spec.lora, "btd,dnh->btnh", x, params, "q", matmul_dtype)
    k = linear(spec.lora, "btd,dkh->btkh", x, params, "k", matmul_dtype)
    v = linear(spec.lora, "btd,dkh->btkh", x, params, "v", matmul_dtype)
    if spec.qk_norm:
        q = rms_norm(q, params["q_norm"], spec.norm_eps, spec.norm_adds_one)
        k = rms_norm(k, params["k_norm"], spec.norm_eps, spec.norm_adds_one)
    if spec.query_scale is not None:
        q = q * (spec.query_scale * spec.d_head**0.5)
    if rope is not None:
        q = apply_rope(q, rope, spec.rope_interleaved)
        k = apply_rope(k, rope, spec.rope_interleaved)
    return q, k, v


def project_out(
    spec: ModelSpec, params: LayerParams, heads: Array, matmul_dtype: str = "compute"
) -> Array:
    """Return what attention adds to the residual [B, T, D], given the heads [B, T, N, H]."""
    return linear(spec.lora, "btnh,nhd->btd", heads, params, "o", matmul_dtype)


def attend_plain(
    q: Array, k: Array, v: Array, is_visible: Array, softcap: float | None = None
) -> Array:
    """Return softmax attention by its formula, with all scores at once.

    The kernels are held to it (tests/test_attention.py). Decoding uses it: one query is no work
    for them.

    Args:
        q: [B, T, N, H]; query head n reads kv head n // (N / K).
        k: [B, S, K, H].
        v: [B, S, K, H].
        is_visible: bool [B, T, S], whether a query sees a key.
        softcap: scores s become softcap tanh(s / softcap).

    Returns:
        [B, T, N, H] in v's dtype; the softmax is float32.
    """
    B, T, N, H = q.shape
    q = q.reshape(B, T, k.shape[2], -1, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = apply_softcap(scores * H**-0.5, softcap)
    scores = jnp.where(is_visible[:, None, None], scores, -jnp.inf)
    probs = jax.nn.softmax(scores).astype(v.dtype)
    heads = jnp.einsum("bkgts,bskh->btkgh", probs, v)
    return heads.reshape(B, T, N, H)

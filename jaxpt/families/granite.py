"""Granite 3 (IBM, 2024): Llama with multipliers of embedding, residual, scores and logits."""

import pathlib
from typing import Any

from jaxpt.families.family import POSITIVE, SWITCH, Family, HfConfig, Key, refuse
from jaxpt.spec import ModelSpec


def read_query_scale(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return query_scale."""
    scale = config["attention_multiplier"]
    if not POSITIVE.accepts(scale):
        raise refuse(path, "attention_multiplier", POSITIVE.expected, scale)
    d_head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {"query_scale": None if scale == d_head**-0.5 else float(scale)}


def write_query_scale(spec: ModelSpec) -> HfConfig:
    """Return attention_multiplier."""
    return {"attention_multiplier": spec.query_scale or spec.d_head**-0.5}


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    keys=(
        Key("attention_bias", ("qkv_bias", "out_bias"), SWITCH, default=False),
        Key("mlp_bias", "mlp_bias", SWITCH, default=False),
        Key("embedding_multiplier", "embed_multiplier", POSITIVE, default=1.0),
        Key("residual_multiplier", "residual_multiplier", POSITIVE, default=1.0),
        Key("logits_scaling", "logit_divisor", POSITIVE, default=1.0),
    ),
    defaults={"attention_multiplier": 1.0},
    reads=("attention_multiplier",),
    read_more=read_query_scale,
    write_more=write_query_scale,
)

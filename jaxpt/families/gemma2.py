"""Gemma 2 (2408.00118): norms on both sides, softcaps, a window in every other layer."""

import pathlib
from typing import Any

from jaxpt.families.family import ACTIVATION, POSITIVE, SIZE, SWITCH, Family, HfConfig, Key, refuse
from jaxpt.families.windows import every, read_layer_types, write_layer_types
from jaxpt.spec import ModelSpec

KEYS = (
    Key("hidden_activation", "activation", ACTIVATION, "gelu_pytorch_tanh"),
    Key("attention_bias", ("qkv_bias", "out_bias"), SWITCH, default=False),
    Key("final_logit_softcapping", "logit_softcap", POSITIVE, null=True),
)
DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
IMPLIED = {"norm_placement": "both", "norm_adds_one": True}
READS = ("query_pre_attn_scalar", "sliding_window", "layer_types")
TENSOR_NAMES = {"blocks/mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight"}


def read_scales(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return the query's scale, and the embedding's, which follows the width."""
    scalar = config["query_pre_attn_scalar"]
    if not SIZE.accepts(scalar):
        raise refuse(path, "query_pre_attn_scalar", SIZE.expected, scalar)
    scale = None if scalar == config["head_dim"] else scalar**-0.5
    return {"query_scale": scale, "embed_multiplier": config["hidden_size"] ** 0.5}


def write_scales(spec: ModelSpec) -> HfConfig:
    """Return query_pre_attn_scalar."""
    scale = spec.query_scale
    return {"query_pre_attn_scalar": spec.d_head if scale is None else round(scale**-2)}


def read_more(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return the fields of scales and windows: every second layer has no window."""
    windows = read_layer_types(config, path, every(2, config["num_hidden_layers"]))
    return {**read_scales(config, path), **windows}


def write_more(spec: ModelSpec) -> HfConfig:
    """Return the keys of scales and windows."""
    return {**write_scales(spec), **write_layer_types(spec)}


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys=(*KEYS, Key("attn_logit_softcapping", "attention_softcap", POSITIVE, null=True)),
    defaults={
        **DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
    },
    implied=IMPLIED,
    harmless={"use_bidirectional_attention": (False,)},
    reads=READS,
    read_more=read_more,
    write_more=write_more,
    tensor_names=TENSOR_NAMES,
)

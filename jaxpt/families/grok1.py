"""Grok-1 (xai-org/grok-1, 2024), as hpcai-tech/grok-1 names its tensors in safetensors files.

The function is xAI's. The code beside the files of that conversion takes another GELU, the exact
one; transformers has no class, so nothing but sizes has a default here.
"""

import functools
import pathlib
from typing import Any

from jaxpt.families.family import NOT_NEGATIVE, POSITIVE, REQUIRED, SIZE, Family, HfConfig, Key
from jaxpt.families.rope import read_rope
from jaxpt.spec import ModelSpec

QUERY_SCALE = Key("attn_output_multiplier", "query_scale", POSITIVE, REQUIRED)
LOGIT_SCALE = Key("output_multiplier_scale", "logit_divisor", POSITIVE, REQUIRED)
LAYER = "model.layers.{}"
EXPERT = f"{LAYER}.moe_block.experts.{{}}"


def read_scales(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return the scale of attention's scores, and the divisor of logits."""
    scale = QUERY_SCALE.read(config, path)
    d_head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "query_scale": None if scale == d_head**-0.5 else float(scale),
        "logit_divisor": 1 / LOGIT_SCALE.read(config, path),
    }


def write_scales(spec: ModelSpec) -> HfConfig:
    """Return the factors of attention's scores and of logits."""
    return {
        QUERY_SCALE.name: spec.query_scale or spec.d_head**-0.5,
        LOGIT_SCALE.name: 1 / spec.logit_divisor,
    }


FAMILY = Family(
    model_type="grok-1",
    architecture="Grok1ModelForCausalLM",
    keys=(
        Key("num_experts", "n_experts", SIZE, 8),
        Key("num_experts_per_tok", "n_experts_per_token", SIZE, 2),
        Key("embedding_multiplier_scale", "embed_multiplier", POSITIVE, REQUIRED),
        Key("max_attn_value", "attention_softcap", POSITIVE, REQUIRED),
        Key("router_aux_loss_coef", "router_aux_loss_coef", NOT_NEGATIVE, 0.001),
        Key("router_z_loss_coef", "router_z_loss_coef", NOT_NEGATIVE, 0.0),
    ),
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    implied={"norm_placement": "both"},
    reads=(QUERY_SCALE.name, LOGIT_SCALE.name),
    read_more=read_scales,
    write_more=write_scales,
    read_rope=functools.partial(read_rope, types=("default",)),
    tensor_names={
        "blocks/attn_norm": f"{LAYER}.pre_attn_norm.scale",
        "blocks/attn_post_norm": f"{LAYER}.post_attn_norm.scale",
        "blocks/mlp_norm": f"{LAYER}.pre_moe_norm.scale",
        "blocks/mlp_post_norm": f"{LAYER}.post_moe_norm.scale",
        "blocks/q": f"{LAYER}.attn.q_proj.weight",
        "blocks/k": f"{LAYER}.attn.k_proj.weight",
        "blocks/v": f"{LAYER}.attn.v_proj.weight",
        "blocks/o": f"{LAYER}.attn.o_proj.weight",
        "blocks/router": f"{LAYER}.moe_block.gate.weight",
        "blocks/gate": f"{EXPERT}.linear.weight",
        "blocks/up": f"{EXPERT}.linear_v.weight",
        "blocks/down": f"{EXPERT}.linear_1.weight",
        "norm": "model.norm.scale",
    },
)

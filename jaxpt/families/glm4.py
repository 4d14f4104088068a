"""GLM-4 dense (2406.12793, of April 2025): norms on both sides, half of each head rotated."""

import functools

from jaxpt.families.family import SWITCH, Family, Key
from jaxpt.families.rope import read_rope

FAMILY = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    keys=(Key("attention_bias", "qkv_bias", SWITCH, default=True),),
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1.5625e-07,
    },
    implied={"norm_placement": "both", "rope_interleaved": True},
    read_rope=functools.partial(read_rope, rotary_frac=0.5),
    tensor_names={
        "blocks/attn_post_norm": "model.layers.{}.post_self_attn_layernorm.weight",
        "blocks/mlp_post_norm": "model.layers.{}.post_mlp_layernorm.weight",
    },
    fused={"model.layers.{}.mlp.gate_up_proj.weight": ("blocks/gate", "blocks/up")},
)

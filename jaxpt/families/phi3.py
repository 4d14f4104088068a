"""Phi-3 and Phi-4 (2404.14219, 2412.08905): Llama with q, k, v and gate, up in one tensor each."""

import functools

from jaxpt.families.family import SIZE, Family, Key
from jaxpt.families.rope import read_rope

FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    keys=(Key("sliding_window", "sliding_window", SIZE, null=True),),
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    # the class has longrope beside it, which is not supported
    read_rope=functools.partial(read_rope, rotary_frac=1.0, types=("default",)),
    fused={
        "model.layers.{}.self_attn.qkv_proj.weight": ("blocks/q", "blocks/k", "blocks/v"),
        "model.layers.{}.mlp.gate_up_proj.weight": ("blocks/gate", "blocks/up"),
    },
)

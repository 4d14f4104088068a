"""Qwen 2's mixtures (2407.10671): experts in every layer beside one that every token takes."""

from jaxpt.families.family import NOT_NEGATIVE, REQUIRED, SIZE, SWITCH, Family, Key
from jaxpt.families.qwen3_moe import EXPERT_KEYS, check_expert_counts

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys=(
        *EXPERT_KEYS,
        # intermediate_size is that of dense layers, of which there are none
        Key("moe_intermediate_size", "d_ff", SIZE, REQUIRED),
        Key("shared_expert_intermediate_size", "d_shared", SIZE, REQUIRED),
        Key("router_aux_loss_coef", "router_aux_loss_coef", NOT_NEGATIVE, 0.001),
        Key("qkv_bias", "qkv_bias", SWITCH, True),
    ),
    defaults={
        "max_position_embeddings": 32_768,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
    },
    implied={"has_shared_switch": True},
    harmless={
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
        "use_sliding_window": (False,),
    },
    # off, whatever they say; the class writes a window of 0
    reads=("sliding_window", "max_window_layers"),
    read_more=check_expert_counts,
)

"""OLMoE (2409.02060): fine experts in every layer, RMSNorm over all of q and all of k."""

from jaxpt.families.family import NOT_NEGATIVE, Family, Key
from jaxpt.families.qwen3_moe import EXPERT_KEYS, check_expert_counts

FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    keys=(
        *EXPERT_KEYS,
        Key("router_aux_loss_coef", "router_aux_loss_coef", NOT_NEGATIVE, 0.01),
    ),
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    implied={"qk_norm": True, "qk_norm_whole": True},
    harmless={"clip_qkv": (), "attention_bias": (False,)},
    read_more=check_expert_counts,
)

"""Qwen 3's mixtures of experts (2505.09388): experts in every layer, RMSNorm over q and k."""

import pathlib
from typing import Any

from jaxpt.families.family import (
    NOT_NEGATIVE,
    REQUIRED,
    SIZE,
    SWITCH,
    Family,
    HfConfig,
    Key,
    refuse,
)

# the files of the hub say num_experts, transformers 5 writes num_local_experts: both are kept
EXPERT_KEYS = (
    Key("num_experts", "n_experts", SIZE, lambda config: config.get("num_local_experts")),
    Key("num_local_experts", "n_experts", SIZE, lambda config: config.get("num_experts")),
    Key("num_experts_per_tok", "n_experts_per_token", SIZE, 8),
    Key("norm_topk_prob", "norm_topk_prob", SWITCH, False),
    Key("router_z_loss_coef", "router_z_loss_coef", NOT_NEGATIVE, 0.0),
)


def check_expert_counts(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return no further fields. Raise UserError if the two numbers of experts differ."""
    numbers = [config.get(name) for name in ("num_experts", "num_local_experts")]
    first, second = numbers
    if None not in numbers and first != second:
        raise refuse(path, "num_local_experts", f"{first}, as num_experts", second)
    return {}


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *EXPERT_KEYS,
        # intermediate_size is that of dense layers, of which there are none
        Key("moe_intermediate_size", "d_ff", SIZE, REQUIRED),
        Key("router_aux_loss_coef", "router_aux_loss_coef", NOT_NEGATIVE, 0.001),
        Key("attention_bias", ("qkv_bias", "out_bias"), SWITCH, False),
    ),
    defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 4},
    implied={"qk_norm": True},
    harmless={
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([],),
        "use_sliding_window": (False,),
    },
    read_more=check_expert_counts,
)

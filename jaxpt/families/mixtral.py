"""Mixtral (2401.04088): Mistral with a mixture of experts in every layer."""

from jaxpt.families.family import NOT_NEGATIVE, SIZE, Family, Key

EXPERT = "model.layers.{}.block_sparse_moe.experts.{}"

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys=(
        Key("num_local_experts", "n_experts", SIZE, 8),
        Key("num_experts_per_tok", "n_experts_per_token", SIZE, 2),
        Key("router_aux_loss_coef", "router_aux_loss_coef", NOT_NEGATIVE, 0.001),
        Key("router_z_loss_coef", "router_z_loss_coef", NOT_NEGATIVE, 0.0),
        Key("sliding_window", "sliding_window", SIZE),
    ),
    defaults={"rope_theta": 1e6},
    implied={"norm_topk_prob": True},
    fixed={"router_jitter_noise": (0.0,)},
    tensor_names={
        "blocks/router": "model.layers.{}.block_sparse_moe.gate.weight",
        "blocks/gate": f"{EXPERT}.w1.weight",
        "blocks/up": f"{EXPERT}.w3.weight",
        "blocks/down": f"{EXPERT}.w2.weight",
    },
)

"""Solar Open (2601.07022): a sigmoid router with a bias, and one expert that every token takes."""

import functools
import pathlib
from typing import Any

from jaxpt.families.family import (
    NOT_NEGATIVE,
    POSITIVE,
    REQUIRED,
    SIZE,
    SWITCH,
    Family,
    HfConfig,
    Key,
)
from jaxpt.families.rope import read_rope
from jaxpt.spec import ModelSpec

N_SHARED = Key("n_shared_experts", "d_shared", SIZE, 1)


def read_shared(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return the width of the shared expert, in config.json a number of experts."""
    return {"d_shared": config["moe_intermediate_size"] * N_SHARED.read(config, path)}


def write_shared(spec: ModelSpec) -> HfConfig:
    """Return the number of experts that the shared one is as wide as."""
    return {"n_shared_experts": spec.d_shared // spec.d_ff}


FAMILY = Family(
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    keys=(
        Key("n_routed_experts", "n_experts", SIZE, 128),
        Key("num_experts_per_tok", "n_experts_per_token", SIZE, 8),
        # intermediate_size is that of dense layers, of which there are none
        Key("moe_intermediate_size", "d_ff", SIZE, REQUIRED),
        Key("norm_topk_prob", "norm_topk_prob", SWITCH, True),
        Key("routed_scaling_factor", "routed_scale", POSITIVE, 1.0),
        Key("router_aux_loss_coef", "router_aux_loss_coef", NOT_NEGATIVE, 0.0),
        Key("router_z_loss_coef", "router_z_loss_coef", NOT_NEGATIVE, 0.0),
        Key("router_bias_update_rate", "router_bias_rate", NOT_NEGATIVE, 0.001),
    ),
    defaults={
        "head_dim": 128,
        "intermediate_size": 10_240,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    },
    implied={"router": "sigmoid"},
    harmless={
        "n_group": (1,),
        "topk_group": (1,),
        "first_k_dense_replace": (0,),
        "scoring_func": ("sigmoid",),
        "attention_bias": (False,),
        "use_qk_norm": (False,),
    },
    reads=(N_SHARED.name,),
    read_more=read_shared,
    write_more=write_shared,
    read_rope=functools.partial(read_rope, default_theta=1e6),
    tensor_names={
        "blocks/shared_gate": "model.layers.{}.mlp.shared_experts.gate_proj.weight",
        "blocks/shared_up": "model.layers.{}.mlp.shared_experts.up_proj.weight",
        "blocks/shared_down": "model.layers.{}.mlp.shared_experts.down_proj.weight",
    },
    float32=("blocks/router", "blocks/router_bias"),
)

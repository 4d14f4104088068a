"""Llama 1 to 3 (2302.13971, 2307.09288, 2407.21783), and what was trained in its form."""

from jaxpt.families.family import SWITCH, Family, Key

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(
        Key("attention_bias", ("qkv_bias", "out_bias"), SWITCH, default=False),
        Key("mlp_bias", "mlp_bias", SWITCH, default=False),
    ),
)

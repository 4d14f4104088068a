"""Seed-OSS (ByteDance, 2025): Llama with biases on q, k and v, and a head width of its own."""

from jaxpt.families.family import SWITCH, Family, Key

FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    keys=(
        Key("attention_bias", "qkv_bias", SWITCH, default=True),
        Key("attention_out_bias", "out_bias", SWITCH, default=False),
        Key("mlp_bias", "mlp_bias", SWITCH, default=False),
    ),
    defaults={"head_dim": 128, "max_position_embeddings": 524_288, "num_key_value_heads": 8},
)

"""Seed-OSS (ByteDance, 2025): Llama with biases on q, k and v, and a head width of its own."""

from jaxpt.families.family import SIZE, SWITCH, Family, HfConfig, Key


def default_head_dim(config: HfConfig) -> int:
    """Return the class's 128 where the key is missing; null means an even share of the width."""
    if "head_dim" in config:
        return config["hidden_size"] // config["num_attention_heads"]
    return 128


FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    keys=(
        Key("attention_bias", "qkv_bias", SWITCH, default=True),
        Key("attention_out_bias", "out_bias", SWITCH, default=False),
        Key("mlp_bias", "mlp_bias", SWITCH, default=False),
        Key("head_dim", "d_head", SIZE, default_head_dim),
        Key("max_position_embeddings", "max_seq_len", SIZE, 524_288),
    ),
)

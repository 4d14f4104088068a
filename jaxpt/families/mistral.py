"""Mistral (2310.06825): Llama with a sliding window."""

from jaxpt.families.family import SIZE, Family, Key

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=(Key("sliding_window", "sliding_window", SIZE, null=True),),  # null: all positions
    defaults={
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
)

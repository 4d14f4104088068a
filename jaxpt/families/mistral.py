"""Mistral (2310.06825): Llama with a sliding window."""

from jaxpt.families.family import SIZE, Family, Key

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    # 4096 is the class's default where the key is missing; null means all positions
    keys=(Key("sliding_window", "sliding_window", SIZE, default=4096, null=True),),
)

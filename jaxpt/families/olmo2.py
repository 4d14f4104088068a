"""OLMo 2 (2501.00656): norms after attention and MLP; one norm over all of q, and of k."""

from jaxpt.families.family import SWITCH, Family, Key

KEYS = (Key("attention_bias", ("qkv_bias", "out_bias"), SWITCH, default=False),)
IMPLIED = {"norm_placement": "post", "qk_norm": True, "qk_norm_whole": True}

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    keys=KEYS,
    defaults={"rms_norm_eps": 1e-5},
    implied=IMPLIED,
)

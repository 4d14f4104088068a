"""Qwen 3, dense (2505.09388): RMSNorm over each head's q and k."""

from jaxpt.families.family import SWITCH, Family, Key
from jaxpt.families.windows import read_windows, write_windows

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(Key("attention_bias", ("qkv_bias", "out_bias"), SWITCH, default=False),),
    implied={"qk_norm": True},
    read_more=read_windows,
    write_more=write_windows,
)

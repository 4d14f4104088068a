"""Qwen 3, dense (2505.09388): RMSNorm over each head's q and k."""

from jaxpt.families import qwen2
from jaxpt.families.family import SWITCH, Family, Key
from jaxpt.families.windows import (
    QWEN_WINDOW_KEYS,
    read_switched_windows,
    write_switched_windows,
)

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(Key("attention_bias", ("qkv_bias", "out_bias"), SWITCH, default=False),),
    defaults={**qwen2.DEFAULTS, "head_dim": 128},
    implied={"qk_norm": True},
    reads=QWEN_WINDOW_KEYS,
    read_more=read_switched_windows,
    write_more=write_switched_windows,
)

"""Qwen 2 and 2.5 (2407.10671, 2412.15115): biases on q, k and v; windows in the upper layers."""

from jaxpt.families.family import Family
from jaxpt.families.windows import (
    QWEN_WINDOW_KEYS,
    read_switched_windows,
    write_switched_windows,
)

DEFAULTS = {
    "max_position_embeddings": 32_768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
}
FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=DEFAULTS,
    implied={"qkv_bias": True},
    reads=QWEN_WINDOW_KEYS,
    read_more=read_switched_windows,
    write_more=write_switched_windows,
)

"""Qwen 2 and 2.5 (2407.10671, 2412.15115): biases on q, k and v; windows in the upper layers."""

from jaxpt.families.family import Family
from jaxpt.families.windows import read_windows, write_windows

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    implied={"qkv_bias": True},
    read_more=read_windows,
    write_more=write_windows,
)

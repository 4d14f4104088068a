"""Gemma 3, text (2503.19786): Gemma 2 with q and k norms; windows have a rope of their own."""

import pathlib
from typing import Any

from jaxpt.families import gemma2
from jaxpt.families.family import SIZE, Family, HfConfig, refuse
from jaxpt.families.rope import read_ropes_by_layer_type, write_ropes_by_layer_type
from jaxpt.families.windows import every, read_layer_types
from jaxpt.spec import ModelSpec

WINDOW_THETA_KEY = "rope_local_base_freq"


def read_more(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return the fields of scales and windows: every sixth layer has no window."""
    pattern = config["sliding_window_pattern"]
    if not SIZE.accepts(pattern):
        raise refuse(path, "sliding_window_pattern", SIZE.expected, pattern)
    windows = read_layer_types(config, path, every(pattern, config["num_hidden_layers"]))
    return {**gemma2.read_scales(config, path), **windows}


def read_rope(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return the fields of rope."""
    return read_ropes_by_layer_type(config, path, 1_000_000.0, WINDOW_THETA_KEY, 10_000.0)


def write_rope(spec: ModelSpec) -> HfConfig:
    """Return the keys of rope."""
    return write_ropes_by_layer_type(spec, WINDOW_THETA_KEY)


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=gemma2.KEYS,
    defaults={
        **gemma2.DEFAULTS,
        "final_logit_softcapping": None,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
    },
    implied={**gemma2.IMPLIED, "qk_norm": True},
    # the class has the key, and its attention does not read it
    harmless={"use_bidirectional_attention": (False,), "attn_logit_softcapping": ()},
    reads=(*gemma2.READS, "sliding_window_pattern", WINDOW_THETA_KEY),
    read_more=read_more,
    write_more=gemma2.write_more,
    read_rope=read_rope,
    write_rope=write_rope,
    tensor_names=gemma2.TENSOR_NAMES,
)

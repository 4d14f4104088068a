"""OLMo 3 (Ai2, 2025): OLMo 2 with a window in three of four layers, whose rope is not scaled."""

import pathlib
from typing import Any

from jaxpt.families import olmo2
from jaxpt.families.family import Family, HfConfig
from jaxpt.families.rope import read_ropes_by_layer_type, write_ropes_by_layer_type
from jaxpt.families.windows import every, read_layer_types, write_layer_types

THETA = 500_000.0


def read_windows(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return the fields of windows: every fourth layer has none."""
    return read_layer_types(config, path, every(4, config["num_hidden_layers"]))


def read_rope(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return the fields of rope. transformers reads rope_theta for layers without a window only."""
    return read_ropes_by_layer_type(config, path, THETA, "", THETA)


FAMILY = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    keys=olmo2.KEYS,
    defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
    implied=olmo2.IMPLIED,
    reads=("sliding_window", "layer_types"),
    read_more=read_windows,
    write_more=write_layer_types,
    read_rope=read_rope,
    write_rope=write_ropes_by_layer_type,
)

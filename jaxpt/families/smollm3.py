"""SmolLM3 (Hugging Face, 2025): Llama whose every fourth layer has no rotary embedding."""

import functools
import pathlib
from typing import Any

from jaxpt.families.family import SIZE, SWITCH, Family, HfConfig, Key, refuse
from jaxpt.families.rope import read_rope
from jaxpt.families.windows import read_layer_types, write_layer_types
from jaxpt.spec import ModelSpec


def read_layers(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return no_rope_layers and the fields of windows, which layers without rope may have."""
    n_layers = config["num_hidden_layers"]
    has_rope = config.get("no_rope_layers")
    if has_rope is None:
        interval = config["no_rope_layer_interval"]
        if not SIZE.accepts(interval):
            raise refuse(path, "no_rope_layer_interval", SIZE.expected, interval)
        has_rope = [int((layer + 1) % interval != 0) for layer in range(n_layers)]
    is_valid = isinstance(has_rope, list) and len(has_rope) >= n_layers
    if not is_valid or not all(value in (0, 1) for value in has_rope):
        raise refuse(path, "no_rope_layers", f"a 0 or 1 for each of {n_layers} layers", has_rope)
    no_rope = tuple(layer for layer in range(n_layers) if not has_rope[layer])
    windows: dict[str, Any] = {"sliding_window": None, "global_layers": ()}
    switch = config.get("use_sliding_window") or False
    if not SWITCH.accepts(switch):
        raise refuse(path, "use_sliding_window", SWITCH.expected, switch)
    layer_types = config.get("layer_types")
    if switch and config.get("sliding_window") is not None:
        others = tuple(layer for layer in range(n_layers) if layer not in no_rope)
        windows = read_layer_types(config, path, others)
    elif layer_types is not None and layer_types != ["full_attention"] * n_layers:
        expected = "full_attention in every layer (use_sliding_window is false)"
        raise refuse(path, "layer_types", expected, layer_types)
    return {"no_rope_layers": no_rope, **windows}


def write_layers(spec: ModelSpec) -> HfConfig:
    """Return the keys of ropes and windows."""
    has_rope = [int(layer not in spec.no_rope_layers) for layer in range(spec.n_layers)]
    return {
        "no_rope_layers": has_rope,
        "use_sliding_window": spec.sliding_window is not None,
        **write_layer_types(spec),
    }


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys=(
        Key("attention_bias", ("qkv_bias", "out_bias"), SWITCH, default=False),
        Key("mlp_bias", "mlp_bias", SWITCH, default=False),
    ),
    defaults={
        "max_position_embeddings": 32_768,
        "no_rope_layer_interval": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    reads=(
        "no_rope_layers",
        "no_rope_layer_interval",
        "use_sliding_window",
        "sliding_window",
        "layer_types",
    ),
    read_more=read_layers,
    write_more=write_layers,
    read_rope=functools.partial(read_rope, default_theta=2_000_000.0),
)

"""Read and write which layers of a Qwen have a sliding window."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxpt.families.family import SIZE, HfConfig, refuse
from jaxpt.spec import ModelSpec

LAYER_TYPES = {"full_attention": True, "sliding_attention": False}  # whether it is global
DEFAULT_WINDOW = 4096
DEFAULT_MAX_WINDOW_LAYERS = 28


def read_windows(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return sliding_window and global_layers of a config's ModelSpec."""
    switch = config.get("use_sliding_window") or False
    if type(switch) is not bool:
        raise refuse(path, "use_sliding_window", "true or false", switch)
    if not switch:
        return {"sliding_window": None, "global_layers": ()}
    window = config.get("sliding_window", DEFAULT_WINDOW)
    if not SIZE.accepts(window):
        raise refuse(path, "sliding_window", SIZE.expected, window)
    n_layers = config["num_hidden_layers"]
    layer_types = config.get("layer_types")
    if layer_types is None:
        first = config.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS)
        if type(first) is not int or first < 0:
            raise refuse(path, "max_window_layers", "an integer of at least 0", first)
        return {"sliding_window": window, "global_layers": tuple(range(min(first, n_layers)))}
    is_valid = isinstance(layer_types, list) and len(layer_types) == n_layers
    if not is_valid or not all(name in LAYER_TYPES for name in map(str, layer_types)):
        expected = f"{n_layers} of {', '.join(LAYER_TYPES)}"
        raise refuse(path, "layer_types", expected, layer_types)
    global_layers = [layer for layer, name in enumerate(layer_types) if LAYER_TYPES[name]]
    return {"sliding_window": window, "global_layers": tuple(global_layers)}


def write_windows(spec: ModelSpec) -> HfConfig:
    """Return the keys of the spec's windows."""
    if spec.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    names = {is_global: name for name, is_global in LAYER_TYPES.items()}
    layer_types = [names[layer in spec.global_layers] for layer in range(spec.n_layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": spec.sliding_window,
        "layer_types": layer_types,
    }

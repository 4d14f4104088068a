"""Read and write which layers have a sliding window."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxpt.families.family import SIZE, SWITCH, HfConfig, refuse
from jaxpt.spec import ModelSpec

LAYER_TYPES = {"full_attention": True, "sliding_attention": False}  # whether it is global


def read_layer_types(
    config: HfConfig, path: pathlib.Path, global_layers: tuple[int, ...]
) -> dict[str, Any]:
    """Return sliding_window and global_layers of a config's ModelSpec.

    Args:
        config: a config.json.
        path: its file.
        global_layers: where it has no layer_types.
    """
    window = config.get("sliding_window")
    if not SIZE.accepts(window):
        raise refuse(path, "sliding_window", SIZE.expected, window)
    n_layers = config["num_hidden_layers"]
    layer_types = config.get("layer_types")
    if layer_types is not None:
        is_valid = isinstance(layer_types, list) and len(layer_types) == n_layers
        if not is_valid or not all(name in LAYER_TYPES for name in map(str, layer_types)):
            expected = f"{n_layers} of {', '.join(LAYER_TYPES)}"
            raise refuse(path, "layer_types", expected, layer_types)
        global_layers = tuple(i for i, name in enumerate(layer_types) if LAYER_TYPES[name])
    return {"sliding_window": window, "global_layers": global_layers}


def write_layer_types(spec: ModelSpec) -> HfConfig:
    """Return layer_types and sliding_window of a spec."""
    names = {is_global: name for name, is_global in LAYER_TYPES.items()}
    has_none = spec.sliding_window is None
    layer_types = [names[has_none or i in spec.global_layers] for i in range(spec.n_layers)]
    return {"sliding_window": spec.sliding_window, "layer_types": layer_types}


def every(n: int, n_layers: int) -> tuple[int, ...]:
    """Return the n-th layer of each n, counted from 0."""
    return tuple(range(n - 1, n_layers, n))


def read_switched_windows(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return sliding_window and global_layers of a Qwen, whose windows have a switch."""
    switch = config.get("use_sliding_window") or False
    if not SWITCH.accepts(switch):
        raise refuse(path, "use_sliding_window", SWITCH.expected, switch)
    if not switch:
        layer_types = config.get("layer_types")
        n_layers = config["num_hidden_layers"]
        if layer_types is not None and layer_types != ["full_attention"] * n_layers:
            expected = "full_attention in every layer (use_sliding_window is false)"
            raise refuse(path, "layer_types", expected, layer_types)
        return {"sliding_window": None, "global_layers": ()}
    first = config.get("max_window_layers")
    if type(first) is not int or first < 0:
        raise refuse(path, "max_window_layers", "an integer of at least 0", first)
    n_global = min(first, config["num_hidden_layers"])
    return read_layer_types(config, path, tuple(range(n_global)))


def write_switched_windows(spec: ModelSpec) -> HfConfig:
    """Return the keys of a Qwen's windows."""
    if spec.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    return {"use_sliding_window": True, **write_layer_types(spec)}


QWEN_WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

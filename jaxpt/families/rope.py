"""Read and write rotary embedding's keys, in the layouts of transformers 5 and before."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxpt.spec import ModelSpec, RopeScaling, UserError

HfConfig = dict[str, Any]  # a config.json

DEFAULT_THETA = 10_000.0  # of most of transformers' classes
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MAX_FLOAT = 3e38  # of float32
ORIGINAL_KEY = "original_max_position_embeddings"
# of yarn; they are supported with these values only
YARN_DEFAULTS = {"mscale": (None,), "mscale_all_dim": (None,), "truncate": (None, True)}


def read_rope(
    config: HfConfig,
    path: pathlib.Path,
    default_theta: float = DEFAULT_THETA,
    rotary_frac: float | None = None,
    types: tuple[str, ...] = ROPE_TYPES,
) -> dict[str, Any]:
    """Return rope_theta, rope_scaling and rotary_frac of a config's ModelSpec.

    Of the two layouts' keys transformers takes rope_scaling, with all that stands in it.

    Args:
        config: a config.json.
        path: its file.
        default_theta: where it states none.
        rotary_frac: the share of channels that are rotated where it states none; None: a family
            that rotates all.
        types: the rope types that the family has.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope parameters: expected a JSON object, got {rope!r:.80}.")
    default = config.get("partial_rotary_factor")
    if default is None:
        default = 1.0 if rotary_frac is None else rotary_frac
    share = rope.get("partial_rotary_factor", default)
    if rotary_frac is None and share != 1:
        raise UserError(
            f"{path}: partial_rotary_factor: expected 1.0, got {share!r}. Convert the model, or "
            "take another."
        )
    theta, scaling = read_rope_object(rope, config, path, default_theta, types)
    try:
        share = get_number({"partial_rotary_factor": share}, "partial_rotary_factor")
    except (TypeError, ValueError) as error:
        raise explain(path, rope, error) from None
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_frac": share}


def read_rope_object(
    rope: Any,
    config: HfConfig,
    path: pathlib.Path,
    default_theta: float,
    types: tuple[str, ...] = ROPE_TYPES,
) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling of one object with rope parameters."""
    try:
        theta = get_number(rope, "rope_theta", config.get("rope_theta", default_theta))
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        if rope_type not in types:
            raise UserError(
                f"{path}: rope type: expected {', '.join(types)}, got {rope_type!r}. Convert the "
                "model, or take another."
            )
        nested = [key for key, value in rope.items() if isinstance(value, dict)]
        if nested:
            raise ValueError(f"{nested[0]} of its own")
        return theta, read_scaling(rope_type, rope, config)
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise explain(path, rope, error) from None


def explain(path: pathlib.Path, rope: Any, error: Exception) -> UserError:
    """Return the error for rope parameters that cannot be read."""
    return UserError(
        f"{path}: cannot read its rope parameters {rope!r:.200} ({error}). "
        "Is it the file of the model's authors?"
    )


def read_scaling(rope_type: str, rope: dict[str, Any], config: HfConfig) -> RopeScaling | None:
    """Return the scaling of a rope. Raise ValueError or TypeError."""
    if rope_type == "default":
        return None
    factor = get_number(rope, "factor")
    if rope_type == "linear":
        return RopeScaling("linear", factor)
    # transformers takes the key beside the object before the one in it
    inner = rope.get(ORIGINAL_KEY, config.get("max_position_embeddings"))
    original = int(get_number(config, ORIGINAL_KEY, inner))
    if rope_type == "yarn":
        return read_yarn(rope, factor, original)
    low = get_number(rope, "low_freq_factor")
    high = get_number(rope, "high_freq_factor")
    return RopeScaling("llama3", factor, low, high, original)


def read_yarn(rope: dict[str, Any], factor: float, original: int) -> RopeScaling:
    """Return the scaling of a "yarn" rope. Raise ValueError or TypeError."""
    for key, values in YARN_DEFAULTS.items():
        if rope.get(key) not in values:
            raise ValueError(f"{key} {rope[key]} is not supported")
    given = {key: value for key, value in rope.items() if value}  # 0 and null: the default
    attention_factor = None
    if rope.get("attention_factor") is not None:
        attention_factor = get_number(rope, "attention_factor")
    return RopeScaling(
        "yarn",
        factor,
        original_max_seq_len=original,
        beta_fast=get_number(given, "beta_fast", 32.0),
        beta_slow=get_number(given, "beta_slow", 1.0),
        attention_factor=attention_factor,
    )


def get_number(values: dict[str, Any], key: str, default: Any = None) -> float:
    """Return a number above 0 that float32 holds. Raise ValueError or TypeError for another."""
    value = values.get(key, default)
    if isinstance(value, int) and value > MAX_FLOAT:
        raise ValueError(f"{key} is too large")
    number = float(value)
    if not 0 < number <= MAX_FLOAT:
        raise ValueError(f"{key} {number}")
    return number


def write_rope(spec: ModelSpec) -> HfConfig:
    """Return the keys of both layouts."""
    scaling = write_scaling(spec)
    shared: HfConfig = {}
    if spec.rotary_frac != 1:
        shared["partial_rotary_factor"] = spec.rotary_frac
    return {
        "rope_parameters": {"rope_theta": spec.rope_theta, **scaling, **shared},
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling if spec.rope_scaling else None,
        **shared,
    }


def write_scaling(spec: ModelSpec) -> HfConfig:
    """Return rope type and scaling as rope parameters."""
    scaling = spec.rope_scaling
    if not scaling:
        return {"rope_type": "default"}
    rope: HfConfig = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type != "linear":
        rope[ORIGINAL_KEY] = scaling.original_max_seq_len
    if scaling.rope_type == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
    if scaling.rope_type == "yarn":
        rope["beta_fast"] = scaling.beta_fast
        rope["beta_slow"] = scaling.beta_slow
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    return rope


# ---- layers with a window that have a rope of their own


def read_ropes_by_layer_type(
    config: HfConfig,
    path: pathlib.Path,
    default_theta: float,
    window_key: str,
    window_default: float,
) -> dict[str, Any]:
    """Return rope_theta, rope_scaling and window_rope_theta (Gemma 3, OLMo 3).

    rope_parameters holds an object per layer type; before transformers 5, keys beside it did, and
    rope_scaling was that of the layers without a window.

    Args:
        config: a config.json.
        path: its file.
        default_theta: of layers without a window.
        window_key: of the theta of layers with a window, beside rope_parameters.
        window_default: where it states none.
    """
    ropes = config.get("rope_parameters") or {}
    if not isinstance(ropes, dict) or ropes.keys() - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{path}: rope_parameters: expected an object per layer type (full_attention, "
            f"sliding_attention), got {ropes!r:.200}."
        )
    full = {**(ropes.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    inner_only = {key: value for key, value in config.items() if key != ORIGINAL_KEY}
    theta, scaling = read_rope_object(full, inner_only, path, default_theta)
    window = ropes.get("sliding_attention") or {}
    beside = {"rope_theta": config.get(window_key, window_default)}
    window_theta, window_scaling = read_rope_object(window, beside, path, window_default)
    if window_scaling:
        raise UserError(
            f"{path}: rope_parameters: sliding_attention: expected rope_type default, got "
            f"{window_scaling.rope_type!r}. Convert the model, or take another."
        )
    return {"rope_theta": theta, "rope_scaling": scaling, "window_rope_theta": window_theta}


def write_ropes_by_layer_type(spec: ModelSpec, window_key: str | None = None) -> HfConfig:
    """Return the keys of both layouts."""
    scaling = write_scaling(spec)
    window_theta = {"rope_theta": spec.window_rope_theta, "rope_type": "default"}
    full = {"rope_theta": spec.rope_theta, **scaling}
    config: HfConfig = {
        "rope_parameters": {"full_attention": full, "sliding_attention": window_theta},
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling if spec.rope_scaling else None,
    }
    if window_key:
        config[window_key] = spec.window_rope_theta
    return config

"""Read and write rotary embedding's keys, in the layouts of transformers 5 and before."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from jaxpt.spec import ModelSpec, RopeScaling, UserError


def read_rope(config: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Return rope_theta and rope_scaling of a config's ModelSpec."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        theta = get_number(rope, "rope_theta", config.get("rope_theta", 10_000.0))
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        scaling = None
        if rope_type in ("linear", "llama3"):
            scaling = read_scaling(rope_type, rope)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: cannot read its rope parameters {rope} ({error}). "
            "Is it the file of the model's authors?"
        ) from None
    if rope_type != "default" and scaling is None:
        raise UserError(
            f"{path}: rope type: expected default, linear or llama3, got {rope_type!r}."
        )
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_scaling(rope_type: str, rope: dict[str, Any]) -> RopeScaling:
    """Return the scaling of a "linear" or "llama3" rope. Raise ValueError or TypeError."""
    factor = get_number(rope, "factor")
    if rope_type == "linear":
        return RopeScaling("linear", factor)
    low = get_number(rope, "low_freq_factor")
    high = get_number(rope, "high_freq_factor")
    original = get_number(rope, "original_max_position_embeddings")
    return RopeScaling("llama3", factor, low, high, int(original))


def get_number(values: dict[str, Any], key: str, default: Any = None) -> float:
    """Return a finite number above 0. Raise ValueError or TypeError for anything else."""
    value = float(values.get(key, default))
    if not 0 < value < math.inf:
        raise ValueError(f"{key} {value}")
    return value


def write_rope(spec: ModelSpec) -> dict[str, Any]:
    """Return the keys of both layouts."""
    scaling = spec.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling:
        rope = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling and scaling.rope_type == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    return {
        "rope_parameters": {"rope_theta": spec.rope_theta, **rope},
        "rope_theta": spec.rope_theta,
        "rope_scaling": rope if scaling else None,
    }

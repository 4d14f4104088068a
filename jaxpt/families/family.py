"""Convert between config.json and ModelSpec by a family's table of keys."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pathlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from jaxpt import families
from jaxpt.families import rope
from jaxpt.spec import ModelSpec, UserError, field_names

HfConfig = dict[str, Any]  # a config.json

REQUIRED = object()  # the default of a key that must be there


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a key's value may be.

    Attributes:
        expected: for the error message.
        accepts: whether a JSON value is valid.
    """

    expected: str
    accepts: Callable[[Any], bool]


def is_size(value: Any) -> bool:
    """Return whether a JSON value is an integer of at least 1."""
    return type(value) is int and value > 0


def is_positive(value: Any) -> bool:
    """Return whether a JSON value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


def is_not_negative(value: Any) -> bool:
    """Return whether a JSON value is a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= value < math.inf


def is_token_id(value: Any) -> bool:
    """Return whether a JSON value is a token id."""
    return type(value) is int and value >= 0


SIZE = Kind("an integer of at least 1", is_size)
POSITIVE = Kind("a number above 0", is_positive)
NOT_NEGATIVE = Kind("a number of at least 0", is_not_negative)
SWITCH = Kind("true or false", lambda value: type(value) is bool)
TOKEN_ID = Kind("a token id", is_token_id)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that is a field of ModelSpec, or several.

    Attributes:
        name: of the key.
        fields: of ModelSpec.
        kind: what its value may be.
        default: the field's value where the key is missing or null; a function of the config, or
            REQUIRED.
        null: whether null is a value of its own, not a missing one.
    """

    name: str
    fields: str | tuple[str, ...]
    kind: Kind
    default: Any = None
    null: bool = False

    @property
    def field_names(self) -> tuple[str, ...]:
        """The fields of ModelSpec."""
        return (self.fields,) if isinstance(self.fields, str) else self.fields

    def read(self, config: HfConfig, path: pathlib.Path) -> Any:
        """Return the value in a config. Raise UserError for an invalid one."""
        value = config.get(self.name)
        if self.kind is TOKEN_ID and isinstance(value, list):
            value = next(iter(value), None)  # the first of several ends a document
        is_missing = value is None and not (self.null and self.name in config)
        if is_missing and self.default is not REQUIRED:
            return self.default(config) if callable(self.default) else self.default
        if is_missing or not (value is None or self.kind.accepts(value)):
            raise refuse(path, self.name, self.kind.expected, value)
        return value


# What every family's config.json says.
COMMON_KEYS = (
    Key("hidden_size", "d_model", SIZE, REQUIRED),
    Key("intermediate_size", "d_ff", SIZE, REQUIRED),
    Key("num_hidden_layers", "n_layers", SIZE, REQUIRED),
    Key("num_attention_heads", "n_heads", SIZE, REQUIRED),
    Key("vocab_size", "vocab_size", SIZE, REQUIRED),
    Key("num_key_value_heads", "n_kv_heads", SIZE, lambda config: config["num_attention_heads"]),
    Key(
        "head_dim",
        "d_head",
        SIZE,
        lambda config: config["hidden_size"] // config["num_attention_heads"],
    ),
    Key("max_position_embeddings", "max_seq_len", SIZE, 2048),
    Key("rms_norm_eps", "norm_eps", POSITIVE, 1e-6),
    Key("tie_word_embeddings", "tie_embeddings", SWITCH, False),
    Key("bos_token_id", "bos_id", TOKEN_ID),
    Key("eos_token_id", "eos_id", TOKEN_ID),
)
# What is supported with one value only; the first is written.
COMMON_FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
REFUSED_KEYS = {"quantization_config": "none (train the original weights)"}


def read_nothing(config: HfConfig, path: pathlib.Path) -> dict[str, Any]:
    """Return no further fields."""
    return {}


def write_nothing(spec: ModelSpec) -> HfConfig:
    """Return no further keys."""
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: of config.json.
        architecture: transformers' class.
        keys: of its config.json beside COMMON_KEYS.
        defaults: key -> value of transformers' class where the key is missing, if it is another
            than Key.default.
        implied: fields of ModelSpec that the family fixes, {"qk_norm": True}.
        fixed: keys that are supported with some values only, missing and null being one of them.
        read_more: config -> fields that take more than one key.
        write_more: the other way.
        tensor_names: path -> name in the files, where it is not ParamSpec.hf_name.
        float32: paths of parameters that are stored in float32 whatever the others are.
    """

    model_type: str
    architecture: str
    keys: tuple[Key, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    read_more: Callable[[HfConfig, pathlib.Path], dict[str, Any]] = read_nothing
    write_more: Callable[[ModelSpec], HfConfig] = write_nothing
    tensor_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    float32: tuple[str, ...] = ()


@functools.cache
def list_families() -> dict[str, Family]:
    """Return every family by model_type."""
    found = {}
    for module in pkgutil.iter_modules(families.__path__):
        family = getattr(importlib.import_module(f"jaxpt.families.{module.name}"), "FAMILY", None)
        if family:
            found[family.model_type] = family
    return found


def find_family(spec: ModelSpec) -> Family:
    """Return the family that a spec is exported as. Raise UserError if there is none."""
    known = list_families()
    if spec.family not in known:
        raise UserError(
            f"spec.family: expected {', '.join(known)}, got {spec.family!r}. Set it in spec.json."
        )
    return known[spec.family]


def read_spec(config: HfConfig, path: pathlib.Path) -> ModelSpec:
    """Return a config.json, of old or new layout, as a ModelSpec.

    Raises:
        UserError: naming the key that is not supported.
    """
    known = list_families()
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise refuse(path, "model_type", ", ".join(known), model_type)
    family = known[model_type]
    for key, supported in REFUSED_KEYS.items():
        if config.get(key):
            raise refuse(path, key, supported, config[key])
    for key, values in {**COMMON_FIXED, **family.fixed}.items():
        value = config.get(key)
        if value is not None and value not in values:
            supported = " or ".join(map(str, values))
            raise refuse(path, key, supported.lower(), value)
    config = {**family.defaults, **config}
    required = [key.name for key in COMMON_KEYS if key.default is REQUIRED]
    missing = [name for name in required if name not in config]
    if missing:
        raise UserError(
            f"{path}: has no {', '.join(missing)}. Is it the config of a language model?"
        )
    fields: dict[str, Any] = {"family": model_type, **family.implied}
    for key in (*COMMON_KEYS, *family.keys):
        value = key.read(config, path)
        fields.update(dict.fromkeys(key.field_names, value))
    fields.update(rope.read_rope(config, path))
    fields.update(family.read_more(config, path))
    try:
        return ModelSpec(**fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def refuse(path: pathlib.Path, key: str, supported: str, value: Any) -> UserError:
    """Return the error for a value that is not supported."""
    return UserError(
        f"{path}: {key}: expected {supported}, got {value!r}. Convert the model, or take another."
    )


def write_config(spec: ModelSpec, dtype: str) -> HfConfig:
    """Return config.json for a spec.

    Raises:
        UserError: the family's config.json cannot state a field of the spec.
    """
    config = make_config(spec, dtype)
    name = find_unstated_field(spec, config)
    if name is None:
        return config
    found = getattr(read_spec(config, pathlib.Path("config.json")), name)
    able = [other for other in list_families() if can_state(spec.replace(family=other))]
    hint = f"Set the spec's family to {able[0]}." if able else "No known family can."
    raise UserError(
        f"export: a {spec.family} config.json cannot state {name} = {getattr(spec, name)!r} "
        f"({found!r} would be read back). {hint}"
    )


def make_config(spec: ModelSpec, dtype: str) -> HfConfig:
    """Return what the spec's family can state of it.

    Rope and dtype are written in both layouts: a reader of the old one would otherwise silently
    fall back to theta 10,000.
    """
    family = find_family(spec)
    config: HfConfig = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    for key in (*COMMON_KEYS, *family.keys):
        config[key.name] = getattr(spec, key.field_names[0])
    for key, values in {**COMMON_FIXED, **family.fixed}.items():
        config[key] = values[0]
    config.update(rope.write_rope(spec))
    config.update(family.write_more(spec))
    config.update(dtype=dtype, torch_dtype=dtype, initializer_range=0.02, use_cache=True)
    return config


def find_unstated_field(spec: ModelSpec, config: HfConfig) -> str | None:
    """Return the first field that reading a written config does not give back, None if all are."""
    read_back = read_spec(config, pathlib.Path("config.json"))
    for name in field_names(ModelSpec):
        if getattr(spec, name) != getattr(read_back, name):
            return name
    return None


def can_state(spec: ModelSpec) -> bool:
    """Return whether the spec's family can state all of it."""
    try:
        return find_unstated_field(spec, make_config(spec, "float32")) is None
    except UserError:
        return False

"""Convert between config.json and ModelSpec by a family's table of keys."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import pathlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from jaxpt import families
from jaxpt.families import rope
from jaxpt.spec import CHOICES, ModelSpec, UserError

logger = logging.getLogger(__name__)

HfConfig = dict[str, Any]  # a config.json

REQUIRED = object()  # the default of a key that must be there
MAX_INT = 2**31 - 1
MAX_SHOWN = 200  # characters of a value


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a key's value may be.

    Attributes:
        expected: for the error message.
        accepts: whether a JSON value is valid.
        decode: JSON value -> field.
        encode: the other way.
    """

    expected: str
    accepts: Callable[[Any], bool]
    decode: Callable[[Any], Any] = lambda value: value
    encode: Callable[[Any], Any] = lambda value: value


def is_size(value: Any) -> bool:
    """Return whether a JSON value is an integer of at least 1, as the devices' integers hold it."""
    return type(value) is int and 0 < value <= MAX_INT


def is_positive(value: Any) -> bool:
    """Return whether a JSON value is a number above 0, as the devices hold it."""
    return is_not_negative(value) and value > 0


def is_not_negative(value: Any) -> bool:
    """Return whether a JSON value is a number of at least 0, as the devices hold it."""
    limits = {int: MAX_INT, float: rope.MAX_FLOAT}
    return type(value) in limits and 0 <= value <= limits[type(value)]


def is_token_id(value: Any) -> bool:
    """Return whether a JSON value is a token id."""
    return type(value) is int and 0 <= value <= MAX_INT


def are_token_ids(value: Any) -> bool:
    """Return whether a JSON value is a token id or a list of some."""
    return is_token_id(value) or (isinstance(value, list) and all(map(is_token_id, value)))


def decode_token_ids(value: Any) -> tuple[int, ...]:
    """Return a token id or a list of some as a tuple."""
    return tuple(value) if isinstance(value, list) else (value,)


def encode_token_ids(ids: tuple[int, ...]) -> int | list[int] | None:
    """Return several token ids as a list, a single one as itself, none as null."""
    if len(ids) > 1:
        return list(ids)
    return ids[0] if ids else None


# deeper ones would only be a slip: their tensors' names alone would take minutes
MAX_LAYERS = 10_000
N_LAYERS = Kind(f"an integer from 1 to {MAX_LAYERS}", lambda x: is_size(x) and x <= MAX_LAYERS)
ACTIVATION = Kind(" or ".join(CHOICES["activation"]), lambda x: x in CHOICES["activation"])
SIZE = Kind(f"an integer from 1 to {MAX_INT}", is_size)
POSITIVE = Kind("a number above 0 that float32 holds", is_positive)
NOT_NEGATIVE = Kind("a number of at least 0 that float32 holds", is_not_negative)
SWITCH = Kind("true or false", lambda value: type(value) is bool)
TOKEN_ID = Kind(f"a token id, from 0 to {MAX_INT}", is_token_id)
TOKEN_IDS = Kind(
    f"token ids, from 0 to {MAX_INT}", are_token_ids, decode_token_ids, encode_token_ids
)


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
        is_missing = value is None and not (self.null and self.name in config)
        if is_missing and self.default is not REQUIRED:
            return self.default(config) if callable(self.default) else self.default
        if is_missing or not (value is None or self.kind.accepts(value)):
            raise refuse(path, self.name, self.kind.expected, value)
        return None if value is None else self.kind.decode(value)

    def write(self, spec: ModelSpec) -> Any:
        """Return a spec's value for a config."""
        return self.kind.encode(getattr(spec, self.field_names[0]))


# What config.json and generation_config.json say.
TOKEN_KEYS = (
    Key("bos_token_id", "bos_id", TOKEN_ID),
    Key("eos_token_id", "eos_ids", TOKEN_IDS, ()),
    Key("pad_token_id", "pad_id", TOKEN_ID),
)
# What every family's config.json says.
COMMON_KEYS = (
    Key("hidden_size", "d_model", SIZE, REQUIRED),
    Key("intermediate_size", "d_ff", SIZE, REQUIRED),
    Key("num_hidden_layers", "n_layers", N_LAYERS, REQUIRED),
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
    Key("hidden_act", "activation", ACTIVATION, "silu"),
    Key("tie_word_embeddings", "tie_embeddings", SWITCH, False),
    *TOKEN_KEYS,
)
ROPE_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
# Keys that transformers reads for a model of any type, with the values that change nothing; null
# is one of them. A family that reads such a key itself supports other values.
COMMON_HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_sharing_modes": (),
    "per_layer_config": ({},),
    "sliding_window": (),
}
REFUSED_KEYS = {"quantization_config": "none (train the original weights)"}
# Keys that do not change what the model computes.
IGNORED = """
    _attn_implementation _attn_implementation_autoset _name_or_path _sliding_window_pattern
    architectures
    attention_dropout auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cls_token_id decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder
    add_cross_attention cross_attention_hidden_size label2id language length_penalty max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores prefix
    pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty
    resid_pdrop residual_dropout return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_last_hidden_states
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache
"""
IGNORED_KEYS = frozenset(IGNORED.split())


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
        keys: of its config.json beside COMMON_KEYS, or in their place.
        defaults: key -> value of transformers' class where the key is missing, if it is another
            than Key.default.
        implied: fields of ModelSpec that the family fixes, {"qk_norm": True}.
        harmless: keys that change the function and are supported with some values only: those
            that change nothing. Missing and null are one of them.
        reads: keys that read_more reads.
        read_more: config -> fields that take more than one key.
        write_more: the other way.
        read_rope: config -> the fields of rotary embedding.
        write_rope: the other way.
        tensor_names: path -> name in the files, where it is not ParamSpec.hf_name.
        float32: paths of parameters that are stored in float32 whatever the others are.
        fused: name in the files -> paths of the parameters that it holds, one after the other
            along its rows (outputs).
    """

    model_type: str
    architecture: str
    keys: tuple[Key, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    harmless: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] = ()
    read_more: Callable[[HfConfig, pathlib.Path], dict[str, Any]] = read_nothing
    write_more: Callable[[ModelSpec], HfConfig] = write_nothing
    read_rope: Callable[[HfConfig, pathlib.Path], dict[str, Any]] = rope.read_rope
    write_rope: Callable[[ModelSpec], HfConfig] = rope.write_rope
    tensor_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    float32: tuple[str, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def read_keys(self) -> set[str]:
        """The keys of config.json that become fields of ModelSpec."""
        names = {key.name for key in (*COMMON_KEYS, *self.keys)}
        return names | {*ROPE_KEYS, *self.reads}


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
    check_keys(config, family, path)
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
    fields.update(family.read_rope(config, path))
    fields.update(family.read_more(config, path))
    if "layer_types" not in family.reads:
        check_uniform_layer_types(config, path, fields)
    try:
        return ModelSpec(**fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def check_keys(config: HfConfig, family: Family, path: pathlib.Path) -> None:
    """Refuse the values of unread keys that change the function; name keys that nobody reads."""
    for key, supported in REFUSED_KEYS.items():
        if config.get(key):
            raise refuse(path, key, supported, config[key])
    harmless = {**COMMON_HARMLESS, **family.harmless}
    for key in harmless.keys() - family.read_keys:
        value = config.get(key)
        if value is not None and value not in harmless[key]:
            supported = " or ".join(map(str, (*harmless[key], "null")))
            raise refuse(path, key, supported.lower(), value)
    known = family.read_keys | harmless.keys() | REFUSED_KEYS.keys() | IGNORED_KEYS
    unknown = config.keys() - known - {"layer_types"}
    if unknown:
        warn_of_unknown_keys(path, tuple(sorted(unknown)))


@functools.cache
def warn_of_unknown_keys(path: pathlib.Path, names: tuple[str, ...]) -> None:
    """Log once which keys of a config.json are not read."""
    logger.warning(
        "%s: ignored: %s. Neither transformers nor jaxpt reads it for this model_type.",
        path,
        ", ".join(names),
    )


def check_uniform_layer_types(
    config: HfConfig, path: pathlib.Path, fields: Mapping[str, Any]
) -> None:
    """Refuse layer_types other than what a family without them computes in every layer."""
    layer_types = config.get("layer_types")
    name = "sliding_attention" if fields.get("sliding_window") else "full_attention"
    if layer_types is not None and layer_types != [name] * config["num_hidden_layers"]:
        raise refuse(path, "layer_types", f"{name} in every layer", layer_types)


def refuse(path: pathlib.Path, key: str, supported: str, value: Any) -> UserError:
    """Return the error for a value that is not supported."""
    got = repr(value)
    if len(got) > MAX_SHOWN:
        got = f"{got[:MAX_SHOWN]}..."
    return UserError(
        f"{path}: {key}: expected {supported}, got {got}. Convert the model, or take another."
    )


def write_config(spec: ModelSpec, dtype: str) -> HfConfig:
    """Return config.json for a spec.

    Raises:
        UserError: the family's config.json cannot state a field of the spec.
    """
    config = make_config(spec, dtype)
    lost = find_unstated_field(spec, config)
    if lost:
        name, value, found = lost
        able = [name for name in list_families() if can_state(spec.replace(family=name))]
        hint = "No known family can."
        if able:
            hint = f"Set the spec's family to {' or '.join(able)}."
        raise UserError(
            f"a {spec.family} config.json cannot state {name} = {value!r} ({found!r} would be read "
            f"back). {hint}"
        )
    return config


def make_config(spec: ModelSpec, dtype: str) -> HfConfig:
    """Return config.json with what the spec's family can state.

    Rope and dtype are written in both layouts: a reader of the old one would otherwise silently
    fall back to theta 10,000.
    """
    family = find_family(spec)
    config: HfConfig = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    for key in (*COMMON_KEYS, *family.keys):
        config[key.name] = key.write(spec)
    config.update(family.write_rope(spec))
    config.update(family.write_more(spec))
    config.update(dtype=dtype, torch_dtype=dtype, initializer_range=0.02, use_cache=True)
    return config


def find_unstated_field(spec: ModelSpec, config: HfConfig) -> tuple[str, Any, Any] | None:
    """Return (name, value, value read back) of a field that a config does not keep."""
    read_back = read_spec(config, pathlib.Path("config.json"))
    for field in dataclasses.fields(ModelSpec):
        # of generation_config.json; of training alone
        if field.name in ("generation", "base_shape"):
            continue
        value, found = getattr(spec, field.name), getattr(read_back, field.name)
        if value != found:
            return field.name, value, found
    return None


def can_state(spec: ModelSpec) -> bool:
    """Return whether the spec's family can state all of it."""
    try:
        return find_unstated_field(spec, make_config(spec, "float32")) is None
    except UserError:
        return False

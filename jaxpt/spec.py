"""Define what crosses packages: ModelSpec, Batch, Manifest, Record, UserError. Imports no jax.

Axis letters, used in every file and every error message:
    B batch          T query position   S key position    D model width    N query heads
    K kv heads       H head width       F ff width        V vocabulary     L layers
    E experts
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

NOT_FINITE = "not_finite"  # key of a record's JSON: place -> why a number is null there


class UserError(ValueError):
    """A mistake that the user can fix, in one sentence: where, expected, got, what to do.

    Commands print it and exit with status 1 (`jaxpt.stage.entry_point`). Any other exception is a
    bug in jaxpt and keeps its traceback.
    """


@dataclasses.dataclass(frozen=True)
class Record:
    """The base of frozen dataclasses that are stored as one JSON object.

    `to_json` and `from_json` follow the annotations of the fields through nested records, tuples,
    lists, dicts and optionals, so that a record is no more than its fields.
    """

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values, nested records included.

        A number that is not finite is null, and the key "not_finite" says what it was:
        {"heldout_loss.prose": "NaN"}.
        """
        fields = {}
        faults: dict[str, str] = {}
        for name in field_names(type(self)):
            value = getattr(self, name)
            fields[name] = encode_json(value)
            if not isinstance(value, Record):  # which names its own
                note_nonfinite(value, name, faults)
        return fields | {NOT_FINITE: faults} if faults else fields

    @classmethod
    def from_json(cls, fields: Any, where: str = "") -> Self:
        """Build the record from `to_json`'s value.

        Args:
            fields: the JSON object.
            where: the file, for the error message.

        Raises:
            UserError: a key is unknown or missing, or a value has another type.
        """
        name = f"{where}: {cls.__name__}" if where else cls.__name__
        if not isinstance(fields, dict):
            raise UserError(f"{name}: expected a JSON object, got {fields!r:.80}.")
        hints = list_hints(cls)
        fields = {key: value for key, value in fields.items() if key != NOT_FINITE}
        unknown = sorted(fields.keys() - hints.keys())
        if unknown:
            raise UserError(
                f"{name}: unknown key {unknown[0]!r}. Was it written by another version?"
            )
        for field in dataclasses.fields(cls):
            no_default = field.default is field.default_factory is dataclasses.MISSING
            if no_default and field.name not in fields:
                raise UserError(f"{name}: the key {field.name!r} is missing.")
        return cls(
            **{
                key: decode_json(value, hints[key], f"{name}.{key}")
                for key, value in fields.items()
            }
        )


@functools.cache
def list_hints(cls: type) -> dict[str, Any]:
    """Return a record's field -> type. Evaluated once: a log has a million records."""
    return typing.get_type_hints(cls)


def field_names(cls: type) -> list[str]:
    """Return the names of a dataclass's fields, in order."""
    return [field.name for field in dataclasses.fields(cls)]


def encode_json(value: Any) -> Any:
    """Return the value with records as dicts, tuples as lists, and None for what is not finite.

    JSON has no NaN and no infinity; a reader in another language would refuse the whole file.
    """
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: encode_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode_json(item) for item in value]
    return value


def note_nonfinite(value: Any, where: str, faults: dict[str, str]) -> None:
    """Note "NaN" or "infinite" for each number of a plain value that is so, by its place."""
    if isinstance(value, float):
        reason = describe_nonfinite(value)
        if reason:
            faults[where] = reason
    elif isinstance(value, dict):
        for key, item in value.items():
            note_nonfinite(item, f"{where}.{key}", faults)
    elif isinstance(value, (list, tuple)) and not isinstance(value, str):
        for i, item in enumerate(value):
            note_nonfinite(item, f"{where}[{i}]", faults)


def describe_nonfinite(value: float) -> str:
    """Return why a value is no number to show, or "" if it is finite."""
    if math.isfinite(value):
        return ""
    return "NaN" if math.isnan(value) else "infinite"


def decode_json(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as its annotated type. Raise UserError if it is another."""
    if type(value) is hint:  # of most fields
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return decode_union(value, inner, where)
    if origin is typing.Literal and value in inner:
        return value
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        return decode_sequence(value, hint, where)
    if origin is dict and isinstance(value, dict):
        key_type, item_type = inner
        return {
            key_type(key): decode_json(item, item_type, f"{where}[{key!r}]")
            for key, item in value.items()
        }
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and value is None:
        return math.nan  # see encode_json
    is_bool_for_number = isinstance(value, bool) and hint is not bool
    if isinstance(hint, type) and isinstance(value, hint) and not is_bool_for_number:
        return value
    raise UserError(f"{where}: expected {hint}, got {value!r:.80}.")


def decode_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    """Return the value as the first of several types that it fits."""
    if value is None and type(None) in options:
        return None
    candidates = [option for option in options if option is not type(None)]
    for option in candidates[:-1]:
        try:
            return decode_json(value, option, where)
        except UserError:
            continue
    return decode_json(value, candidates[-1], where)


def decode_sequence(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON array as tuple[X, ...], tuple[X, Y] or list[X]."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list or inner[1:] == (Ellipsis,):
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        raise UserError(f"{where}: expected {len(inner)} items, got {len(value)}.")
    items = [
        decode_json(item, kind, f"{where}[{i}]")
        for i, (item, kind) in enumerate(zip(value, inner, strict=True))
    ]
    return items if typing.get_origin(hint) is list else tuple(items)


@dataclasses.dataclass(frozen=True)
class RopeScaling(Record):
    """How rotary angles are stretched beyond the context that a model was first trained on.

    Source: transformers' modeling_rope_utils (`linear`, `llama3`, `yarn`).
    """

    rope_type: str  # "linear": every frequency / factor; "llama3", "yarn": only the slow ones
    factor: float
    # llama3: wavelengths longer than original / low are divided by factor, those shorter than
    # original / high are kept, with a smooth band between
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    # yarn: pairs of channels that turn more often than beta_fast in the original context are kept,
    # those that turn less often than beta_slow are divided by factor
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # yarn: of cos and sin; None: 0.1 ln(factor) + 1

    def __post_init__(self):
        """Raise UserError for an unknown type."""
        if self.rope_type not in ("linear", "llama3", "yarn"):
            raise UserError(
                f"model.rope_scaling: expected rope_type 'linear', 'llama3' or 'yarn', "
                f"got {self.rope_type!r}."
            )

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(max(self.factor, 1.0)) + 1.0


@dataclasses.dataclass(frozen=True)
class LoraSpec(Record):
    """Low-rank adapters on a frozen base: W becomes W + alpha / rank x A B."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # matrices of each layer, such as q

    def __post_init__(self):
        """Raise UserError for numbers that make no adapter."""
        if self.rank < 1:
            raise UserError(f"lora.rank: expected at least 1, got {self.rank}.")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha: expected a number above 0, got {self.alpha}.")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(
                f"lora.targets: expected one name or more, each once, got {self.targets}."
            )

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class BaseShape(Record):
    """The shape at which rates and initial values were found (model/complete_p.py).

    d_ff and n_heads are what the proportions of the first model make of that width.
    """

    n_layers: int
    d_model: int
    d_ff: float
    n_heads: float

    def __str__(self) -> str:
        """Return it as the knob model.base_shape."""
        return f"{self.n_layers}x{self.d_model}"


class LayerKind(NamedTuple):
    """Settings of a layer that are no parameters. Layers of one kind share one program.

    Attributes:
        window: positions that a query sees, itself included; None: all.
        rope: which rotary embedding q and k get, one of model/rope.py's; None: none.
    """

    window: int | None = None
    rope: str | None = "full"


@dataclasses.dataclass(frozen=True)
class SpecialTokens(Record):
    """The special tokens of a tokenizer, under the names of ModelSpec."""

    bos_id: int | None  # begins a text, whether or not the tokenizer puts it there
    eos_ids: tuple[int, ...]  # each ends a text
    pad_id: int | None


# fields of ModelSpec that list layers
LAYER_LISTS = ("global_layers", "no_rope_layers")
CHOICES = {"activation": ("silu", "gelu_pytorch_tanh"), "norm_placement": ("pre", "post", "both")}
POSITIVE_NUMBERS = (
    "query_scale",
    "attention_softcap",
    "logit_softcap",
    "embed_multiplier",
    "residual_multiplier",
    "logit_divisor",
    "window_rope_theta",
)


ROUTER_NUMBERS = ("router_bias_rate", "routed_scale", "router_aux_loss_coef", "router_z_loss_coef")


@dataclasses.dataclass(frozen=True)
class ModelSpec(Record):
    """The architecture of a model.

    It is saved as spec.json and converted from and to Hugging Face's config.json.
    There is no registry of model names; a 48-layer up-scaled Llama is the normal case.

    Raises:
        UserError: the sizes cannot make a model.
    """

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab_size: int
    max_seq_len: int = 4096  # longest sequence that the model supports, in tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False  # the output head is the embedding, transposed
    family: str = "llama"  # Hugging Face's model_type for the export: a file of families/
    qkv_bias: bool = False  # Qwen2; Llama's attention_bias sets both
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm over each head's q and k before rotation
    qk_norm_whole: bool = False  # OLMo 2, OLMoE: that norm over all heads' channels together
    sliding_window: int | None = None  # positions that a query sees, itself included
    global_layers: tuple[int, ...] = ()  # layers that see all positions in spite of the window
    activation: str = "silu"  # of the MLP; Gemma: "gelu_pytorch_tanh"
    # where norms stand: "pre", before attention and MLP; "post", after them, on what they add to
    # the residual (OLMo 2); "both" (Gemma 2, GLM-4)
    norm_placement: str = "pre"
    norm_adds_one: bool = False  # Gemma: a norm multiplies by 1 + its scale
    query_scale: float | None = None  # of attention's scores; None: d_head ** -0.5
    attention_softcap: float | None = None  # scores s become c tanh(s / c)
    logit_softcap: float | None = None  # so do logits
    embed_multiplier: float = 1.0  # of the embedding, as it enters the residual
    residual_multiplier: float = 1.0  # Granite: of what attention and MLP add to it
    logit_divisor: float = 1.0  # Granite: logits are divided by it
    rotary_frac: float = 1.0  # share of a head's channels that is rotated, the first ones
    rope_interleaved: bool = False  # GLM-4: channel 2i rotates with 2i + 1, not i with i + H/2
    window_rope_theta: float | None = None  # of layers with a window, unscaled; None: as others
    no_rope_layers: tuple[int, ...] = ()  # layers whose q and k are not rotated
    n_experts: int = 0  # MLPs of d_ff channels that a layer chooses from; 0: one, dense
    n_experts_per_token: int = 0
    norm_topk_prob: bool = False  # the chosen experts' weights are divided by their sum
    router: str = "softmax"  # of the experts' scores; "sigmoid" has a bias that evens their loads
    router_bias_rate: float = 0.0  # what a step moves that bias by
    routed_scale: float = 1.0  # of the chosen experts' weights
    d_shared: int = 0  # channels of the expert that every token takes beside its own; 0: none
    has_shared_switch: bool = False  # Qwen2-MoE: its output is times a sigmoid of the token
    router_aux_loss_coef: float = 0.0  # of the load-balancing loss
    router_z_loss_coef: float = 0.0  # of the squared log of the router's normalizer
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)  # each ends a generated text
    pad_id: int | None = None
    # what generation_config.json says besides, as JSON: it travels from an import to its export
    generation: str = "{}"
    lora: LoraSpec | None = None  # adapters that a run trains on the frozen rest
    base_shape: BaseShape | None = None  # of CompleteP; None: standard parametrization

    def __post_init__(self):
        """Raise UserError for sizes that cannot make a model."""
        # embedding, norm and head alone (0 layers) are what a late jump in depth starts from
        self.check_size("n_layers", 0)
        for name in ("d_model", "d_ff", "n_heads", "n_kv_heads", "d_head"):
            self.check_size(name, 1)
        self.check_size("vocab_size", 1)
        self.check_size("max_seq_len", 1)
        for name in LAYER_LISTS:
            wrong = [layer for layer in getattr(self, name) if not 0 <= layer < self.n_layers]
            if wrong:
                raise UserError(
                    f"model.{name}: expected layers 0 to {self.n_layers - 1}, got {wrong[0]}."
                )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                expected = " or ".join(map(repr, choices))
                raise UserError(f"model.{name}: expected {expected}, got {getattr(self, name)!r}.")
        for name in POSITIVE_NUMBERS:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"model.{name}: expected a number above 0, got {value!r}.")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_kv_heads: {self.n_heads} query heads cannot share {self.n_kv_heads} "
                f"kv heads evenly. Use a divisor of {self.n_heads}."
            )
        if self.d_head % 2:
            raise UserError(
                f"model.d_head: expected an even number, got {self.d_head}: "
                "rotary embedding rotates pairs of channels."
            )
        if self.d_rotary % 2 or not 0 < self.d_rotary <= self.d_head:
            raise UserError(
                f"model.rotary_frac: expected a share that makes an even number of "
                f"{self.d_head} channels, got {self.rotary_frac}, which makes {self.d_rotary}."
            )
        if self.qk_norm_whole and not self.qk_norm:
            raise UserError("model.qk_norm_whole: expected qk_norm with it, got none. Set qk_norm.")
        self.check_experts()

    def check_experts(self) -> None:
        """Raise UserError for a mixture of experts that cannot be."""
        self.check_size("n_experts", 0)
        E, k = self.n_experts, self.n_experts_per_token
        if not isinstance(k, int) or not min(E, 1) <= k <= E:
            raise UserError(
                f"model.n_experts_per_token: expected {min(E, 1)} to n_experts = {E}, got {k!r}."
            )
        self.check_size("d_shared", 0)
        if self.router not in ("softmax", "sigmoid"):
            raise UserError(f"model.router: expected 'softmax' or 'sigmoid', got {self.router!r}.")
        for name in ROUTER_NUMBERS:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"model.{name}: expected a number of at least 0, got {value!r}.")
        if not E and self.d_shared:
            raise UserError(
                f"model.d_shared: expected 0 in a dense model, got {self.d_shared}. Set n_experts."
            )
        if E and self.mlp_bias:
            raise UserError(
                f"model.mlp_bias: expected false in a mixture of {E} experts, got true. "
                "Experts have no biases."
            )

    @property
    def d_rotary(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.d_head * self.rotary_frac)

    @property
    def feed_forward(self) -> str:
        """The module of jaxpt/model that is each layer's feed-forward part."""
        return "moe" if self.n_experts else "mlp"

    @property
    def active_d_ff(self) -> int:
        """Feed-forward channels of a layer that one token uses."""
        return self.d_ff * max(self.n_experts_per_token, 1) + self.d_shared

    @property
    def has_router_bias(self) -> bool:
        """Whether the choice of experts has a bias of its own."""
        return self.n_experts > 0 and self.router == "sigmoid"

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The settings of each layer."""
        kinds = []
        for layer in range(self.n_layers):
            window = None if layer in self.global_layers else self.sliding_window
            rope: str | None = "full"
            if window is not None and self.window_rope_theta is not None:
                rope = "window"
            if layer in self.no_rope_layers:
                rope = None
            kinds.append(LayerKind(window, rope))
        return tuple(kinds)

    def take_layers(self, sources: Sequence[int | None]) -> ModelSpec:
        """Return the spec of a model made of these layers; None: a new one, like the one before."""
        lists = {}
        for name in LAYER_LISTS:
            listed = []
            is_listed = False
            for layer, source in enumerate(sources):
                if source is not None:
                    is_listed = source in getattr(self, name)
                if is_listed:
                    listed.append(layer)
            lists[name] = tuple(listed)
        return self.replace(n_layers=len(sources), **lists)

    def check_size(self, name: str, minimum: int) -> None:
        """Raise UserError unless the size is an integer of at least `minimum`."""
        value = getattr(self, name)
        if not isinstance(value, int) or value < minimum:
            raise UserError(
                f"model.{name}: expected an integer of at least {minimum}, got {value!r}."
            )

    def replace(self, **changes: Any) -> ModelSpec:
        """Return the spec with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_tokens(self, tokens: SpecialTokens) -> ModelSpec:
        """Return the spec with a tokenizer's special tokens in place of its own."""
        return self.replace(bos_id=tokens.bos_id, eos_ids=tokens.eos_ids, pad_id=tokens.pad_id)


class TeacherSamples(NamedTuple):
    """Tokens that a teacher's distribution was sampled for, at every position.

    Attributes:
        ids: int32 [B, T, K], K draws of the next token, rising.
        mean_log_prob: float32 [B, T], mean log-probability of the draws, in nats.
    """

    ids: Any
    mean_log_prob: Any


class Batch(NamedTuple):
    """Packed sequences on their way into a model. Every field but the last has shape [B, T].

    Attributes:
        tokens: int32, token ids; padding is 0 and only at the end of a sequence.
        targets: int32, the next id within the same document; 0 where loss_mask is 0.
        segment_ids: int32, 1, 2, ... per document of the sequence; 0 is padding. A token attends
            only to its own segment.
        positions: int32, restart at 0 with each document.
        loss_mask: float32, weight of each target in the loss; 0 on a segment's last token and on
            padding.
        samples: of a teacher, where a run learns from samples.
    """

    tokens: Any
    targets: Any
    segment_ids: Any
    positions: Any
    loss_mask: Any
    samples: TeacherSamples | None = None


@dataclasses.dataclass(frozen=True)
class Manifest(Record):
    """The record of a finished stage. A stage is finished when its manifest.json exists.

    Attributes:
        stage: name of the stage.
        fingerprint: hash of stage, config, inputs, seed and outputs; equal for equal work on any
            machine at any time.
        config: the settings that the result depends on.
        inputs: name -> {"path", "fingerprint"}; following the paths gives a model's lineage.
        outputs: file name -> sha256, for every file of the stage.
        sizes: file name -> bytes, of the same files.
        counts: plain numbers and small tables for the report.
        tokenizer: the tokenizer's fingerprint, once there is one.
        seed: seed of the stage's randomness, if any.
        versions: package -> version.
        created: ISO 8601, UTC.
        seconds: wall time.
        checksum: fingerprint of all of the above, so that a damaged manifest is known; "" if it
            was not written by a stage.
    """

    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    outputs: dict[str, str]
    sizes: dict[str, int]
    counts: dict[str, Any]
    tokenizer: str | None
    seed: int | None
    versions: dict[str, str]
    created: str
    seconds: float
    checksum: str = ""

"""The nouns that cross rooms: ModelSpec, Batch, Manifest, UserError. Imports nothing of ours and no jax.

Axis letters, used in every file and every error:
    B batch row      T query position   S key position    D model width    N query heads
    K kv heads       H head width       F ff width        V vocabulary     L layers
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: one sentence saying what, where, got, wanted, what to do.

    Doors print it and exit with status 1 (`jaxpt.stage.door`); everything else that is raised is a bug of ours and keeps its traceback.
    """


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary angles are stretched beyond the context a model was first trained on.

    Source: transformers' modeling_rope_utils (`linear`, `llama3`).
    """

    kind: str  # "linear": every frequency / factor; "llama3": only the slow ones, with a smooth band between
    factor: float
    low_freq_factor: float = 1.0  # llama3: wavelengths longer than original / low are divided by factor
    high_freq_factor: float = 4.0  # llama3: wavelengths shorter than original / high are left alone
    original_max_positions: int = 8192  # llama3: positions of the first training

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise UserError(f"model.rope_scaling: kind {self.kind!r} is not known. Use 'linear' or 'llama3'.")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """The one truth about a model's shape: saved beside every checkpoint as spec.json, turned into and made from
    Hugging Face's config.json. There is no registry of model names; a 48-layer up-scaled Llama is the normal case.

    Raises UserError when the sizes cannot make a model.
    """

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab_size: int
    max_positions: int = 4096  # longest sequence the model claims to understand
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False  # the output head is the embedding, transposed
    family: str = "llama"  # Hugging Face's model_type for the export: llama, mistral, qwen2, qwen3
    qkv_bias: bool = False  # Qwen2; Llama's attention_bias sets both
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm over each head's q and k before rotation
    sliding_window: int | None = None  # Mistral: a query sees this many positions, itself included
    bos_id: int | None = 1
    eos_id: int | None = 2

    def __post_init__(self):
        for name in ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "d_head", "vocab_size", "max_positions"):
            value = getattr(self, name)
            least = 0 if name == "n_layers" else 1  # embedding, norm and head alone are what a late jump begins from (weights/growth.py, deepen)
            if not isinstance(value, int) or value < least:
                raise UserError(f"model.{name}: got {value!r}, wanted a whole number of at least {least}.")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_kv_heads: {self.n_heads} query heads cannot share {self.n_kv_heads} kv heads evenly. Use a divisor of {self.n_heads}."
            )
        if self.d_head % 2:
            raise UserError(f"model.d_head: got {self.d_head}, wanted an even number: rotary angles turn pairs of channels.")

    def replace(self, **changes) -> ModelSpec:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelSpec:
        scaling = fields.get("rope_scaling")
        return cls(**{**fields, "rope_scaling": RopeScaling(**scaling) if scaling else None})

    def save(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: pathlib.Path) -> ModelSpec:
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except FileNotFoundError:
            raise UserError(f"{path}: not there. A run directory or checkpoint carries a spec.json; is {path.parent} one?") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: not a model spec ({error}). Restore it from another checkpoint of the same run.") from None


class Batch(NamedTuple):
    """Rows on their way into a model; every field has shape [B, T].

    tokens     int32    ids; padding is 0 and stands only at the end of a row
    targets    int32    the next id within the same document; 0 where weight is 0
    segments   int32    1, 2, ... per document of the row; 0 is padding. A token attends only to its own segment
    positions  int32    restart at 0 with each document
    weights    float32  share of each target in the loss; 0 on a piece's last token and on padding
    """

    tokens: Any
    targets: Any
    segments: Any
    positions: Any
    weights: Any


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself; its presence as manifest.json is what makes the stage finished.

    fingerprint  of stage, config, inputs, seed and outputs; equal for equal work on any machine and at any time
    inputs       name -> {"path": where it lay, "fingerprint": what it was}: following the paths gives the lineage of a model
    counts       plain numbers and small tables that the report shows
    """

    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    outputs: dict[str, str]  # file name -> sha256, for every file of the stage
    counts: dict[str, Any]
    tokenizer: str | None  # the tokenizer's fingerprint, once there is one
    seed: int | None
    versions: dict[str, str]
    created: str  # ISO 8601, UTC
    seconds: float

    def save(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, directory: pathlib.Path) -> Manifest:
        """The manifest of a finished stage. Raises UserError where there is none or it cannot be read."""
        path = pathlib.Path(directory) / "manifest.json"
        try:
            return cls.parse(path.read_bytes(), path)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{directory}: no manifest.json there, so no stage has finished in it. Run the stage that writes it first.") from None

    @classmethod
    def parse(cls, text: bytes, path: pathlib.Path | str) -> Manifest:
        """The manifest that a file's bytes say. Raises UserError where they do not."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a manifest ({error}). Delete its directory and run its stage again.") from None

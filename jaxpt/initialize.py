"""Make the initial model: the first source that applies, then growth.

1. this run's own newest checkpoint, with its optimizer (train/session.py: a resumed run never
   comes here)
2. a checkpoint of another run, parameters only
3. a Hugging Face directory
4. random
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from jaxpt.config import InitializeConfig, LoraConfig, ModelConfig
from jaxpt.data import tokenizer
from jaxpt.growth import vocabulary
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import Growth, Parent, ReadBatches, format_layer_map
from jaxpt.growth.parse import parse_operator, plan_growth
from jaxpt.model import transformer
from jaxpt.model.lora import list_targets
from jaxpt.spec import BaseShape, LoraSpec, ModelSpec, SpecialTokens, UserError
from jaxpt.weights import safetensors_file
from jaxpt.weights.load import LoadedModel, load_model

if TYPE_CHECKING:
    from jaxpt.data.loader import PackedDataset

log = logging.getLogger(__name__)

# knobs of section model that are fields of ModelSpec
SIZE_FIELDS = ["n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "d_head", "max_seq_len"]
KNOB_FIELDS = (*SIZE_FIELDS, "rope_theta", "tie_embeddings", "vocab_size")


class InitResult(NamedTuple):
    """An initialized model, its parent (before growth, if it grew), and the growths between."""

    model: LoadedModel
    parent: LoadedModel | None
    growths: tuple[Growth, ...]


def init_model(
    section: InitializeConfig,
    architecture: ModelConfig,
    mesh: jax.sharding.Mesh,
    dataset: PackedDataset | None = None,
    sequences: ReadBatches | None = None,
    check_parent: Callable[[LoadedModel], None] | None = None,
) -> InitResult:
    """Initialize by sources 2 to 4 of config.initialize, then apply config.initialize.grow.

    Args:
        section: config.initialize.
        architecture: config.model, for a random model.
        mesh: to place parameters on.
        dataset: whose tokenizer a random model takes its special tokens from, and its vocabulary
            where architecture.vocab_size is 0.
        sequences: reads training batches, for operators that measure.
        check_parent: called with weights from elsewhere before they grow; raises if they are wrong.
    """
    for text in section.grow:
        parse_operator(text)  # refuse a misspelt operator before weights are read
    if section.source == "random":
        if dataset is None:
            spec = make_random_spec(architecture, None)
        else:
            spec = make_random_spec(architecture, dataset.vocab_size, dataset.special_tokens)
        dtype = safetensors_file.dtype_of_name(section.param_dtype)
        params = transformer.init_params(spec, section.seed, mesh, dtype)
        model = LoadedModel(spec, params, None, None, None, None, {})
        log.info(f"initialized from scratch (seed {section.seed})")
    else:
        model = load_model(section.source, mesh, section.param_dtype, section.base)
        model = model._replace(spec=set_base_shape(model.spec, architecture.base_shape))
        trained = f", trained for {model.step:,} steps" if model.step else ""
        log.info(f"initialized from {section.source}{trained}")
    log.info(describe_model(model.spec))
    parent, growths = model, []
    if check_parent and model.source and section.grow:
        check_parent(model)
    for text in section.grow:
        model, applied = grow_model(model, text, mesh, sequences)
        growths.append(applied)
    return InitResult(model, parent if growths else None, tuple(growths))


def grow_model(
    model: LoadedModel, text: str, mesh: jax.sharding.Mesh, sequences: ReadBatches | None
) -> tuple[LoadedModel, Growth]:
    """Return the model grown by one operator, on the same mesh, and the growth."""
    parent = Parent(model.spec, model.params, sequences, model.tokenizer_dir)
    applied = plan_growth(text, parent)
    params = grow_params(applied, model.params, mesh)
    model = model._replace(spec=applied.child, params=params)
    if applied.token_mapping:
        directory = applied.token_mapping.tokenizer_dir
        fingerprint = tokenizer.load_tokenizer(directory).fingerprint
        model = model._replace(tokenizer_dir=directory, tokenizer=fingerprint)
    log.info(f"grown by {text}: {describe_model(applied.child)}")
    if "layers" in applied.sources:
        log.info(f"from layers {format_layer_map(applied.layer_map)}")
    sizes = [transformer.count_params(spec) for spec in (applied.spec, applied.child)]
    if applied.is_identity:
        log.warning(f"{text}: nothing grew: the child has the parent's layers and sizes")
    elif sizes[1] < sizes[0]:
        log.warning(f"{text}: shrinks the model from {sizes[0]:,} to {sizes[1]:,} parameters")
        if 3 * sizes[1] < 2 * sizes[0]:
            log.warning(
                "that is more than a third at once, which recovers badly: go in steps, each "
                "distilled from the first parent (docs/distill.md)"
            )
    return model, applied


def make_random_spec(
    section: ModelConfig, vocab_size: int | None, special_tokens: SpecialTokens | None = None
) -> ModelSpec:
    """Return config.model as a ModelSpec, with the tokenizer's vocabulary and special tokens."""
    n_tokens = section.vocab_size
    if not n_tokens and vocab_size:
        n_tokens = vocabulary.pad_vocab_size(vocab_size)
    if not n_tokens:
        raise UserError(
            "model.vocab_size: is 0 (the tokenizer's), but there is no tokenizer. Run jaxpt pack "
            "first, or set it."
        )
    fields: dict[str, Any] = {name: getattr(section, name) for name in KNOB_FIELDS}
    fields["vocab_size"] = n_tokens
    if special_tokens:
        fields |= special_tokens.to_json()
    further = dict(section.fields)
    for name in further:
        if name in KNOB_FIELDS:
            raise UserError(f"model.fields: {name} is a knob. Set model.{name}.")
    spec = ModelSpec.from_json({**fields, **further}, "model.fields")
    return set_base_shape(spec, section.base_shape)


def set_base_shape(spec: ModelSpec, text: str) -> ModelSpec:
    """Return a model with the base shape of config.model; "" leaves what it has.

    Raises:
        UserError: that is no shape, the model was trained with another one, or rates cannot follow.
    """
    if not text:
        return spec
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(
            f"model.base_shape: expected LAYERSxWIDTH, such as 4x256, or '', got {text!r}."
        )
    if spec.base_shape:
        if str(spec.base_shape) != text:
            raise UserError(
                f"model.base_shape: the model was trained with {spec.base_shape}, got {text}. "
                "Leave it out, or set it to that."
            )
        return spec
    if math.isclose(spec.embed_multiplier, spec.d_model**0.5, rel_tol=0.01) and spec.d_model > 1:
        raise UserError(
            f"model.base_shape: {spec.family} multiplies its embedding by the root of the width, "
            "so rates found at one width are not those of another. Leave base_shape out."
        )
    n_layers, d_model = map(int, match.groups())
    narrower = d_model / spec.d_model
    base = BaseShape(n_layers, d_model, narrower * spec.d_ff, narrower * spec.n_heads)
    return spec.replace(base_shape=base)


def make_lora_spec(section: LoraConfig, spec: ModelSpec) -> LoraSpec | None:
    """Return config.lora as adapters of a model; None: all weights train."""
    if not section.rank:
        return None
    targets = section.targets or tuple(list_targets(transformer.layer_params(spec)))
    return LoraSpec(section.rank, section.alpha, targets)


def describe_model(spec: ModelSpec) -> str:
    """Return a line with parameter count and sizes."""
    tied = ", tied" if spec.tie_embeddings else ""
    base = f", rates of {spec.base_shape}" if spec.base_shape else ""
    return (
        f"{transformer.describe_params(spec)}, {spec.n_layers} layers, D {spec.d_model}, "
        f"F {spec.d_ff}, {spec.n_heads}/{spec.n_kv_heads} heads, V {spec.vocab_size:,}{tied}{base}"
    )

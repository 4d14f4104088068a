"""Make the initial model: the first source that applies, then growth.

1. this run's own newest checkpoint, with its optimizer (train/session.py: a resumed run never
   comes here)
2. a checkpoint of another run, parameters only
3. a Hugging Face directory
4. random
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from jaxpt.config import InitializeConfig, ModelConfig
from jaxpt.data import tokenizer
from jaxpt.growth import vocabulary
from jaxpt.growth.apply import grow_params
from jaxpt.growth.growth import Growth, Parent, format_layer_map
from jaxpt.growth.parse import parse_operator, plan_growth
from jaxpt.model import transformer
from jaxpt.spec import Batch, Manifest, ModelSpec, UserError
from jaxpt.weights import checkpoint, hub, huggingface, safetensors_file

log = logging.getLogger(__name__)

# beside an export's config.json: what a later start needs and config.json has no key for
IMPORT_RECORD = "jaxpt.json"
# knobs of section model that are fields of ModelSpec
RANDOM_SPEC_FIELDS = "n_layers d_model d_ff n_heads n_kv_heads d_head max_seq_len"
RANDOM_SPEC_FIELDS += " norm_eps rope_theta tie_embeddings"

ReadBatches = Callable[[], Iterable[Batch]]


class LoadedModel(NamedTuple):
    """A model in memory, and where it came from.

    Attributes:
        spec: the architecture.
        params: nested dict of jax.Arrays.
        tokenizer_dir: of its tokenizer, if it has one.
        source: directory it was read from; None: random.
        step: of the run that trained it, where known.
        tokenizer: fingerprint, where known.
        record: a checkpoint's counts or an export's jaxpt.json; empty where nothing is known.
    """

    spec: ModelSpec
    params: dict[str, Any]
    tokenizer_dir: pathlib.Path | None
    source: pathlib.Path | None
    step: int | None
    tokenizer: str | None
    record: dict[str, Any]


class InitResult(NamedTuple):
    """An initialized model, its parent (before growth, if it grew), and the growths between."""

    model: LoadedModel
    parent: LoadedModel | None
    growths: tuple[Growth, ...]


def load_model(
    source: pathlib.Path | str, mesh: jax.sharding.Mesh, dtype: str = "float32"
) -> LoadedModel:
    """Load the parameters of a run, a checkpoint, a Hugging Face directory or hf:NAME."""
    source = hub.download_model(source)
    if not source.is_dir():
        raise UserError(
            f"{source}: no such directory. Expected a run, a checkpoint or a Hugging Face model "
            "directory."
        )
    step_dir = checkpoint.find_checkpoint(source)
    if step_dir is None:
        return load_hf_source(source, mesh, dtype)
    spec = ModelSpec.load(step_dir / "spec.json")
    np_dtype = safetensors_file.dtype_of_name(dtype)
    abstract = transformer.make_abstract_params(spec, mesh, np_dtype)
    params = checkpoint.restore_tree(step_dir, checkpoint.PARAMS, abstract)
    manifest = Manifest.load(step_dir)
    tokenizer_dir = step_dir.parent.parent / "tokenizer"
    return LoadedModel(
        spec,
        params,
        tokenizer_dir if tokenizer_dir.is_dir() else None,
        source,
        manifest.counts["step"],
        manifest.tokenizer,
        manifest.counts,
    )


def load_hf_source(source: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str) -> LoadedModel:
    """Load a Hugging Face directory. Raise UserError if the directory is none."""
    is_run = (source / "checkpoints").is_dir() or (source / "spec.json").is_file()
    if is_run or not (source / "config.json").is_file():
        raise UserError(
            f"{source}: has no finished checkpoint and no Hugging Face model. Train it first, or "
            "check the path."
        )
    spec, params = huggingface.load_hf_model(source, mesh, dtype)
    record: dict[str, Any] = {}
    if (source / IMPORT_RECORD).is_file():
        record = safetensors_file.read_hf_json(source / IMPORT_RECORD)
    tokenizer_dir = source if (source / "tokenizer.json").is_file() else None
    step, fingerprint = record.get("step"), record.get("tokenizer")
    return LoadedModel(spec, params, tokenizer_dir, source, step, fingerprint, record)


def resolve_source(source: pathlib.Path | str) -> pathlib.Path:
    """Return what a manifest names as the input of a start from `source`.

    That is a finished stage's directory itself, and the newest checkpoint of an unfinished run.
    """
    source = hub.download_model(source)
    if (source / "manifest.json").is_file() or not source.is_dir():
        return source
    return checkpoint.find_checkpoint(source) or source


def init_model(
    section: InitializeConfig,
    architecture: ModelConfig,
    mesh: jax.sharding.Mesh,
    vocab_size: int | None,
    sequences: ReadBatches | None = None,
) -> InitResult:
    """Initialize by sources 2 to 4 of config.initialize, then apply config.initialize.grow.

    Args:
        section: config.initialize.
        architecture: config.model, for a random model.
        mesh: to place parameters on.
        vocab_size: the tokenizer's, for a random model whose architecture.vocab_size is 0.
        sequences: reads training batches, for operators that measure.
    """
    for text in section.grow:
        parse_operator(text)  # refuse a misspelt operator before weights are read
    if section.source == "random":
        spec = make_random_spec(architecture, vocab_size)
        dtype = safetensors_file.dtype_of_name(section.param_dtype)
        params = transformer.init_params(spec, section.seed, mesh, dtype)
        model = LoadedModel(spec, params, None, None, None, None, {})
        log.info(f"initialized from scratch (seed {section.seed})")
    else:
        model = load_model(section.source, mesh, section.param_dtype)
        trained = f", trained for {model.step:,} steps" if model.step else ""
        log.info(f"initialized from {section.source}{trained}")
    log.info(describe_model(model.spec))
    parent, growths = model, []
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
    return model, applied


def make_random_spec(section: ModelConfig, vocab_size: int | None) -> ModelSpec:
    """Return config.model as a ModelSpec."""
    n_tokens = section.vocab_size
    if not n_tokens and vocab_size:
        n_tokens = vocabulary.pad_vocab_size(vocab_size)
    if not n_tokens:
        raise UserError(
            "model.vocab_size: is 0 (the tokenizer's), but there is no tokenizer. Run jaxpt pack "
            "first, or set it."
        )
    fields = {name: getattr(section, name) for name in RANDOM_SPEC_FIELDS.split()}
    return ModelSpec(vocab_size=n_tokens, **fields)


def describe_model(spec: ModelSpec) -> str:
    """Return a line with parameter count and sizes."""
    tied = ", tied" if spec.tie_embeddings else ""
    return (
        f"{transformer.count_params(spec):,} parameters, {spec.n_layers} layers, D {spec.d_model}, "
        f"F {spec.d_ff}, {spec.n_heads}/{spec.n_kv_heads} heads, V {spec.vocab_size:,}{tied}"
    )

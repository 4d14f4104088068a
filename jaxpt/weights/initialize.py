"""Where first weights come from: numbered births, the first that applies wins; then growth.

1. this run's own newest checkpoint, with its optimizer   (train/loop.py: a resumed run never comes here)
2. a checkpoint of another run, weights only
3. a Hugging Face directory
4. random
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxpt.config import Config
from jaxpt.data import tokenizer
from jaxpt.model import llama
from jaxpt.spec import Batch, Manifest, ModelSpec, UserError
from jaxpt.weights import checkpoint, growth, hub, huggingface, vocabulary

log = logging.getLogger(__name__)

IMPORT_RECORD = "jaxpt.json"  # beside an export's config.json: what a later start wants to know and config.json has no place for


class LoadedModel(NamedTuple):
    """A model in memory, and where it came from."""

    spec: ModelSpec
    params: dict[str, Any]
    tokenizer_dir: pathlib.Path | None
    source: pathlib.Path | None  # None: random
    step: int | None  # of the run that trained it, where known
    tokenizer: str | None  # fingerprint, where known
    record: dict[
        str, Any
    ]  # what its makers wrote of it: a checkpoint's counts or an export's jaxpt.json; empty where nothing is known


class InitResult(NamedTuple):
    """A newborn model, its parent when it was grown, and the growths between them."""

    model: LoadedModel
    parent: LoadedModel | None  # the weights before growth; None when nothing grew
    growths: tuple[growth.Growth, ...]


def load_model(source: pathlib.Path | str, mesh, dtype: str = "float32") -> LoadedModel:
    """The weights of a run directory (its newest whole checkpoint), a checkpoint step directory, a Hugging Face directory or hf:NAME of its hub."""
    source = hub.download_model(source)
    if not source.is_dir():
        raise UserError(
            f"{source}: no such directory. Wanted a run, a checkpoint or a Hugging Face model directory."
        )
    step_dir = checkpoint.find_checkpoint(source)
    if step_dir is None:
        is_run = (source / "checkpoints").is_dir() or (source / "spec.json").is_file()
        if is_run or not (source / "config.json").is_file():
            raise UserError(
                f"{source}: holds no finished checkpoint and no Hugging Face model. Train it first, or check the path."
            )
        spec, params = huggingface.load_hf_model(source, mesh, dtype)
        has_tokenizer = (source / "tokenizer.json").is_file()
        record = (
            huggingface.read_hf_json(source / IMPORT_RECORD)
            if (source / IMPORT_RECORD).is_file()
            else {}
        )
        return LoadedModel(
            spec,
            params,
            source if has_tokenizer else None,
            source,
            record.get("step"),
            record.get("tokenizer"),
            record,
        )
    spec = ModelSpec.load(step_dir / "spec.json")
    params = checkpoint.restore_tree(
        step_dir, "params", llama.make_abstract_params(spec, mesh, huggingface.dtype_of_name(dtype))
    )
    manifest = Manifest.load(step_dir)
    tokenizer_dir = step_dir.parent.parent / "tokenizer"
    has_tokenizer = tokenizer_dir.is_dir()
    return LoadedModel(
        spec,
        params,
        tokenizer_dir if has_tokenizer else None,
        source,
        manifest.counts["step"],
        manifest.tokenizer,
        manifest.counts,
    )


def resolve_source(source: pathlib.Path | str) -> pathlib.Path:
    """What a manifest names as the input of a start from `source`: a finished stage's directory itself, of an unfinished run its newest checkpoint."""
    source = hub.download_model(source)
    return (
        source
        if (source / "manifest.json").is_file() or not source.is_dir()
        else checkpoint.find_checkpoint(source) or source
    )


def init_model(
    settings: Config,
    mesh,
    vocab_size: int | None,
    sequences: Callable[[], Iterable[Batch]] | None = None,
) -> InitResult:
    """Births 2 to 4 by config.initialize, then config.initialize.grow, each said on the terminal.

    vocab_size  the tokenizer's, for a random model whose config.model.vocab_size is 0
    rows      training rows, for operators that measure
    """
    asked = settings.initialize
    for text in asked.grow:
        growth.parse_operator(text)  # a misspelt operator is refused before weights are read
    if asked.source == "random":
        spec = make_random_spec(settings, vocab_size)
        model = LoadedModel(
            spec,
            llama.init_params(spec, asked.seed, mesh, huggingface.dtype_of_name(asked.param_dtype)),
            None,
            None,
            None,
            None,
            {},
        )
        log.info(f"born at random (seed {asked.seed}): {describe_model(spec)}")
    else:
        model = load_model(asked.source, mesh, asked.param_dtype)
        trained = f", trained for {model.step:,} steps" if model.step else ""
        log.info(f"born from {asked.source}{trained}: {describe_model(model.spec)}")
    parent, growths = model, []
    for text in asked.grow:
        model, done = grow_model(model, text, mesh, sequences)
        growths.append(done)
    return InitResult(model, parent if growths else None, tuple(growths))


def grow_model(
    model: LoadedModel, text: str, mesh, rows: Callable[[], Iterable[Batch]] | None
) -> tuple[LoadedModel, growth.Growth]:
    """The child of a model by one operator, on the same mesh."""
    done = growth.plan_growth(
        text, growth.Parent(model.spec, model.params, rows, model.tokenizer_dir)
    )
    child = done.child
    model = model._replace(spec=child, params=growth.grow_params(done, model.params, mesh))
    if done.token_mapping:
        directory = done.token_mapping.tokenizer_dir
        model = model._replace(
            tokenizer_dir=directory, tokenizer=tokenizer.load_tokenizer(directory).fingerprint
        )
    origins = (
        f"; from layers {growth.format_layer_map(done.layer_map)}"
        if "layers" in done.sources
        else ""
    )
    log.info(f"grown by {text}: {describe_model(child)}{origins}")
    return model, done


def make_random_spec(settings: Config, vocab_size: int | None) -> ModelSpec:
    """config.model as a ModelSpec."""
    shape = settings.model
    vocab_size = shape.vocab_size or (vocabulary.pad_vocab_size(vocab_size) if vocab_size else 0)
    if not vocab_size:
        raise UserError(
            "model.vocab_size: is 0 (take the tokenizer's), but there is no tokenizer. Run pack.py first, or set it."
        )
    fields = {
        name: getattr(shape, name)
        for name in (
            "n_layers",
            "d_model",
            "d_ff",
            "n_heads",
            "n_kv_heads",
            "d_head",
            "max_seq_len",
            "norm_eps",
            "rope_theta",
            "tie_embeddings",
        )
    }
    return ModelSpec(vocab_size=vocab_size, **fields)


def describe_model(spec: ModelSpec) -> str:
    return (
        f"{llama.count_params(spec):,} parameters, {spec.n_layers} layers, width {spec.d_model}, feed-forward {spec.d_ff}, "
        f"{spec.n_heads} heads over {spec.n_kv_heads}, vocabulary {spec.vocab_size:,}{', tied' if spec.tie_embeddings else ''}"
    )

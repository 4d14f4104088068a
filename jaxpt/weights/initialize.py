"""Where first weights come from: numbered births, the first that applies wins; then growth.

1. this run's own newest checkpoint, with its optimizer   (train/loop.py: a resumed run never comes here)
2. a checkpoint of another run, weights only
3. a Hugging Face directory
4. random
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxpt.config import Config
from jaxpt.data import tokenizer
from jaxpt.model import llama
from jaxpt.spec import Batch, Manifest, ModelSpec, UserError
from jaxpt.stage import say
from jaxpt.weights import checkpoint, growth, hub, huggingface, vocabulary

RECORD = "jaxpt.json"  # beside an export's config.json: what a later start wants to know and config.json has no place for


class Loaded(NamedTuple):
    """A model in memory, and where it came from."""

    spec: ModelSpec
    params: dict[str, Any]
    tokenizer_dir: pathlib.Path | None
    source: pathlib.Path | None  # None: random
    step: int | None  # of the run that trained it, where known
    tokenizer: str | None  # fingerprint, where known
    record: dict[str, Any]  # what its makers wrote of it: a checkpoint's counts or an export's jaxpt.json; empty where nothing is known


class Birth(NamedTuple):
    """A newborn model, its parent when it was grown, and the growths between them."""

    model: Loaded
    parent: Loaded | None  # the weights before growth; None when nothing grew
    growths: tuple[growth.Growth, ...]


def load(source: pathlib.Path | str, mesh, dtype: str = "float32") -> Loaded:
    """The weights of a run directory (its newest whole checkpoint), a checkpoint step directory, a Hugging Face directory or hf:NAME of its hub."""
    source = hub.local(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such directory. Wanted a run, a checkpoint or a Hugging Face model directory.")
    step_dir = checkpoint.find(source)
    if step_dir is None:
        is_run = (source / "checkpoints").is_dir() or (source / "spec.json").is_file()
        if is_run or not (source / "config.json").is_file():
            raise UserError(f"{source}: holds no finished checkpoint and no Hugging Face model. Train it first, or check the path.")
        spec, params = huggingface.load(source, mesh, dtype)
        has_tokenizer = (source / "tokenizer.json").is_file()
        record = huggingface.read_json(source / RECORD) if (source / RECORD).is_file() else {}
        return Loaded(spec, params, source if has_tokenizer else None, source, record.get("step"), record.get("tokenizer"), record)
    spec = ModelSpec.load(step_dir / "spec.json")
    params = checkpoint.restore(step_dir, "params", llama.abstract_params(spec, mesh, huggingface.jnp_dtype(dtype)))
    manifest = Manifest.load(step_dir)
    tokenizer_dir = step_dir.parent.parent / "tokenizer"
    has_tokenizer = tokenizer_dir.is_dir()
    return Loaded(spec, params, tokenizer_dir if has_tokenizer else None, source, manifest.counts["step"], manifest.tokenizer, manifest.counts)


def source_of(source: pathlib.Path | str) -> pathlib.Path:
    """What a manifest names as the input of a start from `source`: a finished stage's directory itself, of an unfinished run its newest checkpoint."""
    source = hub.local(source)
    return source if (source / "manifest.json").is_file() or not source.is_dir() else checkpoint.find(source) or source


def birth(settings: Config, mesh, n_pieces: int | None, rows: Callable[[], Iterable[Batch]] | None = None) -> Birth:
    """Births 2 to 4 by config.initialize, then config.initialize.grow, each said on the terminal.

    n_pieces  the tokenizer's, for a random model whose config.model.vocab_size is 0
    rows      training rows, for operators that measure
    """
    asked = settings.initialize
    for text in asked.grow:
        growth.parse(text)  # a misspelt operator is refused before weights are read
    if asked.source == "random":
        spec = random_spec(settings, n_pieces)
        model = Loaded(spec, llama.init(spec, asked.seed, mesh, huggingface.jnp_dtype(asked.dtype)), None, None, None, None, {})
        say(f"born at random (seed {asked.seed}): {describe(spec)}")
    else:
        model = load(asked.source, mesh, asked.dtype)
        trained = f", trained for {model.step:,} steps" if model.step else ""
        say(f"born from {asked.source}{trained}: {describe(model.spec)}")
    parent, growths = model, []
    for text in asked.grow:
        model, done = grow(model, text, mesh, rows)
        growths.append(done)
    return Birth(model, parent if growths else None, tuple(growths))


def grow(model: Loaded, text: str, mesh, rows: Callable[[], Iterable[Batch]] | None) -> tuple[Loaded, growth.Growth]:
    """The child of a model by one operator, on the same mesh."""
    done = growth.plan(text, growth.Parent(model.spec, model.params, rows, model.tokenizer_dir))
    child = done.child
    model = model._replace(spec=child, params=growth.weights(done, model.params, mesh))
    if done.words:
        directory = done.words.tokenizer_dir
        model = model._replace(tokenizer_dir=directory, tokenizer=tokenizer.load(directory).fingerprint)
    origins = f"; from layers {growth.tell(done.layer_map)}" if "layers" in done.sources else ""
    say(f"grown by {text}: {describe(child)}{origins}")
    return model, done


def random_spec(settings: Config, n_pieces: int | None) -> ModelSpec:
    """config.model as a ModelSpec."""
    shape = settings.model
    vocab_size = shape.vocab_size or (vocabulary.round_up(n_pieces) if n_pieces else 0)
    if not vocab_size:
        raise UserError("model.vocab_size: is 0 (take the tokenizer's), but there is no tokenizer. Run pack.py first, or set it.")
    fields = {
        name: getattr(shape, name)
        for name in ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "d_head", "max_positions", "norm_eps", "rope_theta", "tied")
    }
    return ModelSpec(vocab_size=vocab_size, **fields)


def describe(spec: ModelSpec) -> str:
    return (
        f"{llama.count(spec):,} parameters, {spec.n_layers} layers, width {spec.d_model}, feed-forward {spec.d_ff}, "
        f"{spec.n_heads} heads over {spec.n_kv_heads}, vocabulary {spec.vocab_size:,}{', tied' if spec.tied else ''}"
    )

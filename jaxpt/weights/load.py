"""Load a model's parameters from a run, a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax

from jaxpt import io, stage
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec, UserError
from jaxpt.stage import read_manifest, read_spec
from jaxpt.weights import checkpoint, hub, huggingface, safetensors_file

# beside an export's config.json: what a later start needs and config.json has no key for
IMPORT_RECORD = "jaxpt.json"


class LoadedModel(NamedTuple):
    """A model in memory, and where it came from.

    Attributes:
        spec: the architecture.
        params: nested dict of jax.Arrays.
        tokenizer_dir: of its tokenizer, on a disk, if it has one.
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


def load_model(
    source: io.Path | str, mesh: jax.sharding.Mesh, dtype: str = "float32"
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
    spec = read_spec(step_dir / "spec.json")
    np_dtype = safetensors_file.dtype_of_name(dtype)
    abstract = transformer.make_abstract_params(spec, mesh, np_dtype)
    params = checkpoint.restore_tree(step_dir, checkpoint.PARAMS, abstract)
    manifest = read_manifest(step_dir)
    tokenizer_dir = None
    if io.exists(step_dir.parent.parent / "tokenizer"):
        tokenizer_dir = io.local_copy(step_dir.parent.parent / "tokenizer")
    return LoadedModel(
        spec,
        params,
        tokenizer_dir,
        source,
        manifest.counts["step"],
        manifest.tokenizer,
        manifest.counts,
    )


def load_hf_source(source: pathlib.Path, mesh: jax.sharding.Mesh, dtype: str) -> LoadedModel:
    """Load a Hugging Face directory. Raise UserError if the directory is none."""
    huggingface.check_no_adapter(source)
    is_run = (source / "checkpoints").is_dir() or (source / "spec.json").is_file()
    is_hf = huggingface.is_hf_directory(source)
    if not is_hf and (is_run or not (source / "config.json").is_file()):
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


def resolve_source(source: io.Path | str) -> pathlib.Path:
    """Return what a manifest names as the input of a start from `source`.

    That is a finished stage's directory itself, and the newest checkpoint of an unfinished run.
    """
    source = hub.download_model(source)
    if (source / "manifest.json").is_file() or not source.is_dir():
        return source
    found = checkpoint.find_checkpoint(source)
    return stage.local_path(found) if found else source

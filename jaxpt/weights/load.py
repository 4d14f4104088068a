"""Load a model's parameters from a run, a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any, NamedTuple

import jax

from jaxpt import io, stage
from jaxpt.data import tokenizer
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec, Record, UserError
from jaxpt.stage import read_manifest, read_spec
from jaxpt.weights import checkpoint, hub, huggingface, peft, safetensors_file

log = logging.getLogger(__name__)

# beside an export's config.json: what a later start needs and config.json has no key for
IMPORT_RECORD = "jaxpt.json"
# files whose checksums are compared with those of the export that wrote them; not the model card
WRITTEN_FILES = (".safetensors", ".index.json", "config.json", IMPORT_RECORD)


@dataclasses.dataclass(frozen=True)
class ExportRecord(Record):
    """What IMPORT_RECORD says, where known.

    Attributes:
        step: of the run.
        optimizer: its name.
        lr: learning rate of the last step.
        heldout: losses, a record of train.
        tokenizer: fingerprint.
    """

    step: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    heldout: dict[str, Any] | None = None
    tokenizer: str | None = None


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
    source: io.Path | None
    step: int | None
    tokenizer: str | None
    record: dict[str, Any]


def load_model(
    source: io.Path | str,
    mesh: jax.sharding.Mesh,
    dtype: str = "float32",
    base: str = "",
    *,
    merge: bool = True,
) -> LoadedModel:
    """Load the parameters of a run, a checkpoint, a Hugging Face directory or hf:NAME.

    Adapters are merged into their base, in float32: those that a run trained, and PEFT's.

    Args:
        source: what to load.
        mesh: to place parameters on.
        dtype: of the parameters.
        base: of a PEFT adapter, see peft.find_base.
        merge: whether to merge a run's adapters; else they stay beside the base.
    """
    source = hub.download_model(source)
    if io.size(source) is not None or not io.exists(source):
        raise UserError(
            f"{source}: no such directory. Expected a run, a checkpoint or a Hugging Face model "
            "directory."
        )
    step_dir = checkpoint.find_checkpoint(source)
    if step_dir is None:
        return load_hf_source(source, mesh, dtype, base)
    spec = read_spec(step_dir / "spec.json")
    np_dtype = safetensors_file.dtype_of_name(dtype)
    abstract = transformer.make_abstract_params(spec, mesh, np_dtype)
    params = checkpoint.restore_tree(step_dir, checkpoint.PARAMS, abstract)
    if merge:
        spec, params = transformer.merge_adapters(spec, params)
    manifest = read_manifest(step_dir)
    tokenizer_dir = find_tokenizer_dir(step_dir)
    return LoadedModel(
        spec,
        params,
        io.local_copy(tokenizer_dir) if tokenizer_dir else None,
        source,
        manifest.counts["step"],
        manifest.tokenizer,
        manifest.counts,
    )


def open_tokenizer(model: LoadedModel) -> tokenizer.Tokenizer:
    """Open a model's tokenizer, and log where the two disagree about special tokens.

    Raises:
        UserError: it is not the one the model was trained with, or gives ids that the model has
            no embedding rows for.
    """
    directory, spec = model.tokenizer_dir, model.spec
    assert directory is not None
    encoder = tokenizer.load_tokenizer(directory, model.tokenizer)
    if encoder.n_text_ids > spec.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer gives ids up to {encoder.n_text_ids - 1:,}, but the model "
            f"knows ids 0 to {spec.vocab_size - 1:,}. Copy there the one it was trained with."
        )
    theirs = encoder.special_tokens
    if encoder.eos_id not in spec.eos_ids:
        text = encoder.backend.id_to_token(encoder.eos_id)
        log.warning(
            f"{directory}: documents end by {text} ({encoder.eos_id}), but the model's config ends "
            f"texts by {list(spec.eos_ids)}. Generation stops at the latter, as in transformers."
        )
    for name in ("bos_id", "pad_id"):
        ours, other = getattr(spec, name), getattr(theirs, name)
        if None not in (ours, other) and ours != other:
            log.warning(
                f"{directory}: {name} is {other} in the tokenizer, {ours} in the model's config. "
                "Texts are read with the tokenizer's; the model keeps its own for its export."
            )
    return encoder


def find_tokenizer_dir(step_dir: io.Path) -> io.Path | None:
    """Return the tokenizer directory of a checkpoint: its run's, or one copied along with it.

    A link to a checkpoint belongs to the run that it points into.
    """
    step_dir = io.resolve(step_dir)
    places = [above / "tokenizer" for above in (step_dir.parent.parent, step_dir, step_dir.parent)]
    for place in (*places, step_dir):
        if io.size(place / "tokenizer.json") is not None:
            return place
    return None


def load_hf_source(
    source: io.Path, mesh: jax.sharding.Mesh, dtype: str, base: str = ""
) -> LoadedModel:
    """Load a Hugging Face directory. Raise UserError if the directory is none."""
    directory = model_dir = fetch_hf_directory(source)
    check_files(directory)
    adapt = None
    if peft.is_adapter(directory):
        adapt = peft.read_adapter(directory).adapt
        model_dir = fetch_hf_directory(peft.find_base(directory, base))
        check_files(model_dir)
    spec, params = huggingface.load_hf_model(model_dir, mesh, dtype, adapt)
    record = read_import_record(directory)
    places = [place for place in (directory, model_dir) if tokenizer.has_tokenizer(place)]
    tokenizer_dir = places[0] if places else None
    if not spec.eos_ids and tokenizer_dir:
        encoder = tokenizer.load_tokenizer(tokenizer_dir)
        spec = spec.replace(eos_ids=(encoder.eos_id,))
        log.warning(
            f"{directory}: its config names no end token. The tokenizer's is taken "
            f"({encoder.eos_id}), for generation to end."
        )
    step, fingerprint = record.get("step"), record.get("tokenizer")
    return LoadedModel(spec, params, tokenizer_dir, source, step, fingerprint, record)


def read_import_record(directory: pathlib.Path) -> dict[str, Any]:
    """Return an export's jaxpt.json; empty where there is none."""
    path = directory / IMPORT_RECORD
    if not path.is_file():
        return {}
    record = safetensors_file.read_hf_json(path)
    ExportRecord.from_json(record, str(path))
    return record


def find_base(source: io.Path | str, base: str = "") -> io.Path | None:
    """Return the directory of the base that a source is an adapter of; None: it is none."""
    source = hub.download_model(source)
    if not peft.is_adapter(source) or checkpoint.find_checkpoint(source):
        return None
    return peft.find_base(source, base)


def fetch_hf_directory(source: io.Path) -> pathlib.Path:
    """Return a Hugging Face directory on a disk. Raise UserError if the source is none."""
    is_run = io.exists(source / "checkpoints") or io.exists(source / "spec.json")
    has_config = io.exists(source / "config.json") and not is_run
    if not has_config and not peft.is_adapter(source) and not huggingface.is_hf_directory(source):
        raise UserError(
            f"{source}: has no finished checkpoint and no Hugging Face model. Train it first, or "
            "check the path."
        )
    return io.local_copy(source)


def check_files(directory: pathlib.Path) -> None:
    """Raise UserError for what is no file, and for what the export that wrote it has not written.

    transformers and other libraries would wait for a pipe, or read a device, for ever.
    """
    files = [directory / huggingface.GENERATION_CONFIG]  # nobody else would miss it
    for name in io.list_names(directory):
        file = directory / name
        if io.size(file) is not None:
            if name.endswith(WRITTEN_FILES) and file not in files:
                files.append(file)
        elif io.exists(file) and not file.is_dir():
            raise UserError(
                f"{file}: is a pipe or device, and a model has only files. Take it away."
            )
    io.check_published(files)


def list_sources(source: io.Path | str, name: str, base: str = "") -> dict[str, io.Path]:
    """Return what a manifest names as the inputs of a start from `source`.

    Args:
        source: see `resolve_source`.
        name: its own.
        base: of a PEFT adapter, see peft.find_base; it is the input "base".
    """
    inputs = {name: resolve_source(source)}
    found = find_base(source, base)
    return inputs | {"base": found} if found else inputs


def fingerprint_model(source: io.Path) -> str:
    """Return the fingerprint of the files that a model is read from."""
    directories = list_sources(source, "model").values()
    return stage.fingerprint(list(map(stage.fingerprint_path, directories)))


def resolve_source(source: io.Path | str) -> io.Path:
    """Return what a manifest names as the input of a start from `source`.

    That is a finished stage's directory itself, and the newest checkpoint of an unfinished run.
    """
    source = hub.download_model(source)
    if io.exists(source / "manifest.json") or not io.exists(source):
        return source
    return checkpoint.find_checkpoint(source) or source

"""Export a checkpoint as a Hugging Face directory with tokenizer and model card."""

from __future__ import annotations

import functools
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxpt import config, initialize, io, lineage, logs, sharding, stage
from jaxpt.growth.growth import format_layer_map
from jaxpt.model import transformer
from jaxpt.spec import Manifest, UserError
from jaxpt.weights import checkpoint, gguf_file, hub, huggingface, peft, safetensors_file
from jaxpt.weights.gguf_tokenizer import describe_tokenizer
from jaxpt.weights.load import (
    IMPORT_RECORD,
    LoadedModel,
    find_base,
    list_sources,
    load_model,
    open_tokenizer,
    resolve_source,
)
from jaxpt.weights.tokenizer_files import export_tokenizer

log = logging.getLogger(__name__)

# counts of a checkpoint that travel with the export
RECORDED_COUNTS = ("step", "optimizer", "lr", "heldout")


def export_model(
    source: io.Path,
    out: io.Path,
    dtype: str | None = None,
    replace: bool = False,
    push: str | None = None,
    private: bool = False,
    verify: bool = False,
    family: str | None = None,
    adapter_of: str | None = None,
) -> Manifest:
    """Write safetensors, config.json, tokenizer files and README.md.

    Of a run that trained an adapter that is the whole model, or with adapter_of PEFT's files.

    Args:
        source: a run, a checkpoint or a Hugging Face model.
        out: the directory to write.
        dtype: of the stored weights; None: as the source stores them.
        replace: overwrite what `out` holds.
        push: repository of the hub to upload to.
        private: make a repository that push creates private.
        verify: compare the checksums of a finished export, not only sizes.
        family: model_type of config.json; None: the source's.
        adapter_of: the base, a Hugging Face directory or hf:NAME, to write the adapter alone.
    """
    if family and adapter_of:
        raise UserError(
            "--family: is of a whole model's config.json, and an adapter has its base's. Leave it "
            "out, or --adapter."
        )
    if push:
        hub.check_push_allowed(push)
    source = resolve_source(source)

    def work(directory: pathlib.Path) -> dict[str, Any]:
        mesh = sharding.make_mesh(config.MeshConfig())
        dtype_there = find_stored_dtype(source)
        model = load_model(source, mesh, dtype_there, merge=not adapter_of)
        if family:
            model = model._replace(spec=model.spec.replace(family=family))
        if model.tokenizer_dir:
            encoder = open_tokenizer(model)
            spec = model.spec.replace(lora=None)
            export_tokenizer(encoder, model.tokenizer_dir, spec, directory)
        card = write_model_card(source, model)
        write = huggingface.write_hf_model
        if adapter_of:
            check_is_base(adapter_of, model, mesh)
            base_name = adapter_of.removeprefix("hf:")
            write = functools.partial(peft.write_adapter, base_name=base_name)
        with logs.announce_if_slow(log, f"export: writing {out}"):
            n_bytes = write(
                model.spec,
                model.params,
                directory,
                dtype=dtype,
                card=card,
            )
        record = {}
        for key in RECORDED_COUNTS:
            if key in model.record:
                record[key] = model.record[key]
        record["tokenizer"] = model.tokenizer
        safetensors_file.write_hf_json(directory / IMPORT_RECORD, record)
        if not model.tokenizer_dir:
            log.warning("the source has no tokenizer, so the export has none")
        count = transformer.count_trained_params if adapter_of else transformer.count_params
        n_params = count(model.spec)
        return {"n_params": n_params, "bytes": n_bytes, "tokenizer": model.tokenizer}

    manifest = stage.run_stage(
        "export",
        out,
        work,
        config={"dtype": dtype, "family": family, "adapter_of": adapter_of},
        inputs=list_sources(source, "checkpoint"),
        replace=replace,
        verify=verify,
        flag="--to",
    )
    n_params = manifest.counts["n_params"]
    n_bytes = manifest.counts["bytes"]
    log.info(f"export: {out}: {n_params:,} parameters, {n_bytes / 1e6:,.1f} MB")
    if push:
        log.info(f"pushed: {hub.push_to_hub(io.local_copy(out), push, private)}")
    return manifest


def export_gguf(
    source: io.Path,
    out: io.Path,
    dtype: str,
    replace: bool = False,
    verify: bool = False,
) -> Manifest:
    """Write model.gguf, with the tokenizer in it, and README.md.

    Args:
        source: a run, a checkpoint or a Hugging Face model.
        out: the directory to write.
        dtype: of the matrices, a key of gguf_file.FILE_TYPES.
        replace: overwrite what `out` holds.
        verify: compare the checksums of a finished export, not only sizes.
    """
    gguf_file.import_gguf()
    source = resolve_source(source)

    def work(directory: pathlib.Path) -> dict[str, Any]:
        mesh = sharding.make_mesh(config.MeshConfig())
        model = load_model(source, mesh, find_stored_dtype(source))
        gguf_file.check_spec(model.spec)
        if not model.tokenizer_dir:
            raise UserError(
                f"{source}: has no tokenizer, and a GGUF file needs one. Put its tokenizer.json "
                "there."
            )
        encoder = open_tokenizer(model)
        described = describe_tokenizer(encoder, model.spec)
        file = directory / gguf_file.FILE_NAME
        name = io.resolve(source).name
        n_bytes = gguf_file.write_gguf(model.spec, model.params, file, dtype, described, name)
        io.write_text(directory / "README.md", write_model_card(source, model))
        n_params = transformer.count_params(model.spec)
        return {"n_params": n_params, "bytes": n_bytes, "tokenizer": model.tokenizer}

    manifest = stage.run_stage(
        "export_gguf",
        out,
        work,
        config={"dtype": dtype},
        inputs=list_sources(source, "checkpoint"),
        replace=replace,
        verify=verify,
        flag="--to",
    )
    n_bytes = manifest.counts["bytes"]
    log.info(f"export_gguf: {out / gguf_file.FILE_NAME}: {dtype}, {n_bytes / 1e6:,.1f} MB")
    return manifest


def check_is_base(base: str, model: LoadedModel, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError unless a model of Hugging Face is what an adapter was trained on."""
    if model.spec.lora is None:
        raise UserError(
            f"--adapter: {model.source} trained no adapter (lora.rank is 0). Export it without "
            "--adapter."
        )
    if checkpoint.find_checkpoint(hub.download_model(base)):
        raise UserError(
            f"--adapter: expected the base as a Hugging Face directory or hf:NAME, got the run "
            f"{base}, which PEFT cannot open. Export it first, and name the export."
        )
    theirs = load_model(base, mesh, model.params["embed"].dtype.name)
    known = dict(jax.tree_util.tree_leaves_with_path(model.params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs.params):
        if path not in known or not jnp.array_equal(known[path], leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"--adapter: {base} is not the base of {model.source}: its {name} is another. Name "
                "the model that the run started from."
            )


def find_stored_dtype(source: io.Path) -> str:
    """Return the dtype of a source's weights; float32 for what load_model will refuse."""
    source = find_base(source) or source
    step_dir = checkpoint.find_checkpoint(source)
    if step_dir:
        arrays = checkpoint.read_array_metadata(step_dir)
        return arrays["params/embed"].dtype.name
    if huggingface.is_hf_directory(source):
        for tensor in huggingface.open_weights(io.local_copy(source)).values():
            return tensor.dtype.name.replace("float64", "float32")
    return "float32"


def write_model_card(source: io.Path, model: LoadedModel) -> str:
    """Return README.md of the export: what it is, how it grew, what it was made from."""
    notes: list[str] = []
    nodes = lineage.read_lineage(io.resolve(source), notes)
    nodes.reverse()
    run = nodes[0].path
    hub_names = [hub.recorded_hub_name(node.path) for node in nodes]
    hub_name = hub_names[0] or run.name
    title, _, _ = hub_name.partition("@")
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [jaxpt]"]
    for name in list(filter(None, hub_names))[:1]:
        base, _, _ = name.partition("@")
        lines.append(f"base_model: {base}")
    lines += ["---", "", f"# {title}", ""]
    lines += [f"{initialize.describe_model(model.spec)}. Made with jaxpt.", ""]
    if io.exists(run / "growth.json"):
        grown = io.read_record(run / "growth.json")
        parent = hub.recorded_hub_name(grown["parent"]) or grown["parent"]
        operators = ", ".join(grown["operators"])
        layers = format_layer_map(grown["layer_map"])
        lines += ["## Growth", "", f"Grown from {parent} by {operators}: {grown['verdict']}.", ""]
        lines += [f"Its layers were copied from the parent's layers {layers}.", ""]
    table = lineage.format_lineage_table(nodes)
    return "\n".join([*lines, "## Lineage", "", *table, *notes, ""])

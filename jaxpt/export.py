"""Export a checkpoint as a Hugging Face directory with tokenizer and model card."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

from jaxpt import config, initialize, io, lineage, sharding, stage
from jaxpt.growth.growth import format_layer_map
from jaxpt.model import transformer
from jaxpt.spec import Manifest
from jaxpt.weights import checkpoint, hub, huggingface, safetensors_file
from jaxpt.weights.load import (
    IMPORT_RECORD,
    LoadedModel,
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
) -> Manifest:
    """Write safetensors, config.json, tokenizer files and README.md.

    Args:
        source: a run, a checkpoint or a Hugging Face model.
        out: the directory to write.
        dtype: of the stored weights; None: as the source stores them.
        replace: overwrite what `out` holds.
        push: repository of the hub to upload to.
        private: make a repository that push creates private.
        verify: compare the checksums of a finished export, not only sizes.
        family: model_type of config.json; None: the source's.
    """
    if push:
        hub.check_push_allowed(push)
    source = resolve_source(source)

    def work(directory: pathlib.Path) -> dict[str, Any]:
        mesh = sharding.make_mesh(config.MeshConfig())
        model = load_model(source, mesh, find_stored_dtype(source))
        if family:
            model = model._replace(spec=model.spec.replace(family=family))
        if model.tokenizer_dir:
            encoder = open_tokenizer(model)
            export_tokenizer(encoder, model.tokenizer_dir, model.spec, directory)
        card = write_model_card(source, model)
        n_bytes = huggingface.write_hf_model(
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
        n_params = transformer.count_params(model.spec)
        return {"n_params": n_params, "bytes": n_bytes, "tokenizer": model.tokenizer}

    manifest = stage.run_stage(
        "export",
        out,
        work,
        config={"dtype": dtype, "family": family},
        inputs={"checkpoint": source},
        replace=replace,
        verify=verify,
    )
    n_params = manifest.counts["n_params"]
    n_bytes = manifest.counts["bytes"]
    log.info(f"export: {out}: {n_params:,} parameters, {n_bytes / 1e6:,.1f} MB")
    if push:
        log.info(f"pushed: {hub.push_to_hub(io.local_copy(out), push, private)}")
    return manifest


def find_stored_dtype(source: io.Path) -> str:
    """Return the dtype of a source's weights; float32 for what load_model will refuse."""
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

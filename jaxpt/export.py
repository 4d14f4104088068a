"""The stage of export_hf.py: a checkpoint -> a Hugging Face directory with tokenizer and model card."""

from __future__ import annotations

import logging
import pathlib

from jaxpt import config, lineage, sharding, stage
from jaxpt.model import llama
from jaxpt.spec import Manifest
from jaxpt.weights import checkpoint, growth, hub, huggingface, initialize

log = logging.getLogger(__name__)


def export_model(
    source: pathlib.Path,
    out: pathlib.Path,
    dtype: str | None = None,
    replace: bool = False,
    push: str | None = None,
    private: bool = False,
) -> Manifest:
    """Write `out`: safetensors, config.json, tokenizer files and README.md of a run, a checkpoint or a Hugging Face model; with
    push, upload it to that repository of the hub, new ones private if asked.

    dtype None keeps the type in which the source stores its weights.
    """
    if push:
        hub.check_push_allowed(push)
    source = initialize.resolve_source(source)

    def work(directory: pathlib.Path):
        mesh = sharding.make_mesh(config.MeshConfig())
        model = initialize.load_model(source, mesh, find_stored_dtype(source))
        n_bytes = huggingface.write_hf_model(
            model.spec,
            model.params,
            directory,
            dtype=dtype,
            tokenizer_dir=model.tokenizer_dir,
            card=write_model_card(source, model),
        )
        kept = {
            name: model.record[name]
            for name in ("step", "optimizer", "lr", "heldout")
            if name in model.record
        }
        huggingface.write_hf_json(
            directory / initialize.IMPORT_RECORD, {**kept, "tokenizer": model.tokenizer}
        )
        if not model.tokenizer_dir:
            log.info("no tokenizer: the source has none, so the export carries none")
        return {
            "n_params": llama.count_params(model.spec),
            "bytes": n_bytes,
            "tokenizer": model.tokenizer,
        }

    manifest = stage.run_stage(
        "export", out, work, config={"dtype": dtype}, inputs={"checkpoint": source}, replace=replace
    )
    log.info(
        f"export: {out}, {manifest.counts['n_params']:,} parameters, {manifest.counts['bytes'] / 1e6:,.1f} MB of weights"
    )
    if push:
        log.info(f"pushed: {hub.push_to_hub(out, push, private)}")
    return manifest


def find_stored_dtype(source: pathlib.Path) -> str:
    """The type of a source's weights; float32 for what is no source, which initialize.load refuses."""
    step = checkpoint.find_checkpoint(source)
    if step:
        return checkpoint.read_array_metadata(step)["params/embed"].dtype.name
    is_model = (source / "config.json").is_file() and not (source / "checkpoints").is_dir()
    return (
        next(
            (tensor.dtype.name for tensor in huggingface.open_safetensors(source).values()),
            "float32",
        )
        if is_model
        else "float32"
    )


def write_model_card(source: pathlib.Path, model: initialize.LoadedModel) -> str:
    """README.md of the export: what it is, how it grew, and what it was made from."""
    notes: list[str] = []
    nodes = lineage.read_lineage(source.resolve(), notes)[::-1]
    bases = [name.partition("@")[0] for node in nodes if (name := hub.recorded_hub_name(node.path))]
    run = nodes[0].path
    front = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [jaxpt]",
        *(f"base_model: {base}" for base in bases[:1]),
    ]
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {(hub.recorded_hub_name(run) or run.name).partition('@')[0]}",
        "",
    ]
    lines += [f"{initialize.describe_model(model.spec)}. Made with jaxpt.", ""]
    if (run / "growth.json").is_file():
        grown = huggingface.read_hf_json(run / "growth.json")
        lines += [
            "## Growth",
            "",
            f"Grown from {hub.recorded_hub_name(grown['parent']) or grown['parent']} by {', '.join(grown['operators'])}: {grown['verdict']}.",
            "",
        ]
        lines += [
            f"Its layers began as the parent's layers {growth.format_layer_map(grown['layer_map'])}.",
            "",
        ]
    return "\n".join([*lines, "## Lineage", "", *lineage.format_lineage_table(nodes), *notes, ""])

"""The stage of export_hf.py: a checkpoint -> a Hugging Face directory with tokenizer and model card."""

from __future__ import annotations

import pathlib

from jaxpt import config, sharding, stage
from jaxpt.model import llama
from jaxpt.spec import Manifest, UserError
from jaxpt.weights import huggingface, initialize


def run(source: pathlib.Path, out: pathlib.Path, dtype: str | None = None, replace: bool = False) -> Manifest:
    """Write `out`: safetensors, config.json, tokenizer files and README.md of a run, a checkpoint or a Hugging Face directory.

    dtype None keeps float32 as float32 and bfloat16 as bfloat16.
    """
    source = initialize.source_of(source)

    def work(directory: pathlib.Path):
        mesh = sharding.make_mesh(config.Mesh())
        model = initialize.load(source, mesh)
        n_bytes = huggingface.export(
            model.spec, model.params, directory, dtype=dtype, tokenizer_dir=model.tokenizer_dir, card=model_card(source, model)
        )
        kept = {name: model.record[name] for name in ("step", "optimizer", "lr", "heldout") if name in model.record}
        huggingface.write_json(directory / initialize.RECORD, {**kept, "tokenizer": model.tokenizer})
        if not model.tokenizer_dir:
            stage.say("no tokenizer: the source has none, so the export carries none")
        return {"n_params": llama.count(model.spec), "bytes": n_bytes, "tokenizer": model.tokenizer}

    manifest = stage.run("export", out, work, config={"dtype": dtype}, inputs={"checkpoint": source}, replace=replace)
    stage.say(f"export: {out}, {manifest.counts['n_params']:,} parameters, {manifest.counts['bytes'] / 1e6:,.1f} MB of weights")
    return manifest


def model_card(source: pathlib.Path, model: initialize.Loaded) -> str:
    """README.md of the export: what it is and what it was made from, manifest by manifest."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [jaxpt]", "---", "", f"# {source.name}", ""]
    lines += [
        f"{initialize.describe(model.spec)}. Made with jaxpt.",
        "",
        "## Lineage",
        "",
        "| what | where | fingerprint | made |",
        "|---|---|---|---|",
    ]
    seen: set[str] = set()

    def follow(path: pathlib.Path) -> None:
        try:
            manifest = Manifest.load(path)
        except UserError:
            return  # a source that is no stage of ours, or lies elsewhere by now
        if manifest.fingerprint in seen:
            return
        seen.add(manifest.fingerprint)
        lines.append(f"| {manifest.stage} | {path} | {manifest.fingerprint} | {manifest.created} |")
        for found in manifest.inputs.values():
            follow(pathlib.Path(found["path"]))

    follow(source)
    return "\n".join([*lines, ""])

"""Export a model to Hugging Face: safetensors, config.json, tokenizer, model card.

The directory opens with AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained of
transformers. The model card states the lineage.

    jaxpt export_hf --from runs/child --to runs/child/hf
    jaxpt export_hf --from runs/child --to runs/child/hf --push me/child --private
    jaxpt export_hf --from runs/tuned --to runs/tuned/adapter --adapter hf:org/base
"""

import argparse

from jaxpt.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    options.add_export_paths(parser, "the directory to write")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="dtype of the weights (default: as in the checkpoint)",
    )
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="model_type of config.json, of the families that can state the model "
        "(default: as in the checkpoint)",
    )
    parser.add_argument(
        "--adapter",
        metavar="BASE",
        help="write the adapter that the run trained, in PEFT's files, to be put onto this Hugging "
        "Face directory or hf:NAME (default: the whole model, with the adapter merged)",
    )
    options.add_verify(parser)
    parser.add_argument(
        "--push",
        metavar="NAME",
        help="upload to this repository of the Hugging Face hub, created if it does not exist",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="make a repository that --push creates private",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the Hugging Face directory --to, and push it."""
    from jaxpt import export

    export.export_model(
        arguments.source,
        arguments.to,
        arguments.dtype,
        arguments.replace,
        arguments.push,
        arguments.private,
        verify=arguments.verify,
        family=arguments.family,
        adapter_of=arguments.adapter,
    )
    options.suggest_next("sample", "--model", arguments.to)

"""Export a Llama, Mistral, Qwen2 or Qwen3 to GGUF, for llama.cpp.

The tokenizer is in the file. Needs the package gguf: pip install -r requirements-gguf.txt.

    jaxpt export_gguf --from runs/child --to runs/child/gguf --dtype q8_0
    llama-cli -m runs/child/gguf/model.gguf -p "Once upon a time"
"""

import argparse
import logging
import shlex

from jaxpt.cli import options

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    options.add_export_paths(parser, "the directory to write; the file is DIR/model.gguf")
    parser.add_argument(
        "--dtype",
        choices=["f32", "f16", "bf16", "q8_0"],
        default="f16",
        help="of the matrices (default: f16); q8_0 is 8 bits and a scale per 32 numbers",
    )
    options.add_verify(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write --to."""
    from jaxpt import export

    export.export_gguf(
        arguments.source, arguments.to, arguments.dtype, arguments.replace, arguments.verify
    )
    log.info(
        f"next: llama-cli -m {shlex.quote(str(arguments.to / 'model.gguf'))} -p 'Once upon a time'"
    )

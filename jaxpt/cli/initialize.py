"""Initialize a model at random, from a run or from Hugging Face, and grow it.

Writes a run directory at step 0 (checkpoints/0, spec.json, tokenizer/, growth.json when it grew),
from which train starts with --config.initialize.source=DIR, and which export_hf and evaluate take
like any other run.

    jaxpt initialize --from runs/base --grow 'depth_upscale(m=2)' --to runs/grown
    jaxpt initialize --from hf:meta-llama/Llama-3.2-1B --check --to runs/llama
"""

import argparse
import dataclasses

from jaxpt.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    options.add_config(
        parser,
        required=False,
        help="a recipe: section model for a random model, mixture.packed_paths to measure on",
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="random|DIR|hf:NAME",
        help="random, a run or checkpoint, a Hugging Face directory, or hf:NAME; a LoRA adapter is "
        "merged into its base",
    )
    parser.add_argument(
        "--grow",
        nargs="+",
        action="extend",
        default=[],
        metavar="OPERATOR",
        help="growth operators in order, such as 'depth_upscale(m=4)'; docs/growth.md lists them",
    )
    parser.add_argument(
        "--probe",
        type=int,
        default=20,
        metavar="STEPS",
        help="train parent and grown model for this many steps and compare losses; 0: do not",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the imported model's logits with transformers' (needs torch and memory)",
    )
    parser.add_argument(
        "--to",
        required=True,
        type=options.parse_path,
        metavar="DIR",
        help="the run directory to write",
    )
    parser.add_argument("--replace", action="store_true", help="overwrite what --to holds")
    options.add_verify(parser)
    options.add_knobs(parser, ("mixture", "model", "initialize", "train", "optim", "mesh"))


def run(arguments: argparse.Namespace) -> None:
    """Write the run directory --to."""
    settings = options.load_settings(arguments)
    section = dataclasses.replace(
        settings.initialize,
        source=arguments.source,
        grow=(*settings.initialize.grow, *arguments.grow),
    )
    from jaxpt.train import initial_run

    initial_run.initialize_run(
        dataclasses.replace(settings, initialize=section),
        arguments.to,
        probe_steps=arguments.probe,
        check=arguments.check,
        replace=arguments.replace,
        verify=arguments.verify,
    )
    recipe = arguments.config or "FILE"
    source = f"--config.initialize.source={arguments.to}"
    options.suggest_next("train", "--config", recipe, "--workdir", "DIR", source)

r"""Compare models: the same prompts side by side, or documents that they differ on.

A model is a run, a checkpoint or a Hugging Face directory.

  jaxpt compare --models runs/base runs/child --prompts configs/prompts.txt \
      --repetition-penalty 1.1
  jaxpt compare --models runs/base runs/child \
      --differ 'prose=parquet:runs/base/corpus/heldout/prose-*.parquet#text'
"""

import argparse

from jaxpt import io, stage
from jaxpt.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--models",
        required=True,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="runs, checkpoint step directories or Hugging Face directories",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompts",
        type=options.parse_path,
        metavar="FILE",
        help="one prompt per line, or a .json file with a list of strings; with --chat also of "
        "lists of messages",
    )
    what.add_argument(
        "--differ",
        nargs="+",
        action="extend",
        metavar="NAME=KIND:WHERE",
        help="held-out documents; prints those on which two models differ most",
    )
    reading = parser.add_mutually_exclusive_group()
    reading.add_argument(
        "--chat",
        dest="read_as",
        action="store_const",
        const="chat",
        default="text",
        help="a prompt is a user's message, encoded by the model's chat template",
    )
    reading.add_argument(
        "--control-tokens",
        dest="read_as",
        action="store_const",
        const="control tokens",
        help="control tokens that a prompt holds are encoded as such, not as text",
    )
    parser.add_argument(
        "--max-new", type=int, default=128, metavar="N", help="new tokens at most (default: 128)"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1, repeated tokens become less likely (default: 1)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="temperature of sampling; 0 is greedy (default: 0)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="N",
        help="sample from the N likeliest tokens; 0 from all (default: 0)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="sample from the likeliest tokens that sum to this probability (default: 1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)"
    )
    parser.add_argument(
        "--ppl",
        type=options.parse_path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="text files on which to also measure each model's bits per byte",
    )
    parser.add_argument(
        "--to",
        type=options.parse_path,
        metavar="FILE.json",
        help="file to write the result to, for the report",
    )


def run(arguments: argparse.Namespace) -> None:
    """Compare, print and write --to."""
    from jaxpt.evaluate import compare
    from jaxpt.model.decode import Sampling

    sampling = Sampling(
        arguments.repetition_penalty, arguments.temperature, arguments.top_k, arguments.top_p
    )
    models = [io.path(model) for model in arguments.models]
    to = stage.check_output_path(
        arguments.to, "differences.json" if arguments.differ else "samples.json"
    )
    if arguments.differ:
        compare.compare_documents(models, arguments.differ, to=to)
        options.suggest_report(arguments.models)
        return
    prompts = compare.read_prompts(arguments.prompts, arguments.read_as)
    compare.compare_samples(
        models,
        prompts,
        read_as=arguments.read_as,
        max_new=arguments.max_new,
        sampling=sampling,
        seed=arguments.seed,
        texts=arguments.ppl,
        to=to,
    )
    options.suggest_report(arguments.models)

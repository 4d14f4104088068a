r"""Evaluate a model: lm-evaluation-harness benchmarks and bits per byte of texts.

Runs jaxpt's own code, or transformers and torch.

    jaxpt evaluate --model runs/base --to runs/base/eval/prose.json --tasks \
        'bits_per_byte/prose=parquet:runs/base/corpus/heldout/prose-*.parquet#text'
"""

import argparse

from jaxpt import io, stage
from jaxpt.cli import options
from jaxpt.spec import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="a run, a checkpoint step directory or a Hugging Face directory",
    )
    parser.add_argument(
        "--tasks",
        required=True,
        nargs="+",
        action="extend",
        metavar="TASK",
        help="harness tasks (also with commas), 'course', bits_per_byte/NAME=KIND:WHERE or "
        "needle/NAME=KIND:WHERE",
    )
    parser.add_argument(
        "--by-position",
        action="store_true",
        help="also measure the loss by position in the long documents of each bits_per_byte text",
    )
    parser.add_argument(
        "--backend",
        choices=("jax", "hf"),
        default="jax",
        help="jaxpt, or transformers and torch (default: jax)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="evaluate only the first N items or documents of each task",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="context in tokens (default: the model's longest)",
    )
    parser.add_argument(
        "--data-dir",
        type=options.parse_path,
        metavar="DIR",
        help="benchmark files on disk (default: the harness downloads them)",
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="put the harness's prompts into the model's chat template",
    )
    parser.add_argument(
        "--fewshot-as-multiturn",
        action="store_true",
        help="examples are turns of the conversation; with --apply-chat-template",
    )
    parser.add_argument(
        "--to", type=options.parse_path, metavar="FILE.json", help="file to write the results to"
    )


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table and write --to."""
    from jaxpt.evaluate import harness

    if arguments.fewshot_as_multiturn and not arguments.apply_chat_template:
        raise UserError(
            "--fewshot-as-multiturn: turns need a chat template. Give --apply-chat-template too."
        )
    chat = harness.ChatRequest(arguments.apply_chat_template, arguments.fewshot_as_multiturn)
    harness.evaluate_model(
        io.path(arguments.model),
        arguments.tasks,
        backend=arguments.backend,
        limit=arguments.limit,
        max_length=arguments.max_length,
        data_dir=arguments.data_dir,
        to=stage.check_output_path(arguments.to, "results.json"),
        chat=chat,
        by_position=arguments.by_position,
    )
    options.suggest_report([arguments.model])

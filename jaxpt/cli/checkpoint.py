"""Inspect a checkpoint, or compare two bit by bit (exit status 1 if they differ).

jaxpt checkpoint inspect runs/base
jaxpt checkpoint diff runs/base/checkpoints/300 runs/again/checkpoints/300
"""

import argparse
import sys

from jaxpt import io
from jaxpt.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="inspect|diff")
    inspect = actions.add_parser("inspect", help="print step, spec and every array")
    inspect.add_argument(
        "directory", type=options.parse_path, help="a run or a checkpoint step directory"
    )
    diff = actions.add_parser("diff", help="compare two checkpoints bit by bit")
    diff.add_argument(
        "directories", type=options.parse_path, nargs=2, help="run or checkpoint step directories"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the checkpoint, or the differences."""
    from jaxpt.weights import checkpoint

    if arguments.action == "inspect":
        for lines in checkpoint.describe_checkpoint(arguments.directory):
            print(io.printable(lines, keep="\n"))
    else:
        differences = checkpoint.diff_checkpoints(*arguments.directories)
        for line in differences or ["equal: every array, bit by bit"]:
            print(io.printable(line))
        sys.exit(1 if differences else 0)

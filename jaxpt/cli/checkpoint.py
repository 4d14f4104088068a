"""Inspect a checkpoint, compare two, merge several, or write an average as a model.

jaxpt checkpoint inspect runs/base
jaxpt checkpoint diff runs/base/checkpoints/300 runs/again/checkpoints/300
jaxpt checkpoint merge runs/base/checkpoints/{200,250,300} --to runs/mean
jaxpt checkpoint average runs/base --to runs/average
"""

import argparse
import sys

from jaxpt import io
from jaxpt.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="inspect|diff|merge|average"
    )
    inspect = actions.add_parser("inspect", help="print step, spec and every array")
    inspect.add_argument(
        "directory", type=options.parse_path, help="a run or a checkpoint step directory"
    )
    diff = actions.add_parser("diff", help="compare two checkpoints bit by bit")
    diff.add_argument(
        "directories", type=options.parse_path, nargs=2, help="run or checkpoint step directories"
    )
    merge = actions.add_parser(
        "merge", help="write the mean of checkpoints of one architecture as a run at step 0"
    )
    merge.add_argument(
        "directories", type=options.parse_path, nargs="+", help="run or checkpoint step directories"
    )
    merge.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one for each; else they are equal"
    )
    merge.add_argument(
        "--slerp",
        type=float,
        metavar="T",
        help="spherical interpolation of two, T = 0 to 1 from the first to the second",
    )
    average = actions.add_parser(
        "average", help="write the weights that a run averaged (optim.average) as a run at step 0"
    )
    average.add_argument(
        "directory", type=options.parse_path, help="a run or a checkpoint step directory"
    )
    for writer in (merge, average):
        writer.add_argument(
            "--to", required=True, type=options.parse_path, metavar="DIR", help="the run to write"
        )
        writer.add_argument("--replace", action="store_true", help="overwrite what --to holds")


def run(arguments: argparse.Namespace) -> None:
    """Print the checkpoint, or the differences."""
    from jaxpt.weights import checkpoint

    if arguments.action in ("merge", "average"):
        from jaxpt.train import merge

        if arguments.action == "average":
            merge.write_average(arguments.directory, arguments.to, arguments.replace)
        else:
            merge.merge_checkpoints(
                arguments.directories,
                arguments.to,
                arguments.weights,
                arguments.slerp,
                arguments.replace,
            )
        source = f"--config.initialize.source={arguments.to}"
        options.suggest_next("train", "--config", "FILE", "--workdir", "DIR", source)
    elif arguments.action == "inspect":
        for lines in checkpoint.describe_checkpoint(arguments.directory):
            print(io.printable(lines, keep="\n"))
        place = arguments.directory
        options.suggest_next("export_hf", "--from", place, "--to", "DIR")
    else:
        differences = checkpoint.diff_checkpoints(*arguments.directories)
        for line in differences or ["equal: every array, bit by bit"]:
            print(io.printable(line))
        sys.exit(1 if differences else 0)

"""Inspect a checkpoint, or compare two bit by bit (exit status 1 if they differ).

python scripts/checkpoint.py inspect runs/base
python scripts/checkpoint.py diff runs/base/checkpoints/300 runs/again/checkpoints/300
"""

import argparse
import pathlib
import sys

# run from a clone without installing
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxpt import stage

RAW = argparse.RawDescriptionHelpFormatter


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    actions = parser.add_subparsers(dest="action", required=True, metavar="inspect|diff")
    inspect = actions.add_parser("inspect", help="print step, spec and every array")
    inspect.add_argument(
        "directory", type=pathlib.Path, help="a run or a checkpoint step directory"
    )
    diff = actions.add_parser("diff", help="compare two checkpoints bit by bit")
    diff.add_argument(
        "directories", type=pathlib.Path, nargs=2, help="run or checkpoint step directories"
    )
    arguments = parser.parse_args()
    from jaxpt.weights import checkpoint

    if arguments.action == "inspect":
        for line in checkpoint.describe_checkpoint(arguments.directory):
            print(line)
    else:
        differences = checkpoint.diff_checkpoints(*arguments.directories)
        for line in differences or ["equal: every array, bit by bit"]:
            print(line)
        sys.exit(1 if differences else 0)


if __name__ == "__main__":
    stage.entry_point(main)

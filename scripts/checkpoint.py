"""Look into checkpoints: `inspect` prints every array of one, `diff` compares two bit by bit and exits 1 when they differ.

python scripts/checkpoint.py inspect runs/base
python scripts/checkpoint.py diff runs/base/checkpoints/300 runs/again/checkpoints/300
"""

import argparse
import pathlib
import sys

sys.path.insert(
    0, str(pathlib.Path(__file__).resolve().parent.parent)
)  # run from a clone without installing

from jaxpt import stage


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    doors = parser.add_subparsers(dest="door", required=True, metavar="inspect|diff")
    inspect = doors.add_parser("inspect", help="print step, spec and every array")
    inspect.add_argument(
        "directory", type=pathlib.Path, help="a run or a checkpoint step directory"
    )
    diff = doors.add_parser("diff", help="compare two checkpoints bit by bit")
    diff.add_argument(
        "directories", type=pathlib.Path, nargs=2, help="run or checkpoint step directories"
    )
    arguments = parser.parse_args()
    from jaxpt.weights import checkpoint

    if arguments.door == "inspect":
        for line in checkpoint.describe_checkpoint(arguments.directory):
            print(line)
    else:
        different = checkpoint.diff_checkpoints(*arguments.directories)
        for line in different or ["equal: every array, bit by bit"]:
            print(line)
        sys.exit(1 if different else 0)


if __name__ == "__main__":
    stage.entry_point(main)

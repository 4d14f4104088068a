"""Write one HTML page about one run or several, from the JSON that the stages left, and print their numbers as a table.

    python scripts/report.py --workdir runs/base runs/child --to runs/report.html

The page opens from a file and asks no other host for anything. What is missing is named at its end.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # run from a clone without installing

from jaxpt import stage


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", required=True, nargs="+", action="extend", metavar="DIR", help="run directories, shown in this order; spaced or repeated"
    )
    parser.add_argument("--to", required=True, type=pathlib.Path, metavar="FILE.html", help="the page to write")
    arguments = parser.parse_args()
    from jaxpt import report  # after the flags were read: --help stays fast

    runs = report.write(arguments.workdir, arguments.to)
    stage.say(report.table(runs, arguments.to))


if __name__ == "__main__":
    stage.door(main)

"""Write one HTML page about one run or several, from the JSON that the stages left, and print their numbers as a table.

    python scripts/report.py --workdir runs/base runs/child --to runs/report.html
    python scripts/report.py --workdir runs/base --serve
    python scripts/report.py --lineage runs/child/hf --verify

The page opens from a file and asks no other host for anything. What is missing is named at its end. --serve shows it on this machine
and follows runs that go on. --lineage tells what a model was made from, stage by stage, each with its fingerprint.
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
    parser.add_argument(
        "--workdir",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="run directories, shown in this order; spaced or repeated",
    )
    parser.add_argument("--to", type=pathlib.Path, metavar="FILE.html", help="the page to write")
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=8765,
        metavar="PORT",
        help="show the page on 127.0.0.1 while the runs go on (default port: 8765)",
    )
    parser.add_argument(
        "--lineage",
        type=pathlib.Path,
        metavar="DIR",
        help="tell what this run, export or other stage was made from, and write no page",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="with --lineage: compute every checksum and fingerprint again; the first that does not hold is named",
    )
    arguments = parser.parse_args()
    n_asked = sum(each is not None for each in (arguments.to, arguments.serve, arguments.lineage))
    if n_asked != 1 or bool(arguments.workdir) == bool(arguments.lineage):
        parser.error("give --workdir DIR ... with --to FILE.html or --serve, or else --lineage DIR")
    from jaxpt import lineage
    from jaxpt.report import live, page, summary  # after the flags were read: --help stays fast

    if arguments.lineage:
        print(lineage.format_lineage(arguments.lineage, arguments.verify))
        return
    if arguments.serve is not None:
        live.serve_report(arguments.workdir, arguments.serve)
        return
    runs = page.write_report(arguments.workdir, arguments.to)
    print(summary.format_summary_table(runs, arguments.to))


if __name__ == "__main__":
    stage.entry_point(main)

"""Write one HTML page about one or more runs, and print their numbers as a table.

    python scripts/report.py --workdir runs/base runs/child --to runs/report.html
    python scripts/report.py --workdir runs/base --serve
    python scripts/report.py --lineage runs/child/hf --verify

The page is one file that loads nothing from the network; what is missing is listed at its end.
--serve shows it on this machine and follows unfinished runs. --lineage prints what a model was made
from, stage by stage, each with its fingerprint.
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
    parser.add_argument(
        "--workdir",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="run directories, shown in this order",
    )
    parser.add_argument("--to", type=pathlib.Path, metavar="FILE.html", help="the page to write")
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=8765,
        metavar="PORT",
        help="serve the page on 127.0.0.1 and follow the runs (default port: 8765)",
    )
    parser.add_argument(
        "--lineage",
        type=pathlib.Path,
        metavar="DIR",
        help="print what this run, export or other stage was made from; writes no page",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="with --lineage: recompute all fingerprints and name the first that differs",
    )
    arguments = parser.parse_args()
    outputs = (arguments.to, arguments.serve, arguments.lineage)
    n_outputs = sum(output is not None for output in outputs)
    if n_outputs != 1 or bool(arguments.workdir) == bool(arguments.lineage):
        parser.error("give --workdir DIR ... with --to FILE.html or --serve, or else --lineage DIR")
    from jaxpt import lineage
    from jaxpt.report import live, page, summary  # not before --help was answered

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

"""Write one HTML page about one or more runs, and print their numbers as a table.

    jaxpt report --workdir runs/base runs/child --to runs/report.html
    jaxpt report --workdir runs --serve
    jaxpt report --lineage runs/child/hf --verify

The page is one file that loads nothing from the network; what is missing is listed at its end.
--serve shows it on this machine and follows unfinished runs. --lineage prints what a model was made
from, stage by stage, each with its fingerprint.
"""

import argparse
import logging
import shlex

from jaxpt import stage
from jaxpt.cli import options
from jaxpt.spec import UserError

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--workdir",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="run directories, shown in this order, or one that holds them",
    )
    parser.add_argument(
        "--to", type=options.parse_path, metavar="FILE.html", help="the page to write"
    )
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
        type=options.parse_path,
        metavar="DIR",
        help="print what this run, export or other stage was made from; writes no page",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="with --lineage: recompute all fingerprints and name the first that differs",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page, serve it, or print a lineage."""
    outputs = (arguments.to, arguments.serve, arguments.lineage)
    n_outputs = sum(output is not None for output in outputs)
    if n_outputs != 1 or bool(arguments.workdir) == bool(arguments.lineage):
        raise UserError(
            "report: expected --workdir DIR ... with --to FILE.html or --serve, or else "
            "--lineage DIR."
        )
    from jaxpt import lineage
    from jaxpt.report import live, page, read, summary

    if arguments.lineage:
        print(lineage.format_lineage(arguments.lineage, arguments.verify))
        return
    if arguments.serve is not None:
        live.serve_report(arguments.workdir, arguments.serve)
        return
    stage.check_output_path(arguments.to, "report.html")
    runs = page.write_report(read.find_runs(arguments.workdir), arguments.to)
    print(summary.format_summary_table(runs, arguments.to))
    log.info(f"next: open {shlex.quote(str(arguments.to))} in a browser")

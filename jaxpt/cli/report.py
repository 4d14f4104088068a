"""Write one HTML page about one or more runs, and print their numbers as a table.

    jaxpt report --workdir runs/base runs/child --to runs/report.html
    jaxpt report --workdir runs --serve
    jaxpt report --experiment runs/rates --to runs/rates.html
    jaxpt report --lineage runs/child/hf --verify

The page is one file that loads nothing from the network; what is missing is listed at its end.
--serve shows it on this machine and follows unfinished runs. --experiment compares the arms of a
sweep with its first one: a sentence for each, and their numbers as JSON beside the page. --lineage
prints what a model was made from, stage by stage, each with its fingerprint.
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
        "--experiment",
        type=options.parse_path,
        metavar="DIR",
        help="the --workdir of a sweep: its arms against the first, in FLOPs and in time",
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
    inputs = (arguments.workdir, arguments.experiment, arguments.lineage)
    n_inputs = sum(bool(each) for each in inputs)
    if n_outputs != 1 or n_inputs != 1 or (arguments.experiment and not arguments.to):
        raise UserError(
            "report: expected --workdir DIR ... with --to FILE.html or --serve, --experiment DIR "
            "with --to FILE.html, or else --lineage DIR."
        )
    from jaxpt import lineage
    from jaxpt.report import experiment, live, page, read, summary

    if arguments.lineage:
        print(lineage.format_lineage(arguments.lineage, arguments.verify))
        return
    if arguments.serve is not None:
        live.serve_report(arguments.workdir, arguments.serve)
        return
    stage.check_output_path(arguments.to, "report.html")
    if arguments.experiment:
        compared = experiment.read_experiment(arguments.experiment)
        directories = experiment.list_runs(arguments.experiment)
        page.write_report(directories, arguments.to, compared)
        for arm in compared.arms:
            print(arm.sentence)
        log.info(f"numbers: {experiment.write_experiment(compared, arguments.to)}")
        return
    runs = page.write_report(read.find_runs(arguments.workdir), arguments.to)
    print(summary.format_summary_table(runs, arguments.to))
    log.info(f"next: open {shlex.quote(str(arguments.to))} in a browser")

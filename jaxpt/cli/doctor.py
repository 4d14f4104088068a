"""Measure this machine before a run: matmuls, memory, links, disk, versions, clock.

    jaxpt doctor --workdir runs/base
    jaxpt doctor --workdir gs://bucket/base

Takes some seconds per device, and names what a run would suffer from. The report,
WORKDIR/doctor.json, stands in the lineage of a run that is trained there afterwards.
"""

import argparse
import logging

from jaxpt.cli import options

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        type=options.parse_path,
        help="a run directory, whose disk or bucket is measured too; the report is written there",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print the report."""
    from jaxpt import doctor

    report = doctor.examine_machine(arguments.workdir)
    print(doctor.format_report(report))
    for finding in report.findings:
        log.warning(finding)
    options.suggest_next("plan", "--config", "FILE", "--on", "CHIP:COUNT")

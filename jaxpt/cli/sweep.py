r"""Train a recipe once for every combination of values of some knobs.

A combination is a run in WORKDIR/NAME=VALUE,... that resumes and is reported like any other. Given
again, the command goes on where it was stopped; given on several hosts with a shared WORKDIR, it
divides the work among them.

    jaxpt sweep --config configs/quickstart.py --workdir runs/base \
        --over optim.peak_lr=1e-3,2e-3,4e-3 initialize.seed+mixture.seed=0,1
    jaxpt sweep --config configs/quickstart.py --workdir runs/depths \
        --over model.n_layers=2,4,8 --config.train.steps=600
"""

import argparse

from jaxpt.cli import options
from jaxpt.cli.train import SECTIONS
from jaxpt.spec import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    options.add_config(parser)
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        type=options.parse_path,
        help="the parent of the runs; its packed/ is read unless the recipe names other data",
    )
    parser.add_argument(
        "--over",
        required=True,
        nargs="+",
        metavar="KNOB=VALUE,...",
        help="a knob of the recipe and its values; several make every combination; KNOB+KNOB=... "
        "gives two the same value",
    )
    options.add_knobs(parser, SECTIONS)


def run(arguments: argparse.Namespace) -> None:
    """Train all combinations."""
    from jaxpt import sweep

    axes = [sweep.parse_axis(text) for text in arguments.over]
    failed = sweep.run_sweep(arguments.config, arguments.overrides, axes, arguments.workdir)
    if failed:
        raise UserError(
            f"sweep: {len(failed)} of the runs failed: {'; '.join(failed)}. Their messages are "
            "above; the same command goes on with them."
        )
    place = arguments.workdir
    options.suggest_next("report", "--experiment", place, "--to", place / "report.html")

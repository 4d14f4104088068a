r"""Sample a teacher once, for all sequences that a run will read.

Reads the packed sequences of the recipe and its distill.teacher, and writes --to, which train
takes as distill.teacher in place of the model. Killed and started again with the same command, it
goes on.

    jaxpt teacher_logits --config student.py --workdir runs/student --to runs/teacher_logits \
        --config.distill.teacher=runs/teacher
    jaxpt train --config student.py --workdir runs/student \
        --config.distill.teacher=runs/teacher_logits
"""

import argparse

from jaxpt.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    options.add_config(parser)
    options.add_workdir(parser)
    parser.add_argument(
        "--to",
        required=True,
        type=options.parse_path,
        metavar="DIR",
        help="the directory of samples to write",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=32,
        metavar="K",
        help="draws per token, 2 bytes each (4 beyond 65,536 tokens; default: 32). More make the "
        "student's gradients less noisy",
    )
    parser.add_argument("--replace", action="store_true", help="overwrite what --to holds")
    options.add_verify(parser)
    options.add_knobs(parser, ("mixture", "train", "distill", "mesh"))


def run(arguments: argparse.Namespace) -> None:
    """Write the samples."""
    settings = options.load_settings(arguments)
    from jaxpt.train import teacher_logits

    packed = list(settings.mixture.packed_paths) or [str(arguments.workdir / "packed")]
    teacher_logits.sample_sequences(
        settings, packed, arguments.to, arguments.samples, arguments.replace, arguments.verify
    )
    recipe, workdir = arguments.config, arguments.workdir
    samples = f"--config.distill.teacher={arguments.to}"
    options.suggest_next("train", "--config", recipe, "--workdir", workdir, samples)

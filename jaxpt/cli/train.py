"""Train a model from scratch, from another run or from Hugging Face.

Reads packed sequences (config.mixture.packed_paths, or WORKDIR/packed) and writes checkpoints,
metrics.jsonl and tensorboard/ into WORKDIR, up to config.train.steps. Killed and started again
with the same command, it resumes from the newest complete checkpoint and ends with the same
weights.

    jaxpt train --config configs/quickstart.py --workdir runs/base
"""

import argparse

from jaxpt.cli import options

SECTIONS = ("pack", "mixture", "model", "initialize", "train", "optim", "lora", "distill")
SECTIONS += ("mesh",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    options.add_config(parser)
    options.add_workdir(parser)
    options.add_verify(parser)
    options.add_knobs(parser, SECTIONS)


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    settings = options.load_settings(arguments)
    from jaxpt import flops
    from jaxpt.train import loop, meter

    loop.train_model(
        settings,
        arguments.workdir,
        estimate_device_cost=lambda spec, seq_len: flops.detect_device_cost(
            spec, seq_len, settings.train.compute_dtype, settings.plan
        ),
        started=meter.measure_process_start(),
        verify=arguments.verify,
    )
    workdir = arguments.workdir
    options.suggest_next("report", "--workdir", workdir, "--to", workdir / "report.html")
    options.suggest_next("sample", "--model", workdir)
    options.suggest_next("export_hf", "--from", workdir, "--to", workdir / "hf")

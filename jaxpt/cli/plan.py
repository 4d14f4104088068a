"""Plan a run before paying for devices: does it fit, how fast, how long, how much.

Compiles the real train step for chips that this machine does not have.

TPU slices need the package libtpu, NVIDIA GPUs jax-cuda13-plugin and jax-cuda13-pjrt; without them
a target is estimated. A target is CHIP:TOPOLOGY (v4, v5e, v5p, v6e, tpu7x) or CHIP:COUNT (a100
with 80 GB, a100-40gb, h100, h200, b200, l4, rtx4090, cpu).

    # two targets
    jaxpt plan --config configs/llama3_8b.py --on v5p:4x4x4 h100:8 --json plan.json
    # the best mesh, micro-batch and remat policy
    jaxpt plan --config configs/llama3_8b.py --on h100:8 --search
    # plans compared with what runs measured
    jaxpt plan --check runs/base runs/child
    # grow a base, or start from scratch?
    jaxpt plan --config configs/llama3_8b.py --base runs/small --base-tokens 1e11
"""

import argparse

from jaxpt import hardware, io
from jaxpt.cli import options
from jaxpt.spec import UserError

SECTIONS = ("tokenizer", "pack", "model", "initialize", "train", "optim", "lora", "distill")
SECTIONS += ("mesh", "plan")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    options.add_config(parser, required=False)
    add(
        "--on",
        nargs="+",
        action="extend",
        default=[],
        metavar="TARGET",
        help="hardware, such as v5p:4x4x4, h100:8 or cpu:8; one or more",
    )
    add(
        "--search",
        action="store_true",
        help="search mesh, grad_accum_steps and remat for the cheapest and the fastest fit",
    )
    add(
        "--check",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN_DIR",
        help="compare the plan with what runs measured; the first one calibrates",
    )
    add("--json", metavar="FILE", type=options.parse_path, help="also write the plan to this file")
    strategies = parser.add_argument_group(
        "grow or scratch", "any of these compares strategies to train the config's model"
    )
    strategies.add_argument(
        "--base",
        metavar="MODEL",
        help="what could be grown: a run, a Hugging Face directory, or a recipe",
    )
    strategies.add_argument(
        "--base-tokens",
        type=float,
        default=0.0,
        metavar="N",
        help="tokens that the base was trained on",
    )
    strategies.add_argument(
        "--base-usd",
        metavar="USD",
        help="cost of the base, or free (default: computed from its tokens)",
    )
    strategies.add_argument(
        "--target-loss",
        type=float,
        metavar="NATS",
        help="loss to reach (default: that of scratch with the config's tokens)",
    )
    strategies.add_argument(
        "--law",
        default="chinchilla",
        metavar="NAME",
        help="scaling law: chinchilla, chinchilla-refit or c4",
    )
    strategies.add_argument(
        "--fit",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN_DIR",
        help="fit the law, and what growing saved, to your own runs",
    )
    options.add_knobs(parser, SECTIONS)


def run(arguments: argparse.Namespace) -> None:
    """Print the plan, and write --json."""
    compares_strategies = arguments.base or arguments.target_loss is not None or arguments.fit
    if not arguments.config and not arguments.check:
        raise UserError("plan: expected --config FILE with --on TARGET, or --check RUN_DIR.")
    if arguments.config and not (arguments.on or compares_strategies):
        raise UserError("plan: expected --on TARGET, such as --on v5p:4x4x4 or --on h100:8.")
    overrides = arguments.overrides
    if overrides and not arguments.config:
        raise UserError(
            f"plan: {overrides[0]} overrides a config, but none was given. Add --config FILE."
        )
    settings = options.load_settings(arguments) if arguments.config else None

    from jaxpt.plan import answer

    request = answer.PlanRequest(
        target_names=arguments.on,
        with_search=arguments.search,
        check_run_dirs=arguments.check,
        base=arguments.base,
        base_tokens=arguments.base_tokens,
        base_usd=arguments.base_usd,
        target_loss=arguments.target_loss,
        law_name=arguments.law,
        fit_run_dirs=arguments.fit,
    )
    plan = answer.run_plan(settings, request)
    if arguments.json:
        io.write_json(arguments.json, plan)
        print(f"\nplan: wrote {len(plan.targets)} targets to {arguments.json}")
    suggest_start(arguments, [target.target for target in plan.targets if target.fits])


def suggest_start(arguments: argparse.Namespace, fitting: list[str]) -> None:
    """Log the command that starts what was planned on the first target that it fits."""
    if not fitting:
        return
    target = hardware.parse_target(fitting[0])
    recipe = ("--config", arguments.config, "--workdir", "DIR", *arguments.overrides)
    if target.n_devices == target.devices_per_host:
        options.suggest_next("train", *recipe)
    elif target.chip.platform == "tpu":
        options.suggest_next("launch", "tpu-vm", "--name", "NAME", "--zone", "ZONE", *recipe)
    else:
        options.suggest_next("launch", "ssh", "--hosts", "HOST", "HOST", *recipe)

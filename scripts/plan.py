"""Before any device is paid for: does a run fit, how fast, how long, how much. Compiles the real train step for chips that are not here.

TPU slices need the package libtpu, NVIDIA cards jax-cuda13-plugin and jax-cuda13-pjrt; without them a target is
estimated. Any number of targets, each CHIP:TOPOLOGY (v4, v5e, v5p, v6e, tpu7x) or CHIP:COUNT (a100, h100, h200, b200,
l4, rtx4090, cpu).

    python scripts/plan.py --config configs/llama3_8b.py --on v5p:4x4x4 --on h100:8 --json runs/8b/plan.json
    python scripts/plan.py --config configs/llama3_8b.py --on h100:8 --search           the best mesh, micro-batch and remat
    python scripts/plan.py --check runs/base runs/child                                 plans beside what runs measured
    python scripts/plan.py --config configs/llama3_8b.py --base runs/small --base-tokens 1e11     grow it, or start from scratch
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(
    0, str(pathlib.Path(__file__).resolve().parent.parent)
)  # run from a clone without installing

from jaxpt import config, stage
from jaxpt.spec import UserError


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any knob of the config can be overridden: --config.train.batch_size=64. configs/base.py lists them all.",
    )  # fmt: skip
    add = parser.add_argument
    add("--config", metavar="FILE", help="a recipe, such as configs/llama3_8b.py")
    add(
        "--on",
        nargs="+",
        action="extend",
        default=[],
        metavar="TARGET",
        help="hardware, such as v5p:4x4x4, h100:8 or cpu:8; several",
    )
    add(
        "--search",
        action="store_true",
        help="find mesh, train.grad_accum_steps and train.remat: the cheapest and the fastest that fit",
    )
    add(
        "--check",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN_DIR",
        help="hold the plan against what runs measured; the first calibrates",
    )
    add("--json", metavar="FILE", type=pathlib.Path, help="write the plan there too")
    ways = parser.add_argument_group(
        "grow or scratch", "any of these compares the ways to the config's model"
    )
    ways.add_argument(
        "--base",
        metavar="MODEL",
        help="what could be grown: a run, a Hugging Face directory, or a recipe for its shape",
    )
    ways.add_argument(
        "--base-tokens",
        type=float,
        default=0.0,
        metavar="N",
        help="tokens that the base was trained for",
    )
    ways.add_argument(
        "--base-usd",
        metavar="USD",
        help="what the base cost, or free; left out: reckoned from its tokens",
    )
    ways.add_argument(
        "--target-loss",
        type=float,
        metavar="NATS",
        help="loss to reach; left out: what scratch reaches with the config's tokens",
    )
    ways.add_argument(
        "--law",
        default="chinchilla",
        metavar="NAME",
        help="law of scaling: chinchilla, chinchilla-refit or c4",
    )
    ways.add_argument(
        "--fit",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN_DIR",
        help="fit the law, and what growing saved, to one's own runs",
    )
    arguments, rest = parser.parse_known_args()
    asks_for_ways = arguments.base or arguments.target_loss is not None or arguments.fit
    if not arguments.config and not arguments.check:
        raise UserError("plan: wanted --config FILE with --on TARGET, or --check RUN_DIR.")
    if arguments.config and not (arguments.on or asks_for_ways):
        raise UserError("plan: wanted --on TARGET, such as --on v5p:4x4x4 or --on h100:8.")
    overrides = config.split_overrides(rest, parser)
    if overrides and not arguments.config:
        raise UserError(
            f"plan: {overrides[0]} overrides a config, and none was given: wanted --config FILE."
        )
    settings = config.load_config(arguments.config, overrides) if arguments.config else None

    from jaxpt.plan import answer

    found = answer.run_plan(
        settings, target_names=arguments.on, with_search=arguments.search, check_run_dirs=arguments.check, base=arguments.base, base_tokens=arguments.base_tokens,
        base_usd=arguments.base_usd, target_loss=arguments.target_loss, law_name=arguments.law, fit_run_dirs=arguments.fit,
    )  # fmt: skip
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        stage.write_atomic(arguments.json, json.dumps(found, indent=1) + "\n")
        print(f"\nplan: wrote {len(found['targets'])} targets to {arguments.json}")


if __name__ == "__main__":
    stage.entry_point(main)

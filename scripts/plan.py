"""Before any device is paid for: does a run fit, how fast, how long, how much. Compiles the real train step for chips that are not here.

TPU slices need the package libtpu, NVIDIA cards jax-cuda13-plugin and jax-cuda13-pjrt; without them a target is
estimated. Any number of targets, each CHIP:TOPOLOGY (v4, v5e, v5p, v6e, tpu7x) or CHIP:COUNT (a100, h100, h200, b200,
l4, rtx4090, cpu).

    python scripts/plan.py --config configs/llama3_8b.py --on v5p:4x4x4 --on h100:8 --json runs/8b/plan.json
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # run from a clone without installing

from jaxpt import config, stage


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any knob of the config can be overridden: --config.train.batch_rows=64. configs/base.py lists them all.",
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as configs/llama3_8b.py")
    parser.add_argument(
        "--on", required=True, nargs="+", action="extend", metavar="TARGET", help="hardware, such as v5p:4x4x4, h100:8 or cpu:8; several"
    )
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write the plan there too")
    arguments, rest = parser.parse_known_args()
    settings = config.load(arguments.config, config.overrides_from(rest, parser))
    from jaxpt.plan import cost

    plan = cost.plan(settings, arguments.on)
    stage.say("\n" + cost.table(plan))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        stage.write_whole(arguments.json, json.dumps(plan, indent=1) + "\n")
        stage.say(f"\nplan: wrote {len(plan['targets'])} targets to {arguments.json}")


if __name__ == "__main__":
    stage.door(main)

r"""Start one training run on a Cloud TPU slice, or on hosts reached by ssh.

Prints the commands to read or paste; --go runs them. WORKDIR is gs://BUCKET/NAME, or a path that
every host sees. For SLURM, Kubernetes and SkyPilot, copy a file of launch/.

    jaxpt launch tpu-vm --name my-tpu --zone us-east5-a \
        --config my_recipe.py --workdir gs://my-bucket/mine
    jaxpt launch ssh --hosts a b c \
        --config my_recipe.py --workdir /shared/runs/mine --config.train.steps=1000 --go
"""

import argparse

from jaxpt import launch
from jaxpt.cli import options

# what a bucket needs: requirements-gcs.txt, requirements-s3.txt
REQUIREMENTS = {"gs://": "gcs", "s3://": "s3"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="tpu-vm|ssh")
    tpu_vm = kinds.add_parser("tpu-vm", help="every host of a Cloud TPU slice, with gcloud")
    tpu_vm.add_argument("--name", required=True, help="name of the TPU VM")
    tpu_vm.add_argument("--zone", required=True, help="zone of the TPU VM")
    ssh = kinds.add_parser("ssh", help="hosts that ssh reaches without a password")
    ssh.add_argument(
        "--hosts",
        required=True,
        nargs="+",
        action="extend",
        metavar="HOST",
        help="the first is the coordinator",
    )
    for kind in (tpu_vm, ssh):
        options.add_config(kind, help="a recipe inside this clone; its overrides are passed on")
        kind.add_argument(
            "--workdir",
            required=True,
            metavar="DIR",
            help="the run directory, as every host sees it",
        )
        kind.add_argument("--go", action="store_true", help="execute instead of printing")
        options.add_knobs(kind, ())


def run(arguments: argparse.Namespace) -> None:
    """Print the commands, or run them."""
    settings = options.load_settings(arguments)  # fail here, not on sixteen hosts
    named = f"{settings} {arguments.workdir}"
    buckets = [name for scheme, name in REQUIREMENTS.items() if scheme in named]
    train = launch.train_command(arguments.config, arguments.workdir, arguments.overrides)
    if arguments.kind == "tpu-vm":
        plan = launch.plan_tpu_vm(arguments.name, arguments.zone, train, buckets)
    else:
        plan = launch.plan_ssh(arguments.hosts, train, buckets)
    if arguments.go:
        launch.execute_launch(plan)
    else:
        print(launch.print_launch(plan))
    for action, command in plan.notes.items():
        print(f"# to {action} it: {command}")

r"""Start one training run on a Cloud TPU slice, or on hosts reached by ssh.

Prints the commands to read or paste; --go runs them. WORKDIR is gs://BUCKET/NAME, or a path that
every host sees. For SLURM, Kubernetes and SkyPilot, copy a file of launch/.

    jaxpt launch tpu-vm --name my-tpu --zone us-east5-a \
        --config my_recipe.py --workdir gs://my-bucket/mine
    jaxpt launch tpu-vm --name two --zone us-east5-a --accelerator v5p-128 --spot --slices 2 \
        --config my_recipe.py --workdir gs://my-bucket/mine --config.mesh.replica=2
    jaxpt launch ssh --hosts a b c \
        --config my_recipe.py --workdir /shared/runs/mine --config.train.steps=1000 --go
"""

import argparse
import logging

from jaxpt import launch
from jaxpt.cli import options
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

# what a bucket needs: requirements-gcs.txt, requirements-s3.txt
REQUIREMENTS = {"gs://": "gcs", "s3://": "s3"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="tpu-vm|ssh")
    tpu_vm = kinds.add_parser("tpu-vm", help="every host of a Cloud TPU slice, with gcloud")
    tpu_vm.add_argument("--name", required=True, help="name of the TPU VM")
    tpu_vm.add_argument("--zone", required=True, help="zone of the TPU VM")
    tpu_vm.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="slices NAME-0 to NAME-(N-1), joined along mesh.replica (default: the one NAME)",
    )
    tpu_vm.add_argument(
        "--accelerator", metavar="TYPE", help="queue for slices of this type first, such as v5p-128"
    )
    tpu_vm.add_argument("--spot", action="store_true", help="with --accelerator: spot capacity")
    tpu_vm.add_argument(
        "--reserved", action="store_true", help="with --accelerator: of the project's reservation"
    )
    tpu_vm.add_argument(
        "--valid-for",
        default="",
        metavar="DURATION",
        help="with --accelerator: leave the queue after this time, such as 6h",
    )
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
        kind.add_argument(
            "--env",
            nargs="+",
            action="extend",
            default=[],
            metavar="NAME",
            help="further environment variables to hand on, by name (without it: "
            f"{', '.join(launch.HANDED_ON)}, where they are set)",
        )
        kind.add_argument("--go", action="store_true", help="execute instead of printing")
        options.add_knobs(kind, ())


def run(arguments: argparse.Namespace) -> None:
    """Print the commands, or run them."""
    settings = options.load_settings(arguments)  # fail here, not on sixteen hosts
    named = f"{settings} {arguments.workdir}"
    buckets = [name for scheme, name in REQUIREMENTS.items() if scheme in named]
    train = launch.train_command(arguments.config, arguments.workdir, arguments.overrides)
    variables = launch.list_variables(arguments.env)
    if variables:
        log.info(f"handed on: {', '.join(variables)}")
    if arguments.kind == "tpu-vm":
        check_slices(arguments, settings.mesh.replica)
        plan = launch.plan_tpu_vm(
            arguments.name,
            arguments.zone,
            train,
            buckets,
            n_slices=arguments.slices,
            request=make_request(arguments),
            variables=variables,
        )
    else:
        plan = launch.plan_ssh(arguments.hosts, train, buckets, variables)
    if arguments.go:
        launch.execute_launch(plan)
    else:
        print(launch.print_launch(plan))
    for action, command in plan.notes.items():
        print(f"# to {action} it: {command}")


def check_slices(arguments: argparse.Namespace, n_replicas: int) -> None:
    """Raise UserError unless mesh.replica can join the slices."""
    n = arguments.slices
    if n < 1 or (n_replicas != -1 and n_replicas % n):
        raise UserError(
            f"--slices {n}: expected 1 or more, and mesh.replica (now {n_replicas}) a multiple of "
            f"it, along which slices are joined: --config.mesh.replica={max(n, 1)}."
        )


def make_request(arguments: argparse.Namespace) -> launch.TpuRequest | None:
    """Return the slices to queue for; None if they exist already."""
    given = (arguments.spot, arguments.reserved, arguments.valid_for)
    if arguments.accelerator:
        return launch.TpuRequest(arguments.accelerator, *given)
    if any(given):
        raise UserError(
            "launch tpu-vm: --spot, --reserved and --valid-for are of slices that are queued for. "
            "Add --accelerator TYPE, such as v5p-128."
        )
    return None

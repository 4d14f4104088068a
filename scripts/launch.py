"""Start one training run on many hosts: a Cloud TPU slice, a Kubernetes JobSet, a SLURM job, or hosts that ssh reaches.

Prints the files and commands, for you to read or paste; --go writes and runs them. WORKDIR is a path that every host sees.

    python scripts/launch.py tpu-vm --name my-tpu --zone us-east5-a --config my_recipe.py --workdir /mnt/runs/mine
    python scripts/launch.py gke --name mine --on v5p:4x4x4 --image REGISTRY/jaxpt --claim runs --config my_recipe.py --workdir /runs/mine
    python scripts/launch.py slurm --nodes 2 --gpus 8 --config my_recipe.py --workdir /shared/runs/mine
    python scripts/launch.py ssh --hosts a b c --config my_recipe.py --workdir /shared/runs/mine --config.train.steps=1000 --go
"""

import argparse
import pathlib
import sys

sys.path.insert(
    0, str(pathlib.Path(__file__).resolve().parent.parent)
)  # run from a clone without installing

from jaxpt import config, launch, stage


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="tpu-vm|gke|slurm|ssh")
    tpu_vm = kinds.add_parser("tpu-vm", help="every host of a Cloud TPU slice, by gcloud")
    tpu_vm.add_argument("--name", required=True, help="of the TPU VM")
    tpu_vm.add_argument("--zone", required=True, help="where it is")
    gke = kinds.add_parser("gke", help="a JobSet on TPU or GPU nodes, by docker and kubectl")
    gke.add_argument("--name", required=True, help="of the JobSet")
    gke.add_argument(
        "--on",
        required=True,
        metavar="CHIP:SIZE",
        help="hardware as plan.py names it: v5p:4x4x4, h100:16",
    )
    gke.add_argument(
        "--image", required=True, help="container image to build from this clone and to push"
    )
    gke.add_argument(
        "--claim",
        required=True,
        help="PersistentVolumeClaim that many pods may write, mounted on WORKDIR's parent",
    )
    slurm = kinds.add_parser(
        "slurm",
        help="a batch job of one task a node; SBATCH_PARTITION and the like are yours to set",
    )
    slurm.add_argument("--nodes", required=True, type=int, metavar="N", help="hosts")
    slurm.add_argument(
        "--gpus", required=True, type=int, metavar="N", help="on each of them; 0: train on CPUs"
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
    for kind in (tpu_vm, gke, slurm, ssh):
        kind.add_argument(
            "--config",
            required=True,
            metavar="FILE",
            help="a recipe inside this clone; --config.section.name=value is handed on",
        )
        kind.add_argument(
            "--workdir",
            required=True,
            metavar="DIR",
            help="the run directory, as every host sees it",
        )
        kind.add_argument("--go", action="store_true", help="do it, instead of printing it")
    arguments, rest = parser.parse_known_args()
    overrides = config.split_overrides(rest, parser)
    config.load_config(arguments.config, overrides)  # a slip is told here and not by sixteen hosts
    train = launch.train_command(arguments.config, arguments.workdir, overrides)
    if arguments.kind == "tpu-vm":
        recipe = launch.plan_tpu_vm(arguments.name, arguments.zone, train)
    elif arguments.kind == "gke":
        recipe = launch.plan_gke(
            arguments.name, arguments.on, arguments.image, arguments.claim, arguments.workdir, train
        )
    elif arguments.kind == "slurm":
        recipe = launch.plan_slurm(arguments.nodes, arguments.gpus, arguments.workdir, train)
    else:
        recipe = launch.plan_ssh(arguments.hosts, train)
    if arguments.go:
        launch.execute_launch(recipe)
    else:
        print(launch.print_launch(recipe))
    for what, command in recipe.notes.items():
        print(f"# to {what} it: {command}")


if __name__ == "__main__":
    stage.entry_point(main)

r"""Start one training run on several hosts.

They may be a Cloud TPU slice, a Kubernetes JobSet, a SLURM job, or hosts reached by ssh. Prints the
files and commands to read or paste; --go writes and runs them. WORKDIR is a path that every host
sees.

    python scripts/launch.py tpu-vm --name my-tpu --zone us-east5-a \
        --config my_recipe.py --workdir /mnt/runs/mine
    python scripts/launch.py gke --name mine --on v5p:4x4x4 --image REGISTRY/jaxpt --claim runs \
        --config my_recipe.py --workdir /runs/mine
    python scripts/launch.py slurm --nodes 2 --gpus 8 \
        --config my_recipe.py --workdir /shared/runs/mine
    python scripts/launch.py ssh --hosts a b c \
        --config my_recipe.py --workdir /shared/runs/mine --config.train.steps=1000 --go
"""

import argparse
import pathlib
import sys

# run from a clone without installing
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxpt import config, launch, stage

RAW = argparse.RawDescriptionHelpFormatter


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="tpu-vm|gke|slurm|ssh")
    tpu_vm = kinds.add_parser("tpu-vm", help="every host of a Cloud TPU slice, with gcloud")
    tpu_vm.add_argument("--name", required=True, help="name of the TPU VM")
    tpu_vm.add_argument("--zone", required=True, help="zone of the TPU VM")
    gke = kinds.add_parser("gke", help="a JobSet on TPU or GPU nodes, with docker and kubectl")
    gke.add_argument("--name", required=True, help="name of the JobSet")
    gke.add_argument(
        "--on",
        required=True,
        metavar="CHIP:SIZE",
        help="hardware, such as v5p:4x4x4 or h100:16",
    )
    gke.add_argument(
        "--image", required=True, help="container image to build from this clone and push"
    )
    gke.add_argument(
        "--claim",
        required=True,
        help="PersistentVolumeClaim (ReadWriteMany), mounted on WORKDIR's parent",
    )
    slurm = kinds.add_parser(
        "slurm",
        help="a batch job with one task per node; set SBATCH_PARTITION and the like yourself",
    )
    slurm.add_argument("--nodes", required=True, type=int, metavar="N", help="number of hosts")
    slurm.add_argument(
        "--gpus", required=True, type=int, metavar="N", help="GPUs per host; 0: train on CPUs"
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
            help="a recipe inside this clone; --config.section.name=value is passed on",
        )
        kind.add_argument(
            "--workdir",
            required=True,
            metavar="DIR",
            help="the run directory, as every host sees it",
        )
        kind.add_argument("--go", action="store_true", help="execute instead of printing")
    arguments, rest = parser.parse_known_args()
    overrides = config.split_overrides(rest, parser)
    config.load_config(arguments.config, overrides)  # fail here, not on sixteen hosts
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
    for action, command in recipe.notes.items():
        print(f"# to {action} it: {command}")


if __name__ == "__main__":
    stage.entry_point(main)

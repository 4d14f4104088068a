"""The same train command on many hosts.

What is written and what is run, for a Cloud TPU slice, Kubernetes, SLURM and plain ssh.

A recipe is a Launch: files, then phases of shell lines; the lines of a phase run at the same time.
`show` prints one so that it
can be pasted into a terminal, `go` does it. train.py joins the processes: see
jaxpt/train/distributed.py for what it looks at.
"""

from __future__ import annotations

import json
import logging
import math
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

from jaxpt import stage
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

ROOT = pathlib.Path(__file__).resolve().parent.parent
COORDINATOR_PORT = 8476  # where the first process waits for the others
# seconds between the notice that a pod must go and its end: a checkpoint of a large model takes
# minutes
GRACE_SECONDS = 600
MAX_RESTARTS = 20  # of a whole JobSet: each goes on from the newest checkpoint

# chip: (value of GKE's node label, devices that a host of several holds)
TPU_NODES = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
    "tpu7x": ("tpu7x", 4),
}
GPU_NODES = {
    "a100": ("nvidia-tesla-a100", 8),
    "a100-80gb": ("nvidia-a100-80gb", 8),
    "h100": ("nvidia-h100-80gb", 8),
    "h100-mega": ("nvidia-h100-mega-80gb", 8),
    "h200": ("nvidia-h200-141gb", 8),
    "b200": ("nvidia-b200", 8),
    "l4": ("nvidia-l4", 8),
}

# Everything that git would see, committed or not: the recipe that was just written belongs to it.
PACK_CLONE = "git ls-files -coz --exclude-standard | tar -cz --null -T -"
# Under a lock, for hosts that share a home. uv brings a Python of its own where the image's is
# older than 3.11, as that of many TPU images is.
SETUP_COMMANDS = (
    "set -e; mkdir -p jaxpt; cd jaxpt; exec 9>.lock; flock 9; tar -xz "
    "{archive}; test -e .venv/.installed || "
    "{{ rm -rf .venv .uv; python3 -m venv .uv; "
    ".uv/bin/python -m pip install -q uv; .uv/bin/uv venv -q --python 3.12 .venv; "
    ".uv/bin/uv pip install -q --python .venv/bin/python -r {requirements}; "
    "touch .venv/.installed; }}"
)


class LaunchPlan(NamedTuple):
    """Files to write and commands to run."""

    required_commands: tuple[str, ...]  # programs
    files: dict[str, str]
    phases: list[list[str]]
    notes: dict[str, str]  # what a person may want next: the command


def plan_tpu_vm(name: str, zone: str, train: list[str]) -> LaunchPlan:
    """Every host of a Cloud TPU slice that is there.

    The processes find each other through the slice's metadata.
    """
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]

    def everywhere(command: str, worker: str = "all") -> str:
        return shlex.join(
            [*gcloud, "ssh", name, f"--zone={zone}", f"--worker={worker}", f"--command={command}"]
        )

    copy = shlex.join(
        [*gcloud, "scp", "/tmp/jaxpt.tgz", f"{name}:jaxpt.tgz", f"--zone={zone}", "--worker=all"]
    )
    return LaunchPlan(
        required_commands=("gcloud", "git", "tar"),
        files={},
        phases=[
            [f"{PACK_CLONE} -f /tmp/jaxpt.tgz"],
            [copy],
            [
                everywhere(
                    SETUP_COMMANDS.format(
                        archive="-f ../jaxpt.tgz", requirements="requirements-tpu.txt"
                    )
                )
            ],
            [everywhere(detached_command(train))],
        ],
        notes={
            "see": everywhere("tail -n 40 -F jaxpt/train.log", "0"),
            "stop": everywhere(stop_command()),
        },
    )


def plan_ssh(hosts: list[str], train: list[str]) -> LaunchPlan:
    """Hosts that ssh reaches without a password.

    The first is the coordinator, by the name given here.
    """
    coordinator = f"{hosts[0].rpartition('@')[2]}:{COORDINATOR_PORT}"

    def on(host: str, command: str, *flags: str) -> str:
        return shlex.join(["ssh", *flags, host, command])

    def environment(i: int) -> str:
        return f"JAXPT_COORDINATOR={coordinator} JAXPT_PROCESSES={len(hosts)} JAXPT_PROCESS={i} "

    return LaunchPlan(
        required_commands=("ssh", "git", "tar"),
        files={},
        phases=[
            [
                f"{PACK_CLONE} | "
                + on(host, SETUP_COMMANDS.format(archive="", requirements="requirements-gpu.txt"))
                for host in hosts
            ],
            [
                on(host, detached_command(train, environment(i), f"-{i}"), "-n")
                for i, host in enumerate(hosts)
            ],
        ],
        notes={
            "see": on(hosts[0], "tail -n 40 -F jaxpt/train-0.log"),
            "stop": "; ".join(on(host, stop_command(f"-{i}")) for i, host in enumerate(hosts)),
        },
    )


def detached_command(train: list[str], environment: str = "", suffix: str = "") -> str:
    """A shell line that starts training in ~/jaxpt so that it outlives its connection, unless a run
    is going on there.
    """
    pid, log = f"train{suffix}.pid", f"train{suffix}.log"
    return (
        f"cd jaxpt && if kill -0 $(cat {pid}) 2>/dev/null; then echo "
        f'"$(hostname): a run is going on, process $(cat {pid}); stop it '
        'first" >&2; exit 1; fi; '
        f"{environment}nohup .venv/bin/python {shlex.join(train)} >>{log} "
        f"2>&1 </dev/null & echo $! >{pid}"
    )


def stop_command(suffix: str = "") -> str:
    """Return a command that sends SIGTERM: the run saves a checkpoint and ends, on all hosts."""
    return f"kill $(cat jaxpt/train{suffix}.pid)"


def plan_slurm(nodes: int, gpus: int, workdir: str, train: list[str]) -> LaunchPlan:
    """A batch script for the cluster whose shared disk holds this clone.

    Sbatch's own environment (SBATCH_PARTITION, ...) says the rest.
    """
    if nodes < 1 or gpus < 0:
        raise UserError(
            f"--nodes {nodes} --gpus {gpus}: expected at least one node, and "
            "0 or more GPUs on each."
        )
    name = pathlib.Path(workdir).name
    file = f"{workdir}/train.sbatch"
    python = shlex.quote(sys.executable)
    gpu_lines = (
        f"#SBATCH --gres=gpu:{gpus}\n"
        "# JAX takes a task for one GPU, its local id; this one has all of its node\n"
        f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}\n"
        if gpus
        else ""
    )
    script = f"""#!/bin/bash
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
# two minutes before the time limit, to the tasks and not to this shell: they save and end
#SBATCH --signal=TERM@120
{gpu_lines}
cd {shlex.quote(str(ROOT))}
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 {python} {shlex.join(train)}
status=$?
# 143 (or a shell's 0) and yet not finished: it was asked to stop, has saved, and goes on in the next turn
if {{ [ $status = 143 ] || [ $status = 0 ]; }} && [ ! -e {shlex.quote(workdir + "/manifest.json")} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
"""
    return LaunchPlan(
        required_commands=("sbatch",),
        files={file: script},
        phases=[
            [shlex.join(["sbatch", f"--job-name={name}", f"--output={workdir}/train-%j.log", file])]
        ],
        notes={
            "see": f"tail -n 40 -F {shlex.quote(workdir)}/train-*.log",
            # asked first, it has saved by the time that it is ended
            "stop": shlex.join(["scancel", "--signal=TERM", f"--name={name}"])
            + "; sleep 60; "
            + shlex.join(["scancel", f"--name={name}"]),
        },
    )


def plan_gke(
    name: str, target: str, image: str, claim: str, workdir: str, train: list[str]
) -> LaunchPlan:
    """A JobSet on a cluster that has the JobSet controller.

    `claim`, a volume that many pods may write, is mounted on workdir's parent.
    """
    file = f"runs/launch/{name}.yaml"
    requirements = (
        "requirements-gpu.txt" if target.partition(":")[0] in GPU_NODES else "requirements-tpu.txt"
    )
    build = [
        "docker",
        "build",
        "-t",
        image,
        "--build-arg",
        f"REQUIREMENTS={requirements}",
        "-f",
        "scripts/Dockerfile",
        "-",
    ]
    return LaunchPlan(
        required_commands=("docker", "kubectl", "git", "tar"),
        files={file: render_jobset(name, target, image, claim, workdir, train)},
        phases=[
            [f"{PACK_CLONE} | {shlex.join(build)}"],
            [f"docker push {shlex.quote(image)}"],
            [f"kubectl apply -f {file}"],
        ],
        notes={
            "see": f"kubectl logs -f -l jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0",
            "stop": f"kubectl delete jobset {name}",
        },
    )


def render_jobset(
    name: str, on: str, image: str, claim: str, workdir: str, train: list[str]
) -> str:
    """The YAML. Strings that a person chose are written as JSON, which YAML reads as it is."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(
            f"--name {name}: Kubernetes wants at most 40 small letters, "
            "digits and dashes, beginning with a letter."
        )
    parent = str(pathlib.PurePosixPath(workdir).parent)
    if parent == "/":
        raise UserError(
            f"--workdir {workdir}: its parent is where the volume is mounted, "
            f"and / cannot be. Use one such as /runs{workdir}."
        )
    hosts, devices, selector, resource = find_node_pool(on)
    # A shell is the pod's first process, so the notice to stop is handed on. Ended well and yet not
    # finished (it was asked to stop) is
    # a failure here: a pod that ends with 0 counts as done, and the set would not start it again.
    command = (
        f"python {shlex.join(train)} & child=$!; trap 'kill -TERM $child' "
        "TERM; wait $child || wait $child "
        f"&& {{ test -e {shlex.quote(workdir + '/manifest.json')} || exit 75; }}"
    )
    command = json.dumps(
        command.replace("$", "$$"), ensure_ascii=False
    )  # Kubernetes reads $(NAME) itself, and $$ as a dollar
    gpu = resource == "nvidia.com/gpu"
    joined = f"""
                  env:
                    - {{name: JAXPT_COORDINATOR, value: "{name}-hosts-0-0.{name}:{COORDINATOR_PORT}"}}
                    - {{name: JAXPT_PROCESSES, value: "{hosts}"}}
                    - name: JAXPT_PROCESS
                      valueFrom: {{fieldRef: {{fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}}}"""
    shared_memory = (
        "\n                    - {name: memory, mountPath: /dev/shm}",
        "\n                - {name: memory, emptyDir: {medium: Memory}}",
    )
    return f"""apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}{"" if gpu else EXCLUSIVE_TOPOLOGY}
spec:
  failurePolicy:
    maxRestarts: {MAX_RESTARTS}
  replicatedJobs:
    - name: hosts
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: {hosts}
          parallelism: {hosts}
          backoffLimit: 0  # one host down: the set restarts all of them
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: {GRACE_SECONDS}
              nodeSelector: {json.dumps(selector)}
              containers:
                - name: train
                  image: {json.dumps(image)}
                  command: ["bash", "-c", {command}]
                  resources: {{limits: {{{resource}: {devices}}}}}{joined if gpu and hosts > 1 else ""}
                  volumeMounts:
                    - {{name: runs, mountPath: {json.dumps(parent)}}}{shared_memory[0] if gpu else ""}
              volumes:
                - {{name: runs, persistentVolumeClaim: {{claimName: {json.dumps(claim)}}}}}{shared_memory[1] if gpu else ""}
"""


# a slice is one node pool, and belongs to one job alone
EXCLUSIVE_TOPOLOGY = (
    "\n  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}"
)


def find_node_pool(on: str) -> tuple[int, int, dict[str, str], str]:
    """ "v5p:4x4x4" or "h100:16" -> hosts, devices of each, node labels, and the resource that they
    are asked as.
    """
    chip, _, size = on.partition(":")
    if chip in TPU_NODES and re.fullmatch(r"\d+x\d+(x\d+)?", size):
        label, each = TPU_NODES[chip]
        n = math.prod(map(int, size.split("x")))
        if chip in ("v5e", "v6e") and n == 8:
            each = 8  # the one machine type that holds a slice of eight
        selector = {
            "cloud.google.com/gke-tpu-accelerator": label,
            "cloud.google.com/gke-tpu-topology": size,
        }
        resource = "google.com/tpu"
    elif chip in GPU_NODES and size.isdigit() and int(size):
        label, each = GPU_NODES[chip]
        n, selector, resource = (
            int(size),
            {"cloud.google.com/gke-accelerator": label},
            "nvidia.com/gpu",
        )
    else:
        raise UserError(
            f"--on {on}: expected CHIP:TOPOLOGY ({', '.join(TPU_NODES)}), "
            f"such as v5p:4x4x4, or CHIP:COUNT ({', '.join(GPU_NODES)}), such "
            "as h100:16."
        )
    if n > each and n % each:
        raise UserError(f"--on {on}: {n} devices are no whole number of hosts of {each}.")
    return max(n // each, 1), min(n, each), selector, resource


# ---- what every recipe asks of the train command


def train_command(config: str, workdir: str, overrides: list[str]) -> list[str]:
    """Words after `python`, from the clone's root.

    Raises UserError where hosts would not find what the command names.
    """
    name, colon, argument = config.partition(":")
    file = pathlib.Path(name).resolve()
    if not file.is_relative_to(ROOT):
        raise UserError(
            f"--config {config}: lies outside {ROOT}, so the other hosts "
            "would not have it. Put it into the clone."
        )
    stage.local_path(workdir)
    if not pathlib.PurePosixPath(workdir).is_absolute():
        raise UserError(
            f"--workdir {workdir}: expected an absolute path, a disk or mount "
            "that every host sees under this name."
        )
    return [
        "scripts/train.py",
        "--config",
        f"{file.relative_to(ROOT)}{colon}{argument}",
        "--workdir",
        workdir,
        *overrides,
    ]


# ---- doing it


def print_launch(launch: LaunchPlan) -> str:
    """As text for a terminal in the clone's root."""
    lines = []
    for path, text in launch.files.items():
        folder = shlex.quote(str(pathlib.PurePosixPath(path).parent))
        lines.append(
            f"mkdir -p {folder} && cat >{shlex.quote(path)} <<'END_OF_FILE'\n{text}END_OF_FILE"
        )
    for phase in launch.phases:
        lines += [f"{command} &" for command in phase] + ["wait"] if len(phase) > 1 else phase
    return "\n".join(lines)


def execute_launch(launch: LaunchPlan) -> None:
    """Write the files and run the phases.

    Raises UserError for a program that is not here and for a command that failed.
    """
    for program in launch.required_commands:
        if not shutil.which(program):
            raise UserError(
                f"{program}: not on this machine's PATH. Install it, or leave "
                "out --go and take what is printed to a machine that has it."
            )
    for path, text in launch.files.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        stage.write_atomic(ROOT / path, text)
    for phase in launch.phases:
        for command in phase:
            log.info(command)
        running = [
            subprocess.Popen(["bash", "-o", "pipefail", "-c", command], cwd=ROOT)
            for command in phase
        ]
        failed = [
            command for command, process in zip(phase, running, strict=True) if process.wait()
        ]
        if failed:
            raise UserError(f"failed, and nothing after it was started: {failed[0]}")

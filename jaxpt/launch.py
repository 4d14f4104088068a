"""Start one train command on many hosts: a Cloud TPU slice, Kubernetes, SLURM or plain ssh.

A LaunchPlan is files, then phases of shell lines; the lines of a phase run at the same time.
`print_launch` writes one for pasting into a terminal, `execute_launch` runs it. train.py joins the
processes: jaxpt/train/distributed.py.
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
# seconds from a pod's notice to its end: a checkpoint of a large model takes minutes
GRACE_SECONDS = 600
MAX_RESTARTS = 20  # of a whole JobSet: each continues from the newest checkpoint


class NodeKind(NamedTuple):
    """Hosts with one kind of accelerator."""

    label: str  # value of GKE's node label
    n_devices: int  # of a host, where there are several hosts


TPU_NODES = {
    "v4": NodeKind("tpu-v4-podslice", 4),
    "v5e": NodeKind("tpu-v5-lite-podslice", 4),
    "v5p": NodeKind("tpu-v5p-slice", 4),
    "v6e": NodeKind("tpu-v6e-slice", 4),
    "tpu7x": NodeKind("tpu7x", 4),
}
GPU_NODES = {
    "a100": NodeKind("nvidia-tesla-a100", 8),
    "a100-80gb": NodeKind("nvidia-a100-80gb", 8),
    "h100": NodeKind("nvidia-h100-80gb", 8),
    "h100-mega": NodeKind("nvidia-h100-mega-80gb", 8),
    "h200": NodeKind("nvidia-h200-141gb", 8),
    "b200": NodeKind("nvidia-b200", 8),
    "l4": NodeKind("nvidia-l4", 8),
}

# what git sees, committed or not: the recipe that was just written belongs to it
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
    """Files to write and commands to run.

    Attributes:
        required_commands: programs that must be on the PATH.
        files: path below the clone, or absolute -> content.
        phases: shell lines; those of a phase run at the same time.
        notes: what a user may want to do next ("see", "stop") -> command.
    """

    required_commands: tuple[str, ...]
    files: dict[str, str]
    phases: list[list[str]]
    notes: dict[str, str]


def plan_tpu_vm(name: str, zone: str, train: list[str]) -> LaunchPlan:
    """Return a plan for all hosts of an existing Cloud TPU slice.

    The processes find each other through the slice's metadata.
    """
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]

    def on_workers(command: str, worker: str = "all") -> str:
        flags = [f"--zone={zone}", f"--worker={worker}", f"--command={command}"]
        return shlex.join([*gcloud, "ssh", name, *flags])

    archive = "/tmp/jaxpt.tgz"
    copy = [*gcloud, "scp", archive, f"{name}:jaxpt.tgz", f"--zone={zone}", "--worker=all"]
    setup = format_setup("requirements-tpu.txt", "-f ../jaxpt.tgz")
    phases = [
        [f"{PACK_CLONE} -f {archive}"],
        [shlex.join(copy)],
        [on_workers(setup)],
        [on_workers(detached_command(train))],
    ]
    notes = {
        "see": on_workers("tail -n 40 -F jaxpt/train.log", "0"),
        "stop": on_workers(stop_command()),
    }
    return LaunchPlan(("gcloud", "git", "tar"), {}, phases, notes)


def plan_ssh(hosts: list[str], train: list[str]) -> LaunchPlan:
    """Return a plan for hosts that ssh reaches without a password.

    The first is the coordinator, which the others reach by the name given here.
    """
    coordinator = f"{hosts[0].rpartition('@')[2]}:{COORDINATOR_PORT}"
    processes = f"JAXPT_COORDINATOR={coordinator} JAXPT_PROCESSES={len(hosts)}"

    def on_host(host: str, command: str, *flags: str) -> str:
        return shlex.join(["ssh", *flags, host, command])

    setup = format_setup("requirements-gpu.txt")
    copies, starts, stops = [], [], []
    for i, host in enumerate(hosts):
        start = detached_command(train, f"{processes} JAXPT_PROCESS={i} ", f"-{i}")
        copies.append(f"{PACK_CLONE} | {on_host(host, setup)}")
        starts.append(on_host(host, start, "-n"))
        stops.append(on_host(host, stop_command(f"-{i}")))
    see = on_host(hosts[0], "tail -n 40 -F jaxpt/train-0.log")
    notes = {"see": see, "stop": "; ".join(stops)}
    return LaunchPlan(("ssh", "git", "tar"), {}, [copies, starts], notes)


def format_setup(requirements: str, archive: str = "") -> str:
    """Return the shell line that unpacks the clone in ~/jaxpt and installs its requirements.

    Args:
        requirements: the file of requirements.
        archive: tar's flags for the packed clone; "": it comes on stdin.
    """
    return SETUP_COMMANDS.format(archive=archive, requirements=requirements)


def detached_command(train: list[str], environment: str = "", suffix: str = "") -> str:
    """Return a shell line that starts training in ~/jaxpt, unless a run is active there.

    The run outlives the connection.
    """
    pid, log_file = f"train{suffix}.pid", f"train{suffix}.log"
    return (
        f"cd jaxpt && if kill -0 $(cat {pid}) 2>/dev/null; then echo "
        f'"$(hostname): a run is active, process $(cat {pid}); stop it first" >&2; exit 1; fi; '
        f"{environment}nohup .venv/bin/python {shlex.join(train)} >>{log_file} "
        f"2>&1 </dev/null & echo $! >{pid}"
    )


def stop_command(suffix: str = "") -> str:
    """Return a command that sends SIGTERM: the run saves a checkpoint and ends, on all hosts."""
    return f"kill $(cat jaxpt/train{suffix}.pid)"


def plan_slurm(nodes: int, gpus: int, workdir: str, train: list[str]) -> LaunchPlan:
    """Return a batch script for the cluster whose shared disk holds this clone.

    Partition, account and the like come from sbatch's own environment (SBATCH_PARTITION, ...).
    """
    if nodes < 1 or gpus < 0:
        raise UserError(
            f"--nodes {nodes} --gpus {gpus}: expected at least one node, and 0 or more GPUs on "
            "each."
        )
    gpu_lines = ""
    if gpus:
        ids = ",".join(map(str, range(gpus)))
        gpu_lines = (
            f"#SBATCH --gres=gpu:{gpus}\n"
            "# JAX takes a task for one GPU, its local id; this one has all of its node\n"
            f"export JAX_LOCAL_DEVICE_IDS={ids}\n"
        )
    python = f"{shlex.quote(sys.executable)} {shlex.join(train)}"
    was_stopped = "[ $status = 143 ] || [ $status = 0 ]"
    is_unfinished = f"[ ! -e {shlex.quote(workdir + '/manifest.json')} ]"
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
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 {python}
status=$?
# 143 (or a shell's 0) and yet not finished: it was asked to stop, has saved, and continues when
# it is scheduled again
if {{ {was_stopped}; }} && {is_unfinished}; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
"""
    name = pathlib.Path(workdir).name
    file = f"{workdir}/train.sbatch"
    submit = ["sbatch", f"--job-name={name}", f"--output={workdir}/train-%j.log", file]
    # asked first, it has saved by the time that it is ended
    ask = shlex.join(["scancel", "--signal=TERM", f"--name={name}"])
    end = shlex.join(["scancel", f"--name={name}"])
    notes = {
        "see": f"tail -n 40 -F {shlex.quote(workdir)}/train-*.log",
        "stop": f"{ask}; sleep 60; {end}",
    }
    return LaunchPlan(("sbatch",), {file: script}, [[shlex.join(submit)]], notes)


def plan_gke(
    name: str, target: str, image: str, claim: str, workdir: str, train: list[str]
) -> LaunchPlan:
    """Return a JobSet for a cluster that has the JobSet controller.

    Args:
        name: of the JobSet.
        target: hardware, see `find_node_pool`.
        image: name of the image, built and pushed first.
        claim: volume that many pods may write, mounted on workdir's parent.
        workdir: the run directory.
        train: from `train_command`.
    """
    file = f"runs/launch/{name}.yaml"
    is_gpu = target.partition(":")[0] in GPU_NODES
    requirements = "requirements-gpu.txt" if is_gpu else "requirements-tpu.txt"
    build = ["docker", "build", "-t", image, "--build-arg", f"REQUIREMENTS={requirements}"]
    build += ["-f", "scripts/Dockerfile", "-"]
    phases = [
        [f"{PACK_CLONE} | {shlex.join(build)}"],
        [f"docker push {shlex.quote(image)}"],
        [f"kubectl apply -f {file}"],
    ]
    labels = f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0"
    notes = {
        "see": f"kubectl logs -f -l {labels}",
        "stop": f"kubectl delete jobset {name}",
    }
    files = {file: render_jobset(name, target, image, claim, workdir, train)}
    return LaunchPlan(("docker", "kubectl", "git", "tar"), files, phases, notes)


def render_jobset(
    name: str, target: str, image: str, claim: str, workdir: str, train: list[str]
) -> str:
    """Return the YAML. A user's strings are written as JSON, which YAML reads as it is."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(
            f"--name {name}: expected at most 40 small letters, digits and dashes, beginning with "
            "a letter, as Kubernetes requires."
        )
    parent = str(pathlib.PurePosixPath(workdir).parent)
    if parent == "/":
        raise UserError(
            f"--workdir {workdir}: its parent is where the volume is mounted, and / cannot be. "
            f"Use one such as /runs{workdir}."
        )
    pool = find_node_pool(target)
    # a slice is one node pool, and belongs to one job alone
    annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
    exclusive = f"\n  annotations: {{{annotation}}}"
    environment = mount = volume = ""
    if pool.is_gpu:
        exclusive = ""
        mount = "\n                    - {name: memory, mountPath: /dev/shm}"
        volume = "\n                - {name: memory, emptyDir: {medium: Memory}}"
        if pool.n_hosts > 1:
            environment = render_environment(name, pool.n_hosts)
    claim_source = f"persistentVolumeClaim: {{claimName: {json.dumps(claim)}}}"
    command = render_pod_command(workdir, train)
    return f"""apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}{exclusive}
spec:
  failurePolicy:
    maxRestarts: {MAX_RESTARTS}
  replicatedJobs:
    - name: hosts
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: {pool.n_hosts}
          parallelism: {pool.n_hosts}
          backoffLimit: 0  # one host down: the set restarts all of them
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: {GRACE_SECONDS}
              nodeSelector: {json.dumps(pool.selector)}
              containers:
                - name: train
                  image: {json.dumps(image)}
                  command: ["bash", "-c", {command}]
                  resources: {{limits: {{{pool.resource}: {pool.n_devices}}}}}{environment}
                  volumeMounts:
                    - {{name: runs, mountPath: {json.dumps(parent)}}}{mount}
              volumes:
                - {{name: runs, {claim_source}}}{volume}
"""


def render_pod_command(workdir: str, train: list[str]) -> str:
    """Return a pod's shell line as JSON.

    A shell is the pod's first process, so it passes the notice to stop on. A run that ended well
    and yet is not finished (it was asked to stop) is a failure here: a pod that ends with 0 counts
    as done, and the set would not start it again.
    """
    manifest = shlex.quote(workdir + "/manifest.json")
    command = (
        f"python {shlex.join(train)} & child=$!; trap 'kill -TERM $child' TERM; "
        f"wait $child || wait $child && {{ test -e {manifest} || exit 75; }}"
    )
    # Kubernetes reads $(NAME) itself, and $$ as a dollar
    return json.dumps(command.replace("$", "$$"), ensure_ascii=False)


def render_environment(name: str, n_hosts: int) -> str:
    """Return the variables by which the processes of GPU pods find each other."""
    coordinator = f"{name}-hosts-0-0.{name}:{COORDINATOR_PORT}"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return f"""
                  env:
                    - {{name: JAXPT_COORDINATOR, value: "{coordinator}"}}
                    - {{name: JAXPT_PROCESSES, value: "{n_hosts}"}}
                    - name: JAXPT_PROCESS
                      valueFrom: {{fieldRef: {{fieldPath: "{index}"}}}}"""


class NodePool(NamedTuple):
    """The hosts of a JobSet."""

    n_hosts: int
    n_devices: int  # per host
    selector: dict[str, str]  # node labels
    resource: str  # Kubernetes' name of the devices

    @property
    def is_gpu(self) -> bool:
        """Return whether the devices are GPUs."""
        return self.resource == "nvidia.com/gpu"


def find_node_pool(target: str) -> NodePool:
    """Return the hosts for a target such as "v5p:4x4x4" or "h100:16"."""
    chip, _, size = target.partition(":")
    if chip in TPU_NODES and re.fullmatch(r"\d+x\d+(x\d+)?", size):
        label, per_host = TPU_NODES[chip]
        n_devices = math.prod(map(int, size.split("x")))
        if chip in ("v5e", "v6e") and n_devices == 8:
            per_host = 8  # the one machine type that holds a slice of eight
        selector = {"cloud.google.com/gke-tpu-accelerator": label}
        selector["cloud.google.com/gke-tpu-topology"] = size
        resource = "google.com/tpu"
    elif chip in GPU_NODES and size.isdigit() and int(size):
        label, per_host = GPU_NODES[chip]
        n_devices = int(size)
        selector = {"cloud.google.com/gke-accelerator": label}
        resource = "nvidia.com/gpu"
    else:
        raise UserError(
            f"--on {target}: expected CHIP:TOPOLOGY ({', '.join(TPU_NODES)}), such as v5p:4x4x4, "
            f"or CHIP:COUNT ({', '.join(GPU_NODES)}), such as h100:16."
        )
    if n_devices > per_host and n_devices % per_host:
        raise UserError(
            f"--on {target}: expected whole hosts of {per_host} devices, got {n_devices} devices."
        )
    n_hosts = max(n_devices // per_host, 1)
    return NodePool(n_hosts, min(n_devices, per_host), selector, resource)


def train_command(config: str, workdir: str, overrides: list[str]) -> list[str]:
    """Return the words after `python`, to be run in the clone's root.

    Raises:
        UserError: other hosts would not find what the command names.
    """
    name, colon, argument = config.partition(":")
    file = pathlib.Path(name).resolve()
    if not file.is_relative_to(ROOT):
        raise UserError(
            f"--config {config}: lies outside {ROOT}, so the other hosts would not have it. "
            "Put it into the clone."
        )
    stage.local_path(workdir)
    if not pathlib.PurePosixPath(workdir).is_absolute():
        raise UserError(
            f"--workdir {workdir}: expected an absolute path, a disk or mount that every host sees "
            "under this name."
        )
    recipe = f"{file.relative_to(ROOT)}{colon}{argument}"
    return ["scripts/train.py", "--config", recipe, "--workdir", workdir, *overrides]


# ---- carrying a plan out


def print_launch(launch: LaunchPlan) -> str:
    """Return the plan as text for a terminal in the clone's root."""
    lines = []
    for path, text in launch.files.items():
        folder = shlex.quote(str(pathlib.PurePosixPath(path).parent))
        write = f"cat >{shlex.quote(path)} <<'END_OF_FILE'\n{text}END_OF_FILE"
        lines.append(f"mkdir -p {folder} && {write}")
    for phase in launch.phases:
        if len(phase) > 1:
            lines += [f"{command} &" for command in phase]
            lines.append("wait")
        else:
            lines += phase
    return "\n".join(lines)


def execute_launch(launch: LaunchPlan) -> None:
    """Write the files and run the phases.

    Raises:
        UserError: a program is not installed, or a command failed.
    """
    for program in launch.required_commands:
        if not shutil.which(program):
            raise UserError(
                f"{program}: not on this machine's PATH. Install it, or leave out --go and run "
                "what is printed on a machine that has it."
            )
    for path, text in launch.files.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        stage.write_atomic(ROOT / path, text)
    for phase in launch.phases:
        processes = []
        for command in phase:
            log.info(command)
            shell = ["bash", "-o", "pipefail", "-c", command]
            processes.append(subprocess.Popen(shell, cwd=ROOT))
        statuses = [process.wait() for process in processes]
        for command, status in zip(phase, statuses, strict=True):
            if status:
                raise UserError(f"failed, and nothing after it was started: {command}")

"""Start one train command on many hosts: a Cloud TPU slice, or hosts reached by ssh.

A LaunchPlan is phases of shell lines; the lines of a phase run at the same time. `print_launch`
writes one for pasting into a terminal, `execute_launch` runs it. Training joins the processes:
jaxpt/train/distributed.py. For SLURM, Kubernetes and SkyPilot there are files to copy in launch/.
"""

from __future__ import annotations

import logging
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from jaxpt import io
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

ROOT = pathlib.Path(__file__).resolve().parent.parent
COORDINATOR_PORT = 8476  # where the first process waits for the others

# what git sees, committed or not: the recipe that was just written belongs to it
PACK_CLONE = "git ls-files -coz --exclude-standard | tar -cz --null -T -"
# this boot, and when a process began in it (clock ticks; after the name, which may have spaces)
IDENTIFY = (
    "identify() { [ -r /proc/$1/stat ] && cat /proc/sys/kernel/random/boot_id && "
    "sed 's/.*) //' /proc/$1/stat | cut -d ' ' -f 20; } 2>/dev/null"
)
# Under a lock, for hosts that share a home. uv brings a Python of its own where the image's is
# older than 3.11, as that of many TPU images is.
SETUP_COMMANDS = (
    "set -e; mkdir -p jaxpt; cd jaxpt; exec 9>.lock; flock 9; tar -xz "
    "{archive}; grep -sqxF -e '{requirements}' .venv/.installed || "
    "{{ rm -rf .venv .uv; python3 -m venv .uv; "
    ".uv/bin/python -m pip install -q uv; .uv/bin/uv venv -q --python 3.12 .venv; "
    ".uv/bin/uv pip install -q --python .venv/bin/python {requirements} -e .; "
    "echo '{requirements}' >.venv/.installed; }}"
)


class LaunchPlan(NamedTuple):
    """Commands to run.

    Attributes:
        required_commands: programs that must be on the PATH.
        phases: shell lines; those of a phase run at the same time.
        notes: what a user may want to do next ("see", "stop") -> command.
    """

    required_commands: tuple[str, ...]
    phases: list[list[str]]
    notes: dict[str, str]


def plan_tpu_vm(name: str, zone: str, train: list[str], buckets: Sequence[str] = ()) -> LaunchPlan:
    """Return a plan for all hosts of an existing Cloud TPU slice.

    The processes find each other through the slice's metadata.

    Args:
        name: of the TPU VM.
        zone: of the TPU VM.
        train: the words after `jaxpt`.
        buckets: requirements of the buckets that the run reads or writes, "gcs" or "s3".
    """
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]

    def on_workers(command: str, worker: str = "all") -> str:
        flags = [f"--zone={zone}", f"--worker={worker}", f"--command={command}"]
        return shlex.join([*gcloud, "ssh", name, *flags])

    copy = [*gcloud, "scp", "ARCHIVE", f"{name}:jaxpt.tgz", f"--zone={zone}", "--worker=all"]
    copy_clone = shlex.join(copy).replace("ARCHIVE", '"$archive"')
    setup = format_setup(["tpu", *buckets], "-f ../jaxpt.tgz")
    # in one line: a file that only this user can read, gone afterwards
    make_archive = "archive=$(mktemp) && trap 'rm -f \"$archive\"' EXIT"
    phases = [
        [f'({make_archive} && {PACK_CLONE} -f "$archive" && {copy_clone})'],
        [on_workers(setup)],
        [on_workers(detached_command(train))],
    ]
    notes = {
        "see": on_workers("tail -n 40 -F jaxpt/train.log", "0"),
        "stop": on_workers(stop_command()),
    }
    return LaunchPlan(("gcloud", "git", "tar"), phases, notes)


def plan_ssh(hosts: list[str], train: list[str], buckets: Sequence[str] = ()) -> LaunchPlan:
    """Return a plan for hosts that ssh reaches without a password.

    The first is the coordinator, which the others reach by the name given here. For the other
    arguments see `plan_tpu_vm`.
    """
    for host in hosts:
        if not host or re.search(r"[,\s:/]", host):
            names = [name for name in re.split(r"[,\s]+", " ".join(hosts)) if name]
            raise UserError(
                f"--hosts {' '.join(hosts)}: {host!r} is no host that ssh reaches. Separate hosts "
                f"by spaces: --hosts {' '.join(names)}."
            )
    coordinator = f"{hosts[0].rpartition('@')[2]}:{COORDINATOR_PORT}"
    processes = f"JAXPT_COORDINATOR={coordinator} JAXPT_PROCESSES={len(hosts)}"

    def on_host(host: str, command: str, *flags: str) -> str:
        return shlex.join(["ssh", *flags, host, command])

    setup = format_setup(["gpu", *buckets])
    copies, starts, stops = [], [], []
    for i, host in enumerate(hosts):
        start = detached_command(train, f"{processes} JAXPT_PROCESS={i} ", f"-{i}")
        copies.append(f"{PACK_CLONE} | {on_host(host, setup)}")
        starts.append(on_host(host, start, "-n"))
        stops.append(on_host(host, stop_command(f"-{i}")))
    see = on_host(hosts[0], "tail -n 40 -F jaxpt/train-0.log")
    notes = {"see": see, "stop": "; ".join(stops)}
    return LaunchPlan(("ssh", "git", "tar"), [copies, starts], notes)


def format_setup(kinds: list[str], archive: str = "") -> str:
    """Return the shell line that unpacks the clone in ~/jaxpt and installs its requirements.

    Args:
        kinds: of requirements, such as "tpu" and "gcs".
        archive: tar's flags for the packed clone; "": it comes on stdin.
    """
    requirements = " ".join(f"-r requirements-{kind}.txt" for kind in kinds)
    return SETUP_COMMANDS.format(archive=archive, requirements=requirements)


def detached_command(train: list[str], environment: str = "", suffix: str = "") -> str:
    """Return a shell line that starts training in ~/jaxpt, unless a run is active there.

    The run outlives the connection. Beside its number, which another process may have after a
    reboot, train.start holds when it began.
    """
    pid, start, log_file = f"train{suffix}.pid", f"train{suffix}.start", f"train{suffix}.log"
    return (
        f"cd jaxpt && {IDENTIFY} && if {is_active_command(suffix)}; then echo "
        f'"$(hostname): a run is active, process $(cat {pid}); stop it first" >&2; exit 1; fi; '
        f"{environment}nohup .venv/bin/jaxpt {shlex.join(train)} >>{log_file} "
        f"2>&1 </dev/null & echo $! >{pid}; identify $! >{start}"
    )


def is_active_command(suffix: str) -> str:
    """Return a command that succeeds if the process of train.pid is the one that was started."""
    pid, start = f"train{suffix}.pid", f"train{suffix}.start"
    return f'[ -s {start} ] && [ "$(identify $(cat {pid}))" = "$(cat {start})" ]'


def stop_command(suffix: str = "") -> str:
    """Return a command that sends SIGTERM: the run saves a checkpoint and ends, on all hosts."""
    return (
        f"cd jaxpt && {IDENTIFY} && if {is_active_command(suffix)}; then "
        f'kill $(cat train{suffix}.pid); else echo "$(hostname): no run is active" >&2; fi'
    )


def train_command(config: str, workdir: str, overrides: Sequence[str]) -> list[str]:
    """Return the words after `jaxpt`, to be run in the clone's root.

    Raises:
        UserError: other hosts would not find what the command names.
    """
    if not (ROOT / "pyproject.toml").is_file():
        raise UserError(
            "launch: jaxpt was not installed from a clone, which is what the hosts are sent. "
            "Use: pip install -e PATH_OF_CLONE."
        )
    name, colon, argument = config.partition(":")
    file = pathlib.Path(name).resolve()
    if not file.is_relative_to(ROOT):
        raise UserError(
            f"--config {config}: lies outside {ROOT}, so the other hosts would not have it. "
            "Put it into the clone."
        )
    place = io.path(workdir)
    if isinstance(place, io.BucketPath) and place.scheme == "s3":
        raise UserError(
            f"--workdir {workdir}: only one process can save checkpoints to s3://, and launch is "
            "for several. Give gs://BUCKET/NAME, or a disk that all hosts share."
        )
    if isinstance(place, pathlib.Path) and not place.is_absolute():
        raise UserError(
            f"--workdir {workdir}: expected gs://BUCKET/NAME, or an absolute path of a disk or "
            "mount that every host sees under this name."
        )
    recipe = f"{file.relative_to(ROOT)}{colon}{argument}"
    return ["train", "--config", recipe, "--workdir", workdir, *overrides]


# ---- carrying a plan out


def print_launch(launch: LaunchPlan) -> str:
    """Return the plan as text for a terminal in the clone's root."""
    lines = []
    for phase in launch.phases:
        if len(phase) > 1:
            lines += [f"{command} &" for command in phase]
            lines.append("wait")
        else:
            lines += phase
    return "\n".join(lines)


def execute_launch(launch: LaunchPlan) -> None:
    """Run the phases.

    Raises:
        UserError: a program is not installed, or a command failed.
    """
    for program in launch.required_commands:
        if not shutil.which(program):
            raise UserError(
                f"{program}: not on this machine's PATH. Install it, or leave out --go and run "
                "what is printed on a machine that has it."
            )
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

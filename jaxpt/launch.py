"""Start one train command on many hosts: a Cloud TPU slice, or hosts reached by ssh.

A LaunchPlan is phases of shell lines; the lines of a phase run at the same time: nothing may run
there, the clone and its environment are copied, then training starts. `print_launch` writes a plan
for pasting into a terminal, `execute_launch` runs it. Training joins the processes:
jaxpt/train/distributed.py. For SLURM, Kubernetes and SkyPilot there are files to copy in launch/.
"""

from __future__ import annotations

import logging
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from jaxpt import io, stage
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

ROOT = pathlib.Path(__file__).resolve().parent.parent
COORDINATOR_PORT = 8476  # where the first process waits for the others

# what git sees, committed or not: the recipe that was just written belongs to it; what was removed
# and not committed yet is listed too
PACK_CLONE = (
    "git ls-files -coz --exclude-standard | "
    'xargs -0 sh -c \'for name; do [ ! -e "$name" ] || printf "%s\\0" "$name"; done\' sh | '
    "tar -cz --null -T -"
)
# variables that are handed on where they are set here, besides those of --env
HANDED_ON = ("HF_TOKEN", "WANDB_API_KEY", "JAXPT_WEBHOOK")
HANDED_ON += ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL")  # a user's own win there
HANDED_ON += ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# values go through a pipe into a file that others cannot read: neither a command line nor this
# machine's terminal shows them
PRINT_VARIABLES = (
    'python3 -c \'import os, shlex, sys; [print("export", name + "=" + '
    "shlex.quote(os.environ[name])) for name in sys.argv[1:]]' {names}"
)
# this boot, and when a process began in it (clock ticks; after the name, which may have spaces)
IDENTIFY = (
    "identify() { [ -r /proc/$1/stat ] && cat /proc/sys/kernel/random/boot_id && "
    "sed 's/.*) //' /proc/$1/stat | cut -d ' ' -f 20; } 2>/dev/null"
)
# what was installed, and from which requirements
STAMP = "{requirements} $(cat pyproject.toml requirements*.txt | cksum)"
# Under a lock, for hosts that share a home. Files of the last launch that this one lacks are
# removed. uv brings a Python of its own where the image's is older than 3.11, as that of many TPU
# images is.
SETUP_COMMANDS = (
    "set -e; mkdir -p jaxpt; cd jaxpt; exec 9>.lock; flock 9; touch .files; "
    "tar -xzv --quoting-style=literal {archive} >.files.new; "
    "sort .files .files.new .files.new | uniq -u | tr '\\n' '\\0' | xargs -0 rm -f --; "
    'mv .files.new .files; stamp="{stamp}"; '
    '[ "$stamp" = "$(cat .venv/.installed 2>/dev/null)" ] || '
    "{{ rm -rf .venv .uv; python3 -m venv .uv; "
    ".uv/bin/python -m pip install -q uv; .uv/bin/uv venv -q --python 3.12 .venv; "
    ".uv/bin/uv pip install -q --python .venv/bin/python {requirements} -e .; "
    'echo "$stamp" >.venv/.installed; }}'
)
GCLOUD = ("gcloud", "compute", "tpus")
# of a TPU VM's image, by the accelerator type's first part
TPU_RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
WAIT_UNTIL_ACTIVE = (
    "while :; do state=$({describe}) || exit 1; case $state in ACTIVE) break;; "
    'FAILED|SUSPEND*|DELETING) echo "{name}: $state" >&2; exit 1;; esac; sleep 30; done'
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


class TpuRequest(NamedTuple):
    """TPU slices to be made by a queued resource.

    Attributes:
        accelerator: type of each slice, such as v5p-128.
        spot: whether they may be preempted, for a lower price.
        reserved: whether they come from the project's reservation.
        valid_for: how long to wait in the queue, such as 6h; "": for ever.
    """

    accelerator: str
    spot: bool = False
    reserved: bool = False
    valid_for: str = ""


def plan_tpu_vm(
    name: str,
    zone: str,
    train: list[str],
    buckets: Sequence[str] = (),
    *,
    n_slices: int = 1,
    request: TpuRequest | None = None,
    variables: Sequence[str] = (),
) -> LaunchPlan:
    """Return a plan for all hosts of Cloud TPU slices.

    The processes find each other through the slices' metadata.

    Args:
        name: of the TPU VM; of several slices NAME-0, NAME-1 and so on, made as one resource.
        zone: of the TPU VM.
        train: the words after `jaxpt`.
        buckets: requirements of the buckets that the run reads or writes, "gcs" or "s3".
        n_slices: which the run joins, along mesh.replica.
        request: how to make them first; None: they exist.
        variables: names of environment variables to hand on.
    """
    nodes = [f"{name}-{i}" for i in range(n_slices)] if n_slices > 1 else [name]
    tpu_vm = [*GCLOUD, "tpu-vm"]

    def on_workers(node: str, command: str, worker: str = "all") -> str:
        flags = [f"--zone={zone}", f"--worker={worker}", f"--command={command}"]
        return shlex.join([*tpu_vm, "ssh", node, *flags])

    def copy_output(command: str, target: str) -> str:
        # in one line: a file that only this user can read, gone afterwards
        copies = ["file=$(mktemp) && trap 'rm -f \"$file\"' EXIT", f'{command} "$file"']
        for node in nodes:
            words = [*tpu_vm, "scp", "FILE", f"{node}:{target}", f"--zone={zone}", "--worker=all"]
            copies.append(shlex.join(words).replace("FILE", '"$file"'))
        return f"({' && '.join(copies)})"

    setup = format_setup(["tpu", *buckets], "-f ../jaxpt.tgz")
    start = detached_command(train, has_variables=bool(variables))
    phases = [
        [on_workers(node, check_idle_command()) for node in nodes],
        [copy_output(f"{PACK_CLONE} -f", "jaxpt.tgz")],
        [on_workers(node, setup) for node in nodes],
        [on_workers(node, start) for node in nodes],
    ]
    if variables:
        hand_on = PRINT_VARIABLES.format(names=shlex.join(variables))
        phases.insert(3, [copy_output(f"{hand_on} >", "jaxpt/launch.env")])
    stops = [on_workers(node, stop_command()) for node in nodes]
    notes = {
        "see": on_workers(nodes[0], "tail -n 40 -F jaxpt/train.log", "0"),
        "stop": "; ".join(stops),
    }
    if request:
        phases = [*plan_tpu_request(name, zone, n_slices, request), *phases]
        delete = [*GCLOUD, "queued-resources", "delete", name, f"--zone={zone}", "--force"]
        notes["delete"] = shlex.join(delete)
    return LaunchPlan(("gcloud", "git", "tar", "python3"), phases, notes)


def plan_tpu_request(name: str, zone: str, n_slices: int, request: TpuRequest) -> list[list[str]]:
    """Return phases that make slices by a queued resource, and wait until they are there.

    Raises:
        UserError: there is no runtime for the accelerator.
    """
    kind, _, size = request.accelerator.partition("-")
    if kind not in TPU_RUNTIMES or not size.isdecimal():
        examples = ", ".join(f"{known}-8" for known in TPU_RUNTIMES)
        raise UserError(
            f"--accelerator {request.accelerator}: expected Google's name of a slice, such as "
            f"{examples}."
        )
    queue = [*GCLOUD, "queued-resources"]
    create = [*queue, "create", name, f"--zone={zone}"]
    create += [f"--accelerator-type={request.accelerator}"]
    create += [f"--runtime-version={TPU_RUNTIMES[kind]}"]
    if n_slices > 1:
        create += [f"--node-count={n_slices}", f"--node-prefix={name}"]
    else:
        create.append(f"--node-id={name}")
    create += ["--spot"] if request.spot else []
    create += ["--reserved"] if request.reserved else []
    if request.valid_for:
        create.append(f"--valid-until-duration={request.valid_for}")
    describe = [*queue, "describe", name, f"--zone={zone}", "--format=value(state.state)"]
    wait = WAIT_UNTIL_ACTIVE.format(describe=shlex.join(describe), name=name)
    return [[shlex.join(create)], [f"({wait})"]]


def plan_ssh(
    hosts: list[str],
    train: list[str],
    buckets: Sequence[str] = (),
    variables: Sequence[str] = (),
) -> LaunchPlan:
    """Return a plan for hosts that ssh reaches without a password.

    The first is the coordinator, which the others reach by the name given here. For the other
    arguments see `plan_tpu_vm`.

    Raises:
        UserError: what is given cannot be a host.
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
    setup = format_setup(["gpu", *buckets])
    hand_on = PRINT_VARIABLES.format(names=shlex.join(variables))

    def on_host(host: str, command: str, *flags: str) -> str:
        return shlex.join(["ssh", *flags, host, command])

    checks, copies, secrets, starts, stops = [], [], [], [], []
    for i, host in enumerate(hosts):
        start = detached_command(
            train,
            f"{processes} JAXPT_PROCESS={i} ",
            f"-{i}",
            has_variables=bool(variables),
        )
        checks.append(on_host(host, check_idle_command(), "-n"))
        copies.append(f"{PACK_CLONE} | {on_host(host, setup)}")
        secrets.append(f"{hand_on} | {on_host(host, f'umask 077; cat >jaxpt/launch-{i}.env')}")
        starts.append(on_host(host, start, "-n"))
        stops.append(on_host(host, stop_command(f"-{i}")))
    see = on_host(hosts[0], "tail -n 40 -F jaxpt/train-0.log")
    notes = {"see": see, "stop": "; ".join(stops)}
    phases = [checks, copies, secrets, starts] if variables else [checks, copies, starts]
    return LaunchPlan(("ssh", "git", "tar", "python3"), phases, notes)


def list_variables(names: Sequence[str]) -> list[str]:
    """Return the variables to hand on: those named, and those of HANDED_ON that are set.

    Raises:
        UserError: one is not set here.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name not in os.environ:
            raise UserError(
                f"--env {name.partition('=')[0]}: expected the name of a variable that is set "
                "here; its value is read from the environment, where no list of processes shows it."
            )
    usual = [name for name in HANDED_ON if os.environ.get(name)]
    return list(dict.fromkeys([*usual, *names]))


def format_setup(kinds: list[str], archive: str = "") -> str:
    """Return the shell line that unpacks the clone in ~/jaxpt and installs its requirements.

    Args:
        kinds: of requirements, such as "tpu" and "gcs".
        archive: tar's flags for the packed clone; "": it comes on stdin.
    """
    requirements = " ".join(f"-r requirements-{kind}.txt" for kind in kinds)
    stamp = STAMP.format(requirements=requirements)
    return SETUP_COMMANDS.format(archive=archive, requirements=requirements, stamp=stamp)


def detached_command(
    train: list[str], environment: str = "", suffix: str = "", *, has_variables: bool = False
) -> str:
    """Return a shell line that starts training in ~/jaxpt, unless a run is active there.

    The run outlives the connection. Beside its number, which another process may have after a
    reboot, train.start holds when it began. Variables that were handed on are read from
    launch.env, which is removed.
    """
    name, variables = f"train{suffix}", f"launch{suffix}.env"
    read = f". ./{variables}; rm {variables}; " if has_variables else ""
    commit = stage.run_git("describe", "--always", "--dirty", "--abbrev=40").strip()
    return (
        f"cd jaxpt && {IDENTIFY} && {refuse_active(name)}{read}"
        f"{environment}JAXPT_COMMIT={commit} nohup .venv/bin/jaxpt {shlex.join(train)} "
        f">>{name}.log 2>&1 </dev/null & echo $! >{name}.pid; identify $! >{name}.start"
    )


def check_idle_command() -> str:
    """Return a command that fails if any run is active in ~/jaxpt: nothing has changed yet."""
    return (
        f"cd jaxpt 2>/dev/null || exit 0; {IDENTIFY}; for start in train*.start; do "
        f"name=${{start%.start}}; {refuse_active('$name')}true; done"
    )


def refuse_active(name: str) -> str:
    """Return the start of a command line, which ends there if the run of that name is active."""
    return (
        f"if {is_active_command(name)}; then "
        f'echo "$(hostname): a run is active, process $(cat {name}.pid); stop it first" >&2; '
        "exit 1; fi; "
    )


def is_active_command(name: str) -> str:
    """Return a command that succeeds if the process of NAME.pid is the one that was started."""
    return f'[ -s {name}.start ] && [ "$(identify $(cat {name}.pid))" = "$(cat {name}.start)" ]'


def stop_command(suffix: str = "") -> str:
    """Return a command that sends SIGTERM: the run saves a checkpoint and ends, on all hosts."""
    name = f"train{suffix}"
    return (
        f"cd jaxpt && {IDENTIFY} && if {is_active_command(name)}; then "
        f'kill $(cat {name}.pid); else echo "$(hostname): no run is active" >&2; fi'
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
    """Return the plan as text for a terminal in the clone's root.

    A subshell: what is pasted ends at the first command that fails, the terminal stays.
    """
    lines = ["(", "set -eo pipefail"]
    for phase in launch.phases:
        if len(phase) > 1:
            lines += [f"{command} & job{i}=$!" for i, command in enumerate(phase)]
            lines += [f"wait $job{i}" for i in range(len(phase))]
        else:
            lines += phase
    return "\n".join([*lines, ")"])


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

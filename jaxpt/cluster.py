"""Find, in the environment that a launcher leaves, which of several processes this one is."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from jaxpt.spec import UserError

# number of processes, index of this one; JAXPT_... are set by `jaxpt launch` or by hand
LAUNCHER_VARS = (
    ("JAXPT_PROCESSES", "JAXPT_PROCESS"),
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
)


class ProcessGroup(NamedTuple):
    """Processes that were started together.

    Attributes:
        n_processes: how many.
        index: of this one, from 0.
        variable: the environment variable that says how many.
    """

    n_processes: int
    index: int
    variable: str


def find_process_group() -> ProcessGroup | None:
    """Return the processes that this one was started with; None if it was started alone."""
    for variable, index_variable in LAUNCHER_VARS:
        n = os.environ.get(variable, "")
        index = os.environ.get(index_variable, "0")
        if not (n.isdigit() and index.isdigit()):
            continue
        # a batch script knows the tasks that its srun may start; it is not one of them
        is_batch_script = variable == "SLURM_NTASKS" and "SLURM_STEP_NODELIST" not in os.environ
        if is_batch_script and index == "0":
            continue
        if int(n) > 1:
            return ProcessGroup(int(n), int(index), variable)
        return None
    return None


def check_is_alone(command: str) -> None:
    """Raise UserError if this process was started with others, which would do the same work."""
    group = find_process_group()
    if group is None:
        return
    raise UserError(
        f"jaxpt {command}: runs as one process, got process {group.index} of {group.n_processes} "
        f"({group.variable}={group.n_processes}). Start it once: srun --ntasks=1, mpirun -n 1, or "
        f"without {group.variable}. Only jaxpt train joins several."
    )


def first_slurm_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: "rack1-node03" of "rack[1-2]-node[03-04],a"."""
    pattern = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    if not pattern:
        raise UserError(f"SLURM_STEP_NODELIST: expected names of hosts, got {node_list!r}.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", pattern.group())


def check_address(address: str, variable: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT. Raise UserError if it is another form."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(
            f"{variable}: expected HOST:PORT of the first process, such as node01:8476, "
            f"got {address!r}."
        )
    return host.strip("[]"), int(port)

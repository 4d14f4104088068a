"""Set up processes, the compilation cache, preemption, and messages about memory."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxpt import logs
from jaxpt.config import TrainConfig
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

DISTRIBUTED_ENV_VARS = ("JAXPT_COORDINATOR", "JAXPT_PROCESSES", "JAXPT_PROCESS")
# after this time without a heartbeat the other processes give a host up and exit, so that whatever
# started them can start all again
HEARTBEAT_TIMEOUT_SECONDS = 60
# CPU devices would send independent messages in any order, and mix up those of two processes
ORDERED_MESSAGES = " --xla_cpu_enable_concurrency_optimized_scheduler=false"
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_EVENT = "/jax/compilation_cache/compile_time_saved_sec"


def join_processes(run_dir: pathlib.Path) -> None:
    """Join the processes that were started together; call it before JAX is asked for a device.

    It knows JAXPT_COORDINATOR=HOST:PORT with JAXPT_PROCESSES and JAXPT_PROCESS (0 for the first),
    the tasks of one srun, and the hosts of a Cloud TPU slice. Elsewhere, or if they have joined
    already, it does nothing. From here on only rank 0 logs to the terminal.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    values = {name: env[name] for name in DISTRIBUTED_ENV_VARS if env.get(name)}
    is_slurm = int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env
    if values:
        join_by_environment(values)
    elif is_slurm:
        # JAX assigns a task one GPU (its local id); a single task on a node has all of its GPUs
        n_nodes = env.get("SLURM_STEP_NUM_NODES")
        one_per_node = env.get("SLURM_NTASKS_PER_NODE") == "1" or env["SLURM_NTASKS"] == n_nodes
        n_gpus = int(env.get("SLURM_GPUS_ON_NODE") or 0)
        device_ids = list(range(n_gpus)) if one_per_node and n_gpus else None
        initialize_distributed(local_device_ids=device_ids)
    elif is_on_tpu_pod():
        initialize_distributed()
    n_processes = jax.process_count()
    if n_processes > 1:
        log.info(f"{n_processes} processes with {jax.local_device_count()} devices each")
        logs.set_rank(jax.process_index(), n_processes, run_dir)


def join_by_environment(values: dict[str, str]) -> None:
    """Join by the variables DISTRIBUTED_ENV_VARS. Raise UserError if some are missing."""
    is_complete = len(values) == len(DISTRIBUTED_ENV_VARS)
    numbers = [values.get(name, "") for name in DISTRIBUTED_ENV_VARS[1:]]
    if not is_complete or not all(number.isdigit() for number in numbers):
        raise UserError(
            f"environment: expected all of {', '.join(DISTRIBUTED_ENV_VARS)} (HOST:PORT, number of "
            f"processes, index of this one), got {values}."
        )
    # explicitly, or JAX would take this process for one task of SLURM's, with one GPU
    n_gpus = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
    is_in_slurm = "SLURM_LOCALID" in os.environ and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    device_ids = list(range(n_gpus)) if n_gpus and is_in_slurm else None
    n_processes, index = map(int, numbers)
    initialize_distributed(values["JAXPT_COORDINATOR"], n_processes, index, device_ids)


def initialize_distributed(
    coordinator: str | None = None,
    n_processes: int | None = None,
    process_index: int | None = None,
    local_device_ids: list[int] | None = None,
) -> None:
    """Call jax.distributed.initialize. Raise UserError if the coordinator cannot be reached."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + ORDERED_MESSAGES
    try:
        jax.distributed.initialize(
            coordinator,
            n_processes,
            process_index,
            local_device_ids=local_device_ids,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"jax.distributed: process {process_index} of {n_processes} could not join "
            f"{coordinator} ({reason}). Is the first process running, and can this host reach its "
            "port?"
        ) from error


def is_on_tpu_pod() -> bool:
    """Return whether this is a host of a TPU slice with others.

    On GKE the environment lists them, on a TPU VM the metadata server knows.
    """
    env = os.environ
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts:
        return True
    has_chips = any(pathlib.Path("/dev").glob("accel[0-9]*"))
    has_chips = has_chips or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    may_ask = not env.get("TPU_SKIP_MDS_QUERY")
    return has_chips and may_ask and "tpu" in (env.get("JAX_PLATFORMS") or "tpu")


# ---- compiled programs


def enable_compilation_cache() -> None:
    """Keep compiled programs for the next start.

    They are in JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxpt/compiled.
    """
    jax_config: Any = jax.config
    if not jax_config.jax_compilation_cache_dir:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax_config.update("jax_compilation_cache_dir", str(home / "jaxpt" / "compiled"))
    # a start compiles dozens of small programs besides the step
    jax_config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@contextlib.contextmanager
def log_compile_time(what: str) -> Iterator[None]:
    """Log how long the body's programs took to compile, or what the cache saved."""
    spent = {COMPILE_EVENT: 0.0, CACHE_EVENT: 0.0}

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event in spent:
            spent[event] += duration_secs

    start = time.monotonic()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    seconds = time.monotonic() - start
    saved, compiled = spent[CACHE_EVENT], spent[COMPILE_EVENT]
    if saved > 0:
        log.info(f"{what}: ready in {seconds:.1f} s, from the compile cache ({saved:.1f} s saved)")
    else:
        log.info(f"{what}: ready in {seconds:.1f} s, compiled in {compiled:.1f} s")


# ---- memory


@contextlib.contextmanager
def explain_out_of_memory(train: TrainConfig, seq_len: int) -> Iterator[None]:
    """Raise a failed allocation as a UserError with the settings that would help."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        options = []
        if train.batch_size > train.grad_accum_steps:
            n = 2 * train.grad_accum_steps
            options.append(f"train.grad_accum_steps={n} (same result, half the activations)")
        if train.remat != "full":
            options.append("train.remat=full (keeps least of each layer)")
        options.append("more devices along mesh.fsdp")
        options.append("initialize.param_dtype=bfloat16 (half the state, some precision lost)")
        raise UserError(
            f"out of memory: a step of {train.batch_size} sequences x {seq_len} tokens "
            f"does not fit ({reason}). Options: {'; '.join(options)}. jaxpt plan shows what "
            "fits before a start."
        ) from error


# ---- stopping


def watch_for_preemption() -> Callable[[int], bool]:
    """Return a function of the step that says whether the run was asked to stop.

    Call it once per step; it is true on every process at the same step. SIGTERM asks, which
    schedulers send before they take a machine away; with several processes JAX's preemption service
    informs the others.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    return lambda step: bool(received)


def broadcast_from_first(value: bool) -> bool:
    """Return the first process's value on every process (clocks differ)."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(value))

"""What a run asks of its machine: its processes joined, compiled programs kept from start to start, a stop that all agree on."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import jax

from jaxpt import logs
from jaxpt.config import Config
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

DISTRIBUTED_ENV_VARS = ("JAXPT_COORDINATOR", "JAXPT_PROCESSES", "JAXPT_PROCESS")
# Seconds without a sign of life after which the other processes give a host up and end, so that whatever started them can start all again.
HEARTBEAT_TIMEOUT_SECONDS = 60


def join_processes(run_dir: pathlib.Path) -> None:
    """Make one run of the processes that were started together; call it before anything asks JAX for a device.

    Known are: JAXPT_COORDINATOR=HOST:PORT with JAXPT_PROCESSES and JAXPT_PROCESS (0 for the first), the tasks of one srun,
    and the hosts of a Cloud TPU slice. Elsewhere, or joined already, nothing happens. Only the first process speaks from here on.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in DISTRIBUTED_ENV_VARS if os.environ.get(name)}
    if given:
        if len(given) < len(DISTRIBUTED_ENV_VARS) or not (
            given["JAXPT_PROCESSES"].isdigit() and given["JAXPT_PROCESS"].isdigit()
        ):
            raise UserError(
                f"environment: found {given}, wanted all of {', '.join(DISTRIBUTED_ENV_VARS)}: HOST:PORT, how many processes, and which one this is."
            )
        # said outright, or JAX would take this process for one task of SLURM's, with one GPU, where it runs in such a job
        n_gpus = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
        mine = (
            list(range(n_gpus))
            if n_gpus and "SLURM_LOCALID" in os.environ and "JAX_LOCAL_DEVICE_IDS" not in os.environ
            else None
        )
        initialize_distributed(
            given["JAXPT_COORDINATOR"],
            int(given["JAXPT_PROCESSES"]),
            int(given["JAXPT_PROCESS"]),
            local_device_ids=mine,
        )
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        # JAX takes a task for one GPU (its local id); where a node runs a single task, that task has all of the node's
        one_a_node = os.environ.get("SLURM_NTASKS_PER_NODE") == "1" or os.environ[
            "SLURM_NTASKS"
        ] == os.environ.get("SLURM_STEP_NUM_NODES")
        n_gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
        initialize_distributed(
            local_device_ids=list(range(n_gpus)) if one_a_node and n_gpus else None
        )
    elif is_on_tpu_pod():
        initialize_distributed()
    if jax.process_count() > 1:
        log.info(f"{jax.process_count()} processes with {jax.local_device_count()} devices each")
        logs.set_rank(jax.process_index(), jax.process_count(), run_dir)


def initialize_distributed(
    coordinator: str | None = None,
    n_processes: int | None = None,
    process_index: int | None = None,
    **more,
) -> None:
    # CPU devices would send what does not depend on each other in any order, and mix up the messages of two processes
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    )
    try:
        jax.distributed.initialize(
            coordinator,
            n_processes,
            process_index,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            **more,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"jax.distributed: process {process_index} of {n_processes} could not join {coordinator} ({str(error).splitlines()[0][:200]}). "
            "Is the first process running, and can this host reach its port?"
        ) from error


def is_on_tpu_pod() -> bool:
    """True on a host of a TPU slice that has others: on GKE the environment names them, on a TPU VM the metadata server knows."""
    if "," in (
        os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    ):
        return True
    chips = any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(
        pathlib.Path("/dev/vfio").glob("[0-9]*")
    )
    return (
        chips
        and not os.environ.get("TPU_SKIP_MDS_QUERY")
        and "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")
    )


# ---- compiled programs


def enable_compilation_cache() -> None:
    """Compiled programs are kept on disk and found again by the next start, in JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxpt/compiled."""
    if not jax.config.jax_compilation_cache_dir:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxpt" / "compiled"))
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", 0.2
    )  # a start compiles dozens of small programs besides the step


@contextlib.contextmanager
def log_compile_time(what: str) -> Iterator[None]:
    """Say how long the programs that the body asks for took to compile, or which part came from the cache and what that saved."""
    spent = {"compiled": 0.0, "saved": 0.0}
    names = {
        "/jax/core/compile/backend_compile_duration": "compiled",
        "/jax/compilation_cache/compile_time_saved_sec": "saved",
    }

    def listen(event: str, seconds: float, **_) -> None:
        if event in names:
            spent[names[event]] += seconds

    start = time.monotonic()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    seconds = time.monotonic() - start
    if spent["saved"] > 0:
        log.info(
            f"{what}: from the compile cache, ready in {seconds:.1f} s; {spent['saved']:.1f} s of compiling saved"
        )
    else:
        kept = (
            f"kept in {jax.config.jax_compilation_cache_dir}"
            if jax.config.jax_enable_compilation_cache
            else "not kept"
        )
        log.info(
            f"{what}: not in the compile cache, ready in {seconds:.1f} s, {spent['compiled']:.1f} s of them compiling; {kept}"
        )


# ---- memory


@contextlib.contextmanager
def explain_out_of_memory(settings: Config) -> Iterator[None]:
    """An allocation that fails becomes a sentence with the settings that would help."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        train = settings.train
        ways = (
            [
                f"train.grad_accum_steps={2 * train.grad_accum_steps} (same result, half the activations)"
            ]
            if train.batch_size > train.grad_accum_steps
            else []
        )
        ways += ["train.remat=full (keeps least of each layer)"] if train.remat != "full" else []
        ways += [
            "more devices along mesh.fsdp",
            "initialize.param_dtype=bfloat16 (half the state, some precision lost)",
        ]
        raise UserError(
            f"out of memory: a step of {train.batch_size} rows x {settings.pack.seq_len} tokens does not fit "
            f"({str(error).splitlines()[0][:200]}). Ways to make room: {'; '.join(ways)}. scripts/plan.py says what fits before a start."
        ) from error


# ---- stopping


def watch_for_preemption() -> Callable[[int], bool]:
    """A function of the step that says whether the machine asked the run to stop: asked once a step, true on every process at the same step.

    SIGTERM asks, which schedulers send before they take a machine away; with several processes JAX's preemption service tells the others.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    return lambda step: bool(asked)


def broadcast_from_first(value: bool) -> bool:
    """What the first process found, on every process (clocks differ)."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(value))

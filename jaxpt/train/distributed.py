"""Join processes and end them together; compilation cache, memory, requests to stop."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import ctypes
import functools
import importlib
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxpt import cluster, io, logs, sharding
from jaxpt.config import TrainConfig
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

DISTRIBUTED_ENV_VARS = ("JAXPT_COORDINATOR", "JAXPT_PROCESSES", "JAXPT_PROCESS")
# after this time without a heartbeat the other processes give a host up and exit, so that whatever
# started them can start all again
HEARTBEAT_TIMEOUT_SECONDS = 60
# CPU devices would send independent messages in any order, and mix up those of two processes
ORDERED_MESSAGES = " --xla_cpu_enable_concurrency_optimized_scheduler=false"
WAITING_LINE_SECONDS = 10  # between lines about processes that have not joined
WATCH_SECONDS = 1  # between looks at whether another process has failed
ENDED_KEY = "jaxpt/ended"
# schedulers before they take a machine away, Ctrl-C, SLURM's customary --signal, a closed terminal
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOST_PROCESS = (
    "another process of this run has ended, or its host does not answer (its log may say why). "
    "Start all of them again: the run continues from its newest checkpoint."
)
# in the messages of XLA's collectives on CPU (Gloo), GPU (NCCL) and of JAX's coordination service
LOST_CONNECTION_WORDS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
CACHE_EVENT = "/jax/compilation_cache/compile_time_saved_sec"


class Placement(NamedTuple):
    """Where this process is among those that join; None: JAX finds out by itself.

    Attributes:
        coordinator: HOST:PORT of the first process.
        n_processes: how many join.
        index: of this one, from 0.
        device_ids: devices of this host that it takes.
    """

    coordinator: str | None = None
    n_processes: int | None = None
    index: int | None = None
    device_ids: list[int] | None = None


def join_processes(run_dir: io.Path) -> None:
    """Join the processes that were started together; call it before JAX is asked for a device.

    It knows JAXPT_COORDINATOR=HOST:PORT with JAXPT_PROCESSES and JAXPT_PROCESS (0 for the first),
    the tasks of one srun, and the hosts of a Cloud TPU slice. Elsewhere, or if they have joined
    already, it does nothing. From here on only rank 0 logs to the terminal.
    """
    if jax.distributed.is_initialized():
        return
    placement = find_placement()
    if placement:
        initialize_distributed(placement)
    sharding.find_devices()
    n_processes = jax.process_count()
    if n_processes > 1:
        start_watch()
        log.info(f"{n_processes} processes with {jax.local_device_count()} devices each")
        directory = run_dir
        if isinstance(directory, io.BucketPath):
            directory = io.working_directory(directory / "logs")
            log.info(f"each host keeps its warnings in its own {directory}/logs")
        logs.set_rank(jax.process_index(), n_processes, directory)


def find_placement() -> Placement | None:
    """Return where this process is among others; None if it was started alone.

    Raises:
        UserError: it was not started alone, and what it needs to find the others is missing.
    """
    values = {name: os.environ[name] for name in DISTRIBUTED_ENV_VARS if os.environ.get(name)}
    if values:
        return find_placement_by_environment(values)
    group = cluster.find_process_group()
    if group is None:
        return Placement() if is_on_tpu_pod() else None
    if group.variable.startswith("SLURM") and "SLURM_STEP_NODELIST" in os.environ:
        return find_placement_in_slurm(group)
    raise UserError(
        f"environment: one of {group.n_processes} processes ({group.variable}), which do not know "
        f"each other. Set {', '.join(DISTRIBUTED_ENV_VARS)} (HOST:PORT of the first, number of "
        "processes, index of this one) for each, or start jaxpt train once."
    )


def find_placement_by_environment(values: dict[str, str]) -> Placement:
    """Return the placement of the variables DISTRIBUTED_ENV_VARS.

    Raises:
        UserError: some are missing, or of another form.
    """
    is_complete = len(values) == len(DISTRIBUTED_ENV_VARS)
    numbers = [values.get(name, "") for name in DISTRIBUTED_ENV_VARS[1:]]
    if not is_complete or not all(number.isdigit() for number in numbers):
        raise UserError(
            f"environment: expected all of {', '.join(DISTRIBUTED_ENV_VARS)} (HOST:PORT, number of "
            f"processes, index of this one), got {values}."
        )
    n_processes, index = map(int, numbers)
    if index >= n_processes:
        raise UserError(
            f"JAXPT_PROCESS: expected 0 to {n_processes - 1}, one less than JAXPT_PROCESSES, "
            f"got {index}."
        )
    # explicitly, or JAX would take this process for one task of SLURM's, with one GPU
    n_gpus = len(list(pathlib.Path("/dev").glob("nvidia[0-9]*")))
    is_in_slurm = "SLURM_LOCALID" in os.environ and "JAX_LOCAL_DEVICE_IDS" not in os.environ
    device_ids = list(range(n_gpus)) if n_gpus and is_in_slurm else None
    return Placement(values["JAXPT_COORDINATOR"], n_processes, index, device_ids)


def find_placement_in_slurm(group: cluster.ProcessGroup) -> Placement:
    """Return the placement of a task of srun.

    JAX's own reading of the node list takes "rack1" for the first of "rack[1-2]-node[03-04]".
    """
    env = os.environ
    host = cluster.first_slurm_host(env["SLURM_STEP_NODELIST"])
    port = int(env.get("JAX_COORDINATOR_PORT") or 61440 + int(env["SLURM_JOB_ID"]) % 4096)
    # JAX assigns a task one GPU (its local id); a single task on a node has all of its GPUs
    n_nodes = env.get("SLURM_STEP_NUM_NODES")
    one_per_node = env.get("SLURM_NTASKS_PER_NODE") == "1" or str(group.n_processes) == n_nodes
    n_gpus = int(env.get("SLURM_GPUS_ON_NODE") or 0)
    device_ids = list(range(n_gpus)) if one_per_node and n_gpus else None
    return Placement(f"{host}:{port}", group.n_processes, group.index, device_ids)


def initialize_distributed(placement: Placement) -> None:
    """Call jax.distributed.initialize, and log that it waits.

    In a thread, so that Ctrl-C ends the waiting and the limit is ours: JAX aborts at its own.

    Raises:
        UserError: the processes have not joined after JAXPT_JOIN_SECONDS.
    """
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + ORDERED_MESSAGES
    seconds = read_join_seconds()
    if placement.coordinator and placement.index == 0:
        check_port_is_free(placement.coordinator)
    elif placement.coordinator:
        cluster.check_address(placement.coordinator, "JAXPT_COORDINATOR")
    with explain_lost_processes():
        joining = run_in_thread(
            lambda: jax.distributed.initialize(
                placement.coordinator,
                placement.n_processes,
                placement.index,
                local_device_ids=placement.device_ids,
                initialization_timeout=seconds + 60,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            )
        )
        wait_until_joined(joining, placement, seconds)


def run_in_thread(function: Callable[[], None]) -> concurrent.futures.Future[None]:
    """Return the future of a function that a thread runs, which does not outlive the process."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_until_joined(
    joining: concurrent.futures.Future[None], placement: Placement, seconds: int
) -> None:
    """Wait for the other processes, and log so every WAITING_LINE_SECONDS.

    Raises:
        UserError: they have not joined after `seconds`, or JAX refuses them.
    """
    deadline = time.monotonic() + seconds
    who = f"process {placement.index} of {placement.n_processes}"
    if placement.n_processes is None:
        who = "this host of the TPU slice"
    while True:
        left = deadline - time.monotonic()
        try:
            return joining.result(max(min(left, WAITING_LINE_SECONDS), 0))
        except TimeoutError:
            reason = describe_coordinator(placement.coordinator)
            left = deadline - time.monotonic()
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            left = 0
        if left <= 0:
            raise UserError(
                f"{who} could not join the others: {reason}. Start all of them, within "
                f"{seconds} s of each other (JAXPT_JOIN_SECONDS), and see in their logs why one "
                "is missing."
            ) from None
        log.info(f"{who} waits for the others, {left:.0f} s more: {reason}")


def read_join_seconds() -> int:
    """Return for how many seconds processes wait for each other: JAXPT_JOIN_SECONDS."""
    text = os.environ.get("JAXPT_JOIN_SECONDS") or "300"
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"JAXPT_JOIN_SECONDS: expected whole seconds, got {text!r}.")
    return int(text)


def check_port_is_free(coordinator: str) -> None:
    """Raise UserError if the first process cannot listen at the coordinator's port.

    JAX's own attempt ends in a segmentation fault.
    """
    _, port = cluster.check_address(coordinator, "JAXPT_COORDINATOR")
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", port))
        server.close()
    except OSError as error:
        raise UserError(
            f"port {port} of this host, where the others would join ({coordinator}): cannot listen "
            f"there ({error.strerror}). Is another run active? Choose another port: "
            "JAXPT_COORDINATOR=HOST:PORT, under SLURM JAX_COORDINATOR_PORT=PORT, for all processes."
        ) from None


def describe_coordinator(coordinator: str | None) -> str:
    """Return what can be seen of the coordinator from here."""
    if coordinator is None:
        return "not all hosts have joined"
    host, port = cluster.check_address(coordinator, "JAXPT_COORDINATOR")
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError as error:
        return f"the first process cannot be reached at {coordinator} ({error.strerror or error})"
    return f"not all have joined the first one at {coordinator}"


# ---- ending


@contextlib.contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Let a process that has lost the others end with a sentence, from the body on.

    JAX's client aborts with a stack trace. Given a callback it calls that instead, which fails for
    want of a Python form of its argument (jaxlib 0.10.2) and so ends in std::terminate: that
    handler is ours.
    """
    client: Any = importlib.import_module("jax._src.lib")._jax
    make_client = client.get_distributed_runtime_client
    client.get_distributed_runtime_client = functools.partial(
        make_client, missed_heartbeat_callback=lambda status: end_without_others()
    )
    with contextlib.suppress(OSError, AttributeError):  # another C++ library: JAX's trace
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(end_without_others)
    try:
        yield
    finally:
        client.get_distributed_runtime_client = make_client


@ctypes.CFUNCTYPE(None)
def end_without_others() -> None:
    """End this process: C++ has found that the others are gone."""
    os.write(2, f"error: {LOST_PROCESS}\n".encode())
    os._exit(1)


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Let the others know when this process fails, and end without waiting for them.

    At exit JAX waits five minutes for processes that themselves wait for this one.
    """
    try:
        yield
    except SystemExit:
        raise  # asked to stop: all leave after the same step
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        sentence = explain_end(error)
        tell_others(sentence)
        sys.stdout.flush()
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(status)


def explain_end(error: BaseException) -> str:
    """Return why this process ends; print the traceback of what nobody expected."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again to continue"
    if isinstance(error, jax.errors.JaxRuntimeError) and is_lost_connection(error):
        time.sleep(3 * WATCH_SECONDS)  # the watching thread may learn why, and ends the process
        return f"{LOST_PROCESS} ({str(error).splitlines()[0][:200]})"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error)[:300]}"


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error of a step means that another process cannot be reached."""
    return any(word in str(error) for word in LOST_CONNECTION_WORDS)


def tell_others(sentence: str) -> None:
    """Leave the reason of this process's end where `watch_others` of the others finds it."""
    from jax._src import distributed as jax_distributed

    client: Any = jax_distributed.global_state.client
    index = jax_distributed.global_state.process_id
    if jax_distributed.global_state.preemption_sync_manager is None:
        return  # it has not joined them
    reason = f"process {index} ({socket.gethostname()}) ended: {sentence}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # they have gone already
        client.key_value_set(f"{ENDED_KEY}/{index}", reason, allow_overwrite=True)
        if index == 0:
            time.sleep(3 * WATCH_SECONDS)  # the store of keys ends with this process


def start_watch() -> None:
    """Watch the other processes in a thread, which ends before JAX leaves them at exit.

    A question to JAX's client while it is shut down ends in a segmentation fault.
    """
    is_ending = threading.Event()
    watch = threading.Thread(target=watch_others, args=(is_ending,), daemon=True)
    watch.start()

    def end_watch() -> None:
        is_ending.set()
        watch.join(WATCH_SECONDS + 10)

    atexit.register(end_watch)  # called before JAX's own, which was registered earlier


def watch_others(is_ending: threading.Event) -> None:
    """End this process when another has said that it ends, until this one ends itself."""
    from jax._src import distributed as jax_distributed

    client: Any = jax_distributed.global_state.client
    own = f"{ENDED_KEY}/{jax.process_index()}"
    while not is_ending.wait(WATCH_SECONDS):
        try:
            found = client.key_value_dir_get(ENDED_KEY)
        except jax.errors.JaxRuntimeError:
            return  # JAX's own watch ends the process
        reasons = dict(found)
        if own in reasons:
            return
        for reason in reasons.values():
            print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(1)


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
    """Keep compiled programs for the next start, where that can be written.

    They are in JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxpt/compiled.
    """
    jax_config: Any = jax.config
    directory = jax_config.jax_compilation_cache_dir
    try:
        cache = io.path(directory) if directory else io.cache_directory() / "compiled"
        io.check_writable(cache)
    except UserError as error:
        log.warning(f"{error} The next start compiles again: there is no compile cache.")
        jax_config.update("jax_enable_compilation_cache", False)
        return
    jax_config.update("jax_compilation_cache_dir", str(cache))
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
        with logs.announce_if_slow(log, f"{what}: compiling"):
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

    Call it once per step; it is true on every process at the same step. STOP_SIGNALS ask; those
    that are ignored (by nohup, or in the background of a shell) stay so. With several processes
    JAX's preemption service, which listens to SIGTERM, informs the others. A second Ctrl-C ends the
    process.
    """
    several = jax.process_count() > 1
    received: list[int] = []

    def ask_to_stop(number: int, frame: types.FrameType | None) -> None:
        name = signal.Signals(number).name
        again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
        # not by the log, which the signal may have interrupted
        os.write(2, f"\n{name}: the run saves after this step and ends{again}\n".encode())
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    for number in STOP_SIGNALS:
        is_ours = not (several and number == signal.SIGTERM)
        if is_ours and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, ask_to_stop)
    if several:
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point
    return lambda step: bool(received)


def broadcast_from_first(value: bool) -> bool:
    """Return the first process's value on every process (clocks differ)."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(value))

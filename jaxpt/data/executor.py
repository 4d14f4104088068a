"""Run the jobs of a pass over text: in a process per core of this machine, or on a Ray cluster."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from jaxpt.spec import UserError

# Large arrays come and go. glibc keeps what is freed for the next one; without this, a twentieth
# of the time goes into pages that the system clears again.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)}
# Before Ray's import: it sends usage data home, and prints the errors that nobody waits for.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_IGNORE_UNHANDLED_ERRORS": "1"}
RAY_OPTIONS = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
IN_FLIGHT = 2  # jobs per core that are handed over: one that runs and one that waits


def map_jobs(where: str, work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """Yield work(job) for each job, as they end.

    Args:
        where: an executor, see `check_executor`, or "here": in this process, in order.
        work: a function of a module.
        jobs: what can be pickled, as are the results.

    Raises:
        UserError: of a job, or a worker was killed, or Ray cannot be used.
        OSError: of a job.
    """
    if where == "here":
        yield from map(work, jobs)
        return
    check_executor(where)
    add_package_to_path()
    os.environ.update(KEEP_MEMORY)
    if where == "local":
        yield from map_in_processes(work, jobs)
    else:
        yield from map_on_ray(where, work, jobs)


def check_executor(where: str) -> None:
    """Raise UserError unless jobs can run there.

    Args:
        where: "local", "ray" (this machine, or the cluster that RAY_ADDRESS names) or
            "ray://HOST:PORT". A cluster's machines need this package and a disk that all share.
    """
    if where == "local":
        return
    if where != "ray" and not where.startswith("ray://"):
        raise UserError(f"prepare.executor: expected local, ray or ray://HOST:PORT, got {where!r}.")
    if not importlib.util.find_spec("ray"):
        raise UserError(
            f"prepare.executor: {where!r} needs Ray, which is not installed. "
            "Run `pip install 'ray[client]>=2.60'`, or use local."
        )
    connect_ray(where)


def add_package_to_path() -> None:
    """Let worker processes find this package, also in a clone that was not installed."""
    root = str(pathlib.Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, paths), root])


def map_in_processes(work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """Yield work(job) of each job, done by a process per core."""
    # the fork server imports the work's module once; this process may have threads, so it is not
    # forked itself
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    n_workers = min(os.cpu_count() or 1, len(jobs))
    followed, held = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(
        max(n_workers, 1), context, follow_parent, (followed,)
    )
    left = iter(jobs)
    try:
        running = {pool.submit(work, job) for job in itertools.islice(left, IN_FLIGHT * n_workers)}
        while running:
            done, running = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for job in itertools.islice(left, len(done)):
                running.add(pool.submit(work, job))
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise killed_worker_error() from None
    finally:
        held.close()  # whatever a worker is doing, it ends
        pool.shutdown(cancel_futures=True)


def follow_parent(followed: multiprocessing.connection.Connection) -> None:
    """End this worker at once when its parent ends, is killed or closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent alone answers

    def watch() -> None:
        with contextlib.suppress(OSError):
            followed.poll(None)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def killed_worker_error() -> UserError:
    """Return the error for a worker that was killed."""
    return UserError(
        "A worker process was killed, perhaps because memory ran out. Free some and run the same "
        "command again: what is finished is kept."
    )


@functools.cache
def connect_ray(where: str) -> types.ModuleType:
    """Return the ray module, connected. Raise UserError if the cluster is not reached."""
    os.environ.update(QUIET)
    os.environ.update(KEEP_MEMORY)
    add_package_to_path()
    import ray  # type: ignore[reportMissingImports]  # optional

    try:
        if where == "ray":
            ray.init(ignore_reinit_error=True, **RAY_OPTIONS)
        else:
            ray.init(where, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason, *_ = (str(error) or type(error).__name__).splitlines()
        raise UserError(
            f"prepare.executor: {where!r} cannot be started ({reason}). Is the cluster up?"
        ) from None
    return ray


def map_on_ray(where: str, work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """Yield work(job) of each job, done by tasks; Ray repeats one whose machine is lost."""
    ray = connect_ray(where)
    task = ray.remote(work)
    n_cores = int(ray.cluster_resources().get("CPU", 1))
    left = iter(jobs)
    running = [task.remote(job) for job in itertools.islice(left, IN_FLIGHT * n_cores)]
    try:
        while running:
            done, running = ray.wait(running)
            running += [task.remote(job) for job in itertools.islice(left, len(done))]
            for reference in done:
                yield ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # the job's own error, without the cluster's traceback
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        raise killed_worker_error() from None
    finally:
        for reference in running:
            ray.cancel(reference, force=True)

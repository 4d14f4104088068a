"""Run heavy passes over text with Daft, in this process or on a Ray cluster.

This module is the only switch between them.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxpt.spec import UserError

# Both libraries send usage data home at import, unless disabled before it; Daft's own progress bars
# would write over ours.
QUIET = {"DO_NOT_TRACK": "1", "SCARF_NO_ANALYTICS": "1"}
QUIET |= {"RAY_USAGE_STATS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0"}
# Large arrays come and go. glibc keeps what is freed for the next one; without this, a twentieth
# of the time goes into pages that the system clears again.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)}


@functools.cache
def init_executor(where: str) -> types.ModuleType:
    """Return the daft module, ready to run plans.

    Args:
        where: "local", "ray" (this machine, or the cluster it belongs to) or "ray://HOST:PORT".
            The cluster's machines need this package and a disk that all of them share.

    Raises:
        UserError: another word, or Ray is not installed or not reached.
    """
    is_known = where in ("local", "ray") or where.startswith("ray://")
    if not is_known:
        raise UserError(f"prepare.executor: expected local, ray or ray://HOST:PORT, got {where!r}.")
    os.environ.update(QUIET)
    os.environ.update(KEEP_MEMORY)
    add_package_to_path()
    import daft
    from daft.exceptions import DaftCoreException

    try:
        start_runner(daft, where)
    except (ConnectionError, RuntimeError, DaftCoreException) as error:
        message = str(error) or type(error).__name__
        reason, *_ = message.splitlines()
        raise UserError(
            f"prepare.executor: {where!r} cannot be started ({reason}). "
            "One process runs one executor; is the cluster up?"
        ) from None
    return daft


def add_package_to_path() -> None:
    """Let worker processes find this package, also in a clone that was not installed."""
    root = str(pathlib.Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "")
    if root in path.split(os.pathsep):
        return
    if path:
        root += os.pathsep + path
    os.environ["PYTHONPATH"] = root


def start_runner(daft: types.ModuleType, where: str) -> None:
    """Tell Daft where to run. Raise UserError if Ray is needed and not installed."""
    if where == "local":
        daft.set_runner_native()
        return
    try:
        import ray  # type: ignore[reportMissingImports]  # optional
    except ImportError:
        raise UserError(
            f"prepare.executor: {where!r} needs Ray, which is not installed. "
            "Run `pip install 'ray>=2.60'`, or use local."
        ) from None
    if where != "ray":
        daft.set_runner_ray(address=where)
        return
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(ignore_reinit_error=True, **quiet)
    daft.set_runner_ray(noop_if_initialized=True)


def map_jobs(where: str, work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """Yield work(job) for each job, as they end.

    Locally a process per core does them; on a cluster each job is a task.

    Args:
        where: the executor, see `init_executor`.
        work: a function of a module.
        jobs: what JSON can hold, as are the results.

    Raises:
        UserError: of `init_executor` or of a job.
        OSError: of a job.
    """
    if not jobs:
        return
    daft = init_executor(where)

    @daft.func.batch(return_dtype=daft.DataType.string(), use_process=True, batch_size=1)
    def run_batch(batch: Any) -> list[str]:
        if where == "local":
            # A worker has left all that it had to. Taking its modules apart would need another
            # third of a second.
            atexit.register(os._exit, 0)
        outcomes = [run_job(work, json.loads(text)) for text in batch.to_pylist()]
        return list(map(json.dumps, outcomes))

    frame = daft.from_pydict({"job": list(map(json.dumps, jobs))})
    if where != "local":
        frame = frame.into_partitions(len(jobs))
    outcome = run_batch(daft.col("job")).alias("outcome")
    for batch in frame.select(outcome).to_arrow_iter():
        for text in batch.column(0).to_pylist():
            yield unwrap_outcome(json.loads(text))


def run_job(work: Callable[[Any], Any], job: Any) -> dict[str, Any]:
    """Return what a job gives, or its error as text: Daft would print a page of it."""
    try:
        return {"result": work(job)}
    except UserError as error:
        return {"user_error": str(error)}
    except OSError as error:
        return {"errno": error.errno, "os_error": str(error)}


def unwrap_outcome(outcome: dict[str, Any]) -> Any:
    """Return the result of `run_job`, or raise its error."""
    if "user_error" in outcome:
        raise UserError(outcome["user_error"])
    if "errno" in outcome:
        raise OSError(outcome["errno"], outcome["os_error"])
    return outcome["result"]

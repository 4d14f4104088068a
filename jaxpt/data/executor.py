"""Where the heavy passes over text run: Daft inside this process, or on a Ray cluster. The only switch between them."""

from __future__ import annotations

import atexit
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxpt.spec import UserError


@functools.cache
def init_executor(where: str):
    """The daft module, ready to run plans at `where`: "local", "ray" (this machine, or the cluster it belongs to) or
    "ray://HOST:PORT". The cluster's machines need this package and a disk that all of them share.

    Raises UserError for another word, or where Ray is not installed or not reached.
    """
    if where not in ("local", "ray") and not where.startswith("ray://"):
        raise UserError(f"prepare.executor: got {where!r}, wanted local, ray or ray://HOST:PORT.")
    # Both send usage data home at import, unless told before it; daft's own bars would write over ours
    os.environ.update(
        DO_NOT_TRACK="1", SCARF_NO_ANALYTICS="1", RAY_USAGE_STATS_ENABLED="0", DAFT_PROGRESS_BAR="0"
    )
    # large arrays come and go: what is freed stays for the next one, or a twentieth of the time goes into pages that the system clears anew
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**25), MALLOC_TRIM_THRESHOLD_=str(2**28))
    # its processes must find this package, in a clone that was not installed too
    here = str(pathlib.Path(__file__).resolve().parents[2])
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [here, os.environ.get("PYTHONPATH")])
        )
    import daft

    try:
        if where == "local":
            daft.set_runner_native()
            return daft
        try:
            import ray
        except ImportError:
            raise UserError(
                f"prepare.executor: {where!r} needs Ray, which is not installed. Run `pip install 'ray>=2.60'`, or use local."
            ) from None
        if where == "ray":
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                ignore_reinit_error=True,
            )
            daft.set_runner_ray(noop_if_initialized=True)
        else:
            daft.set_runner_ray(address=where)
    except (ConnectionError, RuntimeError, daft.exceptions.DaftCoreException) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"prepare.executor: {where!r} cannot be started ({line}). One process runs one engine; is the cluster up?"
        ) from None
    return daft


def map_jobs(where: str, work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """What work(job) gives for each of the jobs, as they end: in a process for each core here, in a task for each job on the cluster.

    work is a function of a module; jobs and results are what JSON can say. Raises what start does, and the UserErrors of work.
    """
    if not jobs:
        return
    daft = init_executor(where)

    @daft.func.batch(return_dtype=daft.DataType.string(), use_process=True, batch_size=1)
    def result(texts):
        if where == "local":
            atexit.register(
                os._exit, 0
            )  # a process has left all it had to: to take its modules apart would need another third of a second
        return [json.dumps(run_job(work, json.loads(text))) for text in texts.to_pylist()]

    frame = daft.from_pydict({"job": [json.dumps(job) for job in jobs]})
    if where != "local":
        frame = frame.into_partitions(len(jobs))
    for batch in frame.select(result(daft.col("job")).alias("result")).to_arrow_iter():
        for outcome in map(json.loads, batch.column(0).to_pylist()):
            if "mistake" in outcome:
                raise UserError(outcome["mistake"])
            if "errno" in outcome:
                raise OSError(outcome["errno"], outcome["trouble"])
            yield outcome["found"]


def run_job(work: Callable[[Any], Any], job: Any) -> dict[str, Any]:
    """What work gives; its UserError, and an error of the disk, as text, or Daft would make a page of it."""
    try:
        return {"found": work(job)}
    except UserError as mistake:
        return {"mistake": str(mistake)}
    except OSError as trouble:
        return {"errno": trouble.errno, "trouble": str(trouble)}

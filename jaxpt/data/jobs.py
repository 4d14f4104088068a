"""Run work that is split into jobs, in any order, and never repeat a finished job after a kill.

A job leaves files. A file gets its name when it is complete, and a job lists its files last.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxpt import stage
from jaxpt.data import executor
from jaxpt.spec import Record

Advance = Callable[[int], Any]  # how many units of the progress bar are done


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Record):
    """A part of a stage's work; the base of each kind of job.

    Attributes:
        output_prefix: how the paths of its files begin; set by `JobRunner`.
        request: fingerprint of job, code and packages; set by `JobRunner`.
    """

    output_prefix: str = ""
    request: str = ""


@dataclasses.dataclass(frozen=True)
class JobRunner:
    """Where the jobs of a stage run, and where their files lie.

    Attributes:
        executor: see `executor.check_executor`.
        state_dir: directory of the jobs' files.
    """

    executor: str
    state_dir: pathlib.Path

    def run(
        self,
        work: Callable[..., int],
        jobs: Sequence[Job],
        progress: tuple[str, str, int | None],
        in_processes: bool,
        n_threads: int = 1,
    ) -> list[dict[str, Any]]:
        """Return the result of each job, in their order, of now or of a killed run.

        Args:
            work: does a job and returns how much of the progress unit it has done. The files that
                it writes begin with the job's output_prefix.
            jobs: what `work` takes.
            progress: label, unit and total of the progress bar.
            in_processes: use processes, if several jobs are left.
            n_threads: of this process otherwise, for work that Arrow does.
        """
        directory = self.state_dir / work.__name__
        directory.mkdir(parents=True, exist_ok=True)
        requests = []
        for i, job in enumerate(jobs):
            prefix = directory / f"{i:06d}"
            requests.append(add_request(job, prefix))
        left = [job for job in requests if read_job_result(job) is None]
        label, unit, total = progress
        with stage.progress_bar(f"prepare: {label}", total, unit) as advance:
            if in_processes and len(left) > 1:
                for n_done in executor.map_jobs(self.executor, work, left):
                    advance(n_done)
            else:

                def work_here(job: Job) -> int:
                    return work(job, advance)

                run_in_threads(work_here, left, n_threads)
        return [load_job_result(job) for job in requests]


def run_in_threads(work: Callable[[Job], Any], jobs: Sequence[Job], n_threads: int) -> None:
    """Do the jobs in threads of this process. Raise the first error."""
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(work, jobs):
            pass


def add_request(job: Job, prefix: pathlib.Path) -> Job:
    """Return the job with its output prefix and its request's fingerprint."""
    job = dataclasses.replace(job, output_prefix=str(prefix))
    request = stage.fingerprint([job.to_json(), fingerprint_program()])
    return dataclasses.replace(job, request=request)


@functools.cache
def fingerprint_program() -> str:
    """Return the fingerprint of what does the jobs: this directory's code and the packages."""
    directory = pathlib.Path(__file__).parent
    files = sorted(directory.rglob("*.py"))
    code = {str(file.relative_to(directory)): stage.sha256_file(file) for file in files}
    return stage.fingerprint([stage.package_versions(), code])


def read_job_result(job: Job) -> dict[str, Any] | None:
    """Return a finished job's result, if its files are there as it left them."""
    path = pathlib.Path(f"{job.output_prefix}.json")
    result = stage.read_cached_result(path, job.request)
    if not result:
        return None
    for file, size in result["files"].items():
        path = pathlib.Path(file)
        if not path.is_file() or path.stat().st_size != size:
            return None
    return result


def load_job_result(job: Job) -> dict[str, Any]:
    """Return the result of a job that has just ended. Raise RuntimeError if it left none."""
    result = read_job_result(job)
    if result is None:
        raise RuntimeError(f"{job.output_prefix}: the job ended without a result.")
    return result


def write_job_result(job: Job, files: Sequence[pathlib.Path], **result: Any) -> None:
    """Record that a job is done: its files, which have their names, and its result."""
    sizes = {str(file): file.stat().st_size for file in files}
    record = {"request": job.request, "files": sizes, **result}
    path = pathlib.Path(f"{job.output_prefix}.json")
    stage.write_atomic(path, json.dumps(record))


@contextlib.contextmanager
def open_atomic(path: pathlib.Path, directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a path to write to; the file gets its own name when it is complete.

    The temporary name has this process's id: a process that a killed run started may still be
    finishing the same job. It has the parent's name, since both splits have files of equal names.

    Args:
        path: the file.
        directory: where to write it at first, on the same disk.
    """
    temporary = directory / f".{path.parent.name}-{path.name}.{os.getpid()}"
    yield temporary
    temporary.rename(path)

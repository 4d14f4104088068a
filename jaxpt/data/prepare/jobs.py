"""Run work that is split into jobs, in any order, and never repeat a finished job after a kill.

A job leaves files. A file gets its name when it is complete, and a job lists its files last.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxpt import io, stage
from jaxpt.data import executor
from jaxpt.spec import Record

# Up to these bytes no other process is started: that would take longer.
MAX_INLINE_BYTES = {"read_part": 2**27, "judge_file": 2**24, "write_corpus_shard": 2**28}

Advance = Callable[[int], Any]  # how many units of the progress bar are done
R = TypeVar("R", bound="JobResult")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Record):
    """A part of a stage's work; the base of each kind of job.

    Attributes:
        output_prefix: how the paths of its files begin; set by `JobRunner`.
        request: fingerprint of job, code and packages; set by `JobRunner`.
    """

    output_prefix: str = ""
    request: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobResult(Record):
    """What a finished job left; the base of each kind of result."""

    files: tuple[str, ...]  # in order


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
        result_type: type[R],
        progress: tuple[str, str, int | None],
        n_bytes: int,
        n_threads: int = 1,
    ) -> list[R]:
        """Return the result of each job, in their order, of now or of a killed run.

        Args:
            work: does a job and returns how much of the progress unit it has done. The files that
                it writes begin with the job's output_prefix.
            jobs: what `work` takes.
            result_type: what each job leaves.
            progress: label, unit and total of the progress bar.
            n_bytes: what the jobs read, about; few are read in this process.
            n_threads: of this process, for work that Arrow does.
        """
        directory = self.state_dir / work.__name__
        io.make_directory(directory)
        requests = []
        for i, job in enumerate(jobs):
            prefix = directory / f"{i:06d}"
            requests.append(add_request(job, prefix))
        left = [job for job in requests if read_job_result(job, result_type) is None]
        label, unit, total = progress
        with stage.progress_bar(f"prepare: {label}", total, unit) as advance:
            if n_bytes > MAX_INLINE_BYTES[work.__name__] and len(left) > 1:
                for n_done in executor.map_jobs(self.executor, work, left):
                    advance(n_done)
            else:

                def work_here(job: Job) -> int:
                    return work(job, advance)

                run_in_threads(work_here, left, n_threads)
        results = [read_job_result(job, result_type) for job in requests]
        done = [result for result in results if result is not None]
        if len(done) < len(jobs):
            raise RuntimeError(f"{directory}: a job ended without a result.")
        return done


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
    directory = pathlib.Path(__file__).parents[1]
    names = [name for name in io.list_files(directory) if name.endswith(".py")]
    code = {name: io.sha256(directory / name) for name in names}
    return stage.fingerprint([stage.package_versions(), code])


def read_job_result(job: Job, result_type: type[R]) -> R | None:
    """Return a finished job's result, if its files are there as it left them."""
    path = pathlib.Path(f"{job.output_prefix}.json")
    found = stage.read_cached_result(path, job.request)
    if not found:
        return None
    result = result_type.from_json(found["result"], str(path))
    if found["sizes"] != list_sizes(result):
        return None
    return result


def write_job_result(job: Job, result: JobResult) -> None:
    """Record that a job is done and its files have their names."""
    record = {"request": job.request, "sizes": list_sizes(result), "result": result.to_json()}
    path = pathlib.Path(f"{job.output_prefix}.json")
    io.write_text(path, json.dumps(record))


def list_sizes(result: JobResult) -> list[int | None]:
    """Return the bytes of each file, None of one that is missing."""
    return [io.size(pathlib.Path(file)) for file in result.files]

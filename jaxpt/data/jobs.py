"""Work that is cut into jobs, each of which leaves files: done here or by the engine, in any order, and not again after a kill.

A file gets its name when it is whole, and a job says last which files it has left.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxpt import stage
from jaxpt.data import executor


def run_jobs(
    where: str,
    state_dir: pathlib.Path,
    work: Callable[..., int],
    jobs: list[dict],
    label: str,
    unit: str,
    total: int | None,
    in_processes: bool,
    threads: int = 1,
):
    """What work has told of each of the jobs, in their order: of now, or of a killed run that was asked the very same.

    A job is what JSON can say; the files that it writes begin with job["to"]. work gives how much of the unit it has done.

    where  the engine, see executor.start;  home: the directory that the jobs' files lie in;  apart: in processes of their own, where several are left
    threads: of this process, else: for work that Arrow does
    """
    directory = state_dir / work.__name__
    directory.mkdir(parents=True, exist_ok=True)
    jobs = [{**job, "to": str(directory / f"{i:06d}")} for i, job in enumerate(jobs)]
    jobs = [{**job, "request": stage.fingerprint([job, fingerprint_program()])} for job in jobs]
    left = [job for job in jobs if read_job_result(job) is None]
    with stage.progress_bar(f"prepare: {label}", total, unit) as advance:
        if in_processes and len(left) > 1:
            for n in executor.map_jobs(where, work, left):
                advance(n)
        else:
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                collections.deque(pool.map(lambda job: work(job, advance), left), maxlen=0)
    return [read_job_result(job) for job in jobs]


@functools.cache
def fingerprint_program() -> str:
    """Fingerprint of what does the jobs: this directory's code and the packages."""
    code = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    return stage.fingerprint(
        [stage.package_versions(), {file.name: stage.sha256_file(file) for file in code}]
    )


def read_job_result(job: dict) -> dict[str, Any] | None:
    """What a finished job has told, if its files are there as it left them."""
    answer = stage.read_cached_result(pathlib.Path(f"{job['to']}.json"), job["request"])
    if answer and all(
        pathlib.Path(file).is_file() and pathlib.Path(file).stat().st_size == size
        for file, size in answer["files"].items()
    ):
        return answer
    return None


def write_job_result(job: dict, files: Sequence[pathlib.Path], **answer) -> None:
    """A job is done, its files have their names; this is what it found."""
    sizes = {str(file): file.stat().st_size for file in files}
    stage.write_atomic(
        pathlib.Path(f"{job['to']}.json"),
        json.dumps({"request": job["request"], "files": sizes, **answer}),
    )


@contextlib.contextmanager
def open_atomic(path: pathlib.Path, directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name to write under in a directory of the same disk; the file gets its own when it is whole.

    The name is this process's: what a killed run started may still be finishing the same job. Both sides have files of equal names.
    """
    temporary = directory / f".{path.parent.name}-{path.name}.{os.getpid()}"
    yield temporary
    temporary.rename(path)

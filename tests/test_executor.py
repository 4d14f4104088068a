"""Laws of the executor: a job's error arrives as what it is, and no worker outlives its parent."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxpt.data import executor
from jaxpt.spec import UserError

# not conftest's: a worker that imports it would answer Ctrl-C itself
ROOT = pathlib.Path(__file__).parents[1]
N_JOBS = 7


def double(number: int) -> int:
    return 2 * number


def fail(kind: str) -> None:
    if kind == "user":
        raise UserError("web.jsonl:3: not JSON. Mend the line.")
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard-00000.parquet")
    os.kill(os.getpid(), signal.SIGKILL)


def wait_beside(directory: str) -> None:
    pathlib.Path(directory, str(os.getpid())).touch()
    time.sleep(600)


@pytest.fixture(params=["here", "local", pytest.param("ray", marks=pytest.mark.slow)])
def where(request, monkeypatch) -> str:
    if request.param == "ray":
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))  # where workers find the jobs below
    return request.param


def test_every_job_is_done_once(where):
    assert sorted(executor.map_jobs(where, double, range(N_JOBS))) == [*range(0, 2 * N_JOBS, 2)]
    assert list(executor.map_jobs(where, double, ())) == []


def test_the_error_of_a_job_arrives_as_what_it_is(where):
    with pytest.raises(UserError, match=r"^web.jsonl:3: not JSON. Mend the line.$"):
        list(executor.map_jobs(where, fail, ["user"] * N_JOBS))
    with pytest.raises(OSError) as caught:
        list(executor.map_jobs(where, fail, ["full"]))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "shard-00000.parquet"


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(UserError, match=r"^A worker process was killed, .*: what is finished"):
        list(executor.map_jobs("local", fail, ["killed"] * N_JOBS))


RUN = """
import sys
sys.path.insert(0, "tests")
from jaxpt.data import executor
import test_executor
list(executor.map_jobs("local", test_executor.wait_beside, [sys.argv[1]] * 7))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_a_parent_that_ends(tmp_path, how):
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    n_workers = min(os.cpu_count() or 1, N_JOBS)
    wait_until(lambda: len(os.listdir(tmp_path)) == n_workers)
    # Ctrl-C reaches the workers too, and they leave the answer to their parent
    workers = [int(name) for name in os.listdir(tmp_path)]
    for worker in workers if how == signal.SIGINT else ():
        os.kill(worker, signal.SIGINT)
    run.send_signal(how)
    complaints = run.communicate(timeout=60)[1]
    assert run.returncode == -how
    assert complaints.count("Traceback") == (how == signal.SIGINT)
    wait_until(lambda: not any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers))


def wait_until(is_so) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)

"""Laws of fault tolerance: whatever happens to a run, the same command resumes it, and it ends like
an uninterrupted one. benchmarks/faults.py is the long form.

The slow ones guard promises too: .ci/run runs them."""

import json
import random
import shutil
import signal

import faults
import numpy as np
import pytest
from conftest import ROOT

from jaxpt.train.metrics import read_metrics
from jaxpt.train.records import StartRecord, TrainMetrics
from jaxpt.weights import checkpoint

# train.py with a step that takes a fifth of a second longer
SLOW = f"""
import runpy, time
from jaxpt.train import step
class Slow:
    def __init__(self, built):
        self.built = built
    def compile(self, *args):
        compiled = self.built.compile(*args)
        def run(*args):
            time.sleep(0.2)
            return compiled(*args)
        return run
build_step = step.build_step
step.build_step = lambda *args: Slow(build_step(*args))
runpy.run_path({str(ROOT / "scripts/train.py")!r}, run_name="__main__")
"""
STEPS = 40
TWO = {"n": 2, "devices": 4}


@pytest.fixture(scope="module")
def home(texts, tmp_path_factory):
    """Packed sequences and an uninterrupted run of STEPS steps."""
    home = tmp_path_factory.mktemp("alone")
    (home / "small.py").write_text(faults.RECIPE)
    shutil.copytree(texts / "base", home / "data")
    faults.Job(home, "uncut", STEPS).ends()
    return home


def equal(home, run, uncut="uncut", steps=STEPS):
    assert faults.differences(home, run, uncut, steps) == []


def read_train_metrics(run):
    records = read_metrics(run / "metrics.jsonl")
    return [record for record in records if isinstance(record, TrainMetrics)]


def losses(run):
    return [record.loss for record in read_train_metrics(run)]


@pytest.fixture(scope="module")
def killed(home):
    """A run killed three times at random moments, and started again each time."""
    faults.kills(home, "killed", STEPS, 3, random.Random(1))
    return home / "killed"


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(home, killed):
    equal(home, killed.name)


def test_with_a_damaged_newest_checkpoint_the_one_before_is_taken(home):
    faults.torn(home, "torn", "uncut", STEPS, random.Random(2))
    equal(home, "torn")


def test_a_full_disk_gives_one_message_and_loses_nothing(home):
    faults.full_disk(home, "full", STEPS)
    equal(home, "full")


@pytest.mark.slow
def test_two_processes_train_as_one_and_leave_together(home):
    """2 x 4 devices against 1 x 8; after SIGTERM to the second process both stop at one step."""
    faults.Job(home, "eight", 20, devices=8).ends()
    faults.Job(home, "two", 20, **TWO).ends()
    np.testing.assert_allclose(losses(home / "two"), losses(home / "eight"), rtol=2e-5)

    job = faults.Job(home, "term", 20, "--config.train.checkpoint_every=100", **TWO)
    job.until(5)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [143, 143]
    (saved,) = checkpoint.list_steps(home / "term")
    assert 5 <= saved < 20
    faults.Job(home, "term", 20, "--config.train.checkpoint_every=100", **TWO).ends()
    equal(home, "term", "two", 20)


def test_out_of_memory_comes_before_any_data_is_read_with_what_would_help(home):
    job = faults.Job(home, "large", STEPS, "--config.train.batch_size=1000000")
    assert job.wait() == [1]
    output = job.log.read_text()
    assert (
        "out of memory: a step of 1000000 sequences x 64 tokens" in output
        and "train.grad_accum_steps=2" in output
        and "Traceback" not in output
    )


@pytest.mark.slow
def test_a_second_start_finds_its_programs_compiled_and_so_does_another_rate(home, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "compiled"))
    output = []
    for run in ("cold", "warm"):
        job = faults.Job(home, run, 12)
        job.ends()
        output.append(job.log.read_text())
    assert "from the compile cache" not in output[0] and "s, compiled in" in output[0]
    assert "from the compile cache" in output[1] and "s saved)" in output[1]
    equal(home, "warm", "cold", 12)
    job = faults.Job(
        home, "rate", 11, "--config.optim.peak_lr=2e-3", "--config.optim.warmup_frac=0"
    )
    job.ends()
    assert "from the compile cache" in job.log.read_text()


def test_the_first_line_after_a_resume_has_the_time_of_its_step(home):
    shutil.copytree(home / "uncut", home / "slow")
    (home / "slow/manifest.json").unlink()  # not finished, then
    (home / "slow.py").write_text(SLOW)
    faults.Job(
        home, "slow", STEPS + 1, "--config.train.log_every=1", script=str(home / "slow.py")
    ).ends()
    (record,) = [each for each in read_train_metrics(home / "slow") if each.step == STEPS + 1]
    assert record.step_seconds > 0.2


def test_the_run_directory_records_how_to_repeat_the_run(killed):
    lines = (killed / "starts.jsonl").read_text().splitlines()
    first, *later = [StartRecord.from_json(json.loads(line)) for line in lines]
    assert later and first.step == 0 and "scripts/train.py --config small.py" in first.command
    assert first.versions["jax"] and (first.n_devices, first.device_kind) == (1, "cpu")
    assert (killed / "program.diff").is_file()


@pytest.mark.slow
def test_resuming_needs_no_more_memory_than_running(home):
    """34 million parameters: 0.4 GB of state, which a second copy would show."""
    sizes = {
        "d_model": 512,
        "d_ff": 2048,
        "n_layers": 8,
        "n_heads": 8,
        "n_kv_heads": 8,
        "d_head": 64,
    }
    more = [
        *(f"--config.model.{name}={size}" for name, size in sizes.items()),
        "--config.train.batch_size=2",
        "--config.train.log_every=1",
    ]
    peaks = []
    for steps in (12, 16):
        faults.Job(
            home,
            "large_state",
            steps,
            *more,
            "--config.train.checkpoint_every=4",
            "--config.train.eval_every=0",
        ).ends()
        peaks.append(read_train_metrics(home / "large_state")[-1].memory_bytes)
    assert peaks[1] < 1.02 * peaks[0]

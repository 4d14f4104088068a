"""Laws of several hosts, with real processes on 127.0.0.1: what differs is named before the first
step, a missing one is waited for so long and no longer, a lost one ends the others.
"""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from jaxpt import cluster, stage
from jaxpt.cli import main
from jaxpt.spec import UserError
from jaxpt.stage import read_manifest
from jaxpt.train.metrics import read_metrics
from jaxpt.weights import checkpoint

RECIPE = """
from jaxpt.config import defaults
def get_config():
    c = defaults()
    c.tokenizer.vocab_size, c.pack.seq_len = 500, 64
    c.model.n_layers, c.model.d_model, c.model.d_ff = 2, 24, 40
    c.model.n_heads, c.model.n_kv_heads, c.model.d_head = 6, 2, 8
    c.model.max_seq_len = 64
    c.mixture.packed_paths = ("base/packed",)
    c.train.batch_size, c.train.log_every, c.train.steps = 16, 5, 100_000
    c.train.eval_every, c.train.checkpoint_every = 0, 100_000
    return c
"""
MIXTURE = """c.optim.peak_lr, c.optim.warmup_frac = 1e-2, 0
    c.mesh.fsdp, c.mesh.expert = 1, 2
    c.model.fields = (
        ("family", "mixtral"),
        ("n_experts", 4),
        ("n_experts_per_token", 2),
        ("norm_topk_prob", True),
        ("router_aux_loss_coef", 0.01),
    )
    return c"""
C_TRACE = ("Check failure stack trace", "terminate called", "Traceback")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Process:
    """A `jaxpt train` of one process of a run, or of its only one."""

    def __init__(self, home, name, *more, script="", wrapper=(), **environment):
        self.log = home / f"{name}.log"
        base = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        base |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
        command = [*wrapper, sys.executable, str(script or ROOT / "scripts/train.py")]
        self.process = subprocess.Popen(
            [*command, "--config", "recipe.py", "--workdir", "run", *more],
            cwd=home,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=base | environment,
        )

    def end(self, timeout=120) -> tuple[int, str]:
        """Exit status and output; without a trace of C++ or Python."""
        status = self.process.wait(timeout)
        text = self.log.read_text()
        assert not [trace for trace in C_TRACE if trace in text], text
        return status, text


def joined(index: int, n: int, port: int) -> dict[str, str]:
    return {
        "JAXPT_COORDINATOR": f"127.0.0.1:{port}",
        "JAXPT_PROCESSES": str(n),
        "JAXPT_PROCESS": str(index),
        "JAXPT_JOIN_SECONDS": "60",
    }


@pytest.fixture
def home(texts, tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    shutil.copytree(texts / "base", tmp_path / "base")
    return tmp_path


def start_two(home, second=(), **environment):
    """Two processes; the second with other flags or variables."""
    port = free_port()
    return (
        Process(home, "first", **joined(0, 2, port)),
        Process(home, "second", *second, **{**joined(1, 2, port), **environment}),
    )


def wait_for_step(home, processes, step):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        records = read_metrics(home / "run/metrics.jsonl")
        if records and records[-1].step >= step:
            return
        ended = [each.log.read_text() for each in processes if each.process.poll() is not None]
        assert not ended, ended
        time.sleep(0.05)
    raise AssertionError("no step was made")


def sentence_of(log: str) -> str:
    """The one line with which a process ended."""
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, log
    return lines[0]


# ---- what differs


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (
            ("--config.optim.peak_lr=0.07",),
            {},
            "optim.peak_lr is 0.07 on HOST (process 1), 0.0003 on HOST (process 0)",
        ),
        (("--workdir", "elsewhere"), {}, "is not one directory for all hosts: what process 0"),
        pytest.param(
            (),
            {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
            "XLA_FLAGS is ",
            marks=pytest.mark.slow,
        ),
        pytest.param((), {"PYTHONPATH": "CHANGED"}, "code of jaxpt is ", marks=pytest.mark.slow),
        pytest.param(
            ("--config.mixture.packed_paths=('other',)",),
            {},
            "mixture.packed_paths is ('other',)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_differ_end_before_the_first_step(home, flags, environment, message):
    if environment.get("PYTHONPATH"):
        changed = home / "changed"
        shutil.copytree(ROOT / "jaxpt", changed / "jaxpt")
        (changed / "jaxpt/report/page.py").open("a").write("# changed\n")
        environment = {"PYTHONPATH": str(changed)}
    for process in start_two(home, flags, **environment):
        status, log = process.end()
        assert status == 1
        assert message.replace("HOST", socket.gethostname()) in sentence_of(log)
    assert not (home / "run/checkpoints").exists() and not (home / "run/metrics.jsonl").exists()
    assert not list(home.glob("*/.hosts-*"))


def test_processes_with_other_packed_data_under_one_name_end_before_the_first_step(home):
    """Each sees its own directory of sequences, as two local disks would hold."""
    for name in ("one", "two"):
        shutil.copytree(home / "base", home / name / "base")
    packed = home / "two/base/packed"
    other = dataclasses.replace(read_manifest(packed), seed=99)
    request = stage.request_fingerprint(other.stage, other.config, other.inputs, other.seed)
    other = dataclasses.replace(other, fingerprint=stage.fingerprint([request, other.outputs]))
    (packed / "manifest.json").write_text(json.dumps(stage.seal_manifest(other).to_json()))
    port = free_port()
    for process in [
        Process(
            home / name,
            name,
            "--workdir",
            str(home / "run"),
            "--config",
            str(home / "recipe.py"),
            **joined(index, 2, port),
        )
        for index, name in enumerate(("one", "two"))
    ]:
        status, log = process.end()
        assert status == 1 and f"sequences of code is {other.fingerprint} on" in sentence_of(log)


# ---- start-up


@pytest.mark.slow
def test_a_missing_host_is_waited_for_with_a_line_and_then_a_sentence(home):
    alone = {**joined(0, 2, free_port()), "JAXPT_JOIN_SECONDS": "14"}
    late = {**joined(1, 2, free_port()), "JAXPT_JOIN_SECONDS": "14"}
    first, second = Process(home, "first", **alone), Process(home, "second", **late)
    status, log = first.end()
    assert status == 1 and "process 0 of 2 waits for the others, 4 s more: not all" in log
    assert "process 0 of 2 could not join the others: not all have joined" in sentence_of(log)
    status, log = second.end()
    assert status == 1 and "the first process cannot be reached at 127.0.0.1" in sentence_of(log)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:", ":8476", "a:70000", "127.0.0.1:x"])
def test_a_coordinator_that_is_no_host_and_port_is_refused(address):
    with pytest.raises(UserError, match="JAXPT_COORDINATOR: expected HOST:PORT"):
        cluster.check_address(address, "JAXPT_COORDINATOR")


def test_a_coordinator_without_a_port_or_with_a_taken_one_ends_with_a_sentence(home):
    alone = joined(0, 2, 1) | {"JAXPT_COORDINATOR": "127.0.0.1"}
    status, log = Process(home, "no_port", **alone).end()
    assert status == 1 and "JAXPT_COORDINATOR: expected HOST:PORT" in sentence_of(log)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        status, log = Process(home, "taken", **joined(0, 2, port)).end()
    assert status == 1 and f"port {port} of this host" in sentence_of(log)


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("node7", "node7"),
        ("node7,other[1-2]", "node7"),
        ("node[007-015],host2", "node007"),
        ("node[001,007-015],host2", "node001"),
        ("rack[1-2]-node[03-04],login1", "rack1-node03"),
        ("r[2,4]n[10]-ib,b", "r2n10-ib"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(node_list, first):
    assert cluster.first_slurm_host(node_list) == first


# ---- the end of one


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_survivor_of_a_killed_process_ends_with_a_sentence(home, killed):
    processes = start_two(home)
    wait_for_step(home, processes, 10)
    processes[killed].process.kill()
    status, log = processes[1 - killed].end(180)
    assert status == 1 and "another process of this run has ended" in sentence_of(log)


def test_a_process_that_fails_takes_the_others_with_it_and_says_why(home):
    """The first fails as it opens its data; the second would wait for it."""
    port = free_port()
    (home / "one").mkdir()
    shutil.copy(home / "recipe.py", home / "one")
    flags = ("--workdir", str(home / "run"))
    first = Process(home / "one", "first", *flags, **joined(0, 2, port))
    second = Process(home, "second", *flags, **joined(1, 2, port))
    status, log = first.end()
    assert status == 1 and "base/packed" in sentence_of(log)
    reason = sentence_of(log).removeprefix("error: ")
    status, log = second.end()
    assert status == 1 and sentence_of(log).endswith(f"ended: {reason}")


@pytest.mark.slow
def test_two_processes_that_share_the_experts_train_as_one_does(home):
    recipe = RECIPE.replace("100_000", "8").replace("return c", MIXTURE)
    (home / "recipe.py").write_text(recipe)
    alone = Process(home, "alone", "--workdir", "alone", "--config.mesh.expert=1")
    for process in (alone, *start_two(home)):
        assert process.end()[0] == 0
    found, expected = (
        [record.loss for record in read_metrics(home / name / "metrics.jsonl") if record.step == 5]
        for name in ("run", "alone")
    )
    assert len(found) == 1
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_processes_that_end_leave_each_other_without_a_crash(tmp_path):
    """Many watches of the others ask at nearly every moment, and so at the end too."""
    program = (
        "import pathlib, jax\n"
        "from jaxpt.train import distributed\n"
        "distributed.WATCH_SECONDS = 0.0005\n"
        "distributed.join_processes(pathlib.Path())\n"
        "for _ in range(20):\n"
        "    distributed.start_watch()\n"
        "from jax.experimental import multihost_utils\n"
        "multihost_utils.sync_global_devices('both')\n"
    )
    port = free_port()
    base = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, env=base | joined(i, 2, port)
        )
        for i in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]


# ---- asked to end


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
def test_every_signal_that_asks_a_run_to_end_saves(home, name):
    run = Process(home, "run_alone")
    wait_for_step(home, [run], 10)
    run.process.send_signal(signal.Signals[name])
    status, log = run.end()
    assert status == 143 and f"{name}: the run saves after this step and ends" in log
    [step] = checkpoint.list_steps(home / "run")
    assert f"stopped: step {step:,} is saved" in log


def test_a_second_ctrl_c_ends_at_once(home):
    """A save that would not end is being waited for."""
    slow = home / "slow.py"
    slow.write_text(
        "import runpy, sys, time\n"
        "from jaxpt.train.hooks import checkpoint\n"
        "def save(self, session):\n"
        "    open('saving', 'w').close()\n"
        "    time.sleep(600)\n"
        "checkpoint.Checkpoint.save = save\n"
        f"runpy.run_path({str(ROOT / 'scripts/train.py')!r}, run_name='__main__')\n"
    )
    run = Process(home, "run_alone", script=slow)
    wait_for_step(home, [run], 10)
    run.process.send_signal(signal.SIGINT)
    while not (home / "saving").exists():
        time.sleep(0.05)
    run.process.send_signal(signal.SIGINT)
    status, log = run.end(60)
    assert status == -signal.SIGINT and "Ctrl-C again ends it at once" in log


def test_a_signal_that_nohup_ignores_stays_ignored(home):
    run = Process(home, "run_alone", wrapper=("nohup",))
    wait_for_step(home, [run], 10)
    run.process.send_signal(signal.SIGHUP)
    wait_for_step(home, [run], read_metrics(home / "run/metrics.jsonl")[-1].step + 10)
    run.process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_to_one_of_two_processes_ends_both_after_one_step(home, name):
    processes = start_two(home)
    wait_for_step(home, processes, 10)
    processes[1].process.send_signal(signal.Signals[name])
    assert [process.end()[0] for process in processes] == [143, 143]
    assert len(checkpoint.list_steps(home / "run")) == 1


# ---- commands for one process


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
        {"JAXPT_PROCESSES": "2", "JAXPT_PROCESS": "0", "JAXPT_COORDINATOR": "a:1"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
    ],
)
@pytest.mark.parametrize("command", sorted(set(main.COMMANDS) - {"train"}))
def test_a_command_started_as_several_processes_says_that_it_is_for_one(
    command, environment, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"jaxpt {command}: runs as one process, got process"):
        cluster.check_is_alone(command)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # of a batch script
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "a"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_command_of_one_process_runs_under_a_launcher(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cluster.check_is_alone("export_hf")


def test_export_started_by_a_launcher_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="jaxpt export_hf: runs as one process"):
        main.run_command(["export_hf", "--from", str(tmp_path), "--to", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())

"""Launch recipes: the command that arrives on a host is the one that was given, word for word, and
nothing is done without --go.
"""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from jaxpt import launch
from jaxpt.spec import UserError

yaml = pytest.importorskip("yaml")
# spaces, parentheses, both quotes, a dollar, a backslash: what shells eat
AWKWARD = [
    "--config.prepare.sources=('a b=text:it\\'s $HOME/\"x\" *.txt',)",
    "--config.initialize.grow=('depth_upscale(m=4)',)",
]
TRAIN = launch.train_command(
    str(ROOT / "configs/quickstart.py") + ":child", "/shared/my runs/mine", AWKWARD
)
EXPECTED = [
    "scripts/train.py",
    "--config",
    "configs/quickstart.py:child",
    "--workdir",
    "/shared/my runs/mine",
    *AWKWARD,
]

# a Python that records how it was called
RECORDER = f"""#!{sys.executable}
import json, os, sys
found = {{k: v for k, v in os.environ.items() if k.startswith("JAX")}}
json.dump([sys.argv[1:], found], open("called.json", "w"))
"""


def program(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """Makes homes of hosts under tmp_path and puts programs in front of PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def make(*names):
        for name in names:
            program(
                tmp_path / name / "jaxpt/.venv/bin/python",
                RECORDER.replace("called.json", f"{tmp_path}/{name}.json"),
            )
            (tmp_path / name / "jaxpt/.venv/.installed").touch()

    return make


def called(path):
    for _ in range(200):
        if path.exists() and path.read_text():
            return json.loads(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path}: nothing was started")


def test_ssh_starts_the_given_command_on_every_host_word_for_word(tmp_path, hosts):
    hosts("one", "two")
    program(
        tmp_path / "bin/ssh",
        (
            f'#!/bin/bash\n[ "$1" = -n ] && shift\nhost=${{1#*@}}; shift; cd '
            f'{tmp_path}/$host && exec bash -c "$*"\n'
        ),
    )
    launch.execute_launch(launch.plan_ssh(["one", "me@two"], TRAIN))
    for i, host in enumerate(("one", "two")):
        argv, environment = called(tmp_path / f"{host}.json")
        assert argv == EXPECTED
        assert environment == {
            "JAXPT_COORDINATOR": f"one:{launch.COORDINATOR_PORT}",
            "JAXPT_PROCESSES": "2",
            "JAXPT_PROCESS": str(i),
        }
        assert (tmp_path / host / "jaxpt/scripts/train.py").is_file(), "the clone is there"


def test_an_active_run_is_not_started_twice_and_can_be_stopped(tmp_path, hosts):
    hosts("one")
    program(tmp_path / "one/jaxpt/.venv/bin/python", "#!/bin/bash\nexec sleep 60\n")
    program(
        tmp_path / "bin/ssh",
        f'#!/bin/bash\n[ "$1" = -n ] && shift\nshift; cd {tmp_path}/one && exec bash -c "$*"\n',
    )
    recipe = launch.plan_ssh(["one"], TRAIN)
    launch.execute_launch(recipe)
    pid = int((tmp_path / "one/jaxpt/train-0.pid").read_text())
    with pytest.raises(UserError, match="nothing after it was started"):
        launch.execute_launch(recipe)
    os.kill(pid, 0)  # the first one lives
    subprocess.run(["bash", "-c", recipe.notes["stop"]], check=True)
    for _ in range(100):
        if subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        ).stdout.strip() in ("", "Z"):
            return
        time.sleep(0.05)
    raise AssertionError("it was not stopped")


def test_a_tpu_slice_starts_the_given_command_on_every_worker(tmp_path, hosts):
    hosts("w0", "w1")
    program(
        tmp_path / "bin/gcloud",
        (
            "#!/bin/bash\nfor word; do case $word in --command=*) "
            "command=${word#--command=};; esac; done\n"
            f'for worker in w0 w1; do cd {tmp_path}/$worker; if [ "$4" = scp ]; '
            'then cp "$5" jaxpt.tgz; else bash -c "$command"; fi; done\n'
        ),
    )
    launch.execute_launch(launch.plan_tpu_vm("my-tpu", "us-east5-a", TRAIN))
    for worker in ("w0", "w1"):
        assert called(tmp_path / f"{worker}.json") == [EXPECTED, {}]


@pytest.mark.parametrize(
    ("ends", "finished", "requeued"), [(0, True, False), (143, False, True), (1, False, False)]
)
def test_a_slurm_job_is_queued_again_when_it_was_asked_to_stop_and_only_then(
    tmp_path, hosts, ends, finished, requeued
):
    workdir = str(tmp_path / "my run")
    recipe = launch.plan_slurm(3, 4, workdir, TRAIN)
    [script] = recipe.files.values()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert {
        "#SBATCH --nodes=3",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gres=gpu:4",
        "#SBATCH --signal=TERM@120",
    } <= set(script.split("\n"))
    (tmp_path / "my run").mkdir()
    if finished:
        (tmp_path / "my run/manifest.json").touch()
    program(
        tmp_path / "bin/srun",
        RECORDER.replace("called.json", f"{tmp_path}/srun.json") + f"sys.exit({ends})\n",
    )
    program(tmp_path / "bin/scontrol", f'#!/bin/bash\necho "$@" >{tmp_path}/again\n')
    program(tmp_path / "bin/sbatch", '#!/bin/bash\nSLURM_JOB_ID=7 bash "${@: -1}"\n')
    try:
        launch.execute_launch(recipe)
    except UserError:
        assert ends
    argv, environment = called(tmp_path / "srun.json")
    assert argv[argv.index(sys.executable) + 1 :] == EXPECTED
    assert environment["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3", (
        "JAX alone would give each task one GPU"
    )
    assert (tmp_path / "again").exists() == requeued


@pytest.mark.parametrize(
    ("on", "n", "each", "resource", "labels"),
    [
        (
            "v5p:4x4x4",
            16,
            4,
            "google.com/tpu",
            {
                "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                "cloud.google.com/gke-tpu-topology": "4x4x4",
            },
        ),
        (
            "v5e:2x4",
            1,
            8,
            "google.com/tpu",
            {
                "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
                "cloud.google.com/gke-tpu-topology": "2x4",
            },
        ),
        (
            "v6e:1x1",
            1,
            1,
            "google.com/tpu",
            {
                "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
                "cloud.google.com/gke-tpu-topology": "1x1",
            },
        ),
        (
            "h100:24",
            3,
            8,
            "nvidia.com/gpu",
            {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
        ),
    ],
)
def test_a_jobset_asks_for_whole_hosts(on, n, each, resource, labels):
    found = yaml.safe_load(
        launch.render_jobset("mine", on, "registry/image", "claim", "/runs/mine", TRAIN)
    )
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert (job["completions"], job["parallelism"], job["completionMode"], job["backoffLimit"]) == (
        n,
        n,
        "Indexed",
        0,
    )
    assert pod["nodeSelector"] == labels and container["resources"]["limits"] == {resource: each}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    environment = {each["name"]: each.get("value") for each in container.get("env", [])}
    if resource == "nvidia.com/gpu":
        assert environment == {
            "JAXPT_COORDINATOR": f"mine-hosts-0-0.mine:{launch.COORDINATOR_PORT}",
            "JAXPT_PROCESSES": str(n),
            "JAXPT_PROCESS": None,
        }
    else:
        assert not environment, "TPU hosts know each other"


@pytest.mark.parametrize(("finished", "status"), [(True, 0), (False, 75)])
def test_a_pod_passes_on_the_notice_to_stop_and_succeeds_only_when_the_run_is_finished(
    tmp_path, hosts, finished, status
):
    hosts()
    workdir = tmp_path / "my runs"
    workdir.mkdir()
    if finished:
        (workdir / "manifest.json").touch()
    found = yaml.safe_load(
        launch.render_jobset("mine", "h100:8", "image", "claim", str(workdir), TRAIN)
    )
    command = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]["command"]
    command = [word.replace("$$", "$") for word in command]  # as Kubernetes does
    waiting = (
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: "
        "(time.sleep(0.3), sys.exit(0)))\nopen('ready', "
        "'w').close()\ntime.sleep(60)\n"
    )
    program(tmp_path / "bin/python", RECORDER + waiting)
    pod = subprocess.Popen(command, cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(20) == status
    assert called(tmp_path / "called.json")[0] == EXPECTED


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: launch.train_command(str(ROOT / "configs/base.py"), "runs/x", []),
            "absolute path",
        ),
        (
            lambda: launch.train_command(str(ROOT / "configs/base.py"), "gs://bucket/x", []),
            "Mount it",
        ),
        (lambda: launch.train_command("/etc/passwd", "/runs/x", []), "Put it into the clone"),
        (lambda: launch.render_jobset("mine", "v5p:16", "i", "c", "/runs/x", TRAIN), "v5p:4x4x4"),
        (
            lambda: launch.render_jobset("mine", "h100:12", "i", "c", "/runs/x", TRAIN),
            "expected whole hosts of 8 devices",
        ),
        (
            lambda: launch.render_jobset("My_Run", "h100:8", "i", "c", "/runs/x", TRAIN),
            "small letters",
        ),
        (lambda: launch.render_jobset("mine", "h100:8", "i", "c", "/x", TRAIN), "its parent"),
        (lambda: launch.plan_slurm(0, 8, "/runs/x", TRAIN), "at least one node"),
        (
            lambda: launch.execute_launch(
                launch.LaunchPlan(("no-such-program",), {}, [["touch started"]], {})
            ),
            "no-such-program: not on this machine's PATH",
        ),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_starts(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_without_go_nothing_is_done_and_what_is_printed_does_it(tmp_path, hosts):
    hosts("one", "two")
    program(
        tmp_path / "bin/ssh",
        (
            '#!/bin/bash\n[ "$1" = -n ] && shift\nhost=$1; shift; cd '
            f'{tmp_path}/$host && exec bash -c "$*"\n'
        ),
    )
    words = [
        "ssh",
        "--hosts",
        "one",
        "two",
        "--config",
        "configs/quickstart.py:child",
        "--workdir",
        "/shared/my runs/mine",
        *AWKWARD,
    ]
    printed = subprocess.run(
        [sys.executable, "scripts/launch.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert not (tmp_path / "one.json").exists() and not (tmp_path / "one/jaxpt/scripts").exists()
    subprocess.run(["bash"], input=printed, cwd=ROOT, text=True, check=True)
    assert called(tmp_path / "one.json")[0] == called(tmp_path / "two.json")[0] == EXPECTED

"""Launching: the command that arrives on a host is the one that was given, word for word, nothing
is done without --go, and the files of launch/ do what they say.
"""

import json
import math
import os
import pathlib
import re
import signal
import stat
import subprocess
import sys
import time

import entry_points
import pytest
from conftest import ROOT

from jaxpt import launch, stage
from jaxpt.cli import main
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
    "train",
    "--config",
    "configs/quickstart.py:child",
    "--workdir",
    "/shared/my runs/mine",
    *AWKWARD,
]

COMMIT = stage.run_git("describe", "--always", "--dirty", "--abbrev=40").strip()
SSH = """#!/bin/bash
[ "$1" = -n ] && shift
host=${1#*@}; shift; echo "$host $*" >>{home}/said; cd {home}/$host && exec bash -c "$*"
"""

# a program that records how it was called
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
    monkeypatch.delenv("JAXPT_TEST_DATA", raising=False)  # the programs note every JAXPT_ variable

    def make(*names, kind="gpu"):
        program(tmp_path / "bin/ssh", SSH.replace("{home}", str(tmp_path)))
        stamp = launch.STAMP.format(requirements=f"-r requirements-{kind}.txt")
        stamp = subprocess.check_output(["bash", "-c", f'echo "{stamp}"'], cwd=ROOT)
        for name in names:
            program(
                tmp_path / name / "jaxpt/.venv/bin/jaxpt",
                RECORDER.replace("called.json", f"{tmp_path}/{name}.json"),
            )
            (tmp_path / name / "jaxpt/.venv/.installed").write_bytes(stamp)

    return make


def called(path):
    for _ in range(200):
        if path.exists() and path.read_text():
            return json.loads(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path}: nothing was started")


def launch_and_wait(plan, clone):
    """Start a run on one host, and wait until it has ended."""
    launch.execute_launch(plan)
    process = pathlib.Path("/proc") / (clone / "train-0.pid").read_text().strip()
    while process.exists():
        time.sleep(0.02)


def test_ssh_starts_the_given_command_on_every_host_word_for_word(tmp_path, hosts):
    hosts("one", "two")
    launch.execute_launch(launch.plan_ssh(["one", "me@two"], TRAIN))
    for i, host in enumerate(("one", "two")):
        argv, environment = called(tmp_path / f"{host}.json")
        assert argv == EXPECTED
        assert environment == {
            "JAXPT_COORDINATOR": f"one:{launch.COORDINATOR_PORT}",
            "JAXPT_PROCESSES": "2",
            "JAXPT_PROCESS": str(i),
            "JAXPT_COMMIT": COMMIT,
        }
        assert (tmp_path / host / "jaxpt/scripts/train.py").is_file(), "the clone is there"


def test_an_active_run_is_not_started_twice_and_can_be_stopped(tmp_path, hosts):
    hosts("one")
    program(tmp_path / "one/jaxpt/.venv/bin/jaxpt", "#!/bin/bash\nexec sleep 60\n")
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


def test_a_host_with_an_active_run_keeps_all_hosts_as_they_are(tmp_path, hosts):
    hosts("one", "two")
    program(tmp_path / "two/jaxpt/.venv/bin/jaxpt", "#!/bin/bash\nexec sleep 60\n")
    launch.execute_launch(launch.plan_ssh(["two"], TRAIN))
    both = launch.plan_ssh(["one", "two"], TRAIN)
    with pytest.raises(UserError, match="nothing after it was started"):
        launch.execute_launch(both)
    # pasted into a terminal, which goes on
    pasted = f"{launch.print_launch(both)}\necho status $?"
    shell = subprocess.run(["bash", "-c", pasted], cwd=ROOT, capture_output=True, text=True)
    assert shell.stdout == "status 1\n"
    assert not (tmp_path / "one/jaxpt/pyproject.toml").exists(), "nothing was copied"
    os.kill(int((tmp_path / "two/jaxpt/train-0.pid").read_text()), signal.SIGTERM)


def test_variables_are_handed_on_and_their_values_are_never_shown(
    tmp_path, hosts, monkeypatch, output
):
    """Not in what is printed or logged, nor in an argument, which `ps` shows to all users."""
    hosts("one", "two")
    record = RECORDER.replace('k.startswith("JAX")', 'k in ("HF_TOKEN", "MINE")')
    for host in ("one", "two"):
        program(
            tmp_path / host / "jaxpt/.venv/bin/jaxpt",
            record.replace("called.json", f"{tmp_path}/{host}.json"),
        )
    for name in launch.HANDED_ON:
        monkeypatch.delenv(name, raising=False)
    secrets = {"HF_TOKEN": "hf_2Kx", "MINE": 'it\'s $HOME\n"x" \\y'}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    plan = launch.plan_ssh(["one", "two"], TRAIN, variables=launch.list_variables(["MINE"]))
    launch.execute_launch(plan)
    for host in ("one", "two"):
        assert called(tmp_path / f"{host}.json")[1] == secrets
        assert not list((tmp_path / host / "jaxpt").glob("*.env")), "the file is gone"
    shown = launch.print_launch(plan) + output() + (tmp_path / "said").read_text()
    assert "launch-0.env" in shown and "hf_2Kx" not in shown and "$HOME\n" not in shown


@pytest.mark.parametrize("name", ["NOT_SET", "HF_TOKEN=hf_2Kx", "a b"])
def test_a_variable_without_a_value_here_is_refused_without_showing_one(name):
    with pytest.raises(UserError, match="expected the name of a variable that is set") as refused:
        launch.list_variables([name])
    assert "2Kx" not in str(refused.value)


def test_files_that_were_removed_here_are_removed_there_and_no_others(tmp_path, hosts):
    hosts("one")
    clone = tmp_path / "one/jaxpt"
    launch_and_wait(launch.plan_ssh(["one"], TRAIN), clone)
    (clone / "jaxpt/an old module.py").touch()
    with (clone / ".files").open("a") as file:
        file.write("jaxpt/an old module.py\n")
    (clone / "my notes.txt").touch()
    launch_and_wait(launch.plan_ssh(["one"], TRAIN), clone)
    assert not (clone / "jaxpt/an old module.py").exists()
    for kept in ("my notes.txt", "train-0.log", "jaxpt/launch.py", ".venv/bin/jaxpt"):
        assert (clone / kept).exists(), kept


def test_requirements_that_changed_are_installed_anew(tmp_path, hosts):
    hosts("one")
    clone = tmp_path / "one/jaxpt"
    install = f"""#!/bin/bash
mkdir -p .uv/bin .venv/bin && ln -sf /bin/true .uv/bin/python
printf '#!/bin/bash\necho "$@" >>{tmp_path}/installed\n' >.uv/bin/uv && chmod +x .uv/bin/uv
printf '#!/bin/bash\\nsleep 0.3\\n' >.venv/bin/jaxpt && chmod +x .venv/bin/jaxpt
"""
    program(tmp_path / "bin/python3", install)
    (clone / ".venv/.installed").write_text("-r requirements-gpu.txt 123 456\n")
    for _ in range(2):
        launch_and_wait(launch.plan_ssh(["one"], TRAIN), clone)
        lines = (tmp_path / "installed").read_text().splitlines()
        assert sum("pip install" in line for line in lines) == 1


def test_slices_are_queued_for_waited_for_and_joined(tmp_path, hosts):
    """Two of them, each of one host."""
    hosts("mine-0", "mine-1", kind="tpu")
    program(
        tmp_path / "bin/gcloud",
        f"""#!/bin/bash
echo "$*" >>{tmp_path}/asked
for word; do case $word in --command=*) command=${{word#--command=}};; esac; done
case "$3 $4" in
"queued-resources describe") [ $(wc -l <{tmp_path}/asked) = 4 ] && echo ACTIVE || echo CREATING;;
"tpu-vm ssh") cd {tmp_path}/$5 && bash -c "$command";;
"tpu-vm scp") cp "$5" {tmp_path}/${{6%%:*}}/${{6#*:}};;
esac
""",
    )
    program(tmp_path / "bin/sleep", "#!/bin/bash\n")
    request = launch.TpuRequest("v5p-8", spot=True, valid_for="6h")
    launch.execute_launch(
        launch.plan_tpu_vm("mine", "us-east5-a", TRAIN, n_slices=2, request=request)
    )
    for node in ("mine-0", "mine-1"):
        assert called(tmp_path / f"{node}.json") == [EXPECTED, {"JAXPT_COMMIT": COMMIT}]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == (
        "compute tpus queued-resources create mine --zone=us-east5-a --accelerator-type=v5p-8 "
        "--runtime-version=v2-alpha-tpuv5 --node-count=2 --node-prefix=mine --spot "
        "--valid-until-duration=6h"
    )
    assert [line.split()[3] for line in asked[1:4]] == ["describe"] * 3


def test_slices_that_cannot_be_had_end_the_launch(tmp_path, hosts):
    hosts("mine", kind="tpu")
    program(tmp_path / "bin/gcloud", '#!/bin/bash\n[ "$4" = describe ] && echo FAILED; true\n')
    request = launch.TpuRequest("v6e-8", reserved=True)
    with pytest.raises(UserError, match="nothing after it was started"):
        launch.execute_launch(launch.plan_tpu_vm("mine", "z", TRAIN, request=request))


def test_a_strangers_process_of_the_same_number_neither_refuses_a_start_nor_is_stopped(
    tmp_path, hosts
):
    """As after a reboot: the number in train-0.pid is another process's."""
    hosts("one")
    recipe = launch.plan_ssh(["one"], TRAIN)
    launch.execute_launch(recipe)
    called(tmp_path / "one.json")
    (tmp_path / "one.json").unlink()
    stranger = subprocess.Popen(["sleep", "60"])
    (tmp_path / "one/jaxpt/train-0.pid").write_text(f"{stranger.pid}\n")
    stopped = subprocess.run(
        ["bash", "-c", recipe.notes["stop"]], capture_output=True, text=True, check=True
    )
    assert "no run is active" in stopped.stderr
    assert stranger.poll() is None
    launch.execute_launch(recipe)
    called(tmp_path / "one.json")
    stranger.kill()


def test_a_tpu_slice_starts_the_given_command_on_every_worker(tmp_path, hosts, monkeypatch):
    """The clone travels in a file that others can neither read nor foresee."""
    hosts("w0", "w1", kind="tpu")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    program(
        tmp_path / "bin/gcloud",
        (
            "#!/bin/bash\nfor word; do case $word in --command=*) "
            "command=${word#--command=};; esac; done\n"
            f'for worker in w0 w1; do cd {tmp_path}/$worker; if [ "$4" = scp ]; '
            f'then cp "$5" jaxpt.tgz; stat -c %a "$5" >>{tmp_path}/mode; '
            'else bash -c "$command"; fi; done\n'
        ),
    )
    launch.execute_launch(launch.plan_tpu_vm("my-tpu", "us-east5-a", TRAIN))
    for worker in ("w0", "w1"):
        assert called(tmp_path / f"{worker}.json") == [EXPECTED, {"JAXPT_COMMIT": COMMIT}]
    assert (tmp_path / "mode").read_text().split() == ["600", "600"]
    assert not list((tmp_path / "temporary").iterdir()), "the packed clone is gone"


@pytest.mark.parametrize(
    ("ends", "finished", "requeued"),
    [(0, True, False), (0, False, True), (143, False, True), (1, False, False)],
)
def test_a_slurm_job_is_queued_again_when_it_was_asked_to_stop_and_only_then(
    tmp_path, hosts, ends, finished, requeued
):
    hosts("clone")
    workdir = tmp_path / "my run"
    workdir.mkdir()
    if finished:
        (workdir / "manifest.json").touch()
    program(
        tmp_path / "bin/srun",
        RECORDER.replace("called.json", f"{tmp_path}/srun.json") + f"sys.exit({ends})\n",
    )
    program(tmp_path / "bin/scontrol", f'#!/bin/bash\necho "$@" >{tmp_path}/again\n')
    done = subprocess.run(
        ["bash", ROOT / "launch/train.sbatch", workdir, *AWKWARD],
        env={**os.environ, "SLURM_JOB_ID": "7"},
    )
    assert done.returncode == ends
    argv, _ = called(tmp_path / "srun.json")
    expected = [".venv/bin/jaxpt", "train", "--workdir", str(workdir), *AWKWARD]
    assert argv[argv.index(expected[0]) :] == expected
    assert (tmp_path / "again").exists() == requeued


def test_a_slurm_job_without_a_workdir_is_refused():
    done = subprocess.run(["bash", ROOT / "launch/train.sbatch"], capture_output=True, text=True)
    assert done.returncode and "expected WORKDIR" in done.stderr


def read_jobset(kind):
    """The pod, and the job around it, for TPU nodes (as the file is) or edited for GPU nodes."""
    lines = (ROOT / "launch/jobset.yaml").read_text().splitlines()
    if kind == "GPU":
        lines = [line for line in lines if "# TPU" not in line]
        marked = [" # GPU" in line for line in lines]
        pairs = zip(lines, marked, strict=True)
        lines = [line.replace("# ", "", 1) if is_gpu else line for line, is_gpu in pairs]
    found = yaml.safe_load("\n".join(lines))
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert job["completions"] == job["parallelism"]
    return job, job["template"]["spec"], found["metadata"]["name"]


def test_a_jobset_asks_for_whole_hosts_that_find_each_other():
    job, pod, _ = read_jobset("TPU")
    [container] = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    n_chips = math.prod(map(int, topology.split("x")))
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == n_chips
    assert "env" not in container, "TPU hosts know each other"

    job, pod, name = read_jobset("GPU")
    [container] = pod["containers"]
    assert list(container["resources"]["limits"]) == ["nvidia.com/gpu"]
    assert list(pod["nodeSelector"]) == ["cloud.google.com/gke-accelerator"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert environment == {
        "JAXPT_COORDINATOR": f"{name}-hosts-0-0.{name}:{launch.COORDINATOR_PORT}",
        "JAXPT_PROCESSES": str(job["completions"]),
        "JAXPT_PROCESS": None,
    }


@pytest.mark.parametrize(("finished", "status"), [(True, 0), (False, 75)])
def test_a_pod_passes_on_the_notice_to_stop_and_succeeds_only_when_the_run_is_finished(
    tmp_path, hosts, finished, status
):
    hosts()
    _, pod, _ = read_jobset("TPU")
    command = pod["containers"][0]["command"]
    assert "$(" not in command[-1] and "$$" not in command[-1], "Kubernetes would read them"
    command[-1] = command[-1].replace("/runs/mine", f"{tmp_path}/mine")
    if finished:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/manifest.json").touch()
    waiting = (
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: "
        "(time.sleep(0.3), sys.exit(0)))\nopen('ready', "
        "'w').close()\ntime.sleep(60)\n"
    )
    program(tmp_path / "bin/jaxpt", RECORDER + waiting)
    process = subprocess.Popen(command, cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == status
    argv, _ = called(tmp_path / "called.json")
    assert argv[0] == "train" and argv[-1] == f"{tmp_path}/mine"


def test_a_skypilot_task_starts_one_process_per_node(tmp_path, hosts):
    hosts("clone")
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)
    environment = {
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=tmp_path / "clone/jaxpt",
        env={**os.environ, **environment},
        check=True,
    )
    argv, environment = called(tmp_path / "clone.json")
    workdir = argv[argv.index("--workdir") + 1]
    assert argv[0] == "train" and any(workdir.startswith(each) for each in task["file_mounts"])
    assert environment == {
        "JAXPT_COORDINATOR": f"10.0.0.7:{launch.COORDINATOR_PORT}",
        "JAXPT_PROCESSES": "2",
        "JAXPT_PROCESS": "1",
    }


@pytest.mark.parametrize("name", ["train.sbatch", "jobset.yaml", "skypilot.yaml"])
def test_the_command_of_a_launch_file_is_one_that_jaxpt_takes(name):
    """Its flags exist, and its recipe opens."""
    text = (ROOT / "launch" / name).read_text()
    for words in re.findall(r"jaxpt train (--.*?)(?: &|$)", text, re.MULTILINE):
        words = words.replace('"$@"', "--config configs/base.py").split()
        arguments = main.build_parser().parse_args(["train", *words])
        main.options.load_settings(arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: launch.train_command(str(ROOT / "configs/base.py"), "runs/x", []),
            "absolute path",
        ),
        (
            lambda: launch.train_command(str(ROOT / "configs/base.py"), "s3://bucket/x", []),
            "only one process can save checkpoints to s3://",
        ),
        (lambda: launch.train_command("/etc/passwd", "/runs/x", []), "Put it into the clone"),
        (
            lambda: launch.plan_tpu_request("mine", "z", 1, launch.TpuRequest("v5e:2x4")),
            "expected Google's name of a slice, such as v4-8",
        ),
        (
            lambda: launch.execute_launch(
                launch.LaunchPlan(("no-such-program",), [["touch started"]], {})
            ),
            "no-such-program: not on this machine's PATH",
        ),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_starts(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_hosts_get_what_the_buckets_of_a_run_need(tmp_path):
    command = ["tpu-vm", "--name=n", "--zone=z", "--config", str(ROOT / "configs/quickstart.py")]
    for workdir, needed in (("/runs/x", ""), ("gs://bucket/x", " -r requirements-gcs.txt")):
        status, printed = entry_points.run_command(
            "launch", [*command, "--workdir", workdir], tmp_path
        )
        assert status == 0 and f"--workdir {workdir} " in printed
        assert f"-r requirements-tpu.txt{needed} -e ." in printed


def test_without_go_nothing_is_done_and_what_is_printed_does_it(tmp_path, hosts):
    hosts("one", "two")
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

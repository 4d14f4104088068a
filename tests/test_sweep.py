"""Sweeps: every combination once, seeds together, what is finished passed over, failures named."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from jaxpt import io, sweep
from jaxpt.spec import UserError
from jaxpt.train.metrics import stream_metrics

RECIPE = """
from jaxpt.config import defaults
def get_config():
    c = defaults()
    c.pack.seq_len = 64
    c.model.n_layers, c.model.d_model, c.model.d_ff = 1, 24, 40
    c.model.n_heads, c.model.n_kv_heads, c.model.d_head = 6, 2, 8
    c.model.max_seq_len, c.model.tie_embeddings = 64, True
    c.train.steps, c.train.batch_size, c.train.log_every, c.train.eval_sequences = 6, 8, 1, 8
    return c
"""


def test_every_combination_is_a_run_of_its_own_name():
    axes = [sweep.parse_axis("optim.peak_lr=1e-3,2e-3"), sweep.parse_axis("mixture.seed=0,1,2")]
    cells = sweep.list_cells(axes)
    assert len({cell.name for cell in cells}) == 6 and len({cell.group for cell in cells}) == 2
    assert cells[1].name == "peak_lr=0.001,mixture.seed=1"
    assert cells[1].overrides == ["--config.optim.peak_lr=0.001", "--config.mixture.seed=1"]


def test_knobs_joined_by_plus_change_together():
    axes = ["initialize.seed+mixture.seed=3,5", "optim.peak_lr=1e-3,2e-3"]
    cells = sweep.list_cells(list(map(sweep.parse_axis, axes)))
    assert [cell.seeds for cell in cells[::2]] == [
        "initialize.seed=3, mixture.seed=3",
        "initialize.seed=5, mixture.seed=5",
    ]
    assert len(cells) == 4 and len({cell.group for cell in cells}) == 2
    with pytest.raises(UserError, match=r"mixture\.seed: given twice"):
        sweep.list_cells([sweep.parse_axis(text) for text in (axes[0], "mixture.seed=1")])


def test_values_are_words_numbers_or_tuples():
    assert sweep.parse_axis("optim.schedule=wsd,cosine").values == ("wsd", "cosine")
    assert sweep.parse_axis("model.n_layers=4").values == (4,)
    pair = sweep.parse_axis("train.grow=((4,'stack(g=2)'),),()").values
    assert pair == (((4, "stack(g=2)"),), ())
    [first, second] = sweep.list_cells([sweep.Axis(("train.grow",), pair)])
    assert "/" not in first.name and " " not in first.name and first.name != second.name


def test_a_second_sweep_adds_its_runs_to_those_of_the_first(tmp_path):
    runs = {}
    for number in (1, 2, 3):
        runs[f"peak_lr={number}"] = {"arm": f"peak_lr={number}", "seeds": "", "n_steps": number}
    first, both = dict([*runs.items()][1:]), dict([*runs.items()][:2])
    sweep.record_runs(tmp_path / "sweep.json", first)
    sweep.record_runs(tmp_path / "sweep.json", both)
    found = io.read_json(tmp_path / "sweep.json")["runs"]
    assert found == runs and list(found) == ["peak_lr=2", "peak_lr=3", "peak_lr=1"]


def test_a_run_has_an_arm_which_its_seeds_and_its_length_do_not_change():
    axes = ["optim.peak_lr=1e-3", "initialize.seed=4", "mixture.seed=7", "train.steps=5"]
    [cell] = sweep.list_cells(list(map(sweep.parse_axis, axes)))
    assert (cell.arm, cell.seeds) == ("peak_lr=0.001", "initialize.seed=4, mixture.seed=7")
    assert sweep.Cell({"train.steps": 5}).arm == "all runs"


@pytest.mark.parametrize(
    "text", ["optim.peak_lr", "peak_lr=1,2", "optim.peak_lr=1,,2", "optim.peak_lr=1,1"]
)
def test_what_is_no_axis_is_refused(text):
    with pytest.raises(
        UserError, match=r"--over .*: (expected SECTION\.KNOB=|names a value twice)"
    ):
        sweep.parse_axis(text)


# what the recipe does in the process of a run, and not in that of the sweep
CRASH = """
    import os, sys
    if sys.argv[1] == "train":
        os.kill(os.getpid(), 9)
"""
TAKEN = """
    import subprocess, sys
    if sys.argv[1] == "train":
        run_dir = sys.argv[sys.argv.index("--workdir") + 1]
        code = (
            "import pathlib, sys, time; from jaxpt import io\\n"
            "run_dir = pathlib.Path(sys.argv[1]); run_dir.mkdir(parents=True)\\n"
            "with io.hold(run_dir):\\n"
            "    print('held', flush=True); time.sleep(20)"
        )
        other = subprocess.Popen([sys.executable, "-c", code, run_dir], stdout=subprocess.PIPE)
        other.stdout.readline()
"""


@pytest.mark.parametrize(("what", "status"), [(CRASH, 1), (TAKEN, 0)], ids=["crash", "taken"])
def test_a_run_that_crashes_or_that_another_process_takes_does_not_stop_the_others(
    texts, tmp_path, what, status
):
    (tmp_path / "recipe.py").write_text(RECIPE.replace("    return c", f"{what}    return c"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/packed").symlink_to(texts / "base/packed")
    words = [sys.executable, "-m", "jaxpt", "sweep", "--config", "recipe.py", "--workdir", "runs"]
    words += ["--over", "optim.peak_lr=1e-3,2e-3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    if what == CRASH:
        assert "2 of the runs failed: peak_lr=0.001; peak_lr=0.002" in done.stderr, done.stderr
    else:
        assert done.stderr.count("another process was at it first") == 2, done.stderr


@pytest.mark.slow
def test_a_sweep_trains_what_is_missing_and_ends_with_a_table(texts, tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/packed").symlink_to(texts / "base/packed")
    words = [sys.executable, "-m", "jaxpt", "sweep", "--config", "recipe.py", "--workdir", "runs"]
    words += ["--over", "optim.peak_lr=1e-9,1e-2", "initialize.seed=3,5"]

    def run():
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    table = run().splitlines()
    best, worst = table[-2:]
    assert best.split()[0] == "0.01" and worst.split()[0] == "1e-09"
    assert best.endswith("2 of 2") and float(best.split()[1]) < float(worst.split()[1])
    metrics = tmp_path / "runs/peak_lr=0.01,initialize.seed=5/metrics.jsonl"
    n_records = len(list(stream_metrics(metrics)))
    assert run().splitlines()[-2:] == [best, worst]
    assert len(list(stream_metrics(metrics))) == n_records  # finished runs were passed over

    words[-1] = "optim.b1=0.9,x"
    refused = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "optim.b1" in refused.stderr

"""A sweep compared: speed-ups by the control's law, outcomes over seeds, what is refused."""

import dataclasses
import html
import json
import math

import pytest
from entry_points import run_command

from jaxpt.report import experiment
from jaxpt.spec import UserError
from jaxpt.train.records import NOTHING_DONE, HeldoutMetrics

LENGTHS = (100, 200, 400, 800, 1600)
FLOPS_PER_STEP = 1e9


def loss_of(flops):
    """The law that the made runs follow."""
    return 3.0 + 40 * max(flops, 1e-60) ** -0.2


def write_run(run_dir, n_steps, speed=1.0, deviation=0.0, clock=1.0, decay=0.0):
    """Write a finished run that is `speed` times as fast as the law, with eight held-out losses.

    The last one lies `decay` below it.
    """
    run_dir.mkdir(parents=True)
    lines = []
    for i in range(1, 9):
        step = n_steps * i // 8
        flops = step * FLOPS_PER_STEP
        loss = loss_of(speed * flops) + deviation - (decay if i == 8 else 0)
        sums = dataclasses.replace(
            NOTHING_DONE, flops=flops, productive_seconds=clock * step, n_tokens=step
        )
        losses = {"prose": loss - 0.5, "code": loss + 0.5}
        lines.append(json.dumps(HeldoutMetrics(step, losses, 64, **vars(sums)).to_json()) + "\n")
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    (run_dir / "manifest.json").write_text("{}")


def write_sweep(directory, runs):
    """Write what jaxpt sweep leaves beside its runs: of each its arm, its seeds and its steps."""
    found = {
        name: {"arm": arm, "seeds": str(seed), "n_steps": n_steps}
        for name, (arm, seed, n_steps) in runs.items()
    }
    (directory / "sweep.json").write_text(json.dumps({"runs": found}))


DEVIATIONS = (0.02, -0.013, 0.004)  # of seeds


@pytest.fixture
def sweep(tmp_path):
    """Two arms beside the control at five lengths, three seeds each that deviate alike."""
    runs = {}
    for name, speed, clock in (("adamw", 1.0, 1.0), ("muon", 1.5, 2.0), ("lion", 1.0, 1.0)):
        for seed, deviation in enumerate(DEVIATIONS):
            for n_steps in LENGTHS:
                run = f"name={name},steps={n_steps},initialize.seed={seed}"
                runs[run] = f"name={name}", seed, n_steps
                own = deviation + (0.003 * (seed - 1) if name != "adamw" else 0)
                write_run(tmp_path / run, n_steps, speed, own, clock)
    write_sweep(tmp_path, runs)
    return tmp_path


def test_speed_ups_are_what_the_control_would_spend_in_flops_and_in_time(sweep):
    found = experiment.read_experiment(sweep)
    assert found.control == "name=adamw" and "5 lengths" in found.law_of
    control, muon, lion = found.arms
    assert control.outcome == "control" and control.n_seeds == 3
    assert muon.outcome == "faster" and lion.outcome == "undecided"
    speedup = muon.speedups["flops"]
    assert speedup.factor == pytest.approx(1.5, rel=0.03)
    assert 1 < speedup.low < 1.5 < speedup.high < 2.1
    assert speedup.control_frac == pytest.approx(1.5, rel=0.03)
    assert muon.speedups["seconds"].factor == pytest.approx(0.75, rel=0.03)
    assert "extrapolated to 1.5" in muon.sentence and muon.sentence.startswith("name=muon: faster")
    assert lion.speedups["flops"].factor == pytest.approx(1, rel=0.03)


def test_the_deviation_of_a_seed_is_shared_with_the_control(sweep):
    lion = experiment.read_experiment(sweep).arms[2].speedups["flops"]
    assert lion.high / lion.low < 2.5  # unpaired: above 20


def test_an_arm_is_tested_on_the_seeds_of_the_control_alone(tmp_path):
    """The control has one seed, 0.2 nats worse than others: one arm has it too, one does not."""
    runs = {}
    for arm, seeds in (("control", (0,)), ("shared", (0, 1, 2)), ("apart", (1, 2))):
        for seed in seeds:
            runs[f"{arm},{seed}"] = arm, seed, 800
            write_run(tmp_path / f"{arm},{seed}", 800, deviation=0.0 if seed else 0.2)
    write_sweep(tmp_path, runs)
    _, shared, apart = experiment.read_experiment(tmp_path).arms
    assert (shared.outcome, apart.outcome) == ("untested", "untested")
    assert shared.speedups["flops"].factor == pytest.approx(1, rel=0.03)


def test_a_control_of_one_length_is_fitted_within_its_runs(tmp_path):
    runs = {}
    for lr, speed in ((1, 1.0), (2, 0.5)):
        run = f"peak_lr={lr}"
        runs[run] = run, 0, 800
        write_run(tmp_path / run, 800, speed)
    write_sweep(tmp_path, runs)
    found = experiment.read_experiment(tmp_path)
    assert "no decay" in found.law_of
    (_, slow) = found.arms
    assert slow.outcome == "untested" and slow.speedups["flops"].factor == pytest.approx(0.5, 0.03)


@pytest.mark.parametrize("lengths", [(800,), LENGTHS])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_an_arm_that_changes_nothing_is_undecided(tmp_path, lengths, decay):
    runs = {}
    for arm in ("control", "same"):
        for seed, deviation in enumerate(DEVIATIONS):
            for n_steps in lengths:
                run = f"{arm},{seed},{n_steps}"
                runs[run] = arm, seed, n_steps
                write_run(tmp_path / run, n_steps, deviation=deviation, decay=decay)
    write_sweep(tmp_path, runs)
    (_, same) = experiment.read_experiment(tmp_path).arms
    assert (same.outcome, same.p_value) == ("undecided", 1.0)
    assert same.speedups["flops"].factor == pytest.approx(1)


def test_an_interval_that_no_float_holds_ends_in_infinity(tmp_path):
    speeds = {"control": (1, 1), "varied": (1, 1e-60)}
    runs = {}
    for arm, of_seeds in speeds.items():
        for seed, speed in enumerate(of_seeds):
            runs[f"{arm},{seed}"] = arm, seed, 800
            write_run(tmp_path / f"{arm},{seed}", 800, speed)
    write_sweep(tmp_path, runs)
    (_, varied) = experiment.read_experiment(tmp_path).arms
    assert 0 < varied.speedups["flops"].factor < 1e-20 and varied.speedups["flops"].high == math.inf


def test_the_page_shows_the_runs_of_the_sweep_and_no_others(tmp_path):
    runs = {f"peak_lr={lr}": (f"peak_lr={lr}", 0, 800) for lr in (1, 2, 3)}
    for run in ("peak_lr=1", "peak_lr=2", "other"):
        write_run(tmp_path / run, 800)
    write_sweep(tmp_path, runs)
    (tmp_path / "packed").mkdir()  # which the runs read
    status, printed = run_command("report", ["--experiment", ".", "--to", "out.html"], tmp_path)
    assert status == 0, printed
    assert "<title>peak_lr=1 and peak_lr=2</title>" in (tmp_path / "out.html").read_text()


def test_the_page_has_the_sentences_and_the_numbers_are_beside_it(sweep):
    status, printed = run_command("report", ["--experiment", ".", "--to", "out.html"], sweep)
    assert status == 0, printed
    page = html.unescape((sweep / "out.html").read_text())
    record = json.loads((sweep / "out.json").read_text())
    for arm in record["arms"]:
        assert arm["sentence"] in printed and arm["sentence"] in page
    assert experiment.Experiment.from_json(record).arms[1].outcome == "faster"


def test_what_is_no_sweep_and_what_has_too_few_losses_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no sweep\.json"):
        experiment.read_experiment(tmp_path)
    write_sweep(tmp_path, {"a,0": ("a", 0, 3), "a,1": ("a", 1, 3), "b": ("b", 0, 3)})
    for run in ("a,0", "a,1"):
        write_run(tmp_path / run, 3)  # whose eight losses are after 0, 1, 2 and 3 steps
    expected = r"at least 4 held-out losses of the control, .* at different FLOPs, got 3\."
    with pytest.raises(UserError, match=expected):
        experiment.read_experiment(tmp_path)

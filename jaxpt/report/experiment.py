"""Compare the arms of a sweep: which of them reaches a loss for less than the control.

The control is the first value of each knob. A law of its losses over its cost, L = E + B / C^beta,
moved to what its runs as long as the arm's end at, says what it would have cost the control to
reach an arm's loss; that, over what the arm cost, is the arm's speed-up. Seeds are repeats; lengths
(train.steps) are budgets of one arm.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from jaxpt import io, stage
from jaxpt.plan import scaling
from jaxpt.report.figures import Table
from jaxpt.report.format import format_count, format_decimal, format_seconds
from jaxpt.report.records import Sweep
from jaxpt.spec import Record, UserError
from jaxpt.train.metrics import stream_metrics
from jaxpt.train.records import HeldoutMetrics

MIN_POINTS = 4  # of a law with three unknowns
FIRST_FRAC = 0.1  # of a run, whose losses no power law describes
LEVEL = 0.05  # of significance, Holm's over the arms
ROUNDING = 1e-9  # nats per token: smaller differences are none
MAX_EXPONENT = 700.0  # of a float64
COSTS = {"flops": "FLOPs", "seconds": "time"}


class Point(NamedTuple):
    """A held-out loss, the mean over sources in nats per token, and what it took."""

    loss: float
    flops: float
    seconds: float  # in steps


class Trained(NamedTuple):
    """A finished run: its seeds, its steps, and its held-out losses in order."""

    seeds: str
    n_steps: int
    points: list[Point]


@dataclasses.dataclass(frozen=True)
class Speedup(Record):
    """What the control would spend to reach an arm's loss, over what the arm spent."""

    factor: float  # infinite: by its law the control never reaches it
    low: float  # of a 95 % interval over seeds; NaN of one seed
    high: float
    control_frac: float  # what the control would spend, in that of its longest run


@dataclasses.dataclass(frozen=True)
class Arm(Record):
    """What became of a combination of values."""

    name: str
    # control, faster, slower, undecided, untested (under two of the control's seeds) or unfinished
    outcome: str
    sentence: str
    n_seeds: int = 0
    loss: float = math.nan  # of its longest runs, nats per token
    flops: float = math.nan
    seconds: float = math.nan
    speedups: dict[str, Speedup] = dataclasses.field(default_factory=dict)  # flops, seconds
    p_value: float = math.nan  # of a loss that is the law's at these FLOPs; Holm's over the arms


@dataclasses.dataclass(frozen=True)
class Experiment(Record):
    """A sweep, compared."""

    control: str
    law_of: str  # what the control's laws are fitted to
    laws: dict[str, scaling.ScalingLaw]
    arms: tuple[Arm, ...]


def read_experiment(directory: io.Path) -> Experiment:
    """Compare the runs of a sweep's directory.

    Raises:
        UserError: it is no sweep's, or too little of the control is there.
    """
    arms: dict[str, list[Trained]] = {}
    for name, run in read_sweep(directory).runs.items():
        runs = arms.setdefault(run.arm, [])
        if io.exists(directory / name / "manifest.json"):
            points = read_points(directory / name)
            if points:
                runs.append(Trained(run.seeds, run.n_steps, points))
    return compare_arms(arms, str(directory))


def list_runs(directory: io.Path) -> list[io.Path]:
    """Return the directories of a sweep's runs that have begun. Raise UserError if it is none."""
    runs = [directory / name for name in read_sweep(directory).runs]
    return [run for run in runs if io.exists(run)]


def read_sweep(directory: io.Path) -> Sweep:
    """Return what was run, whatever became of it. Raise UserError if a directory is no sweep's."""
    file = directory / "sweep.json"
    if not io.exists(file):
        raise UserError(
            f"--experiment {directory}: has no sweep.json. Give the --workdir of jaxpt sweep."
        )
    return Sweep.from_json(io.read_json(file), str(file))


def read_points(run_dir: io.Path) -> list[Point]:
    """Return a run's held-out losses with their costs."""
    points = []
    for record in stream_metrics(run_dir / "metrics.jsonl"):
        if isinstance(record, HeldoutMetrics) and record.step and record.flops:
            points.append(Point(record.mean_loss, record.flops, record.productive_seconds))
    return points


def compare_arms(arms: dict[str, list[Trained]], where: str) -> Experiment:
    """Return the first arm's laws, and each other arm against them."""
    control, *others = arms
    points, law_of = choose_law_points(arms[control], where)
    laws = {cost: fit_law(points, cost) for cost in COSTS}
    references = {name: choose_reference(arms[name], arms[control]) for name in arms}
    moved = {name: move_laws(laws, references[name]) for name in arms}
    paired = {name: list_paired_ends(arms[name], references[name]) for name in others}
    ends = {
        name: paired[name] or [run.points[-1] for run in longest(arms[name])] for name in others
    }
    tested = {name: list_gains(paired[name], moved[name]["flops"]) for name in others}
    p_values = adjust_by_holm({name: compute_p_value(tested[name]) for name in others})
    compared = [describe_arm(arms[control], Arm(control, "control", ""))]
    for name in others:
        speedups = {}
        if ends[name]:
            for cost, law in moved[name].items():
                speedups[cost] = estimate_speedup(ends[name], arms[control], law, cost)
        outcome = choose_outcome(tested[name], p_values[name]) if ends[name] else "unfinished"
        arm = Arm(name, outcome, "", speedups=speedups, p_value=p_values[name])
        compared.append(describe_arm(arms[name], arm))
    return Experiment(control, law_of, moved[control], tuple(compared))


# ---- the control's law


def choose_law_points(runs: list[Trained], where: str) -> tuple[list[Point], str]:
    """Return the points of the control's law: its last losses at several lengths, else a curve's.

    The former have had their decay, as the arms have; the losses within a run have not.
    """
    n_lengths = len({run.n_steps for run in runs})
    if n_lengths >= MIN_POINTS:
        return [run.points[-1] for run in runs], f"its last losses at {n_lengths} lengths"
    points: list[Point] = []
    for run in longest(runs):
        last = run.points[-1]
        points += [point for point in run.points if point.flops >= FIRST_FRAC * last.flops]
    n_distinct = len({point.flops for point in points})
    if n_distinct < MIN_POINTS:
        raise UserError(
            f"--experiment {where}: expected at least {MIN_POINTS} held-out losses of the control, "
            f"the first value of each knob, at different FLOPs, got {n_distinct}. Wait for its "
            "runs, set a smaller train.eval_every, or sweep over train.steps too."
        )
    return points, "the losses within its longest runs, which had no decay yet"


def longest(runs: list[Trained]) -> list[Trained]:
    """Return the runs of the most steps."""
    most = max((run.n_steps for run in runs), default=0)
    return [run for run in runs if run.n_steps == most]


def fit_law(points: Iterable[Point], cost: str) -> scaling.ScalingLaw:
    """Return L = E + B / C^beta of a cost."""
    found = [scaling.LossPoint(1, getattr(point, cost), point.loss) for point in points]
    return scaling.solve_scaling_law(found, scaling.SCALING_LAWS["chinchilla"])


def choose_reference(runs: list[Trained], control: list[Trained]) -> list[Trained]:
    """Return the control's runs as long as an arm's longest; if it has none, its own longest."""
    lengths = {run.n_steps for run in longest(runs)}
    return [run for run in control if run.n_steps in lengths] or longest(control)


def move_laws(
    laws: dict[str, scaling.ScalingLaw], reference: list[Trained]
) -> dict[str, scaling.ScalingLaw]:
    """Return the laws, moved to the mean end of the control's runs that an arm is compared with.

    What a law misses there would be every arm's gain: one of losses within runs does not know what
    the decay brings.
    """
    ends = [run.points[-1] for run in reference]
    moved = {}
    for cost, law in laws.items():
        misses = [end.loss - law.predict_loss(1, getattr(end, cost)) for end in ends]
        moved[cost] = dataclasses.replace(law, E=law.E + statistics.mean(misses))
    return moved


# ---- speed-ups


def list_paired_ends(runs: list[Trained], reference: list[Trained]) -> list[Point]:
    """Return the ends of an arm's longest runs whose seeds the control has too.

    The seed's deviation from the control's mean is taken off the loss: what seeds do to the control
    is no arm's gain, and an arm without the control's seeds cannot be tested.
    """
    losses = {run.seeds: run.points[-1].loss for run in reference}
    mean = statistics.mean(losses.values()) if losses else 0.0
    ends = []
    for run in longest(runs):
        end = run.points[-1]
        if run.seeds in losses:
            ends.append(end._replace(loss=end.loss - (losses[run.seeds] - mean)))
    return ends


def list_gains(ends: list[Point], law: scaling.ScalingLaw) -> list[float]:
    """Return what each run won over the control's law at the same FLOPs, nats per token."""
    return [law.predict_loss(1, end.flops) - end.loss for end in ends]


def estimate_speedup(
    ends: list[Point], control: list[Trained], law: scaling.ScalingLaw, cost: str
) -> Speedup:
    """Return an arm's speed-up in a cost, the geometric mean of its seeds."""
    logs = []
    for end in ends:
        needed = law.compute_tokens_to_loss(1, end.loss)
        logs.append(math.log(needed / getattr(end, cost)))
    mean = statistics.mean(logs)
    half = half_interval(logs)
    spent = statistics.mean(getattr(end, cost) for end in ends)
    most = max(getattr(run.points[-1], cost) for run in control)
    factor, low, high = map(exponentiate, (mean, mean - half, mean + half))
    return Speedup(factor, low, high, factor * spent / most)


def exponentiate(value: float) -> float:
    """Return e to a power; infinity where float64 ends, as of the interval of two seeds."""
    return math.inf if value > MAX_EXPONENT else math.exp(value)


def half_interval(values: list[float]) -> float:
    """Return half of the 95 % t interval of a mean; NaN of one value, or of infinite ones."""
    from scipy import stats

    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    error = statistics.stdev(values) / len(values) ** 0.5
    return float(stats.t.ppf(0.975, len(values) - 1)) * error


def compute_p_value(gains: list[float]) -> float:
    """Return the p value of a mean of 0; NaN of one value."""
    from scipy import stats

    if len(gains) < 2:
        return math.nan
    mean = abs(statistics.mean(gains))
    error = statistics.stdev(gains) / len(gains) ** 0.5
    if error < ROUNDING:
        return float(mean < ROUNDING)
    return float(2 * stats.t.sf(mean / error, len(gains) - 1))


def adjust_by_holm(p_values: dict[str, float]) -> dict[str, float]:
    """Return p values adjusted for as many tests (Holm 1979); NaN is none."""
    tested = {name: p for name, p in p_values.items() if not math.isnan(p)}
    adjusted, highest = dict(p_values), 0.0
    for rank, name in enumerate(sorted(tested, key=lambda name: tested[name])):
        highest = max(highest, min(1.0, (len(tested) - rank) * tested[name]))
        adjusted[name] = highest
    return adjusted


def choose_outcome(gains: list[float], p_value: float) -> str:
    """Return the outcome of an arm in a word, by its gains on the control's seeds."""
    if len(gains) < 2:
        return "untested"
    if p_value >= LEVEL:
        return "undecided"
    return "faster" if statistics.mean(gains) > 0 else "slower"


# ---- words


def describe_arm(runs: list[Trained], arm: Arm) -> Arm:
    """Return the arm with its numbers and its sentence."""
    if not runs:
        return dataclasses.replace(arm, sentence=f"{arm.name}: no run of it has finished.")
    last = [run.points[-1] for run in longest(runs)]
    loss, flops, seconds = (statistics.mean(values) for values in zip(*last, strict=True))
    seeds = f"{len(last)} seed{'s' * (len(last) > 1)}"
    sentence = f"{arm.name}: {arm.outcome}, {loss:.4f} nats per token ({seeds})"
    speedups = [arm.speedups[cost] for cost in COSTS if cost in arm.speedups]
    if speedups and all(math.isfinite(speedup.factor) for speedup in speedups):
        parts = map(describe_speedup, speedups, COSTS.values())
        sentence += f"; against the control {' and '.join(parts)}"
        frac = speedups[0].control_frac
        if frac > 1:
            sentence += f"; the law is extrapolated to {frac:.2f} x the control's longest run"
    elif speedups:
        sentence += "; by its law the control never reaches this loss"
    return dataclasses.replace(
        arm, sentence=f"{sentence}.", n_seeds=len(last), loss=loss, flops=flops, seconds=seconds
    )


def describe_speedup(speedup: Speedup, label: str) -> str:
    """Return "1.43 x the speed in FLOPs (95 % 1.20 to 1.70)"."""
    text = f"{speedup.factor:.2f} x the speed in {label}"
    if not math.isnan(speedup.low):
        text += f" (95 % {speedup.low:.2f} to {speedup.high:.2f})"
    return text


class ExperimentView(NamedTuple):
    """What the page shows of an experiment."""

    sentences: list[str]
    table: Table


def make_experiment(experiment: Experiment) -> ExperimentView:
    """Return the sentences and the table."""
    rows = []
    for arm in experiment.arms:
        factors = [format_factor(arm.speedups.get(cost)) for cost in COSTS]
        losses = [format_decimal(arm.loss, 4), format_count(arm.flops), format_seconds(arm.seconds)]
        rows.append([arm.name, arm.outcome, *losses, *factors, str(arm.n_seeds)])
    heads = ["arm", "outcome", "held-out loss", "FLOPs", "time in steps"]
    heads += [f"speed-up, {label}" for label in COSTS.values()]
    caption = (
        f"Control: {experiment.control}; its law is fitted to {experiment.law_of}, and moved to "
        "what its runs as long as the arm's end at. Speed-up: what the control would spend to "
        "reach the arm's loss, over what the arm spent. Outcomes: t test over the seeds that the "
        "control has too, Holm's correction over arms, 5 %."
    )
    table = Table([*heads, "seeds"], rows, caption, n_text_columns=2)
    return ExperimentView([arm.sentence for arm in experiment.arms], table)


def format_factor(speedup: Speedup | None) -> str:
    """Return a speed-up for the table."""
    return f"{speedup.factor:.2f}" if speedup else ""


def write_experiment(experiment: Experiment, page: io.Path) -> io.Path:
    """Write the numbers beside a page, as JSON. Return the file."""
    file = page.parent / f"{page.name.removesuffix('.html')}.json"
    stage.check_output_path(file, "report.json")
    io.write_json(file, experiment)
    return file

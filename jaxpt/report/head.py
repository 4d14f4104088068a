"""Describe runs for the head of the page: is it running, how far, how fast, what runs and where."""

from __future__ import annotations

import datetime
from typing import NamedTuple

from jaxpt.report import read
from jaxpt.report.figures import Cell, Table
from jaxpt.report.format import (
    clip_text,
    finite_or_none,
    format_change,
    format_count,
    format_decimal,
    format_percent,
    format_seconds,
    format_whole,
)
from jaxpt.report.read import RunData

# a run writes its sign of life every second, in a bucket every 30: three are not missed by chance
ALIVE_SECONDS = 100
MAX_FIGURES = 8  # of the key figures
MAX_SOURCES = 4  # held-out sources among them
COMMIT_DIGITS = 10


class State(NamedTuple):
    """Whether a run goes on."""

    kind: str  # "running", "finished", "dead" or "waiting"
    text: str
    when: str = ""  # it finished, or died


class KeyFigure(NamedTuple):
    """A number that a reader looks for first."""

    label: str
    value: str
    unit: str = ""


class RunHead(NamedTuple):
    """What the head of the page shows of a run."""

    name: str
    state: State
    frac: float | None  # of the steps, done
    progress: str
    figures: list[KeyFigure]
    facts: list[str]  # growth, batch, speed, machine
    program: list[tuple[str, str]]  # command, commit and versions


def make_heads(runs: list[RunData]) -> list[RunHead]:
    """Return the head of each run."""
    now = datetime.datetime.now(datetime.UTC)
    return [describe_run(run, now) for run in runs]


def describe_run(run: RunData, now: datetime.datetime) -> RunHead:
    """Return the head of a run."""
    state = find_state(run, now)
    n_steps = finite_or_none(run.settings.get("train.steps"))
    done = read.last_value(run.metrics.train, "step") or 0
    frac = min(1.0, done / n_steps) if n_steps and run.metrics.train else None
    program = []
    if run.start:
        commit = run.start.commit[:COMMIT_DIGITS]
        versions = [f"{name} {version}" for name, version in run.start.versions.items()]
        program = [("command", run.start.command), ("commit", commit)]
        program.append(("versions", ", ".join(versions)))
    return RunHead(
        name=run.name,
        state=state,
        frac=frac,
        progress=describe_progress(run, state, done, n_steps),
        figures=list_figures(run)[:MAX_FIGURES],
        facts=list_facts(run),
        program=[(label, text) for label, text in program if text],
    )


def find_state(run: RunData, now: datetime.datetime) -> State:
    """Return whether a run goes on, by its manifest and its last sign of life."""
    n_steps = finite_or_none(run.settings.get("train.steps"))
    last_step = read.last_value(run.metrics.train, "step") or 0
    # a finished run that is given more steps goes on
    is_short = bool(n_steps) and bool(run.metrics.train) and last_step < n_steps
    manifest = run.manifest
    if manifest and manifest.stage == "train" and not is_short:
        return State("finished", "finished", format_time(manifest.created))
    if is_recent(run.last_sign, now):
        return State("running", "running")
    if parse_time(run.last_sign):
        return State("dead", "dead since", format_time(run.last_sign))
    if run.metrics.train:
        return State("waiting", "not finished")
    return State("waiting", "not trained yet")


def is_recent(last_sign: str, now: datetime.datetime) -> bool:
    """Return whether who gave a sign of life then is still alive."""
    seen = parse_time(last_sign)
    return seen is not None and (now - seen).total_seconds() < ALIVE_SECONDS


def parse_time(text: str) -> datetime.datetime | None:
    """Return a time of ISO 8601 with its zone; None if it is none."""
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else None


def format_time(text: str) -> str:
    """Return "2026-11-29 20:40 UTC"; empty if the text is no time."""
    time = parse_time(text)
    return f"{time.astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC" if time else ""


def describe_progress(run: RunData, state: State, done: float, n_steps: float | None) -> str:
    """Return the steps done, and what is left of a run that goes on."""
    if not run.metrics.train:
        return ""
    if not n_steps:
        return f"{format_whole(done)} steps"
    text = f"{format_whole(done)} of {format_whole(n_steps)} steps"
    step_seconds = read.last_value(run.metrics.train, "step_seconds")
    if state.kind == "running" and step_seconds:
        text += f", {format_seconds((n_steps - done) * step_seconds)} left at this pace"
    return text


def list_figures(run: RunData) -> list[KeyFigure]:
    """Return the numbers that a reader looks for first, as far as they are known."""
    train = run.metrics.train

    def last(field: str) -> float | None:
        return read.last_value(train, field)

    figures = [KeyFigure("loss", format_decimal(last("loss")), "nats/token")]
    losses = list_last_heldout(run)
    for name in read.order_keys(read.list_sources([run]), losses)[:MAX_SOURCES]:
        figures.append(KeyFigure(f"held-out {name}", format_decimal(losses[name])))
    figures.append(KeyFigure("parameters", format_count(run.n_params)))
    figures.append(KeyFigure("tokens", format_count(last("n_tokens"))))
    figures.append(KeyFigure("time", format_seconds(last("seconds"))))
    figures.append(KeyFigure("goodput", format_percent(last("goodput"))))
    figures.append(KeyFigure("cost", format_decimal(last("usd"), 2), "USD"))
    return [figure for figure in figures if figure.value]


def list_last_heldout(run: RunData) -> dict[str, float]:
    """Return the last held-out loss of each source, nats per token."""
    losses = {}
    for point in run.metrics.heldout[-1:]:
        for name, loss in point.heldout_loss.items():
            if finite_or_none(loss) is not None:
                losses[name] = loss
    return losses


def list_facts(run: RunData) -> list[str]:
    """Return growth, batch, speed and machine of a run in words."""
    facts = []
    if run.growth:
        origin = f"grown from {read.short_model_name(run.growth.parent)}"
        if run.growth.at_step is not None:
            origin = f"grown at step {format_whole(run.growth.at_step)}"
        facts.append(f"{origin} by {', '.join(run.growth.operators)}")
    batch_size = finite_or_none(run.settings.get("train.batch_size"))
    seq_lens = {counts.seq_len for counts in run.packed}
    seq_lens = seq_lens or {run.settings.get("pack.seq_len")}
    seq_len = finite_or_none(min(seq_lens, key=str))
    schedule = run.settings.get("train.shape_schedule")
    if isinstance(schedule, list) and schedule:
        shapes = [f"{format_whole(n)} × {format_whole(length)}" for _, n, length in schedule]
        facts.append(f"batch {', then '.join(shapes)} tokens")
    elif batch_size and seq_len and run.metrics.train:
        n_tokens = format_whole(batch_size * seq_len)
        facts.append(
            f"batch {format_whole(batch_size)} × {format_whole(seq_len)} = {n_tokens} tokens"
        )
    speed = read.last_value(run.metrics.train, "tokens_per_second")
    if speed:
        facts.append(f"{format_whole(speed)} tokens/s")
    mfu = read.last_value(run.metrics.train, "mfu")
    if mfu:
        facts.append(f"MFU {format_percent(mfu)}")
    if run.start:
        machine = f"{format_whole(run.start.n_devices)} × {run.start.device_kind}"
        hosts = run.start.n_processes
        if run.start.host:
            machine += f" on {run.start.host}"
        if hosts > 1:
            machine += f" and {hosts - 1} more"
        facts.append(machine)
        if run.start.commit:
            facts.append(f"commit {run.start.commit[:COMMIT_DIGITS]}")
    return facts


def make_outcomes(runs: list[RunData]) -> Table | None:
    """Return a row per run, what became of it; None of a single one."""
    if len(runs) == 1:
        return None
    now = datetime.datetime.now(datetime.UTC)
    sources = read.list_sources(runs)
    losses = [list_last_heldout(run) for run in runs]
    sources = [name for name in sources if any(name in each for each in losses)]
    columns: dict[str, list[str | Cell]] = {"run": [clip_text(run.name, 40) for run in runs]}
    columns["state"] = [find_state(run, now).kind for run in runs]
    columns["steps"] = [format_whole(read.last_value(run.metrics.train, "step")) for run in runs]
    columns["tokens"] = [
        format_count(read.last_value(run.metrics.train, "n_tokens")) for run in runs
    ]
    columns["loss"] = []
    for run in runs:
        first = read.first_value(run.metrics.train, "loss")
        last = read.last_value(run.metrics.train, "loss")
        columns["loss"].append(format_change(first, last))
    for name in sources:
        columns[f"held-out {name}"] = [format_decimal(each.get(name)) for each in losses]
    columns["time"] = [
        format_seconds(read.last_value(run.metrics.train, "seconds")) for run in runs
    ]
    columns["USD"] = [format_decimal(read.last_value(run.metrics.train, "usd"), 2) for run in runs]
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    rows = list(zip(*columns.values(), strict=True))
    caption = "Losses in nats per token; held-out: the last measurement."
    return Table(list(columns), rows, caption, n_text_columns=2, css_class="outcomes")

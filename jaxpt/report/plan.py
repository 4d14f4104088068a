"""Describe hours and money, planned and measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jaxpt import hardware
from jaxpt.report.figures import (
    Figure,
    Spec,
    Table,
    make_log_axis,
    nominal,
    quantitative,
)
from jaxpt.report.format import (
    finite_or_none,
    format_brief,
    format_count,
    format_gigabytes,
    format_percent,
    format_whole,
)
from jaxpt.report.read import RunData, get_points, group_distinct_values, last_value
from jaxpt.report.records import Check, Comparison, Ends, Plan, Target
from jaxpt.text import choose_time_unit, format_significant

Formatter = Callable[[float], str]
# field of Projection -> its format
RANGES: dict[str, Formatter] = {"mfu": format_percent, "tokens_per_second": format_count}
PLAN_CAPTION = (
    "Compiled: the real step, compiled for that machine; estimated: from the shape alone. "
    "Ranges: the ends of the assumed efficiency."
)
CHART_CAPTION = (
    "Money against hours for the whole run, both on a log scale. Hollow: it does not fit there."
)


class PlanView(NamedTuple):
    """What the page shows of a plan.json."""

    title: str  # whose it is; "": of the only run
    chart: Figure | None
    targets: Table | None
    search: list[str]
    comparison: Table | None
    checks: Table | None
    notes: tuple[str, ...]


def make_plan(runs: list[RunData]) -> list[PlanView]:
    """Return each plan beside what its runs took."""
    views = []
    for plan, names in group_distinct_values(runs, lambda run: run.plan):
        measured = []
        for run in runs:
            if run.name in names and last_value(run.metrics.train, "seconds"):
                measured.append(run)
        view = PlanView(
            title=", ".join(names) if len(runs) > 1 else "",
            chart=plot_targets(plan),
            targets=make_target_table(plan, measured),
            search=list_search(plan),
            comparison=make_comparison_table(plan.comparison) if plan.comparison else None,
            checks=make_check_table(plan.checks) if plan.checks else None,
            notes=plan.notes,
        )
        views.append(view)
    return views


def make_target_table(plan: Plan, measured: list[RunData]) -> Table | None:
    """Return one row per target, and one per run that was measured."""
    rows = [list_target(target) for target in plan.targets]
    rows += [list_measured(run) for run in measured]
    if not rows:
        return None
    caption = PLAN_CAPTION
    if measured:
        caption += " Measured: what the run has taken so far."
    for run in measured:
        caption += describe_pace(run, plan)
    heads = ["target", "method", "devices", "fits", "GB per device"]
    heads += ["MFU", "tokens/s", "time", "USD"]
    return Table(heads, rows, caption, n_text_columns=2, css_class="many")


def list_target(target: Target) -> list[str]:
    """Return a target's row of the table."""
    row = [target.target, target.method]
    row.append(format_whole(target.n_devices))
    row.append("yes" if target.fits else "no")
    row.append(format_gigabytes(target.peak_bytes))
    for field, format_number in RANGES.items():
        row.append(format_range(target, field, format_number))
    row.append(format_hours(list_ends(target, "hours")))
    row.append(format_range(target, "usd", format_brief))
    return row


def list_measured(run: RunData) -> list[str]:
    """Return what a run took as a row of the table."""
    train = run.metrics.train
    speeds = [speed for _, speed in get_points(train, "tokens_per_second")]
    speed = statistics.median(speeds) if speeds else None
    seconds = last_value(train, "seconds") or 0
    name, n_devices = run.name, None
    if run.start:
        name = run.start.device_kind
        n_devices = run.start.n_devices
    row = [name, "measured", format_whole(n_devices), ""]
    row.append(format_gigabytes(last_value(train, "memory_bytes") or None))
    row.append(format_percent(last_value(train, "mfu") or None))
    row += [format_count(speed), format_hours([seconds / 3600])]
    row.append(format_brief(last_value(train, "usd")))
    return row


def describe_pace(run: RunData, plan: Plan) -> str:
    """Compare the run's pace with the plan for its machine; "" if there is none."""
    trained = last_value(run.metrics.train, "n_tokens")
    seconds = last_value(run.metrics.train, "productive_seconds")
    if not (run.start and trained and seconds and plan.tokens):
        return ""
    chip = hardware.find_chip(run.start.device_kind)
    if not chip:
        return ""
    n_devices = run.start.n_devices
    hours = seconds / 3600 * plan.tokens / trained
    pace = f"at the measured pace it is {format_hours([hours])}"
    spent = last_value(run.metrics.train, "productive_usd")
    if spent or chip.usd_per_hour:
        # the run's own money, where devices or prices changed meanwhile
        at_list_price = hours * n_devices * (chip.usd_per_hour or 0)
        usd = spent * plan.tokens / trained if spent else at_list_price
        pace += f" and {format_brief(usd)} USD"
    for target in plan.targets:
        chip_name, _, _ = target.target.partition(":")
        is_same = (chip_name, target.n_devices) == (chip.name, n_devices)
        if is_same and finite_or_none(target.expected.hours):
            planned_time = format_hours(list_ends(target, "hours"))
            planned_usd = format_range(target, "usd", format_brief) or "no"
            return (
                f" {run.name}: planned on {target.target} were {planned_time} and "
                f"{planned_usd} USD for {format_count(plan.tokens)} tokens; {pace}."
            )
    return ""


def format_range(target: Target, field: str, format_number: Formatter) -> str:
    """Return slow–fast, lowest first, or the expected number if no range was planned."""
    return join_ends(map(format_number, list_ends(target, field)))


def list_ends(target: Target, field: str) -> list[float]:
    """Return a range's ends, lowest first; without a range what is expected; [] if not known."""
    ends = []
    for projection in (target.slow, target.fast):
        value = finite_or_none(getattr(projection, field, None))
        if value is not None:
            ends.append(value)
    expected = finite_or_none(getattr(target.expected, field))
    if len(ends) < 2:
        ends = [] if expected is None else [expected]
    return sorted(ends)


def format_hours(ends: Sequence[float | None]) -> str:
    """Return hours in the unit that suits them, 0.002 as "7.2 seconds"; "never" for None."""
    found = [finite_or_none(end) for end in ends]
    unit, per_hour = choose_time_unit(found)
    texts = ["never" if end is None else format_significant(per_hour * end) for end in found]
    return f"{join_ends(texts)} {unit}" if set(found) - {None} else join_ends(texts)


def join_ends(texts: Iterable[str]) -> str:
    """Return low–high, or one text where both are equal."""
    return "\u2013".join(dict.fromkeys(texts))


def list_search(plan: Plan) -> list[str]:
    """Return the best layouts that jaxpt plan --search found, in words."""
    if not plan.search:
        return []
    lines = []
    found = {"Cheapest": plan.search.cheapest, "Fastest": plan.search.fastest}
    for label, best in found.items():
        if best:
            layout = " ".join([best.target, *(best.overrides or ())])
            lines.append(f"{label} that fits, by jaxpt plan --search: {layout}")
    return lines


def make_comparison_table(comparison: Comparison) -> Table:
    """Return growing against training from scratch, as jaxpt plan --base compared them."""
    rows = []
    for strategy in comparison.strategies:
        row = [strategy.name, format_ends(strategy.tokens, format_count)]
        for frac in (strategy.saved_frac, strategy.saved_with_base_frac):
            row.append(format_ends(frac, format_percent))
        row.append(format_hours(strategy.hours or ()))
        row.append(format_ends(strategy.usd, format_brief))
        rows.append(row)
    caption = (
        f"Strategies to reach {comparison.target_loss:.3f} nats per token. Shares of FLOPs saved "
        "against scratch, from published ranges or, where named, from runs. " + comparison.verdict
    )
    heads = ["strategy", "tokens", "saved", "saved, base paid", "time", "USD"]
    return Table(heads, rows, caption)


def format_ends(ends: Ends | None, format_number: Formatter) -> str:
    """Return best–worst case, "never" for None."""
    texts = []
    for end in ends or ():
        texts.append("never" if end is None else format_number(end))
    return join_ends(texts)


def make_check_table(checks: tuple[Check, ...]) -> Table:
    """Return planned against measured, as jaxpt plan --check compared them."""
    rows = []
    for check in checks:
        run_dir, description, *numbers = dataclasses.astuple(check)
        rows.append([description or run_dir, *map(format_brief, numbers)])
    heads = ["run", "planned s", "measured s", "ratio", "calibrated", "memory ratio", "calibrated"]
    return Table(heads, rows)


def plot_targets(plan: Plan) -> Figure | None:
    """Draw money against hours if two targets have both."""
    values = []
    for target in plan.targets:
        hours = finite_or_none(target.expected.hours)
        usd = finite_or_none(target.expected.usd)
        if hours and usd:
            point = {"target": target.target, "hours": hours, "usd": usd}
            values.append({**point, "fits": target.fits})
    if len(values) < 2:
        return None
    scale = {"type": "log", "padding": 40, "nice": False}
    hours = quantitative("hours", title="hours", scale=scale, axis=make_log_axis("x"))
    usd = quantitative("usd", title="USD", scale=scale, axis=make_log_axis("y"))
    color = "var(--text)"  # it is no run
    if_fits = {"test": "datum.fits", "value": color}
    fill = {"condition": if_fits, "value": "var(--bg)"}
    tooltip = [nominal("target")]
    for field in ("hours", "usd"):
        tooltip.append(quantitative(field, format=",.3~r"))
    dot = {"type": "point", "filled": True, "size": 70, "opacity": 1, "stroke": color}
    label = {"type": "text", "align": "left", "dx": 9}
    on_dot = {"fill": fill, "tooltip": tooltip}
    on_label = {"text": nominal("target")}
    dots = {"mark": dot, "encoding": on_dot}
    labels = {"mark": label, "encoding": on_label}
    spec: Spec = {"height": 290, "data": {"values": values}}
    spec["encoding"] = {"x": hours, "y": usd}
    spec["layer"] = [dots, labels]
    return Figure(spec, CHART_CAPTION)

"""Section: hours and money, planned and taken."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from jaxpt.plan import hardware
from jaxpt.report.figures import ROUND_DIGITS, render_figure
from jaxpt.report.format import format_brief, format_count, format_percent, format_whole, is_finite
from jaxpt.report.html import collapsible, escape, html_table, series_color, small_text
from jaxpt.report.read import RunData, distinct_values, last_value, metric_points


def plan_section(runs: list[RunData]) -> str:
    parts = []
    for found, names in distinct_values(runs, "plan"):
        body = []
        for target in found["targets"]:
            peak = is_finite(target.get("peak_bytes_per_device"))
            body.append([
                escape(target.get("on", "")), escape(target.get("method", "")), format_whole(target.get("devices")), "yes" if target.get("fits") else "no",
                f"{peak / 1e9:,.1f}" if peak is not None else "", *(escape(format_span(target, key, as_text)) for key, as_text in (("mfu", format_percent), ("tokens_per_second", format_count), ("hours", format_brief), ("usd", format_brief))),
            ])  # fmt: skip
        took = [
            run for run in runs if run.name in names and is_finite(last_value(run.train, "seconds"))
        ]
        body += [measure_spent(run) for run in took]
        priced = [
            target
            for target in found["targets"]
            if is_finite(target.get("hours")) and is_finite(target.get("usd"))
        ]
        parts.append(f"<h3>{escape(', '.join(names))}</h3>" if len(runs) > 1 else "")
        if len(priced) > 1:
            parts.append(
                render_figure(
                    plan_chart(priced),
                    "Money against hours for the whole run, both on a log scale. Hollow: it does not fit there.",
                )
            )
        caption = "Compiled: the real step, compiled for that machine; estimated: from the shape alone. Ranges: the ends of the assumed efficiency."
        caption += (
            " Measured: what the run has taken so far."
            + "".join(render_against_plan(run, found) for run in took)
            if took
            else ""
        )
        head = [
            "on",
            "how known",
            "devices",
            "fits",
            "GB a device",
            "MFU",
            "tokens/s",
            "hours",
            "USD",
        ]
        parts.append(html_table(head, body, caption, texts=2, kind="many") if body else "")
        parts += [
            small_text(
                f"{what.capitalize()} that fits, by plan.py --search: {find_best_target(found, what)}"
            )
            for what in ("cheapest", "fastest")
            if find_best_target(found, what)
        ]
        parts.append(
            render_strategies(found["ways"]) if isinstance(found.get("ways"), dict) else ""
        )
        parts.append(
            render_plan_checks(found["check"]) if isinstance(found.get("check"), list) else ""
        )
        notes = "".join(small_text(note) for note in found.get("notes", []))
        parts.append(collapsible("What this assumes, and prices", notes) if notes else "")
    return "".join(parts)


def find_best_target(found: dict, what: str) -> str:
    best = (found.get("search") or {}).get(what) or {}
    return f"{best['on']} {' '.join(best.get('overrides') or [])}" if best.get("on") else ""


def render_strategies(found: dict) -> str:
    """Grow or scratch, as plan.py --base compared them."""
    pair = lambda way, key, as_text: (
        "\u2013".join(
            dict.fromkeys(
                escape("never" if end is None else as_text(end)) for end in way.get(key) or []
            )
        )
        or ""
    )
    body = [
        [escape(way.get("name", "")), pair(way, "tokens", format_count), pair(way, "saved", format_percent), pair(way, "saved_with_base", format_percent), pair(way, "hours", format_brief), pair(way, "usd", format_brief)]
        for way in found.get("ways", [])
    ]  # fmt: skip
    caption = f"Ways to {found.get('target_loss', 0):.3f} nats a token. Shares of FLOPs saved against scratch, from published ranges unless runs were fitted. {found.get('verdict', '')}"
    return html_table(
        ["way", "tokens", "saved", "saved, base paid", "hours", "USD"], body, caption, texts=1
    )


def render_plan_checks(found: list[dict]) -> str:
    """Plan beside run, as plan.py --check held them."""
    body = [
        [escape(each.get("run", "")), *(format_brief(each.get(key)) for key in ("planned_step_seconds", "measured_step_seconds", "time_ratio", "calibrated_time_ratio", "memory_ratio", "calibrated_memory_ratio"))]
        for each in found
    ]  # fmt: skip
    head = ["run", "planned s", "measured s", "ratio", "calibrated", "memory ratio", "calibrated"]
    return html_table(
        head,
        body,
        "The plan held against runs: seconds of a step and peak memory, measured over planned; the first run calibrates.",
        texts=1,
    )


def measure_spent(run: RunData) -> list[str]:
    """What a run took, as a row of the plan's table."""
    number, kind = run.devices or (None, "")
    speed, memory = (
        [value for _, value in metric_points(run.train, "tokens_per_second")],
        last_value(run.train, "memory_bytes"),
    )
    mfu = is_finite(last_value(run.train, "mfu"))
    cells = [
        format_whole(number),
        "",
        f"{memory / 1e9:,.1f}" if memory else "",
        format_percent(mfu) if mfu else "",
        format_count(statistics.median(speed)) if speed else "",
    ]
    return [
        escape(kind or run.name),
        "measured",
        *cells,
        format_brief(last_value(run.train, "seconds") / 3600),
        format_brief(last_value(run.train, "usd")),
    ]


def render_against_plan(run: RunData, found: dict) -> str:
    """The run's pace beside what was planned for the machine that it ran on; "" where no such machine was planned for."""
    chip = hardware.find_chip(run.devices[1]) if run.devices else None
    trained, asked = last_value(run.train, "tokens"), is_finite(found.get("tokens"))
    if not (chip and trained and asked):
        return ""
    pace = last_value(run.train, "seconds") / 3600 * asked / trained
    for target in found["targets"]:
        if (
            target["on"].partition(":")[0] == chip.name
            and target.get("devices") == run.devices[0]
            and is_finite(target.get("hours"))
        ):
            planned = f"planned on {target['on']} were {format_span(target, 'hours', format_brief)} hours and {format_span(target, 'usd', format_brief) or 'no'} USD"
            price = (
                f" and {format_brief(pace * run.devices[0] * chip.usd_per_hour)} USD"
                if chip.usd_per_hour
                else ""
            )
            return f" {run.name}: {planned} for {format_count(asked)} tokens; at the measured pace it is {format_brief(pace)} hours{price}."
    return ""


def format_span(target: dict, key: str, as_text: Callable) -> str:
    """145–208, or the one number where no range was given."""
    ends = sorted(
        value
        for end in ("low", "high")
        if (value := is_finite((target.get(end) or {}).get(key))) is not None
    )
    texts = dict.fromkeys(map(as_text, ends if len(ends) == 2 else [target.get(key)]))
    return "\u2013".join(texts)


def plan_chart(targets: list[dict]) -> dict:
    values = [
        {
            "on": str(each.get("on")),
            "hours": each["hours"],
            "usd": each["usd"],
            "fits": bool(each.get("fits")),
        }
        for each in targets
    ]
    axis = {
        "type": "quantitative",
        "scale": {"type": "log", "padding": 40, "nice": False},
        "axis": {"values": ROUND_DIGITS, "format": ",.4~r"},
    }
    fill = {"condition": {"test": "datum.fits", "value": series_color(0)}, "value": "var(--bg)"}
    tooltip = [
        {"field": "on", "type": "nominal"},
        *(
            {"field": field, "type": "quantitative", "format": ",.3~r"}
            for field in ("hours", "usd")
        ),
    ]
    return {
        "height": 290,
        "data": {"values": values},
        "encoding": {
            "x": {"field": "hours", "title": "hours", **axis},
            "y": {"field": "usd", "title": "USD", **axis},
        },
        "layer": [
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 70,
                    "opacity": 1,
                    "stroke": series_color(0),
                },
                "encoding": {"fill": fill, "tooltip": tooltip},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 9},
                "encoding": {"text": {"field": "on", "type": "nominal"}},
            },
        ],
    }

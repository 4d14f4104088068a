"""Section: hours and money, planned and taken."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from jaxpt.plan import hardware
from jaxpt.report.figures import ROUND, figure
from jaxpt.report.markup import color, details, esc, grid, small
from jaxpt.report.read import RunData, distinct, last, points
from jaxpt.report.words import brief, count, finite, percent, whole


def section(runs: list[RunData]) -> str:
    parts = []
    for found, names in distinct(runs, "plan"):
        body = []
        for target in found["targets"]:
            peak = finite(target.get("peak_bytes_per_device"))
            body.append([
                esc(target.get("on", "")), esc(target.get("method", "")), whole(target.get("devices")), "yes" if target.get("fits") else "no",
                f"{peak / 1e9:,.1f}" if peak is not None else "", *(esc(span(target, key, as_text)) for key, as_text in (("mfu", percent), ("tokens_per_second", count), ("hours", brief), ("usd", brief))),
            ])  # fmt: skip
        took = [run for run in runs if run.name in names and finite(last(run.train, "seconds"))]
        body += [spent(run) for run in took]
        priced = [target for target in found["targets"] if finite(target.get("hours")) and finite(target.get("usd"))]
        parts.append(f"<h3>{esc(', '.join(names))}</h3>" if len(runs) > 1 else "")
        if len(priced) > 1:
            parts.append(figure(plan_chart(priced), "Money against hours for the whole run, both on a log scale. Hollow: it does not fit there."))
        caption = "Compiled: the real step, compiled for that machine; estimated: from the shape alone. Ranges: the ends of the assumed efficiency."
        caption += " Measured: what the run has taken so far." + "".join(against_plan(run, found) for run in took) if took else ""
        head = ["on", "how known", "devices", "fits", "GB a device", "MFU", "tokens/s", "hours", "USD"]
        parts.append(grid(head, body, caption, texts=2, kind="many") if body else "")
        parts += [
            small(f"{what.capitalize()} that fits, by plan.py --search: {best_of(found, what)}")
            for what in ("cheapest", "fastest")
            if best_of(found, what)
        ]
        parts.append(ways(found["ways"]) if isinstance(found.get("ways"), dict) else "")
        parts.append(checked(found["check"]) if isinstance(found.get("check"), list) else "")
        notes = "".join(small(note) for note in found.get("notes", []))
        parts.append(details("What this assumes, and prices", notes) if notes else "")
    return "".join(parts)


def best_of(found: dict, what: str) -> str:
    best = (found.get("search") or {}).get(what) or {}
    return f"{best['on']} {' '.join(best.get('overrides') or [])}" if best.get("on") else ""


def ways(found: dict) -> str:
    """Grow or scratch, as plan.py --base compared them."""
    pair = lambda way, key, as_text: "\u2013".join(dict.fromkeys(esc("never" if end is None else as_text(end)) for end in way.get(key) or [])) or ""  # noqa: E731
    body = [
        [esc(way.get("name", "")), pair(way, "tokens", count), pair(way, "saved", percent), pair(way, "saved_with_base", percent), pair(way, "hours", brief), pair(way, "usd", brief)]
        for way in found.get("ways", [])
    ]  # fmt: skip
    caption = f"Ways to {found.get('target_loss', 0):.3f} nats a token. Shares of FLOPs saved against scratch, from published ranges unless runs were fitted. {found.get('verdict', '')}"
    return grid(["way", "tokens", "saved", "saved, base paid", "hours", "USD"], body, caption, texts=1)


def checked(found: list[dict]) -> str:
    """Plan beside run, as plan.py --check held them."""
    body = [
        [esc(each.get("run", "")), *(brief(each.get(key)) for key in ("planned_step_seconds", "measured_step_seconds", "time_ratio", "calibrated_time_ratio", "memory_ratio", "calibrated_memory_ratio"))]
        for each in found
    ]  # fmt: skip
    head = ["run", "planned s", "measured s", "ratio", "calibrated", "memory ratio", "calibrated"]
    return grid(
        head, body, "The plan held against runs: seconds of a step and peak memory, measured over planned; the first run calibrates.", texts=1
    )


def spent(run: RunData) -> list[str]:
    """What a run took, as a row of the plan's table."""
    number, kind = run.devices or (None, "")
    speed, memory = [value for _, value in points(run.train, "tokens_per_second")], last(run.train, "memory_bytes")
    mfu = finite(last(run.train, "mfu"))
    cells = [
        whole(number),
        "",
        f"{memory / 1e9:,.1f}" if memory else "",
        percent(mfu) if mfu else "",
        count(statistics.median(speed)) if speed else "",
    ]
    return [esc(kind or run.name), "measured", *cells, brief(last(run.train, "seconds") / 3600), brief(last(run.train, "usd"))]


def against_plan(run: RunData, found: dict) -> str:
    """The run's pace beside what was planned for the machine that it ran on; "" where no such machine was planned for."""
    chip = hardware.chip_for(run.devices[1]) if run.devices else None
    trained, asked = last(run.train, "tokens"), finite(found.get("tokens"))
    if not (chip and trained and asked):
        return ""
    pace = last(run.train, "seconds") / 3600 * asked / trained
    for target in found["targets"]:
        if target["on"].partition(":")[0] == chip.name and target.get("devices") == run.devices[0] and finite(target.get("hours")):
            planned = f"planned on {target['on']} were {span(target, 'hours', brief)} hours and {span(target, 'usd', brief) or 'no'} USD"
            price = f" and {brief(pace * run.devices[0] * chip.usd_per_hour)} USD" if chip.usd_per_hour else ""
            return f" {run.name}: {planned} for {count(asked)} tokens; at the measured pace it is {brief(pace)} hours{price}."
    return ""


def span(target: dict, key: str, as_text: Callable) -> str:
    """145–208, or the one number where no range was given."""
    ends = sorted(value for end in ("low", "high") if (value := finite((target.get(end) or {}).get(key))) is not None)
    texts = dict.fromkeys(map(as_text, ends if len(ends) == 2 else [target.get(key)]))
    return "\u2013".join(texts)


def plan_chart(targets: list[dict]) -> dict:
    values = [{"on": str(each.get("on")), "hours": each["hours"], "usd": each["usd"], "fits": bool(each.get("fits"))} for each in targets]
    axis = {"type": "quantitative", "scale": {"type": "log", "padding": 40, "nice": False}, "axis": {"values": ROUND, "format": ",.4~r"}}
    fill = {"condition": {"test": "datum.fits", "value": color(0)}, "value": "var(--bg)"}
    tooltip = [{"field": "on", "type": "nominal"}, *({"field": field, "type": "quantitative", "format": ",.3~r"} for field in ("hours", "usd"))]
    return {
        "height": 290,
        "data": {"values": values},
        "encoding": {"x": {"field": "hours", "title": "hours", **axis}, "y": {"field": "usd", "title": "USD", **axis}},
        "layer": [
            {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1, "stroke": color(0)}, "encoding": {"fill": fill, "tooltip": tooltip}},
            {"mark": {"type": "text", "align": "left", "dx": 9}, "encoding": {"text": {"field": "on", "type": "nominal"}}},
        ],
    }

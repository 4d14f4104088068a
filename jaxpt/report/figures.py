"""The plots: Vega-Lite, drawn by page.js from JSON in the page."""

from __future__ import annotations

import json
import math
import pathlib

from jaxpt.report.format import is_finite
from jaxpt.report.html import escape, series_color
from jaxpt.report.read import RunData

PLOT_CONFIG = 'class="plot"'  # what page.js draws
DRAW_SCRIPT = pathlib.Path(__file__).with_name("page.js")
MAX_POINTS = 2_400  # of a figure's curves together; more cannot be told apart on a screen and would make the page heavy
ROUND_DIGITS = [
    digit * 10.0**power for power in range(-6, 8) for digit in (1, 1.5, 2, 3, 5, 7)
]  # marks of a log scale
EDGE_POINTS = {
    "padding": 5,
    "nice": False,
}  # pixels: the edge of the plot would cut a line or a dot in half


def render_figure(spec: dict, caption: str, title: str = "") -> str:
    data = json.dumps(spec, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )  # no text in it can end the script element
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return (
        f'<figure>{head}<div {PLOT_CONFIG} role="img" tabindex="0" aria-label="{escape(f"{title}. {caption}" if title else caption)}" style="min-height:{spec["height"]}px">'
        f'<div aria-hidden="true"></div><script type="application/json">{data}</script></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def render_figure_pairs(figures: list[str]) -> str:
    """Figures two in a row where there is room."""
    return f'<div class="pairs">{"".join(figures)}</div>'


def plot_over_steps(
    runs: list[RunData], series, title: str, height: int, names=None, **more
) -> dict:
    """`curves` over the runs' steps, coloured by run unless by `names`, with a rule where one was resumed or grown."""
    marks = [
        {"name": run.name, "step": step, "what": what} for run in runs for step, what in run.marks
    ]
    return plot_curves(
        names or [run.name for run in runs], series, title, height, marks=marks, **more
    )


def plot_curves(
    names, series, title: str, height: int, *,
    x="step", unit="", levels=(), level_name="unigram", thin_series=(), dots=(), marks=(), scale="linear", shares=False,
) -> dict:  # fmt: skip
    """A Vega-Lite figure of series (name, [(x, y)]), coloured by name.

    unit: stands above the vertical axis; levels: y drawn dashed, with their name on them; thin_series: drawn thin; dots: drawn as points; marks: {"name", x, "what"} drawn upright; shares: y goes from 0 to 1.
    """
    n_points = max(40, MAX_POINTS // max(1, len(names)))
    colors = {"field": "name", "type": "nominal", "legend": None, "scale": assign_colors(names)}
    across = {
        "field": x,
        "type": "quantitative",
        "title": x,
        "axis": {"tickMinStep": 1},
        "scale": EDGE_POINTS if dots else {},
    }
    y = {
        "field": "value",
        "type": "quantitative",
        "title": unit or None,
        "scale": {"zero": bool(dots), **EDGE_POINTS},
    }
    if shares:
        y |= {
            "scale": {"domain": [0, 1.03], "nice": False},
            "axis": {"values": [0, 0.25, 0.5, 0.75, 1], "format": ".0%"},
        }
    if scale == "log":
        y |= {
            "scale": {"type": "log", **EDGE_POINTS},
            "axis": {"values": ROUND_DIGITS, "format": ",.4~r"},
        }
    tooltip = [
        {
            "field": "name",
            "type": "nominal",
            "title": "title",
            "formatType": "word",
            "format": "-",
        },  # the tooltip's own title
        {"field": x, "type": "quantitative"},
        {"field": "value", "type": "quantitative", "title": title, "format": ".4~g"},
    ]

    def values(chosen):
        found = []
        for name, line in chosen:
            shown = [
                (at, value)
                for at, value in line
                if is_finite(value) is not None and (scale != "log" or value > 0)
            ]
            found += [
                {"name": name, x: at, "value": float(f"{value:.5g}")}
                for at, value in thin_points(shown, n_points)
            ]
        return found

    at = {"x": across, "y": y, "color": colors}
    line = {"type": "line", "clip": True}
    dot = {"type": "point", "clip": True, "filled": True}
    nearest = {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}
    opacity = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    # a finger scrolls the page, and the wheel does unless shift is held
    drag = "[pointerdown[event.pointerType === 'mouse'], window:pointerup] > window:pointermove!"
    pan = {"type": "interval", "zoom": "wheel![event.shiftKey]", "translate": drag}
    layers = [
        {
            "mark": line,
            "encoding": at,
            "params": [{"name": "pan", "bind": "scales", "select": pan}],
        },
        {
            "mark": {**dot, "size": 50},
            "encoding": {**at, "tooltip": tooltip, "opacity": opacity},
            "params": [{"name": "near", "select": nearest}],
        },
    ]
    if dotted := values(
        [*dots, *(one for one in series if len(one[1]) == 1)]
    ):  # one point makes no line
        layers.append(
            {"data": {"values": dotted}, "mark": {**dot, "size": 30, "opacity": 1}, "encoding": at}
        )
    if thin_values := values(thin_series):
        layers.append(
            {
                "data": {"values": thin_values},
                "mark": {**line, "strokeWidth": 1, "opacity": 0.7},
                "encoding": at,
            }
        )
    if level_values := [
        {"value": value} for value in dict.fromkeys(round(level, 4) for level in levels)
    ]:
        rule = {"type": "rule", "clip": True, "strokeDash": [5, 4]}
        label = {
            "type": "text",
            "clip": True,
            "text": level_name,
            "x": "width",
            "align": "right",
            "dy": 10,
            "fill": "var(--muted)",
            "fontSize": 11,
        }
        halo = {
            **label,
            "stroke": "var(--bg)",
            "strokeWidth": 4,
        }  # so that a curve behind the words does not cross them
        layers += [
            {"data": {"values": level_values}, "mark": mark, "encoding": {"y": y}}
            for mark in (rule, *((halo, label) if level_name else ()))
        ]
    if marks:
        dash = {"condition": {"test": "datum.what === 'resumed'", "value": [1, 3]}, "value": [1, 0]}
        own = (
            colors if {mark["name"] for mark in marks} <= set(names) else {"value": "var(--muted)"}
        )  # in a plot of domains a run has no colour
        upright = {
            "x": across,
            "color": own,
            "strokeDash": dash,
            "tooltip": {"field": "what", "type": "nominal"},
        }
        layers.append(
            {
                "data": {"values": marks},
                "mark": {"type": "rule", "clip": True, "strokeWidth": 1.5},
                "encoding": upright,
            }
        )
    return {"height": height, "data": {"values": values(series)}, "layer": layers}


def thin_points(points: list[tuple[float, float]], n: int) -> list[tuple[float, float]]:
    """At most about n points, of which each stretch keeps its lowest and its highest, so that no spike is lost."""
    if len(points) <= n:
        return points
    stretch = math.ceil(2 * len(points) / n)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted(
            {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        )
    return [*kept, *([points[-1]] if kept[-1] != points[-1] else [])]


def assign_colors(names: list[str]) -> dict:
    """A Vega-Lite scale from names to the page's colours."""
    return {"domain": names, "range": [series_color(i) for i in range(len(names))]}


def plot_scripts(with_plots: bool) -> str:
    """What moves on the page, after Vega-Embed, which brings Vega and Vega-Lite, where something is to be drawn."""
    if not with_plots:
        return f"<script>{DRAW_SCRIPT.read_text()}</script>"
    import vl_convert

    bundle = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    return (
        f"<script>/* Vega, Vega-Lite, Vega-Embed: BSD-3-Clause, University of Washington Interactive Data Lab */{bundle}</script>"
        + plot_scripts(False)
    )

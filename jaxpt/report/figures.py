"""Tables and figures of the page. A figure is a Vega-Lite spec as JSON, drawn by page.js."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxpt.report.format import finite_or_none
from jaxpt.report.read import Point, RunData

PLOT_ATTRIBUTE = 'class="plot"'  # of what page.js draws
# of a figure's curves together: a screen cannot show more, and the page would grow heavy
MAX_POINTS_PER_FIGURE = 2_400
# in pixels, so that the edge of the plot does not cut a line or a dot in half
PADDED = {"padding": 5, "nice": False}
LOG_NUMBERS = ",.4~r"  # of an axis
SHARE_AXIS = {"values": [0, 0.25, 0.5, 0.75, 1], "format": ".0%"}
LINE = {"type": "line", "clip": True}
THIN_LINE = {**LINE, "strokeWidth": 1, "opacity": 0.7}
RULE = {"type": "rule", "clip": True}
DOT = {"type": "point", "clip": True, "filled": True}
LEVEL_LABEL = {"type": "text", "clip": True, "x": "width", "align": "right", "dy": 10}
LEVEL_LABEL |= {"fill": "var(--dim)", "fontSize": 11}
NEAREST = {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}
# a finger scrolls the page, and the wheel does unless shift is held
DRAG = "[pointerdown[event.pointerType === 'mouse'], window:pointerup] > window:pointermove!"
PAN = {"type": "interval", "zoom": "wheel![event.shiftKey]", "translate": DRAG}

Spec = dict[str, Any]  # of Vega-Lite
Series = tuple[str, Sequence[Point]]  # a name, and its points


class Figure(NamedTuple):
    """A Vega-Lite figure with its caption."""

    spec: Spec
    caption: str
    title: str = ""

    @property
    def label(self) -> str:
        """What it shows, for whoever cannot see it."""
        return f"{self.title}. {self.caption}" if self.title else self.caption


class Cell(NamedTuple):
    """A cell with words of lesser weight behind it."""

    text: str
    small: str = ""
    is_indented: bool = False  # belongs to the row above


class Share(NamedTuple):
    """A cell drawn as a bar as long as a share."""

    frac: float


class Table(NamedTuple):
    """A table of the page.

    Attributes:
        heads: of each column.
        rows: of cells: text, Cell, Share, or what the section's own template makes of them.
        caption: below the table.
        n_text_columns: the first columns hold words, the others numbers.
        css_class: class of the frame in page.css.
    """

    heads: Sequence[str | Cell]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    n_text_columns: int = 1
    css_class: str = ""


class Palette(NamedTuple):
    """Names in the order of the page's legends, and their CSS colors."""

    names: list[str]
    colors: list[str]
    is_of_domains: bool = False


def color_runs(runs: list[RunData]) -> Palette:
    """Return the color of each run, which is the same on the whole page."""
    return Palette([run.name for run in runs], [series_color(i) for i in range(len(runs))])


def color_domains(names: list[str]) -> Palette:
    """Return the color of each source of text, which no run has."""
    colors = [f"var(--d{i % 8})" for i in range(len(names))]
    return Palette(names, colors, is_of_domains=True)


def plot_over_steps(
    runs: list[RunData],
    series: Sequence[Series],
    title: str,
    height: int,
    domains: Palette | None = None,
    is_smooth: bool = False,
    **options: Any,
) -> Spec:
    """Plot curves over steps, which the page can show over tokens, FLOPs or time.

    Args:
        runs: of the curves, colored by run, with their events.
        series: drawn as lines.
        title: what the vertical axis shows.
        height: in pixels.
        domains: of the curves of a single run, if they are not of runs.
        is_smooth: whether the page may smooth the curves: they are noisy, and one point each step.
        **options: of `plot_curves`.
    """
    events = []
    for run in runs:
        for event in run.metrics.events:
            value = {"name": run.name, "step": event.step, "what": event.label}
            events.append(value)
    palette = domains or color_runs(runs)
    spec = plot_curves(palette, series, title, height, **options)
    if events:
        spec["layer"].append(draw_events(events, palette))
    # what page.js redraws; the run whose steps they are, where no curve is named after it
    spec["usermeta"] = {"over": "step", "smooth": is_smooth}
    if domains:
        spec["usermeta"]["run"] = runs[0].name
    return spec


def plot_curves(
    palette: Palette,
    series: Sequence[Series],
    title: str,
    height: int,
    *,
    x_name: str = "step",
    unit: str = "",
    levels: Iterable[float] = (),
    level_name: str = "unigram",
    thin_series: Sequence[Series] = (),
    dots: Sequence[Series] = (),
    scale: str = "linear",
) -> Spec:
    """Return a Vega-Lite figure of curves.

    Args:
        palette: of the series.
        series: drawn as lines.
        title: what the vertical axis shows, for the tooltip.
        height: in pixels.
        x_name: title of the horizontal axis, and key of its values.
        unit: stands above the vertical axis.
        levels: y of dashed lines.
        level_name: stands on them.
        thin_series: drawn as thin lines.
        dots: drawn as points.
        scale: of y: "linear", "log" or "share" (0 to 1).
    """
    n_curves = max(1, len(palette.names))
    max_points = max(40, MAX_POINTS_PER_FIGURE // n_curves)

    is_log = scale == "log"

    def values(chosen: Sequence[Series]) -> list[Spec]:
        return list_values(chosen, x_name, max_points, is_log)

    x = make_x_axis(x_name, is_padded=bool(dots))
    y = make_y_axis(unit, scale, starts_at_zero=bool(dots))
    run_name = nominal("name")
    # the tooltip's own title
    run_name |= {"title": "title", "formatType": "word", "format": "-"}
    value = quantitative("value", title=title, format=".4~g")
    tooltip = [run_name, quantitative(x_name), value]
    color = color_by("name", palette)
    at = {"x": x, "y": y, "color": color}
    is_near = {"param": "near", "empty": False, "value": 1}
    opacity = {"condition": is_near, "value": 0}
    pan = {"name": "pan", "bind": "scales", "select": PAN}
    near = {"name": "near", "select": NEAREST}
    on_point = {**at, "tooltip": tooltip, "opacity": opacity}
    near_dot = {**DOT, "size": 50}
    lines = {"mark": LINE, "encoding": at, "params": [pan]}
    nearest_dot = {"mark": near_dot, "encoding": on_point, "params": [near]}
    layers = [lines, nearest_dot]
    dots = list(dots)
    for name, points in series:
        if len(points) == 1:  # one point makes no line
            dots.append((name, points))
    dot_values = values(dots)
    if dot_values:
        dot = {**DOT, "size": 30, "opacity": 1}
        layers.append(layer(dot_values, dot, at))
    thin_values = values(thin_series)
    if thin_values:
        layers.append(layer(thin_values, THIN_LINE, at))
    layers += draw_levels(levels, level_name, y)
    data = {"values": values(series)}
    return {"height": height, "data": data, "layer": layers}


def nominal(field: str) -> Spec:
    """Return the encoding of a name."""
    return {"field": field, "type": "nominal"}


def quantitative(field: str, **more: Any) -> Spec:
    """Return the encoding of a number."""
    return {"field": field, "type": "quantitative", **more}


def layer(values: list[Spec], mark: Spec, encoding: Spec) -> Spec:
    """Return a layer with data of its own."""
    return {"data": {"values": values}, "mark": mark, "encoding": encoding}


def make_x_axis(name: str, is_padded: bool) -> Spec:
    """Return the encoding of the horizontal axis."""
    axis = {"tickMinStep": 1}
    scale = {}
    if is_padded:
        scale = PADDED
    return quantitative(name, title=name, axis=axis, scale=scale)


def make_y_axis(unit: str, scale: str, starts_at_zero: bool) -> Spec:
    """Return the encoding of the vertical axis."""
    y = quantitative("value", title=unit or None)
    if scale == "share":
        y["scale"] = {"domain": [0, 1.03], "nice": False}
        y["axis"] = SHARE_AXIS
    elif scale == "log":
        y["scale"] = {"type": "log", **PADDED}
        y["axis"] = make_log_axis("y")
    else:
        y["scale"] = {"zero": starts_at_zero, **PADDED}
    return y


def list_values(series: Sequence[Series], x_name: str, max_points: int, is_log: bool) -> list[Spec]:
    """Return the points of some series as Vega-Lite's data."""
    values = []
    for name, points in series:
        shown = []
        for x, y in points:
            if is_log and y <= 0:
                continue
            if finite_or_none(y) is not None:
                shown.append((x, y))
        for x, y in downsample_points(shown, max_points):
            rounded = float(f"{y:.5g}")
            value = {"name": name, x_name: x, "value": rounded}
            values.append(value)
    return values


def draw_levels(levels: Iterable[float], name: str, y: Spec) -> list[Spec]:
    """Return layers with dashed lines at some levels, and their name on them."""
    rounded = [round(level, 4) for level in levels]
    distinct = dict.fromkeys(rounded)
    values = [{"value": level} for level in distinct]
    if not values:
        return []
    label = {**LEVEL_LABEL, "text": name}
    # so that a curve behind the words does not cross them
    halo = {**label, "stroke": "var(--bg)", "strokeWidth": 4}
    dashed = {**RULE, "strokeDash": [5, 4]}
    marks = [dashed]
    if name:
        marks += [halo, label]
    encoding = {"y": y}
    return [layer(values, mark, encoding) for mark in marks]


def draw_events(events: list[Spec], palette: Palette) -> Spec:
    """Return a layer with upright lines, dotted where a run was resumed."""
    is_resumed = {"test": "datum.what === 'resumed'", "value": [1, 3]}
    color = color_by("name", palette)
    runs = {event["name"] for event in events}
    if not runs <= set(palette.names):
        color = {"value": "var(--dim)"}  # in a plot of sources a run has no color
    x = make_x_axis("step", is_padded=False)
    dash = {"condition": is_resumed, "value": [1, 0]}
    tooltip = nominal("what")
    encoding = {"x": x, "color": color, "strokeDash": dash, "tooltip": tooltip}
    rule = {**RULE, "strokeWidth": 1.5}
    return layer(events, rule, encoding)


def downsample_points(points: list[Point], max_points: int) -> list[Point]:
    """Return about `max_points`; each bin keeps its lowest and highest, so no spike is lost."""
    if len(points) <= max_points:
        return points
    bin_size = math.ceil(2 * len(points) / max_points)
    kept = []
    for start in range(0, len(points), bin_size):
        part = points[start : start + bin_size]
        lowest = min(part, key=lambda point: point[1])
        highest = max(part, key=lambda point: point[1])
        kept += sorted({lowest, highest})
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def make_log_axis(channel: str) -> Spec:
    """Return an axis whose ticks page.js chooses, so that any range has some."""
    return {"values": {"expr": f"logTicks(domain('{channel}'))"}, "format": LOG_NUMBERS}


def color_by(field: str, palette: Palette) -> Spec:
    """Return the encoding of a name by the page's colors, without a legend of its own."""
    scale = {"domain": palette.names, "range": palette.colors}
    return {**nominal(field), "legend": None, "scale": scale}


def series_color(i: int) -> str:
    """Return the CSS color of the i-th run."""
    return f"var(--c{i % 8})"

"""The numbers that matter, for the head of the page and for the terminal."""

from __future__ import annotations

import pathlib

from jaxpt.lineage import STAGES
from jaxpt.report.format import (
    clip_text,
    format_change,
    format_count,
    format_decimal,
    format_seconds,
    format_whole,
    is_finite,
)
from jaxpt.report.html import color_swatch, escape, html_table, row_header
from jaxpt.report.read import (
    RunData,
    first_value,
    format_shape,
    last_value,
    list_sources,
    n_params,
    order_keys,
    short_model_name,
)


def summarize_run(runs: list[RunData]) -> list[tuple[str, str, list[str]]]:
    """Rows of (label, unit, one text for each run). A label that starts with two spaces belongs to the group above it."""
    rows = [
        ("parameters", "", [format_count(n_params(run)) for run in runs]),
        ("layers × width", "", [format_shape(run) for run in runs]),
        ("steps", "", [format_whole(last_value(run.train, "step")) for run in runs]),
        ("tokens", "", [format_count(last_value(run.train, "tokens")) for run in runs]),
        (
            "loss",
            "nats/token",
            [
                format_change(first_value(run.train, "loss"), last_value(run.train, "loss"))
                for run in runs
            ],
        ),
    ]
    groups = {
        "held-out": (
            "nats/token",
            [run.heldout[-1]["heldout"] if run.heldout else {} for run in runs],
            format_decimal,
        ),
        "bits per byte": ("", [run_bits_per_byte(run) for run in runs], format_decimal),
        "time": ("", [seconds_by_stage(run) for run in runs], format_seconds),
    }
    order = [*list_sources(runs), *STAGES]
    for label, (unit, values, as_text) in groups.items():
        keys = order_keys(order, (key for each in values for key in each))
        if keys:
            rows.append((label, unit, ["" for _ in runs]))
        rows += [("  " + key, "", [as_text(each.get(key)) for each in values]) for key in keys]
    rows.append(("cost", "USD", [format_decimal(last_value(run.train, "usd"), 2) for run in runs]))
    return [row for row in rows if any(row[2]) or row[0] in groups]


def format_summary_table(runs: list[RunData], to: pathlib.Path) -> str:
    """The summary as text at most 100 columns wide, ending in the page's path."""
    lines = []
    for start in range(0, len(runs), 4):
        part = runs[start : start + 4]
        width = max(16, *(len(run.name) + 3 for run in part)) if len(part) < 4 else 18
        width = min(width, 76 // len(part))
        lines += [
            " " * 24 + "".join(f"{clip_text(run.name, width - 2):>{width}}" for run in part),
            "\u2500" * (24 + width * len(part)),
        ]
        lines += [
            f"{f'{label}, {unit}' if unit else label:24.24}"
            + "".join(f"{value:>{width}}" for value in values)
            for label, unit, values in summarize_run(part)
        ]
        lines.append("")
    return "\n".join(
        line.rstrip()
        for line in [*lines, f"{to}  ({to.stat().st_size / 1e6:.2f} MB, opens in any browser)"]
    )


def run_bits_per_byte(run: RunData) -> dict[str, float]:
    """By domain, of the run's own evaluations; ours (jax) before the reference's (hf)."""
    found = {}
    for result in sorted(run.evals.values(), key=lambda result: result.get("backend") != "jax"):
        for task, scores in result.get("results", {}).items():
            if task.startswith("bits_per_byte/") and isinstance(scores, dict):
                found.setdefault(task.partition("/")[2], scores.get("bits_per_byte,none"))
    return found


def seconds_by_stage(run: RunData) -> dict[str, float]:
    found = {
        kind: sum(is_finite(manifest.get("seconds")) or 0 for manifest in manifests)
        for kind, manifests in run.stages.items()
    }
    found["train"] = (
        (run.manifest or {}).get("seconds")
        if run.train and run.manifest
        else last_value(run.train, "seconds")
    )
    found["eval"] = sum(is_finite(result.get("seconds")) or 0 for result in run.evals.values())
    return {name: seconds for name, seconds in found.items() if is_finite(seconds)}


def summary_section(runs: list[RunData]) -> str:
    lines = "".join(
        f'<p class="made">{color_swatch(i)}<span>{describe_start(run)}</span></p>'
        for i, run in enumerate(runs)
    )
    body = [
        [row_header(label, unit), *map(escape, values)]
        for label, unit, values in summarize_run(runs)
    ]
    caption = "Held-out: text kept out of training, mean over its tokens. Bits per byte: without the tokenizer's part in it, lower is better."
    return lines + html_table(["", *(escape(run.name) for run in runs)], body, caption)


def describe_start(run: RunData) -> str:
    """One sentence on what a run made and from what."""
    what = (
        f"{format_count(n_params(run))} parameters"
        if n_params(run)
        else "a model of unknown size (no spec.json)"
    )
    parts = [f"<strong>{escape(run.name)}</strong>: {escape(what)}"]
    if run.growth:
        step, operators = run.growth["at_step"], ", ".join(map(str, run.growth["operators"]))
        parts.append(
            escape(
                (
                    f"grown from {short_model_name(run.growth['parent'])}"
                    if step is None
                    else f"grown at step {format_whole(step)}"
                )
                + f" by {operators}"
            )
        )
    if run.train:
        tokens, seconds = last_value(run.train, "tokens"), last_value(run.train, "seconds")
        trained = f"trained {format_whole(run.train[-1]['step'])} steps"
        trained += f" on {format_count(tokens)} tokens" if tokens else ""
        parts.append(escape(trained + (f" in {format_seconds(seconds)}" if seconds else "")))
        parts.append(
            "loss "
            + format_change(first_value(run.train, "loss"), last_value(run.train, "loss")).replace(
                " ", "&nbsp;"
            )
        )
    return ", ".join(parts) + "."

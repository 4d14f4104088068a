"""The numbers that matter, for the head of the page and for the terminal."""

from __future__ import annotations

import pathlib

from jaxpt.lineage import STAGES
from jaxpt.report.markup import esc, grid, row_head, swatch
from jaxpt.report.read import RunData, domains_of, first, in_order, last, model_name, n_params, shape
from jaxpt.report.words import arrow, clip, count, decimal, duration, finite, whole


def summary(runs: list[RunData]) -> list[tuple[str, str, list[str]]]:
    """Rows of (label, unit, one text for each run). A label that starts with two spaces belongs to the group above it."""
    rows = [
        ("parameters", "", [count(n_params(run)) for run in runs]),
        ("layers × width", "", [shape(run) for run in runs]),
        ("steps", "", [whole(last(run.train, "step")) for run in runs]),
        ("tokens", "", [count(last(run.train, "tokens")) for run in runs]),
        ("loss", "nats/token", [arrow(first(run.train, "loss"), last(run.train, "loss")) for run in runs]),
    ]
    groups = {
        "held-out": ("nats/token", [run.heldout[-1]["heldout"] if run.heldout else {} for run in runs], decimal),
        "bits per byte": ("", [bits_per_byte(run) for run in runs], decimal),
        "time": ("", [seconds_by_stage(run) for run in runs], duration),
    }
    order = [*domains_of(runs), *STAGES]
    for label, (unit, values, as_text) in groups.items():
        keys = in_order(order, (key for each in values for key in each))
        if keys:
            rows.append((label, unit, ["" for _ in runs]))
        rows += [("  " + key, "", [as_text(each.get(key)) for each in values]) for key in keys]
    rows.append(("cost", "USD", [decimal(last(run.train, "usd"), 2) for run in runs]))
    return [row for row in rows if any(row[2]) or row[0] in groups]


def table(runs: list[RunData], to: pathlib.Path) -> str:
    """The summary as text at most 100 columns wide, ending in the page's path."""
    lines = []
    for start in range(0, len(runs), 4):
        part = runs[start : start + 4]
        width = max(16, *(len(run.name) + 3 for run in part)) if len(part) < 4 else 18
        width = min(width, 76 // len(part))
        lines += [" " * 24 + "".join(f"{clip(run.name, width - 2):>{width}}" for run in part), "\u2500" * (24 + width * len(part))]
        lines += [
            f"{f'{label}, {unit}' if unit else label:24.24}" + "".join(f"{value:>{width}}" for value in values)
            for label, unit, values in summary(part)
        ]
        lines.append("")
    return "\n".join(line.rstrip() for line in [*lines, f"{to}  ({to.stat().st_size / 1e6:.2f} MB, opens in any browser)"])


def bits_per_byte(run: RunData) -> dict[str, float]:
    """By domain, of the run's own evaluations; ours (jax) before the reference's (hf)."""
    found = {}
    for result in sorted(run.evals.values(), key=lambda result: result.get("backend") != "jax"):
        for task, scores in result.get("results", {}).items():
            if task.startswith("bits_per_byte/") and isinstance(scores, dict):
                found.setdefault(task.partition("/")[2], scores.get("bits_per_byte,none"))
    return found


def seconds_by_stage(run: RunData) -> dict[str, float]:
    found = {kind: sum(finite(manifest.get("seconds")) or 0 for manifest in manifests) for kind, manifests in run.stages.items()}
    found["train"] = (run.manifest or {}).get("seconds") if run.train and run.manifest else last(run.train, "seconds")
    found["eval"] = sum(finite(result.get("seconds")) or 0 for result in run.evals.values())
    return {name: seconds for name, seconds in found.items() if finite(seconds)}


def section(runs: list[RunData]) -> str:
    lines = "".join(f'<p class="made">{swatch(i)}<span>{made(run)}</span></p>' for i, run in enumerate(runs))
    body = [[row_head(label, unit), *map(esc, values)] for label, unit, values in summary(runs)]
    caption = "Held-out: text kept out of training, mean over its tokens. Bits per byte: without the tokenizer's part in it, lower is better."
    return lines + grid(["", *(esc(run.name) for run in runs)], body, caption)


def made(run: RunData) -> str:
    """One sentence on what a run made and from what."""
    what = f"{count(n_params(run))} parameters" if n_params(run) else "a model of unknown size (no spec.json)"
    parts = [f"<strong>{esc(run.name)}</strong>: {esc(what)}"]
    if run.growth:
        step, operators = run.growth["at_step"], ", ".join(map(str, run.growth["operators"]))
        parts.append(esc((f"grown from {model_name(run.growth['parent'])}" if step is None else f"grown at step {whole(step)}") + f" by {operators}"))
    if run.train:
        tokens, seconds = last(run.train, "tokens"), last(run.train, "seconds")
        trained = f"trained {whole(run.train[-1]['step'])} steps"
        trained += f" on {count(tokens)} tokens" if tokens else ""
        parts.append(esc(trained + (f" in {duration(seconds)}" if seconds else "")))
        parts.append("loss " + arrow(first(run.train, "loss"), last(run.train, "loss")).replace(" ", "&nbsp;"))
    return ", ".join(parts) + "."

"""Section: several models' continuations of the same prompts, side by side."""

from __future__ import annotations

from jaxpt.report.format import (
    MAX_TEXT,
    clip_text,
    format_brief,
    format_decimal,
    format_whole,
    is_finite,
)
from jaxpt.report.html import code_text, color_swatch, escape, html_table, small_text
from jaxpt.report.read import RunData, distinct_values, model_sort_key, short_model_name

MAX_PROMPTS = 24  # shown of all samples


def samples_section(runs: list[RunData]) -> str:
    parts = []
    files = distinct_values(runs, "samples")
    shown = max(1, MAX_PROMPTS // max(1, len(files)))
    for found, _ in files:
        settings = ", ".join(
            f"{key.replace('_', ' ')} {value}"
            for key, value in (found.get("settings") or {}).items()
            if value is not None
        )
        for prompt in found["prompts"][:shown]:
            outputs = "".join(render_sample(output, runs) for output in prompt["outputs"])
            parts.append(
                f'<div class="prompt"><pre>{escape(clip_text(prompt["prompt"], MAX_TEXT))}</pre><div class="outputs">{outputs}</div></div>'
            )
        note = (
            f" {more} more prompts are in eval/samples.json."
            if (more := len(found["prompts"]) - shown) > 0
            else ""
        )
        if scores := found.get("bits_per_byte"):
            models = list(dict.fromkeys(name for each in scores.values() for name in each))
            rows = [
                [code_text(file), *(format_decimal(each.get(name)) for name in models)]
                for file, each in scores.items()
            ]
            parts.append(html_table(["bits per byte", *map(escape, models)], rows))
        parts.append(
            small_text(
                f"Each model's continuation of the prompt above it. {settings[:1].upper()}{settings[1:]}.{note}"
            )
        )
    return "".join(parts)


def render_sample(output: dict, runs: list[RunData]) -> str:
    tokens, seconds = is_finite(output.get("tokens")), is_finite(output.get("seconds"))
    speed = (
        f"{format_whole(tokens)} tokens, {format_brief(tokens / seconds)} a second"
        if tokens and seconds
        else ""
    )
    name = short_model_name(str(output["model"]))
    i = model_sort_key(name, runs)
    return f"<div><h3>{color_swatch(i) if i < len(runs) else ''}{escape(name)}</h3><pre>{escape(clip_text(output['text'].lstrip(' ').strip(chr(10)), MAX_TEXT))}</pre>{small_text(speed)}</div>"

"""Render the section Samples: several models' continuations of the same prompts, side by side."""

from __future__ import annotations

from jaxpt.report.format import (
    MAX_TEXT,
    clip_text,
    format_brief,
    format_decimal,
    format_whole,
)
from jaxpt.report.html import code_text, color_swatch, escape, html_table, small_text
from jaxpt.report.read import RunData, get_run_index, group_distinct_values, short_model_name
from jaxpt.report.records import Continuation, Samples

MAX_PROMPTS = 24  # shown of all files together


def render_samples(runs: list[RunData]) -> str:
    """Render the prompts of each samples.json with their continuations."""
    html = ""
    files = group_distinct_values(runs, lambda run: run.samples)
    for samples, _ in files:
        max_prompts = max(1, MAX_PROMPTS // len(files))
        for prompt in samples.prompts[:max_prompts]:
            outputs = "".join(render_output(output, runs) for output in prompt.continuations)
            text = f"<pre>{escape(clip_text(prompt.prompt, MAX_TEXT))}</pre>"
            html += f'<div class="prompt">{text}<div class="outputs">{outputs}</div></div>'
        html += render_bits_per_byte(samples)
        html += small_text(describe_samples(samples, len(samples.prompts) - max_prompts))
    return html


def render_bits_per_byte(samples: Samples) -> str:
    """Render each model's bits per byte on the files that were compared."""
    if not samples.bits_per_byte:
        return ""
    models = []
    for scores in samples.bits_per_byte.values():
        models += scores
    models = list(dict.fromkeys(models))
    body = []
    for file, scores in samples.bits_per_byte.items():
        body.append([code_text(file), *(format_decimal(scores.get(name)) for name in models)])
    return html_table(["bits per byte", *map(escape, models)], body)


def describe_samples(samples: Samples, n_left_out: int) -> str:
    """Describe how the continuations were sampled."""
    settings = []
    for key, value in (samples.settings or {}).items():
        if value is not None:
            settings.append(f"{key.replace('_', ' ')} {value}")
    text = ", ".join(settings)
    text = f"Each model's continuation of the prompt above it. {text[:1].upper()}{text[1:]}."
    if n_left_out > 0:
        text += f" {n_left_out} more prompts are in eval/samples.json."
    return text


def render_output(output: Continuation, runs: list[RunData]) -> str:
    """Render one model's continuation of a prompt."""
    name = short_model_name(output.model)
    i = get_run_index(name, runs)
    swatch = color_swatch(i) if i < len(runs) else ""
    speed = ""
    if output.n_tokens and output.seconds:
        per_second = format_brief(output.n_tokens / output.seconds)
        speed = f"{format_whole(output.n_tokens)} tokens, {per_second} per second"
    text = clip_text(output.text.lstrip(" ").strip("\n"), MAX_TEXT)
    head = f"<h3>{swatch}{escape(name)}</h3>"
    return f"<div>{head}<pre>{escape(text)}</pre>{small_text(speed)}</div>"

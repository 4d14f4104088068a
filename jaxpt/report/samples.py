"""Section: several models' continuations of the same prompts, side by side."""

from __future__ import annotations

from jaxpt.report.markup import code, esc, grid, small, swatch
from jaxpt.report.read import RunData, distinct, model_name, model_order
from jaxpt.report.words import MAX_TEXT, brief, clip, decimal, finite, whole

MAX_PROMPTS = 24  # shown of all samples


def section(runs: list[RunData]) -> str:
    parts = []
    files = distinct(runs, "samples")
    shown = max(1, MAX_PROMPTS // max(1, len(files)))
    for found, _ in files:
        settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in (found.get("settings") or {}).items() if value is not None)
        for prompt in found["prompts"][:shown]:
            outputs = "".join(sample(output, runs) for output in prompt["outputs"])
            parts.append(f'<div class="prompt"><pre>{esc(clip(prompt["prompt"], MAX_TEXT))}</pre><div class="outputs">{outputs}</div></div>')
        note = f" {more} more prompts are in eval/samples.json." if (more := len(found["prompts"]) - shown) > 0 else ""
        if scores := found.get("bits_per_byte"):
            models = list(dict.fromkeys(name for each in scores.values() for name in each))
            rows = [[code(file), *(decimal(each.get(name)) for name in models)] for file, each in scores.items()]
            parts.append(grid(["bits per byte", *map(esc, models)], rows))
        parts.append(small(f"Each model's continuation of the prompt above it. {settings[:1].upper()}{settings[1:]}.{note}"))
    return "".join(parts)


def sample(output: dict, runs: list[RunData]) -> str:
    tokens, seconds = finite(output.get("tokens")), finite(output.get("seconds"))
    speed = f"{whole(tokens)} tokens, {brief(tokens / seconds)} a second" if tokens and seconds else ""
    name = model_name(str(output["model"]))
    i = model_order(name, runs)
    return f"<div><h3>{swatch(i) if i < len(runs) else ''}{esc(name)}</h3><pre>{esc(clip(output['text'].lstrip(' ').strip(chr(10)), MAX_TEXT))}</pre>{small(speed)}</div>"

"""Sections: several models' continuations side by side, and the documents on which two of them differ most."""

from __future__ import annotations

import itertools

from jaxpt.report.markup import code, esc, grid, small, swatch
from jaxpt.report.read import RunData, distinct, model_name, model_order
from jaxpt.report.words import MAX_TEXT, brief, clip, decimal, finite, whole

MAX_PROMPTS = 24  # shown of all samples
MAX_TOKENS = 256  # coloured, of each document on which two models differ


def side_by_side(runs: list[RunData]) -> str:
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


DIFFERENCE_KEY = (
    '<p class="legend tokens"><span><i class="b1">0.7</i> <i class="b2">1.4</i> <i class="b3">2.1</i> nats likelier</span>'
    '<span><i class="w1">0.7</i> <i class="w2">1.4</i> <i class="w3">2.1</i> nats less likely</span></p>'
)


def differences(runs: list[RunData]) -> str:
    """Documents on which two models differ most, each token coloured by how much likelier or less likely the child finds it."""
    parts = []
    for found, _ in distinct(runs, "differences"):
        parent, child = (esc(model_name(str(name))) for name in found["models"])
        for side, says in (("better", "likelier"), ("worse", "less likely")):
            parts += [f"<h3>What {child} finds {says} than {parent}</h3>"] if found[side] else []
            parts += [different(each) for each in found[side]]
        parts.append(small(
            f"Of {whole(found['documents'])} documents, each read up to {whole(found['max_length'])} tokens, those whose mean loss differs most, "
            f"and of each the {MAX_TOKENS} tokens that differ most. Resting on a token says its loss by both."
        ))  # fmt: skip
    return DIFFERENCE_KEY + "".join(parts) if parts else ""


def different(found: dict) -> str:
    """One document: its mean losses, and its text in colours."""
    cells = []
    for piece, before, after in itertools.islice(zip(found["pieces"], *found["losses"], strict=True), MAX_TOKENS):
        level = min(3, int(abs(after - before) / 0.7))  # nats: each shade is another factor of two
        text = esc(piece)
        cells.append(f'<i class="{"b" if after < before else "w"}{level}" title="{before:.2f} \u2192 {after:.2f}">{text}</i>' if level else text)
    before, after = found["nats"]
    start = f", from token {whole(found['first_token'])}" if found["first_token"] else ""
    head = f"{found['source']}, {found['id']}: {before:.3f} \u2192 {after:.3f} nats a token over {whole(found['tokens'])} tokens{start}"
    return f'<div class="tokens">{small(head)}<pre>{"".join(cells)}</pre></div>'

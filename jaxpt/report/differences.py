"""Section: the documents on which two models differ most, by token: in colours, and in numbers for whoever cannot see or point."""

from __future__ import annotations

from typing import NamedTuple

from jaxpt.report.format import format_change, format_signed, format_whole
from jaxpt.report.html import collapsible, escape, html_table, small_text
from jaxpt.report.read import RunData, distinct_values, short_model_name

MAX_TOKENS = 256  # coloured, of each document; fewer where the page shows several comparisons
MAX_LISTED = 6  # tokens of a document whose losses stand in a table under it
N_CONTEXT_TOKENS = 4  # tokens shown before each of those
MAX_SHADE = 0.7  # nats: each shade is another factor of two in probability
LEGEND = (
    '<p class="legend tokens"><span><i class="b1">0.7</i> <i class="b2">1.4</i> <i class="b3">2.1</i> nats likelier</span>'
    '<span><i class="w1">0.7</i> <i class="w2">1.4</i> <i class="w3">2.1</i> nats less likely</span></p>'
)


class Token(NamedTuple):
    """A piece of text and its loss by both models, in nats."""

    text: str
    parent: float
    child: float

    @property
    def shade(self) -> str:
        """Its class in page.css; "" where the models hardly differ."""
        level = min(3, int(abs(self.child - self.parent) / MAX_SHADE))
        return f"{'b' if self.child < self.parent else 'w'}{level}" if level else ""


def differences_section(runs: list[RunData]) -> str:
    parts = []
    comparisons = distinct_values(runs, "differences")
    for found, _ in comparisons:
        models = [escape(short_model_name(str(name))) for name in found["models"]]
        shown = MAX_TOKENS // len(comparisons)
        for side, says in (("better", "likelier"), ("worse", "less likely")):
            parts += (
                [f"<h3>What {models[1]} finds {says} than {models[0]}</h3>"] if found[side] else []
            )
            parts += [
                render_document(each, models, shown, is_open=not i)
                for i, each in enumerate(found[side])
            ]
        parts.append(small_text(
            f"Of {format_whole(found['documents'])} documents, each read up to {format_whole(found['max_length'])} tokens, those whose mean loss differs most, "
            f"and of each the {shown} tokens that differ most. Losses in nats."
        ))  # fmt: skip
    return LEGEND + "".join(parts) if parts else ""


def render_document(found: dict, models: list[str], shown: int, is_open: bool) -> str:
    """One document: its text in colours, the losses of the tokens that differ most, and, folded, of every token."""
    tokens = [Token(*each) for each in zip(found["pieces"], *found["losses"], strict=True)][:shown]
    text = "".join(
        f'<i class="{token.shade}">{escape(token.text)}</i>' if token.shade else escape(token.text)
        for token in tokens
    )
    start = f", from token {format_whole(found['first_token'])}" if found["first_token"] else ""
    title = f"{found['source']}, {found['id']}: {format_change(*found['nats'])} nats a token over {format_whole(found['tokens'])} tokens{start}"
    cells = "".join(
        f'<span class="{token.shade}">{escape(visible_token(token.text))}<small>{format_change(token.parent, token.child, 2)}</small></span>'
        for token in tokens
    )
    every = collapsible("Each token's loss", f'<div class="cells">{cells}</div>')
    body = (
        f'<div class="tokens"><pre>{text}</pre></div>{render_most_different(tokens, models)}{every}'
    )
    return collapsible(title, body, is_open, "document")


def render_most_different(tokens: list[Token], models: list[str]) -> str:
    """A table of the tokens with the largest difference, each behind those that led to it."""
    order = sorted(range(len(tokens)), key=lambda i: -abs(tokens[i].child - tokens[i].parent))
    body = []
    for i in order[:MAX_LISTED]:
        before = visible_token(
            "".join(token.text for token in tokens[max(0, i - N_CONTEXT_TOKENS) : i])
        )
        token = tokens[i]
        where = f'<span class="context"><bdi>{escape(before)}</bdi><i class="{token.shade}">{escape(visible_token(token.text))}</i></span>'
        body.append(
            [
                where,
                f"{token.parent:.2f}",
                f"{token.child:.2f}",
                format_signed(token.child - token.parent, 2),
            ]
        )
    return html_table(["token, in its place", *models, "difference"], body, kind="listed")


def visible_token(piece: str) -> str:
    """White space made visible, so that a token of nothing else is one."""
    return piece.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")

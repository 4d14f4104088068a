"""Section: the documents on which two models differ most, by token: in colours, and in numbers for whoever cannot see or point."""

from __future__ import annotations

from typing import NamedTuple

from jaxpt.report.markup import details, esc, grid, small
from jaxpt.report.read import RunData, distinct, model_name
from jaxpt.report.words import arrow, signed, whole

MAX_TOKENS = 256  # coloured, of each document; fewer where the page shows several comparisons
MAX_LISTED = 6  # tokens of a document whose losses stand in a table under it
N_BEFORE = 4  # tokens shown before each of those
SHADE = 0.7  # nats: each shade is another factor of two in probability
KEY = (
    '<p class="legend tokens"><span><i class="b1">0.7</i> <i class="b2">1.4</i> <i class="b3">2.1</i> nats likelier</span>'
    '<span><i class="w1">0.7</i> <i class="w2">1.4</i> <i class="w3">2.1</i> nats less likely</span></p>'
)


class Token(NamedTuple):
    """A piece of text and its loss by both models, in nats."""

    piece: str
    parent: float
    child: float

    @property
    def shade(self) -> str:
        """Its class in page.css; "" where the models hardly differ."""
        level = min(3, int(abs(self.child - self.parent) / SHADE))
        return f"{'b' if self.child < self.parent else 'w'}{level}" if level else ""


def section(runs: list[RunData]) -> str:
    parts = []
    comparisons = distinct(runs, "differences")
    for found, _ in comparisons:
        models = [esc(model_name(str(name))) for name in found["models"]]
        shown = MAX_TOKENS // len(comparisons)
        for side, says in (("better", "likelier"), ("worse", "less likely")):
            parts += [f"<h3>What {models[1]} finds {says} than {models[0]}</h3>"] if found[side] else []
            parts += [document(each, models, shown, is_open=not i) for i, each in enumerate(found[side])]
        parts.append(small(
            f"Of {whole(found['documents'])} documents, each read up to {whole(found['max_length'])} tokens, those whose mean loss differs most, "
            f"and of each the {shown} tokens that differ most. Losses in nats."
        ))  # fmt: skip
    return KEY + "".join(parts) if parts else ""


def document(found: dict, models: list[str], shown: int, is_open: bool) -> str:
    """One document: its text in colours, the losses of the tokens that differ most, and, folded, of every token."""
    tokens = [Token(*each) for each in zip(found["pieces"], *found["losses"], strict=True)][:shown]
    text = "".join(f'<i class="{token.shade}">{esc(token.piece)}</i>' if token.shade else esc(token.piece) for token in tokens)
    start = f", from token {whole(found['first_token'])}" if found["first_token"] else ""
    title = f"{found['source']}, {found['id']}: {arrow(*found['nats'])} nats a token over {whole(found['tokens'])} tokens{start}"
    cells = "".join(
        f'<span class="{token.shade}">{esc(seen(token.piece))}<small>{arrow(token.parent, token.child, 2)}</small></span>' for token in tokens
    )
    every = details("Each token's loss", f'<div class="cells">{cells}</div>')
    body = f'<div class="tokens"><pre>{text}</pre></div>{most_different(tokens, models)}{every}'
    return details(title, body, is_open, "document")


def most_different(tokens: list[Token], models: list[str]) -> str:
    """A table of the tokens with the largest difference, each behind those that led to it."""
    order = sorted(range(len(tokens)), key=lambda i: -abs(tokens[i].child - tokens[i].parent))
    body = []
    for i in order[:MAX_LISTED]:
        before = seen("".join(token.piece for token in tokens[max(0, i - N_BEFORE) : i]))
        token = tokens[i]
        where = f'<span class="context"><bdi>{esc(before)}</bdi><i class="{token.shade}">{esc(seen(token.piece))}</i></span>'
        body.append([where, f"{token.parent:.2f}", f"{token.child:.2f}", signed(token.child - token.parent, 2)])
    return grid(["token, in its place", *models, "difference"], body, kind="listed")


def seen(piece: str) -> str:
    """White space made visible, so that a token of nothing else is one."""
    return piece.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")

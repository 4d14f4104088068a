"""Render the section Differences: documents on which two models differ most, by token.

Colors show the differences in the text; tables of numbers serve whoever cannot see or point.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxpt.report.format import format_change, format_signed, format_whole
from jaxpt.report.html import collapsible, escape, html_table, small_text
from jaxpt.report.read import RunData, group_distinct_values, short_model_name
from jaxpt.report.records import DocumentDifference

MAX_TOKENS_PER_DOCUMENT = 256  # colored; fewer where the page shows several comparisons
MAX_TOKENS_LISTED = 6  # tokens of a document in the table under it
N_CONTEXT_TOKENS = 4  # tokens shown before each of those
NATS_PER_SHADE = 0.7  # each shade is another factor of two in probability
LEGEND = (
    '<p class="legend tokens"><span><i class="b1">0.7</i> <i class="b2">1.4</i> '
    '<i class="b3">2.1</i> nats more likely</span>'
    '<span><i class="w1">0.7</i> <i class="w2">1.4</i> '
    '<i class="w3">2.1</i> nats less likely</span></p>'
)


class TokenLosses(NamedTuple):
    """A token's text and its loss by both models, in nats."""

    text: str
    parent: float
    child: float

    @property
    def change(self) -> float:
        """The child's loss above the parent's."""
        return self.child - self.parent

    @property
    def css_class(self) -> str:
        """Class in page.css: b1 to b3 for better, w1 to w3 for worse, "" for hardly different."""
        level = min(3, int(abs(self.change) / NATS_PER_SHADE))
        side = "b" if self.change < 0 else "w"
        return f"{side}{level}" if level else ""


def render_differences(runs: list[RunData]) -> str:
    """Render each comparison: documents that got better, then those that got worse."""
    html = ""
    comparisons = group_distinct_values(runs, lambda run: run.differences)
    for found, _ in comparisons:
        models = [escape(short_model_name(name)) for name in found.models]
        max_tokens = MAX_TOKENS_PER_DOCUMENT // len(comparisons)
        for side, documents in (("more", found.better), ("less", found.worse)):
            if documents:
                html += f"<h3>What {models[1]} finds {side} likely than {models[0]}</h3>"
            for i, document in enumerate(documents):
                html += render_document(document, models, max_tokens, is_open=i == 0)
        html += small_text(
            f"Of {format_whole(found.n_documents)} documents, each read up to "
            f"{format_whole(found.max_length)} tokens, those whose mean loss differs most, and of "
            f"each the {max_tokens} tokens that differ most. Losses in nats."
        )
    return LEGEND + html if html else ""


def render_document(
    document: DocumentDifference, models: list[str], max_tokens: int, is_open: bool
) -> str:
    """Render a document's colored text, its most different tokens, and, folded, every token."""
    losses = zip(document.token_texts, *document.token_losses, strict=True)
    tokens = [TokenLosses(*values) for values in losses][:max_tokens]
    text, cells = "", ""
    for token in tokens:
        html = escape(token.text)
        text += f'<i class="{token.css_class}">{html}</i>' if token.css_class else html
        change = format_change(token.parent, token.child, 2)
        visible = escape(show_whitespace(token.text))
        cells += f'<span class="{token.css_class}">{visible}<small>{change}</small></span>'
    title = (
        f"{document.source}, {document.document_id}: {format_change(*document.mean_losses)} "
        f"nats per token over {format_whole(document.n_tokens)} tokens"
    )
    if document.window_start:
        title += f", from token {format_whole(document.window_start)}"
    body = f'<div class="tokens"><pre>{text}</pre></div>'
    body += render_most_different_tokens(tokens, models)
    body += collapsible("Each token's loss", f'<div class="cells">{cells}</div>')
    return collapsible(title, body, is_open, "document")


def render_most_different_tokens(tokens: list[TokenLosses], models: list[str]) -> str:
    """Render a table of the tokens with the largest difference, each behind its context."""
    order = sorted(range(len(tokens)), key=lambda i: -abs(tokens[i].change))
    body = []
    for i in order[:MAX_TOKENS_LISTED]:
        token = tokens[i]
        before = tokens[max(0, i - N_CONTEXT_TOKENS) : i]
        context = escape(show_whitespace("".join(token.text for token in before)))
        text = escape(show_whitespace(token.text))
        marked = f'<bdi>{context}</bdi><i class="{token.css_class}">{text}</i>'
        losses = [f"{token.parent:.2f}", f"{token.child:.2f}", format_signed(token.change, 2)]
        body.append([f'<span class="context">{marked}</span>', *losses])
    heads = ["token, in its context", *models, "difference"]
    return html_table(heads, body, css_class="listed")


def show_whitespace(text: str) -> str:
    """Make white space visible, so that a token of nothing else is seen."""
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")

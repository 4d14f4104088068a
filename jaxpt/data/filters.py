"""Rules: each looks at texts and says why one must go, or changes it. A preset is a list of them, in order.

A rule sees one text at a time, so what it makes of it depends on nothing else. The rules that compare documents
(exact_dedup, near_dedup) only mark each text as it stands at their place in the order; dedup.py decides from the marks
of the whole corpus.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxpt.data import dedup, language
from jaxpt.data.sources import Document
from jaxpt.spec import UserError


class Text(str):
    """A text on its way through the rules. `notes` is what rules found out about it; it goes into the document's meta."""

    def __new__(cls, text: str, notes: dict[str, Any] | None = None):
        self = super().__new__(cls, text)
        self.notes = {} if notes is None else notes
        return self


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named step over a batch of texts; one of three.

    judge  texts -> for each the reason in words to drop it, or "" to keep it
    edit   texts -> for each (the text that takes its place, the number of edits)
    mark   texts -> for each the bytes by which dedup.py compares it with the other documents
    """

    name: str
    judge: Callable[[list[Text]], list[str]] | None = None
    edit: Callable[[list[Text]], list[tuple[str, int]]] | None = None
    mark: Callable[[list[Text]], list[bytes]] | None = None


class Judged(NamedTuple):
    """What the rules made of n documents, each by itself.

    failed     [n] the first rule that drops it, the number of rules where none does
    reasons    [n] why, or ""
    documents  [n] as they stand in the end, with what rules found out in `meta`; of a dropped one the text that its rule saw
    edits      editing rule -> [n] (edits, characters, UTF-8 bytes of the text after it), of those that came so far; None for others
    marks      comparing rule -> [n] its mark; b"" for documents that a rule before it dropped
    """

    failed: list[int]
    reasons: list[str]
    documents: list[Document]
    edits: dict[int, list[tuple[int, int, int] | None]]
    marks: dict[int, list[bytes]]


def judge(documents: Sequence[Document], rules: Sequence[Rule]) -> Judged:
    """Show the documents to the rules, in order. What a rule dropped is not shown to the rules after it.

    Prompt and completion are edited apart, so an edit never crosses from one to the other; an edit that leaves nothing to
    learn from drops the document. Raises UserError, naming rule and documents, where a rule fails or does not answer for each text.
    """
    n = len(documents)
    texts = [Text(document.text) for document in documents]
    prompt_chars = [document.prompt_chars for document in documents]
    failed, reasons = [len(rules)] * n, [""] * n
    edits: dict[int, list] = {k: [None] * n for k, rule in enumerate(rules) if rule.edit}
    marks: dict[int, list] = {k: [b""] * n for k, rule in enumerate(rules) if rule.mark}
    alive = list(range(n))
    for k, rule in enumerate(rules):
        shown, ids = [texts[i] for i in alive], [documents[i].id for i in alive]
        if rule.mark:
            for i, mark in zip(alive, answers(rule, rule.mark, shown, ids), strict=True):
                marks[k][i] = mark
        elif rule.judge:
            for i, reason in zip(alive, answers(rule, rule.judge, shown, ids), strict=True):
                if reason:
                    failed[i], reasons[i] = k, reason
        else:
            prompted = [i for i in alive if prompt_chars[i]]
            parts = [texts[i][prompt_chars[i] :] if prompt_chars[i] else texts[i] for i in alive]
            prompts = dict(zip(prompted, answers(rule, rule.edit, [Text(texts[i][: prompt_chars[i]]) for i in prompted], ids), strict=True))
            for i, (text, n_edits) in zip(alive, answers(rule, rule.edit, [Text(part) for part in parts], ids), strict=True):
                prompt, n_more = prompts.get(i, ("", 0))
                if not text.strip():
                    failed[i], reasons[i] = k, "nothing is left of it"
                elif n_edits + n_more:
                    texts[i], prompt_chars[i] = Text(prompt + text, texts[i].notes), len(prompt)
                edits[k][i] = (n_edits + n_more, len(texts[i]), len(texts[i].encode()))
        alive = [i for i in alive if failed[i] == len(rules)]
    made = [
        Document(each.id, str(text), n_prompt, json.dumps({**json.loads(each.meta), **text.notes}, ensure_ascii=False) if text.notes else each.meta)
        for each, text, n_prompt in zip(documents, texts, prompt_chars, strict=True)
    ]
    return Judged(failed, reasons, made, edits, marks)


def answers(rule: Rule, step: Callable[[list[Text]], list], texts: list[Text], ids: Sequence[str]) -> list:
    """What a step of the rule says of the texts. Raises UserError, naming the rule and the documents, where it fails."""
    if not texts:
        return []
    those = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    try:
        said = list(step(texts))
    except UserError:
        raise
    except Exception as error:  # an own rule may raise anything
        line = (str(error) or "no message").splitlines()[0]
        raise UserError(f"prepare.rules: {rule.name} raised {type(error).__name__} ({line}) on {those}. Mend the rule or leave it out.") from error
    if len(said) != len(texts):
        raise UserError(f"prepare.rules: {rule.name} gave {len(said)} answers for {len(texts)} texts ({those}), wanted one for each.")
    return said


def each(rule: Callable[..., Any], **settings) -> Callable[[list[Text]], list[Any]]:
    """A rule about one text as a rule about a batch."""
    return lambda texts: [rule(text, **settings) for text in texts]


def line_length(text: str) -> str:
    """Fewer than 3 lines, or the third longest line has fewer than 3 characters.

    Both say the same thing: fewer than 3 lines have 3 characters or more.
    """
    n_long = 0
    for line in text.split("\n"):
        n_long += len(line) >= 3
        if n_long == 3:
            return ""
    return f"{n_long} lines of 3 characters or more, wanted 3"


def paragraph_repetition(text: str) -> str:
    """More than 0.3 of the paragraphs, or 0.2 of the text's characters, are paragraphs seen earlier in the text."""
    paragraphs = re.split(r"\n{2,}", text.strip())
    seen: set[str] = set()
    n_repeated = chars_repeated = 0
    for paragraph in paragraphs:
        if paragraph in seen:
            n_repeated += 1
            chars_repeated += len(paragraph)
        seen.add(paragraph)
    if n_repeated / len(paragraphs) > 0.3:
        return f"{n_repeated} of {len(paragraphs)} paragraphs are repeats, wanted at most 0.3"
    if text and chars_repeated / len(text) > 0.2:
        return f"{chars_repeated} of {len(text)} characters are in repeated paragraphs, wanted at most 0.2"
    return ""


def english(text: str, *, newline: str) -> str:
    """Not English with a score above 0.4. `newline` takes the place of each line end."""
    code, score = language.identify(text.replace("\n", newline))
    return "" if code == "en" and score > 0.4 else f"{code} {score:.2f}, wanted en above 0.40"


def min_chars(text: str, *, least: int) -> str:
    """Too short to teach anything but its own end."""
    n = len(text.strip())
    return "" if n >= least else f"{n} characters, wanted {least}"


def few_words(text: str) -> str:
    """Less than 0.7 of the words hold a letter: tables, dumps, markup. (Gopher's rule, at 0.8 there: 2112.11446, appendix A.)"""
    words = text.split()
    n = sum(any(map(str.isalpha, word)) for word in words)
    return "" if n >= 0.7 * len(words) else f"{n} of {len(words)} words hold a letter, wanted 0.7"


def many_symbols(text: str) -> str:
    """More than 0.25 of the characters are neither letters, digits nor white space: markup, ruled tables, code."""
    n = sum(not (c.isalnum() or c.isspace()) for c in text)
    return "" if n <= 0.25 * len(text) else f"{n} of {len(text)} characters are symbols, wanted at most 0.25"


def line_repetition(text: str) -> str:
    """More than 0.3 of the lines that hold a letter were seen earlier in the text. (Gopher's duplicate line fraction.)"""
    lines = [line.strip() for line in text.split("\n") if any(map(str.isalpha, line))]
    n = len(lines) - len(set(lines))
    return "" if n <= 0.3 * len(lines) else f"{n} of {len(lines)} lines are repeats, wanted at most 0.3"


def code_lines(text: str) -> str:
    """A line above 1,000 characters, or a mean line outside 10 to 100: minified, packed data, or nearly empty.

    (Codex and StarCoder drop the long ones so: 2107.03374, 2305.06161.)
    """
    lengths = [len(line) for line in text.splitlines() if line.strip()] or [0]
    mean = sum(lengths) / len(lengths)
    if max(lengths) > 1000:
        return f"a line of {max(lengths)} characters, wanted at most 1,000"
    return "" if 10 <= mean <= 100 else f"lines of {mean:.0f} characters on average, wanted 10 to 100"


def few_alphanumeric(text: str) -> str:
    """Less than 0.25 of the characters are letters or digits. (StarCoder's threshold.)"""
    n = sum(map(str.isalnum, text))
    return "" if n >= 0.25 * len(text) else f"{n} of {len(text)} characters are letters or digits, wanted 0.25"


def autogenerated(text: str) -> str:
    """Says in its first ten lines that a program wrote it, or more than half of its lines are rows of a data table."""
    head = "\n".join(text.split("\n", 10)[:10])
    if mark := re.search(r"auto-?generated|automatically generated|generated (?:by|from) |do not edit", head, re.IGNORECASE):
        return f"says {mark.group()!r} in its first lines"
    lines = [line for line in text.splitlines() if line.strip()]
    n = sum(bool(DATA_ROW.fullmatch(line)) for line in lines)
    return "" if n <= 0.5 * len(lines) else f"{n} of {len(lines)} lines are data rows, wanted at most half"


# A line that only lists: numbers and strings, with the commas, colons and brackets between them and a comment after.
# Possessive repeats (++, *+): a long line that is no data row costs one pass in place of an exponential number.
DATA_ROW = re.compile(r"""\s*+[\[({]*+(?:(?:[-+]?[\d.][\w.]*+|[rbu]*+"[^"]*"|[rbu]*+'[^']*')[\s,:\])}]*+)++(?:#.*)?""")

EXACT = Rule("exact_dedup", mark=each(lambda text: dedup.digest(text.encode())))

PRESETS: dict[str, tuple[Rule, ...]] = {
    "none": (),
    # The four rules of the course "Pretraining LLMs", lesson 2, in its order, odd ones included: words at line ends are glued for the language
    "course": (
        Rule("line_length", each(line_length)),
        Rule("paragraph_repetition", each(paragraph_repetition)),
        EXACT,
        Rule("language", each(english, newline="")),
    ),
    "prose": (
        Rule("min_chars", each(min_chars, least=200)),
        Rule("few_words", each(few_words)),
        Rule("many_symbols", each(many_symbols)),
        Rule("line_repetition", each(line_repetition)),
        Rule("paragraph_repetition", each(paragraph_repetition)),
        EXACT,
        Rule("language", each(english, newline=" ")),
    ),
    "code": (
        Rule("min_chars", each(min_chars, least=100)),
        Rule("code_lines", each(code_lines)),
        Rule("few_alphanumeric", each(few_alphanumeric)),
        Rule("autogenerated", each(autogenerated)),
        EXACT,
    ),
}

"""Quality rules: each looks at texts and says why one must go, or "" to keep it. A preset is a list of them, in order.

A rule sees one text at a time, so its verdict depends on nothing else; the two rules that compare documents
(exact_dedup here, near_dedup) carry no judge of their own and are decided over the whole corpus in dedup.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from jaxpt.data import language


@dataclasses.dataclass(frozen=True)
class Rule:
    """A named reason to drop a document. judge: texts -> for each the reason in words, or "" to keep it; None: see above."""

    name: str
    judge: Callable[[list[str]], list[str]] | None


def judge(texts: list[str], rules: Sequence[Rule]) -> tuple[list[int], list[str]]:
    """For each text the index of the first rule that drops it and the reason, or (len(rules), "") where none does.

    Rules without a judge are passed over. A text that a rule dropped is not shown to the rules after it.
    """
    failed, reasons = [len(rules)] * len(texts), [""] * len(texts)
    alive = list(range(len(texts)))
    for k, rule in enumerate(rules):
        if rule.judge is None:
            continue
        for i, reason in zip(alive, rule.judge([texts[i] for i in alive]), strict=True):
            if reason:
                failed[i], reasons[i] = k, reason
        alive = [i for i in alive if failed[i] == len(rules)]
    return failed, reasons


def each(rule: Callable[..., str], **settings) -> Callable[[list[str]], list[str]]:
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

EXACT = Rule("exact_dedup", None)

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

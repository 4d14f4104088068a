"""What the rules are.

Each a function of one text and its thresholds, named as in a config, with its source.

A rule that drops gives the reason in words, or "" to keep the text; a rule that edits gives the
text that takes its place
and the number of edits. Which rules run, in which order and with which thresholds, is said in
filters.py.

Words are what stands between white space, lines what stands between line ends, paragraphs what
stands between empty lines.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import pathlib
import re
from typing import Any

import numpy as np

from jaxpt.data import language as identification


class Text(str):
    """A text on its way through the rules, with what several of them look at, found once.

    notes  what rules found out about it; it goes into the document's meta
    meta   what its source says about it, a JSON object
    """

    def __new__(cls, text: str, notes: dict[str, Any] | None = None, meta: str = "{}"):
        self = super().__new__(cls, text)
        self.notes, self.meta = {} if notes is None else notes, meta
        return self

    @functools.cached_property
    def words(self) -> list[str]:
        """Words of the text."""
        return self.split()

    @functools.cached_property
    def word_chars(self) -> np.ndarray:
        """[n_words] int64, characters of each word."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @functools.cached_property
    def symbols(self) -> list[str]:
        """The words without a letter or digit."""
        return [word for word in self.words if not word.isalnum() and not NON_SPACE.search(word)]

    @functools.cached_property
    def word_codes(self) -> np.ndarray:
        """A number per distinct word, for each word."""
        return np.fromiter(map(hash, self.words), np.int64, len(self.words)).view(np.uint64)

    def ngram_codes(self, n: int) -> np.ndarray:
        """[max(0, n_words - n + 1)] uint64.

        Equal for equal n words in a row, and for others with a chance of 2^-64.

        The last ones are kept, as longer ones are made of them: ask for n in rising order.
        """
        last, codes = self.__dict__.get("last_codes", (1, self.word_codes))
        if last > n:
            last, codes = 1, self.word_codes
        for longer in range(last + 1, n + 1):
            codes = (
                codes[:-1] * np.uint64(0x9E3779B97F4A7C15) + self.word_codes[longer - 1 :]
                if len(codes)
                else codes
            )
        self.last_codes = n, codes
        return codes


NON_SPACE = re.compile(r"[^\W_]")


# ---- the course "Pretraining LLMs", lesson 2


def line_length(text: str, lines: int = 3, chars: int = 3) -> str:
    """Fewer than 3 lines, or the third longest line has fewer than 3 characters.

    Both say the same thing: fewer than 3 lines have 3 characters or more.
    """
    n_long = 0
    for line in text.split("\n"):
        n_long += len(line) >= chars
        if n_long == lines:
            return ""
    return f"{n_long} lines of {chars} characters or more, expected {lines}"


def paragraph_repetition(text: str, most: float = 0.3, most_chars: float = 0.2) -> str:
    """More than 0.3 of the paragraphs, or 0.2 of the text's characters, are paragraphs seen earlier
    in the text.

    Source: the course, lesson 2; the same as Gopher's two paragraph rules (2112.11446, table A1).
    """
    return measure_repetition(split_paragraphs(text), text, "paragraphs", most, most_chars)


def split_paragraphs(text: str) -> list[str]:
    """re.split(r"\\n{2,}", text.strip()), in a third of the time: that looks at each character by
    itself.
    """
    return [part for cut in text.strip().split("\n\n") if (part := cut.lstrip("\n"))] or [""]


def measure_repetition(
    parts: list[str], text: str, noun: str, most: float, most_chars: float
) -> str:
    """Return why repeated parts drop a text, or ""."""
    seen = set(parts)
    if len(seen) == len(parts):
        return ""
    n_repeated = len(parts) - len(seen)
    chars = sum(map(len, parts)) - sum(map(len, seen))
    if n_repeated / len(parts) > most:
        return f"{n_repeated} of {len(parts)} {noun} are repeats, expected at most {most}"
    if chars / len(text) > most_chars:
        return (
            f"{chars} of {len(text)} characters are in repeated {noun}, "
            f"expected at most {most_chars}"
        )
    return ""


def language(
    texts: list[Text], code: str = "en", least: float = 0.65, newline: str = " "
) -> list[str]:
    """Not in the language `code` with a score above `least`, by fastText's lid.176.

    `newline` takes the place of each line end.

    Source: 0.65 is FineWeb's (2406.17557); the course takes 0.4 and glues lines together.
    """
    reasons = []
    for text, (found, score) in zip(
        texts,
        identification.identify_languages([text.replace("\n", newline) for text in texts], least),
        strict=True,
    ):
        text.notes |= {"language": found, "language_score": round(score, 3)}
        reasons.append(
            ""
            if found == code and score > least
            else f"{found} {score:.2f}, expected {code} above {least:.2f}"
        )
    return reasons


# ---- Gopher: quality (2112.11446, appendix A.1.1)


def gopher_word_count(text: Text, least: int = 50, most: int = 100_000) -> str:
    """Fewer than 50 words or more than 100,000, those without a letter or digit not counted."""
    n = len(text.words) - len(text.symbols)
    return "" if least <= n <= most else f"{n:,} words, expected {least:,} to {most:,}"


def gopher_word_length(text: Text, least: float = 3.0, most: float = 10.0) -> str:
    """Words of fewer than 3 or more than 10 characters on average, those without a letter or digit
    not counted.
    """
    n = len(text.words) - len(text.symbols)
    mean = (int(text.word_chars.sum()) - sum(map(len, text.symbols))) / max(n, 1)
    return (
        ""
        if least <= mean <= most
        else f"words of {mean:.1f} characters on average, expected {least:g} to {most:g}"
    )


def gopher_symbols(text: Text, most: float = 0.1) -> str:
    """More than one hash sign, or one ellipsis, to ten words."""
    for name, n in (
        ("hash signs", text.count("#")),
        ("ellipses", text.count("...") + text.count("…")),
    ):
        if n > most * len(text.words):
            return f"{n} {name} to {len(text.words)} words, expected at most {most} to one"
    return ""


def gopher_bullets(text: str, most: float = 0.9) -> str:
    """More than 0.9 of the lines start with a bullet point or a dash."""
    if text.count("•") + text.count("-") <= most * text.count("\n"):  # too few, wherever they stand
        return ""
    lines = text.splitlines()
    n = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    return (
        ""
        if n <= most * len(lines)
        else f"{n} of {len(lines)} lines are bullet points, expected at most {most}"
    )


def gopher_ellipsis_lines(text: str, most: float = 0.3) -> str:
    """More than 0.3 of the lines end with an ellipsis."""
    if text.count("...") + text.count("…") <= most * text.count("\n"):
        return ""
    lines = text.splitlines()
    n = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    return (
        ""
        if n <= most * len(lines)
        else f"{n} of {len(lines)} lines end with an ellipsis, expected at most {most}"
    )


def gopher_alphabetic(text: Text, least: float = 0.8, marks: bool = False) -> str:
    """Less than 0.8 of the words hold a letter.

    marks=True counts each punctuation mark as a word, as the tokenizers of datatrove do, and with
    them FineWeb: much stricter.
    """
    return count_words_with_letters(WORD_TOKEN.findall(text) if marks else text.words, least)


WORD_TOKEN = re.compile(r"\w+(?:['’]\w+)*|\.{2,}|-{2,}|[^\w\s]")


def count_words_with_letters(words: list[str], least: float) -> str:
    """Return why too few words with letters drop a text, or ""."""
    n = sum(map(str.isalpha, words))  # of letters alone: quick, and in most texts enough
    if n < least * len(words):
        n += sum(not word.isalpha() and any(map(str.isalpha, word)) for word in words)
    return (
        ""
        if n >= least * len(words)
        else f"{n} of {len(words)} words hold a letter, expected {least}"
    )


def gopher_stop_words(text: Text, least: int = 2) -> str:
    """Fewer than two of: the, be, to, of, and, that, have, with. Asks for English."""
    n = len(STOP_WORDS.intersection(text.words))
    return (
        "" if n >= least else f"{n} of the words {', '.join(sorted(STOP_WORDS))}, expected {least}"
    )


STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


# ---- Gopher: repetition (2112.11446, table A1; what counts as a repeat as in datatrove 0.10.1)


def duplicate_lines(text: str, most: float = 0.3, most_chars: float = 0.2) -> str:
    """More than 0.3 of the lines, or 0.2 of the text's characters, are lines seen earlier in the
    text.
    """
    return measure_repetition(re.split(r"\n+", text), text, "lines", most, most_chars)


def top_ngrams(text: Text, two: float = 0.20, three: float = 0.18, four: float = 0.16) -> str:
    """The most frequent 2, 3 or 4 words in a row make more than 0.20, 0.18 or 0.16 of the
    characters. Of equals the first in the text counts.
    """
    longest = int(text.word_chars.max(initial=0))
    for n, most in ((2, two), (3, three), (4, four)):
        codes = text.ngram_codes(n)
        if not len(codes):
            break
        ordered = np.sort(codes)
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        counts = np.diff(ends, prepend=-1)
        times = int(counts.max())
        if times * (n * longest + n - 1) <= most * len(text):  # whichever it is
            continue
        at = int(np.flatnonzero(np.isin(codes, ordered[ends[counts == times]]))[0])
        gram = " ".join(text.words[at : at + n])
        if times * len(gram) / len(text) > most:
            return (
                f"{gram[:80]!r} stands there {times} times: {times * len(gram)} "
                f"of {len(text)} characters, expected at most {most}"
            )
    return ""


def duplicate_ngrams(
    text: Text,
    five: float = 0.15,
    six: float = 0.14,
    seven: float = 0.13,
    eight: float = 0.12,
    nine: float = 0.11,
    ten: float = 0.10,
) -> str:
    """More than 0.15 (0.14, ... 0.10) of the characters are in 5 (6, ... 10) words in a row that
    stood there before, none counted twice.
    """
    limits = (five, six, seven, eight, nine, ten)
    for n, most in enumerate(limits, 5):
        codes = text.ngram_codes(n)
        ordered = np.sort(codes)
        doubled = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(doubled):  # then no longer one repeats either
            break
        at = np.flatnonzero(
            doubled[np.minimum(np.searchsorted(doubled, codes), len(doubled) - 1)] == codes
        )
        edges = np.zeros(len(text.words) + 1, np.int64)
        edges[at] += 1
        edges[at + n] -= 1
        bound = int(
            text.word_chars[np.cumsum(edges)[:-1] > 0].sum()
        )  # characters in whatever repeats: no less than in longer repeats
        if bound <= min(limits[n - 5 :]) * len(text):
            break
        if (
            bound > most * len(text)
            and (chars := count_repeated_chars(text, codes, n)) / len(text) > most
        ):
            return (
                f"{chars} of {len(text)} characters are in {n} words in a row "
                f"that stood there before, expected at most {most}"
            )
    return ""


def count_repeated_chars(text: Text, codes: np.ndarray, n: int) -> int:
    """Characters, spaces apart, of the n-grams that stood there before, read from the left.

    After a repeat comes the word behind it.
    """
    upto = np.concatenate([[0], np.cumsum(text.word_chars)]).tolist()
    seen, chars, i, found = set(), 0, 0, codes.tolist()
    while i < len(found):
        if found[i] in seen:
            chars += upto[i + n] - upto[i]
            i += n
        else:
            seen.add(found[i])
            i += 1
    return chars


# ---- C4 (Raffel et al. 2019, 1910.10683, section 2.2)


def c4_lines(
    text: str, punctuation: bool = True, words: int = 3, longest: int = 1000
) -> tuple[str, int]:
    """Takes out the lines that do not end with . ! ? or a quotation mark, have fewer than 3 words
    or one above 1,000 characters, speak of
    JavaScript or of cookies and terms; and in those that stay the marks of citations, such as [3]
    or [citation needed].

    punctuation=False keeps lines whatever their end, as FineWeb does.
    """
    kept, n_edits = [], 0
    for line in text.splitlines():
        found = line.split()
        mended, n_cited = CITATION.subn("", line.strip())
        mended = mended.rstrip()
        low = mended.lower()
        if (
            len(found) < words
            or (
                punctuation
                and (
                    not mended.endswith((".", "!", "?", '"', "'", "”", "’"))
                    or mended.endswith("...")
                )
            )
            or (len(line) > longest and max(map(len, found)) > longest)
            or "javascript" in low
            or any(phrase in low for phrase in POLICY)
        ):
            n_edits += bool(found)
            continue
        n_edits += n_cited
        kept.append(mended)
    return "\n".join(kept), n_edits


CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


def c4_lorem_ipsum(text: str) -> str:
    """Holds the filler text "lorem ipsum"."""
    return "holds 'lorem ipsum'" if "lorem ipsum" in text.lower() else ""


def c4_curly_bracket(text: str) -> str:
    """Holds a curly bracket: a page with code."""
    return "holds a curly bracket" if "{" in text else ""


def c4_sentences(text: str, least: int = 5) -> str:
    """Fewer than five sentences.

    A line has one, and one more wherever . ! or ? ends a word and another word follows.
    """
    n = sum(
        1 + len(SENTENCE_END_PATTERN.findall(line)) for line in text.splitlines() if line.strip()
    )
    return "" if n >= least else f"{n} sentences, expected {least}"


SENTENCE_END_PATTERN = re.compile(r"""[.!?]["'”’)\]]*\s+(?=\S)""")


# ---- FineWeb (2406.17557, section 3.4; thresholds as datatrove 0.10.1 has them)


def fineweb_line_ends(text: str, least: float = 0.12) -> str:
    """Less than 0.12 of the lines end as a sentence does."""
    lines = split_nonempty_lines(text)
    n = sum(line.endswith(SENTENCE_END_CHARS) for line in lines)
    return (
        ""
        if n >= least * len(lines)
        else f"{n} of {len(lines)} lines end as a sentence does, expected {least}"
    )


# What ends a sentence in the scripts with most text on the web
SENTENCE_END_CHARS = tuple(".!?。！？．｡…‼⁇⁈⁉؟۔।॥။።፧։՜՞")


def fineweb_short_lines(text: str, most: float = 0.67, chars: int = 30) -> str:
    """More than 0.67 of the lines have at most 30 characters."""
    lines = split_nonempty_lines(text)
    n = sum(len(line) <= chars for line in lines)
    return (
        ""
        if n <= most * len(lines)
        else f"{n} of {len(lines)} lines have at most {chars} characters, expected at most {most}"
    )


def fineweb_duplicate_characters(text: str, most: float = 0.01) -> str:
    """More than 0.01 of the characters are in lines seen earlier in the text.

    (0.01 in datatrove's recipe, 0.1 in the paper.)
    """
    lines = split_nonempty_lines(text)
    chars = sum(map(len, lines)) - sum(map(len, set(lines)))
    n = len(text) - text.count("\n")
    return (
        ""
        if chars <= most * n
        else f"{chars} of {n} characters are in repeated lines, expected at most {most}"
    )


def fineweb_line_breaks(text: Text, most: float = 0.3) -> str:
    """More than 0.3 line breaks to a word: a list."""
    n = text.count("\n")
    return (
        ""
        if n <= most * len(text.words)
        else f"{n} line breaks to {len(text.words)} words, expected at most {most} to one"
    )


def split_nonempty_lines(text: str) -> list[str]:
    """Return the lines that are not blank."""
    return [line for line in text.split("\n") if line.strip()]


# ---- lists that a user has: a file of words, or of domains and addresses, one a line


def bad_words(text: str, path: str) -> str:
    """Holds a word, or words in a row, of the list in the file `path`, whatever the case.

    Source: C4 dropped pages with a word of such a list (1910.10683, section 2.2).
    """
    low, (words, phrases) = text.lower(), load_word_list(path)
    found = words.intersection(WORD.findall(low))
    found |= {
        each
        for each in phrases
        if each in low and re.search(rf"(?<!\w){re.escape(each)}(?!\w)", low)
    }
    return f"holds {min(found)!r}" if found else ""


WORD = re.compile(r"\w+")


@functools.cache
def load_word_list(path: str) -> tuple[frozenset[str], frozenset[str]]:
    """(words of letters and digits alone, others)."""
    found = {line.lower() for line in read_list_lines(path)}
    words = frozenset(filter(WORD.fullmatch, found))
    return words, frozenset(found - words)


def url_list(text: Text, path: str) -> str:
    """The `url` in its meta is in the list of the file `path`.

    An address, or a domain with all below it. What has no url stays.

    Source: FineWeb (2406.17557, section 3.1) and RefinedWeb (2306.01116) drop pages by such lists
    first.
    """
    address = normalize_url(json.loads(text.meta).get("url") or "")
    labels = re.split(r"[/:?#]", address, maxsplit=1)[0].split(".")
    listed = load_url_list(path).intersection(
        [address, *(".".join(labels[k:]) for k in range(len(labels)))]
    )
    return f"{min(listed)} is on the list" if address and listed else ""


@functools.cache
def load_url_list(path: str) -> frozenset[str]:
    """Return the addresses of a list file."""
    return frozenset(map(normalize_url, read_list_lines(path)))


def normalize_url(url: str) -> str:
    """https://www.Example.org/ -> example.org."""
    return re.sub(r"^(?:\w+://)?(?:www\.)?", "", url.strip().lower()).rstrip("/")


def read_list_lines(path: str) -> list[str]:
    """The lines of a list but for empty ones and remarks, which begin with #."""
    lines = [line.strip() for line in pathlib.Path(path).read_text("utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# ---- prose and code


def min_chars(text: str, least: int = 200) -> str:
    """Too short to teach anything but its own end."""
    n = len(text.strip())
    return "" if n >= least else f"{n} characters, expected {least}"


def few_words(text: Text, least: float = 0.7) -> str:
    """Less than 0.7 of the words hold a letter.

    Tables, dumps, markup. (Gopher's rule, at 0.8 there.)
    """
    return count_words_with_letters(text.words, least)


def many_symbols(text: str, most: float = 0.25) -> str:
    """More than 0.25 of the characters are neither letters, digits nor white space.

    Markup, ruled tables, code.
    """
    n = sum(not (c.isalnum() or c.isspace()) for c in text)
    return (
        ""
        if n <= most * len(text)
        else f"{n} of {len(text)} characters are symbols, expected at most {most}"
    )


def line_repetition(text: str, most: float = 0.3) -> str:
    """More than 0.3 of the lines that hold a letter were seen earlier in the text.

    (Gopher's duplicate line fraction.)
    """
    lines = [line.strip() for line in text.split("\n") if any(map(str.isalpha, line))]
    n = len(lines) - len(set(lines))
    return (
        ""
        if n <= most * len(lines)
        else f"{n} of {len(lines)} lines are repeats, expected at most {most}"
    )


def code_lines(
    text: str, longest: int = 1000, least_mean: float = 10.0, most_mean: float = 100.0
) -> str:
    """A line above 1,000 characters, or a mean line outside 10 to 100.

    Minified, packed data, or nearly empty.

    Source: Codex and StarCoder drop the long ones so (2107.03374, 2305.06161).
    """
    lengths = [len(line) for line in text.splitlines() if line.strip()] or [0]
    mean = sum(lengths) / len(lengths)
    if max(lengths) > longest:
        return f"a line of {max(lengths):,} characters, expected at most {longest:,}"
    return (
        ""
        if least_mean <= mean <= most_mean
        else f"lines of {mean:.0f} characters on average, expected {least_mean:g} to {most_mean:g}"
    )


def few_alphanumeric(text: str, least: float = 0.25) -> str:
    """Less than 0.25 of the characters are letters or digits.

    (StarCoder's threshold, 2305.06161.)
    """
    n = sum(map(str.isalnum, text))
    return (
        ""
        if n >= least * len(text)
        else f"{n} of {len(text)} characters are letters or digits, expected {least}"
    )


def autogenerated(text: str, most: float = 0.5) -> str:
    """Says in its first ten lines that a program wrote it, or more than half of its lines are rows
    of a data table.
    """
    head = "\n".join(text.split("\n", 10)[:10])
    if mark := re.search(
        r"auto-?generated|automatically generated|generated (?:by|from) |do not edit",
        head,
        re.IGNORECASE,
    ):
        return f"says {mark.group()!r} in its first lines"
    lines = [line for line in text.splitlines() if line.strip()]
    n = sum(bool(DATA_ROW.fullmatch(line)) for line in lines)
    return (
        ""
        if n <= most * len(lines)
        else f"{n} of {len(lines)} lines are data rows, expected at most {most}"
    )


# A line that only lists: numbers and strings, with the commas, colons and brackets between them and
# a comment after.
# Possessive repeats (++, *+): a long line that is no data row costs one pass in place of an
# exponential number.
DATA_ROW = re.compile(
    r"""\s*+[\[({]*+(?:(?:[-+]?[\d.][\w.]*+|[rbu]*+"[^"]*"|[rbu]*+'[^']*')[\s,:\])}]*+)++(?:#.*)?"""
)


# ---- edits: personal data, paragraphs said twice


def pii_email(text: str, mark: str = "|||EMAIL_ADDRESS|||") -> tuple[str, int]:
    """Puts a mark in place of each e-mail address.

    (The marks are Dolma's, 2402.00159.)
    """
    return EMAIL.subn(lambda _: mark, text) if "@" in text else (text, 0)


# local part, then labels and a top level of letters; it starts where no such character stands
# before, so that each is tried once
EMAIL = re.compile(
    r"(?<![\w.+%-])[\w][\w.+%'-]{0,63}@(?:[\w](?:[\w-]{0,61}[\w])?\.){1,8}[^\W\d_]{2,24}(?![\w-])"
)


def pii_ip(text: str, mark: str = "|||IP_ADDRESS|||") -> tuple[str, int]:
    """Puts a mark in place of each public IPv4 or IPv6 address.

    Private, loopback and documentation addresses, which name nobody, stay.
    """
    n = 0

    def replaced(match: re.Match) -> str:
        nonlocal n
        try:
            is_public = ipaddress.ip_address(match.group()).is_global
        except ValueError:
            is_public = False
        n += is_public
        return mark if is_public else match.group()

    return (IPV6.sub(replaced, IPV4.sub(replaced, text)) if IP_HINT.search(text) else text), n


IP_HINT = re.compile(r"\d\.\d|[0-9a-fA-F]:[0-9a-fA-F:]")
IPV4 = re.compile(r"(?<![\w.:])(?:\d{1,3}\.){3}\d{1,3}(?![\w:]|\.\d)", re.ASCII)
IPV6 = re.compile(
    r"(?<![\w:.])[23][0-9a-f]{3}:(?:[0-9a-f]{0,4}:){1,6}[0-9a-f]{0,4}(?![\w:])",
    re.ASCII | re.IGNORECASE,
)  # 2000::/3, the public ones


def pii_phone(text: str, mark: str = "|||PHONE_NUMBER|||") -> tuple[str, int]:
    """Puts a mark in place of each phone number: +COUNTRY and 8 to 15 digits in groups, or North
    American as (212) 555-0123 or 212-555-0123.
    """
    n = 0

    def replaced(match: re.Match) -> str:
        nonlocal n
        is_number = 8 <= sum(map(str.isdigit, match.group())) <= 15
        n += is_number
        return mark if is_number else match.group()

    return PHONE.sub(replaced, text), n


PHONE = re.compile(
    r"(?<![\w+])\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,14}(?:[ .-]\d{2,8}){0,5}(?![\w])"
    r"|(?<![\w.+-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?![\w-]|\.\d)",
    re.ASCII,
)


def repeated_paragraphs(text: str, least: int = 40) -> tuple[str, int]:
    """Takes out each paragraph of 40 characters or more that stood in the text before.

    Shorter ones (rules of asterisks, refrains) stay.
    """
    parts = re.split(r"(\n{2,})", text)  # paragraph, gap, paragraph, ...
    seen, kept, n_edits = set(), [], 0
    for gap, paragraph in zip(["", *parts[1::2]], parts[::2], strict=True):
        plain = paragraph.strip()
        if len(plain) >= least and plain in seen:
            n_edits += 1
            continue
        seen.add(plain)
        kept += [gap, paragraph]
    return ("".join(kept), n_edits) if n_edits else (text, 0)


DROP_RULES = {
    rule.__name__: rule
    for rule in (
        line_length,
        paragraph_repetition,
        language,
        gopher_word_count,
        gopher_word_length,
        gopher_symbols,
        gopher_bullets,
        gopher_ellipsis_lines,
        gopher_alphabetic,
        gopher_stop_words,
        duplicate_lines,
        top_ngrams,
        duplicate_ngrams,
        c4_lorem_ipsum,
        c4_curly_bracket,
        c4_sentences,
        fineweb_line_ends,
        fineweb_short_lines,
        fineweb_duplicate_characters,
        fineweb_line_breaks,
        bad_words,
        url_list,
        min_chars,
        few_words,
        many_symbols,
        line_repetition,
        code_lines,
        few_alphanumeric,
        autogenerated,
    )
}
BATCH_RULES = {language}  # these take many texts at once
EDIT_RULES = {
    rule.__name__: rule for rule in (c4_lines, pii_email, pii_ip, pii_phone, repeated_paragraphs)
}

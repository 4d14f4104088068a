"""Define the rules: functions of a text and thresholds, named as in `prepare.rules`, with sources.

A rule that drops returns the reason, or "" to keep the text. A rule that edits returns the new text
and the number of edits. filters.py decides which rules run, in which order, with which thresholds.

Words are separated by white space, lines by line ends, paragraphs by empty lines. A line of white
space is as empty as one without.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxpt import io
from jaxpt.data import classifier
from jaxpt.data import language as identification
from jaxpt.data.paragraphs import PARAGRAPH_GAP
from jaxpt.spec import UserError

BLANK_LINE = re.compile(r"\n[^\S\n]++(?![^\n])")
ALPHANUMERIC = re.compile(r"[^\W_]")


class Text(str):
    """A text that passes through the rules, with what several of them need, computed once.

    Attributes:
        notes: what rules found out about the text; it is added to the document's meta.
        meta: what the source knows about the text, a JSON object.
    """

    notes: dict[str, Any]
    meta: str
    last_ngrams: tuple[int, np.ndarray] | None

    def __new__(cls, text: str, notes: dict[str, Any] | None = None, meta: str = "{}"):
        """Make a text without notes."""
        self = super().__new__(cls, text)
        self.notes = {} if notes is None else notes
        self.meta = meta
        self.last_ngrams = None
        return self

    @functools.cached_property
    def words(self) -> list[str]:
        """The words in order."""
        return self.split()

    @functools.cached_property
    def word_chars(self) -> np.ndarray:
        """[n_words] int64, characters per word."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @functools.cached_property
    def symbol_words(self) -> list[str]:
        """The words without a letter or digit."""
        odd = [word for word in self.words if not word.isalnum()]
        return [word for word in odd if not ALPHANUMERIC.search(word)]

    @functools.cached_property
    def word_hashes(self) -> np.ndarray:
        """[n_words] uint64, a hash per word."""
        n = len(self.words)
        hashes = np.fromiter(map(hash, self.words), np.int64, n)
        return hashes.view(np.uint64)

    def ngram_hashes(self, n: int) -> np.ndarray:
        """Return the hash of each n consecutive words, [max(0, n_words - n + 1)] uint64.

        Unequal n-grams have equal hashes with a chance of 2^-64. The last hashes are kept because
        longer ones are made of them: call it with rising n.
        """
        last, hashes = self.last_ngrams or (1, self.word_hashes)
        if last > n:
            last, hashes = 1, self.word_hashes
        for longer in range(last + 1, n + 1):
            if len(hashes):
                hashes = hashes[:-1] * np.uint64(0x9E3779B97F4A7C15)
                hashes += self.word_hashes[longer - 1 :]
        self.last_ngrams = n, hashes
        return hashes


# ---- the course "Pretraining LLMs", lesson 2


def line_length(text: str, lines: int = 3, chars: int = 3) -> str:
    """Drop texts in which fewer than 3 lines have 3 characters or more.

    This is the course's pair of rules: fewer than 3 lines, or a third longest line of fewer than 3
    characters.
    """
    n_long = 0
    for line in text.split("\n"):
        n_long += len(line) >= chars
        if n_long == lines:
            return ""
    return f"expected {lines} lines of {chars} characters or more, got {n_long}"


def paragraph_repetition(
    text: str, most: float = 0.3, most_chars: float = 0.2, blank: bool = True
) -> str:
    """Drop if repeated paragraphs are over 0.3 of the paragraphs or 0.2 of the characters.

    Source: the course, lesson 2; equal to Gopher's two paragraph rules (2112.11446, table A1).

    Args:
        text: the text.
        most: fraction of the paragraphs.
        most_chars: fraction of the characters.
        blank: a line of white space ends a paragraph too; in the course an empty one alone does.
    """
    parts = split_paragraphs(empty_blank_lines(text) if blank else text)
    return describe_repetition(parts, text, "paragraphs", most, most_chars)


def empty_blank_lines(text: str) -> str:
    """Return the text without the white space of lines that have nothing else."""
    return BLANK_LINE.sub("\n", text)


def split_paragraphs(text: str) -> list[str]:
    r"""Return re.split(r"\n{2,}", text.strip()), in a third of the time."""
    raw = text.strip().split("\n\n")
    parts = [part.lstrip("\n") for part in raw]
    return [part for part in parts if part] or [""]


def describe_repetition(
    parts: list[str], text: str, noun: str, most: float, most_chars: float
) -> str:
    """Return why repeated parts are too many or too long, or ""."""
    unique = set(parts)
    n_repeated = len(parts) - len(unique)
    if not n_repeated:
        return ""
    if n_repeated / len(parts) > most:
        return f"{n_repeated} of {len(parts)} {noun} are repeats, expected at most {most}"
    n_unique_chars = sum(map(len, unique))
    n_chars = sum(map(len, parts)) - n_unique_chars
    if n_chars / len(text) > most_chars:
        return (
            f"{n_chars} of {len(text)} characters are in repeated {noun}, "
            f"expected at most {most_chars}"
        )
    return ""


def language(
    texts: list[Text], code: str = "en", least: float = 0.65, newline: str = " "
) -> list[str]:
    """Drop texts that are not in a language with a score above `least`, by fastText's lid.176.

    Source: 0.65 is FineWeb's (2406.17557); the course takes 0.4 and joins lines without a space.

    Args:
        texts: a batch.
        code: ISO code of the language.
        least: score from 0 to 1.
        newline: replaces each line end.
    """
    lines = [text.replace("\n", newline) for text in texts]
    guesses = identification.identify_languages(lines, least)
    reasons = []
    for text, (guess, score) in zip(texts, guesses, strict=True):
        text.notes["language"] = guess
        text.notes["language_score"] = round(score, 3)
        if guess == code and score > least:
            reasons.append("")
        else:
            reasons.append(f"{guess} {score:.2f}, expected {code} above {least:.2f}")
    return reasons


# ---- a classifier of one's own


def quality(
    texts: list[Text], model: str, least: float = 0.5, most: float = 1.0, label: str = "good"
) -> list[str]:
    """Drop texts whose score of a label is outside `least` to `most`.

    Source: fastText classifiers as in DCLM (2406.11794); `jaxpt train_quality` trains one.

    Args:
        texts: a batch.
        model: a fastText .bin or .ftz.
        least: score from 0 to 1.
        most: score from 0 to 1; for toxic text and the like.
        label: without __label__.
    """
    scorer = classifier.read_classifier(model)
    if label not in scorer.labels:
        raise UserError(
            f"prepare.rules: quality: {model} has no label {label!r}; it has: "
            f"{', '.join(scorer.labels)}. Set label."
        )
    reasons = []
    for text in texts:
        score = scorer.score(text, label)
        text.notes[f"quality_{label}"] = round(score, 3)
        is_kept = least <= score <= most
        reasons.append("" if is_kept else f"{label} {score:.3f}, expected {least:g} to {most:g}")
    return reasons


# ---- Gopher: quality (2112.11446, appendix A.1.1)


def gopher_word_count(text: Text, least: int = 50, most: int = 100_000) -> str:
    """Drop if outside 50 to 100,000 words, without counting words that lack a letter or digit."""
    n = len(text.words) - len(text.symbol_words)
    if least <= n <= most:
        return ""
    return f"{n:,} words, expected {least:,} to {most:,}"


def gopher_word_length(text: Text, least: float = 3.0, most: float = 10.0) -> str:
    """Drop if the mean word is outside 3 to 10 characters, counting words as gopher_word_count."""
    n = len(text.words) - len(text.symbol_words)
    n_symbol_chars = sum(map(len, text.symbol_words))
    n_chars = int(text.word_chars.sum()) - n_symbol_chars
    mean = n_chars / max(n, 1)
    if least <= mean <= most:
        return ""
    return f"words of {mean:.1f} characters on average, expected {least:g} to {most:g}"


def gopher_symbols(text: Text, most: float = 0.1) -> str:
    """Drop texts with over one hash sign, or one ellipsis, per ten words."""
    counts = {"hash signs": text.count("#"), "ellipses": count_ellipses(text)}
    n_words = len(text.words)
    for name, n in counts.items():
        if n > most * n_words:
            return f"{n} {name} in {n_words} words, expected at most {most} per word"
    return ""


def count_ellipses(text: str) -> int:
    """Return the number of ellipses, as three dots or as one character."""
    return text.count("...") + text.count("…")


def gopher_bullets(text: str, most: float = 0.9) -> str:
    """Drop texts in which over 0.9 of the lines start with a bullet or dash."""
    # quick: too few anywhere in the text
    n_marks = text.count("•") + text.count("-")
    if n_marks <= most * text.count("\n"):
        return ""
    lines = text.splitlines()
    n = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    if n <= most * len(lines):
        return ""
    return f"{n} of {len(lines)} lines are bullet points, expected at most {most}"


def gopher_ellipsis_lines(text: str, most: float = 0.3) -> str:
    """Drop texts in which over 0.3 of the lines end with an ellipsis."""
    if count_ellipses(text) <= most * text.count("\n"):
        return ""
    lines = text.splitlines()
    n = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    if n <= most * len(lines):
        return ""
    return f"{n} of {len(lines)} lines end with an ellipsis, expected at most {most}"


WORD_TOKEN = re.compile(r"\w+(?:['’]\w+)*|\.{2,}|-{2,}|[^\w\s]")


def gopher_alphabetic(text: Text, least: float = 0.8, marks: bool = False) -> str:
    """Drop texts in which less than 0.8 of the words have a letter.

    Args:
        text: the text.
        least: fraction of the words.
        marks: count each punctuation mark as a word, as datatrove's tokenizers and so FineWeb do;
            much stricter.
    """
    words = WORD_TOKEN.findall(text) if marks else text.words
    return check_alphabetic_words(words, least)


def check_alphabetic_words(words: Sequence[str], least: float) -> str:
    """Return why too few words have a letter, or ""."""
    n = sum(map(str.isalpha, words))  # of letters alone: quick, and in most texts enough
    if n < least * len(words):
        for word in words:
            if not word.isalpha():
                n += any(map(str.isalpha, word))
    if n >= least * len(words):
        return ""
    return f"{n} of {len(words)} words have a letter, expected at least {least}"


STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))


def gopher_stop_words(text: Text, least: int = 2) -> str:
    """Drop texts with fewer than two of: the, be, to, of, and, that, have, with. English only."""
    n = len(STOP_WORDS.intersection(text.words))
    if n >= least:
        return ""
    return f"{n} of the words {', '.join(sorted(STOP_WORDS))}, expected at least {least}"


# ---- Gopher: repetition (2112.11446, table A1; repeats are counted as in datatrove 0.10.1)


def duplicate_lines(text: str, most: float = 0.3, most_chars: float = 0.2) -> str:
    """Drop if repeated lines are over 0.3 of the lines or 0.2 of the characters."""
    lines = re.split(r"\n+", empty_blank_lines(text))
    return describe_repetition(lines, text, "lines", most, most_chars)


def top_ngrams(text: Text, two: float = 0.20, three: float = 0.18, four: float = 0.16) -> str:
    """Drop if the most frequent 2, 3 or 4 words are over 0.20, 0.18 or 0.16 of the characters.

    Of equally frequent ones the first in the text counts.
    """
    longest = int(text.word_chars.max(initial=0))
    for n, most in ((2, two), (3, three), (4, four)):
        hashes = text.ngram_hashes(n)
        if not len(hashes):
            break
        ordered = np.sort(hashes)
        is_new = ordered[1:] != ordered[:-1]
        is_end = np.append(is_new, True)
        ends = np.flatnonzero(is_end)
        counts = np.diff(ends, prepend=-1)
        n_times = int(counts.max())
        max_chars = n * longest + n - 1
        if n_times * max_chars <= most * len(text):  # whichever it is
            continue
        frequent = ordered[ends[counts == n_times]]
        first = int(np.isin(hashes, frequent).argmax())
        ngram = " ".join(text.words[first : first + n])
        n_chars = n_times * len(ngram)
        if n_chars / len(text) > most:
            return (
                f"{ngram[:80]!r} occurs {n_times} times: {n_chars} of {len(text)} characters, "
                f"expected at most {most}"
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
    """Drop if repeats of 5 (6, ... 10) words are over 0.15 (0.14, ... 0.10) of the characters.

    No character is counted twice.
    """
    limits = (five, six, seven, eight, nine, ten)
    for n, most in enumerate(limits, 5):
        hashes = text.ngram_hashes(n)
        bound = bound_repeated_chars(text, hashes, n)
        strictest = min(limits[n - 5 :])
        if bound <= strictest * len(text):
            break
        if bound <= most * len(text):
            continue
        n_chars = count_repeated_chars(text, hashes, n)
        if n_chars / len(text) > most:
            return (
                f"{n_chars} of {len(text)} characters are in repeats of {n} words, "
                f"expected at most {most}"
            )
    return ""


def bound_repeated_chars(text: Text, hashes: np.ndarray, n: int) -> int:
    """Return the characters of all n-grams that occur twice: no fewer than in longer repeats.

    Args:
        text: the text.
        hashes: of its n-grams.
        n: words per n-gram.
    """
    ordered = np.sort(hashes)
    later = ordered[1:]
    repeated = later[later == ordered[:-1]]
    if not len(repeated):  # then no longer n-gram occurs twice either
        return 0
    nearest = np.searchsorted(repeated, hashes)
    nearest = np.minimum(nearest, len(repeated) - 1)
    starts = np.flatnonzero(repeated[nearest] == hashes)
    edges = np.zeros(len(text.words) + 1, np.int64)
    edges[starts] += 1
    edges[starts + n] -= 1
    is_repeated = np.cumsum(edges)[:-1] > 0
    return int(text.word_chars[is_repeated].sum())


def count_repeated_chars(text: Text, hashes: np.ndarray, n: int) -> int:
    """Return the characters, without spaces, of n-grams that occurred before.

    N-grams are read from the left; after a repeat follows the word behind it.
    """
    ends = np.cumsum(text.word_chars)
    offsets = [0, *ends.tolist()]
    values = hashes.tolist()
    seen = set()
    n_chars = i = 0
    while i < len(values):
        value = values[i]
        if value in seen:
            n_chars += offsets[i + n] - offsets[i]
            i += n
        else:
            seen.add(value)
            i += 1
    return n_chars


# ---- C4 (Raffel et al. 2019, 1910.10683, section 2.2)

CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
TERMINAL_MARKS = (".", "!", "?", '"', "'", "”", "’")
POLICY_PHRASES = (
    *("terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)


def c4_lines(
    text: str, punctuation: bool = True, words: int = 3, longest: int = 1000
) -> tuple[str, int]:
    """Remove lines that are no sentences of a text, and citation marks in those that stay.

    Removed are lines that do not end with . ! ? or a quotation mark, have fewer than 3 words or one
    above 1,000 characters, or mention JavaScript, cookies or terms of use. Citation marks are such
    as [3] or [citation needed].

    Args:
        text: the text.
        punctuation: require a mark at the end of a line; FineWeb does not.
        words: the least words per line.
        longest: the most characters per word.
    """
    kept = []
    n_edits = 0
    for line in text.splitlines():
        line_words = line.split()
        edited, n_citations = CITATION.subn("", line.strip())
        edited = edited.rstrip()
        is_removed = len(line_words) < words
        # the line first: it is quicker than its words
        if len(line) > longest and not is_removed:
            is_removed = max(map(len, line_words), default=0) > longest
        if punctuation and not is_removed:
            is_removed = not ends_sentence(edited)
        if is_removed or is_boilerplate(edited):
            n_edits += bool(line_words)
        else:
            n_edits += n_citations
            kept.append(edited)
    return "\n".join(kept), n_edits


def ends_sentence(line: str) -> bool:
    """Return whether a line ends with a terminal mark that is no ellipsis."""
    return line.endswith(TERMINAL_MARKS) and not line.endswith("...")


def is_boilerplate(line: str) -> bool:
    """Return whether a line mentions JavaScript, cookies or terms of use."""
    lower = line.lower()
    if "javascript" in lower:
        return True
    return any(phrase in lower for phrase in POLICY_PHRASES)


def c4_lorem_ipsum(text: str) -> str:
    """Drop texts with the filler text "lorem ipsum"."""
    return "contains 'lorem ipsum'" if "lorem ipsum" in text.lower() else ""


def c4_curly_bracket(text: str) -> str:
    """Drop texts with a curly bracket: pages with code."""
    return "contains a curly bracket" if "{" in text else ""


SENTENCE_END_PATTERN = re.compile(r"""[.!?]["'”’)\]]*\s+(?=\S)""")


def c4_sentences(text: str, least: int = 5) -> str:
    """Drop texts of fewer than five sentences.

    A line has one, and one more wherever . ! or ? ends a word and another word follows.
    """
    n = 0
    for line in text.splitlines():
        if line.strip():
            n_inner_ends = len(SENTENCE_END_PATTERN.findall(line))
            n += 1 + n_inner_ends
    return "" if n >= least else f"{n} sentences, expected at least {least}"


# ---- FineWeb (2406.17557, section 3.4; thresholds of datatrove 0.10.1)

# what ends a sentence in the scripts with most text on the web
SENTENCE_END_CHARS = tuple(".!?。！？．｡…‼⁇⁈⁉؟۔।॥။።፧։՜՞")


def fineweb_line_ends(text: str, least: float = 0.12) -> str:
    """Drop texts in which less than 0.12 of the lines end like a sentence."""
    lines = split_nonempty_lines(text)
    n = sum(line.endswith(SENTENCE_END_CHARS) for line in lines)
    if n >= least * len(lines):
        return ""
    return f"{n} of {len(lines)} lines end like a sentence, expected at least {least}"


def fineweb_short_lines(text: str, most: float = 0.67, chars: int = 30) -> str:
    """Drop texts in which over 0.67 of the lines have at most 30 characters."""
    lines = split_nonempty_lines(text)
    n = sum(len(line) <= chars for line in lines)
    if n <= most * len(lines):
        return ""
    return f"{n} of {len(lines)} lines have at most {chars} characters, expected at most {most}"


def fineweb_duplicate_characters(text: str, most: float = 0.01) -> str:
    """Drop texts with over 0.01 of the characters in repeated lines.

    0.01 is datatrove's recipe, 0.1 the paper's.
    """
    lines = split_nonempty_lines(text)
    n_unique = sum(map(len, set(lines)))
    n_repeated = sum(map(len, lines)) - n_unique
    n = len(text) - text.count("\n")
    if n_repeated <= most * n:
        return ""
    return f"{n_repeated} of {n} characters are in repeated lines, expected at most {most}"


def fineweb_line_breaks(text: Text, most: float = 0.3) -> str:
    """Drop texts with over 0.3 line breaks per word: lists."""
    n = text.count("\n")
    n_words = len(text.words)
    if n <= most * n_words:
        return ""
    return f"{n} line breaks in {n_words} words, expected at most {most} per word"


def split_nonempty_lines(text: str) -> list[str]:
    """Return the lines that are more than white space."""
    return [line for line in text.split("\n") if line.strip()]


# ---- a user's lists: a file of words, or of domains and addresses, one per line

WORD = re.compile(r"\w+")


def bad_words(text: str, path: str) -> str:
    """Drop texts with a word, or consecutive words, of the list in `path`, whatever the case.

    Source: C4 dropped pages with a word of such a list (1910.10683, section 2.2).
    """
    lower = text.lower()
    words, phrases = load_word_list(path)
    matches = words.intersection(WORD.findall(lower))
    for phrase in phrases:
        # quick: whether it occurs at all
        if phrase not in lower:
            continue
        if re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", lower):
            matches |= {phrase}
    return f"contains {min(matches)!r}" if matches else ""


@functools.cache
def load_word_list(path: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the words of letters and digits, and the other lines, in lower case."""
    lines = {line.lower() for line in read_list_lines(path)}
    words = frozenset(filter(WORD.fullmatch, lines))
    return words, frozenset(lines - words)


def url_list(text: Text, path: str) -> str:
    """Drop texts whose `url` in meta is in the list of `path`; texts without a url stay.

    A line of the list is an address, or a domain with all subdomains and pages.

    Source: FineWeb (2406.17557, section 3.1) and RefinedWeb (2306.01116) drop pages by such lists
    first.
    """
    url = json.loads(text.meta).get("url") or ""
    address = normalize_url(url)
    if not address:
        return ""
    host, *_ = re.split(r"[/:?#]", address, maxsplit=1)
    labels = host.split(".")
    domains = []
    for k in range(len(labels)):
        domains.append(".".join(labels[k:]))
    matches = load_url_list(path).intersection([address, *domains])
    return f"{min(matches)} is on the list" if matches else ""


@functools.cache
def load_url_list(path: str) -> frozenset[str]:
    """Return the addresses and domains of a list, normalized."""
    return frozenset(map(normalize_url, read_list_lines(path)))


def normalize_url(url: str) -> str:
    """Return https://www.Example.org/ as example.org."""
    lower = url.strip().lower()
    address = re.sub(r"^(?:\w+://)?(?:www\.)?", "", lower)
    return address.rstrip("/")


def read_list_lines(path: str) -> list[str]:
    """Return the lines of a list, without empty ones and comments, which begin with #."""
    text = io.read_text(io.path(path))
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# ---- prose and code


def min_chars(text: str, least: int = 200) -> str:
    """Drop texts of fewer than 200 characters: too short to teach anything but their own end."""
    n = len(text.strip())
    return "" if n >= least else f"{n} characters, expected at least {least}"


def few_words(text: Text, least: float = 0.7) -> str:
    """Drop if less than 0.7 of the words have a letter: tables, dumps, markup. Gopher's is 0.8."""
    return check_alphabetic_words(text.words, least)


def many_symbols(text: str, most: float = 0.25) -> str:
    """Drop if over 0.25 of the characters are symbols: markup, ruled tables, code.

    Symbols are neither letters, digits nor white space.
    """
    is_plain = (char.isalnum() or char.isspace() for char in text)
    n = len(text) - sum(is_plain)
    if n <= most * len(text):
        return ""
    return f"{n} of {len(text)} characters are symbols, expected at most {most}"


def line_repetition(text: str, most: float = 0.3) -> str:
    """Drop if over 0.3 of the lines with a letter are repeats: Gopher's duplicate line fraction."""
    lines = []
    for line in text.split("\n"):
        if any(map(str.isalpha, line)):
            lines.append(line.strip())
    n = len(lines) - len(set(lines))
    if n <= most * len(lines):
        return ""
    return f"{n} of {len(lines)} lines are repeats, expected at most {most}"


def code_lines(
    text: str, longest: int = 1000, least_mean: float = 10.0, most_mean: float = 100.0
) -> str:
    """Drop texts with a line above 1,000 characters, or a mean line outside 10 to 100.

    They are minified, packed data, or nearly empty.

    Source: Codex and StarCoder drop long lines so (2107.03374, 2305.06161).
    """
    lengths = [len(line) for line in text.splitlines() if line.strip()]
    lengths = lengths or [0]
    n = max(lengths)
    if n > longest:
        return f"a line of {n:,} characters, expected at most {longest:,}"
    mean = sum(lengths) / len(lengths)
    if least_mean <= mean <= most_mean:
        return ""
    return f"lines of {mean:.0f} characters on average, expected {least_mean:g} to {most_mean:g}"


def few_alphanumeric(text: str, least: float = 0.25) -> str:
    """Drop if less than 0.25 of the characters are letters or digits: StarCoder's (2305.06161)."""
    n = sum(map(str.isalnum, text))
    if n >= least * len(text):
        return ""
    return f"{n} of {len(text)} characters are letters or digits, expected at least {least}"


GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated (?:by|from) |do not edit", re.IGNORECASE
)
# A line that only lists: numbers and strings, with the commas, colons and brackets between them and
# a comment after. Possessive repeats (++, *+): a long line that is no data row costs one pass
# instead of an exponential number.
DATA_ROW = re.compile(
    r"""\s*+[\[({]*+(?:(?:[-+]?[\d.][\w.]*+|[rbu]*+"[^"]*"|[rbu]*+'[^']*')[\s,:\])}]*+)++(?:#.*)?"""
)


def autogenerated(text: str, most: float = 0.5) -> str:
    """Drop texts that claim to be generated in their first ten lines, or that are mostly data.

    Mostly data: more than half of the lines are rows of a table.
    """
    first_lines = text.split("\n", 10)[:10]
    head = "\n".join(first_lines)
    claim = GENERATED.search(head)
    if claim:
        return f"{claim.group()!r} in its first lines"
    lines = [line for line in text.splitlines() if line.strip()]
    n = sum(bool(DATA_ROW.fullmatch(line)) for line in lines)
    if n <= most * len(lines):
        return ""
    return f"{n} of {len(lines)} lines are data rows, expected at most {most}"


# ---- edits: personal data, repeated paragraphs

# a letter or digit of a script that puts spaces between words: elsewhere the next word begins where
# an address ends
PLAIN = r"[^\W_\u0e00-\u0eff\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef]"
# An address begins and ends at a letter or digit, so that punctuation on either side stays.
EMAIL = re.compile(
    rf"(?<!{PLAIN}){PLAIN}(?:{PLAIN}|[_+%&'-]|\.(?!\.)){{0,63}}"
    r"@(?:\[(?:\d{1,3}\.){3}\d{1,3}\]"
    r"|(?:\w(?:[\w-]{0,61}\w)?\.){1,8}"
    r"(?:xn--[a-z0-9-]{2,59}(?<!-)|[a-zA-Z]{2,24}(?![a-zA-Z0-9])|[^\W\d_a-zA-Z]{2,24}))"
)
IP_HINT = re.compile(r"\d\.\d|[0-9a-fA-F]:[0-9a-fA-F:]")
# no part of a longer number or version
IPV4 = re.compile(r"(?<![0-9a-zA-Z])(?<!\d\.)(?:\d{1,3}\.){3}\d{1,3}(?![0-9a-zA-Z]|\.\d)", re.ASCII)
GROUP = "[0-9a-f]{1,4}"
IPV6 = re.compile(
    rf"(?<![0-9a-z])(?:{GROUP}(?::{GROUP}){{7}}"
    rf"|{GROUP}(?::{GROUP}){{0,6}}::(?:{GROUP}(?::{GROUP}){{0,5}})?)(?![0-9a-z])",
    re.ASCII | re.IGNORECASE,
)
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
GAP = r"[ \u00a0.\u2010-\u2013-]"  # between groups of digits: space, dot, hyphen or dash
PHONE = re.compile(
    rf"(?<![0-9a-zA-Z])\+[1-9]\d{{0,2}}{GAP}?(?:\(\d{{1,4}}\){GAP}?)?\d{{1,14}}"
    rf"(?:{GAP}\d{{1,8}}){{0,5}}(?![0-9a-zA-Z])"
    rf"|(?:(?<![0-9a-zA-Z])(?<!\d[.-])(?:1{GAP})?[2-9]\d\d{GAP}"
    rf"|(?:(?<![0-9a-zA-Z])1{GAP})?\([2-9]\d\d\) ?)"
    rf"[2-9]\d\d{GAP}\d{{4}}(?![0-9a-zA-Z]|[.-]\d)",
    re.ASCII,
)


def pii_email(text: str, mark: str = "|||EMAIL_ADDRESS|||") -> tuple[str, int]:
    """Replace each e-mail address by a mark. The marks are Dolma's (2402.00159)."""
    if "@" not in text:
        return text, 0
    return EMAIL.subn(lambda _: mark, text)


def pii_ip(text: str, mark: str = "|||IP_ADDRESS|||") -> tuple[str, int]:
    """Replace each public IPv4 or IPv6 address by a mark.

    Private, loopback and documentation addresses stay: they identify nobody.
    """
    if not IP_HINT.search(text):
        return text, 0
    text, n_v4 = replace_matches(IPV4, text, mark, is_public_address)
    text, n_v6 = replace_matches(IPV6, text, mark, is_public_address)
    return text, n_v4 + n_v6


def pii_phone(text: str, mark: str = "|||PHONE_NUMBER|||") -> tuple[str, int]:
    """Replace each phone number by a mark.

    Phone numbers are +COUNTRY and 8 to 15 digits in groups, or North American such as
    (212) 555-0123 or 212-555-0123.
    """
    return replace_matches(PHONE, text, mark, has_phone_digits)


def is_public_address(address: str) -> bool:
    """Return whether an IP address is valid and reachable from the whole internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    is_allocated = parsed.version == 4 or parsed in PUBLIC_IPV6
    return is_allocated and parsed.is_global


def has_phone_digits(number: str) -> bool:
    """Return whether a phone number has 8 to 15 digits."""
    n_digits = sum(map(str.isdigit, number))
    return 8 <= n_digits <= 15


def replace_matches(
    pattern: re.Pattern[str], text: str, mark: str, is_personal: Callable[[str], bool]
) -> tuple[str, int]:
    """Replace the matches that are personal data. Return the text and the number of edits."""
    n = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal n
        if not is_personal(match.group()):
            return match.group()
        n += 1
        return mark

    return pattern.sub(replace, text), n


def repeated_paragraphs(text: str, least: int = 40) -> tuple[str, int]:
    """Remove each paragraph of 40 characters or more that occurred earlier in the text.

    Shorter ones, such as rules of asterisks and refrains, stay.
    """
    parts = PARAGRAPH_GAP.split(text)  # paragraph, gap, paragraph, ...
    gaps = ["", *parts[1::2]]
    seen: set[str] = set()
    kept = []
    n_edits = 0
    for gap, paragraph in zip(gaps, parts[::2], strict=True):
        stripped = paragraph.strip()
        if len(stripped) >= least and stripped in seen:
            n_edits += 1
            continue
        seen.add(stripped)
        kept += [gap, paragraph]
    if not n_edits:
        return text, 0
    return "".join(kept), n_edits


def by_name(*functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return name -> function: a rule is called in a config as its function is here."""
    return {function.__name__: function for function in functions}


DROP_RULES = by_name(
    line_length, paragraph_repetition, language, quality,
    gopher_word_count, gopher_word_length, gopher_symbols, gopher_bullets, gopher_ellipsis_lines,
    gopher_alphabetic, gopher_stop_words,
    duplicate_lines, top_ngrams, duplicate_ngrams, c4_lorem_ipsum, c4_curly_bracket, c4_sentences,
    fineweb_line_ends, fineweb_short_lines, fineweb_duplicate_characters, fineweb_line_breaks,
    bad_words, url_list, min_chars, few_words, many_symbols, line_repetition, code_lines,
    few_alphanumeric, autogenerated,
)  # fmt: skip
BATCH_RULES = {language, quality}  # take a batch of texts
EDIT_RULES = by_name(c4_lines, pii_email, pii_ip, pii_phone, repeated_paragraphs)

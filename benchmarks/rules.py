"""Compare rules with datatrove's filters of the same names: what only one keeps, and MB/s per core.

    python benchmarks/rules.py --texts DIR --peer VENV/bin/python        about three minutes

DIR is searched for *.txt (Project Gutenberg books), which are split at paragraphs into documents.
The Python installation's prose and code are added, and 3,000 documents with repeats, bullets,
ellipses and numbers inserted. The peer is a virtual environment with

    pip install datatrove[processing]==0.10.1 spacy

"same words" replaces datatrove's tokenizer by str.split, by which words are split here: what
differs then is the rules. Its own tokenizer, spaCy, sees --n documents only, as it is many times
slower.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

GOPHER = ("GopherQualityFilter", "GopherRepetitionFilter")
C4 = ("C4QualityFilter",)
SETS = {  # name -> (ours, theirs, their settings)
    "gopher": (
        "gopher_word_count gopher_word_length gopher_symbols gopher_bullets "
        "gopher_ellipsis_lines gopher_alphabetic gopher_stop_words"
        " paragraph_repetition duplicate_lines top_ngrams duplicate_ngrams",
        GOPHER,
        {},
    ),
    "gopher, marks are words": (
        "gopher_word_count gopher_word_length gopher_symbols gopher_bullets "
        "gopher_ellipsis_lines gopher_alphabetic(marks=True) "
        "gopher_stop_words"
        " paragraph_repetition duplicate_lines top_ngrams duplicate_ngrams",
        GOPHER,
        {},
    ),
    "c4": ("c4_lines c4_lorem_ipsum c4_curly_bracket c4_sentences", C4, {}),
    "c4 of fineweb": (
        "c4_lines(punctuation=False) c4_lorem_ipsum c4_curly_bracket c4_sentences",
        C4,
        {"filter_no_terminal_punct": False},
    ),
    "fineweb": (
        ("fineweb_line_ends fineweb_short_lines fineweb_duplicate_characters fineweb_line_breaks"),
        ("FineWebQualityFilter",),
        {},
    ),
}


def make(texts: pathlib.Path) -> list[str]:
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from jaxpt.data import sources

    rng, made = random.Random(1), []
    for name in ("python:prose", "python:code"):
        made += [document.text for document in sources.parse_source(name).iterate_documents()]
    for document in sources.parse_source(f"text:{texts}/**/*.txt").iterate_documents():
        paragraphs = re.split(r"\n\n+", document.text)
        while paragraphs:
            n = rng.choice([2, 5, 10, 20, 40, 100])
            made.append("\n\n".join(paragraphs[:n]))
            del paragraphs[:n]
    plain = [text for text in made if 500 < len(text) < 20_000]
    made += [insert_repeats(rng.choice(plain), rng) for _ in range(3000)]
    rng.shuffle(made)
    return made


def insert_repeats(text: str, rng: random.Random) -> str:
    lines, words = text.split("\n"), text.split(" ")
    at, kind = rng.randrange(len(words)), rng.randrange(6)
    if kind == 0:
        return "\n".join(
            lines + lines[(at := rng.randrange(len(lines))) : at + rng.randint(1, len(lines))]
        )
    if kind == 1:
        return " ".join(
            words[:at] + words[at : at + rng.randint(5, 60)] * rng.randint(1, 4) + words[at:]
        )
    if kind == 2:
        return "\n".join(("- " if rng.random() < 0.92 else "") + line for line in lines)
    if kind == 3:
        return "\n".join(line + ("..." if rng.random() < 0.3 else "") for line in lines)
    if kind == 4:
        return " ".join(word if rng.random() < 0.8 else "12" for word in words[:400])
    again = " ".join(words[: rng.choice([2, 3, 4])])
    return " ".join(word + (f" {again}" if rng.random() < 0.06 else "") for word in words[:200])


def ours(texts: list[str]) -> dict[str, tuple[list[str], float]]:
    """Return per set the rule that drops each text, or "", and seconds."""
    from jaxpt.data import filters, sources

    found = {}
    for name, (rules, _, _) in SETS.items():
        requested, start, failed = (
            filters.parse_rules("none", rules.split()),
            time.perf_counter(),
            [],
        )
        for i in range(0, len(texts), 64):
            failed += filters.apply_rules(
                [sources.Document("", text) for text in texts[i : i + 64]], requested
            ).failed_rule
        found[name] = (
            [requested[k].name if k < len(requested) else "" for k in failed],
            time.perf_counter() - start,
        )
    return found


def theirs(texts: list[str], words: str) -> dict[str, tuple[list[str], float]]:
    """Return the same by datatrove; run by its Python."""
    from datatrove.data import Document
    from datatrove.pipeline import filters

    if words == "same":
        for module in (
            filters.gopher_quality_filter,
            filters.gopher_repetition_filter,
            filters.fineweb_quality_filter,
        ):
            module.split_into_words = lambda text, language: text.split()
    found = {}
    for name, (_, classes, settings) in SETS.items():
        steps, start, reasons = (
            [getattr(filters, each)(**settings) for each in classes],
            time.perf_counter(),
            [],
        )
        for text in texts:
            document, reason = Document(text=text, id=""), ""
            for step in steps:
                try:
                    kept = step.filter(document)
                except (ZeroDivisionError, IndexError):  # of an empty text
                    kept = (False, "empty")
                if kept is not True:
                    reason = kept[1]
                    break
            reasons.append(reason)
        found[name] = (reasons, time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=pathlib.Path, help="directory with *.txt")
    parser.add_argument("--peer", help="Python of an environment that has datatrove")
    parser.add_argument(
        "--n", type=int, default=1000, help="documents that spaCy splits into words"
    )
    parser.add_argument("--as-peer", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_peer:
        file, words = arguments.as_peer
        print(
            "\n"
            + json.dumps(theirs(json.loads(pathlib.Path(file).read_text(encoding="utf-8")), words))
        )
        return
    texts = make(arguments.texts)
    for words, n in (("same", len(texts)), ("own", arguments.n)):
        some = texts[:n]
        mb = sum(len(text.encode()) for text in some) / 1e6
        with tempfile.TemporaryDirectory() as home:
            (file := pathlib.Path(home) / "texts.json").write_text(json.dumps(some))
            done = subprocess.run(
                [arguments.peer, __file__, "--as-peer", file, words],
                capture_output=True,
                text=True,
                check=True,
            )
        here, there = ours(some), json.loads(done.stdout.splitlines()[-1])
        print(
            f"{n:,} documents, {mb:.1f} MB, datatrove with "
            f"{'the same words' if words == 'same' else 'its own tokenizer'}"
        )
        for name in SETS:
            (mine, my_seconds), (other, other_seconds) = here[name], there[name]
            alone = collections.Counter(
                f"{a or 'kept'} / {b or 'kept'}"
                for a, b in zip(mine, other, strict=True)
                if bool(a) != bool(b)
            )
            speed = (
                f"{mb / my_seconds:5.1f} and {mb / other_seconds:5.2f} MB/s, "
                f"{other_seconds / my_seconds:4.1f} x"
            )
            kept = (
                f"kept {mine.count(''):,} and {other.count(''):,}, decided "
                f"otherwise {alone.total():,}"
            )
            most = ", ".join(f"{n} {pair}" for pair, n in alone.most_common(3))
            print(f"  {name:24} {kept:48} {speed}   {most}")


if __name__ == "__main__":
    main()

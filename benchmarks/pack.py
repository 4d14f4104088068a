"""Packing of real prose at 4,096 tokens: padding, cut documents, lost tokens and speed, beside the
ways of others on the same documents.

    python benchmarks/pack.py --texts DIR [--tokenizer tokenizer.model] [--row-len 4096]

DIR is searched for *.txt (Project Gutenberg books, Tiny Shakespeare, botchan). The same prose is
cut into documents in four ways: paragraphs;
pages, paragraphs joined to lengths drawn as those of web pages (log-normal, median 3,000
characters, sigma 1); chapters; whole books.
Without --tokenizer one of 8,000 pieces is trained. Of each way to pack:

    padding   share of the rows' tokens
    lost      share of the documents' tokens that stand in no row
    cut       documents that would fit into a row and do not stand in one as a whole, and their
    share
    tokens/s  packing alone, from ids in memory to rows in memory, on one core

    best_fit, course  this project's
    nanochat          best-fit-crop as its author describes it: of a buffer of 1,000 documents the
    longest that fits; where none does, the
                      shortest is cropped to fill the row and its rest thrown away; no padding
    trl bfd, bfd_split, wrapped   trl.pack_dataset, where TRL is installed

Last, pack.py itself from a corpus on disk to shards on disk, tokenizing included, on all cores.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import re
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from jaxpt import config
from jaxpt.data import pack, prepare, tokenizer

BUFFER = 1000  # documents that nanochat looks at


def documents_of(books: list[str]) -> dict[str, list[str]]:
    paragraphs = [
        [paragraph for paragraph in re.split(r"\n\s*\n", book) if paragraph.strip()]
        for book in books
    ]
    rng, pages = np.random.default_rng(0), []
    for book in paragraphs:
        page, expected = "", rng.lognormal(np.log(3000), 1)
        for paragraph in book:
            page += paragraph + "\n\n"
            if len(page) >= expected:
                pages.append(page)
                page, expected = "", rng.lognormal(np.log(3000), 1)
        pages += [page] if page else []
    chapter = re.compile(r"\n(?=[ _]*(?:CHAPTER|Chapter|LETTER|ACT|SCENE|第)\b)")
    return {
        "paragraphs": [paragraph for book in paragraphs for paragraph in book],
        "pages": pages,
        "chapters": [text for book in books for text in chapter.split(book) if text.strip()],
        "books": books,
    }


# ---- ways to pack: [documents' ids] -> rows, each an array of ids


def best_fit(documents, seq_len):
    stretches = pack.split_windows(np.array([len(each) for each in documents]), seq_len)
    for first, last in stretches:
        for row in pack.pack_best_fit(
            (pack.Segment(each, "") for each in documents[first:last]), seq_len
        ):
            yield np.concatenate([piece.ids for piece in row])


def course(documents, seq_len):
    for row in pack.pack_course((pack.Segment(each, "") for each in documents), seq_len):
        yield np.concatenate([piece.ids for piece in row])


def nanochat(documents, seq_len):
    waiting, buffer = iter(documents), []
    while True:
        row, room = [], seq_len
        while room:
            buffer += itertools.islice(waiting, BUFFER - len(buffer))
            if not buffer:
                return  # the last row does not fill up
            fitting = [i for i, each in enumerate(buffer) if len(each) <= room]
            longest = max(fitting, key=lambda i: len(buffer[i]), default=None)
            chosen = (
                min(range(len(buffer)), key=lambda i: len(buffer[i]))
                if longest is None
                else longest
            )
            row.append(buffer.pop(chosen)[:room])
            room -= len(row[-1])
        yield np.concatenate(row)


def trl(strategy):
    def rows(documents, seq_len):
        import datasets
        from trl import pack_dataset

        datasets.disable_progress_bars()
        datasets.disable_caching()
        given = datasets.Dataset.from_dict({"input_ids": documents})
        start = time.perf_counter()
        packed = pack_dataset(given, seq_len, strategy)
        trl.seconds = time.perf_counter() - start
        yield from (np.array(ids) for ids in packed.with_format("numpy")["input_ids"])

    return rows


def measure(way, lengths: list[int], seq_len: int) -> dict[str, float]:
    """Documents are numbered tokens here, so that every token can be found again."""
    starts = np.cumsum([0, *lengths])
    documents = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(starts)]
    start = time.perf_counter()
    rows = list(way(documents, seq_len))
    seconds = getattr(trl, "seconds", None) or time.perf_counter() - start
    trl.seconds = None
    tokens = np.concatenate(rows)
    assert len(np.unique(tokens)) == len(tokens), "doubled"
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    of = np.searchsorted(starts, tokens, side="right") - 1
    first, last, found = (
        np.full(len(lengths), len(rows)),
        np.full(len(lengths), -1),
        np.bincount(of, minlength=len(lengths)),
    )
    np.minimum.at(first, of, row_of)
    np.maximum.at(last, of, row_of)
    fits = np.array(lengths) <= seq_len
    cut = fits & ~((first == last) & (found == lengths))
    return {
        "rows": len(rows),
        "padding": 1 - len(tokens) / (len(rows) * seq_len),
        "lost": 1 - len(tokens) / starts[-1],
        "cut": int(cut.sum()),
        "cut_frac": cut.sum() / max(1, fits.sum()),
        "tokens_per_second": starts[-1] / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", required=True, type=pathlib.Path)
    parser.add_argument("--tokenizer", default="train")
    parser.add_argument("--row-len", type=int, default=4096)
    arguments = parser.parse_args()
    books = [
        file.read_text()
        for file in sorted(arguments.texts.rglob("*.txt"))
        if file.name != "SOURCE.txt"
    ]
    print(f"{len(books)} books, {sum(len(book.encode()) for book in books) / 1e6:.1f} MB")
    ways = {"best_fit": best_fit, "course": course, "nanochat": nanochat}
    try:
        import trl as _

        ways |= {f"trl {strategy}": trl(strategy) for strategy in ("bfd", "bfd_split", "wrapped")}
    except ImportError:
        print("TRL is not installed here: left out")

    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        print(
            f"{'documents':<12}{'way':<16}{'rows':>8}{'padding':>9}{'lost':>9}{'cut':>9}{'':>8}{'tokens/s':>13}"
        )
        for name, documents in documents_of(books).items():
            (home / f"{name}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in documents)
            )
            settings = dataclasses.replace(
                config.Config(),
                prepare=config.PrepareConfig(
                    sources=(f"jsonl:{home}/{name}.jsonl",), heldout_frac=0.0
                ),
                tokenizer=config.TokenizerConfig(
                    source=arguments.tokenizer, vocab_size=8000, sample_mb=16
                ),
                pack=config.PackConfig(seq_len=arguments.seq_len),
            )
            workdir = home / name
            prepare.prepare_corpus(settings, workdir)
            tokenizer.train_tokenizer(settings, workdir)
            words = tokenizer.load_tokenizer(workdir / "tokenizer")
            lengths = [
                len(ids) + (words.bos_id is not None) + 1 for ids in words.encode_batch(documents)
            ]
            told = (
                f"{len(lengths):,} documents, {sum(lengths):,} tokens, "
                f"{sum(n > arguments.seq_len for n in lengths):,} longer than a "
                "row"
            )
            lines = []
            for way, rows in ways.items():
                found = measure(rows, lengths, arguments.seq_len)
                lines.append(
                    f"{name:<12}{way:<16}{found['rows']:8,}{found['padding']:9.2%}{found['lost']:9.2%}{found['cut']:9,}"
                    f"{found['cut_frac']:8.1%}{found['tokens_per_second']:13,.0f}"
                )
            for method in ("best_fit", "course"):
                asked = dataclasses.replace(
                    settings, pack=config.PackConfig(seq_len=arguments.seq_len, method=method)
                )
                manifest = pack.pack_corpus(asked, workdir, replace=True)
                counts = manifest.counts["train"][name]
                assert method == "course" or counts["tokens"] == sum(lengths)
                lines.append(
                    f"{name:<12}pack.py {method:<8} from text to "
                    f"shards{sum(lengths) / manifest.seconds:>37,.0f}"
                )
            print(f"# {name}: {told}", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()

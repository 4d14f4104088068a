"""Pack real prose at 4,096 tokens: padding, split documents, lost tokens and speed, beside others.

    python benchmarks/pack.py --texts DIR [--tokenizer tokenizer.model] [--seq-len 4096]

DIR is searched for *.txt (Project Gutenberg books, Tiny Shakespeare, botchan). The same prose is
split into documents in four ways: paragraphs; pages, which are paragraphs joined to lengths drawn
like those of web pages (log-normal, median 3,000 characters, sigma 1); chapters; whole books.
Without --tokenizer one of 8,000 tokens is trained. For each method:

    padding   fraction of the sequences' tokens
    lost      fraction of the documents' tokens that are in no sequence
    split     documents that would fit into a sequence and are not whole in one, and their fraction
    tokens/s  packing alone, from ids in memory to sequences in memory, on one core

    best_fit, course  this project's
    nanochat          best-fit-crop as its author describes it: of a buffer of 1,000 documents the
                      longest that fits; if none does, the shortest is cropped to fill the sequence
                      and its rest dropped; no padding
    trl bfd, bfd_split, wrapped   trl.pack_dataset, if TRL is installed

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


# ---- methods: [documents' ids] -> sequences, each an array of ids


def best_fit(documents, seq_len):
    windows = pack.split_windows(np.array([len(each) for each in documents]), seq_len)
    for first, last in windows:
        for sequence in pack.pack_best_fit(
            (pack.Segment(each, "") for each in documents[first:last]), seq_len
        ):
            yield np.concatenate([segment.ids for segment in sequence])


def course(documents, seq_len):
    for sequence in pack.pack_course((pack.Segment(each, "") for each in documents), seq_len):
        yield np.concatenate([segment.ids for segment in sequence])


def nanochat(documents, seq_len):
    waiting, buffer = iter(documents), []
    while True:
        sequence, free = [], seq_len
        while free:
            buffer += itertools.islice(waiting, BUFFER - len(buffer))
            if not buffer:
                return  # the last sequence does not fill up
            fitting = [i for i, each in enumerate(buffer) if len(each) <= free]
            longest = max(fitting, key=lambda i: len(buffer[i]), default=None)
            chosen = (
                min(range(len(buffer)), key=lambda i: len(buffer[i]))
                if longest is None
                else longest
            )
            sequence.append(buffer.pop(chosen)[:free])
            free -= len(sequence[-1])
        yield np.concatenate(sequence)


def trl(strategy):
    def sequences(documents, seq_len):
        import datasets
        from trl import pack_dataset

        datasets.disable_progress_bars()
        datasets.disable_caching()
        dataset = datasets.Dataset.from_dict({"input_ids": documents})
        start = time.perf_counter()
        packed = pack_dataset(dataset, seq_len, strategy)
        trl.seconds = time.perf_counter() - start
        yield from (np.array(ids) for ids in packed.with_format("numpy")["input_ids"])

    return sequences


def measure(pack_ids, lengths: list[int], seq_len: int) -> dict[str, float]:
    """Documents are numbered tokens here, so that every token can be found again."""
    starts = np.cumsum([0, *lengths])
    documents = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(starts)]
    start = time.perf_counter()
    sequences = list(pack_ids(documents, seq_len))
    seconds = getattr(trl, "seconds", None) or time.perf_counter() - start
    trl.seconds = None
    tokens = np.concatenate(sequences)
    assert len(np.unique(tokens)) == len(tokens), "doubled"
    sequence_of = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    of = np.searchsorted(starts, tokens, side="right") - 1
    first, last, found = (
        np.full(len(lengths), len(sequences)),
        np.full(len(lengths), -1),
        np.bincount(of, minlength=len(lengths)),
    )
    np.minimum.at(first, of, sequence_of)
    np.maximum.at(last, of, sequence_of)
    is_short = np.array(lengths) <= seq_len
    is_split = is_short & ~((first == last) & (found == lengths))
    return {
        "n_sequences": len(sequences),
        "padding": 1 - len(tokens) / (len(sequences) * seq_len),
        "lost": 1 - len(tokens) / starts[-1],
        "n_split": int(is_split.sum()),
        "split_frac": is_split.sum() / max(1, is_short.sum()),
        "tokens_per_second": starts[-1] / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", required=True, type=pathlib.Path)
    parser.add_argument("--tokenizer", default="train")
    parser.add_argument("--seq-len", type=int, default=4096)
    arguments = parser.parse_args()
    books = [
        file.read_text()
        for file in sorted(arguments.texts.rglob("*.txt"))
        if file.name != "SOURCE.txt"
    ]
    print(f"{len(books)} books, {sum(len(book.encode()) for book in books) / 1e6:.1f} MB")
    methods = {"best_fit": best_fit, "course": course, "nanochat": nanochat}
    try:
        import trl as _

        methods |= {
            f"trl {strategy}": trl(strategy) for strategy in ("bfd", "bfd_split", "wrapped")
        }
    except ImportError:
        print("TRL is not installed here: left out")

    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        print(
            f"{'documents':<12}{'method':<16}{'sequences':>10}{'padding':>9}{'lost':>9}"
            f"{'split':>9}{'':>8}{'tokens/s':>13}"
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
            prepare.prepare_corpus(settings.prepare, workdir)
            tokenizer.train_tokenizer(settings.tokenizer, workdir)
            words = tokenizer.load_tokenizer(workdir / "tokenizer")
            lengths = [
                len(ids) + (words.bos_id is not None) + 1 for ids in words.encode_batch(documents)
            ]
            summary = (
                f"{len(lengths):,} documents, {sum(lengths):,} tokens, "
                f"{sum(n > arguments.seq_len for n in lengths):,} longer than a sequence"
            )
            lines = []
            for method, pack_ids in methods.items():
                found = measure(pack_ids, lengths, arguments.seq_len)
                lines.append(
                    f"{name:<12}{method:<16}{found['n_sequences']:10,}{found['padding']:9.2%}"
                    f"{found['lost']:9.2%}{found['n_split']:9,}{found['split_frac']:8.1%}"
                    f"{found['tokens_per_second']:13,.0f}"
                )
            for method in ("best_fit", "course"):
                with_method = dataclasses.replace(
                    settings, pack=config.PackConfig(seq_len=arguments.seq_len, method=method)
                )
                manifest = pack.pack_corpus(with_method.pack, workdir, replace=True)
                counts = manifest.counts["train"][name]
                assert method == "course" or counts["n_tokens"] == sum(lengths)
                lines.append(
                    f"{name:<12}pack.py {method:<8} from text to "
                    f"shards{sum(lengths) / manifest.seconds:>37,.0f}"
                )
            print(f"# {name}: {summary}", *lines, sep="\n", flush=True)


if __name__ == "__main__":
    main()

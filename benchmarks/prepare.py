"""prepare.py beside the ways of others on the same documents: seconds, peak memory, and which documents stay.

    python benchmarks/prepare.py make   --texts DIR --mb 100 --to docs.jsonl
    python benchmarks/prepare.py cost   --docs docs.jsonl [--near]                       seconds and memory of one run of ours
    python benchmarks/prepare.py course --docs docs.jsonl --peer VENV/bin/python         the lesson's way, Hugging Face datasets
    python benchmarks/prepare.py near   --docs docs.jsonl --peer VENV/bin/python         datatrove's MinHash, equal parameters
    python benchmarks/prepare.py gopher --docs docs.jsonl --peer VENV/bin/python         datatrove's Gopher filters
    python benchmarks/prepare.py recall --docs docs.jsonl --peer VENV/bin/python         near-duplicates against brute-force Jaccard

DIR is searched for *.txt (Project Gutenberg books). `make` recombines their sentences and those of the Python installation's
prose into documents, so that the corpus is no corpus of copies: lengths are drawn as those of web pages (log-normal, median
2,000 characters, sigma 1), and 13 % are lists of short lines, 15 % repeat an earlier document, 1 % repeat it with one word in
twenty changed, 1 % repeat their own paragraphs, 7 % are Japanese: about the shares that the course's rules dropped of its web text.

The peers live in a virtual environment of their own:

    pip install datasets==5.2.0 datatrove==0.10.1 fasttext-numpy2-wheel==0.9.2 spacy==SPACY xxhash

Ours and the peer run in turns, --repeats times each, every run a process of its own that starts, reads the file, and ends with parquet or
JSON lines on disk. Memory is the largest sum of the proportional set sizes (PSS) of the process and all its children.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


# ---- documents


def make(texts: pathlib.Path, mb: float, to: pathlib.Path) -> None:
    import numpy as np

    from jaxpt.data import sources

    books = [file.read_text() for file in sorted(texts.rglob("*.txt")) if file.name != "SOURCE.txt"]
    books += [document.text for document in sources.parse("python:prose").documents()]
    sentences, foreign = [], []
    for book in books:
        for sentence in re.split(r"(?<=[.!?])\s+|(?<=。)|\n{2,}", book):
            sentence = " ".join(sentence.split())
            (foreign if re.search(r"[\u3040-\u30ff]", sentence) else sentences).append(sentence) if len(sentence) > 20 else None
    rng = np.random.default_rng(0)
    print(f"{len(sentences):,} sentences, {len(foreign):,} Japanese", flush=True)
    written, kept = 0, []
    with open(to, "w") as out:
        while written < mb * 1e6:
            draw, wanted = rng.random(), rng.lognormal(np.log(2000), 1)
            if draw < 0.16 and kept:
                text = kept[rng.integers(len(kept))]
                if draw >= 0.15:
                    words = text.split(" ")
                    for i in rng.choice(len(words), len(words) // 20, replace=False):
                        words[i] = "changed"
                    text = " ".join(words)
            elif draw < 0.29:
                text = "\n".join("ab"[: n % 3] for n in rng.integers(9, size=rng.integers(1, 9)))
            else:
                of = foreign if draw < 0.36 else sentences
                picked = [of[i] for i in rng.integers(len(of), size=1 + int(wanted / (75 if of is foreign else 95)))]
                size = rng.integers(3, 8)
                paragraphs = ["\n".join(picked[i : i + size]) if draw > 0.7 else " ".join(picked[i : i + size]) for i in range(0, len(picked), size)]
                text = "\n\n".join(paragraphs * (2 if draw > 0.99 else 1))
                if len(kept) < 20_000:
                    kept.append(text)
                elif rng.random() < 0.1:
                    kept[rng.integers(len(kept))] = text
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            written += len(text.encode())
            out.write(line)


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
        return int(re.search(r"^Pss: +(\d+)", pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE).group(1)) * 1024
    except (OSError, AttributeError):
        return 0


def measured(command: list[str], **environment: str) -> tuple[float, float, str]:
    """(seconds, peak GB, what it said)"""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
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


def ours(docs: pathlib.Path, workdir: pathlib.Path, *settings: str) -> list[str]:
    shutil.rmtree(workdir, ignore_errors=True)
    command = [sys.executable, ROOT / "scripts/prepare.py", "--config", ROOT / "configs/base.py", "--workdir", workdir]
    return [*command, f"--config.prepare.sources=('docs=jsonl:{docs}',)", *(f"--config.prepare.{setting}" for setting in settings)]


def cost(docs: pathlib.Path, home: pathlib.Path, settings: list[str]) -> None:
    seconds, peak, said = measured(ours(docs, home / "ours", *settings))
    took = json.loads((home / "ours/corpus/manifest.json").read_text())["seconds"]
    print(said)
    print(f"{docs.stat().st_size / 1e6:8.0f} MB {' '.join(settings)}: {seconds:.1f} s wall, {took:.1f} s of the stage, {peak:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "cost", "course", "near", "gopher", "recall"))
    parser.add_argument("--texts", type=pathlib.Path)
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--to", type=pathlib.Path)
    parser.add_argument("--docs", type=pathlib.Path)
    parser.add_argument("--peer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("settings", nargs="*", help="of the section prepare, such as near_dedup=True")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        if arguments.what == "make":
            make(arguments.texts, arguments.mb, arguments.to)
        if arguments.what == "cost":
            cost(arguments.docs, home, arguments.settings)


if __name__ == "__main__":
    main()

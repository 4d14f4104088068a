"""What benchmarks/prepare.py runs of others, in the environment that has them: python
benchmarks/prepare_peers.py WAY DOCS OUT [MODEL].
"""

import heapq
import pathlib
import re
import sys


def course(docs: str, out: str, model: str) -> None:
    """The lesson's way: datasets, a filter a rule over single examples, one after the other, then
    one parquet.
    """
    import datasets
    import fasttext

    datasets.disable_progress_bars()
    cache = f"{out}/cache"
    files = sorted(map(str, pathlib.Path(docs).glob("*.jsonl")))
    found = datasets.load_dataset(
        "json", data_files=files, split="train", cache_dir=cache
    ).select_columns(["text"])
    seen, languages, paragraph_end = set(), fasttext.load_model(model), re.compile(r"\n{2,}")

    def long_enough(example):
        lines = example["text"].split("\n")
        return len(lines) >= 3 and min(heapq.nlargest(3, map(len, lines))) >= 3

    def varied(example):
        text, known, repeats, chars = example["text"], set(), 0, 0
        paragraphs = paragraph_end.split(text.strip())
        for paragraph in paragraphs:
            if paragraph in known:
                repeats += 1
                chars += len(paragraph)
            known.add(paragraph)
        return repeats / len(paragraphs) <= 0.3 and chars / len(text) <= 0.2

    def unseen(example):
        if example["text"] in seen:
            return False
        seen.add(example["text"])
        return True

    def english(example):
        labels, scores = languages.predict(example["text"].replace("\n", ""))
        return labels[0] == "__label__en" and scores[0] > 0.4

    for rule in (long_enough, varied, unseen, english):
        found = found.filter(rule, load_from_cache_file=False)
    found.to_parquet(f"{out}/kept.parquet")


def run(docs: str, out: str, *steps, name: str, read: bool = True, tasks: int = 2) -> None:
    """Steps of datatrove over docs, in two processes."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader

    pipeline = [*([JsonlReader(docs, glob_pattern="*.jsonl", id_key="id")] if read else []), *steps]
    LocalPipelineExecutor(
        pipeline,
        tasks=tasks,
        workers=min(tasks, 2),
        logging_dir=f"{out}/logs/{name}",
        skip_completed=False,
    ).run()


def near(docs: str, out: str) -> None:
    """datatrove's four steps of MinHash, with 32 buckets of 4 hashes of 5-grams."""
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(
        n_grams=5,
        num_buckets=32,
        hashes_per_bucket=4,
        hash_config=HashConfig(hash_fc="xxhash", precision=32),
    )
    run(
        docs,
        out,
        MinhashDedupSignature(output_folder=f"{out}/signatures", config=config),
        name="signatures",
    )
    run(
        docs,
        out,
        MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config),
        name="buckets",
        read=False,
        tasks=32,
    )
    run(
        docs,
        out,
        MinhashDedupCluster(f"{out}/buckets", f"{out}/removed", config=config),
        name="cluster",
        read=False,
        tasks=1,
    )
    run(
        docs,
        out,
        MinhashDedupFilter(f"{out}/removed"),
        JsonlWriter(f"{out}/kept", compression=None),
        name="filter",
    )


def gopher(docs: str, out: str) -> None:
    """datatrove's Gopher filters with its defaults."""
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.writers import JsonlWriter

    run(
        docs,
        out,
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        JsonlWriter(f"{out}/kept", compression=None),
        name="gopher",
    )


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])

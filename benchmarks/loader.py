"""The loader: rows a second, its share of a training step, memory over a 10-GB packed set, and the
first batch after a resume.

    python benchmarks/loader.py [--gb 10] [--row-len 4096] [--rows 40000]

Packs this Python's own prose, and makes a set of the asked size of it: its shard again and again
under other names (hard links), with an
index to match, so that the set is as large as asked to whoever reads it. Each figure is taken in a
process of its own.

    first batch   from open_rows to the first batch on the device, resumed at step 1,000,000 with 32
    rows a step
    which row     the mixture's answer at index 0 and at index 10^12
    rows/s        batches of 32 rows to the device and nothing else, in the shuffled order over the
    whole set, every record batch checked
                  against its checksum when it is first read
    memory        the most that stood in memory meanwhile above what stood there before opening,
    mapped pages of the set included
    step          the quickstart's training step fed by the loader: how long it waits for a batch,
    and the step with one batch over and over
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from jaxpt import config, sharding, stage
from jaxpt.data import loader, pack, prepare, tokenizer
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.spec import Manifest

BATCH_ROWS = 32


def packed_set(home: pathlib.Path, seq_len: int, gigabytes: float) -> None:
    """home/small, packed prose; home/large, a set of so many gigabytes that says the same again and
    again.
    """
    settings = config.load_config(ROOT / "configs/quickstart.py")
    settings = dataclasses.replace(
        settings,
        prepare=config.PrepareConfig(sources=("python:prose",)),
        pack=config.PackConfig(seq_len=seq_len),
        tokenizer=dataclasses.replace(settings.tokenizer, vocab_size=4096, sample_mb=4),
    )
    prepare.prepare_corpus(settings, home)
    tokenizer.train_tokenizer(settings, home)
    manifest = pack.pack_corpus(settings, home)
    source = home / "packed/train/prose"
    counts, index = manifest.counts["train"]["prose"], np.load(source / pack.INDEX_FILE)
    n = max(1, round(gigabytes * 1e9 / sum(shard["n_bytes"] for shard in counts["shards"])))
    large = home / "large/train/prose"
    large.mkdir(parents=True)
    shards = []
    for copy in range(n):
        for k, shard in enumerate(counts["shards"]):
            os.link(source / shard["file"], large / f"data-{copy:05d}-{k}.arrow")
            shards.append({**shard, "file": f"data-{copy:05d}-{k}.arrow"})
    step = np.array([len(counts["shards"]), 0, 0, 0, 0])
    np.save(large / pack.INDEX_FILE, np.concatenate([index + copy * step for copy in range(n)]))
    counts = {
        **manifest.counts,
        "train": {"prose": {**counts, "n_sequences": n * counts["n_sequences"], "shards": shards}},
        "heldout": {},
    }
    outputs = {f"train/prose/{pack.INDEX_FILE}": stage.sha256_file(large / pack.INDEX_FILE)}
    stage.write_manifest(
        dataclasses.replace(manifest, counts=counts, outputs=outputs), home / "large"
    )


def memory(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    return next(
        int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind)
    )


def stream(packed: pathlib.Path, first_row: int, batch_rows: int = BATCH_ROWS):
    rows = loader.open_packed([packed])
    mixture = MixtureSchedule(config.MixtureConfig(), rows.n_sequences, batch_rows)
    return rows, loader.iterate_batches(
        rows,
        mixture,
        sharding.make_batch_sharding(sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])),
        batch_rows,
        first_row,
        True,
    )


def first_batch(home: pathlib.Path, _: int) -> dict:
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # the device is there, as in a run
    start = time.perf_counter()
    rows, batches = stream(home / "large", 1_000_000 * BATCH_ROWS)
    jax.block_until_ready(next(batches))
    seconds = time.perf_counter() - start
    batches.close()
    mixture, micros = MixtureSchedule(config.MixtureConfig(), rows.n_sequences, BATCH_ROWS), {}
    for index in (0, 10**12):
        start = time.perf_counter()
        for i in range(index, index + 20_000):
            mixture.sequence_at(i)
        micros[str(index)] = (time.perf_counter() - start) / 20_000 * 1e6
    return {"seconds": seconds, "rows": sum(rows.n_sequences.values()), "micros": micros}


def rows_per_second(home: pathlib.Path, n_rows: int) -> dict:
    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    before = memory("VmRSS")
    rows, batches = stream(home / "large", 0)
    start, most, seen = time.perf_counter(), 0, []
    for _ in range(n_rows // BATCH_ROWS):
        jax.block_until_ready(next(batches))
        most = max(most, memory("VmRSS"))
        seen.append(time.perf_counter())
    half = len(seen) // 2
    checked = np.concatenate([source.is_verified for source in rows.sources.values()]).mean()
    return {
        "rows_per_second": BATCH_ROWS * len(seen) / (seen[-1] - start),
        "later": BATCH_ROWS * half / (seen[-1] - seen[-1 - half]),
        "memory_mb": (most - before) / 1e6,
        "checked": checked,
    }


def share_of_step(home: pathlib.Path, rounds: int) -> dict:
    from jaxpt.model import llama
    from jaxpt.train import state, step
    from jaxpt.weights import initialize

    settings = config.load_config(ROOT / "configs/quickstart.py")
    rows, batches = stream(home / "quick/packed", 0, settings.train.batch_size)
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    spec = initialize.make_random_spec(settings, rows.vocab_size)
    run = step.build_step(spec, settings, mesh)
    now, _ = run(
        state.init_state(llama.init_params(spec, 0, mesh), spec, settings, mesh), next(batches)
    )
    one, waits, fed, alone = next(batches), [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        now, found = run(now, batch)
        jax.block_until_ready(found)
        fed.append(time.perf_counter() - start)
        start = time.perf_counter()
        now, found = run(now, one)
        jax.block_until_ready(found)
        alone.append(time.perf_counter() - start)
    return {
        "wait": statistics.median(waits),
        "fed": statistics.median(fed),
        "alone": statistics.median(alone),
    }


PARTS = {
    "first_batch": first_batch,
    "rows_per_second": rows_per_second,
    "share_of_step": share_of_step,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=10)
    parser.add_argument("--row-len", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--part", nargs=3, metavar=("NAME", "HOME", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        name, home, n = arguments.part
        print("FOUND" + json.dumps(PARTS[name](pathlib.Path(home), int(n))))
        return
    with tempfile.TemporaryDirectory() as home:
        home = pathlib.Path(home)
        packed_set(home, arguments.seq_len, arguments.gb)
        quick = dataclasses.replace(
            config.load_config(ROOT / "configs/quickstart.py"),
            prepare=config.PrepareConfig(sources=("python:prose",)),
        )
        (home / "quick").mkdir()
        for part in ("corpus", "tokenizer"):
            os.symlink(home / part, home / "quick" / part)
        pack.pack_corpus(quick, home / "quick")
        found = {}
        for name, n in (
            ("first_batch", 0),
            ("rows_per_second", arguments.rows),
            ("share_of_step", 60),
        ):
            command = [sys.executable, __file__, "--part", name, home, str(n)]
            told = subprocess.run(
                list(map(str, command)), check=True, capture_output=True, text=True
            ).stdout
            found[name] = json.loads(told.partition("FOUND")[2])
        size = sum(
            shard["n_bytes"]
            for shard in Manifest.load(home / "large").counts["train"]["prose"]["shards"]
        )
    first, speed, share = found.values()
    print(
        f"a set of {size / 1e9:.1f} GB, {first['rows']:,} rows of "
        f"{arguments.seq_len:,} tokens; {os.cpu_count()} cores, jax "
        f"{jax.__version__}"
    )
    print(f"first batch at step 1,000,000: {first['seconds'] * 1000:.0f} ms")
    print(
        "which row stands at an index: "
        + ", ".join(
            f"{micros:.1f} us at {int(index):,}" for index, micros in first["micros"].items()
        )
    )
    print(
        f"{speed['rows_per_second']:,.0f} rows/s "
        f"({speed['rows_per_second'] * arguments.seq_len / 1e6:.1f}M "
        "tokens/s) over the first "
        f"{arguments.rows:,} rows, {speed['later']:,.0f} over their second "
        f"half; {speed['checked']:.0%} of the record batches checked by then"
    )
    print(f"memory above the start: {speed['memory_mb']:,.0f} MB at most")
    print(
        f"quickstart's step: waits {share['wait'] * 1e6:.0f} us for its "
        f"batch, {share['wait'] / share['fed']:.2%} of "
        f"{share['fed'] * 1000:.1f} ms; "
        f"with one batch over and over {share['alone'] * 1000:.1f} ms "
        f"({share['fed'] / share['alone']:.3f} x)"
    )


if __name__ == "__main__":
    main()

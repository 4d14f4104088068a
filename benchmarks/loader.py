"""Measure the loader: sequences per second, share of a training step, memory, first batch.

    python benchmarks/loader.py [--gb 10] [--seq-len 4096] [--sequences 40000]

Packs this Python's own prose and makes a set of --gb gigabytes of it: its shard again and again
under other names (hard links), with an index to match, so that the set has that size for whoever
reads it. Each figure is taken in a process of its own.

    first batch   from open_packed to the first batch on the device, resumed at step 1,000,000 with
                  32 sequences per step
    sequence_at   the mixture's answer at index 0 and at index 10^12
    sequences/s   batches of 32 sequences to the device and nothing else, in the shuffled order over
                  the whole set, every record batch checked when it is first read
    memory        the peak above what was in use before opening, mapped pages of the set included
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
from collections.abc import Generator

from jaxpt import io

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from jaxpt import config, sharding, stage
from jaxpt.data import loader, pack, prepare, tokenizer
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.spec import Batch, Manifest

BATCH_SIZE = 32
RECIPE = ROOT / "configs/quickstart.py"
PROSE = config.PrepareConfig(sources=("python:prose",))


def make_packed_sets(home: pathlib.Path, seq_len: int, gigabytes: float) -> None:
    """Write home/packed, packed prose, and home/large, which repeats it up to a size."""
    settings = config.load_config(RECIPE)
    settings = dataclasses.replace(
        settings,
        prepare=PROSE,
        pack=config.PackConfig(seq_len=seq_len),
        tokenizer=dataclasses.replace(settings.tokenizer, vocab_size=4096, sample_mb=4),
    )
    prepare.prepare_corpus(settings.prepare, home)
    tokenizer.train_tokenizer(settings.tokenizer, home)
    manifest = pack.pack_corpus(settings.pack, home)
    counts = pack.PackCounts.from_json(manifest.counts)
    source = counts.train["prose"]
    n_bytes = sum(shard.n_bytes for shard in source.shards)
    n_copies = max(1, round(gigabytes * 1e9 / n_bytes))
    directory = home / "packed/train/prose"
    large = home / "large/train/prose"
    large.mkdir(parents=True)
    shards = []
    for copy in range(n_copies):
        for k, shard in enumerate(source.shards):
            file = f"data-{copy:05d}-{k}.arrow"
            os.link(directory / shard.file, large / file)
            shards.append(dataclasses.replace(shard, file=file))
    index = np.load(directory / pack.INDEX_FILE)
    step = np.array([len(source.shards), 0, 0, 0, 0])
    np.save(
        large / pack.INDEX_FILE, np.concatenate([index + copy * step for copy in range(n_copies)])
    )
    n_sequences = n_copies * source.n_sequences
    source = dataclasses.replace(source, n_sequences=n_sequences, shards=tuple(shards))
    counts = dataclasses.replace(counts, train={"prose": source}, heldout={})
    index_file = large / pack.INDEX_FILE
    name = f"train/prose/{pack.INDEX_FILE}"
    manifest = dataclasses.replace(
        manifest,
        counts=counts.to_json(),
        outputs={name: io.sha256(index_file)},
        sizes={name: index_file.stat().st_size},
    )
    io.write_json(home / "large/manifest.json", manifest)


def read_memory(kind: str) -> int:
    """Return bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = open("/proc/self/status", encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def open_stream(
    packed: pathlib.Path, first_sequence: int, batch_size: int = BATCH_SIZE
) -> tuple[loader.PackedDataset, Generator[Batch, None, None]]:
    """Return a dataset and its batches on one device."""
    dataset = loader.open_packed([packed])
    schedule = MixtureSchedule(config.MixtureConfig(), dataset.n_sequences, batch_size)
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    place = sharding.make_batch_sharding(mesh)
    return dataset, loader.iterate_batches(
        dataset, schedule, place, batch_size, first_sequence, True
    )


def measure_first_batch(home: pathlib.Path, _: int) -> dict:
    """Measure the start of a resumed run."""
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # the device is initialized, as in a run
    start = time.perf_counter()
    dataset, batches = open_stream(home / "large", 1_000_000 * BATCH_SIZE)
    jax.block_until_ready(next(batches))
    seconds = time.perf_counter() - start
    batches.close()
    schedule = MixtureSchedule(config.MixtureConfig(), dataset.n_sequences, BATCH_SIZE)
    micros = {}
    for index in (0, 10**12):
        start = time.perf_counter()
        for i in range(index, index + 20_000):
            schedule.sequence_at(i)
        micros[str(index)] = (time.perf_counter() - start) / 20_000 * 1e6
    n_sequences = sum(dataset.n_sequences.values())
    return {"seconds": seconds, "n_sequences": n_sequences, "micros": micros}


def measure_speed(home: pathlib.Path, n_sequences: int) -> dict:
    """Measure speed and memory of reading and nothing else."""
    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    before = read_memory("VmRSS")
    dataset, batches = open_stream(home / "large", 0)
    start, peak, times = time.perf_counter(), 0, []
    for _ in range(n_sequences // BATCH_SIZE):
        jax.block_until_ready(next(batches))
        peak = max(peak, read_memory("VmRSS"))
        times.append(time.perf_counter())
    half = len(times) // 2
    verified = np.concatenate([source.is_verified for source in dataset.sources.values()])
    return {
        "per_second": BATCH_SIZE * len(times) / (times[-1] - start),
        "per_second_later": BATCH_SIZE * half / (times[-1] - times[-1 - half]),
        "memory_mb": (peak - before) / 1e6,
        "verified_frac": float(verified.mean()),
    }


def measure_step(home: pathlib.Path, rounds: int) -> dict:
    """Measure the quickstart's training step, fed by the loader and with one batch."""
    from jaxpt import initialize
    from jaxpt.model import transformer
    from jaxpt.train import state, step

    settings = config.load_config(RECIPE)
    dataset, batches = open_stream(home / "quick/packed", 0, settings.train.batch_size)
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    spec = initialize.make_random_spec(settings.model, dataset.vocab_size)
    train_step = step.build_step(spec, settings.train, settings.optim, settings.pack.seq_len, mesh)
    now = state.init_state(transformer.init_params(spec, 0, mesh), spec, settings.optim, mesh)
    now, _ = train_step(now, next(batches))
    same = next(batches)
    waits, fed, alone = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        now, metrics = train_step(now, batch)
        jax.block_until_ready(metrics)
        fed.append(time.perf_counter() - start)
        start = time.perf_counter()
        now, metrics = train_step(now, same)
        jax.block_until_ready(metrics)
        alone.append(time.perf_counter() - start)
    return {
        "wait": statistics.median(waits),
        "fed": statistics.median(fed),
        "alone": statistics.median(alone),
    }


PARTS = {
    "first_batch": measure_first_batch,
    "speed": measure_speed,
    "step": measure_step,
}


def run_part(name: str, home: pathlib.Path, n: int) -> dict:
    """Run one part in a process of its own."""
    command = [sys.executable, __file__, "--part", name, str(home), str(n)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.partition("FOUND")[2])


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=10)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=40_000)
    parser.add_argument("--part", nargs=3, metavar=("NAME", "HOME", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        name, home, n = arguments.part
        print("FOUND" + json.dumps(PARTS[name](pathlib.Path(home), int(n))))
        return
    with tempfile.TemporaryDirectory() as directory:
        home = pathlib.Path(directory)
        make_packed_sets(home, arguments.seq_len, arguments.gb)
        (home / "quick").mkdir()
        for part in ("corpus", "tokenizer"):
            os.symlink(home / part, home / "quick" / part)
        quick = dataclasses.replace(config.load_config(RECIPE), prepare=PROSE)
        pack.pack_corpus(quick.pack, home / "quick")
        first = run_part("first_batch", home, 0)
        speed = run_part("speed", home, arguments.sequences)
        step = run_part("step", home, 60)
        counts = pack.PackCounts.from_json(stage.read_manifest(home / "large").counts)
        n_bytes = sum(shard.n_bytes for shard in counts.train["prose"].shards)
    seq_len = arguments.seq_len
    print(f"a set of {n_bytes / 1e9:.1f} GB, {first['n_sequences']:,} sequences of {seq_len:,}")
    print(f"tokens; {os.cpu_count()} cores, jax {jax.__version__}")
    print(f"first batch at step 1,000,000: {first['seconds'] * 1000:.0f} ms")
    for index, micros in first["micros"].items():
        print(f"sequence_at({int(index):,}): {micros:.1f} us")
    tokens_per_second = speed["per_second"] * seq_len
    print(f"{speed['per_second']:,.0f} sequences/s ({tokens_per_second / 1e6:.1f}M tokens/s)")
    print(f"over the first {arguments.sequences:,}, {speed['per_second_later']:,.0f} over their")
    print(f"second half; {speed['verified_frac']:.0%} of the record batches checked by then")
    print(f"memory above the start: {speed['memory_mb']:,.0f} MB at most")
    wait, fed, alone = step["wait"], step["fed"], step["alone"]
    print(f"quickstart's step: waits {wait * 1e6:.0f} us for its batch, {wait / fed:.2%} of")
    print(f"{fed * 1000:.1f} ms; with one batch over and over {alone * 1000:.1f} ms", end=" ")
    print(f"({fed / alone:.3f} x)")


if __name__ == "__main__":
    main()

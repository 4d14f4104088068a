"""The stage prepare: sources -> quality rules -> duplicates -> decontamination -> train and held-out parquet shards.

Every rule but two looks at one text alone, and the two that compare documents look at digests and signatures. So the
texts are passed over three times, whatever the number of rules: read (into numbered rows on disk), judge (by the engine,
in any order), write. Between judging and writing one small table of numbers decides, in canonical order, what each
document fell to: the outcome cannot depend on workers or on how the input was cut into files.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxpt import config, stage
from jaxpt.data import benchmarks, decontaminate, dedup, engine, filters, sources
from jaxpt.spec import Manifest, UserError

SAMPLES = 50  # dropped documents shown for each rule
SAMPLE_CHARS = 10_000  # of each, at most: enough to judge a rule by
SCHEMA = pa.schema({"id": pa.string(), "source": pa.string(), "text": pa.string(), "prompt_chars": pa.int32()})  # of the text; 0: no prompt


def run(settings: config.Config, workdir: pathlib.Path, replace: bool = False) -> Manifest:
    """Prepare WORKDIR/corpus as the section `prepare` says, or find it finished.

    Raises UserError for a source, benchmark, engine or record that cannot be used, and when every document is dropped.
    """
    knobs = settings.prepare
    if knobs.shard_mb < 1 or knobs.limit_mb < 0:
        raise UserError(f"prepare.shard_mb and limit_mb: got {knobs.shard_mb} and {knobs.limit_mb}, wanted at least 1 and at least 0.")
    found = sources.parse_all(knobs.sources)
    index = decontaminate.Index([item for path in knobs.decontaminate for item in benchmarks.read(path)])
    near = ("near_dedup",) if knobs.near_dedup and "near_dedup" not in filters.PRESETS[knobs.preset] else ()
    rules = filters.understand(knobs.preset, (*knobs.rules, *near))
    rules += [filters.Rule("decontaminate", judge=index.judge, says="decontaminate")] if knobs.decontaminate else []
    daft = engine.start(knobs.engine)

    request = stage.plain(knobs)
    del request["engine"]  # it decides where the work is done, not what comes out
    request["rules"] = [rule.says for rule in rules]
    request["installed"] = {source.name: versions for source in found if (versions := source.installation())}
    inputs = {key: path for source in found for key, path in source.inputs().items()}
    inputs |= {f"benchmarks/{i}": stage.local_path(path) for i, path in enumerate(knobs.decontaminate)}
    if index.n_short:
        short = f"{index.n_short:,} of {len(index.items):,} benchmark items have fewer than {decontaminate.NGRAM} words"
        stage.say(f"prepare: {short}: no document can be matched with them")

    def work(partial: pathlib.Path) -> dict[str, Any]:
        rows = read(found, knobs, partial / ".read")
        verdict = judge(daft, rows, rules)
        dropped_by, twin = decide(rows, rules, verdict)
        contaminated = write(rows, rules, verdict, dropped_by, twin, index, knobs, partial)
        shutil.rmtree(partial / ".read")
        funnel = account(rows, rules, dropped_by, knobs.heldout_frac)
        (partial / "funnel.json").write_text(json.dumps(funnel, indent=1) + "\n")
        if not any(amounts["rows"] for amounts in funnel["train"].values()):
            raise UserError(
                f"prepare: no document of {len(rows.source):,} is left to train on.\n{table(funnel)}\nSamples of what each rule dropped lie in "
                f"{partial / 'dropped'}; choose another prepare.preset or source, or lower prepare.heldout_frac."
            )
        return {**funnel, "contaminated": contaminated}

    manifest = stage.run("prepare", workdir / "corpus", work, config=request, inputs=inputs, replace=replace)
    stage.say(table(manifest.counts))
    for task, n in manifest.counts["contaminated"].items():
        stage.say(f"prepare: {n:,} documents dropped for what they share with {task}")
    sums = [sum(amounts[key] for amounts in manifest.counts[side].values()) for side in ("train", "heldout") for key in ("rows", "bytes")]
    made = f"{sums[0]:,} documents ({sums[1] / 1e6:.1f} MB) to train on, {sums[2]:,} ({sums[3] / 1e6:.1f} MB) held out"
    stage.say(f"prepare: {workdir / 'corpus'}: {made}")
    return manifest


# ---- first pass: every document becomes a numbered row


@dataclasses.dataclass(frozen=True)
class Rows:
    """What is known of n documents without their texts, in canonical order; the texts lie in `files`."""

    names: list[str]  # of the sources
    source: np.ndarray  # [n] index into names
    chars: np.ndarray  # [n]
    bytes: np.ndarray  # [n] of UTF-8
    digests: np.ndarray  # [n, 4] uint64, see dedup.digest
    files: list[pathlib.Path]  # parquet of row number, id and text, in order


def read(found: Sequence[sources.Source], knobs: config.Prepare, directory: pathlib.Path) -> Rows:
    """Number the documents of all sources, limit_mb of each, and put them on disk."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    source, chars, n_bytes, digests, files = [], [], [], [], []
    for k, one in enumerate(found):
        shards = Shards(
            directory, one.name, knobs.shard_mb, pa.schema({"n": pa.int64(), "id": pa.string(), "text": pa.string(), "prompt_chars": pa.int32()})
        )
        before = len(source)
        for document, data, digest in limited(one, int(knobs.limit_mb * 1e6)):
            shards.add((len(source), *document[:3]), len(data))
            source.append(k)
            chars.append(len(document.text))
            n_bytes.append(len(data))
            digests.append(digest)
        if len(source) == before:
            why = f"no document fits into prepare.limit_mb={knobs.limit_mb:g}, raise it" if knobs.limit_mb else "no document in it, leave it out"
            raise UserError(f"prepare.sources: {one.name} ({one.kind}:{one.where}): {why}.")
        files += shards.close()
    numbers = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 4).astype(np.uint64)
    return Rows([one.name for one in found], np.array(source), np.array(chars), np.array(n_bytes), numbers, files)


def limited(source: sources.Source, limit: int) -> Iterator[tuple[sources.Document, bytes, bytes]]:
    """(document, its text in UTF-8, its digest) of a source in its order: all, or those with the smallest digests that make `limit` bytes.

    A streamed data set may have no end: of hf: the first `limit` bytes are taken.
    """
    kept: list[tuple[int, int, tuple]] = []  # heap of (-sampling number, -place, document)
    total, ceiling = 0, (1 << 64, 0)  # a document from the ceiling on is out, so that the order of reading cannot matter
    for place, found in enumerate(stage.track(source.documents(), f"prepare: reading {source.name}", None, "documents")):
        try:
            data = found.text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{found.id}: character {error.start + 1} is half of a surrogate pair, which is no text. Mend or remove the record."
            ) from None
        document = (found, data, dedup.digest(data))
        if not limit:
            yield document
        elif source.kind == "hf":
            total += len(data)
            if total > limit:
                return
            yield document
        elif (key := (int.from_bytes(document[2][24:]), place)) < ceiling:
            heapq.heappush(kept, (-key[0], -place, document))
            total += len(data)
            while total > limit:
                number, at, out = heapq.heappop(kept)
                total -= len(out[1])
                ceiling = (-number, -at)
    for _, _, document in sorted(kept, key=lambda each: -each[1]):
        yield document


class Shards:
    """Parquet files NAME-00000.parquet, NAME-00001.parquet, ... of about `shard_mb` of text each."""

    def __init__(self, directory: pathlib.Path, name: str, shard_mb: int, schema: pa.Schema):
        self.directory, self.name, self.shard_bytes, self.schema = directory, name, shard_mb * 1_000_000, schema
        self.rows: list[tuple] = []
        self.n_bytes, self.files = 0, []

    def add(self, row: tuple, n_bytes: int) -> None:
        self.rows.append(row)
        self.n_bytes += n_bytes
        if self.n_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        self.files.append(self.directory / f"{self.name}-{len(self.files):05d}.parquet")
        columns = [pa.array(column, field.type) for column, field in zip(zip(*self.rows, strict=True), self.schema, strict=True)]
        pq.write_table(pa.table(columns, schema=self.schema), self.files[-1], compression="zstd", row_group_size=10_000)
        self.rows, self.n_bytes = [], 0

    def close(self) -> list[pathlib.Path]:
        if self.rows:
            self.flush()
        return self.files


# ---- second pass: the engine judges each text alone


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the rules said of each text by itself."""

    failed: np.ndarray  # [n] the first rule with a judge that drops it; the number of rules where none does
    reasons: dict[int, str]  # row -> why
    signatures: np.ndarray  # [n, hashes] uint32, MinHash; [n, 0] without near-duplicate removal


def judge(daft, rows: Rows, rules: Sequence[filters.Rule]) -> Verdict:
    """Run the rules over the texts, wherever the engine runs and in whatever order it answers."""
    failed, reasons, has_near = np.empty(len(rows.source), np.int16), {}, any(rule.name == "near_dedup" for rule in rules)
    signatures = np.empty((len(rows.source), dedup.N_HASHES if has_near else 0), np.uint32)
    alone = [filters.Rule(rule.name, judge=lambda texts: [""] * len(texts)) if rule.mark else rule for rule in rules]

    @daft.func.batch(return_dtype=daft.DataType.struct({"failed": daft.DataType.int16(), "reason": daft.DataType.string()}), batch_size=256)
    def verdict(texts):
        judged = filters.judge([sources.Document("", text) for text in texts.to_pylist()], alone)
        return pa.StructArray.from_arrays([pa.array(judged.failed, pa.int16()), pa.array(judged.reasons, pa.string())], ["failed", "reason"])

    columns = [daft.col("n"), verdict(daft.col("text")).alias("verdict")]
    columns += [dedup.minhash(daft.col("text")).alias("signature")] if has_near else []
    with stage.progress("prepare: judging", len(rows.source), "documents") as advance:
        paths = [re.sub(r"([\[\]{}*?\\])", r"[\1]", str(file)) for file in rows.files]  # Daft takes a path for a glob
        for batch in daft.read_parquet(paths).select(*columns).to_arrow_iter():
            n = batch.column("n").to_numpy()
            failed[n] = batch.column("verdict").field("failed").to_numpy()
            reasons |= {int(i): reason for i, reason in zip(n, batch.column("verdict").field("reason").to_pylist(), strict=True) if reason}
            if has_near:
                signatures[n] = batch.column("signature").flatten().to_numpy().reshape(len(n), -1)
            advance(len(n))
    return Verdict(failed, reasons, signatures)


def decide(rows: Rows, rules: Sequence[filters.Rule], verdict: Verdict) -> tuple[np.ndarray, np.ndarray]:
    """What each document fell to: (index of the rule, or len(rules) for those kept; the row that it repeats, or -1), both [n].

    A rule that compares documents sees those that all rules before it kept; the first of equals stays.
    """
    dropped_by, twin = verdict.failed.copy(), np.full(len(rows.source), -1)
    for k, rule in enumerate(rules):
        if rule.mark:
            alive = np.flatnonzero(dropped_by > k)
            first = alive[dedup.near(verdict.signatures[alive]) if rule.name == "near_dedup" else dedup.exact(rows.digests[alive])]
            repeats = alive[first != alive]
            dropped_by[repeats], twin[repeats] = k, first[first != alive]
    return dropped_by, twin


# ---- third pass: what stays goes to its side, and of what goes a sample is kept


def write(rows, rules, verdict, dropped_by, twin, index: decontaminate.Index, knobs: config.Prepare, out: pathlib.Path) -> dict[str, int]:
    """Write the shards and the samples. Returns the number of documents dropped for each benchmark task."""
    for side in ("train", "heldout", "dropped"):
        shutil.rmtree(out / side, ignore_errors=True)
        (out / side).mkdir()
    heldout = is_heldout(rows.digests, knobs.heldout_frac)
    shards = {(side, name): Shards(out / side, name, knobs.shard_mb, SCHEMA) for side in ("train", "heldout") for name in rows.names}
    shown = {int(n): [] for k in range(len(rules)) for n in sample(rows, dropped_by == k)}
    twin_ids = dict.fromkeys(twin[list(shown)].tolist(), "")
    contaminated = dict.fromkeys(sorted({item.task for item in index.items}), 0)
    with stage.progress("prepare: writing", len(rows.source), "documents") as advance:
        for file in rows.files:
            for batch in pq.ParquetFile(file).iter_batches(1024):
                for n, id, text, prompt_chars in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    name, k = rows.names[rows.source[n]], dropped_by[n]
                    if n in twin_ids:
                        twin_ids[n] = id
                    if k == len(rules):
                        shards["heldout" if heldout[n] else "train", name].add((id, name, text, prompt_chars), int(rows.bytes[n]))
                    elif n in shown:
                        shown[n] = [
                            id,
                            name,
                            text[:SAMPLE_CHARS],
                            prompt_chars,
                            verdict.reasons.get(n) if twin[n] < 0 else f"repeats {twin_ids[int(twin[n])]}",
                        ]
                    if k < len(rules) and rules[k].name == "decontaminate":
                        for task in {item.task for item, _ in index.hits(text)}:
                            contaminated[task] += 1
                advance(batch.num_rows)
    for each in shards.values():
        each.close()
    for k, rule in enumerate(rules):
        if samples := [shown[n] for n in sorted(shown) if dropped_by[n] == k]:
            table = pa.table([list(column) for column in zip(*samples, strict=True)], schema=SCHEMA.append(pa.field("reason", pa.string())))
            pq.write_table(table, out / "dropped" / f"{rule.name}.parquet", compression="zstd")
    return contaminated


def is_heldout(digests: np.ndarray, heldout_frac: float) -> np.ndarray:
    """Which documents are kept out of training, [n] bool: by the text alone, so that none changes sides as a corpus grows."""
    return digests[:, 2] < np.uint64(heldout_frac * 2**64)


def sample(rows: Rows, chosen: np.ndarray) -> np.ndarray:
    """Up to SAMPLES rows among the chosen, as good as at random and the same every time."""
    candidates = np.flatnonzero(chosen)
    return candidates[np.argsort(rows.digests[candidates, 3], kind="stable")[:SAMPLES]]


# ---- the funnel


def account(rows: Rows, rules: Sequence[filters.Rule], dropped_by: np.ndarray, heldout_frac: float) -> dict[str, Any]:
    """The funnel: what was read, what was left after each rule, and what went to each side, for each source."""

    def amounts(mask: np.ndarray) -> dict[str, dict[str, int]]:
        masks = {name: mask & (rows.source == k) for k, name in enumerate(rows.names)}
        return {name: {"rows": int(m.sum()), "chars": int(rows.chars[m].sum()), "bytes": int(rows.bytes[m].sum())} for name, m in masks.items()}

    kept, heldout = dropped_by == len(rules), is_heldout(rows.digests, heldout_frac)
    steps = [{"rule": "read", "kept": amounts(np.ones_like(kept))}]
    steps += [{"rule": rule.name, "kept": amounts(dropped_by > k)} for k, rule in enumerate(rules)]
    return {"sources": rows.names, "steps": steps, "heldout": amounts(kept & heldout), "train": amounts(kept & ~heldout)}


def table(funnel: dict[str, Any]) -> str:
    """The funnel as a small table: documents and MB left after each rule, a column a source."""
    lines = [(step["rule"], step["kept"]) for step in funnel["steps"]] + [(side, funnel[side]) for side in ("train", "heldout")]
    cells = [["left after", *funnel["sources"]]]
    cells += [[rule, *(f"{kept[name]['rows']:,} docs {kept[name]['bytes'] / 1e6:8.2f} MB" for name in funnel["sources"])] for rule, kept in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  " + "   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)

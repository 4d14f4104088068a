"""Laws of packing: no token lost or doubled, short documents whole, the course's way exactly, rows
that Hugging Face datasets opens.
"""

import collections
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import given, settings, strategies
from test_tokenizer import asking, english_and_code, write_corpus

from jaxpt import stage
from jaxpt.config import Config, PackConfig
from jaxpt.data import pack, tokenizer
from jaxpt.spec import Manifest, UserError

ROW_LEN = 96


def split_documents() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(train, heldout) documents of two sources; english has a held-out part, code has none."""
    found = english_and_code()
    return {"english": found["english"][:50], "code": found["code"]}, {
        "english": found["english"][50:]
    }


def prepared(workdir: pathlib.Path) -> pathlib.Path:
    """A run directory with a corpus and a tokenizer."""
    write_corpus(workdir, *split_documents())
    tokenizer.train_tokenizer(asking(vocab_size=700), workdir)
    return workdir


def packing(method: str = "best_fit", seq_len: int = ROW_LEN) -> Config:
    return dataclasses.replace(Config(), pack=PackConfig(seq_len=seq_len, method=method))


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    return prepared(tmp_path)


def encoded(workdir: pathlib.Path, texts: list[str]) -> list[list[int]]:
    """The straightforward way: bos + ids + eos of each document."""
    ours = tokenizer.load_tokenizer(workdir / "tokenizer")
    return [[ours.bos_id, *ours.encode_batch([text])[0], ours.eos_id] for text in texts]


def documents_of(rows: list[list[pack.Segment]]) -> dict[str, list[int]]:
    """Documents put together again from the pieces of all rows."""
    pieces = collections.defaultdict(dict)
    for row in rows:
        for piece in row:
            assert piece.part not in pieces[piece.document], "doubled"
            pieces[piece.document][piece.part] = piece.ids.tolist()
    return {
        document: [token for part in sorted(parts) for token in parts[part]]
        for document, parts in pieces.items()
    }


LENGTHS = strategies.lists(strategies.integers(1, 70), max_size=60)


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=strategies.integers(8, 31), window=strategies.integers(1, 50))
def test_best_fit_neither_loses_nor_doubles_a_token_and_cuts_only_what_is_too_long(
    lengths, seq_len, window
):
    numbers = iter(range(sum(lengths)))
    documents = [
        pack.Segment(np.array([next(numbers) for _ in range(n)], np.int32), f"d{i}")
        for i, n in enumerate(lengths)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "WINDOW_SEGMENTS", window)
        stretches = pack.split_windows(np.array(lengths, int), seq_len)
    rows = [
        row
        for first, last in stretches
        for row in pack.pack_best_fit(documents[first:last], seq_len)
    ]
    assert documents_of(rows) == {d.document: d.ids.tolist() for d in documents}
    assert all(0 < sum(len(piece.ids) for piece in row) <= seq_len for row in rows)
    sizes = collections.defaultdict(list)
    for piece in sorted((piece for row in rows for piece in row), key=lambda piece: piece.part):
        sizes[piece.document].append(len(piece.ids))
    for document in documents:
        n_full, rest = divmod(len(document.ids), seq_len)
        assert sizes[document.document] == [seq_len] * n_full + [rest] * (rest > 0)


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=strategies.integers(8, 31))
def test_best_fit_leaves_no_two_rows_that_would_fit_in_one(lengths, seq_len):
    rows = list(
        pack.pack_best_fit(
            (pack.Segment(np.zeros(n, np.int32), f"d{i}") for i, n in enumerate(lengths)), seq_len
        )
    )
    filled = sorted(sum(len(piece.ids) for piece in row) for row in rows)
    assert len(filled) < 2 or filled[0] + filled[1] > seq_len


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=strategies.integers(8, 31), first_row=strategies.integers(0, 9))
def test_course_is_one_stream_of_tokens_cut_into_rows(lengths, seq_len, first_row):
    stream = list(range(sum(lengths)))
    ends = np.cumsum([0, *lengths])
    documents = [
        pack.Segment(np.array(stream[a:b], np.int32), f"d{i}")
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    rows = list(pack.pack_course(iter(documents), seq_len))
    expected = [
        stream[start : start + seq_len] for start in range(0, len(stream) - seq_len + 1, seq_len)
    ]
    assert [[token for piece in row for token in piece.ids.tolist()] for row in rows] == expected
    for piece in (piece for row in rows for piece in row):
        document = documents[int(piece.document[1:])].ids.tolist()
        assert set(piece.ids.tolist()) <= set(document)
        assert piece.part == piece.ids[0] // seq_len - document[0] // seq_len
    if first_row < len(
        rows
    ):  # a stretch of the stream, begun at the document that its first row begins in
        begins = next(
            i for i, document in enumerate(documents) if document.ids[-1] >= first_row * seq_len
        )
        later = list(pack.pack_course(documents[begins:], seq_len, int(ends[begins]), first_row))
        told = [
            [[(piece.ids.tolist(), piece.document, piece.part) for piece in row] for row in each]
            for each in (later, rows[first_row:])
        ]
        assert told[0] == told[1]


@settings(deadline=None)
@given(
    documents=strategies.lists(
        strategies.tuples(strategies.integers(1, 70), strategies.integers(0, 70)),
        min_size=1,
        max_size=40,
    ),
    seq_len=strategies.integers(8, 31),
    method=strategies.sampled_from([pack.pack_best_fit, pack.pack_course]),
)
def test_every_token_is_a_prompts_or_not_wherever_its_document_was_cut(documents, seq_len, method):
    documents = [(n, min(prompt, n)) for n, prompt in documents]
    numbers = iter(range(sum(n for n, _ in documents)))
    pieces = [
        pack.Segment(np.array([next(numbers) for _ in range(n)], np.int32), f"d{i}", 0, prompt)
        for i, (n, prompt) in enumerate(documents)
    ]
    trained = {token for piece in pieces for token in piece.ids[piece.loss_from :].tolist()}
    rows = [piece for row in method(pieces, seq_len) for piece in row]
    seen = {token for piece in rows for token in piece.ids.tolist()}
    assert {
        token for piece in rows for token in piece.ids[piece.loss_from :].tolist()
    } == trained & seen
    assert all(0 <= piece.loss_from <= len(piece.ids) for piece in rows)


@pytest.mark.parametrize("method", ["best_fit", "course"])
def test_datasets_opens_the_rows_and_they_hold_the_corpus(method, workdir):
    import datasets

    manifest = pack.pack_corpus(packing(method), workdir)
    texts, _ = split_documents()
    for name in texts:
        rows = datasets.load_from_disk(str(workdir / "packed" / "train" / name))
        assert rows.features == datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int32"), length=ROW_LEN),
                "doc_lens": datasets.List(datasets.Value("int32")),
                "doc_ids": datasets.List(datasets.Value("string")),
                "loss_from": datasets.List(datasets.Value("int32")),
            }
        )
        whole = encoded(workdir, texts[name])
        pieces = []
        for row in rows:
            n = sum(row["doc_lens"])
            assert len(row["doc_lens"]) == len(row["doc_ids"]) == len(row["loss_from"])
            assert row["input_ids"][n:] == [0] * (ROW_LEN - n), "padding is 0 and stands at the end"
            assert not any(row["loss_from"])
            borders = itertools.pairwise(np.cumsum([0, *row["doc_lens"]]))
            pieces += [
                (document, row["input_ids"][a:b])
                for document, (a, b) in zip(row["doc_ids"], borders, strict=True)
            ]
        if method == "course":
            stream = [token for ids in whole for token in ids]
            assert [token for row in rows for token in row["input_ids"]] == stream[
                : len(stream) // ROW_LEN * ROW_LEN
            ]
        else:
            for i, ids in enumerate(whole):
                parts = [part for document, part in pieces if document == f"{name}-{i}"]
                expected = [ids[start : start + ROW_LEN] for start in range(0, len(ids), ROW_LEN)]
                assert sorted(parts) == sorted(expected)

        counts = manifest.counts["train"][name]
        n_tokens = sum(len(ids) for _, ids in pieces)
        trained = collections.Counter(token for _, ids in pieces for token in ids[1:])
        entropy = -sum(
            n / trained.total() * math.log(n / trained.total()) for n in trained.values()
        )
        assert counts["unigram_nats"] == pytest.approx(entropy)
        assert counts["padding_frac"] == pytest.approx(1 - n_tokens / (len(rows) * ROW_LEN))
        assert (counts["rows"], counts["tokens"], counts["documents"]) == (
            len(rows),
            n_tokens,
            len(texts[name]),
        )
        assert counts["bytes"] == sum(len(text.encode()) for text in texts[name])
        lesson = workdir / "packed" / "train" / name / "packaged_pretrain_dataset.parquet"
        if method == "course":
            theirs = datasets.load_dataset(
                "parquet", data_files=str(lesson), cache_dir=str(workdir / "cache")
            )["train"]
            assert theirs.features == datasets.Features(
                {"input_ids": datasets.List(datasets.Value("int32"))}
            )
            assert theirs["input_ids"][:] == rows["input_ids"][:]
        assert lesson.exists() == (method == "course")
        if method == "best_fit":
            assert counts["cut_documents"] == sum(len(ids) > ROW_LEN for ids in whole)
    assert set(manifest.counts["heldout"]) == {"english"}
    assert manifest.tokenizer == tokenizer.load_tokenizer(workdir / "tokenizer").fingerprint
    assert manifest.counts["vocab_size"] == 700


def test_rows_depend_on_corpus_and_tokenizer_alone(workdir, monkeypatch):
    """Not on how many documents are encoded at once, nor on how many threads encode them."""
    once = pack.pack_corpus(packing(), workdir)
    monkeypatch.setattr(pack, "MAX_ENCODE_CHARS", 1000)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    (workdir / "packed").rename(workdir / "first")
    assert pack.pack_corpus(packing(), workdir).outputs == once.outputs


RUN = """
import dataclasses, sys
sys.path.insert(0, sys.argv.pop(1))  # as the scripts do
from jaxpt.config import Config, PackConfig, PrepareConfig
from jaxpt.data import executor, pack
if __name__ == "__main__":
    where, seq_len, workdir = sys.argv[1:]
    pack.MAX_BYTES_IN_PROCESS, pack.JOB_BYTES = 0, 1
    map_jobs, used = executor.map_jobs, []
    executor.map_jobs = lambda *call: used.append(len(call[2])) or map_jobs(*call)
    sections = {"pack": PackConfig(seq_len=int(seq_len)), "prepare": PrepareConfig(executor=where)}
    pack.pack_corpus(dataclasses.replace(Config(), **sections), workdir)
    print("JOBS", used)
"""


def packing_process(where: str, workdir: pathlib.Path) -> subprocess.Popen:
    """pack.py's work in processes, each job by itself; in a process of its own, since one process
    runs one engine.
    """
    (workdir / "run.py").write_text(RUN)
    command = [sys.executable, workdir / "run.py", ROOT, where, str(ROW_LEN), workdir]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "ray"])
def test_rows_are_the_same_from_several_processes_and_on_ray(where, workdir, tmp_path):
    if where == "ray":
        pytest.importorskip("ray")
    once = pack.pack_corpus(packing(), workdir)
    for part in ("corpus", "tokenizer"):
        shutil.copytree(workdir / part, tmp_path / "other" / part)
    told = packing_process(where, tmp_path / "other").communicate()[0]
    assert "JOBS [3, 3]" in told, told
    assert Manifest.load(tmp_path / "other/packed").outputs == once.outputs


@pytest.mark.slow
def test_killed_at_any_moment_with_its_processes_it_goes_on_to_the_same_rows(workdir, tmp_path):
    once = pack.pack_corpus(packing(), workdir)
    for part in ("corpus", "tokenizer"):
        shutil.copytree(workdir / part, tmp_path / "other" / part)
    moments = iter(["tokens-000000.arrow.json", "data-00000.arrow", "data-00000.arrow.json"])
    while True:
        process, moment = packing_process("local", tmp_path / "other"), next(moments, None)
        while moment and process.poll() is None and not list((tmp_path / "other").rglob(moment)):
            time.sleep(0.002)
        if moment is None:
            told = process.communicate()[0]
            break
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    jobs_left = told.partition("JOBS ")[2].strip()
    assert jobs_left != "[3, 3]", "what was finished is not done again"
    assert Manifest.load(tmp_path / "other/packed").outputs == once.outputs


def test_large_sets_are_cut_into_shards_with_the_same_rows(workdir, monkeypatch):
    import datasets

    pack.pack_corpus(packing("course"), workdir)
    one = datasets.load_from_disk(str(workdir / "packed" / "train" / "english"))[:]
    monkeypatch.setattr(pack, "BATCH_TOKENS", 5 * ROW_LEN)
    monkeypatch.setattr(pack, "SHARD_BYTES", 4 * 10 * ROW_LEN)
    (workdir / "packed").rename(workdir / "first")
    shards = pack.pack_corpus(packing("course"), workdir).counts["train"]["english"]["shards"]
    many = datasets.load_from_disk(str(workdir / "packed" / "train" / "english"))
    assert len(shards) > 10
    assert all(shard["rows"] == 10 for shard in shards[:-1])
    assert many[:] == one


def test_a_killed_run_goes_on_and_comes_out_the_same(workdir, monkeypatch):
    whole = pack.pack_corpus(packing(), workdir)
    (workdir / "packed").rename(workdir / "first")
    real = pack.split_row_groups

    def killed(file, groups):
        if "english" in file.name:
            raise KeyboardInterrupt
        return real(file, groups)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pack, "split_row_groups", killed)
        pack.pack_corpus(packing(), workdir)
    assert not (workdir / "packed").exists()
    read, written, write = [], [], pack.write_sequences
    monkeypatch.setattr(
        pack,
        "split_row_groups",
        lambda file, groups: read.append(file.parent.name + file.name) or real(file, groups),
    )

    def killed_later(rows, file, *rest):
        if "english" in str(file):
            raise KeyboardInterrupt
        return write(rows, file, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pack, "write_sequences", killed_later)
        pack.pack_corpus(packing(), workdir)
    assert {name for name in read if "code" in name} == set(), (
        "what was tokenized is not tokenized again"
    )
    read.clear()
    monkeypatch.setattr(
        pack,
        "write_sequences",
        lambda rows, file, *rest: written.append(str(file)) or write(rows, file, *rest),
    )
    again = pack.pack_corpus(packing(), workdir)
    assert not read and len(written) == 2 and all("english" in file for file in written), (
        "nor are rows filled again"
    )
    assert again.outputs == whole.outputs
    assert again.counts == whole.counts


def test_padding_stays_under_half_a_percent_on_real_prose(data_dir, tmp_path):
    """The paragraphs of a novel: 2,126 documents."""
    novel = (data_dir / "text_gutenberg" / "Pride-and-Prejudice_1342.txt").read_text()
    texts = {"novel": [paragraph for paragraph in novel.split("\n\n") if paragraph.strip()]}
    write_corpus(tmp_path, texts)
    tokenizer.train_tokenizer(
        asking(source=str(data_dir / "tok_mistral_v1" / "tokenizer.model")), tmp_path
    )
    counts = pack.pack_corpus(packing(seq_len=512), tmp_path).counts["train"]["novel"]
    assert counts["padding_frac"] < 0.005


def test_less_text_than_a_row_is_refused_for_training_and_left_out_of_heldout(tmp_path):
    write_corpus(tmp_path, {"much": english_and_code()["english"]}, {"much": ["tiny"]})
    tokenizer.train_tokenizer(asking(vocab_size=700), tmp_path)
    assert pack.pack_corpus(packing("course"), tmp_path).counts["heldout"] == {}
    write_corpus(tmp_path, {"little": ["tiny"]})
    with pytest.raises(UserError, match="source little has less than one row of 96 tokens"):
        pack.pack_corpus(packing("course"), tmp_path, replace=True)


def cut_shard(workdir):
    file = workdir / "corpus/train/english-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1000])


def damaged_shard(workdir):
    file = workdir / "corpus/train/english-00000.parquet"
    content = bytearray(file.read_bytes())
    content[1000:3000] = bytes(2000)
    file.write_bytes(content)


def shard_without_prompts(workdir):
    file = workdir / "corpus/train/english-00000.parquet"
    pq.write_table(pq.read_table(file).drop_columns("prompt_chars"), file)
    manifest = json.loads((workdir / "corpus/manifest.json").read_text())
    manifest["outputs"]["train/english-00000.parquet"] = stage.sha256_file(
        file
    )  # as another program would have written it
    (workdir / "corpus/manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (cut_shard, "cannot be read as a shard"),
        (damaged_shard, "its checksum"),
        (shard_without_prompts, "cannot be read as a shard"),
    ],
)
def test_a_broken_corpus_is_named_and_nothing_is_published(workdir, harm, says):
    harm(workdir)
    with pytest.raises(UserError, match=rf"english-00000\.parquet: {says}") as error:
        pack.pack_corpus(packing(), workdir)
    assert "\n" not in str(error.value) and not (workdir / "packed").exists()


@pytest.mark.slow
def test_a_mistake_that_another_process_finds_is_told_in_one_sentence(workdir, monkeypatch):
    damaged_shard(workdir)
    monkeypatch.setattr(pack, "MAX_BYTES_IN_PROCESS", 0)
    with pytest.raises(UserError, match=r"english-00000\.parquet: its checksum") as error:
        pack.pack_corpus(packing(), workdir)
    assert "\n" not in str(error.value)


def test_packing_needs_a_corpus_and_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="not there"):
        pack.pack_corpus(packing(), tmp_path)
    write_corpus(tmp_path, {"english": ["text"]})
    with pytest.raises(UserError, match="not there"):
        pack.pack_corpus(packing(), tmp_path)
    assert Manifest.load(tmp_path / "corpus").stage == "prepare"

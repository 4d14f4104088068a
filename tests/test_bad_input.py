"""Whatever is wrong with what report, evaluate and compare are given: a sentence, or a
page that says what is missing, and never a traceback.
"""

import io
import json
import pathlib
import shutil
import sys

import jax
import pytest
from made_runs import Page, write_runs

from jaxpt import config, sharding
from jaxpt.cli.main import main
from jaxpt.data import tokenizer
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec
from jaxpt.weights import huggingface

SPEC = ModelSpec(
    n_layers=1,
    d_model=24,
    d_ff=40,
    n_heads=6,
    n_kv_heads=2,
    d_head=8,
    vocab_size=320,
    max_seq_len=48,
)
SCORE, CONTINUE = (
    "evaluate --model hf --tasks bits_per_byte/sea=text:sea.txt",
    "compare --models hf --prompts prompts.txt",
)
WINOGRANDE, TRUTHFULQA = (
    "evaluate --model hf --tasks winogrande --data-dir data",
    "evaluate --model hf --tasks truthfulqa_mc2 --data-dir data",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """hf/: a Hugging Face directory of random weights with a tokenizer of 300 pieces; small/: the
    same for a model of 260.
    """
    import sentencepiece

    home, learnt = tmp_path_factory.mktemp("model"), io.BytesIO()
    lines = [
        f"The ship number {i} sailed at dawn; nobody on the quay said a word." for i in range(40)
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=learnt,
        model_type="bpe",
        vocab_size=300,
        minloglevel=2,
        **tokenizer.SENTENCEPIECE_OPTIONS,
    )
    backend, settings_file, _ = tokenizer.convert_sentencepiece(learnt.getvalue(), "test")
    (home / "tokenizer").mkdir()
    tokenizer.Tokenizer(backend, settings_file, home / "tokenizer").save_tokenizer(
        home / "tokenizer"
    )
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    for name, spec in (("hf", SPEC), ("small", SPEC.replace(vocab_size=260))):
        huggingface.write_hf_model(
            spec,
            transformer.init_params(spec, 0, mesh),
            home / name,
            tokenizer_dir=home / "tokenizer",
        )
    return home


@pytest.fixture
def home(model, tmp_path, monkeypatch):
    """The working directory of the commands: models, a prompt, a text, a folder of benchmark files,
    and two runs without checkpoints.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "small"):
        shutil.copytree(model / name, name)
    write("prompts.txt", "The ship\n")
    write("sea.txt", "Nobody on the quay said a word. " * 30)
    (tmp_path / "data").mkdir()
    write_runs(tmp_path)


@pytest.fixture
def ask(monkeypatch):
    """What a command says when it is run: its error, "" where it did what it was asked."""

    def run(line):
        command, *flags = line.split(" ")
        monkeypatch.setattr(sys, "argv", ["jaxpt", command, *flags])
        try:
            main()
        except SystemExit as left:
            return str(left.code)
        return ""

    return run


def write(path, content):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path, **changes):
    write(path, json.dumps(json.loads(pathlib.Path(path).read_text(encoding="utf-8")) | changes))


def cut(path):
    write(path, pathlib.Path(path).read_bytes()[:5000])


def remove(path):
    path = pathlib.Path(path)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


REFUSED = {  # what is wrong: (how it comes about, what is asked, what is said)
    "no tokenizer, texts": (
        lambda: remove("hf/tokenizer.json"),
        SCORE,
        "hf: has no tokenizer beside it",
    ),
    "no tokenizer, prompts": (
        lambda: remove("hf/tokenizer.json"),
        CONTINUE,
        "hf: has no tokenizer beside it",
    ),
    "a broken tokenizer": (
        lambda: write("hf/tokenizer.json", "{"),
        CONTINUE,
        "hf: cannot be read as a tokenizer",
    ),
    "a tokenizer of more pieces than the model has rows, texts": (
        None,
        SCORE.replace("hf", "small"),
        "the model knows ids 0 to 259",
    ),
    "a tokenizer of more pieces than the model has rows, prompts": (
        None,
        CONTINUE.replace("hf", "small"),
        "the model knows ids 0 to 259",
    ),
    "a config of another vocabulary": (
        lambda: edit("hf/config.json", vocab_size=200),
        SCORE,
        "expected shape (200, 24), got (320, 24)",
    ),
    "a half-written config": (
        lambda: write("hf/config.json", '{"vocab'),
        SCORE,
        "hf/config.json: not valid JSON",
    ),
    "a config that says nothing": (
        lambda: write("hf/config.json", "{}"),
        CONTINUE,
        "model_type: expected gemma2",
    ),
    "no weights": (
        lambda: remove("hf/model.safetensors"),
        CONTINUE,
        "hf/model.safetensors: not found",
    ),
    "weights cut short": (
        lambda: cut("hf/model.safetensors"),
        SCORE,
        "hf/model.safetensors: is truncated",
    ),
    "no model": (None, SCORE.replace("hf", "none"), "none: not found"),
    "a file for a model": (None, SCORE.replace("hf", "sea.txt"), "sea.txt: no such directory"),
    "a folder for a model": (
        None,
        CONTINUE.replace("hf", "data"),
        "data: has no finished checkpoint and no Hugging Face model",
    ),
    "a run without a checkpoint": (
        None,
        SCORE.replace("hf", "base"),
        "base: has no finished checkpoint and no Hugging Face model",
    ),
    "an unknown task": (
        None,
        "evaluate --model hf --tasks course,winogrand",
        "there is no task 'winogrand'; the nearest are: winogrande",
    ),
    "no benchmark files": (
        None,
        WINOGRANDE,
        "winogrande wants eval_winogrande/winogrande.jsonl there",
    ),
    "a task file of another task": (
        lambda: write("data/winogrande.jsonl", '{"question": "1 + 1?", "answer": "2"}'),
        WINOGRANDE,
        "not those of winogrande",
    ),
    "a task file of another schema": (
        lambda: write("data/winogrande.jsonl", '{"context_options": ["a"], "continuation": 3}'),
        WINOGRANDE,
        "record 1 cannot be read",
    ),
    "a task file of lists": (
        lambda: write("data/winogrande.jsonl", "[1, 2]"),
        WINOGRANDE,
        "record 1: expected an object",
    ),
    "a half-written task file": (
        lambda: write("data/winogrande.jsonl", '{"context_options": ["a"'),
        WINOGRANDE,
        "winogrande.jsonl:1: not JSON",
    ),
    "an empty task file": (
        lambda: write("data/winogrande.jsonl", ""),
        WINOGRANDE,
        "its records are not those of winogrande",
    ),
    "a task file that is one object": (
        lambda: write("data/v0_mc_task.json", '{"a": 1}'),
        TRUTHFULQA,
        "expected a JSON list of questions",
    ),
    "a text that is not there": (
        None,
        SCORE.replace("sea.txt", "none.txt"),
        "no file matches none.txt",
    ),
    "an empty text": (lambda: write("sea.txt", ""), SCORE, "holds no text"),
    "bytes for a text": (
        lambda: write("sea.txt", b"\xff\xfe\x00"),
        SCORE,
        "sea.txt: is UTF-16",
    ),
    "no items": (None, f"{SCORE} --limit 0", "--limit: got 0, expected at least 1"),
    "a context of one token": (
        None,
        f"{SCORE} --max-length 1",
        "--max-length: got 1, expected at least 2",
    ),
    "scores into a directory": (
        None,
        f"{SCORE} --to data",
        ("--to data: is a directory. Name the file to write, such as data/results.json"),
    ),
    "scores under a file": (
        None,
        f"{SCORE} --to sea.txt/x.json",
        "--to sea.txt/x.json: cannot be written",
    ),
    "an empty prompt": (
        lambda: write("prompts.txt", "\n  \n"),
        CONTINUE,
        "prompts.txt: holds no prompt",
    ),
    "no prompts": (
        lambda: remove("prompts.txt"),
        CONTINUE,
        "--prompts prompts.txt: cannot be read",
    ),
    "bytes for prompts": (
        lambda: write("prompts.txt", b"\xff\xfe\x00"),
        CONTINUE,
        "--prompts prompts.txt: cannot be read",
    ),
    "prompts of another form": (
        lambda: write("p.json", '{"a": 1}'),
        CONTINUE.replace("prompts.txt", "p.json"),
        "expected a list of strings",
    ),
    "half-written prompts": (
        lambda: write("p.json", '["half'),
        CONTINUE.replace("prompts.txt", "p.json"),
        "p.json: cannot be read",
    ),
    "a prompt beyond the context": (
        lambda: write("prompts.txt", "word " * 99),
        CONTINUE,
        "but the model's context is 48. Shorten it to at most 47",
    ),
    "nothing to add": (None, f"{CONTINUE} --max-new 0", "expected at least 1 new token, got 0"),
    "a temperature below zero": (
        None,
        f"{CONTINUE} --temperature -1",
        "temperature: expected a number",
    ),
    "a penalty of zero": (
        None,
        f"{CONTINUE} --repetition-penalty 0",
        "repetition_penalty: expected a number",
    ),
    "no text to score beside": (
        None,
        f"{CONTINUE} --ppl none.txt",
        "--ppl none.txt: cannot be read",
    ),
    "an empty text to score beside": (
        lambda: write("sea.txt", ""),
        f"{CONTINUE} --ppl sea.txt",
        "--ppl sea.txt: is empty",
    ),
    "samples into a directory": (
        None,
        f"{CONTINUE} --to data",
        ("--to data: is a directory. Name the file to write, such as data/samples.json"),
    ),
    "one model to differ": (
        None,
        "compare --models hf --differ a=text:sea.txt",
        "got 1 models, expected two",
    ),
    "documents too short to differ on": (
        lambda: write("sea.txt", "x"),
        "compare --models hf hf --differ a=text:sea.txt",
        "none of 1 documents has 32 tokens",
    ),
    "no run": (None, "report --workdir none --to x.html", "none: no such directory"),
    "a file for a run": (
        None,
        "report --workdir sea.txt --to x.html",
        "sea.txt: no such directory",
    ),
    "a page into a directory": (
        None,
        "report --workdir base --to data",
        ("--to data: is a directory. Name the file to write, such as data/report.html"),
    ),
    "a page under a file": (
        None,
        "report --workdir base --to sea.txt/x.html",
        "--to sea.txt/x.html: cannot be written",
    ),
    "a port that is none": (
        None,
        "report --workdir base --serve 70000",
        "--serve 70000: cannot listen there",
    ),
    "the lineage of no stage": (None, "report --lineage data", "data: no manifest.json"),
    "the lineage of a model of others": (
        None,
        "report --lineage hf",
        "hf: has no manifest.json, so it was not exported by jaxpt",
    ),
    "the lineage of a half-written manifest": (
        lambda: write("base/manifest.json", "{"),
        "report --lineage base",
        "not a manifest",
    ),
    "a lineage with a half-written manifest": (
        lambda: write("base/manifest.json", "{"),
        "report --lineage child --verify",
        "base/manifest.json: expected JSON",
    ),
    "a lineage with a manifest of another form": (
        lambda: write("base/manifest.json", '{"fingerprint": 3}'),
        "report --lineage child",
        "expected 'fingerprint', 'inputs'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_one_sentence(name, home, ask):
    harm, line, says = REFUSED[name]
    if "--data-dir" in line or "course" in line:
        pytest.importorskip("lm_eval")
    if harm:
        harm()
    said = ask(line)
    assert said.startswith("error: ") and says in said and "\n" not in said, said


HEAD = '{"step": 1, "loss": 2.0}\n'
SHOWN = {  # what is wrong: (how it comes about, what the page says of it)
    "metrics that are no numbers": (
        lambda: write(
            "base/metrics.jsonl",
            '{"step": 7, "loss": NaN, "grad_norm": Infinity, "lr": NaN, "seconds": NaN}\n'
            '{"step": 8, "heldout": {"prose": NaN}}',
        ),
        "the loss is not finite in 1 of 1 records, first at step 7",
    ),
    "half-written metrics": (
        lambda: write("base/metrics.jsonl", HEAD + '{"step": 2, "lo'),
        "the last line is half-written",
    ),
    "metrics of another form": (
        lambda: write(
            "base/metrics.jsonl",
            '[1]\n3\n{"loss": 3}\n{"step": "3"}\n{"step": 4, "heldout": 3}\n' + HEAD,
        ),
        "5 lines cannot be read, the first is line 1",
    ),
    "metrics in words": (
        lambda: write(
            "base/metrics.jsonl",
            '{"step": 1, "loss": "high", "lr": [], "n_skipped": "x", "usd": {}}',
        ),
        "metrics.jsonl: the last line is half-written",
    ),
    "bytes for metrics": (
        lambda: write("base/metrics.jsonl", b"\x00\xff\xfe" * 99),
        "metrics.jsonl: the last line is half-written",
    ),
    "a run without evaluations": (
        lambda: [remove("base/eval"), remove("child/eval")],
        "Evaluation: no eval/NAME.json, written by jaxpt evaluate.",
    ),
    "a run of nothing": (
        lambda: [
            remove("base"),
            remove("child"),
            pathlib.Path("base").mkdir(),
            pathlib.Path("child").mkdir(),
        ],
        "Loss: no metrics.jsonl, written by jaxpt train.",
    ),
    "a half-written evaluation": (
        lambda: write("base/eval/jax.json", '{"resu'),
        "base/eval/jax.json: expected JSON",
    ),
    "an evaluation of another form": (
        lambda: write("base/eval/jax.json", '{"results": {"a": 3}, "lineage": [], "model": 3}'),
        "eval/jax.json: has an unexpected form",
    ),
    "samples of another form": (
        lambda: write(
            "child/eval/samples.json", '{"prompts": [{"prompt": 3, "outputs": [{"model": "x"}]}]}'
        ),
        "samples.json: has an unexpected form",
    ),
    "differences of another form": (
        lambda: write(
            "child/eval/differences.json", '{"models": ["a"], "better": [{}], "worse": []}'
        ),
        "differences.json: has an unexpected form",
    ),
    "a shape in words": (
        lambda: edit("base/spec.json", n_layers="many"),
        "base/spec.json: has an unexpected form",
    ),
    "a config of another form": (
        lambda: write("base/config.json", '{"mixture": {"phases": 3}, "train": 4}'),
        "config.json: has an unexpected form",
    ),
    "a manifest that was read from nothing": (
        lambda: edit("base/manifest.json", inputs={"a": 3, "b": {"path": 3}}),
        "",
    ),
    "a manifest of other counts": (
        lambda: edit("base/packed/manifest.json", counts={"train": 3}),
        "packed/manifest.json: has an unexpected form",
    ),
    "a funnel of another form": (
        lambda: write("base/corpus/funnel.json", '{"sources": ["prose"], "steps": [{"rule": 3}]}'),
        "funnel.json: has an unexpected form",
    ),
    "a plan of another form": (
        lambda: write("child/plan.json", '{"targets": [3]}'),
        "plan.json: has an unexpected form",
    ),
    "phases of another form": (
        lambda: write("base/phases.json", '[{"step": "x"}]'),
        "its mixture cannot be read from phases.json",
    ),
    "a file for a directory": (
        lambda: [remove("child/eval"), write("child/eval", "x")],
        "Samples: no eval/samples.json",
    ),
    "a directory for a file": (
        lambda: [remove("base/spec.json"), pathlib.Path("base/spec.json").mkdir()],
        "base/spec.json: could not be read",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_cannot_be_shown_is_said_on_the_page(name, home, ask, output):
    harm, says = SHOWN[name]
    harm()
    assert ask("report --workdir base child --to page.html") == ""
    page = Page(pathlib.Path("page.html"))
    assert "Summary" in page.found["h2"] and says in page.text, page.found.get("li")
    assert "page.html  (" in output(), "the terminal has its table"

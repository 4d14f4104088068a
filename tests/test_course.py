"""The pages of the course: committed whole, and what they show is what a run of them gives."""

import importlib
import json
import math
import os
import pathlib
import re
import socket

import jax.numpy as jnp
import pytest
import tokenizers
import transformers
from conftest import ROOT
from test_architecture import RATE, WORDS
from test_hub import contents, server  # noqa: F401

from jaxpt.model import transformer
from jaxpt.spec import ModelSpec
from jaxpt.weights import huggingface

COURSE = ROOT / "docs/course"
PAGES = sorted(COURSE.glob("*.ipynb"))
MAX_BYTES = 300_000


@pytest.fixture
def course(monkeypatch):
    """Import a module of docs/course."""
    pytest.importorskip("nbclient", reason="requirements-test.txt runs the pages")
    pytest.importorskip("matplotlib", reason="requirements-test.txt runs the pages")
    monkeypatch.syspath_prepend(str(COURSE))
    return importlib.import_module


def read_cells(page):
    return json.loads(page.read_text(encoding="utf-8"))["cells"]


def list_code(page):
    return [cell for cell in read_cells(page) if cell["cell_type"] == "code"]


def test_there_is_a_page_per_lesson():
    assert [page.name[:7] for page in PAGES] == [f"lesson{n}" for n in range(1, 7)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_committed_with_the_outputs_of_one_run(page):
    assert page.stat().st_size <= MAX_BYTES
    cells = list_code(page)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    types = {kind for output in outputs for kind in output.get("data", ())}
    assert {"image/png", "application/vnd.jaxpt.figures+json"} <= types
    shown = "".join("".join(output.get("text", ())) for output in outputs)
    assert not re.search(r"/(?:tmp|root|home)/", shown), page


def test_pages_differ_in_nothing_where_they_begin():
    for first in zip(*[list_code(page)[:2] for page in PAGES], strict=True):
        assert len({"".join(cell["source"]) for cell in first}) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_uses_the_words_of_the_field(page):
    text = "\n".join("".join(cell["source"]) for cell in read_cells(page))
    assert not re.findall(f"{WORDS}|{RATE}", text, re.IGNORECASE)


def test_a_page_may_be_given_another_text_when_it_has_run(course, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("TEXT", "RECIPES", "PATH", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    lesson = course("lesson")
    monkeypatch.setattr(lesson, "PLACE", tmp_path)
    (tmp_path / "clone/configs").mkdir(parents=True)
    for text in ("python:prose", "text:mine/*.txt", "python:prose"):
        lesson.start("clone", text)
        assert pathlib.Path.cwd().parent == tmp_path
        assert os.environ["RECIPES"] == str(tmp_path / "clone/configs")
        assert os.environ["TEXT"] == text.replace("mine", f"{tmp_path}/mine")
    assert len(list(tmp_path.glob("course-*"))) == 2


def test_a_hub_that_does_not_answer_is_given_up_soon(course, monkeypatch):
    from huggingface_hub import constants

    lesson = course("lesson")
    monkeypatch.setattr(lesson, "HUB_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert lesson.download("org/model") == []


@pytest.mark.slow
def test_a_run_of_the_pages_gives_the_figures_that_they_show(course, tmp_path, capsys):
    execute = course("execute")
    far = []
    with capsys.disabled():
        notebooks = execute.execute_pages(tmp_path)
    for page, notebook in notebooks.items():
        shown = execute.read_figures(execute.nbformat.read(page, as_version=4))
        found = execute.read_figures(notebook)
        assert found.keys() == shown.keys()
        for name, figure in shown.items():
            value = found[name]["here"]
            if abs(value - figure["here"]) > figure["within"]:
                far.append(f"{page.name}: {name}: {value}, expected {figure}")
    assert not far


@pytest.mark.slow
def test_pages_take_the_courses_models_where_the_hub_answers(
    course,
    data_dir,
    tmp_path,
    server,  # noqa: F811
    monkeypatch,
    one,
):
    """Models of TinySolar's 12 layers, 32 wide, under the names of the course's."""
    spec = ModelSpec(
        n_layers=12,
        d_model=32,
        d_ff=64,
        n_heads=2,
        n_kv_heads=1,
        d_head=16,
        vocab_size=300,
        max_seq_len=128,
    )
    words = tokenizers.ByteLevelBPETokenizer()
    words.train_from_iterator(["def find_max(numbers):"], 300, special_tokens=["<s>", "</s>"])
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    for seed, name in enumerate(("", "-code-instruct", "-py")):
        directory = tmp_path / f"model{seed}"
        params = transformer.init_params(spec, seed, one, jnp.bfloat16)
        huggingface.write_hf_model(spec, params, directory)
        words.save_pretrained(directory)
        server.commit(f"upstage/TinySolar-248m-4k{name}", contents(directory))
    for name, value in {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("JAXPT_TEST_DATA", str(data_dir))
    execute = course("execute")
    for page in (PAGES[0], PAGES[5]):
        notebook = execute.execute_page(page, tmp_path)
        shown = "".join(
            output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
        )
        assert "stand-in" not in shown and "TinySolar-248m-4k" in shown
        assert all(math.isfinite(each["here"]) for each in execute.read_figures(notebook).values())


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_a_page_runs_on_other_text_with_one_line_changed(course, tmp_path, number):
    execute = course("execute")
    documents = tmp_path / "documents"
    documents.mkdir()
    for i in range(40):
        lines = [
            f"Letter {i} tells of day {j}, which was as fine as day {j * i}." for j in range(60)
        ]
        (documents / f"{i}.txt").write_text("\n".join(lines))
    page = PAGES[number - 1]
    text = page.read_text(encoding="utf-8")
    changed = text.replace('TEXT = \\"python:prose\\"', f'TEXT = \\"text:{documents}/*.txt\\"')
    assert changed != text
    other = tmp_path / page.name
    other.write_text(changed, encoding="utf-8")
    assert execute.read_figures(execute.execute_page(other, tmp_path))

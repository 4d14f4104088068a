"""A stage runs once, publishes whole, skips what is done and refuses to overwrite what is other."""

import json
import logging
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from jaxpt import io, logs, stage
from jaxpt.spec import UserError


def write(counts):
    def work(out):
        (out / "rows.txt").write_text("a\nb\n")
        counts.append(1)
        return {"rows": 2, "tokenizer": "f" * 16}

    return work


def pack(out, runs, config=None, inputs=None, replace=False):
    config = config or {"seq_len": 20}
    return stage.run_stage(
        "pack", out, write(runs), config=config, inputs=inputs or {}, replace=replace
    )


def test_a_finished_stage_is_not_done_again(tmp_path):
    runs, source = [], tmp_path / "in.txt"
    source.write_text("text")
    first = stage.run_stage(
        "pack",
        tmp_path / "out",
        write(runs),
        config={"seq_len": 20},
        inputs={"text": source},
        seed=3,
    )
    second = stage.run_stage(
        "pack",
        tmp_path / "out",
        write(runs),
        config={"seq_len": 20},
        inputs={"text": source},
        seed=3,
    )
    assert len(runs) == 1
    assert first == second == stage.read_manifest(tmp_path / "out")
    assert first.counts == {"rows": 2} and first.tokenizer == "f" * 16
    assert first.outputs == {"rows.txt": io.sha256(tmp_path / "out/rows.txt")}


@pytest.mark.parametrize("change", ["config", "input", "seed"])
def test_another_request_is_refused_with_what_differs_and_nothing_is_lost(tmp_path, change):
    source = tmp_path / "in.txt"
    source.write_text("text")
    stage.run_stage(
        "pack",
        tmp_path / "out",
        write([]),
        config={"pack": {"seq_len": 20, "margin": 7}},
        inputs={"text": source},
        seed=3,
    )
    if change == "input":
        source.write_text("other text")
    asked = {
        "config": {"pack": {"seq_len": 24 if change == "config" else 20, "margin": 7}},
        "inputs": {"text": source},
        "seed": 5 if change == "seed" else 3,
    }
    with pytest.raises(
        UserError,
        match={
            "config": r"\(pack.seq_len: 20 there, 24 requested\)",
            "input": "another input",
            "seed": "seed 3 there; seed 5 requested",
        }[change],
    ):
        stage.run_stage("pack", tmp_path / "out", write([]), **asked)
    assert (tmp_path / "out/rows.txt").exists()
    stage.run_stage("pack", tmp_path / "out", write([]), replace=True, **asked)


def test_a_stage_that_died_never_looks_finished_and_finds_its_own_work(tmp_path):
    def dies(out):
        (out / "half.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        stage.run_stage("pack", tmp_path / "out", dies, config={"seq_len": 20}, inputs={})
    assert not (tmp_path / "out").exists()
    found = []
    stage.run_stage(
        "pack",
        tmp_path / "out",
        lambda out: found.append((out / "half.txt").exists()) or {},
        config={"seq_len": 20},
        inputs={},
    )
    assert found == [True]


def test_partial_work_of_another_request_is_thrown_away(tmp_path):
    def dies(out):
        (out / "half.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        stage.run_stage("pack", tmp_path / "out", dies, config={"seq_len": 20}, inputs={})
    found = []
    stage.run_stage(
        "pack",
        tmp_path / "out",
        lambda out: found.append((out / "half.txt").exists()) or {},
        config={"seq_len": 24},
        inputs={},
    )
    assert found == [False]


def test_equal_work_has_equal_fingerprints_in_any_place(tmp_path):
    prints = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        source = tmp_path / place / f"{place}.txt"
        source.write_text("text")
        prints.append(
            stage.run_stage(
                "pack",
                tmp_path / place / "out",
                write([]),
                config={"seq_len": 20},
                inputs={"text": source},
            ).fingerprint
        )
    assert prints[0] == prints[1]


def test_files_of_nobody_are_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no stage wrote"):
        stage.run_stage("pack", tmp_path / "out", write([]), config={}, inputs={})
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "{}", json.dumps({"stage": "pack"})])
def test_a_broken_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not a manifest"):
        stage.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"), [("", "has 0 bytes, expected 4"), (None, "is missing")]
)
def test_a_finished_stage_without_its_bytes_is_not_finished(tmp_path, text, reason):
    out, runs = tmp_path / "out", []
    pack(out, runs)
    if text is None:
        (out / "rows.txt").unlink()
    else:
        (out / "rows.txt").write_text(text)
    with pytest.raises(UserError, match=f"rows.txt {reason}.*--replace"):
        pack(out, runs)
    assert len(runs) == 1
    pack(out, runs, replace=True)
    assert len(runs) == 2 and (out / "rows.txt").read_text() == "a\nb\n"


def test_other_bytes_of_the_same_size_are_found_where_checksums_are_asked_for(tmp_path, caplog):
    out, runs = tmp_path / "out", []
    asked = {"config": {"seq_len": 20}, "inputs": {}}
    pack(out, runs)
    with caplog.at_level(logging.INFO):
        stage.run_stage("pack", out, write(runs), **asked, verify=True)
    assert "checksums verified" in caplog.text
    (out / "rows.txt").write_text("a\nc\n")
    pack(out, runs)  # sizes are all that it looks at
    with pytest.raises(UserError, match=r"rows.txt was changed \(its checksum.*--replace"):
        stage.run_stage("pack", out, write(runs), **asked, verify=True)
    assert len(runs) == 1
    stage.run_stage("pack", out, write(runs), **asked, verify=True, replace=True)
    assert (out / "rows.txt").read_text() == "a\nb\n"


def test_replace_keeps_what_no_stage_wrote(tmp_path, caplog):
    out = tmp_path / "out"
    pack(out, [])
    (out / "notes.txt").write_text("mine")
    (tmp_path / "neighbor.txt").write_text("mine too")
    with caplog.at_level(logging.INFO):
        pack(out, [], config={"seq_len": 24}, replace=True)
    assert "replacing the 1 files" in caplog.text and str(out) in caplog.text
    assert (out / "notes.txt").read_text() == "mine"
    assert (tmp_path / "neighbor.txt").read_text() == "mine too"


def test_replace_takes_the_result_of_no_other_stage_and_no_strangers_files(tmp_path):
    run, strangers = tmp_path / "run", tmp_path / "strangers"
    stage.run_stage("train", run, write([]), config={}, inputs={})
    strangers.mkdir()
    (strangers / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="the result of train, and --replace overwrites only"):
        pack(run, [], replace=True)
    with pytest.raises(UserError, match="no stage wrote"):
        pack(strangers, [], replace=True)
    assert (run / "rows.txt").exists() and (strangers / "thesis.txt").exists()


@pytest.mark.parametrize("place", ["model", "."])
def test_an_output_is_no_input_and_holds_none(tmp_path, place):
    model = tmp_path / "models/model"
    pack(model, [])
    before = io.list_files(tmp_path)
    with pytest.raises(UserError, match="Give another output"):
        pack(tmp_path / "models" / place, [], inputs={"model": model}, replace=True)
    assert io.list_files(tmp_path) == before


def test_a_second_start_learns_who_is_at_work(tmp_path):
    out, refused = tmp_path / "out", []

    def start_again(working):
        with pytest.raises(UserError) as error:
            pack(out, [])
        refused.append(str(error.value))
        return {}

    stage.run_stage("pack", out, start_again, config={"seq_len": 20}, inputs={})
    assert f"in use by process {os.getpid()}" in refused[0]


def test_a_skip_writes_nothing(tmp_path):
    """The result may be on a disk that is mounted for reading."""
    pack(tmp_path / "out", [])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    pack(tmp_path / "out", [])
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_a_file_is_no_stage(tmp_path):
    """Lineage follows inputs to their end, which is a user's own file."""
    (tmp_path / "docs.jsonl").write_text("{}")
    with pytest.raises(UserError, match="no stage has finished"):
        stage.read_manifest(tmp_path / "docs.jsonl")


def test_a_message_comes_once_whatever_a_library_does_to_the_root_logger(logger, capsys):
    logs.set_up_logging()
    at_root = logging.StreamHandler()  # as logging.basicConfig adds
    logging.getLogger().addHandler(at_root)
    try:
        logger.info("step 37 of 41")
    finally:
        logging.getLogger().removeHandler(at_root)
    assert capsys.readouterr().err.count("step 37 of 41") == 1


@pytest.mark.parametrize("where", ["import imported", "gc.collect()"])
def test_an_interrupt_waits_until_no_harm_is_done_and_ends_in_one_sentence(tmp_path, where):
    """It crashes an import of jax, and is lost in a callback; what atexit has to do is done."""
    kill = (
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsum(range(9**6))\nprint('whole')"
    )
    (tmp_path / "imported.py").write_text(kill)
    code = f"""
import atexit, gc, time
from jaxpt import stage

def clean(phase, info):
    if phase == "start" and "gc" in {where!r}:
        exec({kill!r})

def main():
    gc.collect()
    gc.callbacks.append(clean)
    {where}
    gc.callbacks.remove(clean)
    atexit.register(print, "left")
    time.sleep(60)

stage.entry_point(main)
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode == 130
    assert done.stdout.split() == ["whole", "left"]
    assert done.stderr.count("\n") == 1 and "interrupted; finished work is kept" in done.stderr

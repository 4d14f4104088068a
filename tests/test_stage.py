"""A stage runs once, publishes whole, skips what is done and refuses to overwrite what is other."""

import json
import logging

import pytest

from jaxpt import logs, stage
from jaxpt.spec import Manifest, UserError


def write(counts):
    def work(out):
        (out / "rows.txt").write_text("a\nb\n")
        counts.append(1)
        return {"rows": 2, "tokenizer": "f" * 16}

    return work


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
    assert first == second == Manifest.load(tmp_path / "out")
    assert first.counts == {"rows": 2} and first.tokenizer == "f" * 16
    assert first.outputs == {"rows.txt": stage.sha256_file(tmp_path / "out/rows.txt")}


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
        Manifest.load(tmp_path)


def test_an_object_store_is_refused_by_name():
    with pytest.raises(UserError, match="gs://bucket/run"):
        stage.local_path("gs://bucket/run")


def test_a_file_is_no_stage(tmp_path):
    """Lineage follows inputs to their end, which is a user's own file."""
    (tmp_path / "docs.jsonl").write_text("{}")
    with pytest.raises(UserError, match="no stage has finished"):
        Manifest.load(tmp_path / "docs.jsonl")


def test_a_message_comes_once_whatever_a_library_does_to_the_root_logger(logger, capsys):
    logs.set_up_logging()
    at_root = logging.StreamHandler()  # as logging.basicConfig adds
    logging.getLogger().addHandler(at_root)
    try:
        logger.info("step 37 of 41")
    finally:
        logging.getLogger().removeHandler(at_root)
    assert capsys.readouterr().err.count("step 37 of 41") == 1

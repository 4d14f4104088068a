"""The whole pipeline at toy size, through its commands: raw text to an evaluated, grown and
specialised model, killed and resumed on the way.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import entry_points
import numpy as np
import pytest
from conftest import ROOT

from jaxpt.data import loader, tokenizer
from jaxpt.evaluate import attribution
from jaxpt.spec import UserError
from jaxpt.stage import fingerprint, read_manifest, read_spec, request_fingerprint
from jaxpt.train.metrics import read_metrics
from jaxpt.train.records import HeldoutMetrics, ResumeEvent, TrainMetrics
from jaxpt.weights import checkpoint

RECIPE = """
from jaxpt.config import defaults
def get_config(model="base"):
    c = defaults()
    c.prepare.sources = ("python:prose", "python:code")
    c.prepare.max_mb = 0.3
    c.prepare.heldout_frac = 0.2
    c.tokenizer.vocab_size = 500
    c.pack.seq_len = 64
    c.model.n_layers, c.model.d_model, c.model.d_ff = 3, 24, 40
    c.model.n_heads, c.model.n_kv_heads, c.model.d_head = 6, 2, 8
    c.model.max_seq_len, c.model.tie_embeddings = 64, True
    c.mixture.phases = ((0, {"prose": 1.0}),)
    c.train.steps, c.train.batch_size, c.train.log_every, c.train.eval_every = 122, 24, 8, 61
    c.train.checkpoint_every, c.train.eval_sequences = 30, 16
    c.optim.peak_lr, c.optim.warmup_frac = 1e-2, 0.08
    if model == "child":
        c.mixture.packed_paths = ("base/packed",)
        c.mixture.phases = ((0, {"code": 1.0}), (61, {"code": 0.5, "prose": 0.5}))
        c.initialize.source = "grown"
    return c
"""
VARIES = {"tokens_per_second", "step_seconds", "mfu", "memory_bytes", "seconds", "usd"}
VARIES |= {"productive_seconds", "productive_usd", "data_seconds", "start_seconds"}
VARIES |= {"evaluation_seconds", "save_seconds", "lost_seconds", "goodput"}


# Trainings run here, one after the other: with one device, unlike the other commands, and without a
# start's imports. Runs that are
# killed, and their next starts, have processes of their own.
TRAINING = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def run_command(name, *arguments, cwd, ok=True):
    """What a run_command says."""
    call = name, [str(word) for word in arguments], cwd
    status, printed = (
        TRAINING.submit(entry_points.run_command, *call).result()
        if name == "train"
        else entry_points.run_command(*call)
    )
    assert (status == 0) == ok and "Traceback" not in printed, (
        f"{name} {arguments}: status {status}\n{printed}"
    )
    return printed


@pytest.fixture(scope="module")
def pipeline(texts, tmp_path_factory):
    """A directory in which the pipeline was walked to its end."""
    cwd = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(texts / "base", cwd / "base")
    (cwd / "toy.py").write_text(RECIPE)
    (cwd / "prompts.txt").write_text("I am an engineer. I love\ndef find_max(numbers):\n")
    run_command("train", "--config", "toy.py", "--workdir", "base", cwd=cwd)
    run_command(
        "initialize", "--from", "base", "--grow", "depth_upscale(m=1)", "--to", "grown", cwd=cwd
    )
    run_command("train", "--config", "toy.py:child", "--workdir", "child", cwd=cwd)
    for model in ("base", "child"):
        run_command("export_hf", "--from", model, "--to", f"{model}/hf", cwd=cwd)
        for backend in ("jax", "hf"):
            tasks = [
                f"bits_per_byte/{name}=parquet:base/corpus/heldout/{name}-*.parquet#text"
                for name in ("prose", "code")
            ]
            run_command(
                "evaluate",
                "--model",
                f"{model}/hf",
                "--tasks",
                *tasks,
                "--backend",
                backend,
                "--to",
                f"{model}/eval/{backend}.json",
                cwd=cwd,
            )
    run_command(
        "compare",
        "--models",
        "base",
        "child",
        "--prompts",
        "prompts.txt",
        "--max-new",
        "8",
        "--to",
        "child/eval/samples.json",
        cwd=cwd,
    )
    run_command("report", "--workdir", "base", "child", "--to", "report.html", cwd=cwd)
    yield cwd
    TRAINING.shutdown()


def scores(pipeline, model, backend):
    results = json.loads((pipeline / model / "eval" / f"{backend}.json").read_text())["results"]
    return {
        name: results[f"bits_per_byte/{name}"]["bits_per_byte,none"] for name in ("prose", "code")
    }


def test_both_models_learned_and_the_child_knows_more_code(pipeline):
    unigram = {
        name: found["unigram_nats"]
        for name, found in read_manifest(pipeline / "base/packed").counts["heldout"].items()
    }
    assert read_manifest(pipeline / "base").counts["heldout_loss"]["prose"] < unigram["prose"]
    assert scores(pipeline, "child", "jax")["code"] < scores(pipeline, "base", "jax")["code"]


def test_jaxpt_and_transformers_measure_the_same(pipeline):
    for model in ("base", "child"):
        ours, theirs = scores(pipeline, model, "jax"), scores(pipeline, model, "hf")
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_the_child_is_grown_from_the_base_and_says_how(pipeline):
    growth = json.loads((pipeline / "child/growth.json").read_text())
    assert growth["layer_map"] == [0, 1, 1, 2] and growth["parent"].endswith("base")
    assert read_spec(pipeline / "child/spec.json").n_layers == 4
    start = next(
        record
        for record in read_metrics(pipeline / "child/metrics.jsonl")
        if isinstance(record, HeldoutMetrics)
    )
    assert start.step == 0 and start.heldout_loss == pytest.approx(
        growth["heldout_loss"]["child"], rel=1e-5
    )
    assert start.parent_loss == growth["heldout_loss"]["parent"]
    assert read_manifest(pipeline / "child").counts["heldout_loss"] != start.heldout_loss
    assert read_manifest(pipeline / "child/checkpoints/122").counts["new_params"]["axes"] == {
        "layers": {"size": 4, "new": [[2, 3]]}
    }
    assert (
        growth["probe"]["n_steps"] == 20
        and growth["probe"]["child"]["prose"] < growth["heldout_loss"]["child"]["prose"] + 0.1
    )
    assert len(growth["layers"]["child"]) == 4 and growth["copy_similarity"][0]["layers"] == [1, 2]
    assert (
        growth["verdict"].startswith("healthy")
        and growth["flops_per_token"]["child"] > growth["flops_per_token"]["parent"]
    )


def test_every_stage_names_what_it_was_made_from(pipeline):
    """From the export back to the corpus, fingerprint by fingerprint."""
    seen, path = [], pipeline / "child/hf"
    while True:
        manifest = read_manifest(path)
        seen.append(manifest.stage)
        following = [
            found
            for name, found in manifest.inputs.items()
            if name != "tokenizer" and not name.startswith("packed")
        ] or [*manifest.inputs.values()]
        if not following or not pathlib.Path(pipeline / following[0]["path"]).is_dir():
            break
        path = pipeline / following[0]["path"]
        assert read_manifest(path).fingerprint == following[0]["fingerprint"]
    assert seen == ["export", "train", "initialize", "train", "pack", "prepare"]


def test_an_export_tells_its_whole_lineage_and_all_of_it_holds(pipeline):
    printed = run_command("report", "--lineage", "child/hf", "--verify", cwd=pipeline)
    for place in (
        "child/hf",
        "child",
        "grown",
        "base",
        "base/packed",
        "base/corpus",
        "base/tokenizer",
    ):
        assert f"{pipeline / place}  {read_manifest(pipeline / place).fingerprint}" in printed, (
            place
        )
    assert (
        "grown by depth_upscale(m=1)" in printed
        and "from python:prose, python:code; rules: none" in printed
    )
    assert printed.count("verified: ") == 7 and "not verified" not in printed


def test_lineage_names_the_variables_of_a_runs_last_start(pipeline, tmp_path):
    shutil.copytree(pipeline / "base", tmp_path / "base", symlinks=True)
    assert "environment" not in run_command("report", "--lineage", "base", cwd=tmp_path)
    starts = tmp_path / "base/starts.jsonl"
    last = json.loads(starts.read_text().splitlines()[-1])
    flags = {"XLA_FLAGS": "--xla_a=1 --xla_b=2"}
    for variables in ({"XLA_FLAGS": "--xla_old=1"}, flags):
        with open(starts, "a", encoding="utf-8") as file:
            file.write(json.dumps(last | {"variables": variables}) + "\n")
    with open(starts, "a", encoding="utf-8") as file:
        file.write('{"variables": {"XLA')
    printed = run_command("report", "--lineage", "base", cwd=tmp_path)
    assert "environment: XLA_FLAGS='--xla_a=1 --xla_b=2'" in printed


@pytest.mark.parametrize(
    ("file", "harm", "answer"),
    [
        (
            "child/hf/config.json",
            lambda text: text.replace(b"64", b"65"),
            "hf/config.json: its checksum differs from the manifest's",
        ),
        (
            "child/tokenizer/tokenizer.json",
            lambda text: text + b" ",
            "tokenizer/tokenizer.json: its checksum differs from the manifest's",
        ),
        (
            "base/corpus/funnel.json",
            lambda text: text + b" ",
            "funnel.json: its checksum differs from the manifest's",
        ),
        (
            "base/packed/manifest.json",
            lambda text: text.replace(b'"seq_len": 64', b'"seq_len": 32', 1),
            "manifest.json: its fingerprint does not match its content",
        ),
        (
            "base/tokenizer/tokenizer.json",
            None,
            "tokenizer.json: missing, though the manifest names it",
        ),
    ],
)
def test_the_first_stage_of_a_lineage_that_does_not_hold_is_named(
    pipeline, tmp_path, file, harm, answer
):
    for place in ("child", "grown", "base"):
        shutil.copytree(pipeline / place, tmp_path / place)
    harmed = tmp_path / file
    if harm:
        harmed.write_bytes(harm(harmed.read_bytes()))
    else:
        harmed.unlink()
    assert answer in run_command(
        "report", "--lineage", "child/hf", "--verify", cwd=tmp_path, ok=False
    )
    for place in ("child", "grown", "base"):
        shutil.rmtree(
            tmp_path / place
        )  # gigabytes otherwise lie where pytest keeps three runs' folders


def test_a_checkpoint_tells_its_lineage_before_its_run_has_ended(pipeline, tmp_path):
    shutil.copytree(pipeline / "base", tmp_path / "base")
    (tmp_path / "base/manifest.json").unlink()
    run_command("export_hf", "--from", "base/checkpoints/120", "--to", "hf", cwd=tmp_path)
    printed = run_command("report", "--lineage", "hf", "--verify", cwd=tmp_path)
    assert (
        "base/checkpoints/120" in printed
        and "its run has not finished" in printed
        and "prepare" in printed
    )


def test_the_export_opens_elsewhere(pipeline):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(pipeline / "child/hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(pipeline / "child/hf")
    ids = tokenizer("def find_max(numbers):", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        assert model(ids).logits.shape == (1, ids.shape[1], 512)
    assert "| initialize |" in (pipeline / "child/hf/README.md").read_text()


def test_packed_rows_open_in_datasets(pipeline):
    import datasets

    rows = datasets.load_from_disk(str(pipeline / "base/packed/train/prose"))
    assert len(rows[0]["input_ids"]) == 64 and sum(rows[0]["doc_lens"]) <= 64


def test_finished_stages_are_skipped(pipeline):
    before = {path: path.stat().st_mtime_ns for path in pipeline.rglob("*.safetensors")}
    for stage in ("prepare", "train_tokenizer", "pack", "train"):
        assert "nothing to do" in run_command(
            stage, "--config", "toy.py", "--workdir", "base", cwd=pipeline
        )
    assert "nothing to do" in run_command(
        "export_hf", "--from", "base", "--to", "base/hf", cwd=pipeline
    )
    tasks = [
        f"bits_per_byte/{name}=parquet:base/corpus/heldout/{name}-*.parquet#text"
        for name in ("prose", "code")
    ]
    assert "nothing to do" in run_command(
        "evaluate",
        "--model",
        "base/hf",
        "--tasks",
        *tasks,
        "--backend",
        "jax",
        "--to",
        "base/eval/jax.json",
        cwd=pipeline,
    )
    samples = ("--prompts", "prompts.txt", "--max-new", "8", "--to", "child/eval/samples.json")
    assert "nothing to do" in run_command(
        "compare", "--models", "base", "child", *samples, cwd=pipeline
    )
    assert before == {path: path.stat().st_mtime_ns for path in pipeline.rglob("*.safetensors")}
    printed = run_command(
        "train",
        "--config",
        "toy.py",
        "--workdir",
        "base",
        "--config.optim.peak_lr=0.5",
        cwd=pipeline,
        ok=False,
    )
    assert "peak_lr" in printed and "another --workdir" in printed


def test_the_page_is_there_and_shows_both(pipeline):
    page = (pipeline / "report.html").read_text()
    assert "base" in page and "child" in page and "find_max" in page


def without_speed(records):
    return [
        {key: value for key, value in record.to_json().items() if key not in VARIES}
        for record in records
        if not isinstance(record, ResumeEvent)
    ]


def killed_run(pipeline, workdir, kill):
    """Train the base again in `workdir`, killed once by `kill(process, run)`, then to its end."""
    command = [
        sys.executable,
        ROOT / "scripts/train.py",
        "--config",
        "toy.py",
        "--workdir",
        workdir,
        "--config.mixture.packed_paths=base/packed",
    ]
    start = lambda: subprocess.Popen(
        command, cwd=pipeline, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    process = start()
    kill(process, pipeline / workdir)
    process.communicate()
    assert process.returncode != 0 and not (pipeline / workdir / "manifest.json").exists()
    process = start()
    assert "resumed from" in process.communicate()[0] and process.returncode == 0


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


GROWS = [
    "--config",
    "toy.py",
    "--config.mixture.packed_paths=base/packed",
    "--config.train.max_to_keep=9",
    "--config.train.steps=100",
    "--config.train.checkpoint_every=20",
    "--config.train.grow=((50, 'depth_upscale(m=1)'), (70, 'insert_identity(every=4)'))",
]


@pytest.fixture(scope="module")
def grows(pipeline):
    """A run that grew twice on its way, at steps 50 and 70."""
    assert "grown by depth_upscale(m=1)" in run_command(
        "train", *GROWS, "--workdir", "grows", cwd=pipeline
    )
    return pipeline / "grows"


def test_a_run_that_grows_on_its_way_says_how(grows):
    assert read_spec(grows / "spec.json").n_layers == 5
    assert {
        step: read_spec(grows / f"checkpoints/{step}/spec.json").n_layers for step in (40, 60, 100)
    } == {40: 3, 60: 4, 100: 5}
    growth = json.loads((grows / "growth.json").read_text())
    assert (
        growth["at_step"] == 70 and growth["moments"] == "reset_new" and growth["new_layers"] == [4]
    )


def test_a_run_may_begin_without_layers(pipeline):
    """Embedding, norm and head alone, then one late jump; cut between the two."""
    flags = [
        "--config",
        "toy.py",
        "--config.mixture.packed_paths=base/packed",
        "--config.model.n_layers=0",
        "--config.train.grow=((31, 'deepen(L=3)'),)",
    ]
    flags += ["--config.train.steps=40", "--config.train.checkpoint_every=20", "--workdir", "none"]
    assert "3 layers" in run_command("train", *flags, cwd=pipeline)
    whole = pipeline / "none_whole"
    (pipeline / "none").rename(whole)
    shutil.copytree(whole, pipeline / "none")
    for gone in (
        "manifest.json",
        "checkpoints/40/manifest.json",
    ):  # as a kill before the last checkpoint was whole leaves it
        (pipeline / "none" / gone).unlink()
    assert "0 layers" in run_command("train", *flags, cwd=pipeline)
    assert (
        checkpoint.diff_checkpoints(whole / "checkpoints/40", pipeline / "none/checkpoints/40")
        == []
    )


def test_another_run_that_goes_on_between_two_growths_makes_the_second_alone(pipeline, grows):
    more = ["--config.initialize.source=grows/checkpoints/60", "--config.initialize.mode=resume"]
    run_command("train", *GROWS, *more, "--workdir", "grows_on", cwd=pipeline)
    assert (
        checkpoint.diff_checkpoints(
            grows / "checkpoints/100", pipeline / "grows_on/checkpoints/100"
        )
        == []
    )


def test_what_a_start_keeps_is_what_its_table_says(pipeline):
    """From the base at step 120: resume is the base's own end; grow goes on at its step and rows;
    continue begins again.
    """
    flags = [
        "--config",
        "toy.py",
        "--config.mixture.packed_paths=base/packed",
        "--config.initialize.source=base/checkpoints/120",
    ]
    printed = run_command(
        "train",
        *flags,
        "--config.initialize.mode=resume",
        "--workdir",
        "start_resume",
        cwd=pipeline,
    )
    assert "step          kept: 120" in printed and f"sequences     kept: {120 * 24:,}" in printed
    assert (
        checkpoint.diff_checkpoints(
            pipeline / "base/checkpoints/122", pipeline / "start_resume/checkpoints/122"
        )
        == []
    )

    more = [
        "--config.train.steps=130",
        "--config.initialize.grow=('stack(g=2)',)",
        "--config.initialize.mode=grow",
    ]
    printed = run_command(
        "train",
        *flags,
        *more,
        "--config.optim.lr_multipliers=(('old', 0.0),)",
        "--workdir",
        "start_grow",
        cwd=pipeline,
    )
    assert "moments       mapped: reset_new" in printed
    counts = read_manifest(pipeline / "start_grow/checkpoints/130").counts
    assert (
        counts["progress"]["n_sequences"] == 130 * 24
        and counts["new_params"]["n_updates"] == 120
        and counts["new_params"]["axes"] == {"layers": {"size": 6, "new": [[3, 6]]}}
    )
    before, after = (
        checkpoint.read_array(pipeline / name, "params/blocks/gate")
        for name in ("base/checkpoints/120", "start_grow/checkpoints/130")
    )
    np.testing.assert_array_equal(after[:3], before)  # frozen to the bit
    assert (after[3:] != before).any()
    np.testing.assert_array_equal(
        *(
            checkpoint.read_array(pipeline / name, "params/embed")
            for name in ("base/checkpoints/120", "start_grow/checkpoints/130")
        )
    )

    printed = run_command(
        "train",
        *flags,
        "--config.initialize.mode=resume",
        "--config.mixture.packed_paths=child/packed",
        "--workdir",
        "x",
        cwd=pipeline,
        ok=False,
    )
    assert "child/packed" in printed
    printed = run_command(
        "train",
        *flags,
        "--config.initialize.source=base/hf",
        "--config.initialize.mode=resume",
        "--workdir",
        "x",
        cwd=pipeline,
        ok=False,
    )
    assert "needs a run's checkpoint" in printed


def test_a_child_with_another_tokenizer_starts_from_its_parents_words(pipeline):
    (pipeline / "words.py").write_text(RECIPE.replace("vocab_size = 500", "vocab_size = 700"))
    os.makedirs(pipeline / "words", exist_ok=True)
    shutil.copytree(pipeline / "base/corpus", pipeline / "words/corpus", dirs_exist_ok=True)
    for stage in ("train_tokenizer", "pack"):
        run_command(stage, "--config", "words.py", "--workdir", "words", cwd=pipeline)
    printed = run_command(
        "initialize",
        "--from",
        "base",
        "--grow",
        "new_tokenizer('words/tokenizer')",
        "--to",
        "reworded",
        cwd=pipeline,
    )
    assert "not measured" in printed
    assert read_spec(pipeline / "reworded/spec.json").vocab_size == 768
    measured = json.loads((pipeline / "reworded/growth.json").read_text())["measured"]
    assert measured["kept_tokens"] >= 490 and measured["averaged_tokens"] > 150
    more = [
        "--config.mixture.packed_paths=words/packed",
        "--config.initialize.source=reworded",
        "--config.train.steps=20",
    ]
    printed = run_command(
        "train", "--config", "words.py", "--workdir", "words_run", *more, cwd=pipeline
    )
    start = next(
        record
        for record in read_metrics(pipeline / "words_run/metrics.jsonl")
        if isinstance(record, HeldoutMetrics)
    )
    # it reads the new pieces before any training, though a third of them are means: about a nat
    # below guessing, by the text that is installed
    assert start.step == 0 and start.heldout_loss["prose"] < np.log(768) - 0.5
    assert (
        read_manifest(pipeline / "reworded").tokenizer
        == read_manifest(pipeline / "words/packed").tokenizer
    )


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_and_ends_as_the_uncut_run(pipeline, how):
    def kill(process, run):
        wait_for(run / "checkpoints/60", process)
        process.send_signal(how)

    killed_run(pipeline, f"again_{how.name}", kill)
    assert (
        checkpoint.diff_checkpoints(
            pipeline / "base/checkpoints/122", pipeline / f"again_{how.name}/checkpoints/122"
        )
        == []
    )
    assert without_speed(
        read_metrics(pipeline / f"again_{how.name}/metrics.jsonl")
    ) == without_speed(read_metrics(pipeline / "base/metrics.jsonl"))


def copy_of_base(pipeline, run):
    """The base's run directory without its last word, as a kill between the last checkpoint and the
    manifest leaves it.
    """
    shutil.copytree(pipeline / "base", run, ignore=shutil.ignore_patterns("corpus", "packed", "hf"))
    (run / "manifest.json").unlink()
    return "--config", "toy.py", "--workdir", run, "--config.mixture.packed_paths=base/packed"


def test_a_run_that_died_before_its_last_word_says_it(pipeline, tmp_path):
    printed = run_command("train", *copy_of_base(pipeline, tmp_path / "run"), cwd=pipeline)
    assert "resumed from" in printed and "packed_paths" not in printed
    counts = [read_manifest(run).counts for run in (tmp_path / "run", pipeline / "base")]
    for name in VARIES & counts[0].keys():
        counts[0][name] = counts[1][name]
    assert counts[0] == counts[1]


def test_a_run_refuses_to_go_on_with_other_sequences(pipeline, tmp_path):
    flags = copy_of_base(pipeline, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["counts"]["data_fingerprint"] = "0" * 16
        asked = request_fingerprint("checkpoint", manifest["counts"], {}, None)
        manifest["fingerprint"] = fingerprint(
            [asked, manifest["outputs"]]
        )  # or the change itself would be seen
        del manifest["checksum"]
        path.write_text(json.dumps(manifest))
    assert "has changed since it was read" in run_command("train", *flags, cwd=pipeline, ok=False)


@pytest.mark.parametrize("harm", ["flipped byte", "missing file", "no manifest", "stray directory"])
def test_the_newest_whole_checkpoint_is_taken_and_the_broken_file_named(
    pipeline, tmp_path, harm, output
):
    run = tmp_path / "run"
    shutil.copytree(pipeline / "base", run, ignore=shutil.ignore_patterns("corpus", "packed", "hf"))
    assert checkpoint.list_steps(run) == [120, 122]
    victim = max(
        (run / "checkpoints/122/params").rglob("d/*"), key=lambda path: path.stat().st_size
    )
    if harm == "flipped byte":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif harm == "missing file":
        victim.unlink()
    elif harm == "no manifest":
        (run / "checkpoints/122/manifest.json").unlink()
    else:
        (run / "checkpoints/99").mkdir()
    assert checkpoint.find_newest(run).name == ("122" if harm == "stray directory" else "120")
    printed = output()
    assert harm in ("no manifest", "stray directory") or victim.name in printed
    if harm == "flipped byte":
        with pytest.raises(UserError, match="checksum differs"):
            checkpoint.find_checkpoint(run / "checkpoints/122")


def test_two_checkpoints_are_compared_bit_by_bit(pipeline):
    printed = run_command(
        "checkpoint", "diff", "base/checkpoints/120", "base/checkpoints/122", cwd=pipeline, ok=False
    )
    assert "params/blocks/q:" in printed and "differ" in printed
    assert "equal" in run_command(
        "checkpoint", "diff", "base", "base/checkpoints/122", cwd=pipeline
    )
    assert "params/embed" in run_command("checkpoint", "inspect", "base", cwd=pipeline)


def test_a_step_names_its_documents(pipeline):
    printed = run_command("trace", "--workdir", "child", "--step", "80", cwd=pipeline)
    assert "prose" in printed and "code" in printed


def test_the_losses_of_a_steps_documents_make_its_loss_and_the_worst_comes_first(
    pipeline, tmp_path, monkeypatch
):
    """At the step after a checkpoint they are what the step itself computed; a document of noise
    put into a sequence is named.
    """
    run = tmp_path / "run"
    shutil.copytree(pipeline / "base", run, ignore=shutil.ignore_patterns("corpus", "packed", "hf"))
    shutil.copytree(pipeline / "base/packed", tmp_path / "packed")
    settings = json.loads((run / "config.json").read_text())
    settings["mixture"]["packed_paths"] = [str(tmp_path / "packed")]
    settings["train"]["log_every"] = 1
    (run / "manifest.json").unlink()  # which knows config.json
    (run / "config.json").write_text(json.dumps(settings))
    words = tokenizer.load_tokenizer(run / "tokenizer")
    used, found = attribution.rank_documents(run, 121, words.fingerprint)
    assert used.name == "120"
    (record,) = [
        each
        for each in read_metrics(pipeline / "base/metrics.jsonl")
        if each.step == 122 and isinstance(each, TrainMetrics)
    ]  # the mean of 121 and 122
    _, last = attribution.rank_documents(run, 122, words.fingerprint)
    sums = [
        (sum(each.loss_sum for each in step), sum(each.n_trained for each in step))
        for step in (found, last)
    ]
    assert sum(nats for nats, _ in sums) / sum(n for _, n in sums) == pytest.approx(
        record.loss, abs=0.02
    ), "one update apart at most"
    assert [each.delta for each in found] == sorted((each.delta for each in found), reverse=True)
    documents = list(loader.trace_step(run, 121, words.fingerprint))
    assert {(each.document.slot, each.document.document) for each in found} <= {
        (each.slot, each.document) for each in documents
    }

    victim = next(each for each in reversed(found) if len(each.document.tokens) > 30).document
    rows = loader.open_packed([tmp_path / "packed"])
    noise = np.random.default_rng(0).integers(3, 500, len(victim.tokens)).astype(np.int32)
    real = rows.read_sequence
    monkeypatch.setattr(loader, "open_packed", lambda *_: rows)

    def noisy(name, i):
        row = real(name, i)
        if (name, i) != (victim.source, victim.sequence):
            return row
        start = bytes(row.tokens).find(bytes(victim.tokens)) // 4
        return row._replace(
            tokens=np.concatenate([row.tokens[:start], noise, row.tokens[start + len(noise) :]])
        )

    monkeypatch.setattr(rows, "read_sequence", noisy)
    _, found = attribution.rank_documents(run, 121, words.fingerprint)
    monkeypatch.undo()
    assert (found[0].document.slot, found[0].document.document) == (victim.slot, victim.document)
    printed = run_command("trace", "--workdir", run, "--step", "121", "--losses", cwd=pipeline)
    assert (
        "checkpoints/120: nats per token" in printed and len(printed.splitlines()) == len(found) + 1
    )


def test_other_shares_and_another_batch_in_mid_run_and_other_rows_when_accepted(
    pipeline, tmp_path, monkeypatch
):
    """Through the loop: what was read stays in the account, a step's documents stay known, and an
    override says what it breaks.
    """
    flags = copy_of_base(pipeline, tmp_path / "run")
    run = tmp_path / "run"
    monkeypatch.chdir(pipeline)  # from where the recipe names its rows
    before = [
        (each.slot, each.document)
        for each in loader.trace_step(
            pipeline / "base", 100, tokenizer.load_tokenizer(run / "tokenizer").fingerprint
        )
    ]
    more = [
        "--config.train.steps=126",
        "--config.train.batch_size=12",
        "--config.mixture.phases=((0, {'code': 0.5, 'prose': 0.5}),)",
        "--config.mixture.max_epochs=(('all', 999.0),)",
    ]
    printed = run_command("train", *flags, *more, cwd=pipeline)
    assert "mixture.phases" in printed and "train.batch_size: 12, was 24" in printed
    account = read_manifest(run / "checkpoints/126").counts["progress"]["data_history"]
    assert [(each["step"], each["sequence"], each["batch_size"]) for each in account] == [
        (0, 0, 24),
        (122, 122 * 24, 12),
    ]
    assert account[0]["shares"] == {"prose": 1.0} and account[1]["shares"] == {
        "code": 0.5,
        "prose": 0.5,
    }
    assert (
        read_manifest(run / "checkpoints/126").counts["progress"]["n_sequences"]
        == 122 * 24 + 4 * 12
    )
    words = tokenizer.load_tokenizer(run / "tokenizer").fingerprint
    assert [(each.slot, each.document) for each in loader.trace_step(run, 100, words)] == before
    assert {each.source for each in loader.trace_step(run, 124, words)} == {"code", "prose"}

    (run / "manifest.json").unlink()
    assert "mixture.seed" in run_command(
        "train", *flags, *more, "--config.mixture.seed=1", cwd=pipeline, ok=False
    )
    shutil.copytree(pipeline / "base/tokenizer", tmp_path / "other/tokenizer")
    shutil.copytree(pipeline / "base/corpus", tmp_path / "other/corpus")
    run_command(
        "pack",
        "--config",
        "toy.py",
        "--workdir",
        tmp_path / "other",
        "--config.pack.method=course",
        cwd=pipeline,
    )
    more = [
        *more,
        f"--config.mixture.packed_paths={tmp_path}/other/packed",
        "--config.train.steps=128",
    ]
    printed = run_command("train", *flags, *more, cwd=pipeline, ok=False)
    assert "after which: sequences read in the current epochs may be read again" in printed
    accept = printed.partition("--config.mixture.allow_changed_data=")[2][:16]
    printed = run_command(
        "train", *flags, *more, f"--config.mixture.allow_changed_data={accept}", cwd=pipeline
    )
    assert (
        "continues on changed data" in printed
        and "documents of steps up to 126 can no longer be traced" in printed
    )
    with pytest.raises(UserError, match="step 100 read other sequences"):
        next(loader.trace_step(run, 100, words))
    assert list(loader.trace_step(run, 127, words))


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["train", "--config", "toy.py", "--workdir", "x"], "pack"),
        (
            [
                "train",
                "--config",
                "toy.py",
                "--workdir",
                "x",
                "--config.mixture.packed_paths=base/packed",
                "--config.pack.seq_len=32",
            ],
            "expected 64, as the packed sequences have",
        ),
        (
            [
                "train",
                "--config",
                "toy.py",
                "--workdir",
                "x",
                "--config.mixture.packed_paths=base/packed",
                "--config.initialize.source=nowhere",
            ],
            "nowhere",
        ),
        (
            [
                "train",
                "--config",
                "toy.py",
                "--workdir",
                "x",
                "--config.mixture.packed_paths=base/packed",
                "--config.model.max_seq_len=32",
            ],
            "got sequences of 64 tokens",
        ),
        (
            [
                "train",
                "--config",
                "toy.py",
                "--workdir",
                "grown",
                "--config.mixture.packed_paths=base/packed",
            ],
            "was written by initialize",
        ),
        (
            ["initialize", "--from", "base", "--grow", "depth_upscale(m=9)", "--to", "x"],
            "expected 0 to 2",
        ),
        (
            ["initialize", "--from", "base/packed", "--to", "x"],
            "no finished checkpoint and no Hugging Face model",
        ),
        (["export_hf", "--from", "nowhere", "--to", "x"], "nowhere"),
        (["checkpoint", "inspect", "base/packed"], "no finished checkpoint"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(pipeline, arguments, answer):
    printed = run_command(*arguments, cwd=pipeline, ok=False).strip().splitlines()
    assert answer in printed[-1] and printed[-1].startswith("error: ")
    assert not (pipeline / "x").exists() or list((pipeline / "x").iterdir()) == []


def test_a_model_that_does_not_fit_the_rows_is_stopped_before_the_first_update(pipeline, tmp_path):
    """An embedding in another order, with and without a record of what the model's loss was."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(pipeline / "base/hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][np.random.default_rng(0).permutation(512)])
    save_file(tensors, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/manifest.json").unlink()  # which knows the weights
    source = f"--config.initialize.source={tmp_path / 'hf'}"
    flags = [
        "--config",
        "toy.py",
        "--workdir",
        tmp_path / "run",
        "--config.mixture.packed_paths=base/packed",
        source,
    ]
    assert "was recorded for the same sequences" in run_command(
        "train", *flags, cwd=pipeline, ok=False
    )
    (tmp_path / "hf/jaxpt.json").unlink()  # somebody else's model
    assert "a unigram model has" in run_command("train", *flags, cwd=pipeline, ok=False)

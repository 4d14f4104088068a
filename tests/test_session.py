"""Laws of a run in this process: sessions that are resumed, and the hooks around their steps."""

import dataclasses
import errno
import http.server
import importlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import struct
import sys
import threading
import time
import types

import buckets
import jax
import numpy as np
import optax
import pytest
from conftest import SMALL_SPEC
from jax.experimental.compilation_cache import compilation_cache

from jaxpt import config, export, io, stage
from jaxpt.config import Config
from jaxpt.data import loader
from jaxpt.evaluate import harness
from jaxpt.flops import DeviceCost
from jaxpt.report import page, read
from jaxpt.spec import UserError
from jaxpt.stage import read_manifest, read_spec
from jaxpt.train import distributed, initial_run, loop, metrics, provenance, result, writers
from jaxpt.train.context import open_run
from jaxpt.train.hooks.checkpoint import Checkpoint
from jaxpt.train.hooks.diverge import Diverge
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.hooks.replay import Replay
from jaxpt.train.hooks.skip import Skip
from jaxpt.train.meter import LostWork, Meter, SignOfLife, describe_goodput, read_spent_time
from jaxpt.train.metrics import CollectedStep, MetricsLogger, read_metrics
from jaxpt.train.records import (
    NOTHING_DONE,
    GrowthEvent,
    HeldoutMetrics,
    HeldoutRecord,
    ResumeEvent,
    SkippedUpdate,
    TaskMetrics,
    TrainMetrics,
)
from jaxpt.train.session import Session, start_session
from jaxpt.train.writers import BestEffort
from jaxpt.weights import checkpoint, load
from jaxpt.weights.load import load_model

STEPS = 14
VARIES = {"tokens_per_second", "step_seconds", "mfu", "memory_bytes", "seconds", "usd"}
VARIES |= {"productive_seconds", "productive_usd", "data_seconds", "start_seconds"}
VARIES |= {"evaluation_seconds", "save_seconds", "lost_seconds", "goodput"}


def never(step):
    return False


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Sessions of one recipe share its compiled programs, as starts of a run do."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(names[1], 0.1)
    compilation_cache.reset_cache()
    yield
    for name in names:
        jax.config.update(name, before[name])
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def make_config(texts):
    """A function that returns the recipe with some knobs changed: train__steps=3."""

    def make(**changes) -> Config:
        sections = dataclasses.asdict(Config())
        sections["mixture"]["packed_paths"] = (str(texts / "base/packed"),)
        sections["pack"]["seq_len"] = 64
        sections["model"] |= {"n_layers": 2, "d_model": 24, "d_ff": 40, "max_seq_len": 64}
        sections["model"] |= {"n_heads": 6, "n_kv_heads": 2, "d_head": 8}
        sections["train"] |= {"steps": STEPS, "batch_size": 8, "log_every": 4, "eval_every": 0}
        sections["train"] |= {"eval_sequences": 8, "checkpoint_every": 100}
        sections["optim"] |= {"peak_lr": 1e-2, "warmup_frac": 0.2}
        for name, value in changes.items():
            section, knob = name.split("__")
            sections[section][knob] = value
        return config.build_config(sections)

    return make


@pytest.fixture
def start(one):
    """A function that opens a session of a recipe in a directory."""

    def start(settings, run_dir, estimate_device_cost=lambda spec, seq_len: DeviceCost()):
        packed = list(settings.mixture.packed_paths)
        return start_session(open_run(settings, run_dir, packed, one, estimate_device_cost))

    return start


def train(session, should_stop=never, *more):
    """Train with the hooks of every run, and others."""
    hooks = loop.make_hooks(session)
    assert isinstance(hooks[-1], Checkpoint), "it saves what the other hooks changed"
    hooks[-1].should_stop = should_stop
    loop.train(session, [*hooks, *more])
    return session


def train_in_parts(start, settings, run_dir, cuts):
    """Train to the end, asked to stop at each of the cuts, and resumed."""
    for cut in cuts:
        stopped = train(start(settings, run_dir), lambda step, cut=cut: step + 1 == cut)
        assert (stopped.step, stopped.exit_status, stopped.saved.name) == (cut, 143, str(cut))
    return train(start(settings, run_dir))


def read_records(run_dir, kind):
    return [
        record for record in read_metrics(run_dir / "metrics.jsonl") if isinstance(record, kind)
    ]


def reproducible(run_dir):
    """What of a run's metrics does not depend on the clock, without resumes."""
    found = []
    for record in read_metrics(run_dir / "metrics.jsonl"):
        fields = record.to_json()
        if not isinstance(record, ResumeEvent):
            found.append({name: fields[name] for name in fields if name not in VARIES})
    return found


def assert_equal_ends(run_dir, other, step=STEPS):
    ends = [directory / f"checkpoints/{step}" for directory in (run_dir, other)]
    assert checkpoint.diff_checkpoints(*ends) == []
    assert reproducible(run_dir) == reproducible(other)
    counts = [read_manifest(end).counts for end in ends]
    for count in counts:
        sums = count["progress"]["sums"]
        count["progress"]["sums"] = {name: sums[name] for name in sums if name not in VARIES}
    assert counts[0] == counts[1]


# ---- position


def test_a_run_asked_to_stop_and_resumed_ends_as_one_that_went_on(make_config, start, tmp_path):
    """Bit by bit, and with the mean loss of a line whose steps were made on both sides."""
    settings = make_config()
    whole = train(start(settings, tmp_path / "whole"))
    assert whole.exit_status is None and whole.step == STEPS
    train_in_parts(start, settings, tmp_path / "cut", [6, 11])
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole")
    progress = read_manifest(tmp_path / "cut/checkpoints/11").counts["progress"]
    assert progress["n_sequences"] == 11 * 8 and progress["interval_n_tokens"] > 3 * 8 * 50
    resumes = [record.step for record in read_records(tmp_path / "cut", ResumeEvent)]
    assert resumes == [6, 11]


@pytest.mark.slow
def test_an_average_resumes_within_its_window_bit_by_bit(make_config, start, tmp_path):
    settings = make_config(optim__average=6, optim__decay_frac=0.2, train__eval_every=7)
    train(start(settings, tmp_path / "whole"))
    # 14 steps: constant from the 4th to the 11th, of which the last six are averaged
    cut = train_in_parts(start, settings, tmp_path / "cut", (4, 9))
    assert_equal_ends(tmp_path / "whole", tmp_path / "cut")
    arrays = checkpoint.read_array_metadata(tmp_path / "cut/checkpoints/14")
    assert "average/sum/blocks/q" in arrays and int(cut.state.average["count"]) == 6
    first, last = read_records(tmp_path / "cut", HeldoutMetrics)
    assert last.average_loss and last.average_loss.keys() == last.heldout_loss.keys()
    assert first.average_loss and first.average_loss != last.average_loss


@pytest.mark.slow
def test_a_model_that_grows_in_a_run_is_cut_on_either_side_of_it(make_config, start, tmp_path):
    grow = ((6, "depth_upscale(m=0)"), (9, "insert_identity(every=2)"))
    settings = make_config(train__grow=grow, train__max_to_keep=9)
    whole = train(start(settings, tmp_path / "whole"))
    assert whole.spec.n_layers == 6 and whole.n_growths == 2 and not whole.is_new_step
    train_in_parts(start, settings, tmp_path / "cut", [6, 7])
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole")
    layers = [read_spec(tmp_path / f"cut/checkpoints/{step}/spec.json").n_layers for step in (6, 7)]
    assert layers == [2, 4], "a checkpoint of the step after which it grows has not grown"
    events = read_records(tmp_path / "cut", GrowthEvent)
    assert [(event.step, event.operator, event.n_layers) for event in events] == [
        (6, "depth_upscale(m=0)", 4),
        (9, "insert_identity(every=2)", 6),
    ]
    growth = json.loads((tmp_path / "cut/growth.json").read_text())
    assert growth["at_step"] == 9 and growth["preserves_function"]
    before = (tmp_path / "cut/metrics.jsonl").read_bytes()
    late = make_config(train__grow=(*grow, (11, "insert_identity(every=2)")), train__steps=20)
    with pytest.raises(UserError, match="is at step 14 and did not grow after step 11"):
        start(late, tmp_path / "cut")
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == before


def test_weights_that_are_wrong_are_refused_before_they_grow(make_config, tmp_path):
    """Here of another tokenizer. Else the growth would be blamed for the loss."""
    parent = make_config(train__steps=2)
    loop.train_model(parent, tmp_path / "parent")
    directory = tmp_path / "parent/checkpoints/2"
    manifest = read_manifest(directory)
    counts = manifest.counts | {"heldout": None}
    request = stage.StageRequest("checkpoint", counts, {})
    key = stage.fingerprint([request.fingerprint, manifest.outputs])
    changed = dataclasses.replace(manifest, counts=counts, fingerprint=key, tokenizer="another")
    io.write_json(directory / "manifest.json", stage.seal_manifest(changed))
    grows = {"initialize__source": str(tmp_path / "parent"), "initialize__grow": ("stack(g=2)",)}
    settings = make_config(train__steps=6, **grows)
    for command, place in ((loop.train_model, "a"), (initial_run.initialize_run, "b")):
        with pytest.raises(UserError, match=r"held-out loss on .* trained with another"):
            command(settings, tmp_path / place)
        assert not io.exists(tmp_path / place / "growth.json")


@pytest.mark.slow
def test_a_run_goes_on_with_decay_switched_on_or_off_but_not_with_another_optimizer(
    make_config, start, tmp_path
):
    train(start(make_config(train__steps=4), tmp_path))
    for steps, decay in ((5, 0.0), (6, 0.1)):
        changed = make_config(train__steps=steps, optim__weight_decay=decay)
        assert train(start(changed, tmp_path)).step == steps
    with pytest.raises(UserError, match=r"optim.name: .* has moments of adamw, which muon cannot"):
        start(make_config(train__steps=8, optim__name="muon"), tmp_path)


@pytest.mark.slow
def test_more_steps_after_a_decay_raise_the_rate_which_is_said_with_the_way_out(
    make_config, start, tmp_path, caplog
):
    """From the stable phase's checkpoint the rate goes on as it was, in another directory."""
    settings = {"train__checkpoint_every": 2, "train__keep_every": 4, "train__log_every": 1}
    train(start(make_config(train__steps=10, **settings), tmp_path / "run"))
    start(make_config(train__steps=10, **settings), tmp_path / "run").close()
    assert "rises" not in caplog.text, "the same schedule"
    longer = settings | {"train__steps": 20}
    start(make_config(**longer), tmp_path / "run").close()
    assert "rises from 1.00e-03 to 1.00e-02 at step 11" in caplog.text
    source = str(tmp_path / "run/checkpoints/8")
    way = f"{source} is from before the decay. To go on from there: another --workdir, "
    assert f"{way}--config.initialize.source={source} --config.init" in caplog.text
    caplog.clear()
    resumed = make_config(**longer, initialize__source=source, initialize__mode="resume")
    assert train(start(resumed, tmp_path / "on")).step == 20
    assert "rises" not in caplog.text
    rates = [record.lr for record in read_records(tmp_path / "on", TrainMetrics)]
    assert rates[:8] == pytest.approx([1e-2] * 8)


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_initialized(
    make_config, tmp_path, output
):
    """At the start also for what the model grows to on its way."""
    for changes, answer in (
        ({"mesh__fsdp": 2, "mesh__tensor": 4}, "model.n_kv_heads = 2 cannot be sharded 4 ways"),
        ({"train__batch_size": 12}, "= 12 cannot be sharded 8 ways"),
    ):
        with pytest.raises(UserError, match=answer):
            loop.train_model(make_config(**changes), tmp_path / "run")
        assert "initialized" not in output()
    grow = ((6, "widen_rms(d=28)"),)
    with pytest.raises(UserError, match=r"model.d_model = 28 cannot be sharded 8 ways"):
        loop.train_model(make_config(train__grow=grow), tmp_path / "run")
    assert not io.exists(tmp_path / "run/metrics.jsonl")


def test_a_run_that_continues_another_is_compared_with_its_losses(make_config, start, tmp_path):
    parent = train(start(make_config(train__steps=4), tmp_path / "parent"))
    (evaluated,) = read_records(tmp_path / "parent", HeldoutMetrics)
    settings = make_config(initialize__source=str(tmp_path / "parent"), train__steps=6)
    child = start(settings, tmp_path / "child")
    assert child.step == 0 and child.parent_loss == pytest.approx(evaluated.heldout_loss)
    train(child)
    first, last = read_records(tmp_path / "child", HeldoutMetrics)
    assert (first.step, last.step) == (0, 6) and first.heldout_loss == child.parent_loss
    assert first.seq_len == last.seq_len == 64
    assert last.parent_loss == child.parent_loss and last.heldout_loss != child.parent_loss
    assert parent.parent_loss is None


@pytest.mark.slow
def test_a_run_of_adapters_resumes_bit_by_bit_and_is_exported_merged_or_alone(
    make_config, start, tmp_path, one
):
    train(start(make_config(train__steps=4), tmp_path / "base"))
    export.export_model(tmp_path / "base", tmp_path / "hf")
    adapters = {"lora__rank": 3, "lora__targets": ("q", "down")}
    settings = make_config(initialize__source=str(tmp_path / "hf"), train__steps=5, **adapters)
    assert train(start(settings, tmp_path / "whole")).spec.lora.rank == 3
    train_in_parts(start, settings, tmp_path / "cut", [2])
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole", 5)
    changed = make_config(initialize__source=str(tmp_path / "hf"), lora__rank=4, train__steps=9)
    with pytest.raises(UserError, match=r"lora: expected rank 3, .* q,down, .* got rank 4"):
        start(changed, tmp_path / "cut")

    base = load.load_model(tmp_path / "base", one)
    apart = load.load_model(tmp_path / "whole", one, merge=False)
    blocks = {name: apart.params["blocks"][name] for name in base.params["blocks"]}
    jax.tree.map(np.testing.assert_array_equal, {**apart.params, "blocks": blocks}, base.params)
    export.export_model(tmp_path / "whole", tmp_path / "merged")
    export.export_model(tmp_path / "whole", tmp_path / "adapter", adapter_of=str(tmp_path / "hf"))
    merged = load.load_model(tmp_path / "merged", one)
    assert np.abs(merged.params["blocks"]["q"] - base.params["blocks"]["q"]).max() > 1e-3
    alone = load.load_model(tmp_path / "adapter", one)
    assert alone.spec == merged.spec and alone.tokenizer == merged.tokenizer
    assert alone.tokenizer_dir == tmp_path / "adapter"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone.params, merged.params
    )
    for other, message in {
        "merged": "merged is not the base of .*whole.*: its blocks/down is another",
        "base": "got the run .*base, which PEFT cannot open",
    }.items():
        with pytest.raises(UserError, match=message):
            export.export_model(
                tmp_path / "whole", tmp_path / "no", adapter_of=str(tmp_path / other)
            )
    with pytest.raises(UserError, match=r"base.* trained no adapter"):
        export.export_model(tmp_path / "base", tmp_path / "no", adapter_of=str(tmp_path / "hf"))
    goes_on = make_config(
        initialize__source=str(tmp_path / "whole"), initialize__mode="resume", train__steps=9
    )
    with pytest.raises(UserError, match="trained adapters alone"):
        start(goes_on, tmp_path / "on")


# ---- sums over the steps, and what shows them


def read_tensorboard(directory):
    """What TensorBoard shows: tag -> {step: value}, files by name, purged where a start says so."""
    shown: dict[str, dict[int, float]] = {}
    event_type = writers.import_tensorboard().proto.event_pb2.Event
    for file in io.find(directory, "events*"):
        data = io.read_bytes(file)
        while data:
            (n_bytes,) = struct.unpack("<Q", data[:8])
            event = event_type.FromString(data[12 : 12 + n_bytes])
            data = data[16 + n_bytes :]
            if event.HasField("session_log"):
                for values in shown.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                values = shown.setdefault(value.tag, {})
                assert event.step not in values, "a step is shown twice"
                values[event.step] = value.simple_value
    return shown


def assert_shown(run_dir):
    """TensorBoard shows the records of metrics.jsonl, and no others."""
    shown = read_tensorboard(run_dir / "tensorboard")
    for tag in ("loss", "grad_norm", "lr"):
        expected = {r.step: getattr(r, tag) for r in read_records(run_dir, TrainMetrics)}
        assert shown[tag] == pytest.approx(expected, rel=1e-6)


class Kill(Hook):
    """Ends the run as a kill would, before a step, once a checkpoint of step 6 is complete."""

    def __init__(self, step):
        self.step = step

    def before_step(self, session):
        if session.step == self.step:
            if self.step > 6:
                saved = session.run.run_dir / "checkpoints/6/manifest.json"
                wait_until(lambda: io.exists(saved))
            raise KeyboardInterrupt

    def is_due(self, session):
        return False


@pytest.mark.slow
def test_sums_are_of_the_steps_done_whatever_the_batch_was(make_config, start, tmp_path):
    """60 steps of 8 x 64 tokens and 30 of 32 x 64: 92,160, in every place."""
    cost = DeviceCost(flops_per_token=3e5, peak_flops=7e9, usd_per_hour=36.0)
    small = {"train__log_every": 20, "optim__peak_lr": 1e-3}
    train(start(make_config(train__steps=60, **small), tmp_path, lambda spec, seq_len: cost))
    settings = make_config(train__steps=90, train__batch_size=32, **small)
    session = train(start(settings, tmp_path, lambda spec, seq_len: cost))
    request = result.make_request(settings, list(settings.mixture.packed_paths))
    result.write_manifest(session, request)
    records = read_metrics(tmp_path / "metrics.jsonl")
    for record in records:
        n_tokens = 64 * (8 * min(record.step, 60) + 32 * max(record.step - 60, 0))
        assert (record.n_tokens, record.flops) == (n_tokens, 3e5 * n_tokens), record
        assert 0 < record.n_trained_tokens <= n_tokens
        assert 0 < record.productive_seconds < record.seconds
        assert record.usd == pytest.approx(record.seconds / 100)
        assert record.productive_usd == pytest.approx(record.productive_seconds / 100)
    assert records[-1].n_tokens == 92_160
    counts = read_manifest(tmp_path).counts
    assert (counts["n_tokens"], counts["flops"]) == (92_160, 3e5 * 92_160)
    assert (
        read_manifest(tmp_path / "checkpoints/90").counts["progress"]["sums"]["n_tokens"] == 92160
    )
    shown = read_tensorboard(tmp_path / "tensorboard")
    assert shown["n_tokens"][60] == 30_720 and shown["n_tokens"][90] == 92_160
    (before, after) = [r for r in records if isinstance(r, TrainMetrics) and r.step in (60, 80)]
    assert before.tokens_per_second * before.step_seconds == pytest.approx(8 * 64)
    assert after.tokens_per_second * after.step_seconds == pytest.approx(32 * 64)


def test_what_a_kill_threw_away_costs_time_and_money_and_no_tokens(make_config, start, tmp_path):
    """Killed before its first checkpoint, and after one; TensorBoard and the file agree."""
    cost = DeviceCost(usd_per_hour=36.0)
    settings = make_config(train__log_every=2, train__checkpoint_every=6)
    for step, resumed in ((5, 0), (9, 0), (11, 6)):
        before = read_metrics(tmp_path / "metrics.jsonl")
        session = start(settings, tmp_path, lambda spec, seq_len: cost)
        assert session.step == resumed
        with pytest.raises(KeyboardInterrupt):
            train(session, never, Kill(step))
        after = read_metrics(tmp_path / "metrics.jsonl")
        if before:
            assert after[0].seconds > before[-1].seconds or resumed
    session = train(start(settings, tmp_path, lambda spec, seq_len: cost))
    steps = [record.step for record in read_records(tmp_path, TrainMetrics)]
    assert steps == [2, 4, 6, 8, 10, 12, 14] and session.meter.sums.n_tokens == 14 * 8 * 64
    last = read_records(tmp_path, TrainMetrics)[-1]
    assert last.seconds > after[-1].seconds and last.usd == pytest.approx(last.seconds / 100)
    assert last.productive_seconds < last.seconds / 2, "compiled four times, and repeated"
    assert last.lost_seconds > 0 and last.start_seconds > 0
    parts = last.start_seconds + last.lost_seconds + last.evaluation_seconds + last.save_seconds
    assert parts + last.productive_seconds <= last.seconds
    assert_shown(tmp_path)


def test_no_console_line_is_wider_than_its_terminal_and_a_wide_one_is_used(tmp_path, monkeypatch):
    meter = Meter(NOTHING_DONE, started=time.monotonic(), n_devices=1, cost=DeviceCost())
    logger = MetricsLogger(tmp_path, 250_000, meter=meter, resumed_at=None)
    sums = dataclasses.replace(NOTHING_DONE, seconds=71.0, usd=1_234.5)
    shape = {"step_seconds": 31.4, "tokens_per_second": 12_345_678.0, "memory_bytes": 7 * 2**30}
    record = TrainMetrics(
        step=1_250,
        loss=10.25,
        grad_norm=12_345.67,
        lr=3e-4,
        epochs={},
        mfu=0.314,
        n_skipped=17,
        scalars={f"scalar_{i}": i / 7 for i in range(20)},
        **shape,
        **vars(sums),
    )
    sources = {f"a source of text {i}": 3.25 for i in range(9)}

    def list_lines(columns):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: columns is not None)
        size = os.terminal_size((columns or 200, 40))
        monkeypatch.setattr(shutil, "get_terminal_size", lambda *given, **more: size)
        lines = logger.format_train(record)
        parts = [f"{name} {loss:.4f}" for name, loss in sources.items()]
        return lines, metrics.break_line("step 1250/250000  held-out loss", parts)

    for columns in (None, 40, 80, 200):
        for lines in list_lines(columns):
            assert max(map(len, lines)) <= max(80, columns or 0) - metrics.PREFIX_COLUMNS
            assert all(word in " ".join(lines) for word in ("step", "1250/250000"))
    narrow, wide = list_lines(80), list_lines(200)
    assert [len(lines) for lines in wide] == [1, 2] and len(narrow[0]) > 1 < len(narrow[1])
    for lines in (*narrow, *wide):
        assert "left" in " ".join(lines) or all(name in " ".join(lines) for name in sources)
    short = {
        **vars(record),
        "step": 150,
        "loss": 5.1234,
        "grad_norm": 0.79,
        "mfu": None,
        "usd": 0.0,
    }
    short |= {"tokens_per_second": 7_123.0, "step_seconds": 0.3, "n_skipped": 0, "scalars": {}}
    (line,) = logger.format_train(TrainMetrics(**short))
    assert all(word in line for word in ("loss 5.1234", "norm 0.79", "7,123 tok/s", "left"))
    logger.close()


def test_a_start_that_wrote_no_record_is_counted_by_its_sign_of_life(tmp_path):
    """70 s after the last record of 30 s, on 4 devices; a checkpoint had 10 s."""
    cost = DeviceCost(usd_per_hour=3600.0)
    made = dataclasses.replace(NOTHING_DONE, n_tokens=7, seconds=10.0, usd=11.0)
    last = dataclasses.replace(NOTHING_DONE, n_tokens=99, seconds=30.0, usd=40.0)
    sign = SignOfLife(tmp_path, 30.0, started=time.monotonic() - 70, n_devices=4)
    wait_until((tmp_path / "spent.json").is_file)
    sign.end()
    found = LostWork(last, read_spent_time(tmp_path)).add_to(made, cost)
    assert found.n_tokens == 7 and found.seconds == pytest.approx(100, abs=5)
    assert found.usd == pytest.approx(40 + 4 * 70, abs=20)
    (tmp_path / "spent.json").write_text("{")
    assert LostWork(None, read_spent_time(tmp_path)).add_to(made, cost) == made


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class FakeWandb(types.ModuleType):
    """Keeps what runs are shown, as the service does."""

    def __init__(self):
        super().__init__("wandb")
        self.runs: dict[str, dict[int, dict]] = {}

    def init(self, *, id="", resume_from="", **settings):
        identity, _, step = resume_from.partition("?_step=")
        shown = self.runs.setdefault(id or identity, {})
        for later in [at for at in shown if resume_from and at > int(step)]:
            del shown[later]

        def log(scalars, step):
            assert step >= max(shown, default=0), "the service ignores an earlier step"
            shown.setdefault(step, {}).update(scalars)

        return types.SimpleNamespace(log=log, finish=lambda: None)


def test_a_run_that_asks_for_wandb_without_the_package_is_refused_at_its_start(
    make_config, start, tmp_path, monkeypatch
):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb_project: the package wandb is not installed"):
        start(make_config(train__wandb_project="p"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_wandb_shows_the_records_and_a_directory_made_anew_is_another_run(
    make_config, start, tmp_path, monkeypatch
):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = make_config(train__wandb_project="p", train__log_every=2, train__checkpoint_every=6)

    def shown():
        identity = (tmp_path / "run/wandb_id").read_text()
        return {step: fields["loss"] for step, fields in wandb.runs[identity].items()}

    def losses():
        return {r.step: r.loss for r in read_records(tmp_path / "run", TrainMetrics)}

    for step in (5, 9, 11):
        with pytest.raises(KeyboardInterrupt):
            train(start(settings, tmp_path / "run"), never, Kill(step))
        assert shown() == losses() and max(shown()) == step // 2 * 2
    train(start(settings, tmp_path / "run"))
    assert shown() == losses()
    first = (tmp_path / "run/wandb_id").read_text()
    shutil.rmtree(tmp_path / "run")
    train(start(settings, tmp_path / "run"))
    assert (tmp_path / "run/wandb_id").read_text() != first and shown() == losses()


def test_a_place_that_fails_is_named_once_and_gets_what_it_missed(caplog, monkeypatch):
    """And one that hangs is never waited for."""
    monkeypatch.setattr(writers, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(writers, "CLOSE_SECONDS", 0.2)
    failures = [OSError(errno.ENOSPC, "No space left on device")] * 3
    written = []

    class Place:
        def write(self, record):
            if len(written) == 2 and failures:
                raise failures.pop()
            written.append(record.step)

        def flush(self):
            pass

        def close(self):
            pass

    place = BestEffort("metrics.jsonl", Place)
    hanging = BestEffort("tensorboard", threading.Event().wait)
    for step in range(7):
        for each in (place, hanging):
            each.put(ResumeEvent(step, **vars(NOTHING_DONE)))
    wait_until(lambda: len(written) == 7)
    assert written == list(range(7)) and not failures
    began = time.monotonic()
    writers.close_all([place, hanging])
    assert time.monotonic() - began < 5
    assert caplog.text.count("No space left on device") == 1
    assert "metrics.jsonl: written again, with what was missing" in caplog.text
    assert "tensorboard: the last 7 records are not written" in caplog.text


def test_records_wait_for_a_flush_and_are_written_again_where_it_fails(monkeypatch):
    monkeypatch.setattr(writers, "RETRY_SECONDS", 0.1)
    failures = [OSError("the bucket does not answer")]
    stored = []

    class Place:
        def __init__(self):
            self.written = []

        def write(self, record):
            self.written.append(record.step)

        def flush(self):
            if failures:
                raise failures.pop()
            stored.append(self.written[:])

        def close(self):
            pass

    place = BestEffort("metrics.jsonl", Place, flush_seconds=1e9)
    for step in range(7):
        place.put(ResumeEvent(step, **vars(NOTHING_DONE)))
    wait_until(lambda: place.n_written == 7)
    assert stored == []
    place.wait(0.0)
    wait_until(lambda: not place.pending)
    assert stored == [list(range(7))]
    for step in range(7, 9):
        place.put(ResumeEvent(step, **vars(NOTHING_DONE)))
    assert place.wait(20.0) and stored[-1] == list(range(9))
    writers.close_all([place])


def test_a_run_trains_to_its_end_where_nothing_can_be_logged(
    make_config, start, tmp_path, monkeypatch, caplog
):
    def refuse(*arguments):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(writers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr("jaxpt.io.files.os.fdatasync", refuse)
    monkeypatch.setattr(writers.TensorBoardFile, "add", refuse)
    session = train(start(make_config(train__checkpoint_every=6), tmp_path))
    assert session.saved == tmp_path / "checkpoints/14"
    for name in ("metrics.jsonl", "tensorboard"):
        assert caplog.text.count(f"{name}: cannot be written") == 1
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_damaged_line_costs_itself_alone_and_is_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = []
    for step in range(1, 9):
        lines.append(json.dumps(ResumeEvent(step, **vars(NOTHING_DONE)).to_json()).encode())
    lines[2] = lines[2].replace(b"kind", b"ki\xffd")
    lines[5] = b"[3]"
    path.write_bytes(b"\n".join(lines))
    assert [record.step for record in read_metrics(path)] == [1, 2, 4, 5, 7]
    assert "2 of its lines cannot be read, the first is line 3" in caplog.text
    kept, n_dropped, last = metrics.find_dropped(path, 4)
    assert (n_dropped, last.step) == (2, 7)
    assert path.read_bytes()[:kept] == b"".join(line + b"\n" for line in lines[:4])
    assert metrics.find_dropped(path, None)[:2] == (0, 1)


def test_damaged_small_files_do_not_stop_a_run(make_config, start, tmp_path, caplog):
    settings = make_config()
    train(start(make_config(train__steps=4), tmp_path))
    for name in ("config.json", "growth.json", "starts.jsonl", "phases.json", "spent.json"):
        (tmp_path / name).write_bytes(b'{"train": \xff')
    assert train(start(settings, tmp_path)).step == STEPS
    assert "config.json" in caplog.text


# ---- hooks


class Notes(Hook):
    """Notes the steps at which it acts."""

    def __init__(self, every):
        self.every, self.steps, self.before, self.n_finished = every, [], [], 0

    def before_step(self, session):
        self.before.append(session.step)

    def after_step(self, session):
        assert float(session.scalars["loss"]) > 0, "a hook that is due finds the step's scalars"
        self.steps.append(session.step)

    def finish(self, session):
        self.n_finished += 1


def test_a_hook_acts_at_its_period_and_after_the_last_step(make_config, start, tmp_path):
    """And the host waits for a step at which any hook is due, for no other."""
    session = start(make_config(train__steps=8, train__log_every=5), tmp_path)
    waits = []
    collect = session.collect_scalars
    session.collect_scalars = lambda: (waits.append(session.step), collect())
    often, last = Notes(3), Notes(0)
    train(session, never, often, last)
    assert often.steps == [3, 6, 8] and last.steps == [8] and often.n_finished == 1
    assert often.before == list(range(8)) and waits == [3, 5, 6, 8]


@pytest.mark.parametrize("action", ["warn", "stop", "replay"])
def test_what_a_run_forgets_warns_stops_it_or_is_read_more_often(
    make_config, start, tmp_path, caplog, action
):
    """It reads code only; its parent knew prose better."""
    settings = make_config(
        mixture__phases=((0, {"code": 1.0}),),
        train__eval_every=5,
        train__max_forgetting=0.25,
        train__on_forgetting=action,
    )

    def start_child(settings, run_dir):
        session = start(settings, run_dir)
        if session.step == 0:  # a checkpoint keeps it
            losses = {"prose": 1.5, "code": 99.0}
            session.parent = HeldoutRecord(**session.heldout.to_record(losses))
        return session

    child = train(start_child(settings, tmp_path / "child"))
    assert "above the parent: prose +" in caplog.text and "(limit 0.25)" in caplog.text
    evaluated = read_records(tmp_path / "child", HeldoutMetrics)
    phases = json.loads((tmp_path / "child/phases.json").read_text())
    shares = [(phase["step"], phase["shares"]) for phase in phases]
    if action == "stop":
        assert (child.step, child.exit_status, child.saved.name) == (5, 1, "5")
        return
    assert [record.step for record in evaluated] == [5, 10, 14] and child.exit_status is None
    if action == "warn":
        assert shares == [(0, {"code": 1.0})]
        return
    assert shares == [
        (0, {"code": 1.0}),
        (5, {"prose": 0.05, "code": 0.95}),
        (10, {"prose": 0.1, "code": 0.9}),
    ]
    train_in_parts(start_child, settings, tmp_path / "cut", [7, 10])
    assert_equal_ends(tmp_path / "cut", tmp_path / "child")


def fail_at(monkeypatch, steps):
    """Make the disk full for the checkpoints of some steps."""
    publish = checkpoint.Checkpointer.publish_saved

    def publish_or_fail(self, partial, final, *rest):
        if int(final.name) in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(self, partial, final, *rest)

    monkeypatch.setattr(checkpoint.Checkpointer, "publish_saved", publish_or_fail)


def test_a_failed_save_stops_a_run_or_is_logged_but_for_the_last(
    make_config, start, tmp_path, monkeypatch, caplog
):
    saves = {"train__checkpoint_every": 5, "train__log_every": 2}
    train(start(make_config(**saves), tmp_path / "whole"))
    fail_at(monkeypatch, [5])
    with pytest.raises(checkpoint.CheckpointSaveError, match="No space left on device"):
        train(start(make_config(**saves), tmp_path / "stops"))
    assert checkpoint.list_steps(tmp_path / "stops") == []
    keeps_on = make_config(**saves, train__on_save_error="continue")
    assert "The run continues" not in caplog.text
    train(start(keeps_on, tmp_path / "on"))
    assert caplog.text.count("The run continues, by train.on_save_error") == 1
    assert checkpoint.list_steps(tmp_path / "on") == [10, 14]
    assert_equal_ends(tmp_path / "on", tmp_path / "whole")
    fail_at(monkeypatch, [14])
    with pytest.raises(checkpoint.CheckpointSaveError, match="checkpoints/14: could not be"):
        train(start(keeps_on, tmp_path / "last"))

    def refuse(self, step, *rest, **more):
        raise checkpoint.CheckpointSaveError(f"no room for {step}.")

    monkeypatch.setattr(checkpoint.Checkpointer, "save_async", refuse)
    with pytest.raises(checkpoint.CheckpointSaveError, match="no room for 14"):
        train(start(keeps_on, tmp_path / "at_once"))
    assert "no room for 5. The run continues" in caplog.text


def test_checkpoints_are_saved_by_the_clock_and_those_at_round_steps_stay(
    make_config, start, tmp_path, monkeypatch
):
    """A step takes a minute. The clock is looked at when a line is due, every 3 steps."""
    settings = make_config(
        train__steps=13,
        train__log_every=3,
        train__checkpoint_minutes=3.5,
        train__max_to_keep=2,
        train__keep_every=6,
    )
    session = start(settings, tmp_path)
    now = time.monotonic()
    monkeypatch.setattr(
        "jaxpt.train.hooks.checkpoint.time.monotonic", lambda: now + 60 * session.step
    )
    saved = []
    publish = checkpoint.Checkpointer.publish_saved

    def note(self, partial, final, *rest):
        saved.append(int(final.name))
        publish(self, partial, final, *rest)

    monkeypatch.setattr(checkpoint.Checkpointer, "publish_saved", note)
    train(session)
    assert saved == [6, 12, 13] and checkpoint.list_steps(tmp_path) == [6, 12, 13]


def test_a_misspelt_operator_is_refused_before_anything_is_written(make_config, tmp_path):
    grow = ((6, "depth_upscale(m=0)"), (9, "dephth_upscale(m=0)"))
    with pytest.raises(UserError, match="no such operator; did you mean depth_upscale"):
        loop.train_model(make_config(train__grow=grow), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_operator_that_will_not_fit_is_refused_at_the_start(make_config, start, tmp_path):
    n = make_config().model.n_layers
    grow = ((6, "stack(g=2)"), (9, f"depth_upscale(m={2 * n})"))
    with pytest.raises(UserError, match=rf"expected 0 to {2 * n - 1}, got {2 * n}"):
        start(make_config(train__grow=grow), tmp_path)
    grow = ((6, "stack(g=2)"), (9, f"drop_layers(n={2 * n - 1})"), (11, "widen(heads=5)"))
    with pytest.raises(UserError, match="heads=5"):
        start(make_config(train__grow=grow), tmp_path)


def test_a_compile_cache_that_cannot_be_written_is_said_once_and_left_alone(tmp_path, output):
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file/compiled"))
        distributed.enable_compilation_cache()
        assert not jax.config.jax_enable_compilation_cache
        assert "file/compiled: could not be made" in output()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_finished_run_that_was_damaged_since_goes_on_from_the_checkpoint_before(
    make_config, tmp_path, output
):
    """Sizes are looked at always, checksums with verify."""
    settings = make_config(train__steps=8, train__checkpoint_every=4, train__max_to_keep=2)
    for run in ("whole", "run"):
        loop.train_model(settings, tmp_path / run)
    run = tmp_path / "run"
    array = max((run / "checkpoints/8/params/d").iterdir(), key=lambda file: file.stat().st_size)
    data = array.read_bytes()
    array.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    output()
    loop.train_model(settings, run)
    assert "nothing to do" in output()
    loop.train_model(settings, run, verify=True)
    assert f"{array.name} was changed" in output()
    array = max((run / "checkpoints/8/params/d").iterdir(), key=lambda file: file.stat().st_size)
    array.write_bytes(b"")
    (run / "tokenizer/tokenizer.json").write_bytes(b"")
    loop.train_model(settings, run)
    assert "has 0 bytes" in output()
    assert checkpoint.diff_checkpoints(run, tmp_path / "whole") == []
    loop.train_model(settings, run, verify=True)
    assert "checksums verified" in output()


def test_a_finished_run_is_finished_however_it_and_its_inputs_are_called(
    make_config, texts, tmp_path, output, monkeypatch
):
    """By another spelling, through a link, from another directory, and after all was moved."""
    packed = shutil.copytree(texts / "base/packed", tmp_path / "all/data/packed")
    monkeypatch.chdir(tmp_path / "all")
    settings = {"train__steps": 2}
    settings["mixture__packed_paths"] = (str(packed),)
    loop.train_model(make_config(**settings), io.path("a"))
    settings |= {"train__steps": 3, "initialize__source": "a"}
    loop.train_model(make_config(**settings), io.path("b"))
    (tmp_path / "latest").symlink_to(tmp_path / "all/b")
    settings["initialize__source"] = str(tmp_path / "all/a")
    for run in ("../all/b", str(tmp_path / "all/b"), str(tmp_path / "latest")):
        output()
        loop.train_model(make_config(**settings), io.path(run))
        assert "is finished already (3 steps)" in output()

    (tmp_path / "all").rename(tmp_path / "moved")
    packed = str(tmp_path / "moved/data/packed")

    def is_finished(steps, source):
        changes = {"train__steps": steps, "mixture__packed_paths": (packed,)}
        config = make_config(**(settings | changes | {"initialize__source": str(source)}))
        return result.is_finished(
            tmp_path / "moved/b", result.make_request(config, [packed]), False
        )

    assert is_finished(3, tmp_path / "moved/a")
    assert not is_finished(5, tmp_path / "moved/a") and "continues to 5" in output()
    other = texts / "base/tokenizer"
    for steps in (3, 5):
        with pytest.raises(UserError, match=r"another input .initialize: a there, none requested"):
            is_finished(steps, "random")
        with pytest.raises(UserError, match=f"initialize: a there, {other} requested, their cont"):
            is_finished(steps, other)


def test_a_checkpoint_has_its_tokenizer_wherever_it_is_linked_or_copied(make_config, tmp_path, one):
    loop.train_model(make_config(train__steps=2), tmp_path / "run")
    step, tokenizer = tmp_path / "run/checkpoints/2", tmp_path / "run/tokenizer"
    (tmp_path / "run/checkpoints/latest").symlink_to("2")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/best").symlink_to(step)
    for copy in ("alone", "beside/2", "with", "flat"):
        shutil.copytree(step, tmp_path / copy)
    shutil.copytree(tokenizer, tmp_path / "beside/tokenizer")
    shutil.copytree(tokenizer, tmp_path / "with/tokenizer")
    shutil.copy(tokenizer / "tokenizer.json", tmp_path / "flat")
    expected = {
        "run/checkpoints/latest": tokenizer,
        "linked/best": tokenizer,
        "beside/2": tmp_path / "beside/tokenizer",
        "with": tmp_path / "with/tokenizer",
        "flat": tmp_path / "flat",
        "alone": None,
    }
    for name, place in expected.items():
        loaded = load_model(tmp_path / name, one)
        assert (loaded.step, loaded.tokenizer_dir) == (2, place), name


@pytest.mark.parametrize("command", [loop.train_model, initial_run.initialize_run])
def test_a_name_that_cannot_hold_a_checkpoint_is_refused_before_anything_is_written(
    command, make_config, tmp_path
):
    with pytest.raises(UserError, match=r"/lr=\[1e-3\]: a checkpoint cannot be kept below a name"):
        command(make_config(), tmp_path / "lr=[1e-3]")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_finished_run_whose_longer_start_is_refused_stays_finished(
    make_config, tmp_path, monkeypatch
):
    loop.train_model(make_config(train__steps=5), tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()

    def refuse(run):
        raise UserError("no longer the data that it read.")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "start_session", refuse)
        with pytest.raises(UserError, match="no longer the data"):
            loop.train_model(make_config(train__steps=9), tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before
    loop.train_model(make_config(train__steps=9), tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() != before


def test_a_start_that_stood_still_and_was_taken_over_saves_nothing(make_config, start, tmp_path):
    """As after SIGSTOP for longer than the lease."""
    session = start(make_config(train__checkpoint_every=6), tmp_path / "run")
    with io.hold(tmp_path / "run") as lock:
        session.run = dataclasses.replace(session.run, lock=lock)
        train(session, lambda step: step + 1 == 4)
        session = start(make_config(train__checkpoint_every=6), tmp_path / "run")
        session.run = dataclasses.replace(session.run, lock=lock)
        lock.number -= 1  # the next holder's is higher
        with pytest.raises(UserError, match="another one has taken it over"):
            train(session)
        lock.number += 1
    assert checkpoint.list_steps(tmp_path / "run") == [4]


class AskForProfile(Hook):
    """Sends SIGUSR1 to this process after a step."""

    def __init__(self, at):
        self.at = at

    def is_due(self, session):
        return session.step in self.at

    def after_step(self, session):
        signal.raise_signal(signal.SIGUSR1)


def test_a_profile_is_written_of_the_steps_of_the_recipe_and_of_the_next_ones_at_a_signal(
    make_config, start, tmp_path, caplog
):
    settings = make_config(train__steps=14, train__profile_steps=(3, 4))
    train(start(settings, tmp_path), never, AskForProfile((6, 12)))
    for steps in ("3 to 4", "7 to 11", "13 to 14"):
        assert f"profile of steps {steps}" in caplog.text
    assert any((tmp_path / "tensorboard").rglob("*.xplane.pb"))


@pytest.fixture
def not_finite(monkeypatch):
    """A function that makes the batches of some steps not finite."""
    iterate_batches = loader.iterate_batches

    def damage(steps):
        def iterate(dataset, schedule, sharding, batch_size, first, *more):
            batches = iterate_batches(dataset, schedule, sharding, batch_size, first, *more)
            for step, batch in enumerate(batches, first // batch_size + 1):
                if step in steps:
                    batch = batch._replace(loss_mask=batch.loss_mask * float("nan"))
                yield batch

        monkeypatch.setattr(loader, "iterate_batches", iterate)

    return damage


def test_updates_that_are_not_finite_are_skipped_and_their_documents_named(
    make_config, start, tmp_path, not_finite
):
    not_finite([5, 10])
    settings = make_config()
    train(start(settings, tmp_path / "whole"))
    train_in_parts(start, settings, tmp_path / "cut", [5, 9])
    assert_equal_ends(tmp_path / "cut", tmp_path / "whole")
    skipped = read_records(tmp_path / "cut", SkippedUpdate)
    assert [record.step for record in skipped] == [5, 10]
    tokenizer = read_manifest(tmp_path / "cut/checkpoints/14").tokenizer
    for record in skipped:
        traced = loader.trace_step(tmp_path / "cut", record.step, tokenizer)
        documents = list(dict.fromkeys(seen.document for seen in traced))
        assert list(record.documents) == documents[: metrics.MAX_SKIPPED_DOCUMENTS]
        assert record.n_documents == len(documents) and math.isnan(record.loss)
    lines = read_records(tmp_path / "cut", TrainMetrics)
    assert [line.n_skipped for line in lines] == [0, 1, 2, 2]
    assert all(0 < line.loss < 7 for line in lines), "the mean leaves out what was skipped"


def test_too_many_skipped_updates_in_a_row_stop_the_run(make_config, start, tmp_path, not_finite):
    not_finite([2, 3, 5, 6, 7])
    session = start(make_config(train__max_consecutive_skips=3, train__log_every=2), tmp_path)
    with pytest.raises(UserError, match="3 consecutive updates were skipped up to step 7 "):
        train(session)
    assert [record.step for record in read_records(tmp_path, SkippedUpdate)] == [2, 3, 5, 6, 7]
    refuse = lambda name: pytest.fail(f"{name} is not JSON")
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    found = [line for line in lines if (line["kind"], line["step"]) == ("train", 6)]
    assert [(line["loss"], line["not_finite"]["loss"]) for line in found] == [(None, "NaN")]


def test_a_run_that_explodes_says_so_stops_and_keeps_its_good_checkpoints(
    make_config, start, tmp_path, monkeypatch, caplog
):
    """With log lines and checkpoints at other steps; one look above the limit only warns."""
    exploded: set[int] = set()
    collect = Session.collect_scalars

    def explode(session):
        collect(session)
        for collected in session.collected:
            if collected.step in exploded:
                collected.scalars["loss_sum"] = collected.scalars["n_targets"] * 957_753

    monkeypatch.setattr(Session, "collect_scalars", explode)
    settings = make_config(train__checkpoint_every=2, train__log_every=3, train__max_to_keep=2)
    exploded |= {7, *range(10, 20)}
    session = start(settings, tmp_path)
    with pytest.raises(UserError, match=r"up to step 12, above .* = 3 times .* optim.peak_lr"):
        train(session)
    warned = [r for r in caplog.records if "Nothing is saved meanwhile" in r.message]
    assert "up to step 8," in warned[0].message and "up to step 10," in warned[1].message
    assert len(warned) == 2
    assert checkpoint.list_steps(tmp_path) == [4, 6], "neither 8 nor 10, whose looks are above"
    assert read_records(tmp_path, TrainMetrics)[-1].step == 12, "its line is there"

    exploded.clear()
    assert train(start(settings, tmp_path)).step == STEPS, "it continues from the last good one"

    exploded.add(STEPS)
    with pytest.raises(UserError, match="up to step 14, above"):
        train(start(settings, tmp_path / "last"))
    assert STEPS not in checkpoint.list_steps(tmp_path / "last")
    train(start(make_config(train__stop_above=0.0), tmp_path / "off"))
    assert checkpoint.list_steps(tmp_path / "off") == [STEPS]


def test_weights_that_start_above_the_limit_may_come_down(make_config, start, tmp_path):
    session = start(make_config(), tmp_path)
    judge = Diverge(3.0)
    seen = []
    for loss in (60.0, 50.0, 40.0, 6.0, 30.0, 29.0):
        scalars = {"loss_sum": loss * 8, "n_targets": 8}
        session.collected = [CollectedStep(1, scalars, session.meter.sums)]
        judge.after_step(session)
        seen.append((session.is_diverged, session.exit_status))
    above = (True, None)
    assert seen == [above, above, above, (False, None), above, (True, 1)]
    session.close()


@pytest.mark.slow
def test_benchmarks_during_a_run_are_those_of_its_checkpoint_and_change_no_bit(
    make_config, texts, tmp_path, data_dir, caplog
):
    """To the digit, with errors, on console, file and page."""
    pytest.importorskip("lm_eval")
    tasks = ("winogrande", "truthfulqa_mc2")
    settings = {"train__steps": 4, "train__checkpoint_every": 2, "train__eval_every": 2}
    settings["model__max_seq_len"] = 512
    scored = {"train__eval_tasks": tasks, "train__eval_items": 3, "train__eval_dir": str(data_dir)}
    loop.train_model(make_config(**settings), tmp_path / "without")
    loop.train_model(make_config(**settings, **scored), tmp_path / "with")
    ends = [tmp_path / name / "checkpoints/4" for name in ("without", "with")]
    assert checkpoint.diff_checkpoints(*ends) == []
    records = read_records(tmp_path / "with", TaskMetrics)
    assert [record.step for record in records] == [2, 4]
    for record in records:
        model = tmp_path / "with/checkpoints" / str(record.step)
        found = harness.evaluate_model(model, list(tasks), limit=3, data_dir=data_dir)
        for task in tasks:
            expected = found["results"][task]
            assert {"acc", "answer_bits_per_byte"} <= record.scores[task].keys()
            for name, value in record.scores[task].items():
                assert value == expected[f"{name},none"], (task, name)
            assert record.scores[task]["answer_bits_per_byte_stderr"] > 0
    accuracy = records[-1].scores["winogrande"]["acc"]
    assert f"step 4/4  winogrande  acc {accuracy:.4f}" in caplog.text
    assert "bits_per_byte" in caplog.text
    page.write_report([tmp_path / "with"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "winogrande: answer bits per byte" in text


def test_benchmarks_that_cannot_be_scored_are_refused_at_the_start(
    make_config, start, tmp_path, monkeypatch
):
    def refusal(**changes):
        with pytest.raises(UserError) as refused:
            start(make_config(**changes), tmp_path / "run")
        assert not io.exists(tmp_path / "run")
        return str(refused.value)

    here = {"train__eval_dir": str(tmp_path)}
    if importlib.util.find_spec("lm_eval"):
        assert "no task 'winogrand'" in refusal(train__eval_tasks=("winogrand",), **here)
        assert "wants eval_winogrande/" in refusal(train__eval_tasks=("winogrande",), **here)
        text = ("bits_per_byte/a=python:prose",)
        assert "measure texts already" in refusal(train__eval_tasks=text, **here)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    missing = refusal(train__eval_tasks=("winogrande",))
    assert missing.startswith("train.eval_tasks: ") and "requirements-eval.txt" in missing


# ---- what is logged


@pytest.mark.slow
def test_a_scalar_of_the_step_reaches_console_file_tensorboard_and_page(
    make_config, start, tmp_path, caplog
):
    """By its name in the step alone; a name too long for 80 columns stays off the console."""
    session = start(make_config(), tmp_path / "run")
    train_step = session.train_step
    long_name = "mean_of_something_that_is_too_long_for_a_terminal_of_80_columns"

    def step(state, batch):
        state, scalars = train_step(state, batch)
        scalars["param_norm"] = optax.tree.norm(state.params)
        scalars[long_name] = 2 * scalars["lr"]
        return state, scalars

    session.train_step = step
    train(session)
    norm = float(optax.tree.norm(session.state.params))
    last = read_records(tmp_path / "run", TrainMetrics)[-1]
    assert last.scalars.keys() == {"param_norm", long_name}
    assert last.scalars["param_norm"] == pytest.approx(norm, rel=1e-6)
    assert last.scalars[long_name] == pytest.approx(2 * last.lr)

    lines = [record.getMessage() for record in caplog.records]
    (shown,) = [line for line in lines if f"param_norm {norm:.4g}" in line]
    assert not [line for line in lines if long_name in line]
    assert len(shown) <= metrics.count_columns()

    (events,) = (tmp_path / "run/tensorboard").glob("events*")
    assert b"scalars/param_norm" in events.read_bytes()
    html = page.render_page(read.load_runs([tmp_path / "run"]))
    assert "param_norm" in html and long_name in html and repr(norm)[:5] in html


def test_goodput_is_what_is_left_without_start_data_evaluation_saves_and_kills(monkeypatch):
    """100 s lost to a kill, a start of 50 s, 4 steps of 10 s beside waits for data of 60 s."""
    now = [1000.0]
    monkeypatch.setattr("jaxpt.train.meter.time.monotonic", lambda: now[0])
    lost = LostWork(dataclasses.replace(NOTHING_DONE, seconds=100.0), None)
    cost = DeviceCost()
    meter = Meter(lost.add_to(NOTHING_DONE, cost), started=1000.0, n_devices=1, cost=cost)
    now[0] += 50
    for _ in range(4):
        meter.begin_steps()
        with meter.wait_for_data():
            now[0] += 15
    now[0] += 40
    meter.end_steps(4, 10.0)
    for field, seconds in (("evaluation_seconds", 7.0), ("save_seconds", 3.0)):
        with meter.spend_on(field):
            now[0] += seconds
    sums = meter.read()
    assert (sums.lost_seconds, sums.start_seconds, sums.seconds) == (100, 50, 260)
    assert (sums.data_seconds, sums.evaluation_seconds, sums.save_seconds) == (60, 7, 3)
    assert sums.compute_goodput() == pytest.approx(40 / 260)
    assert describe_goodput(sums) == (
        "goodput: 15% of 4m20s; start 19%, data 23%, evaluation 3%, saving 1%, lost to kills 38%, "
        "other 0%"
    )


@pytest.mark.slow
def test_a_run_counts_the_seconds_that_it_waits_for_its_data(make_config, start, tmp_path):
    waited = []
    for name, delay in (("fast", 0.0), ("slow", 0.4)):
        session = start(make_config(), tmp_path / name)
        batches = session.batches

        def deliver(batches=batches, delay=delay):
            for batch in batches:
                time.sleep(delay)
                yield batch

        session.batches = deliver()
        waited.append(train(session).meter.sums.data_seconds)
    # the first two or three batches are read before steps are counted
    assert waited[0] < waited[1] / 2 and waited[1] > 0.4 * (STEPS - 3)


def test_mfu_is_of_all_devices_and_money_is_in_dollars(tmp_path, monkeypatch, caplog):
    """7 steps of 640 tokens in 2 hours on 5 devices of 1.5 dollars per hour."""
    cost = DeviceCost(flops_per_token=9e3, peak_flops=4e3, usd_per_hour=1.5)
    now = [1000.0]
    monkeypatch.setattr("jaxpt.train.meter.time.monotonic", lambda: now[0])
    meter = Meter(NOTHING_DONE, started=1000.0, n_devices=5, cost=cost)
    logger = MetricsLogger(tmp_path, STEPS, meter=meter, resumed_at=None)
    meter.begin_steps()
    for _ in range(7):
        meter.count_step(640)
    now[0] += 7200
    meter.end_steps(7, 7200 / 7)
    scalars = {"grad_norm": 0.5, "lr": 1e-3, "n_skipped": 0}
    logger.log_train(7, scalars, loss=2.5, epochs={"prose": 0.1})
    logger.close()
    (record,) = read_records(tmp_path, TrainMetrics)
    assert record.tokens_per_second == pytest.approx(7 * 640 / 7200)
    assert record.mfu == pytest.approx(7 * 640 / 7200 * 9e3 / (5 * 4e3))
    assert record.usd == pytest.approx(2 * 5 * 1.5)
    assert "MFU 28.0%" in caplog.text and "$15.00" in caplog.text


def test_a_run_counts_mfu_and_money_of_the_devices_of_its_mesh(make_config, tmp_path, start):
    """One of the eight devices of this process."""
    cost = DeviceCost(flops_per_token=3e5, peak_flops=7e9, usd_per_hour=36.0)
    train(start(make_config(train__steps=4), tmp_path, lambda spec, seq_len: cost))
    (record,) = read_records(tmp_path, TrainMetrics)
    assert record.mfu == pytest.approx(record.tokens_per_second * 3e5 / 7e9)
    assert record.usd == pytest.approx(record.seconds / 100)
    assert jax.device_count() == 8


@pytest.mark.slow
def test_settings_that_decide_the_result_are_listed_when_they_change(
    make_config, start, tmp_path, caplog
):
    train(start(make_config(train__steps=4), tmp_path))
    changed = make_config(train__steps=6, optim__peak_lr=5e-3)
    assert provenance.list_changed_settings(tmp_path, changed) == [
        "train.steps: 6, was 4",
        "optim.peak_lr: 0.005, was 0.01",
    ]
    train(start(changed, tmp_path))
    assert "changed: optim.peak_lr: 0.005, was 0.01" in caplog.text


# ---- runs in buckets


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request, texts):
    """(proxy, bucket with packed data), to which the data of a disk was copied."""
    with buckets.lead_to(request.param) as proxy:
        place = io.path(f"{request.param}://bucket")
        for part in ("packed", "tokenizer"):
            for name in io.list_files(texts / "base" / part):
                io.copy_file(texts / "base" / part / name, place / part / name)
        yield proxy, place


@pytest.fixture
def lose_threads(monkeypatch):
    """A function that makes a killed session lose what its threads have not written."""

    def lose(patched):
        patched.setattr(writers, "close_all", lambda places: None)
        patched.setattr(writers, "REWRITE_SECONDS", 1e9)

    return lose


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_and_stopped_ends_as_on_a_disk(
    bucket, make_config, start, tmp_path, monkeypatch, lose_threads
):
    """It grows, is profiled, meets lost answers, and leaves no folder of the bucket's name."""
    proxy, place = bucket
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    knobs = {"train__log_every": 2, "train__checkpoint_every": 6, "train__max_to_keep": 2}
    knobs |= {"train__grow": ((9, "depth_upscale(m=1)"),), "train__profile_steps": (3, 4)}
    train(start(make_config(**knobs), tmp_path / "run"))

    settings = make_config(mixture__packed_paths=(str(place / "packed"),), **knobs)
    run = place / "run"
    proxy.faults += [
        buckets.Fault(r"POST.*multipart|PUT.*run/spec\.json", 503, 1),
        buckets.Fault(r"(PUT|POST).*run.*checkpoints", 503, 2, is_answer_lost=True),
    ]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        lose_threads(patched)
        train(start(settings, run), never, Kill(8))
    stopped = train(start(settings, run), lambda step: step + 1 == 11)
    assert (stopped.step, stopped.exit_status, stopped.saved) == (11, 143, run / "checkpoints/11")
    train(start(settings, run))

    assert_equal_ends(run, tmp_path / "run")
    resumed = [record.step for record in read_records(run, ResumeEvent)]
    assert resumed == [6, 11] and proxy.n_injected == 3
    assert checkpoint.list_steps(run) == [12, 14]
    assert read_spec(run / "spec.json") == read_spec(tmp_path / "run/spec.json")
    assert len(io.read_lines(run / "starts.jsonl")) == 3
    assert_shown(run)
    assert io.find(run, "tensorboard/plugins/profile/*/*.xplane.pb")
    assert io.list_names(io.cache_directory() / "work") == []
    (data,) = page.write_report([run], run / "report.html")
    assert data.metrics.train[-1].step == STEPS
    traced = loader.trace_step(run, 3, read_manifest(run / "checkpoints/14").tokenizer)
    assert next(traced).document
    assert os.listdir() == []


def test_a_run_in_a_bucket_is_held_by_its_start(bucket, make_config, tmp_path, monkeypatch):
    _, place = bucket
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = make_config(mixture__packed_paths=(str(place / "packed"),), train__steps=5)
    with (
        io.hold(place / "held"),
        pytest.raises(UserError, match=f"in use by process {os.getpid()}"),
    ):
        loop.train_model(settings, place / "held")
    assert io.list_files(place / "held") == {}
    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"could not be written"):
        patched.setattr(loop, "train_run", lambda *_: pytest.fail("something was begun"))
        loop.train_model(settings, io.path(f"{place.scheme}://nobody-has-it/run"))
    loop.train_model(settings, place / "held")
    assert read_manifest(place / "held").counts["n_steps"] == 5


# ---- watched from elsewhere

SECRET = secrets.token_hex(8)  # of a URL; program.diff may hold what stands in this file


@pytest.fixture
def webhook(monkeypatch):
    """A list of the messages that were posted, and a server that takes all but the first."""
    posted = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if len(posted) == 1 else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JAXPT_WEBHOOK", f"http://127.0.0.1:{server.server_port}/{SECRET}")
    yield posted
    server.shutdown()


def test_a_run_is_watched_by_prometheus_and_a_webhook_whose_url_is_nowhere(
    make_config, start, tmp_path, webhook, caplog
):
    file = tmp_path / "node_exporter/mine.prom"
    file.parent.mkdir()
    settings = make_config(train__steps=8, train__prometheus_file=str(file))
    run = tmp_path / "a run"
    train(start(settings, run), lambda step: step == 3)
    assert "a message was not posted (HTTPError 500)" in caplog.text
    train(start(settings, run))
    assert [(each["event"], each["text"]) for each in webhook] == [
        ("stop", f"{run}: stopped, step 4 is saved"),
        ("stop", f"{run}: finished, 8 steps"),
    ]
    samples = dict(re.findall(r"^jaxpt_(\w+){run=\".*a run\"} (\S+)$", file.read_text(), re.M))
    last = read_records(run, TrainMetrics)[-1]
    assert (float(samples["step"]), float(samples["loss"])) == (8, last.loss)
    assert 0 < float(samples["goodput"]) < 1
    assert re.search(r'^jaxpt_heldout_loss{run=".*",name="prose"} \d', file.read_text(), re.M)
    assert os.listdir(file.parent) == ["mine.prom"], "written anew under another name, then moved"
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert SECRET.encode() not in written and SECRET not in caplog.text


def test_prometheus_text_has_one_type_per_name_and_escapes_labels():
    samples = {"loss": 2.5, "heldout_loss/a": 3.0, "heldout_loss/b": float("nan")}
    assert writers.format_prometheus(samples, 'runs/"x\\y') == (
        "# TYPE jaxpt_loss gauge\n"
        'jaxpt_loss{run="runs/\\"x\\\\y"} 2.5\n'
        "# TYPE jaxpt_heldout_loss gauge\n"
        'jaxpt_heldout_loss{run="runs/\\"x\\\\y",name="a"} 3.0\n'
        'jaxpt_heldout_loss{run="runs/\\"x\\\\y",name="b"} nan\n'
    )


def test_a_storm_of_skips_and_forgetting_are_posted_once_each(
    make_config, start, tmp_path, webhook
):
    """Half of the skips that stop a run; the first message fails."""
    settings = make_config(train__max_consecutive_skips=6, train__max_forgetting=0.5)
    session = start(settings, tmp_path)
    session.parent = HeldoutRecord(**session.heldout.to_record({"prose": 1.0}))
    session.heldout_losses = {"prose": 2.0}
    skip, replay = Skip(), Replay(settings.train)
    for n_skips in (1, 2, 3, 4, 0, 1):
        session.step += 1
        session.n_sequences += 8
        scalars = {"consecutive_skips": n_skips, "loss": np.nan, "grad_norm": np.nan}
        session.collected = [CollectedStep(session.step, scalars, NOTHING_DONE)]
        skip.after_step(session)
    replay.after_step(session)
    session.close()
    assert sorted(each["event"] for each in webhook) == ["forgetting", "skips"]
    texts = " ".join(each["text"] for each in webhook)
    assert "3 consecutive updates skipped up to step 3; the run stops at 6" in texts
    assert "prose +1.000 (limit 0.5)" in texts


def test_a_window_that_the_schedule_has_not_is_refused_before_data_is_opened(make_config, one):
    settings = make_config(optim__average=STEPS, mixture__packed_paths=("nowhere",))
    with pytest.raises(UserError, match=r"optim.average: expected at most \d+, the steps at the"):
        open_run(settings, io.path("x"), ["nowhere"], one)


def test_a_probe_is_of_the_model_alone_whatever_its_run_trained_on(make_config, one, monkeypatch):
    """Not by pairs and a reference, which a grown model has none of, nor by batches that change."""
    built = []

    def build(spec, train, *more):
        built.append(train)
        return lambda now, batch: (now, {})

    monkeypatch.setattr(initial_run.step, "build_step", build)
    nothing = types.SimpleNamespace(params={})
    monkeypatch.setattr(initial_run.state, "init_state", lambda *_: nothing)
    pairs = make_config(train__dpo_beta=0.5, initialize__source="runs/chat")
    shapes = make_config(train__shape_schedule=((0, 8, 64), (5, 16, 64)))
    for settings in (pairs, shapes):
        packed = list(settings.mixture.packed_paths)
        probe = initial_run.ShortTraining(2, settings, packed, one)
        probe.train(SMALL_SPEC, {}, 2)
    for train_section in built:
        assert (train_section.dpo_beta, train_section.shape_schedule) == (0.0, ())
    assert len(built) == 2


def test_another_base_shape_is_another_initial_run(make_config, tmp_path):
    requests = [
        initial_run.describe_request(make_config(model__base_shape=shape), tmp_path, [], 0)
        for shape in ("", "4x256")
    ]
    assert requests[0] != requests[1]


def test_a_webhook_that_is_no_url_is_refused_without_showing_it(make_config, one, monkeypatch):
    monkeypatch.setenv("JAXPT_WEBHOOK", "hooks.example/secret-kF3")
    settings = make_config()
    with pytest.raises(UserError, match="JAXPT_WEBHOOK: expected a URL") as refused:
        open_run(settings, io.path("x"), list(settings.mixture.packed_paths), one)
    assert "kF3" not in str(refused.value)

"""Laws of a run in this process: sessions that are resumed, and the hooks around their steps."""

import dataclasses
import errno
import json
import os
import time

import jax
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxpt import config
from jaxpt.config import Config
from jaxpt.data import loader
from jaxpt.report import page, read
from jaxpt.spec import UserError
from jaxpt.stage import read_manifest, read_spec
from jaxpt.train import loop, metrics, provenance
from jaxpt.train.context import open_run
from jaxpt.train.hooks.checkpoint import Checkpoint
from jaxpt.train.hooks.hook import Hook
from jaxpt.train.metrics import DeviceCost, MetricsLogger, read_metrics
from jaxpt.train.records import (
    GrowthEvent,
    HeldoutMetrics,
    ResumeEvent,
    SkippedUpdate,
    TrainMetrics,
)
from jaxpt.train.session import start_session
from jaxpt.weights import checkpoint

STEPS = 14
VARIES = {"tokens_per_second", "step_seconds", "mfu", "memory_bytes", "seconds", "usd"}


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
        sections["optim"] |= {"peak_lr": 1e-2, "warmup_steps": 3}
        for name, value in changes.items():
            section, knob = name.split("__")
            sections[section][knob] = value
        return config.build_config(sections)

    return make


@pytest.fixture
def start(one):
    """A function that opens a session of a recipe in a directory."""

    def start(settings, run_dir, estimate_device_cost=lambda spec: DeviceCost()):
        packed = list(settings.mixture.packed_paths)
        return start_session(open_run(settings, run_dir, packed, one, estimate_device_cost))

    return start


def train(session, should_stop=never, *more):
    """Train with the hooks of every run, and others."""
    hooks = loop.make_hooks(session)
    assert isinstance(hooks[-1], Checkpoint), "it saves what the other hooks changed"
    hooks[-1].should_stop = should_stop
    loop.train(session, [*hooks, *more])
    session.metrics.close()
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
    assert read_manifest(ends[0]).counts == read_manifest(ends[1]).counts


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


def test_a_run_that_continues_another_is_compared_with_its_losses(make_config, start, tmp_path):
    parent = train(start(make_config(train__steps=4), tmp_path / "parent"))
    (evaluated,) = read_records(tmp_path / "parent", HeldoutMetrics)
    settings = make_config(initialize__source=str(tmp_path / "parent"), train__steps=6)
    child = start(settings, tmp_path / "child")
    assert child.step == 0 and child.parent_loss == pytest.approx(evaluated.heldout_loss)
    train(child)
    first, last = read_records(tmp_path / "child", HeldoutMetrics)
    assert (first.step, last.step) == (0, 6) and first.heldout_loss == child.parent_loss
    assert last.parent_loss == child.parent_loss and last.heldout_loss != child.parent_loss
    assert parent.parent_loss is None


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
            session.parent_loss = {"prose": 1.5, "code": 99.0}
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


def test_a_profile_is_written(make_config, start, tmp_path, caplog):
    train(start(make_config(train__steps=5, train__profile_steps=(3, 4)), tmp_path))
    assert "profile of steps 3 to 4" in caplog.text
    assert any((tmp_path / "tensorboard").rglob("*.xplane.pb"))


@pytest.fixture
def not_finite(monkeypatch):
    """A function that makes the batches of some steps not finite."""
    iterate_batches = loader.iterate_batches

    def damage(steps):
        def iterate(dataset, schedule, sharding, batch_size, first, document_mask):
            batches = iterate_batches(dataset, schedule, sharding, batch_size, first, document_mask)
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
        assert record.n_documents == len(documents) and record.loss is None
    lines = read_records(tmp_path / "cut", TrainMetrics)
    assert [line.n_skipped for line in lines] == [0, 1, 2, 2]
    assert all(0 < line.loss < 7 for line in lines), "the mean leaves out what was skipped"


def test_too_many_skipped_updates_in_a_row_stop_the_run(make_config, start, tmp_path, not_finite):
    not_finite([2, 3, 5, 6, 7])
    session = start(make_config(train__max_consecutive_skips=3), tmp_path)
    with pytest.raises(UserError, match="3 consecutive updates were skipped up to step 7 "):
        train(session)
    assert [record.step for record in read_records(tmp_path, SkippedUpdate)] == [2, 3, 5, 6, 7]


# ---- what is logged


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
    assert len(shown) <= metrics.MAX_COLUMNS

    (events,) = (tmp_path / "run/tensorboard").glob("events*")
    assert b"scalars/param_norm" in events.read_bytes()
    html = page.render_page(read.load_runs([tmp_path / "run"]))
    assert "param_norm" in html and long_name in html and repr(norm)[:5] in html


def test_mfu_is_of_all_devices_and_money_is_in_dollars(tmp_path, monkeypatch, caplog):
    """7 steps of 640 tokens in 2 hours on 5 devices of 1.5 dollars per hour."""
    cost = DeviceCost(flops_per_token=9e3, peak_flops=4e3, usd_per_hour=1.5)
    now = [1000.0]
    monkeypatch.setattr("jaxpt.train.metrics.time.monotonic", lambda: now[0])
    logger = MetricsLogger(
        tmp_path,
        STEPS,
        tokens_per_step=640,
        n_devices=5,
        resumed_at=0,
        started=1000.0,
        cost=cost,
    )
    now[0] += 7200
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
    train(start(make_config(train__steps=4), tmp_path, lambda spec: cost))
    (record,) = read_records(tmp_path, TrainMetrics)
    assert record.mfu == pytest.approx(record.tokens_per_second * 3e5 / 7e9)
    assert record.usd == pytest.approx(record.seconds / 100)
    assert jax.device_count() == 8


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

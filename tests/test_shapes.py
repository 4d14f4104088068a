"""Laws of batches whose shape changes as the run goes on, and of contexts that grow with it."""

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import SMALL_SPEC
from test_session import compiled, make_config, start, train, train_in_parts  # noqa: F401

from jaxpt import io, sharding
from jaxpt.config import OptimConfig, TrainConfig
from jaxpt.data import loader
from jaxpt.data.loader import PackedSequence, cut_batch, make_batch
from jaxpt.data.mixture import MixtureSchedule
from jaxpt.evaluate import attribution
from jaxpt.growth.growth import Parent
from jaxpt.growth.new_params import NewParams
from jaxpt.growth.parse import plan_growth
from jaxpt.initialize import make_random_spec
from jaxpt.model import transformer
from jaxpt.plan import answer
from jaxpt.spec import UserError
from jaxpt.train import shapes, step
from jaxpt.train.begin import RunStart
from jaxpt.train.context import open_run
from jaxpt.train.meter import LostWork
from jaxpt.train.records import HeldoutRecord, TrainProgress
from jaxpt.train.schedule import make_lr_schedule
from jaxpt.train.session import Session
from jaxpt.weights import huggingface
from jaxpt.weights.load import LoadedModel

# packed sequences are of 64 tokens: 8 of them per step, then 5, then 16
SHAPES = ((0, 16, 32), (4, 5, 64), (9, 32, 32))


@pytest.fixture
def sequences():
    """Two sequences of 48: documents of 20, 9 and 15 with padding, and one of 48."""
    rng = np.random.default_rng(0)
    some = rng.integers(1, 90, 48).astype(np.int32)
    some[44:] = 0
    lengths, starts = np.array([20, 9, 15], np.int32), np.array([0, 4, 0], np.int32)
    other = rng.integers(1, 90, 48).astype(np.int32)
    zero = np.zeros(1, np.int32)
    return [PackedSequence(some, lengths, starts), PackedSequence(other, zero + 48, zero)]


@pytest.mark.parametrize("document_mask", [True, False])
def test_cut_sequences_lose_no_target_and_count_positions_from_their_start(
    sequences, document_mask
):
    whole = make_batch(sequences, document_mask)
    parts = cut_batch(whole, 4)
    assert parts.tokens.shape == (8, 12)
    for field in ("tokens", "targets", "loss_mask", "segment_ids"):
        np.testing.assert_array_equal(
            getattr(parts, field).reshape(2, 48), getattr(whole, field), err_msg=field
        )
    is_text = parts.segment_ids > 0
    assert parts.positions.max() == 11 and (parts.positions[:, 0] == 0).all()
    same = (parts.segment_ids[:, 1:] == parts.segment_ids[:, :-1]) & is_text[:, 1:]
    np.testing.assert_array_equal(np.diff(parts.positions)[same], 1)
    assert cut_batch(whole, 1) is whole


def test_a_part_is_read_as_a_sequence_of_its_own(sequences, one):
    """Its logits are those of the part alone, wherever its sequence was cut."""
    params = transformer.init_params(SMALL_SPEC, 0, one)
    parts = cut_batch(make_batch(sequences, True), 4)
    logits = transformer.compute_logits(SMALL_SPEC, params, *reading(parts))
    alone = jax.tree.map(lambda x: x[6:7], parts)
    positions = np.arange(12, dtype=np.int32)[None]
    expected = transformer.compute_logits(
        SMALL_SPEC, params, alone.tokens, alone.segment_ids, positions
    )
    np.testing.assert_allclose(logits[6:7], expected, atol=1e-5)


def test_the_losses_that_trace_ranks_are_those_of_the_parts_that_the_step_read(sequences, one):
    params = jax.tree.map(lambda x: 3 * x, transformer.init_params(SMALL_SPEC, 0, one))
    model = LoadedModel(SMALL_SPEC, params, None, None, None, None, {})
    parts = cut_batch(make_batch(sequences, True), 4)
    log_probs = jax.nn.log_softmax(
        transformer.compute_logits(SMALL_SPEC, params, *reading(parts)).astype(jnp.float32)
    )
    chosen = np.take_along_axis(np.asarray(log_probs), parts.targets[..., None], -1)[..., 0]
    found = attribution.compute_batch_losses(model, parts)
    np.testing.assert_allclose(found, -chosen * parts.loss_mask, rtol=1e-4, atol=1e-4)
    assert found[4, -1] > 0, "the target in the next part"


def test_a_trace_knows_the_parts_of_a_step(make_config, tmp_path):  # noqa: F811
    settings = make_config(train__shape_schedule=SHAPES)
    dataset = loader.open_packed(settings.mixture.packed_paths)
    schedule = MixtureSchedule(
        settings.mixture,
        dataset.n_sequences,
        8,
        fingerprint=dataset.fingerprint,
        batch_sizes=shapes.list_sequences_per_step(settings),
    )
    io.write_json(tmp_path / "config.json", dataclasses.asdict(settings))
    io.write_json(tmp_path / "phases.json", schedule.phases)
    found = [loader.list_step_sequences(tmp_path, step) for step in (4, 5, 9, 10)]
    assert [step.n_parts for step in found] == [2, 1, 1, 2]
    assert [len(step.places) for step in found] == [8, 5, 5, 16]


def test_a_batch_of_which_every_part_is_read_is_not_copied(
    make_config,  # noqa: F811
    one,
    monkeypatch,
):
    settings = make_config()
    dataset = loader.open_packed(settings.mixture.packed_paths)
    schedule = MixtureSchedule(settings.mixture, dataset.n_sequences, 8)
    cut, given = [], []
    monkeypatch.setattr(loader, "cut_batch", lambda *args: cut.append(cut_batch(*args)) or cut[-1])
    monkeypatch.setattr(loader, "make_global_batch", lambda batch, *_: given.append(batch))
    place = sharding.make_batch_sharding(one)
    for seq_len in (64, 32):
        stream = loader.iterate_batches(dataset, schedule, place, 8, 0, True, seq_len=seq_len)
        next(stream)
        stream.close()
        assert any(given[-1].tokens is batch.tokens for batch in cut)


def reading(batch):
    return batch.tokens, batch.segment_ids, batch.positions


def read_run(settings, one):
    """Return the tokens [n, 64] that the steps of a run would read, and those expected."""
    dataset = loader.open_packed(settings.mixture.packed_paths)
    place = sharding.make_batch_sharding(one)
    schedule = MixtureSchedule(
        settings.mixture,
        dataset.n_sequences,
        8,
        batch_sizes=shapes.list_sequences_per_step(settings),
    )
    found, n = [], 0
    for at in range(settings.train.steps):
        shape = shapes.find_shape(settings, at)
        stream = loader.iterate_batches(
            dataset, schedule, place, shape.batch_size, n, True, seq_len=shape.seq_len
        )
        batch = next(stream)
        stream.close()
        assert batch.tokens.shape == shape
        assert list(schedule.sequences_of(at + 1)) == [*range(n, n + shape.count_sequences(64))]
        found.append(np.asarray(batch.tokens).reshape(-1, 64))
        n += shape.count_sequences(64)
    expected = [dataset.read_sequence(*schedule.sequence_at(i)).tokens for i in range(n)]
    return np.concatenate(found), np.stack(expected)


def test_every_sequence_is_read_once_in_the_order_without_shapes(make_config, one):  # noqa: F811
    settings = make_config(train__shape_schedule=SHAPES)
    found, expected = read_run(settings, one)
    np.testing.assert_array_equal(found, expected)
    plain, _ = read_run(make_config(train__steps=8), one)
    np.testing.assert_array_equal(found[: len(plain)], plain)
    assert shapes.count_tokens(settings) == found.size == 64 * (4 * 8 + 5 * 5 + 5 * 16)
    assert shapes.count_tokens(settings, first=6) == 64 * (3 * 5 + 5 * 16)


@pytest.mark.slow
def test_a_run_whose_shapes_change_is_the_same_however_it_is_cut(
    make_config,  # noqa: F811
    start,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Its context grows as well; every shape is compiled once for each model."""
    built = []
    build_step = step.build_step

    def count(spec, train, optim, seq_len, *more):
        built.append((spec.max_seq_len, train.batch_size, seq_len))
        return build_step(spec, train, optim, seq_len, *more)

    monkeypatch.setattr(step, "build_step", count)
    settings = make_config(
        model__max_seq_len=32,
        train__shape_schedule=((0, 16, 32), (3, 32, 32), (5, 16, 32), (7, 8, 64), (11, 16, 32)),
        train__grow=((7, "extend_context(length=64, theta=40_000.0)"),),
        train__eval_every=6,
        optim__batch_power=0.5,
    )
    whole = train(start(settings, tmp_path / "whole"))
    expected = {(32, 16, 32), (32, 32, 32), (64, 8, 64), (64, 16, 32)}
    assert set(built) == expected and len(built) == 4
    assert whole.n_sequences == 8 * 14 + 8 * 2 and whole.spec.rope_theta == 40_000
    assert whole.meter.read().n_tokens == 64 * whole.n_sequences
    parts = train_in_parts(start, settings, tmp_path / "parts", (3, 4, 7, 9, 11))
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    assert whole.heldout_losses == parts.heldout_losses
    assert whole.schedule.phases == parts.schedule.phases


@pytest.fixture
def make_session(make_config, one, tmp_path):  # noqa: F811
    """A function that returns a session of a run of three shapes, of which nothing is compiled."""
    settings = make_config(train__shape_schedule=((0, 16, 32), (4, 8, 64), (9, 32, 32)))
    run = open_run(settings, tmp_path, list(settings.mixture.packed_paths), one)
    dataset = run.dataset
    spec = make_random_spec(settings.model, dataset.vocab_size, dataset.special_tokens)

    def make(at, parent=None):
        parent = parent or HeldoutRecord(**run.heldout.to_record({"prose": 3.0}))
        begins = RunStart(spec, TrainProgress(step=at), NewParams(), settings.mixture, parent)
        return Session(run, begins, LostWork())

    return make


def test_a_parent_is_compared_at_the_length_at_which_it_was_measured(make_session, caplog):
    caplog.set_level(logging.INFO)
    session = make_session(3)
    session.recompile = lambda: None
    assert session.parent_loss == {"prose": 3.0} and session.heldout.seq_len == 32
    for at, expected in ((4, None), (9, {"prose": 3.0})):
        session.step = at
        session.change_shape()
        assert session.parent_loss == expected and session.heldout.seq_len == session.shape.seq_len
        assert make_session(at, session.parent).parent_loss == expected  # as resumed there
    assert caplog.text.count("the parent was measured on sequences of another length") == 1
    assert session.run.heldout.seq_len == 32  # what a run is given stays the same


def test_a_resumed_run_compiles_all_shapes_at_its_start(make_session, monkeypatch):
    built = types.SimpleNamespace(compile=lambda *_: None)
    monkeypatch.setattr(step, "build_step", lambda *_: built)
    session = make_session(5)
    session.compile_steps()
    assert list(session.compiled) == [(8, 64), (32, 32)]
    session.step = 9
    session.recompile()
    assert session.is_new_step  # its memory was never tried


def test_the_rate_follows_the_root_of_the_tokens_per_step():
    train = TrainConfig(steps=20, shape_schedule=((0, 8, 64), (4, 16, 64), (9, 8, 32)))
    optim = OptimConfig(peak_lr=2.0, schedule="constant", warmup_frac=0, batch_power=0.5)
    rate = make_lr_schedule(optim, train)
    rates = [float(rate(jnp.int32(n))) for n in range(12)]
    assert rates == pytest.approx([2.0] * 4 + [2 * 2**0.5] * 5 + [2 / 2**0.5] * 3)
    kept = make_lr_schedule(dataclasses.replace(optim, batch_power=0.0), train)
    assert float(kept(jnp.int32(5))) == 2.0


BAD_SHAPES = {
    r"start at 0 and rise .*got \[1\]": ((1, 8, 64),),
    r"rise below train.steps = 14, got \[0, 14\]": ((0, 8, 64), (14, 8, 64)),
    r"from step 3: expected sequences .*divide pack.seq_len = 64, got 48": ((0, 8, 64), (3, 8, 48)),
    r"from step 0: .*whole packed sequences of 64 .*multiple of 2 sequences, got 7": ((0, 7, 32),),
}


@pytest.mark.parametrize(("message", "schedule"), BAD_SHAPES.items())
def test_a_schedule_that_packed_sequences_cannot_serve_is_refused(
    make_config,  # noqa: F811
    message,
    schedule,
):
    with pytest.raises(UserError, match=f"train.shape_schedule.*{message}"):
        make_config(train__shape_schedule=schedule)


def test_sequences_longer_than_the_model_supports_are_refused_before_the_run(
    make_config,  # noqa: F811
    start,  # noqa: F811
    tmp_path,
):
    shape = {"train__shape_schedule": ((0, 16, 32), (9, 8, 64)), "model__max_seq_len": 32}
    with pytest.raises(UserError, match=r"at most 32.*64 tokens after step 9.*extend_context"):
        start(make_config(**shape), tmp_path)
    late = ((10, "extend_context(length=64, theta=40_000.0)"),)
    with pytest.raises(UserError, match=r"at most 32.*64 tokens after step 9"):
        start(make_config(**shape, train__grow=late), tmp_path)


def test_a_plan_is_of_the_largest_step_and_of_all_tokens(make_config, capsys):  # noqa: F811
    settings = make_config(train__shape_schedule=SHAPES)
    plan = answer.run_plan(settings, answer.PlanRequest(target_names=["cpu:1"]))
    assert (plan.model.batch_size, plan.model.seq_len) == (32, 32)
    assert plan.tokens == shapes.count_tokens(settings)
    assert "every step is planned as its largest one" in " ".join(plan.notes)


# ---- the operator


def test_extend_context_changes_the_spec_alone():
    growth = plan_growth("extend_context(length=256, theta=500_000)", Parent(SMALL_SPEC))
    assert growth.child == SMALL_SPEC.replace(max_seq_len=256, rope_theta=500_000.0)
    assert not growth.sources and not growth.preserves_function
    growth = plan_growth("extend_context(length=256, yarn=4.0)", Parent(SMALL_SPEC))
    scaling = growth.child.rope_scaling
    assert (scaling.rope_type, scaling.factor) == ("yarn", 4.0)
    assert scaling.original_max_seq_len == SMALL_SPEC.max_seq_len


# beyond the context that the parent knows
LENGTH = 200
EXTENSIONS = ("extend_context(length=256, theta=500_000)", "extend_context(length=256, yarn=4)")


@pytest.mark.parametrize("operator", EXTENSIONS)
def test_logits_of_a_grown_context_equal_transformers(operator, one, tmp_path):
    child = plan_growth(operator, Parent(SMALL_SPEC)).child
    params = transformer.init_params(child, 0, one)
    params = jax.tree.map(lambda x: 3 * x, params)  # else attention would hardly see positions
    huggingface.write_hf_model(child, params, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    ids = np.random.default_rng(0).integers(0, 96, (2, LENGTH)).astype(np.int32)
    with torch.no_grad():
        expected = reference(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    segments = np.ones_like(ids)
    found = transformer.compute_logits(child, params, ids, segments, positions)
    np.testing.assert_allclose(found, expected, atol=3e-4 * abs(expected).max())
    before = transformer.compute_logits(SMALL_SPEC, params, ids, segments, positions)
    assert abs(before - expected).max() > 0.05 * abs(expected).max()


BAD_CONTEXTS = {
    "extend_context(length=64, theta=5e5)": r"integer of at least 65, got 64",
    "extend_context(length=256)": r"expected theta or yarn",
    "extend_context(length=256, theta=5e5, yarn=4)": r"expected theta or yarn",
    "extend_context(length=256, theta=10_000.0)": r"theta above 10000, the model's, got 10000",
    "extend_context(length=256, yarn=0.5)": r"yarn above 1",
    "extend_context(length=256, yarn='4')": r"yarn above 1, no stretching, got '4'",
    "extend_context(length=256, yarn=2)": r"64 tokens to 128 only. Use yarn=4 or more",
}


@pytest.mark.parametrize(("operator", "message"), BAD_CONTEXTS.items())
def test_a_context_that_cannot_be_had_is_refused(operator, message):
    with pytest.raises(UserError, match=f"extend_context.*{message}"):
        plan_growth(operator, Parent(SMALL_SPEC))


def test_yarn_does_not_replace_another_scaling():
    scaled = plan_growth(EXTENSIONS[1], Parent(SMALL_SPEC)).child
    with pytest.raises(UserError, match=r"without rope scaling, got yarn.*Use theta"):
        plan_growth("extend_context(length=512, yarn=8)", Parent(scaled))
    child = plan_growth("extend_context(length=512, theta=1e6)", Parent(scaled)).child
    assert child.rope_scaling == scaled.rope_scaling and child.rope_theta == 1e6

"""Laws of averaged weights: numpy's mean to the bit, the window, what is written and refused."""

import dataclasses

import jax
import numpy as np
import pytest
from test_train import SETTINGS, SPEC, make_batch, make_state, put

from jaxpt import config, sharding
from jaxpt.config import OptimConfig
from jaxpt.model import transformer
from jaxpt.plan import roofline
from jaxpt.spec import UserError
from jaxpt.train import average, merge, state, step
from jaxpt.train.records import CheckpointRecord
from jaxpt.train.schedule import find_average_window
from jaxpt.weights import checkpoint, load

# 12 steps: 3 of warm-up, constant from the 4th to the 9th, then the decay
OPTIM = dataclasses.replace(SETTINGS.optim, schedule="wsd", decay_frac=0.25)


@pytest.fixture(scope="module")
def trained(one):
    """A function that returns the weights after each of 12 steps, and the last state."""

    def train(value):
        settings = dataclasses.replace(SETTINGS, optim=dataclasses.replace(OPTIM, average=value))
        seq_len = settings.pack.seq_len
        run = step.build_step(SPEC, settings.train, settings.optim, seq_len, one)
        now, weights = make_state(one, settings), []
        for i in range(12):
            batch = make_batch(i)
            if i == 6:  # a bad batch: its update is skipped
                batch = batch._replace(loss_mask=batch.loss_mask * np.nan)
            now, _ = run(now, put(batch, one))
            weights.append(jax.device_get(now.params))
        return weights, now

    return train


def test_the_mean_is_numpys_to_the_bit_over_the_last_steps_before_the_decay(trained):
    weights, last = trained(5)
    taken = [weights[i] for i in (4, 5, 7, 8)]  # after updates 5 to 9, but for the bad one
    expected = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0), *taken)
    found = jax.device_get(average.read_average(last.average))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert int(last.average["count"]) == 4


def test_the_moving_average_is_over_the_whole_phase_and_starts_at_its_first_weights(trained):
    weights, last = trained(0.75)
    expected = weights[3]
    for i in (4, 5, 7, 8):
        expected = jax.tree.map(lambda a, w: 0.75 * a + 0.25 * w, expected, weights[i])
    found = average.read_average(last.average)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_an_average_changes_no_update(trained, one):
    weights, _ = trained(5)
    without, _ = trained(0.0)
    jax.tree.map(np.testing.assert_array_equal, weights[-1], without[-1])


def test_it_is_sharded_as_its_weights():
    mesh = sharding.make_mesh(config.MeshConfig(fsdp=4, tensor=2))
    abstract = state.make_abstract_state(SPEC, dataclasses.replace(OPTIM, average=5), mesh)
    params = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    assert jax.tree.map(lambda leaf: leaf.sharding, abstract.average["sum"]) == params
    without, counted = (
        roofline.count_state_bytes(SPEC, dataclasses.replace(OPTIM, average=n), "bfloat16")
        for n in (0, 5)
    )
    assert counted.moments - without.moments == 4 * transformer.count_params(SPEC)


def test_the_average_of_a_checkpoint_is_written_as_a_model(trained, tmp_path, one):
    _, last = trained(5)
    checkpoint.save_checkpoint(
        tmp_path / "run",
        12,
        last.params,
        state.rest_of_state(last),
        SPEC,
        counts={},
        tokenizer=None,
        average=last.average,
    )
    merge.write_average(tmp_path / "run", tmp_path / "mean")
    found = load.load_model(tmp_path / "mean", one).params
    jax.tree.map(np.testing.assert_array_equal, found, average.read_average(last.average))


def test_a_checkpoint_without_an_average_is_refused(tmp_path, one):
    params = transformer.init_params(SPEC, 0, one)
    counts = {"step": np.zeros(1, np.int32)}
    checkpoint.save_checkpoint(tmp_path, 7, params, counts, SPEC, counts={}, tokenizer=None)
    with pytest.raises(UserError, match="holds no averaged weights"):
        merge.write_average(tmp_path, tmp_path / "mean")


def test_an_average_begins_anew_where_other_updates_are_to_be_averaged(tmp_path, one, caplog):
    """In a run that was prolonged, or whose knob changed."""
    optim = dataclasses.replace(OPTIM, average=5)
    now = make_state(one, dataclasses.replace(SETTINGS, optim=optim))
    stored = average.add_weights(now.average, now.params, optim, np.bool_(True))
    record = CheckpointRecord(step=6, average=average.describe_average(optim, 12))
    rest, counts = state.rest_of_state(now), record.to_json()
    checkpoint.save_checkpoint(
        tmp_path, 6, now.params, rest, SPEC, counts=counts, tokenizer=None, average=stored
    )

    def restore(value, n_steps):
        changed = dataclasses.replace(optim, average=value)
        abstract = state.make_abstract_state(SPEC, changed, one)
        expected = average.describe_average(changed, n_steps)
        directory = checkpoint.find_newest(tmp_path)
        return state.restore_state(directory, now.params, abstract, expected).average

    jax.tree.map(np.testing.assert_array_equal, restore(5, 12), stored)
    assert not caplog.records
    for value, n_steps in ((5, 24), (3, 12), (0.75, 12)):
        assert average.read_average(restore(value, n_steps)) is None
        assert "the average begins anew" in caplog.messages[-1]


@pytest.mark.parametrize("value", ["-1", "2.5"])
def test_a_window_that_is_no_number_of_steps_is_refused(value):
    with pytest.raises(UserError, match="expected a whole number of steps, a decay"):
        config.build_config(config.apply_overrides([f"--config.optim.average={value}"]))


def test_a_window_longer_than_the_constant_phase_is_refused():
    with pytest.raises(UserError, match="expected at most 6, the steps at the constant rate"):
        find_average_window(dataclasses.replace(OPTIM, average=7), 12)
    cosine = OptimConfig(schedule="cosine", average=0.9)
    with pytest.raises(
        UserError, match=r"expected at most 0, .* Set fewer, or optim\.schedule=wsd"
    ):
        find_average_window(cosine, 12)
